"""When each split was opened: ``openings.jsonl``, a line an opening, written by whoever opens it.

A line is written before the first problem is asked, and lines are only ever added. Each holds the
hash of the line before it, so a line that was altered or taken out shows by the one after it.
Whoever writes all later lines anew, or cuts the last one, is found only where the rest of the run
says otherwise; :mod:`abacist.delivery.verify_openings` looks there.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import BinaryIO

from abacist.errors import RunError
from abacist.records.provenance import MANIFEST_FORMAT
from abacist.records.seen import question_key, read_object

if sys.platform != "win32":
    import fcntl

OPENINGS_NAME = "openings.jsonl"
#: In the manifest of a run that had this record from its beginning.
KEEPS_OPENINGS = "keeps_openings"

# What a split was opened for.
BEFORE, AFTER = "before training", "after training"
SELECTION = "selection during training"
TRAINING = "training"
EVAL, EXPORT = "abacist eval", "abacist export"
PURPOSES = (BEFORE, AFTER, SELECTION, TRAINING, EVAL, EXPORT)

FINAL = "final"  # the weights at the run's own place

_HASH_DIGITS = 16


@dataclass(frozen=True)
class Opening:
    """One time that problems of a split were put to a model.

    ``checkpoint`` is where in the run the weights were: ``checkpoint-N``, ``final``, or a folder of
    it; ``step`` how many steps they were trained, if that is known. ``of_the_verdict`` counts the
    problems that the run's verdict rests on. ``evaluation`` is the folder in the run that holds the
    result, if one does; ``data`` names other data than the run's own. ``time`` is in UTC.
    """

    split: str
    purpose: str
    problems: int
    checkpoint: str
    step: int | None = None
    of_the_verdict: int = 0
    evaluation: str | None = None
    data: str | None = None
    time: str = ""

    @property
    def day(self) -> str:
        """The day of it, in UTC."""
        return self.time[:10]


def note_opening(run: Path, opening: Opening) -> None:
    """Add a line to the record of the run in ``run``; its ``time`` is now, unless one is given.

    Raises RunError if it cannot be written: an opening that is not recorded should not be made.
    """
    path = run / OPENINGS_NAME
    now = datetime.now(UTC).isoformat(timespec="seconds").replace("+00:00", "Z")
    try:
        with path.open("ab+") as file:
            _lock(file)
            file.seek(0)
            whole, newline, torn = file.read().rpartition(b"\n")
            if torn:  # cut while it was written, so what it announces was never begun
                file.truncate(len(whole + newline))
            last = whole.rpartition(b"\n")[2]
            row = asdict(replace(opening, time=opening.time or now))
            row["previous"] = _hash(last) if newline else None
            # One write at the file's end, so no reader meets half a line of another process.
            text = json.dumps(row, sort_keys=True, allow_nan=False)
            file.write(text.encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise RunError(
            f"{path}: cannot be written ({error.strerror or error}), so nobody would know that "
            f"the split '{opening.split}' was opened.",
            "Free some space, or make the run's folder writable.",
        ) from error


def read_openings(path: Path) -> tuple[list[Opening], list[tuple[int, str, str]]]:
    """The openings that the file ``path`` records, oldest first, and what is wrong with it.

    A fault is the number of a line, what the line claims, and what was found. A record that is not
    there has neither. Raises OSError for a file that cannot be read.
    """
    found: list[Opening] = []
    faults: list[tuple[int, str, str]] = []
    if not path.is_file():
        return found, faults
    whole, _, torn = path.read_bytes().rpartition(b"\n")
    previous = None
    lines = whole.split(b"\n") if whole else []
    for number, line in enumerate(lines, start=1):
        opening, claimed = _parsed(line)
        if opening is None:
            faults.append((number, "an opening", "something else"))
        elif claimed != previous:
            said = f"to follow a line with the hash {claimed}" if claimed else "to be the first"
            there = f"one with {previous}" if previous else "none before it"
            faults.append((number, said, f"{there}: a line was altered or removed"))
        if opening is not None:
            found.append(opening)
        previous = _hash(line)
    if torn:
        faults.append((len(lines) + 1, "an opening", "half a line"))
    return found, faults


def asked_of_the_trained(openings: Sequence[Opening]) -> list[Opening]:
    """Each time the verdict's problems were put to the model after some training.

    The measurements after training (one greedy, one sampled) are one time, and so is one that was
    begun again after an interruption.
    """
    found: dict[object, Opening] = {}
    for number, one in enumerate(openings):
        if one.of_the_verdict and one.purpose not in (BEFORE, TRAINING):
            found.setdefault((one.purpose, one.step) if one.purpose == AFTER else number, one)
    return list(found.values())


def opened_once(openings: Sequence[Opening]) -> bool:
    """Whether the verdict's problems were put to the trained model once, after training."""
    return [one.purpose for one in asked_of_the_trained(openings)] == [AFTER]


def openings_in_words(openings: Sequence[Opening]) -> str:
    """How often the splits were opened, as the end of a sentence that says who says so."""
    asked = asked_of_the_trained(openings)
    if not asked:
        text = "the held-out problems were never put to the trained model"
    elif len(asked) == 1:
        text = f"the held-out problems were put to the trained model once, {_told(asked[0])}"
    else:
        text = f"the held-out problems were put to the trained model {len(asked)} times: "
        text += "; ".join(map(_told, asked[:6])) + (" …" if len(asked) > 6 else "")
    steps = {one.step for one in openings if one.purpose == SELECTION}
    if steps:
        text += f"; the selection split was measured {_times(len(steps))} during training"
    others = Counter(
        f"{one.split} of {one.data or 'its own data'}"
        for one in openings
        if one.purpose in (EVAL, EXPORT) and not one.of_the_verdict
    )
    for what, count in others.most_common(6):
        text += f"; {what} was opened {_times(count)}"
    return text + (" …" if len(others) > 6 else "")


def run_that_owns(folder: Path) -> Path | None:
    """The run that ``folder`` is or lies in (a checkpoint, an export); None if it is in none."""
    here = folder.resolve()
    for place in (here, *here.parents):
        if read_object(place / "manifest.json").get("format") == MANIFEST_FORMAT:
            return place
    return None


def asked_keys(evaluation: Path) -> set[str]:
    """The keys (:func:`~abacist.records.seen.question_key`) of the questions of an evaluation's
    folder; none if there is no evaluation."""
    problems = read_object(evaluation / "evaluation.json").get("problems") or []
    return {question_key(str(one.get("question"))) for one in problems if isinstance(one, dict)}


def verdict_keys(run: Path) -> set[str]:
    """The keys of the questions of a run's verdict; none before anything was measured."""
    return asked_keys(run / "evals" / "before") or asked_keys(run / "evals" / "after")


def _told(one: Opening) -> str:
    if one.purpose == AFTER:
        return f"after {one.step or 0:,} step{'s' * (one.step != 1)} of training ({one.day})"
    weights = "the final weights" if one.checkpoint == FINAL else one.checkpoint
    return f"by {one.purpose} of {weights} ({one.day})"


def _times(count: int) -> str:
    return "once" if count == 1 else f"{count:,} times"


def _parsed(line: bytes) -> tuple[Opening | None, str | None]:
    """A line of the record, and the hash that it gives of the line before."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None, None
    names = {one.name for one in fields(Opening)}
    if not isinstance(row, dict) or row.keys() != names | {"previous"}:
        return None, None
    texts = [row[name] for name in ("split", "purpose", "checkpoint", "time")]
    maybe = [row[name] for name in ("evaluation", "data", "previous")]
    counts = [row["problems"], row["of_the_verdict"], 0 if row["step"] is None else row["step"]]
    is_sound = (
        all(isinstance(one, str) for one in texts)
        and all(one is None or isinstance(one, str) for one in maybe)
        and all(type(one) is int and one >= 0 for one in counts)
        and row["purpose"] in PURPOSES
        and _is_time(row["time"])
    )
    if not is_sound:
        return None, None
    return Opening(**{name: row[name] for name in names}), row["previous"]


def _is_time(text: str) -> bool:
    try:
        return datetime.fromisoformat(text).tzinfo is not None
    except ValueError:
        return False


def _hash(line: bytes) -> str:
    return hashlib.sha256(line).hexdigest()[:_HASH_DIGITS]


def _lock(file: BinaryIO) -> None:
    """Wait for any other process that is adding a line, where the file system has locks."""
    if sys.platform != "win32":
        with contextlib.suppress(OSError):
            fcntl.flock(file, fcntl.LOCK_EX)
