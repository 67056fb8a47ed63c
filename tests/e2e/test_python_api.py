"""From Python, start to end: functions and rows train a run that can be resumed and asked."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

import abacist
from abacist.errors import RewardError, RunError
from abacist.records.rundir import RunDir

pytestmark = [pytest.mark.e2e, pytest.mark.slow]

SMALL: dict[str, Any] = {
    "num_heldout_problems": 3, "num_consistency_problems": 0, "eval_strategy": "no",
    "save_steps": 1, "per_device_train_batch_size": 8, "max_completion_length": 16,
}  # fmt: skip
ROWS = [{"question": f"Mia has {n} pens and buys 2. How many pens?", "answer": n + 2, "level": n}
        for n in range(40)]  # fmt: skip


def paid(factor: float) -> Any:
    def short(completions: Any, level: Any, **columns: Any) -> list[float]:
        return [factor / (1 + len(each[0]["content"] or "")) for each in completions]

    return short


def test_functions_and_rows_train_a_run_that_goes_on_when_they_are_given_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    rewards = ["default", paid(0.5)]
    run = abacist.train("tiny", dataset=ROWS, reward_funcs=rewards, max_steps=1, output_dir="run",
                        **SMALL)  # fmt: skip
    settings = yaml.safe_load((run.path / "config.yaml").read_text(encoding="utf-8"))
    assert settings["reward_funcs"] == ["default", "<function short>"]
    assert settings["dataset_name"] == str(tmp_path / "run" / "data.jsonl")
    assert run.after is not None and "short" in run.after.rewards
    assert "reward_short" in run.to_pandas("rollouts")
    assert len((run.path / "data.jsonl").read_text(encoding="utf-8").splitlines()) == 40

    with pytest.raises(RewardError, match="'short' was given as a Python function"):
        abacist.train(resume=run, max_steps=2)
    with pytest.raises(RunError, match="reward code changed"):
        abacist.train(resume=run, max_steps=2, reward_funcs=["default", paid(0.6)])
    longer = abacist.train(resume=run, max_steps=2, reward_funcs=["default", paid(0.5)])
    assert list(longer.to_pandas()["step"]) == [1, 2]
    assert RunDir.open(run.path).read_manifest()["finished"]

    moved = run.path.rename(tmp_path / "moved")
    found = abacist.evaluate(moved, num_problems=2, max_completion_length=8)
    assert {one.problem_id for one in found.problems} <= {p.problem_id for p in run.after.problems}
    assert "short" not in found.rewards  # that no file holds
    again = abacist.load_run(moved)
    assert again.comparison is not None and again.comparison.accuracy == longer.comparison.accuracy
    assert abacist.ask(moved, ["2 + 2?", "3 + 3?"], num_samples=2)[1].question == "3 + 3?"


def test_a_run_that_is_overwritten_by_its_own_config_keeps_its_data(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    run = abacist.train("tiny", dataset=ROWS, max_steps=1, output_dir="run", **SMALL)
    (run.path / "config.yaml").rename(tmp_path / "kept.yaml")
    kept = (run.path / "data.jsonl").read_bytes()
    again = abacist.train("kept.yaml", output_dir="run", overwrite=True)
    assert (again.path / "data.jsonl").read_bytes() == kept
    assert again.comparison is not None and run.comparison is not None
    assert again.comparison.accuracy == run.comparison.accuracy
