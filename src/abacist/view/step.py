"""What a person wants to see of a step's metrics, whatever else was logged and whatever is absent.

Which metrics are there depends on TRL's version and settings, and any of them may be nan. Nothing
here raises because of one.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from abacist.learning.health.history import reward_names, silent_fraction
from abacist.task.rewards import built_in, correctness


@dataclass(frozen=True, slots=True)
class Step:
    """One step's metrics, as far as they were logged and are numbers; the rest is None or nan.

    ``num_tokens`` counts the tokens of the whole run so far, as TRL does.
    """

    step: int | None
    max_steps: int | None
    rewards: dict[str, float]
    reward: float | None
    length_tokens: float | None
    stopped_fraction: float | None
    zero_signal_fraction: float | None
    details: dict[str, float]
    seconds: float | None
    num_tokens: float | None = None

    @classmethod
    def read(cls, metrics: Mapping[str, object]) -> Step:
        """Picks what is shown out of a dictionary of TRL's log."""
        rewards = {name: number(metrics[f"rewards/{name}/mean"]) for name in reward_names(metrics)}
        clipped = known(metrics, "completions/clipped_ratio")
        details = {name: known(metrics, name) for name in ("step_reward", "loss", "kl", "entropy")}
        step, max_steps = known(metrics, "step"), known(metrics, "max_steps")
        return cls(
            step=None if step is None else int(step),
            max_steps=None if not max_steps else int(max_steps),
            rewards=rewards,
            reward=known(metrics, "reward"),
            length_tokens=known(metrics, "completions/mean_length"),
            stopped_fraction=None if clipped is None else 1 - clipped,
            zero_signal_fraction=silent_fraction(metrics),
            details={name: value for name, value in details.items() if value is not None},
            seconds=known(metrics, "step_seconds") or known(metrics, "step_time"),
            num_tokens=known(metrics, "num_tokens"),
        )

    @property
    def right_fraction(self) -> float | None:
        """The share of right replies, out of what the built-in correctness reward paid on average.

        None where it was not paid.
        """
        for name, value in self.rewards.items():
            ours = built_in(name)
            if ours is not None and ours.func is correctness and math.isfinite(value):
                return value / ours.maximum
        return None

    def position(self) -> str:
        """``"step 3/60"``, as far as it is known."""
        if self.step is None:
            return ""
        return f"step {self.step}/{self.max_steps}" if self.max_steps else f"step {self.step}"

    def words(self, *, of_length: bool = True) -> list[str]:
        """The figures beside the rewards, each as a few words."""
        words = []
        if of_length and self.length_tokens is not None:
            words.append(f"{self.length_tokens:.0f} tokens a reply")
        if self.stopped_fraction is not None:
            words.append(f"stopped {self.stopped_fraction:.0%}")
        if self.zero_signal_fraction is not None:
            words.append(f"groups without signal {self.zero_signal_fraction:.0%}")
        return words + [f"{name} {value:.4g}" for name, value in self.details.items()]


def measured_words(metrics: Mapping[str, object]) -> str:
    """What an evaluation during training logged, as words; "" if it is none.

    >>> measured_words({"step": 20, "eval_accuracy": 0.45, "eval_runtime": 3.0})
    'step 20 | measured: accuracy 0.450'
    """
    clocks = ("runtime", "per_second", "_time")
    found = {
        name.removeprefix("eval_"): known(metrics, name)
        for name in metrics
        if name.startswith("eval_") and "/" not in name and not name.endswith(clocks)
    }
    words = [f"{name} {value:.3f}" for name, value in found.items() if value is not None]
    step = known(metrics, "step")
    return f"step {step or 0:.0f} | measured: {', '.join(words)}" if words else ""


def out_of(name: str, value: float) -> str:
    """What a reward paid on average, and the most it can pay where that is known: ``"1.20/2"``."""
    if not math.isfinite(value):
        return "n/a"
    ours = built_in(name)
    return f"{value:.2f}" if ours is None else f"{value:.2f}/{ours.maximum:g}"


def number(value: object) -> float:
    """The value as a float, nan if it is none."""
    try:
        return float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError, OverflowError):
        return math.nan


def known(metrics: Mapping[str, object], name: str) -> float | None:
    """The metric if it was logged and is a finite number."""
    value = number(metrics.get(name))
    return value if math.isfinite(value) else None
