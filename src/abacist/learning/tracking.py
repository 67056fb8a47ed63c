"""Metrics files and the watcher of a run. W&B and its like are in ``learning.trackers``.

``metrics.jsonl`` holds every logged metric under TRL's names, a line a step; wall-clock times
go to ``timings.jsonl``, so that everything else of two equal runs can be byte-equal.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from transformers import TrainerCallback

from abacist.errors import UsageError
from abacist.policy.decoding.progress import Decoded, Progress
from abacist.records.rollout import Rollout


class Watcher(Protocol):
    """Receives the progress of a run; ``abacist.view.live.Live`` draws it on a terminal.

    ``progress`` and ``within_step`` are called as often as after every token. Both give what is
    done of a total, in whatever unit tells how long it will take; ``words`` say it for a person
    where these two numbers do not. ``warning`` tells of a fault and its remedy; ``replies`` of the
    completions of the step in work, with what each earned, only if ``wants_replies`` is True.

    Derive from :class:`Silent` to write only those that matter to you.
    """

    wants_replies: bool

    def stage(self, name: str) -> None: ...
    def note(self, text: str) -> None: ...
    def warning(self, text: str) -> None: ...
    def step(self, metrics: Mapping[str, object]) -> None: ...
    def replies(self, step: int, rollouts: Sequence[Rollout]) -> None: ...
    def progress(self, done: float, total: float, label: str, words: str = "") -> None: ...
    def within_step(self, step: int, part: str, done: float, total: float, words: str) -> None: ...


class Silent:
    """A watcher for callers who only want the result, and a base for others: it ignores all."""

    wants_replies = False

    def _ignore(self, *args: object, **kwargs: object) -> None:
        pass

    stage = note = warning = step = replies = progress = within_step = _ignore


def refuse_incomplete(watcher: object) -> None:
    """Raise UsageError for a watcher that lacks something of :class:`Watcher`: a training would
    end where it is first told of that."""
    names = vars(Silent)  # every member of a watcher
    lacks = [name for name in names if not name.startswith("_") and not hasattr(watcher, name)]
    if lacks:
        raise UsageError(
            f"{type(watcher).__name__} is no watcher: it has no {', no '.join(lacks)}",
            "Derive it from abacist.learning.tracking.Silent, which ignores whatever it is told.",
        )


def told_of(watcher: Watcher, label: str) -> Progress:
    """A progress callback that reports a generation to the watcher under this label."""

    def tell(found: Decoded) -> None:
        watcher.progress(found.written_tokens, found.expected_tokens, label, found.words())

    return tell


@dataclass(eq=False)
class MetricsLog(TrainerCallback):
    """Appends every log to ``metrics.jsonl`` and ``timings.jsonl`` and tells the watcher."""

    metrics_path: Path
    timings_path: Path
    watcher: Watcher

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if not state.is_world_process_zero or not logs:
            return
        step = {"step": state.global_step}
        timings = {key: value for key, value in logs.items() if is_wall_clock(key)}
        metrics = {key: value for key, value in logs.items() if key not in timings}
        if metrics:
            append_json_line(self.metrics_path, step | metrics)
        if timings:
            append_json_line(self.timings_path, step | timings)
        self.watcher.step({**logs, "step": state.global_step, "max_steps": state.max_steps})


def is_wall_clock(key: str) -> bool:
    """True for metrics that measure time and so differ between equal runs.

    >>> is_wall_clock("step_time"), is_wall_clock("train_steps_per_second"), is_wall_clock("reward")
    (True, True, False)
    """
    return key.endswith(("_time", "_runtime", "_per_second")) or key.startswith("profiling/")


def append_json_line(path: Path, row: Mapping[str, Any]) -> None:
    """Append one strict JSON object; nan and infinities become null."""
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps({key: _jsonable(value) for key, value in row.items()}) + "\n")


def _jsonable(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value if isinstance(value, str | int | float | bool | None) else str(value)
