"""How much memory a step takes, apart from what its libraries take once."""

from __future__ import annotations

import ctypes
import gc
import resource
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import psutil

from stopwatch import Bench

_RESETS_PEAK = "5"  # proc(5), clear_refs: the high-water mark becomes what is resident now


@dataclass(frozen=True)
class Growth:
    """What steps add to the resident memory of a process that is ready for them: at the peak, and
    for good (what is still held when they are over and free memory has been given back)."""

    peak_bytes: int
    kept_bytes: int


def growth(bench: Bench, numbers: Iterable[int]) -> Growth:
    """What the steps of these numbers add, in a process of its own.

    Ready is a process that has taken one step on hardly any tokens (so code is loaded, threads
    stand, the optimizer has its state) and has given back what that left free. What comes on top
    grows with a batch: activations, the cache of keys and values, merged weights, and what a
    library compiles for the shapes of these very steps, which it keeps.

    On Linux the kernel's high-water mark is set back first; elsewhere only a new high of
    the whole process can be seen, and a peak of 0 means "below the old one".
    """
    bench.small_step()
    _give_back()
    process = psutil.Process()
    marks = Path("/proc/self/clear_refs")
    if marks.exists():
        marks.write_text(_RESETS_PEAK, encoding="utf-8")
    before = process.memory_info().rss
    for number in numbers:
        bench.step(number)
    peak = _peak_bytes(marks.exists())
    _give_back()
    return Growth(max(0, peak - before), process.memory_info().rss - before)


def _peak_bytes(on_linux: bool) -> int:
    if on_linux:
        status = Path("/proc/self/status").read_text(encoding="utf-8")
        return int(status.split("VmHWM:")[1].split()[0]) * 1024
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _give_back() -> None:
    """Return free memory to the system, or it would be there for the steps and not be counted."""
    gc.collect()
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc's own
        if trim is not None:
            trim(0)
