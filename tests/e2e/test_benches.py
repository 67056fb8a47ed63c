"""The benches run: each in its smoke mode, in a process of its own, as a person would start it."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from imported import Imported

pytestmark = pytest.mark.e2e

BENCH = Path(__file__).parents[2] / "bench"


def start(python: Imported, script: str, folder: Path, *flags: str) -> str:
    """What ``bench/<script>`` prints in a process of its own."""
    done = python.run(str(BENCH / script), *flags, cwd=folder)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def smoke(python: Imported, script: str, folder: Path, *flags: str) -> tuple[str, Any]:
    """What the bench's smoke mode prints, and the JSON it keeps."""
    kept = folder / "kept.json"
    shown = start(python, script, folder, "--smoke", "--output", str(kept), *flags)
    return shown, json.loads(kept.read_text(encoding="utf-8"))


CELL = "smoke-qwen/0/1"


@pytest.fixture(scope="module")
def speed(imported: Imported, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str, Any]:
    folder = tmp_path_factory.mktemp("speed")
    return folder, *smoke(imported, "speed.py", folder, "--no-memory")


def test_speed_times_both_trainers_on_the_same_lengths(speed: tuple[Path, str, Any]) -> None:
    _, shown, kept = speed
    cell = kept[CELL]
    assert len({times["longest_tokens"] for times in cell["rounds"][0].values()}) == 1
    assert len({times["prompt_tokens"] for times in cell["rounds"][0].values()}) == 1
    assert cell["decoded_tokens"]["stock"] == pytest.approx(cell["decoded_tokens"]["ours"], rel=0.1)
    assert {"step", "rollout", "training"} == set(cell["ratios"]) == set(cell["control"])
    assert all(share > 0 for share in cell["limits"]["ours"].values())
    # Had products gone unseen, their share of the machine would say nothing.
    assert all(limits["seen_of_least"] > 1 for limits in cell["limits"].values())
    assert f"| {CELL} |" in shown


def test_speed_does_not_measure_a_finished_cell_again(
    speed: tuple[Path, str, Any], imported: Imported
) -> None:
    folder, shown, kept = speed
    again, unchanged = smoke(imported, "speed.py", folder, "--no-memory")
    assert unchanged == kept and again == shown


def test_speed_measures_the_memory_of_one_trainer_in_one_process(
    imported: Imported, tmp_path: Path
) -> None:
    shown = start(imported, "speed.py", tmp_path, "--memory-of", "ours", CELL)
    found = json.loads(shown.splitlines()[-1])
    assert found["peak_bytes"] >= found["kept_bytes"] and found["peak_bytes"] > 0


def test_time_to_accuracy_compares_curves_that_begin_at_the_same_base(
    imported: Imported, tmp_path: Path
) -> None:
    shown, kept = smoke(imported, "time_to_accuracy.py", tmp_path)
    assert {"stock 0", "ours 0", "gist rate 0"} == set(kept)
    assert len({points[0]["accuracy"] for points in kept.values()}) == 1
    assert all([point["step"] for point in points] == [0, 1, 2] for points in kept.values())
    assert "apart, stock at the gist's rate" in shown


def test_the_gpu_bench_runs_on_a_cpu_and_compares_with_the_floor(
    imported: Imported, tmp_path: Path
) -> None:
    shown, kept = smoke(imported, "gpu.py", tmp_path)
    assert len(kept["cells"]) == 4 and not any("failed" in one for one in kept["cells"].values())
    assert all(one["times_the_floor"] > 0 for one in kept["cells"].values())
    assert "stock takes" in shown and "the floor" in shown


def test_the_signal_of_groups_is_measured_by_outcome_and_by_steps(
    short_run: Path, imported: Imported, tmp_path: Path
) -> None:
    flags = ["--steps", "1", "2", "--groups", "3", "--first_layer", "1", "--threads", "1"]
    shown = start(imported, "gradient_signal.py", tmp_path, str(short_run), *flags)
    outcome, steps = shown.splitlines()[-2:]
    name, own, along = outcome.strip("| ").split(" | ")
    assert name == "outcome" and own == along and "3 groups" in shown
    assert steps.startswith("| steps | ") and "nan" not in steps


def test_chance_makes_no_signal_and_a_mean_does(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCH))
    gradient_signal = importlib.import_module("gradient_signal")
    draw = np.random.default_rng(0)
    noise = draw.normal(size=(300, 40))
    mean = np.zeros(40)
    mean[0] = 2.0
    for added, expected in ((0.0, 0.0), (1.0, 4 / 44)):
        gradients = noise + added * mean
        products = gradients @ gradients.T
        found, low, high = gradient_signal.measured(products, products, products)
        assert found == pytest.approx(expected, abs=0.01) and low < expected < high
        assert (low > 0) is bool(added)
