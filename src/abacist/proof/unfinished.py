"""An evaluation that survives a kill: its folder, and the replies it has so far.

While it runs, its folder holds ``unfinished/``: what was asked for (``asked.json``), and the
replies in parts, each written whole or not at all. The same command given again finds them and
goes on from there; another command is refused, with the difference named. At the end the parts go,
so a folder with ``evaluation.json`` and without ``unfinished/`` is a finished evaluation.
"""

from __future__ import annotations

import re
import shutil
import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from abacist.errors import Interrupted, RunError
from abacist.records.lock import LOCK_NAME, RunLock
from abacist.records.rollout import Rollout, read_rollouts, write_rollouts
from abacist.records.rundir import write_json
from abacist.records.seen import read_object
from abacist.task.sources import shown

UNFINISHED, SAMPLED_FOLDER = "unfinished", "sampled"
# A part is written at most so often. Each is a file that is read again when it is taken up.
PART_SECONDS = 3.0
_RESULT, _ASKED = "evaluation.json", "asked.json"
_OURS = {
    _RESULT, "evaluation.md", "rollouts.parquet", "difficulty.png", SAMPLED_FOLDER, UNFINISHED,
    "report.html", LOCK_NAME,
}  # fmt: skip


class Parts:
    """The replies of one kind (``greedy``, ``sampled``) that an unfinished evaluation has.

    :meth:`keep` gathers what comes within a few seconds into one part, so that a kill loses no
    more than that; what stops in good order ends with :meth:`flush` and loses nothing.
    """

    def __init__(
        self, folder: Path, kind: str, *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._folder, self._kind, self._clock = folder, kind, clock
        self._gathered: list[Rollout] = []
        self._written_at = clock()

    def read(self) -> dict[str, list[Rollout]]:
        """The replies kept so far, by problem id. Raises RunError for a damaged part."""
        kept: dict[str, list[Rollout]] = {}
        for path in self._paths():
            try:
                rollouts = read_rollouts(path)
            except RunError as error:
                hint = "Remove that file and give the command again: only its replies are lost."
                raise RunError(error.message, hint) from error
            for rollout in rollouts:
                known = kept.setdefault(rollout.problem_id or "", [])
                # Interrupted between writing and noting it, a part is written twice.
                if all(rollout.member != other.member for other in known):
                    known.append(rollout)
        return kept

    def keep(self, rollouts: Sequence[Rollout]) -> None:
        """Keep all replies to some more problems, now or within :data:`PART_SECONDS`."""
        self._gathered += rollouts
        if self._clock() - self._written_at >= PART_SECONDS:
            self.flush()

    def flush(self) -> None:
        """Write what was gathered."""
        if self._gathered:
            self.add(self._gathered)
        self._gathered, self._written_at = [], self._clock()

    def add(self, rollouts: Sequence[Rollout]) -> None:
        """Keep the replies to some more problems, all of each problem's."""
        numbers = [int(path.stem.rpartition("-")[2]) for path in self._paths()]
        number = max(numbers, default=0) + 1
        write_rollouts(self._folder / f"{self._kind}-{number:05d}.parquet", rollouts)

    def _paths(self) -> list[Path]:
        return sorted(self._folder.glob(f"{self._kind}-*.parquet"))


class EvaluationFolder:
    """The folder of an evaluation in the making, locked for this process; a context manager."""

    def __init__(self, path: Path, lock: RunLock, resumed: bool) -> None:
        self.path, self.resumed = path, resumed
        self._lock = lock

    @classmethod
    def open(
        cls, path: Path, asked: Mapping[str, Any], *, overwrite: bool = False
    ) -> EvaluationFolder:
        """A new folder at ``path``, or the unfinished evaluation there if it asked the same.

        ``asked`` is everything the replies depend on, as JSON. Raises RunError if an evaluation
        is finished there, asked otherwise, or being made by another process, or if the folder
        holds anything else; with ``overwrite`` an evaluation there is cleared.
        """
        try:
            path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise RunError(
                f"{path}: cannot make the folder ({error.strerror}).",
                "Choose another place with --output_dir.",
            ) from error
        if strangers := sorted(e.name for e in path.iterdir() if not _is_ours(e.name)):
            raise RunError(
                f"{path}: holds other files, such as {strangers[0]}.",
                "Choose another --output_dir.",
            )
        lock = RunLock(path)
        lock.acquire()
        try:
            resumed = cls._take_up(path, asked, overwrite)
        except BaseException:
            lock.release()
            raise
        return cls(path, lock, resumed)

    @classmethod
    def open_numbered(cls, parent: Path, name: str, asked: Mapping[str, Any]) -> EvaluationFolder:
        """``name-001``, ``-002`` … in ``parent``: the unfinished one that asked this, or new."""
        numbered = re.compile(rf"{re.escape(name)}-(\d+)")
        there = sorted(parent.iterdir()) if parent.is_dir() else []
        taken = {path: int(m[1]) for path in there if (m := numbered.fullmatch(path.name))}
        for path in taken:
            if asked_in(path) == dict(asked):
                return cls.open(path, asked)
        return cls.open(parent / f"{name}-{max(taken.values(), default=0) + 1:03d}", asked)

    @staticmethod
    def _take_up(path: Path, asked: Mapping[str, Any], overwrite: bool) -> bool:
        unfinished = path / UNFINISHED
        before = asked_in(path)
        if before == dict(asked) and not overwrite:
            return True
        if before is not None and not overwrite:
            raise RunError(
                f"{path}: an unfinished evaluation is there that asked otherwise: "
                f"{_difference(before, asked)}.",
                "Give its own command to finish it, choose another --output_dir, or start over "
                "with --overwrite.",
            )
        if any(unfinished.glob("*.parquet")) and not overwrite:
            raise RunError(
                f"{unfinished / _ASKED}: missing or damaged, so it is not known what the replies "
                "beside it were asked.",
                "Choose another --output_dir, or start over with --overwrite.",
            )
        if (path / _RESULT).exists() and not overwrite:
            raise RunError(
                f"{path}: an evaluation is kept there already.",
                "Choose another --output_dir, or replace it with --overwrite.",
            )
        for entry in path.iterdir():
            if entry.is_dir() and not entry.is_symlink():
                shutil.rmtree(entry)
            elif entry.name != LOCK_NAME:
                entry.unlink()
        unfinished.mkdir()
        write_json(unfinished / _ASKED, dict(asked))
        return False

    def parts(self, kind: str) -> Parts:
        """The replies of this kind so far."""
        return Parts(self.path / UNFINISHED, kind)

    def count_replies(self) -> int:
        """How many replies of all kinds are kept so far."""
        kept = (read_rollouts(path) for path in (self.path / UNFINISHED).glob("*.parquet"))
        return sum(map(len, kept))

    def finish(self) -> None:
        """Remove the parts, and what a kill left half written: everything is saved."""
        for torn in self.path.glob(".*.tmp"):
            torn.unlink(missing_ok=True)
        shutil.rmtree(self.path / UNFINISHED, ignore_errors=True)

    def __enter__(self) -> EvaluationFolder:
        return self

    def __exit__(self, *exception: object) -> None:
        self._lock.release()


@contextmanager
def says_how_to_go_on(folder: EvaluationFolder, num_replies: int) -> Iterator[None]:
    """Turn Ctrl-C and SIGTERM into Interrupted: what is kept, and how the evaluation goes on."""
    try:
        yield
    except (KeyboardInterrupt, SystemExit) as stop:
        number = signal.SIGINT if isinstance(stop, KeyboardInterrupt) else signal.SIGTERM
        if isinstance(stop, SystemExit) and stop.code != 128 + number:
            raise
        raise Interrupted(
            f"{'interrupted' if number == signal.SIGINT else 'terminated'}. "
            f"{folder.count_replies():,} of {num_replies:,} replies are kept in "
            f"{folder.path / UNFINISHED}.",
            "Give the same command again: it asks for the others and ends in the same figures.",
            number,
        ) from None


def _is_ours(name: str) -> bool:
    return name in _OURS or (name.startswith(".") and name.endswith(".tmp"))


def asked_in(path: Path) -> dict[str, Any] | None:
    """What the unfinished evaluation there asked for; None if there is none that can be read."""
    return read_object(path / UNFINISHED / _ASKED) or None


def _difference(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    names = [name for name in {**before, **now} if before.get(name) != now.get(name)]
    told = [f"{name} was {shown(before.get(name))}, now {shown(now.get(name))}" for name in names]
    return "; ".join(told[:4])
