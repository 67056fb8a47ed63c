"""What `make gpu` runs on a card, run at toy sizes on an emulated one: that shows that it runs."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

pytestmark = pytest.mark.e2e

Run = Callable[..., "subprocess.CompletedProcess[str]"]
ROOT = Path(__file__).parents[2]


def test_the_tests_for_a_gpu_pass_on_an_emulated_one(run_on_gpu: Run, tmp_path: Path) -> None:
    done = run_on_gpu(
        *("-m", "pytest", str(ROOT / "tests" / "gpu"), "-m", "gpu", "-q", "-p", "no:cacheprovider"),
        *("--basetemp", str(tmp_path / "inner")),
        GPU_TEST_SHAPES="small",
    )
    assert done.returncode == 0, done.stdout + done.stderr
    # Flash kernels are not emulated: nothing else is left out.
    assert "9 passed, 2 skipped" in done.stdout, done.stdout


def test_a_recipe_that_does_not_fit_fails_with_the_message_and_the_other_is_measured(
    run_on_gpu: Run, tmp_path: Path
) -> None:
    kept, limit = tmp_path / "kept.json", 0.0122
    done = run_on_gpu(
        *(str(ROOT / "bench" / "recipe_memory.py"), "--smoke", "--gibibytes", str(limit)),
        *("--output", str(kept)),
    )
    assert done.returncode == 1, done.stdout + done.stderr
    recipes = json.loads(kept.read_text(encoding="utf-8"))["recipes"]
    fits, fails = recipes["qwen2.5-1.5b"], recipes["llama-3.2-1b"]
    assert 0 < fits["peak_allocated_gibibytes"] <= fits["peak_reserved_gibibytes"] < limit
    assert fits["replies"] == 16 and fits["completion_tokens"] > 20
    # The recipe's own decision goes by the limit, not by the whole device.
    assert any("gradient checkpointing: on" in one and "of 12 MiB" in one for one in fits["notes"])
    assert fails["failed"] == "out of memory" and "CUDA out of memory" in fails["error"]
    assert f"llama-3.2-1b: out of memory within {limit} GiB: CUDA" in done.stdout
