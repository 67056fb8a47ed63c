"""One writer per run directory: ``run.lock`` beside the run's files.

The lock proper is the kernel's (``flock``), which ends with its process however that dies, so a
lock left behind by a crash never blocks a resume. The file also names its owner (process id,
start time, host), for the message, and as the only evidence on file systems without ``flock``;
the start time tells the owner from a later process that was given the same id.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import platform
import sys
from pathlib import Path
from typing import Any

from abacist.errors import RunError

if sys.platform != "win32":
    import fcntl

LOCK_NAME = "run.lock"


class RunLock:
    """The right to write into one run directory, held until :meth:`release` or process end."""

    def __init__(self, directory: Path) -> None:
        self.path = directory / LOCK_NAME
        self._descriptor: int | None = None

    def acquire(self) -> None:
        """Take the lock. Raises RunError if another live process, or this one, has it."""
        while self._descriptor is None:
            descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o644)
            try:
                has_kernel_lock = _flock(descriptor)
                owner = _read_owner(self.path)
                if has_kernel_lock is False or is_alive(owner, trust_host=has_kernel_lock is None):
                    raise RunError(
                        f"{self.path.parent}: process {owner.get('pid', 'unknown')} on "
                        f"{owner.get('host', 'this machine')} is writing this run.",
                        f"Wait for it or end it; if it no longer runs, delete {self.path}.",
                    )
                if _is_same_file(descriptor, self.path):  # else its owner just released it: again
                    os.ftruncate(descriptor, 0)
                    os.write(descriptor, json.dumps(identity(os.getpid())).encode())
                    self._descriptor = descriptor
            finally:
                if self._descriptor is None:
                    os.close(descriptor)

    def release(self) -> None:
        """Give the lock back and remove its file; nothing happens if it is not held."""
        if self._descriptor is not None:
            descriptor, self._descriptor = self._descriptor, None
            if _is_same_file(descriptor, self.path):
                self.path.unlink(missing_ok=True)
            os.close(descriptor)


def _flock(descriptor: int) -> bool | None:
    """True if the kernel gave the lock, False if another process has it, None if unsupported."""
    if sys.platform == "win32":
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return False if error.errno in (errno.EWOULDBLOCK, errno.EACCES) else None
    return True


def _is_same_file(descriptor: int, path: Path) -> bool:
    with contextlib.suppress(FileNotFoundError):
        return os.path.samestat(os.fstat(descriptor), path.stat())
    return False


def identity(pid: int) -> dict[str, Any]:
    """What tells a running process from any other: its id, when it began, its machine."""
    return {"pid": pid, "started": _start_of(pid), "host": platform.node()}


def _read_owner(path: Path) -> dict[str, Any]:
    try:
        owner = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return owner if isinstance(owner, dict) else {}


def is_alive(owner: dict[str, Any], *, trust_host: bool) -> bool:
    """Whether the named owner still runs.

    Processes of another host cannot be seen: with ``trust_host`` (no kernel lock to go by) such
    an owner counts as alive, otherwise the kernel's word is enough.
    """
    pid = owner.get("pid")
    if not isinstance(pid, int) or pid <= 0:
        return False
    if owner.get("host") != platform.node():
        return trust_host
    if pid == os.getpid():
        return trust_host and identity(pid).items() <= owner.items()
    if sys.platform == "win32":
        return True
    return may_run(pid) and owner.get("started") in (None, _start_of(pid))


def may_run(pid: int) -> bool:
    """Whether there may be a process with this id here: False only where there is none for sure."""
    if sys.platform == "win32":
        return True  # there, os.kill with any signal ends the process: no harmless way to ask
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):  # no process has a number beyond C's
        return False
    except OSError:
        pass  # it exists and belongs to someone else
    return True


def _start_of(pid: int) -> str | None:
    """The boot's id and when the process began, in clock ticks since; None if it has ended.

    Linux only: elsewhere always None, and the process id alone must do.
    """
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="utf-8").strip()
    except OSError:
        return None
    state, *fields = stat.rpartition(")")[2].split()  # from the third field of proc(5) on
    return None if state in "ZX" else f"{boot} {fields[18]}"
