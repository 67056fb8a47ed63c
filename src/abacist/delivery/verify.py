"""``abacist verify BUNDLE``: is this result what it says it is? Read :func:`verify` top to bottom.

Three things are checked, each for what it can show. The *files* are those that the index lists (and
the index is the published one, if its fingerprint is given). Every number that can be *recomputed*
from the replies is. And the replies are *replayed*: they are what these weights write. Whoever
edits a bundle and makes its sums anew is caught by the last two.

A bundle is a stranger's file: nothing in it is run or unpickled, and whatever is malformed is a
fault to be named.
"""

from __future__ import annotations

import secrets
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from abacist.delivery import archive
from abacist.delivery.findings import Check
from abacist.delivery.opened import Opened, lay_out
from abacist.delivery.verify_splits import check_data, check_splits
from abacist.delivery.verify_training import check_training
from abacist.delivery.verify_verdict import check_verdict
from abacist.delivery.verify_weights import check_replays
from abacist.errors import AbacistError, ModelError, UsageError, first_line
from abacist.learning.tracking import Silent, Watcher
from abacist.policy.choices import choose_device, choose_dtype

FINGERPRINT_DIGITS = 64
#: What no check of a bundle alone can tell; said with every result.
CANNOT_TELL = (
    "a run that was made again from the start, or chosen among several",
    "whether the held-out problems were chosen, or cut to some of them, after they were measured",
    "what was measured and left out of the run's record",
    "numbers that only training again would give (loss, gradients), and dates that contradict "
    "nothing, unless the fingerprint is the published one (--fingerprint)",
)


@dataclass(frozen=True)
class Request:
    """What was asked for, in the words of the flags.

    ``replies`` bounds the replies replayed of each kind: None for as many as take minutes, 0 for
    none. ``seed`` draws them; None draws a new one, so that nobody knows which they will be.
    """

    bundle: Path
    model: str | None = None
    weights: Path | None = None
    dataset_name: str | None = None
    fingerprint: str | None = None
    replies: int | None = None
    seed: int | None = None
    device: str = "auto"
    dtype: str = "auto"


@dataclass(frozen=True)
class Verification:
    """What was found. ``holds``: nothing that was checked is wrong. ``is_complete``: the data was
    at hand, and the replies could be replayed, or it was asked not to."""

    bundle: str
    fingerprint: str
    is_published: bool
    seed: int
    run: dict[str, Any]
    checks: list[Check] = field(default_factory=list)

    @property
    def holds(self) -> bool:
        """Whether nothing that was checked is wrong."""
        return all(check.holds for check in self.checks)

    @property
    def is_complete(self) -> bool:
        """Whether all the evidence was at hand."""
        return not any(check.is_incomplete for check in self.checks)

    def to_json(self) -> dict[str, Any]:
        """All of it, for a machine."""
        return {
            "bundle": self.bundle,
            "holds": self.holds,
            "is_complete": self.is_complete,
            "fingerprint": self.fingerprint,
            "fingerprint_was_given": self.is_published,
            "seed": self.seed,
            "run": self.run,
            "checks": {check.name: check.to_json() for check in self.checks},
            "cannot_tell": list(CANNOT_TELL),
        }


def verify(request: Request, watcher: Watcher | None = None) -> Verification:
    """Check a bundle in every way there is.

    Raises RunError for a file that is no bundle, or one of which nothing can be checked, UsageError
    for a fingerprint that is none. Everything else is in the result.
    """
    watcher = watcher or Silent()
    wanted = _fingerprint(request.fingerprint)
    _refuse_unusable(request)
    watcher.stage(f"Reading {request.bundle}")
    contents = archive.read(request.bundle)
    seed = secrets.randbelow(2**31) if request.seed is None else request.seed
    run = contents.index.get("run")
    found = Verification(
        str(request.bundle),
        contents.fingerprint,
        wanted is not None,
        seed,
        dict(run) if isinstance(run, dict) else {},
    )
    files = Check("files")
    if wanted is not None and wanted != contents.fingerprint:
        files.fault(archive.INDEX_NAME, "fingerprint", wanted, contents.fingerprint)
    for name, claimed, now in contents.altered:
        files.fault(name, "", claimed, now)
    size = sum(map(len, contents.members.values()))
    files.looked_at = f"{len(contents.members):,} files, {size:,} bytes, against the index"
    if wanted is not None:
        files.looked_at += ", whose fingerprint is the published one" if files.holds else ""
    found.checks.append(files)
    with tempfile.TemporaryDirectory(prefix="abacist-verify-") as folder:
        opened = lay_out(request.bundle, contents, Path(folder), files)
        _add(found, "run", lambda: _check_run(opened, found.run), opened, watcher)
        _add(found, "training", lambda: check_training(opened), opened, watcher)
        _add(found, "verdict", lambda: check_verdict(opened), opened, watcher)
        _add(found, "splits", lambda: check_splits(opened), opened, watcher)
        _add(found, "data", lambda: check_data(opened, request.dataset_name), opened, watcher)
        _add(
            found,
            "replay",
            lambda: check_replays(
                opened,
                request.bundle,
                model=request.model,
                weights=request.weights,
                replies=request.replies,
                seed=seed,
                device=request.device,
                dtype=request.dtype,
                watcher=watcher,
            ),
            opened,
            watcher,
        )
    return found


_STAGES = {
    "run": "Reading what is said of the run",
    "training": "Recomputing rewards, advantages and metrics",
    "verdict": "Recomputing the verdict",
    "splits": "Looking at the splits",
    "data": "Loading the data again",
    "replay": "Replaying replies",
}


def _check_run(opened: Opened, run: dict[str, Any]) -> Check:
    """What the index and the manifest say of the run, against its settings and one another."""
    check = Check("run")
    check.looked_at = "what index and manifest say of it, against its settings"
    index, manifest = archive.INDEX_NAME, opened.manifest
    check.same(index, "run.finished", run.get("finished"), bool(manifest.get("finished")))
    version = (manifest.get("versions") or {}).get("abacist")
    check.same(index, "run.made_with", run.get("made_with"), version)
    base = str(opened.settings.get("model_name_or_path", "tiny"))
    check.same(index, "run.base", run.get("base"), base)
    if "seed" in opened.settings and manifest.get("seed") is not None:
        check.same("run/manifest.json", "seed", manifest["seed"], opened.settings["seed"])
    return check


def _add(
    found: Verification, name: str, make: Callable[[], Check], opened: Opened, watcher: Watcher
) -> None:
    watcher.stage(_STAGES[name])
    try:
        check = make()
    except AbacistError as error:
        check = Check(name, "not to its end")
        check.fault("bundle", name, "something to check", error.message)
    except MemoryError:
        raise
    except Exception as error:  # a stranger's file: whatever is malformed makes something raise
        check = Check(name, "not to its end")
        said = f"malformed ({type(error).__name__}: {first_line(error)})"
        check.fault("bundle", name, "something to check", said)
    check.faults = [  # where it was laid out is nobody's business
        replace(fault, found=fault.found.replace(f"{opened.folder}/", "")) for fault in check.faults
    ]
    found.checks.append(check)


def _refuse_unusable(request: Request) -> None:
    """UsageError for what this machine or person lacks: that says nothing of the bundle."""
    try:
        device, _ = choose_device(request.device)
        choose_dtype(request.dtype, device, trains_all_weights=False)
    except ModelError as error:
        raise UsageError(error.message, error.hint) from error
    if request.weights is not None and not request.weights.is_dir():
        raise UsageError(
            f"{request.weights}: no such folder of weights", "Give the run, or a copy of it."
        )


def _fingerprint(given: str | None) -> str | None:
    if given is None:
        return None
    digits = given.strip().lower().removeprefix("sha256:")
    if len(digits) != FINGERPRINT_DIGITS or set(digits) - set("0123456789abcdef"):
        raise UsageError(
            f"--fingerprint {given[:80]!r} is not one",
            f"It has {FINGERPRINT_DIGITS} hexadecimal digits; `abacist bundle` prints it.",
        )
    return digits
