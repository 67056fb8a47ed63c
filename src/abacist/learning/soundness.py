"""Before anything is loaded that costs time: are the rewards of this run worth training on?

The short form of ``abacist audit``: the same questions on a few dozen of the run's own problems,
within a second. Rewards under which a hack earns what an honest solution does are refused.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from abacist.errors import RewardError
from abacist.learning.config import Config
from abacist.learning.control import NONE
from abacist.learning.tracking import Watcher
from abacist.task.audit.audit import audit
from abacist.task.audit.findings import Kind
from abacist.task.problems import Problem

NUM_PROBLEMS = 30
MAX_SECONDS = 10.0


def refuse_hackable(
    config: Config, problems: Sequence[Problem], rewards: Sequence[Any], watcher: Watcher
) -> None:
    """Note in one line what the audit says.

    Raises RewardError where a hack earns what an honest right solution does, unless
    ``allow_hackable_rewards`` is set, where a reward wants a column that no problem has, and where
    one fails on every reply.
    """
    if config.script.control != NONE:
        return  # a placebo is meant not to pay for answers
    found = audit(
        rewards,
        problems[:NUM_PROBLEMS],
        config.training.reward_weights,
        max_seconds=MAX_SECONDS,
        thorough=False,
    )
    missing = [one for one in found.findings if one.kind is Kind.NO_COLUMN]
    if missing:
        raise RewardError(
            f"A reward cannot be called: {missing[0].evidence}.",
            "Give the parameter a default, or compute it from the columns there are.",
        )
    tried = {name for earned in found.earned for name in earned.rewards}
    broken = [
        one for one in found.findings if one.kind is Kind.FAILS and not tried & set(one.rewards)
    ]
    if broken:
        raise RewardError(
            f"A reward fails on every reply that was tried: {broken[0].evidence}.",
            "Mend it, or leave it out of --reward_funcs.",
        )
    hacks = [one for one in found.findings if one.kind is Kind.HACKABLE]
    if hacks and not config.script.allow_hackable_rewards:
        raise RewardError(
            f"These rewards would teach a hack: {hacks[0].evidence}.",
            "`abacist audit` with the same --reward_funcs shows what is wrong. To train on them "
            "all the same: --allow_hackable_rewards.",
        )
    watcher.note(f"  rewards: {found.summary()}")
    if hacks:
        watcher.note("  They are trained on all the same (allow_hackable_rewards).")
    for remark in found.remarks:
        watcher.note(f"  {remark}")
