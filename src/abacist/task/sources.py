"""Rows from wherever a data set lives: one file, a folder of splits, or the Hugging Face Hub.

This file knows formats and layouts and nothing of mathematics: it yields one :class:`Row` per
record and says where the record stands, so that ``problems`` can name file and line when it
finds fault with one. A record that cannot be read at all (a line cut short, bytes that are not
UTF-8) comes as a row with a ``defect``. Damage to a whole file raises
:class:`~abacist.errors.DataError`, because nothing behind the damage can be trusted.

JSON lines end at ``\\n`` and nowhere else: GSM8K's texts hold U+2028, at which
``str.splitlines`` would cut.
"""

from __future__ import annotations

import codecs
import csv
import io
import json
import math
import re
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

from abacist.errors import DataError
from abacist.task.hub import fault, offline

HUB_TIMEOUT_SECONDS = 5.0


class Row(NamedTuple):
    """One record of a source and the place it stands; ``fields`` is empty if it has a defect."""

    file: str
    place: str  # "line 7", or "row 7" where lines mean nothing
    fields: Mapping[str, object]
    defect: str = ""


def read_file(path: Path) -> Iterator[Row]:
    """The rows of one ``.jsonl``, ``.json`` (a list, or JSON lines), ``.csv`` or ``.parquet`` file.

    Raises DataError if the file cannot be opened, its format is unknown, or it is damaged as
    a whole.
    """
    reader = _READERS.get(path.suffix.lower())
    if reader is None:
        raise DataError(
            f"{path}: cannot read a {path.suffix or 'suffix-less'} file.",
            f"Give a file that ends in {', '.join(_READERS)}.",
        )
    return reader(path)


def read_folder(folder: Path, split: str, config: str | None) -> Iterator[Row]:
    """The rows of one split of a folder, all its shards in order.

    ``split.jsonl``, ``split-00000-of-00002.parquet``, ``data/split-…`` and ``split/*`` are
    found, in the folder itself, in its subfolder ``config``, or in the one subfolder that has
    them (``main`` wins over others). Raises DataError if there is none, more than one choice,
    or a shard is missing.
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
            f"Name a file {split}.jsonl, {split}.csv or {split}.parquet, or say which split to "
            "read with --dataset_train_split and --dataset_test_split.",
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
    kinds = {
        column: str(getattr(kind, "dtype", ""))
        for column, kind in getattr(table, "features", {}).items()
    }
    return (
        Row(where, f"row {number}", _shortest(fields, kinds))
        for number, fields in enumerate(table, 1)
    )


# Format for `struct` and the digits that tell any two of them apart.
_NARROW_FLOATS = {
    "float": ("f", 9),
    "float32": ("f", 9),
    "halffloat": ("e", 5),
    "float16": ("e", 5),
}


def _shortest(fields: Mapping[str, object], kinds: Mapping[str, str]) -> Mapping[str, object]:
    """``fields`` with the numbers of float32 and float16 columns as they were written.

    Python's float has more digits than such a column: 0.1 would read 0.10000000149011612.

    >>> _shortest({"a": 0.10000000149011612, "b": 0.1}, {"a": "float", "b": "double"})
    {'a': 0.1, 'b': 0.1}
    """
    narrow = {name: _NARROW_FLOATS[kind] for name, kind in kinds.items() if kind in _NARROW_FLOATS}
    if not narrow:
        return fields
    return {
        name: _shortest_float(value, *narrow[name])
        if name in narrow and isinstance(value, float) and math.isfinite(value)
        else value
        for name, value in fields.items()
    }


def _shortest_float(value: float, kind: str, most_digits: int) -> float:
    for digits in range(1, most_digits):
        short = float(f"{value:.{digits}g}")
        with suppress(OverflowError):
            if struct.unpack(kind, struct.pack(kind, short))[0] == value:
                return short
    return value


@contextmanager
def _offline(config: object, wanted: bool) -> Iterator[None]:
    """``datasets`` reads only its cache inside; the switch is a module global, so put it back."""
    before = getattr(config, "HF_HUB_OFFLINE", False)
    config.HF_HUB_OFFLINE = before or wanted  # type: ignore[attr-defined]
    try:
        yield
    finally:
        config.HF_HUB_OFFLINE = before  # type: ignore[attr-defined]


def _listing(folder: Path) -> list[Path]:
    try:
        return sorted(folder.iterdir())
    except OSError as error:
        raise DataError(f"{folder}: cannot be read ({error.strerror}).") from error


def _files_of_split(folder: Path, split: str) -> list[Path]:
    named = re.compile(rf"{re.escape(split)}(-\d+-of-\d+)?")
    for place in (folder, folder / "data"):
        files = [path for path in _readable(place) if named.fullmatch(path.stem)]
        if files:
            _check_shards(files)
            return files
    return [path for path in _readable(folder / split) if path.suffix.lower() != ".json"]


def _readable(folder: Path) -> list[Path]:
    files = _listing(folder) if folder.is_dir() else []
    return [path for path in files if path.suffix.lower() in _READERS]


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


def _bytes_of(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}).") from error


def _utf8_of(path: Path) -> bytes:
    """The file's text in UTF-8 without a mark; UTF-16 and UTF-32, as Excel saves it, is converted.

    Bytes that are not valid UTF-8 stay as they are, so that the row can be named.
    """
    data = _bytes_of(path)
    # UTF-32 first: its little-endian mark begins with UTF-16's.
    for marks, encoding in (
        ((codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE), "utf-32"),
        ((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE), "utf-16"),
    ):
        if data.startswith(marks):
            try:
                return data.decode(encoding).encode("utf-8")
            except UnicodeError as error:
                raise DataError(
                    f"{path}: begins as {encoding.upper()} and is not valid {encoding.upper()} "
                    f"({error}).",
                    "Save it again, as UTF-8.",
                ) from error
    if data[:1000].count(0) > len(data[:1000]) // 4:
        raise DataError(
            f"{path}: looks like UTF-16 without a byte order mark, or is no text.",
            "Save it as UTF-8.",
        )
    return data.removeprefix(codecs.BOM_UTF8)


def _jsonl_rows(path: Path) -> Iterator[Row]:
    data = _utf8_of(path)
    for number, line in enumerate(data.split(b"\n"), 1):
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
        return Row(str(path), place, {}, f"holds a {type(record).__name__}, not an object")
    return Row(str(path), place, record)


def _why_not_json(error: Exception) -> str:
    if isinstance(error, UnicodeDecodeError):
        return f"is not valid UTF-8 (byte {error.start + 1})"
    if isinstance(error, json.JSONDecodeError):
        return f"is not valid JSON ({error.msg} at character {error.pos + 1})"
    return f"is not valid JSON ({type(error).__name__})"


def _csv_rows(path: Path) -> Iterator[Row]:
    text = _utf8_of(path).decode("utf-8", "surrogateescape")
    reader = csv.reader(io.StringIO(text, newline=""), strict=True, delimiter=_delimiter(text))
    line = 1
    try:
        header = next(reader, [])
        line = reader.line_num + 1
        for values in reader:
            if any(map(str.strip, values)):  # spreadsheets save empty rows behind the last
                yield _csv_row(str(path), f"line {line}", header, values)
            line = reader.line_num + 1
    except csv.Error as error:
        raise DataError(f"{path}, line {line}: is not valid CSV ({error}).") from error


def _delimiter(text: str) -> str:
    """What separates the header's fields: a comma, or Excel's semicolon or tab where it has none.

    >>> _delimiter("question,answer"), _delimiter("question;answer"), _delimiter("a\\tb")
    (',', ';', '\\t')
    """
    header = text.split("\n", 1)[0]
    return next((mark for mark in ",;\t" if mark in header), ",")


def _csv_row(file: str, place: str, header: list[str], values: list[str]) -> Row:
    if len(values) != len(header):
        return Row(file, place, {}, f"has {len(values)} fields, the header has {len(header)}")
    if not _is_text(values):
        return Row(file, place, {}, "is not valid UTF-8")
    return Row(file, place, dict(zip(header, values, strict=True)))


def _is_text(values: Iterable[str]) -> bool:
    try:
        "".join(values).encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _parquet_rows(path: Path) -> Iterator[Row]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    number = 0
    try:
        with pq.ParquetFile(path) as table:
            kinds = {one.name: str(one.type) for one in table.schema_arrow}
            for batch in table.iter_batches():
                for fields in batch.to_pylist():
                    number += 1
                    yield Row(str(path), f"row {number}", _shortest(fields, kinds))
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: not a readable Parquet file ({error}).") from error


_READERS: dict[str, Callable[[Path], Iterator[Row]]] = {
    ".jsonl": _jsonl_rows,
    ".json": _json_rows,
    ".csv": _csv_rows,
    ".parquet": _parquet_rows,
}
