"""Runs on two processes, one of which is killed: the other ends, and the run resumes exactly.

The processes are started by the command itself, as a person does it, and so with all their imports.
"""

from __future__ import annotations

import argparse
import functools
import os
import random
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil

from soak.kills import FLAGS, contents
from soak.ledger import Trial

ON_TWO = ["--accelerate_config", "multi_cpu", "--num_processes", "2"]
MOST_SECONDS = 60.0
# A kill comes soon after one of these is there: a run spends most of its time on imports.
MARKS = [
    "run.lock", "manifest.json", "evals/before", "checkpoint-0", "checkpoint-2", "checkpoint-4",
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
    doomed, mark = rng.randrange(2), rng.choice(MARKS)
    process = train("--output_dir", str(run), *FLAGS, output=output)
    while not (run / mark).exists() and process.poll() is None:
        time.sleep(0.005)
    time.sleep(rng.uniform(0.0, 0.8))
    found = {
        int(child.environ()["RANK"]): child for child in psutil.Process(process.pid).children()
    }
    if len(found) == 2:  # else it was through before
        found[doomed].kill()
        told = time.monotonic()
        found[1 - doomed].wait()
        took = round(time.monotonic() - told, 1)
        trial.seen["most seconds until the other ended"] = took
        said = (process.wait(), output.read_text(encoding="utf-8", errors="replace"))
        wrong = [] if took <= MOST_SECONDS else [f"the other took {took:g} s"]
        if said[0] != 1 or f"rank {doomed}" not in said[1]:
            wrong.append(f"it ended with {said[0]}: {said[1][-200:]}")
        trial.expect(f"rank {doomed} killed after {mark}", wrong)
    process.wait()
    again = ["--resume", str(run)]
    if not (run / "config.yaml").exists():
        again = ["--output_dir", str(run), "--overwrite", *FLAGS]
    code = train(*again, output=output).wait()
    one, other = contents(whole), contents(run)
    wrong = sorted(name for name in one.keys() | other.keys() if one.get(name) != other.get(name))
    trial.expect("resumed", wrong if code == 0 else [f"resuming ended with {code}"])
    return trial
