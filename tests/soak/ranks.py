"""Runs on two processes, one of which is killed: the other ends, and the run resumes exactly.

The processes are started by the command itself, as a person does it, and so with all their imports.
"""

from __future__ import annotations

import argparse
import functools
import os
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import psutil

from soak import kills
from soak.kills import contents
from soak.ledger import Trial

ON_TWO = ["--accelerate_config", "multi_cpu", "--num_processes", "2"]
FLAGS = [*kills.FLAGS, "--per_device_train_batch_size", "4"]  # a step is that of one process
MOST_SECONDS = 60.0
LOADING = ""
# A kill comes soon after one of these is there: a run spends most of its time on imports.
MARKS = [
    LOADING, "run.lock", "manifest.json", "evals/before",
    "checkpoint-0", "checkpoint-2", "checkpoint-4",
    *(f"rollouts/step-{step:06d}.parquet" for step in range(1, 7)), "evals/after",
]  # fmt: skip


def train(*arguments: str, output: Path) -> subprocess.Popen[bytes]:
    """``abacist train`` on two processes."""
    output.parent.mkdir(parents=True, exist_ok=True)
    with output.open("wb") as file:
        return subprocess.Popen(
            [sys.executable, "-m", "abacist", "train", *arguments, *ON_TWO],
            env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
            stdout=file,
            stderr=subprocess.STDOUT,
        )


def ranks(shared: Path, options: argparse.Namespace) -> list[tuple[str, Callable[[Path], Trial]]]:
    """One kill a run, of either rank."""
    whole, output = shared / "run", shared / "output"
    if train("--output_dir", str(whole), *FLAGS, output=output).wait() != 0:
        raise RuntimeError(output.read_text(encoding="utf-8"))
    return [
        (f"run {n}", functools.partial(_kill_a_rank, whole, n)) for n in range(options.rank_kills)
    ]


def _kill_a_rank(whole: Path, seed: int, place: Path) -> Trial:
    trial, rng, run, output = Trial(), random.Random(seed), place / "run", place / "output"
    doomed, wrong = rng.randrange(2), [""]
    while wrong == [""]:  # a run that was through before the kill came proves nothing
        shutil.rmtree(run, ignore_errors=True)
        mark, seconds = rng.choice(MARKS), rng.uniform(0.0, 0.8)
        process = train("--output_dir", str(run), *FLAGS, output=output)
        while len(found := _ranks_of(process)) < 2 and process.poll() is None:
            time.sleep(0.005)
        while mark and not (run / mark).exists() and process.poll() is None:
            time.sleep(0.005)
        time.sleep(seconds)
        wrong = _end_one(doomed, found, process, output, trial)
    trial.expect(f"rank {doomed} killed {seconds:.2f} s after {mark or 'its start'}", wrong)
    again = ["--resume", str(run)]
    if not (run / "config.yaml").exists():
        again = ["--output_dir", str(run), "--overwrite", *FLAGS]
    code = train(*again, output=output).wait()
    one, other = contents(whole), contents(run)
    wrong = sorted(name for name in one.keys() | other.keys() if one.get(name) != other.get(name))
    trial.expect("resumed", wrong if code == 0 else [f"resuming ended with {code}"])
    return trial


def _end_one(
    doomed: int,
    found: dict[int, psutil.Process],
    process: subprocess.Popen[bytes],
    output: Path,
    trial: Trial,
) -> list[str]:
    """Kill a rank and wait for the other: what is wrong with its end; one empty text where the
    run was through before."""
    try:
        found[doomed].kill()
        told = time.monotonic()
        found[1 - doomed].wait(10 * MOST_SECONDS)
    except (KeyError, psutil.NoSuchProcess):
        process.wait()
        return [""]
    except psutil.TimeoutExpired:
        found[1 - doomed].kill()
        process.wait()
        return [f"the other had not ended after {10 * MOST_SECONDS:g} s"]
    took = round(time.monotonic() - told, 1)
    code, said = process.wait(), output.read_text(encoding="utf-8", errors="replace")
    if code == 0:  # it had said how it ended
        return [""]
    trial.seen["most seconds until the other ended"] = took
    wrong = [] if took <= MOST_SECONDS else [f"the other took {took:g} s"]
    if code != 1 or f"rank {doomed}" not in said or "Traceback" in said:
        wrong.append(f"it ended with {code}: {said[-200:]}")
    return wrong


def _ranks_of(process: subprocess.Popen[bytes]) -> dict[int, psutil.Process]:
    """The processes that train, by their rank, as far as they have been started."""
    found: dict[int, psutil.Process] = {}
    with suppress(psutil.NoSuchProcess):
        for child in psutil.Process(process.pid).children():
            with suppress(psutil.NoSuchProcess, KeyError):
                found[int(child.environ()["RANK"])] = child
    return found
