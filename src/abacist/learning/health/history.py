"""The metrics history that the health rules read: the opening of a run and its latest steps.

Rows are logged metrics under TRL's names. The latest stretch is long enough to rule out chance:
ten steps and forty groups, or the whole of a shorter run.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from statistics import median
from typing import Any, NamedTuple

from abacist.task.rewards import REWARDS, correctness

Row = Mapping[str, Any]

PATIENCE_STEPS = 10
PATIENCE_GROUPS = 40
_CORRECTNESS = next(reward for reward in REWARDS if reward.func is correctness)
SOLVED_FRACTION = 0.9  # of the most that correctness pays
_ROUNDING = 5e-7  # of a mean or a deviation of equal numbers in float32, as a fraction of them


@dataclass(frozen=True, slots=True)
class Facts:
    """What is settled before the first step, as far as it is known."""

    learning_rate: float | None = None
    uses_lora: bool = True
    parameters: int | None = None
    problems_per_step: int = 1
    max_steps: int = 0
    max_grad_norm: float = 1.0
    max_completion_length: int | None = None
    fp16: bool = False

    @classmethod
    def of(
        cls, settings: Mapping[str, Any], parameters: int | None = None, processes: object = 1
    ) -> Facts:
        """The facts in a configuration, or in what a damaged ``config.yaml`` still holds.

        ``processes`` is how many share a step, as a manifest may say it.
        """

        def given(name: str, default: float) -> float:
            value = number(settings.get(name))
            return default if value is None else value

        replies = given("per_device_train_batch_size", 8)
        replies *= given("gradient_accumulation_steps", 1) * (number(processes) or 1)
        return cls(
            learning_rate=given("learning_rate", math.nan) or 0.0,
            uses_lora=bool(settings.get("use_peft", True)),
            parameters=parameters,
            problems_per_step=max(1, int(replies / max(given("num_generations", 8), 1))),
            max_steps=int(given("max_steps", 0)),
            max_grad_norm=given("max_grad_norm", 1.0),
            max_completion_length=int(given("max_completion_length", 0)) or None,
            fp16=bool(settings.get("fp16", False)),
        )


class Said(NamedTuple):
    """What a rule found: the evidence, and what to do about it."""

    evidence: str
    remedy: str


class MetricsHistory:
    """The part of a run's metrics that rules look at: its opening, its latest steps, some sums."""

    def __init__(self, facts: Facts) -> None:
        self.facts = facts
        patience = max(PATIENCE_STEPS, math.ceil(PATIENCE_GROUPS / facts.problems_per_step))
        if facts.max_steps > 0:  # in a shorter run every single step has to agree
            patience = min(patience, facts.max_steps)
        self.patience_steps = max(3, patience)
        self.opening_steps = max(5, self.patience_steps // 2)
        self.step = 0
        self.opening: list[Row] = []
        self.recent: deque[tuple[int, Row]] = deque()
        self.constant: dict[str, float | None] = {}  # the first mean of each reward
        self.varied: set[str] = set()
        self.has_stopped = False
        self.norms: deque[float] = deque(maxlen=200)
        self.refused_steps = 0
        self.best_accuracy: tuple[float, int] | None = None
        self.accuracy: float | None = None

    def add(self, row: Row) -> None:
        """One logged row: that of a training step, or of a measurement in between."""
        accuracy = number(row.get("eval_accuracy"))
        if accuracy is not None:
            self.accuracy = accuracy
            if self.best_accuracy is None or accuracy > self.best_accuracy[0]:
                self.best_accuracy = (accuracy, int(row.get("step") or 0))
        if "loss" not in row or "reward" not in row:
            return
        before, self.step = self.step, int(row.get("step") or self.step + 1)
        if self.step <= self.opening_steps or not self.opening:
            self.opening.append(row)
        self.recent.append((before, row))
        # A row speaks for all steps since the one before it.
        while len(self.recent) > 1 and self.recent[1][0] <= self.step - self.patience_steps:
            self.recent.popleft()
        for name in reward_names(row):
            # NaN, or null in a file: it applied to no reply (None), or to one, which has no spread.
            mean = number(row.get(f"rewards/{name}/mean"))
            if _spread(row, name) or not _same(self.constant.setdefault(name, mean), mean):
                self.varied.add(name)
        self.has_stopped |= (number(row.get("completions/clipped_ratio")) or 0.0) < 1.0
        self.refused_steps += int(number(row.get("refused_steps")) or 0)
        if (norm := number(row.get("grad_norm"))) is not None:
            self.norms.append(norm)

    @property
    def is_long_enough(self) -> bool:
        """Whether the latest stretch spans the steps that a rule needs."""
        return bool(self.recent) and self.step - self.recent[0][0] >= self.patience_steps

    @property
    def has_changed_since_opening(self) -> bool:
        """Whether there is an opening and, apart from it, a latest stretch."""
        return self.step >= self.opening_steps + self.patience_steps

    def now(self, name: str) -> float | None:
        """Mean of a metric over the latest stretch."""
        return _mean(row.get(name) for _, row in self.recent)

    def silent(self) -> float | None:
        """Mean of :func:`silent_fraction` over the latest stretch."""
        return _mean(silent_fraction(row) for _, row in self.recent)

    def then(self, name: str) -> float | None:
        """Its mean over the opening."""
        return _mean(row.get(name) for row in self.opening)

    def goal(self) -> str:
        """The metric that says whether the task is done: correctness, else the whole reward."""
        row = self.recent[-1][1]
        names = (name for name in _CORRECTNESS.names if f"rewards/{name}/mean" in row)
        return next((f"rewards/{name}/mean" for name in names), "reward")

    def has_improved(self) -> bool:
        """Whether the goal rose by more than a tenth of the replies' own spread."""
        goal = self.goal()
        spread = self.then("reward_std" if goal == "reward" else goal.replace("/mean", "/std"))
        then, now = self.then(goal), self.now(goal)
        return then is not None and now is not None and now - then > 0.1 * (spread or 0.0)

    def is_solved(self) -> bool:
        """Whether nearly every reply is correct. Groups without a signal are then a success."""
        most = SOLVED_FRACTION * _CORRECTNESS.maximum
        return self.goal() != "reward" and (self.now(self.goal()) or 0.0) >= most

    def stretch(self) -> str:
        """The latest stretch in words."""
        steps = self.step - self.recent[0][0]
        return f"the last {steps} steps" if steps > 1 else "the last step"


def reward_names(row: Row) -> list[str]:
    """The names of the rewards in a row of the log.

    >>> reward_names({"rewards/integer/mean": 0.5, "rewards/integer/std": 0.0, "reward": 1.0})
    ['integer']
    """
    return [
        name.removeprefix("rewards/").removesuffix("/mean")
        for name in row
        if name.startswith("rewards/") and name.endswith("/mean")
    ]


def usual_norm(norms: Iterable[float]) -> float | None:
    """The median gradient norm before the last three, or None while that means nothing."""
    before = list(norms)[:-3]
    return median(before) if len(before) >= 5 else None


def _spread(row: Row, name: str) -> float:
    """The deviation of a reward; 0 for what rounding makes of 0: 3e-8, where all are 0.3."""
    mean = number(row.get(f"rewards/{name}/mean")) or 0.0
    spread = number(row.get(f"rewards/{name}/std")) or 0.0
    return spread if spread > _ROUNDING * abs(mean) else 0.0


def _same(one: float | None, other: float | None) -> bool:
    if one is None or other is None:
        return one is other
    return math.isclose(one, other, rel_tol=_ROUNDING)


def silent_fraction(row: Row) -> float | None:
    """The share of a step's groups from which nothing could be learned, if it is known.

    Logs of TRL's, and of runs before 2026-11-30, do not have it. There it is the share of groups
    with equal rewards or, where steps are paid, of those whose steps teach nothing, whichever is
    less.

    >>> silent_fraction({"frac_reward_zero_std": 0.25, "frac_zero_advantage": 1.0})
    1.0
    >>> silent_fraction({"frac_reward_zero_std": 1.0, "frac_step_reward_zero_std": 0.5})
    0.5
    """
    if (silent := number(row.get("frac_zero_advantage"))) is not None:
        return silent
    names = ("frac_reward_zero_std", "frac_step_reward_zero_std")
    return min((one for name in names if (one := number(row.get(name))) is not None), default=None)


def _mean(values: Iterable[object]) -> float | None:
    known = [each for value in values if (each := number(value)) is not None]
    return sum(known) / len(known) if known else None


def number(value: object) -> float | None:
    """The value if it is a finite number, else None."""
    if not isinstance(value, int | float):
        return None
    try:
        known = float(value)
    except OverflowError:  # an integer of hundreds of digits
        return None
    return known if math.isfinite(known) else None
