"""Whether the other processes of a training are still there, so that none waits for ever.

Each process keeps three things in the launcher's store: who it is, a beat that goes on, and, once
it ends, how. A thread looks at those of the others every second. A process that was killed is seen
by its process id on the same machine, by its beat on another, and the machine of the store by the
store's silence. One that ended with an error has said why, and the main process says it for all.
The thread gives its own process ten seconds to leave by itself, and then ends it: a call that waits
for a dead process cannot be interrupted.
What is on disk is whole at every moment (``learning.resume.checkpoints``).
"""

from __future__ import annotations

import itertools
import json
import os
import platform
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, NoReturn

import torch.distributed as dist

from abacist.errors import (
    AbacistError,
    Interrupted,
    ProcessLost,
    TrainingError,
    first_line,
    harmless,
)
from abacist.learning import processes
from abacist.records.lock import identity, is_alive
from abacist.records.secrets import without_secrets

LOOK_SECONDS = 1.0
# A beat comes from a thread, which a call that holds Python's lock keeps from running. On this
# machine a dead process is seen by its id, so the beat is needed for one that hangs only.
SILENT_SECONDS, SILENT_SECONDS_HERE = 35.0, 300.0
LEAVE_SECONDS = 10.0
TELL_SECONDS = 20.0
DONE = "done"
# How gloo, NCCL and the store put it that the other end is gone, or came too late.
_OF_A_LOST_PEER = (
    "gloo", "NCCL", "Connection closed by peer", "Connection reset by peer", "Broken pipe",
    "Timed out waiting", "recvValue failed", "failed to recv",
)  # fmt: skip
_trainings = itertools.count()


@dataclass(frozen=True)
class Ending:
    """How a process ended: what it said itself, or what is said of one that is gone."""

    rank: int
    message: str
    hint: str
    exit_code: int
    is_lost: bool = False

    def as_error(self) -> AbacistError:
        """The error that ends the processes which are left."""
        if self.is_lost:
            return ProcessLost(self.message, self.hint)
        error = TrainingError(f"rank {self.rank}: {self.message}", self.hint)
        error.exit_code = self.exit_code
        return error


class Peers:
    """The other processes, as this one sees them. :func:`watched` makes and ends it."""

    def __init__(self, store: Any, rank: int, count: int) -> None:
        self.store, self.rank = store, rank
        self.others = [one for one in range(count) if one != rank]
        self.hint = "Start it again, on as many processes."
        self.found: Ending | None = None
        self._beat = 0
        self._seen: dict[int, tuple[bytes, float]] = {}
        self._owners: dict[int, dict[str, Any]] = {}
        self._has_left = threading.Event()
        self._looking = threading.Lock()
        store.set(f"owner/{rank}", json.dumps(identity(os.getpid()) | {"sees": _sees()}))
        store.set(f"beat/{rank}", "0")
        store.set(f"ended/{rank}", "")

    def start(self) -> None:
        """Begin to watch, once every process has said who it is."""
        for one in self.others:
            self._owners[one] = json.loads(self.store.get(f"owner/{one}"))
        threading.Thread(target=self._watch, name="abacist-peers", daemon=True).start()

    def stop(self) -> None:
        """This process is through with the training, or was ended by an error."""
        self._has_left.set()

    def look(self) -> Ending | None:
        """The first process that has ended otherwise than it should, if there is one."""
        with self._looking:
            if self.found is None:
                # A thread of its own: where the store's machine is gone without a word, a call of
                # the store never returns, whatever its time limit.
                asking = threading.Thread(target=self._ask, name="abacist-store", daemon=True)
                asking.start()
                for _ in range(round(SILENT_SECONDS / LOOK_SECONDS)):
                    asking.join(LOOK_SECONDS)  # waits anew after a call that held Python's lock
                    if not asking.is_alive():
                        break
                else:
                    self.found = self._without_store(f"no answer in {SILENT_SECONDS:g} s")
            return self.found

    def _ask(self) -> None:
        try:
            found = self._look()
        except (RuntimeError, dist.DistError, ValueError, TypeError) as error:  # or no JSON
            found = self._without_store(first_line(error))
        self.found = self.found or found

    def _without_store(self, why: str) -> Ending:
        said = f"rank {self.rank}: the launcher, or the process that holds its store, is gone"
        return Ending(0, f"{said} ({why})", self.hint, 1, is_lost=True)

    def _look(self) -> Ending | None:
        self._beat += 1
        self.store.set(f"beat/{self.rank}", str(self._beat))
        for one in self.others:
            owner, now = self._owners[one], time.monotonic()
            was_alive = _may_run(owner)
            ended, beat = self.store.multi_get([f"ended/{one}", f"beat/{one}"])
            if ended:
                if ended.decode() == DONE:
                    self._seen.pop(one, None)
                    continue
                return Ending(rank=one, **json.loads(ended))
            if not was_alive:
                return self._lost(one, f"{self._named(one)} has ended without a word")
            if self._seen.get(one, (b"", 0.0))[0] != beat:
                self._seen[one] = (beat, now)
            silent = now - self._seen[one][1]
            if silent > (SILENT_SECONDS_HERE if owner["sees"] == _sees() else SILENT_SECONDS):
                return self._lost(
                    one, f"{self._named(one)} has not been heard of for {silent:.0f} s"
                )
        return None

    def _named(self, one: int) -> str:
        owner = self._owners[one]
        return f"rank {one} (process {owner['pid']} on {owner['host']})"

    def _those_that_are_silent(self) -> str:
        """Whom a closed connection may have led to, as words: it does not say so itself.

        On this machine a process that is silent is at work: one that is dead is seen by its id.
        """
        now = time.monotonic()
        silent = [
            one
            for one, (_, since) in list(self._seen.items())  # the thread adds to it
            if now - since > LEAVE_SECONDS and self._owners[one]["sees"] != _sees()
        ]
        if len(self.others) == 1:  # who else?
            silent = self.others
        return " or ".join(map(self._named, silent)) or "another process"

    def _lost(self, one: int, what: str) -> Ending:
        return Ending(one, f"rank {self.rank} cannot go on: {what}.", self.hint, 1, is_lost=True)

    def _watch(self) -> None:
        while not self._has_left.wait(LOOK_SECONDS):
            if (found := self.look()) is None:
                continue
            if not self._has_left.wait(LEAVE_SECONDS):
                self._end(found)
            return

    def _end(self, found: Ending) -> NoReturn:
        """End this process, which waits for another or computes and does not know better."""
        if found.is_lost or os.environ.get("LOCAL_RANK", "0") == "0":
            error = found.as_error()
            lines = [error.message, *(f"  {line}" for line in error.hint.split("\n") if line)]
            said = without_secrets(harmless("\n".join(lines)))
            shown = "\x1b[?25h" if sys.stderr.isatty() else ""  # a panel may have hidden the cursor
            with suppress(Exception):  # what was printed before stands before
                sys.stdout.flush()
            os.write(2, f"{shown}error: {said}\n".encode(errors="backslashreplace"))
        os._exit(found.exit_code)

    def ended_by(self, error: BaseException) -> BaseException:
        """Tell the others that ``error`` ends this process; what it ends by, as is to be raised.

        An error that only follows from another process's end becomes that one's.
        """
        is_cut_off = _is_of_a_lost_peer(error)
        found = self._wait_for_an_ending() if is_cut_off else self.look()
        # Where one process ends, a launcher ends the others by SIGTERM.
        is_ended = isinstance(error, Interrupted | SystemExit)
        follows = is_cut_off or (is_ended and found is not None and found.exit_code != _code(error))
        if found is not None and (found.is_lost or follows):
            error = found.as_error()
        elif is_cut_off:
            gone = self._those_that_are_silent()
            what = f"rank {self.rank}: {gone} no longer answers ({first_line(error)})"
            error = ProcessLost(what, self.hint)
        self._tell(error)
        if self.rank != 0 and not isinstance(error, ProcessLost):
            self._wait_for_main()
        return error

    def done(self) -> None:
        """Tell the others that this process has reached the end."""
        with suppress(RuntimeError, dist.DistError):  # who holds the store may be through already
            self.store.set(f"ended/{self.rank}", DONE)

    def _tell(self, error: BaseException) -> None:
        told = {"message": f"{type(error).__name__}: {first_line(error)}", "hint": ""}
        if isinstance(error, AbacistError):
            error.is_told = True
            told = {"message": error.message, "hint": error.hint}
        # Only this machine knows its secrets, and the way to the store is open to listeners.
        ending = {name: without_secrets(text) for name, text in told.items()} | {
            "exit_code": _code(error),
            "is_lost": isinstance(error, ProcessLost),
        }
        with suppress(RuntimeError, dist.DistError):  # without a store the others end too
            self.store.set(f"ended/{self.rank}", json.dumps(ending))

    def _wait_for_an_ending(self) -> Ending | None:
        deadline = time.monotonic() + TELL_SECONDS
        while (found := self.look()) is None and time.monotonic() < deadline:
            time.sleep(0.2)
        return found

    def _wait_for_main(self) -> None:
        """Give the main process time to say it: where one ends, launchers soon end all."""
        deadline = time.monotonic() + TELL_SECONDS
        with suppress(RuntimeError, dist.DistError):
            while time.monotonic() < deadline and _may_run(self._owners[0]):
                if self.store.get("ended/0"):
                    return
                time.sleep(0.2)


@contextmanager
def watched() -> Iterator[Peers | None]:
    """Within, the processes of a training end together. Nothing happens where there is one."""
    if processes.count() == 1:
        yield None
        return
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    store = dist.TCPStore(address, port, is_master=False, timeout=timedelta(minutes=5))
    number = f"{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}/{next(_trainings)}"
    peers = Peers(dist.PrefixStore(f"abacist/{number}", store), processes.rank(), processes.count())
    peers.start()
    try:
        yield peers
        processes.wait_for_all()
        peers.done()
    except BaseException as error:
        ended = peers.ended_by(error)
        if ended is error:
            raise
        raise ended from error
    finally:
        peers.stop()


def _sees() -> str:
    """Among whom process ids mean the same: a machine, or one container of it, since it started.

    A name does not tell: machines may share one.
    """
    with suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="utf-8").strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    return platform.node()


def _may_run(owner: dict[str, Any]) -> bool:
    return owner["sees"] != _sees() or is_alive(owner, trust_host=True)


def _code(error: BaseException) -> int:
    return int(getattr(error, "exit_code", 1))


def _is_of_a_lost_peer(error: BaseException | None) -> bool:
    while error is not None:
        is_theirs = isinstance(error, RuntimeError | dist.DistError)
        if is_theirs and any(words in str(error) for words in _OF_A_LOST_PEER):
            return True
        error = error.__cause__ or error.__context__
    return False
