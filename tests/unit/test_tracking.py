"""Metrics always reach the disk, and times are kept apart from them."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from abacist.learning.tracking import MetricsLog, Silent, append_json_line, is_wall_clock


class Heard(Silent):
    def __init__(self) -> None:
        self.steps: list[dict[str, Any]] = []

    def step(self, metrics: Any) -> None:
        self.steps.append(dict(metrics))


def state(step: int = 3) -> SimpleNamespace:
    return SimpleNamespace(global_step=step, max_steps=9, is_world_process_zero=True)


def test_times_and_metrics_are_kept_apart_and_the_watcher_sees_both(tmp_path: Path) -> None:
    heard = Heard()
    log = MetricsLog(tmp_path / "metrics.jsonl", tmp_path / "timings.jsonl", heard)
    log.on_log(None, state(), None, logs={"reward": 1.5, "step_time": 0.2})
    assert json.loads((tmp_path / "metrics.jsonl").read_text(encoding="utf-8")) == {
        "step": 3,
        "reward": 1.5,
    }
    assert json.loads((tmp_path / "timings.jsonl").read_text(encoding="utf-8")) == {
        "step": 3,
        "step_time": 0.2,
    }
    assert heard.steps == [{"reward": 1.5, "step_time": 0.2, "step": 3, "max_steps": 9}]


def test_only_the_first_process_writes(tmp_path: Path) -> None:
    other = SimpleNamespace(global_step=1, max_steps=9, is_world_process_zero=False)
    MetricsLog(tmp_path / "m", tmp_path / "t", Silent()).on_log(None, other, None, logs={"a": 1})
    assert not list(tmp_path.iterdir())


def test_every_line_is_strict_json_whatever_the_value(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    append_json_line(path, {"a": float("nan"), "b": float("-inf"), "c": None, "d": Path("x")})
    line = json.loads(
        path.read_text(encoding="utf-8"), parse_constant=lambda name: pytest.fail(name)
    )
    assert line == {"a": None, "b": None, "c": None, "d": "x"}


def test_rewards_named_after_time_are_not_taken_for_times() -> None:
    assert not is_wall_clock("rewards/on_time/mean") and is_wall_clock("eval_runtime")
