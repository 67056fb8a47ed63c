"""Placebo rewards: what would the same training have done without being paid for right answers?

A gain may come from training as such: from the format that every reply is pulled towards, or from
noise that happens to favour what the base does best (Shao et al. 2025, "Spurious Rewards", arXiv
2506.10947, saw some models gain from random rewards). A control is a run with the same budget:

- ``random`` pays a fair coin that knows nothing of the reply;
- ``format`` pays those of the run's rewards that look at the form only.

The coin is tossed by hashing seed, step, place in the batch and text, never by a global generator:
a resumed run gets the rewards that an uninterrupted one gets, and nothing else that is drawn
changes. Note that ``problem_sampling: solve_rate`` and ``outcome_gating`` still look at right
answers.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from typing import Any, Literal

from abacist.errors import UsageError
from abacist.task.reply import completion_text

Control = Literal["none", "random", "format"]
NONE, RANDOM, FORMAT = "none", "random", "format"

#: The rewards that cannot tell a right answer from a wrong one, by name; the gist's too.
FORMAT_REWARDS = frozenset(
    {
        "strict_format",
        "soft_format",
        "xml_count",
        "strict_format_reward_func",
        "soft_format_reward_func",
        "xmlcount_reward_func",
    }
)
RewardFunc = Callable[..., Any]


class RandomReward:
    """A reward function that pays 1 or 0 by a fair coin, the same one for the same seed, step,
    place in the batch, prompt and completion."""

    __name__ = "random_control"

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def __call__(
        self, prompts: Sequence[Any], completions: Sequence[Any], **columns: Any
    ) -> list[float]:
        state = columns.get("trainer_state")
        step = int(getattr(state, "global_step", 0))
        pairs = enumerate(zip(prompts, completions, strict=True))
        return [
            self._coin(step, place, completion_text(prompt), completion_text(completion))
            for place, (prompt, completion) in pairs
        ]

    def _coin(self, *parts: int | str) -> float:
        digest = hashlib.sha256()
        for part in (self.seed, *parts):
            encoded = str(part).encode("utf-8", "surrogatepass")
            digest.update(f"{len(encoded)}:".encode() + encoded)
        return float(digest.digest()[0] & 1)


def control_rewards(
    control: str,
    rewards: Sequence[RewardFunc],
    weights: Sequence[float] | None,
    *,
    seed: int,
) -> tuple[list[RewardFunc], list[float] | None]:
    """The rewards, with their weights, that a run is paid by as this control.

    "none" leaves them as they are. Raises UsageError if "format" would leave nothing to pay.
    """
    if control == NONE:
        return list(rewards), None if weights is None else list(weights)
    if control == RANDOM:
        return [RandomReward(seed)], None
    kept = [index for index, one in enumerate(rewards) if one.__name__ in FORMAT_REWARDS]
    if not kept:
        raise UsageError(
            "--control format leaves no reward: none of "
            f"{', '.join(one.__name__ for one in rewards)} is known to look at the format only",
            "Choose --reward_funcs default, or --control random.",
        )
    chosen = None if weights is None else [weights[index] for index in kept]
    return [rewards[index] for index in kept], chosen
