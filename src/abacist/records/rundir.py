"""The directory of a run: where everything is, who may write, and what counts as a run.

Nothing a person owns is ever lost here: a directory that holds anything is refused, and
``overwrite`` clears only what is recognisably a run of ours that no process is writing, and that
nobody has put files of their own into. Files
are written aside and moved into place, so a reader, or a crash, meets the old file or the new
one, never half of one.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from abacist.errors import RunError
from abacist.records.lock import LOCK_NAME, RunLock
from abacist.records.provenance import MANIFEST_FORMAT, MANIFEST_VERSION, RECORDED_PACKAGES
from abacist.records.settings import read_settings

RUNS_FOLDER = Path("runs")

_RUN_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]*")

# What stands at the top of a run: ours, then what the libraries save for a model and its tokenizer.
_ENTRY_OF_A_RUN = re.compile(
    r"config\.yaml|(manifest|seen|trackers)\.json|(shots|data|openings|metrics|timings)\.jsonl|"
    r"rollouts|evals|exports|completions|checkpoint-\d+|superseded|README\.md|report\.html|"
    r"(adapter_model|model(-\d+-of-\d+)?)\.safetensors|training_args\.bin|(merges|vocab)\.txt|"
    r"(tokenizer|spiece|sentencepiece\.bpe)\.model|"
    r"(configuration|modeling|tokenization|processing)_\w+\.py|\.DS_Store|"
    r"(config|(generation|adapter|tokenizer|processor|preprocessor)_config|special_tokens_map|"
    r"added_tokens|tokenizer|vocab|chat_template|trainer_state|.*\.safetensors\.index)\.json|"
    r"chat_template\.jinja|additional_chat_templates|ref|tensorboard|"
    r"\.saving.*|\..*\.tmp"
)

# What those who read a manifest rely on; null stands for what is not known.
_MANIFEST_TYPES: dict[str, type] = {
    **dict.fromkeys(("versions", "data", "model", "task"), dict),
    **dict.fromkeys(("argv", "resumed"), list),
    **dict.fromkeys(("platform", "git_commit", "dtype", "control", "recipe"), str),
    **dict.fromkeys(("seed", "processes"), int),
    **dict.fromkeys(("finished", "keeps_openings"), bool),
}
_DATA_TYPES: dict[str, type] = {"source": str, "problems": int, "sha256": str}
_DAMAGED = "Restore the file from a copy. `abacist doctor RUN` says what else is damaged."


class RunDir:
    """One run on disk. Get one by :meth:`reserve` (new, and locked) or :meth:`open` (existing).

    ::

        config.yaml  manifest.json  seen.json  openings.jsonl  metrics.jsonl  timings.jsonl
        trackers.json  rollouts/*.parquet  evals/  checkpoint-N/  and the trained model at the root

    As a context manager it gives the lock back at the end.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config_path = path / "config.yaml"  # the settings, complete: it runs again by them
        self.shots_path = path / "shots.jsonl"  # the worked examples of its prompt, if it has any
        self.data_path = path / "data.jsonl"  # its problems, if they were given in Python
        self.manifest_path = path / "manifest.json"  # what made it: see `records.provenance`
        self.openings_path = path / "openings.jsonl"  # when each split was opened, and what for
        self.metrics_path = path / "metrics.jsonl"  # an object a logged step
        self.timings_path = path / "timings.jsonl"  # clock readings: all else can be byte-equal
        self.trackers_path = path / "trackers.json"  # what W&B and Trackio call it, if it is there
        self.rollouts_dir = path / "rollouts"  # every completion of the run, in Parquet files
        self.evals_dir = path / "evals"  # a folder a measurement on held-out problems
        self._lock = RunLock(path)
        self._made: list[Path] = []  # folders made for it, which stay once something is in them

    @property
    def run_id(self) -> str:
        """The name of the directory, which rollouts and metrics carry."""
        return self.path.resolve().name

    @classmethod
    def reserve(cls, output_dir: Path | None, *, name: str, overwrite: bool = False) -> RunDir:
        """A place for a new run, locked for this process; what stands there is left alone.

        ``output_dir``, or the next free ``runs/<name>-001``, ``-002`` … below the working
        directory. :meth:`clear` begins the run. A place that is released without that is as it
        was. Raises RunError if the directory holds anything, unless it is a run and ``overwrite``
        is set, is being written, or cannot be made, or if a run cannot be named ``name``.
        """
        run = cls.check(output_dir, name=name, overwrite=overwrite)
        try:
            if run is None:
                made = _make_folders(RUNS_FOLDER)
                run = cls(_make_numbered(name))
                run._made = [*made, run.path]
            else:
                run._made = _make_folders(run.path)
            run._lock.acquire()
        except OSError as error:
            raise _cannot_make(output_dir or RUNS_FOLDER, error.strerror) from error
        try:
            run._refuse_unless_ours(overwrite)  # again, now that nobody else can write
        except BaseException:
            run.release()
            raise
        return run

    @classmethod
    def check(cls, output_dir: Path | None, *, name: str, overwrite: bool = False) -> RunDir | None:
        """The run that :meth:`reserve` would give, None if it is to be numbered; writes nothing.

        Raises RunError as :meth:`reserve` does, but for what only writing shows.
        """
        if output_dir is None:
            if not _RUN_NAME.fullmatch(name):
                raise RunError(
                    f"A run cannot be named {name!r}: its folder is called after it.",
                    "Use letters from a to z, digits, dots, dashes and underscores; begin with a "
                    "letter or digit. With --output_dir any --run_name will do.",
                )
            return None
        run = cls(Path(output_dir))
        try:
            if run.path.exists() and not run.path.is_dir():
                raise _cannot_make(run.path, "a file is in its place")
            run._refuse_unless_ours(overwrite)
        except OSError as error:
            raise _cannot_make(run.path, error.strerror) from error
        return run

    @classmethod
    def open(cls, path: Path) -> RunDir:
        """An existing run, not locked: call :meth:`lock` before writing. RunError if it is none."""
        run = cls(path)
        run.read_manifest()
        return run

    def lock(self) -> None:
        """Take the right to write. Raises RunError if another live process has it."""
        self._lock.acquire()

    def release(self) -> None:
        """Give the right to write back. Folders that were made for it and are empty go."""
        self._lock.release()
        for folder in reversed(self._made):
            with contextlib.suppress(OSError):  # not empty: a run, or others' runs
                folder.rmdir()
        self._made = []

    def __enter__(self) -> RunDir:
        return self

    def __exit__(self, *exception: object) -> None:
        self.release()

    def write_manifest(self, manifest: Mapping[str, Any]) -> None:
        """Write what ``provenance.build_manifest`` made. From then on the directory is a run."""
        write_json(self.manifest_path, manifest)

    def clear_half_written(self) -> None:
        """Remove what :func:`write_aside` was writing when its process died. Lock the run first."""
        for folder in (self.path, self.rollouts_dir, self.evals_dir, *self.evals_dir.glob("*/")):
            for path in folder.glob(".*.tmp"):
                path.unlink()

    def read_manifest(self) -> dict[str, Any]:
        """The manifest. Raises RunError if there is none, it is damaged, or it is too new."""
        if not self.path.is_dir():
            raise RunError(f"{self.path}: no such run directory.", "Runs are kept below runs/.")
        try:
            manifest = json.loads(self.manifest_path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise RunError(
                f"{self.path}: not a run, it has no manifest.json.",
                "Give the directory that `abacist train` named at its end.",
            ) from None
        except (OSError, ValueError, RecursionError) as error:
            raise RunError(f"{self.manifest_path}: damaged ({error}).", _DAMAGED) from error
        if not isinstance(manifest, dict) or manifest.get("format") != MANIFEST_FORMAT:
            of_checkpoint = "Of a checkpoint, give the run that it is in."
            raise RunError(f"{self.path}: its manifest.json is not that of a run.", of_checkpoint)
        if manifest.get("format_version") != MANIFEST_VERSION:
            raise RunError(
                f"{self.path}: a run of format {manifest.get('format_version')}, this Abacist "
                f"reads format {MANIFEST_VERSION}.",
                "Use the Abacist that wrote it, or a newer one.",
            )
        for where, entries, kinds in (
            ("", manifest, _MANIFEST_TYPES),
            ("data.", manifest.get("data") or {}, _DATA_TYPES),
            ("versions.", manifest.get("versions") or {}, dict.fromkeys(RECORDED_PACKAGES, str)),
        ):
            for name, kind in kinds.items():
                value = entries.get(name) if isinstance(entries, dict) else entries
                if value is not None and (type(value) is not kind):
                    said = f"{where}{name} is {repr(value)[:60]}"
                    raise RunError(f"{self.manifest_path}: damaged ({said}).", _DAMAGED)
        return manifest

    def read_settings(self) -> dict[str, Any]:
        """What ``config.yaml`` holds. Raises RunError if it cannot be read."""
        return read_settings(self.config_path)

    def _contents(self) -> list[Path]:
        """What the directory holds beside our lock, which a crash before anything else leaves."""
        if not self.path.is_dir():
            return []
        return [entry for entry in self.path.iterdir() if entry.name != LOCK_NAME]

    def _refuse_unless_ours(self, overwrite: bool) -> None:
        if not self._contents():
            return
        if not overwrite:
            raise RunError(
                f"{self.path}: exists already and is not empty.",
                "Choose another --output_dir, or clear an old run there with --overwrite.",
            )
        here = Path.cwd()
        if self.path.resolve() in (here, *here.parents):
            raise RunError(f"{self.path}: not overwritten, the working directory is inside it.")
        try:
            self.read_manifest()
        except RunError as error:
            raise RunError(
                f"{self.path}: not overwritten, it does not look like a run. {error.message}",
                "Choose another --output_dir, or remove that directory yourself.",
            ) from error
        names = sorted(entry.name for entry in self._contents())
        if foreign := [name for name in names if not _ENTRY_OF_A_RUN.fullmatch(name)]:
            more = f" and {len(foreign) - 3} more" if len(foreign) > 3 else ""
            raise RunError(
                f"{self.path}: not overwritten, it holds what no run writes: "
                f"{', '.join(foreign[:3])}{more}.",
                "Move that elsewhere first, or choose another --output_dir.",
            )

    def clear(self) -> None:
        """Empty the directory, the manifest last: a clearing cut short can be taken up again."""
        for entry in sorted(self._contents(), key=lambda entry: entry == self.manifest_path):
            if entry.is_dir() and not entry.is_symlink():
                shutil.rmtree(entry)
            else:
                entry.unlink()


def _cannot_make(path: Path, why: str | None) -> RunError:
    return RunError(
        f"{path}: cannot make the run directory ({why}).", "Choose another place with --output_dir."
    )


def _make_folders(path: Path) -> list[Path]:
    """Make ``path`` and what lies above it; those that were not there, outermost first."""
    missing = [folder for folder in (path, *path.parents) if not folder.exists()]
    path.mkdir(parents=True, exist_ok=True)
    return missing[::-1]


def _make_numbered(name: str) -> Path:
    """``runs/<name>-NNN``, made new, one above the highest number there is."""
    RUNS_FOLDER.mkdir(parents=True, exist_ok=True)
    numbered = re.compile(rf"{re.escape(name)}-(\d+)")
    taken = [numbered.fullmatch(entry.name) for entry in RUNS_FOLDER.iterdir()]
    number = max((int(match[1]) for match in taken if match), default=0)
    while True:
        number += 1
        path = RUNS_FOLDER / f"{name}-{number:03d}"
        try:
            path.mkdir()
        except FileExistsError:  # another process was quicker
            continue
        return path


def read_json_lines(path: Path) -> tuple[list[dict[str, Any]], int]:
    """The JSON objects of a file, one a line, and how many lines are none; a crash may cut one.

    Raises OSError if there is no such file, or it cannot be read.
    """
    rows: list[dict[str, Any]] = []
    damaged = 0
    # Not by splitlines(): a line of JSON may hold U+2028.
    for line in path.read_text(encoding="utf-8", errors="replace").split("\n"):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            row = None
        if isinstance(row, dict):
            rows.append(row)
        else:
            damaged += 1
    return rows, damaged


def write_aside(path: Path, data: bytes) -> None:
    """Write a file whole or not at all: to a neighbour first, to disk, then into place."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with aside.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
    except OSError as error:  # says which file could not be written, and not the neighbour's name
        error.filename, error.filename2 = str(path), None
        raise
    finally:
        aside.unlink(missing_ok=True)


def write_json(path: Path, value: Any) -> None:
    """Write JSON as every file of a run is written: UTF-8, sorted keys, indented, atomically.

    A lone surrogate (an argument that was no UTF-8) becomes a ``\\u`` escape. Raises ValueError
    for NaN and infinities, which JSON does not have.
    """
    text = json.dumps(value, ensure_ascii=False, indent=2, sort_keys=True, allow_nan=False)
    write_aside(path, (text + "\n").encode("utf-8", "backslashreplace"))
