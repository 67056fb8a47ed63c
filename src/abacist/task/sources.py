"""Rows from wherever a data set lives: one file, a folder of splits, or the Hugging Face Hub.

This file knows formats and layouts and nothing of mathematics: it yields one :class:`Row` per
record and says where the record stands, so that ``problems`` can name file and line when it
finds fault with one. A record that cannot be read at all (a line cut short, bytes that are not
UTF-8) comes as a row with a ``defect``. Damage to a whole file raises
:class:`~abacist.errors.DataError`, because nothing behind the damage can be trusted.

Text is UTF-8, or UTF-16 or UTF-32, as Excel's may be, with a byte order mark or without. CSV fields
are separated by what cuts the header into the most columns: a comma, a semicolon or a tab. JSON
lines end at ``\\n`` and nowhere else: GSM8K's texts hold U+2028, at which ``str.splitlines`` would
cut.

A number of a 32-bit or 16-bit float column is the shortest decimal that is that number: 0.1, where
widening alone would make it 0.10000000149011612.
"""

from __future__ import annotations

import codecs
import csv
import io
import json
import re
import reprlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from abacist.errors import DataError
from abacist.task.hub import fault, offline
from abacist.task.plain import shortest

HUB_TIMEOUT_SECONDS = 5.0
MAX_SHOWN_CHARS = 60
_SAVED = "state.json"  # beside the tables of a data set that `save_to_disk` wrote

_SAVE_SHEET = "Save the sheet as “CSV UTF-8”, and give that file."
_UNPACK = "Unpack it, and give the file inside."
_NOT_TEXT = {  # the first bytes of a file: what it is, and what to do
    b"PK\x03\x04": (
        "an Excel workbook or a zip archive",
        "Save the sheet as “CSV UTF-8”, or unpack the archive, and give that file.",
    ),
    b"\xd0\xcf\x11\xe0": ("an old Excel workbook", _SAVE_SHEET),
    b"\x1f\x8b": ("compressed with gzip", _UNPACK),
    b"(\xb5/\xfd": ("compressed with zstd", _UNPACK),
    b"\xfd7zXZ": ("compressed with xz", _UNPACK),
    b"7z\xbc\xaf": ("a 7z archive", _UNPACK),
    b"PAR1": ("a Parquet file", "Let its name end in .parquet."),
    b"ARROW1": ("an Arrow file", "Let its name end in .arrow."),
    b"%PDF-": ("a PDF", "Give the table that it was made from."),
}
_CSV_DELIMITERS = ",;\t"

_shown = reprlib.Repr()
_shown.maxstring = _shown.maxother = MAX_SHOWN_CHARS
_shown.maxlevel, _shown.maxlist, _shown.maxdict = 2, 3, 3


def shown(value: object) -> str:
    """A value of a data set for a message: escaped and cut: a text to :data:`MAX_SHOWN_CHARS`.

    >>> shown("3,5\\x1b[2J"), len(shown("1" * 1000)), shown(float("nan"))
    ("'3,5\\\\x1b[2J'", 60, 'nan')
    """
    try:
        text = _shown.repr(value)
    except Exception:  # a number too long to be printed, say
        return f"a {type(value).__name__}"
    return text if len(text) <= 2 * MAX_SHOWN_CHARS else text[: 2 * MAX_SHOWN_CHARS - 3] + "..."


class Row(NamedTuple):
    """One record of a source and the place it stands; ``fields`` is empty if it has a defect."""

    file: str
    place: str  # "line 7", or "row 7" where lines mean nothing
    fields: Mapping[str, object]
    defect: str = ""


def read_file(path: Path) -> Iterator[Row]:
    """The rows of one ``.jsonl``, ``.json`` (a list, or JSON lines), ``.csv``, ``.tsv``,
    ``.parquet`` or ``.arrow`` file.

    Raises DataError if the file cannot be opened, its format is unknown, or it is damaged as
    a whole.
    """
    if path.exists() and not path.is_file():  # a pipe would be waited for, and cannot be read again
        raise DataError(f"{path}: is no regular file.", "Write it to one first.")
    reader = _READERS.get(path.suffix.lower())
    if reader is None:
        _refuse_what_is_no_text(path, _beginning_of(path))
        raise DataError(
            f"{path}: cannot read a {path.suffix or 'suffix-less'} file.",
            f"Give a file that ends in {', '.join(_READERS)}.",
        )
    return reader(path)


def read_folder(folder: Path, split: str, config: str | None) -> Iterator[Row]:
    """The rows of one split of a folder, all its shards in order.

    ``split.jsonl``, ``split-00000-of-00002.parquet``, ``data/split-…``, ``split/*`` and what
    ``save_to_disk`` of ``datasets`` writes are found, in the folder itself, in its subfolder
    ``config``, or in the one subfolder that has them (``main`` wins over others). Raises DataError
    if there is none, more than one choice, or a shard is missing.
    """
    root = folder / config if config and (folder / config).is_dir() else folder
    files = _files_of_split(root, split)
    if not files:
        below = {
            sub.name: found
            for sub in _listing(root)
            if sub.is_dir() and (found := _files_of_split(sub, split))
        }
        if len(below) > 1 and "main" not in below:
            raise DataError(
                f"{folder}: the split {split!r} is in several subfolders: {', '.join(below)}.",
                "Choose one with --dataset_config.",
            )
        files = below.get("main") or next(iter(below.values()), [])
    if not files:
        present = ", ".join(path.name for path in _listing(root)[:8]) or "nothing"
        raise DataError(
            f"{folder}: no file for the split {split!r}; it holds {present}.",
            f"Name a file {split}.jsonl, {split}.csv or {split}.parquet, or choose another split: "
            "--split in abacist eval, else --dataset_train_split and --dataset_test_split.",
        )
    return (row for path in files for row in read_file(path))


def read_hub(name: str, split: str, config: str | None) -> Iterator[Row]:
    """The rows of one split of a Hub data set, or of its copy in the local cache.

    An absent network costs at most a few seconds: ``load_dataset`` alone would retry for
    half a minute, so the Hub is asked once first, and without an answer only the cache is read.
    Raises DataError if neither has it.
    """
    import datasets  # takes over a second to import
    from huggingface_hub import HfApi
    from huggingface_hub.errors import RepositoryNotFoundError

    way_on = (
        "Or give a local path as --dataset_name, or --dataset_name generated, which needs no "
        "network."
    )
    unreached: Exception | None = None
    try:
        HfApi().dataset_info(name, timeout=HUB_TIMEOUT_SECONDS)
    except RepositoryNotFoundError as error:
        message, hint = fault(error, name, "data set")
        raise DataError(message, f"{hint} {way_on}") from error
    except Exception as error:  # no route, proxy, time-out, 5xx, offline mode: perhaps it is cached
        unreached = error
    is_offline = datasets.config.HF_HUB_OFFLINE
    try:
        with _offline(datasets.config, unreached is not None):
            table = datasets.load_dataset(name, config, split=split)
    except Exception as error:  # the library raises anything from ValueError to OSError
        if is_offline:
            message, hint = offline(name, "data set")
        elif unreached is not None:
            message, hint = fault(unreached, name, "data set")
        else:
            reason = next(iter(str(error).strip().split("\n")), "") or type(error).__name__
            message = f"Abacist could not load {name!r} (split {split!r}): {reason}"
            hint = "If it is gated, accept its terms on its page, then run 'hf auth login'."
        raise DataError(message, f"{hint} {way_on}") from error
    where = f"{name}{f' ({config})' if config else ''}, split {split}"
    kinds = kinds_of(table)
    return (
        Row(where, f"row {number}", shortest(fields, kinds))
        for number, fields in enumerate(table, 1)
    )


def kinds_of(table: object) -> dict[str, str]:
    """The type of each column of a ``datasets.Dataset``; none of a table that does not tell."""
    features = getattr(table, "features", None)
    if not isinstance(features, Mapping):
        return {}
    return {column: str(getattr(kind, "dtype", "")) for column, kind in features.items()}


@contextmanager
def _offline(config: object, wanted: bool) -> Iterator[None]:
    """``datasets`` reads only its cache inside; the switch is a module global, so put it back."""
    before = getattr(config, "HF_HUB_OFFLINE", False)
    config.HF_HUB_OFFLINE = before or wanted  # type: ignore[attr-defined]
    try:
        yield
    finally:
        config.HF_HUB_OFFLINE = before  # type: ignore[attr-defined]


@contextmanager
def _readable_or_refused(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}).") from error


def _listing(folder: Path) -> list[Path]:
    with _readable_or_refused(folder):
        return sorted(folder.iterdir())


def _files_of_split(folder: Path, split: str) -> list[Path]:
    named = re.compile(rf"{re.escape(split)}(-\d+-of-\d+)?")
    for place in (folder, folder / "data"):
        files = [path for path in _readable(place) if named.fullmatch(path.stem)]
        if files:
            _check_shards(files)
            return files
    if split == "train" and (folder / _SAVED).is_file():
        return _saved_files(folder)
    if (folder / split / _SAVED).is_file():
        return _saved_files(folder / split)
    return [path for path in _readable(folder / split) if path.suffix.lower() != ".json"]


def _saved_files(folder: Path) -> list[Path]:
    """What ``Dataset.save_to_disk`` of ``datasets`` wrote there."""
    files = [path for path in _readable(folder) if path.suffix.lower() == ".arrow"]
    if files:
        _check_shards(files)
    return files


def _readable(folder: Path) -> list[Path]:
    files = _listing(folder) if folder.is_dir() else []
    # `datasets` keeps results of its own beside the data.
    kept = (path for path in files if not re.fullmatch(r"cache-.*\.arrow", path.name))
    return [path for path in kept if path.suffix.lower() in _READERS]


def _check_shards(files: list[Path]) -> None:
    """One whole file, or every shard of one set: anything else would be silently wrong data."""
    names = ", ".join(path.name for path in files)
    shards = [re.search(r"-(\d+)-of-(\d+)$", path.stem) for path in files]
    numbers = {int(shard[1]) for shard in shards if shard}
    totals = {int(shard[2]) if shard else 1 for shard in shards}
    if len(totals) > 1 or len(files) > max(1, len(numbers)):
        raise DataError(
            f"{files[0].parent}: several files claim the same split: {names}.",
            "Keep one of them, or give the file itself as --dataset_name.",
        )
    if numbers and numbers != set(range(*totals)):
        raise DataError(
            f"{files[0].parent}: of {totals.pop()} shards only these are there: {names}.",
            "Download the data set again.",
        )


def _beginning_of(path: Path) -> bytes:
    with _readable_or_refused(path), path.open("rb") as file:
        return file.read(16)


def _refuse_what_is_no_text(path: Path, data: bytes) -> None:
    for start, (what, way_on) in _NOT_TEXT.items():
        if data.startswith(start):
            raise DataError(f"{path}: is {what}, not a text file.", way_on)


def _utf8_of(path: Path) -> bytes:
    """The text of a file as UTF-8 without a mark at its start; not checked where it was UTF-8."""
    with _readable_or_refused(path):
        data = path.read_bytes()
    _refuse_what_is_no_text(path, data)
    # By a mark, or by which of the first bytes are null: a file begins with a brace or the letter
    # of a column.
    encoding = json.detect_encoding(data)
    try:
        is_utf8 = encoding.startswith("utf-8")
        text = data.removeprefix(codecs.BOM_UTF8) if is_utf8 else data.decode(encoding).encode()
    except UnicodeError as error:
        at = f" at byte {error.start + 1}" if isinstance(error, UnicodeDecodeError) else ""
        raise DataError(
            f"{path}: is {encoding.upper()}, and damaged{at} ({getattr(error, 'reason', error)}).",
            "Save it again, as UTF-8.",
        ) from error
    if text[:1000].count(0) > len(text[:1000]) // 4:
        raise DataError(f"{path}: is no text: it is full of null bytes.", "Save it as UTF-8.")
    return text


def _jsonl_rows(path: Path) -> Iterator[Row]:
    for number, line in enumerate(_utf8_of(path).split(b"\n"), 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line.decode("utf-8"))
        except (ValueError, RecursionError) as error:
            yield Row(str(path), f"line {number}", {}, _why_not_json(error))
        else:
            yield _record_row(path, f"line {number}", record)


def _json_rows(path: Path) -> Iterator[Row]:
    data = _utf8_of(path)
    if not data.lstrip().startswith(b"["):
        yield from _jsonl_rows(path)
        return
    try:
        records = json.loads(data.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: the file {_why_not_json(error)}.") from error
    for number, record in enumerate(records, 1):
        yield _record_row(path, f"row {number}", record)


def _record_row(path: Path, place: str, record: object) -> Row:
    if not isinstance(record, dict):
        what = f"holds a {type(record).__name__}, not an object: {shown(record)}"
        return Row(str(path), place, {}, what)
    return Row(str(path), place, record)


def _why_not_json(error: Exception) -> str:
    if isinstance(error, UnicodeDecodeError):
        before = error.object[max(0, error.start - 20) : error.start].decode("utf-8", "ignore")
        return _why_not_utf8(before, error.object[error.start])
    if isinstance(error, json.JSONDecodeError):
        near = shown(error.doc[max(0, error.pos - 20) : error.pos + 20])
        said = error.msg.removesuffix(" at")  # "Unterminated string starting at"
        return f"is not valid JSON ({said} at character {error.pos + 1}, near {near})"
    if isinstance(error, RecursionError):
        return "is nested too deeply to be read as JSON"
    return "holds a number of too many digits"  # Python reads integers of at most 4,300


def _why_not_utf8(before: str, byte: int) -> str:
    meant = bytes([byte]).decode("windows-1252", "replace")
    guess = f", “{meant}” in Windows-1252" if meant.isprintable() and meant != "\ufffd" else ""
    return (
        f"is not valid UTF-8 (byte 0x{byte:02X}{guess}, after {shown(before)}; save the file as "
        "UTF-8)"
    )


def _csv_rows(path: Path) -> Iterator[Row]:
    text = _utf8_of(path).decode("utf-8", "surrogateescape")
    first_line, _, rest = text.partition("\n")
    said = re.fullmatch(r"sep=(.)\r?", first_line)  # Excel's way to name the delimiter
    if said:
        text = rest
    delimiter = said[1] if said else _delimiter_of(text)
    reader = csv.reader(io.StringIO(text, newline=""), strict=True, delimiter=delimiter)
    line = first = 2 if said else 1
    try:
        header = [name.strip() for name in next(reader, [])]
        if twice := [name for name in header if name and header.count(name) > 1]:
            raise DataError(
                f"{path}: the header names the column {shown(twice[0])} twice.",
                "Rename one of the two, or take it out.",
            )
        line = first + reader.line_num
        for values in reader:
            if any(value.strip() for value in values):  # spreadsheets end in rows of nothing
                yield _csv_row(str(path), f"line {line}", header, values)
            line = first + reader.line_num
    except csv.Error as error:
        raise DataError(f"{path}, line {line}: is not valid CSV ({error}).") from error


def _delimiter_of(text: str) -> str:
    """Of comma, semicolon and tab, what cuts the header into the most columns."""

    def columns(delimiter: str) -> int:
        try:
            return len(next(csv.reader(io.StringIO(text, newline=""), delimiter=delimiter), []))
        except csv.Error:
            return 0

    return max(_CSV_DELIMITERS, key=columns)  # the first of equals: the comma


def _csv_row(file: str, place: str, header: list[str], values: list[str]) -> Row:
    while len(values) > len(header) and not values[-1].strip():
        values.pop()
    joined = "".join(values)
    if not _is_text(joined):
        at = next(i for i, character in enumerate(joined) if "\udc80" <= character <= "\udcff")
        return Row(
            file, place, {}, _why_not_utf8(joined[max(0, at - 20) : at], ord(joined[at]) - 0xDC00)
        )
    if len(values) != len(header):
        what = f"has {len(values)} fields, the header has {len(header)}: {shown(values)}"
        return Row(file, place, {}, what)
    named = zip(header, values, strict=True)
    return Row(file, place, {name: value for name, value in named if name})


def _is_text(text: str) -> bool:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _table_rows(path: Path) -> Iterator[Row]:
    """Of a Parquet file, an Arrow file, or an Arrow stream, as ``datasets`` saves it."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    kind = path.suffix.lower().removeprefix(".").capitalize()
    try:
        if kind == "Parquet":
            with pq.ParquetFile(path) as table:
                yield from _batch_rows(path, table.iter_batches())
            return
        with pa.OSFile(str(path)) as file:
            is_file = file.read(6) == b"ARROW1"
            file.seek(0)
            table = pa.ipc.open_file(file) if is_file else pa.ipc.open_stream(file)
            yield from _batch_rows(path, table.read_all().to_batches())
    except (pa.ArrowException, OSError, ValueError, OverflowError) as error:  # a date in year 10000
        raise DataError(f"{path}: not a readable {kind} file ({error}).") from error


def _batch_rows(path: Path, batches: Iterable[Any]) -> Iterator[Row]:
    number = 0
    for batch in batches:
        types = {column.name: str(column.type) for column in batch.schema}
        if len(types) < len(batch.schema.names):
            name = Counter(batch.schema.names).most_common(1)[0][0]
            raise DataError(f"{path}: has two columns {name[:60]!r}.", "Rename one of them.")
        for fields in batch.to_pylist():
            number += 1
            yield Row(str(path), f"row {number}", shortest(fields, types))


_READERS: dict[str, Callable[[Path], Iterator[Row]]] = {
    ".jsonl": _jsonl_rows,
    ".json": _json_rows,
    ".csv": _csv_rows,
    ".tsv": _csv_rows,
    ".parquet": _table_rows,
    ".arrow": _table_rows,
}
READABLE_SUFFIXES = frozenset(_READERS)
