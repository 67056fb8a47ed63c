"""Processes that begin with everything imported: forked from one that has only imported it.

A command spends most of a short run's time on importing; here it is killed where it works instead.
"""

from __future__ import annotations

import gc
import multiprocessing
import os
import sys
import time
from collections.abc import Callable
from multiprocessing.context import ForkProcess
from pathlib import Path

import abacist.learning.train
from abacist.cli.main import main

FORK = multiprocessing.get_context("fork")


def start(work: Callable[[], int | None], output: Path) -> ForkProcess:
    """``work`` in a process of its own, which says what it says to the file ``output``."""
    output.parent.mkdir(parents=True, exist_ok=True)
    gc.freeze()  # what was imported is neither looked through nor copied in the child
    process = FORK.Process(target=_run, args=(work, output))
    process.start()
    return process


def train(*arguments: str, output: Path, before: Callable[[], None] | None = None) -> ForkProcess:
    """``abacist train`` in a process of its own; ``before`` is called there first."""

    def work() -> int:
        # The audit of the rewards is no part of what is tried here, and a sixth of a run.
        abacist.learning.train.refuse_hackable = lambda *args: None  # type: ignore[attr-defined]
        if before:
            before()
        sys.argv = ["abacist", "train", *arguments]
        return main(sys.argv[1:])

    return start(work, output)


def exit_code(process: ForkProcess, seconds: float = 600.0) -> int:
    """Wait for a process. The code is negative where a signal ended it, as in ``subprocess``.

    Raises TimeoutError, and kills it, if it does not end.
    """
    process.join(seconds)
    if process.exitcode is None:
        process.kill()
        process.join()
        raise TimeoutError(f"a process was still at work after {seconds:g} seconds")
    return process.exitcode


def wait_for(path: Path, process: ForkProcess) -> bool:
    """Whether ``path`` came into being before the process ended."""
    while not path.exists():
        if process.exitcode is not None:
            return path.exists()
        time.sleep(0.005)
    return True


def _run(work: Callable[[], int | None], output: Path) -> None:
    with output.open("wb", buffering=0) as file:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)
    sys.exit(work() or 0)
