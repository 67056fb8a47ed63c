"""A folder that is whole or not there: written beside its place, moved there when it is proven.

A full disk, Ctrl-C or a failed proof leaves nothing behind; what stood there before stays until the
new one is whole. After kill -9 the half-written folder is cleared by the next export to that place.
"""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from abacist.errors import RunError, first_line
from abacist.records.lock import may_run
from abacist.records.provenance import EXPORT_FORMAT, EXPORT_NAME
from abacist.records.seen import read_object

_FULL_DISK = ("No space left", "os error 28", "quota exceeded", "os error 122")


def refuse_taken(target: Path, *, overwrite: bool) -> None:
    """Raise RunError if ``target`` holds anything, but for an export where ``overwrite`` is set.

    An export that somebody has put files of their own into is left alone.
    """
    if not target.exists() or (target.is_dir() and not any(target.iterdir())):
        return
    if not target.is_dir():
        raise RunError(f"{target}: a file is in its place.", "Name another place with -o.")
    if not overwrite:
        raise RunError(
            f"{target}: exists already and is not empty.",
            "Name another place with -o, or replace an export there with --overwrite.",
        )
    record = read_object(target / EXPORT_NAME)
    if record.get("format") != EXPORT_FORMAT:
        raise RunError(
            f"{target}: not overwritten, it does not look like an export.",
            "Name another place with -o, or remove that folder yourself.",
        )
    written = record.get("files")
    ours = {EXPORT_NAME, *map(str, written)} if isinstance(written, list) else None
    strangers = sorted(entry.name for entry in target.iterdir() if ours and entry.name not in ours)
    if strangers:
        raise RunError(
            f"{target}: not overwritten, it holds what no export writes: {strangers[0]}.",
            "Move that elsewhere first, or name another place with -o.",
        )


@contextmanager
def staged(target: Path, *, overwrite: bool) -> Iterator[Path]:
    """A new folder to write in; at the end it becomes ``target``, at an error it goes.

    Raises RunError as :func:`refuse_taken` does, and where the disk is full.
    """
    target = target.expanduser().resolve()  # "." and ".." have no name to put another beside
    refuse_taken(target, overwrite=overwrite)
    made = _missing_above(target)
    aside = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    replaced = target.with_name(f".{target.name}.{os.getpid()}.replaced.tmp")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        _clear_dead(target)
        aside.mkdir()
        yield aside
        _to_disk(aside)
        refuse_taken(target, overwrite=overwrite)  # again: minutes have passed
        if target.exists():
            target.rename(replaced)
        aside.rename(target)
    except Exception as error:
        if _is_full_disk(error):
            raise RunError(
                f"{target} was not written: the disk is full.",
                "Free some space, or name another place with -o. Nothing was left there.",
            ) from error
        if isinstance(error, OSError) and error.errno in (errno.EACCES, errno.EROFS):
            raise RunError(
                f"{target} cannot be written ({error.strerror}).", "Name another place with -o."
            ) from error
        raise
    finally:
        if replaced.exists() and not target.exists():
            replaced.rename(target)  # the new one was not moved there
        shutil.rmtree(replaced, ignore_errors=True)
        shutil.rmtree(aside, ignore_errors=True)
        for folder in made:
            if folder.is_dir() and not any(folder.iterdir()):
                folder.rmdir()


def _missing_above(target: Path) -> list[Path]:
    return [folder for folder in target.parents if not folder.exists()]


def _clear_dead(target: Path) -> None:
    """Remove what exports to ``target`` were writing whose process is gone."""
    for path in target.parent.glob(f".{target.name}.*.tmp"):
        number = path.name.removeprefix(f".{target.name}.").split(".")[0]
        if not number.isdecimal() or may_run(int(number)):
            continue
        if path.name.endswith(".replaced.tmp") and not target.exists():
            path.rename(target)  # it died between the two renames
        else:
            shutil.rmtree(path, ignore_errors=True)


def _to_disk(folder: Path) -> None:
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb+") as file:
                os.fsync(file.fileno())


def _is_full_disk(error: BaseException | None) -> bool:
    """Whether the system's complaint is at the bottom of it, in whatever words a library put it."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            return True
        text = first_line(error)
        if any(words in text for words in _FULL_DISK):
            return True
        if isinstance(error, OSError) and error.errno is None and "written" in text:
            return True  # NumPy's: "4096 requested and 512 written"
        error = error.__cause__ or error.__context__
    return False
