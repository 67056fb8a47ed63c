"""Checkpoints on disk: written aside, summed, moved into place, and verified before use.

A checkpoint is made in a hidden folder, every byte of it is brought to disk, a manifest of SHA-256
sums is written last, and one rename makes it ``checkpoint-N``. So a crash at any moment leaves
the old checkpoints and nothing half written, and damage is seen before anything is loaded.
Nothing here knows what is in the files.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from abacist.errors import NoCheckpoint, UsageError
from abacist.records.rundir import write_json

MANIFEST_NAME = "manifest.json"
MANIFEST_FORMAT = "abacist-checkpoint"
MANIFEST_VERSION = 1
ASIDE = ".saving"
SUPERSEDED = "superseded"

_NAME = re.compile(r"checkpoint-(\d+)")
# A file that was not saved with a checkpoint could be loaded in place of one that was.
_LOADABLE = (".safetensors", ".bin", ".pt", ".pth", ".index.json")


def step_of(checkpoint: Path) -> int:
    """The optimizer step a checkpoint stands after, from its name.

    >>> step_of(Path("runs/tiny-001/checkpoint-30"))
    30
    """
    match = _NAME.fullmatch(checkpoint.name)
    return int(match[1]) if match else -1


def checkpoints_of(run: Path) -> list[Path]:
    """All folders named ``checkpoint-N`` in ``run``, oldest first, sound or not."""
    if not run.is_dir():
        return []
    found = (entry for entry in run.iterdir() if _NAME.fullmatch(entry.name) and entry.is_dir())
    return sorted(found, key=step_of)


def seal(folder: Path, step: int) -> None:
    """Bring every file of ``folder`` to disk and write the manifest of their sums, last."""
    files = {}
    for path in _files(folder):
        with path.open("rb+") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
            files[path.relative_to(folder).as_posix()] = {"bytes": file.tell(), "sha256": digest}
            os.fsync(file.fileno())
    for inner in {path.parent for path in _files(folder)}:
        sync_folder(inner)
    manifest = {
        "format": MANIFEST_FORMAT,
        "format_version": MANIFEST_VERSION,
        "step": step,
        "files": files,
    }
    write_json(folder / MANIFEST_NAME, manifest | {"sha256": _sum_of(manifest)})
    sync_folder(folder)


def defect(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint, naming the file; None if every byte is as it was saved."""
    path = checkpoint / MANIFEST_NAME
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        listed = _listed(manifest)
    except FileNotFoundError:
        return f"{path} is missing, so the save was not finished or not Abacist's"
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return f"{path} is damaged"
    if manifest["step"] != step_of(checkpoint):
        return f"{path} belongs to step {manifest['step']}"
    for name, (size, digest) in listed.items():
        file = checkpoint / name
        try:
            if file.stat().st_size != size:
                return f"{file} has {file.stat().st_size} bytes instead of {size}"
            with file.open("rb") as opened:
                if hashlib.file_digest(opened, "sha256").hexdigest() != digest:
                    return f"{file} is not what was saved (its SHA-256 sum differs)"
        except FileNotFoundError:
            return f"{file} is missing"
        except OSError as error:
            return f"{file} cannot be read ({error.strerror})"
    for file in _files(checkpoint):
        if file.name.endswith(_LOADABLE) and file.relative_to(checkpoint).as_posix() not in listed:
            return f"{file} was not saved with it"
    return None


def choose(run: Path, wanted: str | bool | None, say: Callable[[str], None]) -> Path | None:
    """The checkpoint that ``resume_from_checkpoint`` means; None if it asks for none.

    ``True``, ``"true"`` and ``"latest"`` take the newest sound checkpoint of ``run``, and ``say``
    why newer ones are passed over. A path is that checkpoint, or a run whose newest is meant.
    Raises NoCheckpoint if there is none, or if the one that was named is not sound.
    """
    if asks_for_none(wanted):
        return None
    refuse_missing(run, wanted)
    if not is_latest(str(wanted)):
        path = Path(str(wanted))
        if step_of(path) >= 0:
            wrong = defect(path)
            if wrong:
                raise NoCheckpoint(
                    f"{path} is not resumed: {wrong}.",
                    f"Newest sound checkpoint: abacist train --resume {path.parent}; in a script, "
                    "trainer.train(resume_from_checkpoint='latest').",
                )
            return path
        run = path
    for path in reversed(checkpoints_of(run)):
        wrong = defect(path)
        if wrong is None:
            return path
        say(f"{path.name} is passed over: {wrong}")
    raise NoCheckpoint(f"{run}: there is no sound checkpoint to resume from.", _what_there_is(run))


def refuse_missing(run: Path, wanted: str | bool | None) -> None:
    """Raise NoCheckpoint if ``resume_from_checkpoint`` names a directory that is not there."""
    if asks_for_none(wanted) or is_latest(str(wanted)) or Path(str(wanted)).is_dir():
        return
    raise NoCheckpoint(f"{wanted}: no such checkpoint.", _what_there_is(run))


def run_to_resume(wanted: str | None, output_dir: str | None) -> Path | None:
    """The run directory that ``resume_from_checkpoint`` means: a run, the run of a checkpoint, or
    with ``true`` and ``latest`` the one in ``output_dir``. None if nothing is to be resumed.

    Raises UsageError if no directory is named, or two.
    """
    if asks_for_none(wanted):
        return None
    wanted = str(wanted)
    if is_latest(wanted):
        if output_dir is None:
            raise UsageError(
                "--resume_from_checkpoint does not say of which run",
                "abacist train --resume RUN, or add --output_dir RUN.",
            )
        return Path(output_dir)
    named = Path(wanted)
    run = named.parent if named.name.startswith("checkpoint-") else named
    if output_dir is not None and run.resolve() != Path(output_dir).resolve():
        raise UsageError(
            f"{wanted} does not belong to --output_dir {output_dir}",
            "A run is resumed where it is: leave --output_dir out.",
        )
    return run


def asks_for_none(wanted: str | bool | None) -> bool:
    """Whether ``resume_from_checkpoint`` asks for no resume at all."""
    return str(wanted).lower() in ("false", "none", "")


def is_latest(wanted: str) -> bool:
    """Whether ``resume_from_checkpoint`` asks for the newest one rather than names one."""
    return wanted.lower() in ("true", "latest")


def put_in_place(aside: Path, final: Path) -> None:
    """Make the sealed folder ``aside`` the checkpoint ``final``, by one rename.

    One of the same name makes way first; should the process die between the two renames,
    :func:`clear_leftovers` completes the second.
    """
    if final.exists():
        old = aside.parent / "old"
        shutil.rmtree(old, ignore_errors=True)
        os.replace(final, old)
    os.replace(aside, final)
    sync_folder(final.parent)
    shutil.rmtree(aside.parent, ignore_errors=True)


def clear_leftovers(run: Path) -> None:
    """Remove what a process that died while saving left behind; keep it if it was complete."""
    for folder in run.glob(f"{ASIDE}*"):
        if not folder.is_dir() or folder.is_symlink():
            continue
        for aside in checkpoints_of(folder):
            if not (run / aside.name).exists() and defect(aside) is None:
                os.replace(aside, run / aside.name)
        shutil.rmtree(folder, ignore_errors=True)


def rotate(run: Path, limit: int | None, best: str | None) -> None:
    """Delete the oldest checkpoints above ``limit``; never the newest, never the ``best``."""
    if not limit or limit < 1:
        return
    present = checkpoints_of(run)
    kept = {path for path in present[-1:] if path} | {
        path for path in present if best and path.name == Path(best).name
    }
    surplus = len(present) - max(limit, len(kept))
    for path in [path for path in present if path not in kept][: max(surplus, 0)]:
        # Renamed first: a deletion cut short must not leave a folder that looks like a checkpoint.
        doomed = run / f"{ASIDE}-rotated"
        shutil.rmtree(doomed, ignore_errors=True)
        os.replace(path, doomed)
        shutil.rmtree(doomed, ignore_errors=True)


def supersede_after(run: Path, step: int) -> list[Path]:
    """Move the checkpoints after ``step`` to ``superseded/``: a resumed run writes them anew."""
    moved = []
    for path in checkpoints_of(run):
        if step_of(path) > step:
            target = run / SUPERSEDED / path.name
            target.parent.mkdir(exist_ok=True)
            shutil.rmtree(target, ignore_errors=True)
            os.replace(path, target)
            moved.append(target)
    return moved


def move_files(source: Path, target: Path) -> None:
    """Move every file of ``source`` to ``target``, each whole and on disk first."""
    for path in _files(source):
        with path.open("rb+") as file:
            os.fsync(file.fileno())
        place = target / path.relative_to(source)
        place.parent.mkdir(parents=True, exist_ok=True)
        os.replace(path, place)
    sync_folder(target)
    shutil.rmtree(source, ignore_errors=True)


def sync_folder(folder: Path) -> None:
    """Bring a folder's list of names to disk, where the system can."""
    if os.name == "nt":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _files(folder: Path) -> list[Path]:
    return sorted(
        path for path in folder.rglob("*") if path.is_file() and path != folder / MANIFEST_NAME
    )


def _sum_of(manifest: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def _listed(manifest: Any) -> dict[str, tuple[int, str]]:
    if (manifest["format"], manifest["format_version"]) != (MANIFEST_FORMAT, MANIFEST_VERSION):
        raise ValueError(manifest["format"])
    if not isinstance(manifest["step"], int) or not manifest["files"]:
        raise ValueError(manifest["step"])
    # Its own sum: otherwise a bit that flips in here would be blamed on a file that is whole.
    if manifest["sha256"] != _sum_of({k: v for k, v in manifest.items() if k != "sha256"}):
        raise ValueError(manifest["sha256"])
    return {
        str(name): (int(entry["bytes"]), str(entry["sha256"]))
        for name, entry in manifest["files"].items()
    }


def _what_there_is(run: Path) -> str:
    names = [path.name for path in checkpoints_of(run)]
    return f"{run} holds {', '.join(names)}." if names else f"{run} holds no checkpoints."
