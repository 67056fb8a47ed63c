"""``abacist.GRPOTrainer`` in several processes computes what TRL's does there."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from imported import Imported

pytestmark = [pytest.mark.e2e, pytest.mark.slow]


SCRIPT = Path(__file__).with_name("two_processes.py")
GRADIENTS = SCRIPT.with_name("gradients_in_processes.py")
KINDS = ("llama-3.2-instruct", "qwen2.5-instruct")


def run(python: Imported, processes: int, *arguments: str, script: Path = SCRIPT) -> str:
    """What the first process of so many says."""
    ended = python.run_in(processes, str(script), *arguments)
    assert not any(one.returncode for one in ended), [one.stderr[-3000:] for one in ended]
    return ended[0].stdout


def test_two_processes_end_at_trls_weights(
    lookalike: Callable[[str], Path], tmp_path: Path
) -> None:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    done = subprocess.run(
        [*torchrun, str(SCRIPT), str(lookalike("qwen2.5-instruct")), str(tmp_path)],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=400,
        encoding="utf-8",
    )
    assert done.returncode == 0, done.stderr[-3000:]
    apart = float(done.stdout.split("apart ")[1].split()[0])
    assert apart < 1e-5


def test_two_processes_choose_the_replies_that_one_would_and_end_at_its_weights(
    imported: Imported, lookalike: Callable[[str], Path], tmp_path: Path
) -> None:
    for processes in (2, 1):
        run(imported, processes, str(lookalike("qwen2.5-instruct")), str(tmp_path), "2")
    two, one = (torch.load(tmp_path / f"weights-{count}.pt") for count in (2, 1))
    assert float((two - one).abs().max()) < 1e-5


def test_gradients_of_two_and_four_processes_are_those_of_one(
    imported: Imported, lookalike: Callable[[str], Path], tmp_path: Path
) -> None:
    models = [str(lookalike(kind)) for kind in KINDS]
    for processes in (1, 2, 4):
        run(imported, processes, str(tmp_path), *models, script=GRADIENTS)
    for name in [f"{kind}-{what}" for kind in KINDS for what in ("lora", "full")]:
        one, *others = (torch.load(tmp_path / f"{name}-{count}.pt") for count in (1, 2, 4))
        assert max(float(gradient.abs().max()) for gradient in one.values()) > 0.01
        for other in others:
            assert other.keys() == one.keys()
            assert max(float((other[key] - one[key]).abs().max()) for key in one) < 1e-5, name
