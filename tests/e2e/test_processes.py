"""``abacist.GRPOTrainer`` in several processes computes what TRL's does there."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

pytestmark = [pytest.mark.e2e, pytest.mark.slow]


def test_two_processes_end_at_trls_weights(
    lookalike: Callable[[str], Path], tmp_path: Path
) -> None:
    script = Path(__file__).with_name("two_processes.py")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, str(script), str(lookalike("qwen2.5-instruct")), str(tmp_path)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=400,
        encoding="utf-8",
    )
    assert done.returncode == 0, done.stderr[-3000:]
    apart = float(done.stdout.split("apart ")[1].split()[0])
    assert apart < 1e-5
