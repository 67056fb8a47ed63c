"""Metrics always reach the disk, and no tracker can stop a run."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from transformers import TrainerCallback
from transformers.integrations import WandbCallback

from abacist.learning.tracking import (
    MetricsLog,
    ShieldedTracker,
    Silent,
    append_json_line,
    available_trackers,
    is_wall_clock,
    shield_trackers,
)


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


class Fragile(TrainerCallback):
    def __init__(self, error: BaseException) -> None:
        self.error, self.calls = error, 0

    def on_log(self, *args: Any, **kwargs: Any) -> None:
        self.calls += 1
        raise self.error


@pytest.mark.parametrize("error", [RuntimeError("no network\ndetails"), SystemExit(1), OSError()])
def test_a_tracker_that_fails_warns_once_and_is_left_alone(error: BaseException) -> None:
    said: list[str] = []
    tracker = Fragile(error)
    shield = ShieldedTracker(tracker, said.append)
    for _ in range(3):
        shield.on_log(None, None, None, logs={})
    shield.on_train_end(None, None, None)
    assert tracker.calls == 1 and len(said) == 1 and "\n" not in said[0]
    assert "Fragile" in said[0]


def test_a_keyboard_interrupt_still_stops_the_run() -> None:
    with pytest.raises(KeyboardInterrupt):
        ShieldedTracker(Fragile(KeyboardInterrupt()), print).on_log(None, None, None)


def test_every_event_of_a_callback_reaches_the_tracker_through_the_shield() -> None:
    events = [name for name in vars(TrainerCallback) if name.startswith("on_")]
    assert len(events) > 10
    called: list[str] = []
    tracker = TrainerCallback()
    for event in events:
        setattr(tracker, event, lambda *a, _event=event, **k: called.append(_event))
    shield = ShieldedTracker(tracker, print)
    for event in events:
        getattr(shield, event)(None, None, None)
    assert called == events


def test_trackers_that_cannot_be_had_are_left_out_with_one_warning_each(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    said: list[str] = []
    monkeypatch.setattr(
        "importlib.util.find_spec", lambda name: None if name == "trackio" else object()
    )
    assert available_trackers(["wandb", "trackio"], said.append) == ["wandb"]
    assert len(said) == 1 and "pip install 'abacist[trackio]'" in said[0]


def test_only_trackers_are_shielded() -> None:
    from transformers.integrations import TensorBoardCallback

    tracker = object.__new__(TensorBoardCallback)
    other = TrainerCallback()
    trainer = SimpleNamespace(callback_handler=SimpleNamespace(callbacks=[other, tracker]))
    shield_trackers(trainer, print)  # type: ignore[arg-type]
    first, second = trainer.callback_handler.callbacks
    assert first is other and isinstance(second, ShieldedTracker) and second.tracker is tracker


@pytest.mark.parametrize("joined", [None, "a sweep's run"])
def test_a_wandb_run_ends_with_the_training_that_began_it(joined: str | None) -> None:
    finished: list[bool] = []

    class Offline(WandbCallback):
        def __init__(self) -> None:
            self._wandb = SimpleNamespace(run=joined, finish=lambda: finished.append(True))

        def on_train_end(self, *args: Any, **kwargs: Any) -> None:
            assert not finished  # its last words come first

    shielded: Any = ShieldedTracker(Offline(), pytest.fail)
    shielded.on_train_end(None, None, None)
    assert len(finished) == (joined is None)
