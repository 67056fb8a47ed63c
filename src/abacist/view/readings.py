"""What a step's log says, and how long the rest will take.

TRL hands over a dictionary of metrics under its own names; which of them are there depends on its
version and settings, and any of them may be nan. :class:`Step` picks out what a person wants to
see; :class:`Pace` turns a series of "so many done" into the time that is left.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

#: What each built-in reward pays at most; others have no known maximum.
REWARD_MAXIMA = {
    "correctness": 2.0,
    "integer": 0.5,
    "strict_format": 0.5,
    "soft_format": 0.5,
    "xml_count": 0.5,
    "correctness_reward_func": 2.0,
    "int_reward_func": 0.5,
    "strict_format_reward_func": 0.5,
    "soft_format_reward_func": 0.5,
    "xmlcount_reward_func": 0.5,
}
REPORT_SECONDS = 10.0
_MARKS_APART_SECONDS = 1.0


@dataclass(frozen=True, slots=True)
class Step:
    """One step's metrics, as far as they were logged and are numbers; the rest is None or nan."""

    step: int | None
    max_steps: int | None
    rewards: dict[str, float]
    reward: float | None
    length_tokens: float | None
    stopped_fraction: float | None
    silent_fraction: float | None
    details: dict[str, float]
    seconds: float | None

    @classmethod
    def read(cls, metrics: Mapping[str, object]) -> Step:
        """Picks what is shown out of a dictionary of TRL's log."""
        rewards = {
            key.removeprefix("rewards/").removesuffix("/mean"): _number(value)
            for key, value in metrics.items()
            if key.startswith("rewards/") and key.endswith("/mean")
        }
        clipped = _known(metrics, "completions/clipped_ratio")
        details = {name: _known(metrics, name) for name in ("loss", "kl", "entropy")}
        step, max_steps = _known(metrics, "step"), _known(metrics, "max_steps")
        return cls(
            step=None if step is None else int(step),
            max_steps=None if not max_steps else int(max_steps),
            rewards=rewards,
            reward=_known(metrics, "reward"),
            length_tokens=_known(metrics, "completions/mean_length"),
            stopped_fraction=None if clipped is None else 1 - clipped,
            silent_fraction=_known(metrics, "frac_reward_zero_std"),
            details={name: value for name, value in details.items() if value is not None},
            seconds=_known(metrics, "step_seconds") or _known(metrics, "step_time"),
        )

    def position(self) -> str:
        """``"step 3/60"``, as far as it is known."""
        if self.step is None:
            return ""
        return f"step {self.step}/{self.max_steps}" if self.max_steps else f"step {self.step}"

    def words(self) -> list[str]:
        """The figures beside the rewards, each as a few words."""
        words = []
        if self.length_tokens is not None:
            words.append(f"{self.length_tokens:.0f} tokens a reply")
        if self.stopped_fraction is not None:
            words.append(f"stopped {self.stopped_fraction:.0%}")
        if self.silent_fraction is not None:
            words.append(f"groups without signal {self.silent_fraction:.0%}")
        return words + [f"{name} {value:.4g}" for name, value in self.details.items()]


def measured_words(metrics: Mapping[str, object]) -> str:
    """What an evaluation in the middle of training logged, as words; "" if it is none.

    >>> measured_words({"step": 20, "eval_accuracy": 0.45, "eval_runtime": 3.0})
    'step 20 | measured: accuracy 0.450'
    """
    clocks = ("runtime", "per_second", "_time")
    found = {
        name.removeprefix("eval_"): _known(metrics, name)
        for name in metrics
        if name.startswith("eval_") and "/" not in name and not name.endswith(clocks)
    }
    words = [f"{name} {value:.3f}" for name, value in found.items() if value is not None]
    step = _known(metrics, "step")
    return f"step {step or 0:.0f} | measured: {', '.join(words)}" if words else ""


def _number(value: object) -> float:
    try:
        return float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError, OverflowError):
        return math.nan


def _known(metrics: Mapping[str, object], name: str) -> float | None:
    value = _number(metrics.get(name))
    return value if math.isfinite(value) else None


def duration(seconds: float) -> str:
    """A length of time as people say it.

    >>> duration(8.4), duration(125), duration(4321)
    ('8 s', '2 min 05 s', '1 h 12 min')
    """
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


@dataclass
class Pace:
    """The advance of one thing towards its total: how long it still takes, when to report it."""

    clock: Callable[[], float]
    marks: deque[tuple[float, float]] = field(default_factory=lambda: deque(maxlen=20))
    reported_at: float = -math.inf
    reported_done: float = 0

    def mark(self, done: float) -> None:
        """So much is done now."""
        now = self.clock()
        # Marks of every token would soon reach back no further than a moment.
        if len(self.marks) > 1 and now - self.marks[-2][0] < _MARKS_APART_SECONDS:
            self.marks.pop()
        self.marks.append((now, done))

    def left(self, total: float | None, seconds_each: float | None = None) -> str:
        """``"2 min 05 s left"`` by the recent speed; nothing while that cannot be known.

        ``seconds_each`` stands in until there are two marks to judge by.
        """
        if total is None or not self.marks:
            return ""
        (start, first), (now, done) = self.marks[0], self.marks[-1]
        if done > first:
            seconds_each = (now - start) / (done - first)
        if seconds_each is None or done >= total:
            return ""
        seconds = seconds_each * (total - done)
        return f"{duration(seconds)} left" if math.isfinite(seconds) else ""

    def is_due(self, total: float | None) -> bool:
        """Whether the latest mark deserves a line of a log; if so it counts as reported."""
        now, done = self.marks[-1]
        advance = done - self.reported_done
        is_far = total is not None and (done >= total or advance >= total / 10)
        if not is_far and now - self.reported_at < REPORT_SECONDS:
            return False
        self.reported_at, self.reported_done = now, done
        return True
