"""What every tracker gets, so that all hold the same: names, settings, completions, verdict.

Names are transformers': a metric ``reward`` of ``metrics.jsonl`` is ``train/reward`` in a tracker,
and ``eval_accuracy`` is ``eval/accuracy``. Shares are fractions.
"""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from transformers.integrations.integration_utils import rewrite_logs

from abacist.proof.comparison.compare import Comparison
from abacist.proof.comparison.sentence import headline, judgement
from abacist.records.rollout import storable
from abacist.records.rundir import RunDir
from abacist.records.secrets import scrubbed
from abacist.task.reply import completion_text

COMPLETIONS = "completions"  # TRL's name for the table
# Logged once, at the end. transformers has W&B keep them in the summary and Trackio drop them.
END_TOTALS = (
    "train_runtime",
    "train_samples_per_second",
    "train_steps_per_second",
    "train_loss",
    "total_flos",
)


def tracker_names(logs: Mapping[str, Any]) -> dict[str, Any]:
    """A log under the names that trackers have for it.

    >>> tracker_names({"reward": 1.5, "eval_accuracy": 0.25})
    {'train/reward': 1.5, 'eval/accuracy': 0.25}
    """
    renamed: dict[str, Any] = rewrite_logs(dict(logs))
    return renamed


def run_settings(run: RunDir) -> dict[str, Any]:
    """The configuration of a run for its tracker: ``config.yaml`` flat, by the flags' names, and
    ``manifest.json`` under ``manifest``. Raises RunError if they cannot be read.

    Tokens are blotted out. ``dtype`` is the one that the weights are held in, where it is recorded.
    """
    manifest = run.read_manifest()
    settings = {**run.read_settings(), "manifest": manifest}
    for name in ("dtype", "recipe"):
        if manifest.get(name) is not None:
            settings[name] = manifest[name]
    clean: dict[str, Any] = scrubbed(settings)
    return clean


def flat(nested: Mapping[str, Any], prefix: str = "") -> dict[str, str | int | float | bool]:
    """Nested settings as one level, for trackers that have no other: lists as text, None left out.

    >>> flat({"seed": 3, "manifest": {"versions": {"trl": "1.16.0"}}, "rewards": ["a", "b"]})
    {'seed': 3, 'manifest.versions.trl': '1.16.0', 'rewards': 'a, b'}
    """
    found: dict[str, str | int | float | bool] = {}
    for key, value in nested.items():
        if isinstance(value, Mapping):
            found |= flat(value, f"{prefix}{key}.")
        elif isinstance(value, list):
            found[prefix + key] = ", ".join(map(str, value))
        elif value is not None:
            found[prefix + key] = value if isinstance(value, int | float) else str(value)
    return found


@dataclass(frozen=True, slots=True)
class Verdict:
    """A comparison as a tracker keeps it."""

    sentence: str
    judgement: str
    figures: Mapping[str, float]

    @classmethod
    def of(cls, comparison: Comparison) -> Verdict:
        paired, any_format = comparison.accuracy, comparison.any_format
        figures = {
            "verdict/before": paired.before.value,
            "verdict/after": paired.after.value,
            "verdict/gain": paired.change.value,
            "verdict/gain_low": paired.change.low,
            "verdict/gain_high": paired.change.high,
            "verdict/p_value": paired.p_value,
            "verdict/gained": len(paired.gained),
            "verdict/lost": len(paired.lost),
            "verdict/problems": paired.change.n,
            "verdict/gain_in_any_format": any_format.change.value,
        }
        return cls(headline(comparison), judgement(paired), figures)

    @property
    def everything(self) -> dict[str, Any]:
        """Figures and words in one dictionary."""
        words = {"verdict/sentence": self.sentence, "verdict/judgement": self.judgement}
        return words | dict(self.figures)


@dataclass(frozen=True, slots=True)
class Completion:
    """One completion of a step, as TRL's table has it. Texts hold no lone surrogates."""

    step: int
    messages: Sequence[Mapping[str, str]]
    text: str
    rewards: Mapping[str, float | None]
    extra: Mapping[str, Any]
    advantage: float

    def row(self) -> dict[str, Any]:
        """The row under TRL's column names; the prompt as text, turn after turn."""
        prompt = "\n\n".join(f"{turn['role'].upper()}\n{turn['content']}" for turn in self.messages)
        first = {"step": self.step, "prompt": prompt, "completion": self.text}
        return {**first, **self.rewards, **self.extra, "advantage": self.advantage}


def completions_of(trainer: Any) -> list[Completion]:
    """The completions of the newest generation batch, as ``--log_completions`` keeps them.

    With ``--log_unique_prompts`` the first one of each prompt. Raises ValueError if a reward has
    logged a column with ``log_extra`` that has not one value for each.
    """
    logs = trainer._logs
    count = len(logs["prompt"])
    for name, values in logs["extra"].items():
        if len(values) != count:  # a reward may log what it likes
            raise ValueError(
                f"{len(values)} values of {name!r} were logged for {count} completions"
            )
    found: dict[str, Completion] = {}
    for index, prompt in enumerate(logs["prompt"]):
        extra = {name: values[index] for name, values in logs["extra"].items()}
        one = Completion(
            step=trainer.state.global_step,
            messages=_messages(prompt),
            text=storable(completion_text(logs["completion"][index])),
            rewards={name: _number(values[index]) for name, values in logs["rewards"].items()},
            extra={
                name: value if isinstance(value, int | float | None) else storable(str(value))
                for name, value in extra.items()
            },
            advantage=float(logs["advantages"][index]),
        )
        found.setdefault(str(one.messages) if trainer.log_unique_prompts else str(index), one)
    return list(found.values())


def some_of(completions: Sequence[Completion], most: int | None, seed: int) -> list[Completion]:
    """At most ``most`` of them (None: all) in their order, the same ones for the same seed."""
    if most is None or most >= len(completions):
        return list(completions)
    step = completions[0].step
    kept = random.Random(f"{seed} {step}").sample(range(len(completions)), max(most, 0))
    return [completions[index] for index in sorted(kept)]


def _messages(prompt: Any) -> list[dict[str, str]]:
    if isinstance(prompt, str):
        return [{"role": "user", "content": storable(prompt)}]
    return [
        {"role": str(turn["role"]), "content": storable(completion_text([turn]))} for turn in prompt
    ]


def _number(value: float) -> float | None:
    return value if math.isfinite(value) else None
