"""Checkpoints that are damaged on the disk: seen, named and never used.

Each file of a checkpoint is damaged in each way. Naming that checkpoint must be refused with the
name of the file; resuming the run must fall back to the one before it and end as if the damaged one
had never been.
"""

from __future__ import annotations

import argparse
import functools
import random
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

from abacist.learning.resume.checkpoints import defect
from soak import warm
from soak.kills import (
    SAVE_OF_STEP,
    SAVE_STEPS,
    Trials,
    finish,
    kill_in_save,
    train_anew,
    uninterrupted,
)
from soak.ledger import Trial

FLIPS = 8


def _flip(path: Path, rng: random.Random) -> None:
    content = bytearray(path.read_bytes())
    place = rng.randrange(len(content) * 8)
    content[place // 8] ^= 1 << place % 8
    path.write_bytes(content)


def _zero(path: Path, rng: random.Random) -> None:
    path.write_bytes(bytes(path.stat().st_size))


def _halve(path: Path, rng: random.Random) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


WAYS: dict[str, Callable[[Path, random.Random], object]] = {
    "one bit flipped": _flip,
    "zeroed": _zero,
    "halved": _halve,
    "emptied": lambda path, rng: path.write_bytes(b""),
    "missing": lambda path, rng: path.unlink(),
}


def damage(shared: Path, options: argparse.Namespace) -> Trials:
    """A trial for every file of a checkpoint."""
    whole, _ = uninterrupted(shared)
    begun, seen = shared / "begun" / "run", shared / "seen"
    code = warm.exit_code(
        train_anew(begun, output=shared / "output", before=lambda: kill_in_save(0, seen))
    )
    if code != -signal.SIGKILL:
        raise RuntimeError((shared / "output").read_text(encoding="utf-8"))
    newest = begun / f"checkpoint-{SAVE_OF_STEP - SAVE_STEPS}"
    names = sorted(
        path.relative_to(newest).as_posix() for path in newest.rglob("*") if path.is_file()
    )
    return [(name, functools.partial(_damage, newest, whole, name)) for name in names]


def _damage(newest: Path, whole: Path, name: str, place: Path) -> Trial:
    trial, rng = Trial(), random.Random(name)
    for number, (way, do) in enumerate(WAYS.items()):
        run = place / str(number) / "run"
        shutil.copytree(newest.parent, run)
        checkpoint = run / newest.name
        kept = (checkpoint / name).read_bytes()
        for _ in range(FLIPS if do is _flip else 1):
            (checkpoint / name).write_bytes(kept)
            do(checkpoint / name, rng)
            found = str(defect(checkpoint))
            wrong = [] if str(checkpoint / name) in found else [f"what was found: {found}"]
            trial.expect(f"{name} {way}", wrong)
        output = run.parent / "output"
        code = warm.exit_code(warm.train("--resume", str(checkpoint), output=output))
        said = output.read_text(encoding="utf-8")
        wrong = [] if code == 1 and "is not resumed" in said else [f"naming it ended with {code}"]
        if str(checkpoint / name) not in said or "Traceback" in said:
            wrong.append("the refusal does not name the file")
        trial.expect(f"{name} {way}, and named", wrong)
        if do in (_flip, WAYS["missing"]):
            wrong = finish(run, whole)
            if f"{newest.name} is passed over" not in (run.parent / "finish").read_text(
                encoding="utf-8"
            ):
                wrong.append("the fall back is not told")
            trial.expect(f"{name} {way}, and the run resumed", wrong)
        shutil.rmtree(run)
    return trial
