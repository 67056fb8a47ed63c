"""Before anything is loaded that costs time: are the rewards of this run worth training on?

The short form of ``abacist audit``: the same questions on a few dozen of the run's own problems,
within a second. Rewards under which a hack earns what an honest solution does are refused.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from abacist.errors import RewardError
from abacist.learning.config import Config
from abacist.learning.control import NONE
from abacist.learning.tracking import Watcher
from abacist.task.audit.audit import audit
from abacist.task.audit.conditions import columns_of
from abacist.task.audit.findings import Kind
from abacist.task.audit.golds import gold_findings
from abacist.task.audit.renderings import layouts
from abacist.task.audit.trial import MishapKind, Trial
from abacist.task.problems import Problem

NUM_PROBLEMS = 30
MAX_SECONDS = 10.0
NUM_TRIED_PROBLEMS = 3


def refuse_hackable(
    config: Config, problems: Sequence[Problem], rewards: Sequence[Any], watcher: Watcher
) -> None:
    """Note in one line what the audit says, and which golds no reply can match.

    Raises DataError where no reply can match any gold; RewardError where a hack earns what an
    honest right solution does, unless ``allow_hackable_rewards`` is set, where a reward wants a
    column that no problem has, and where one fails on every reply.
    """
    matched, of_golds = gold_findings(problems)
    for finding in of_golds:
        watcher.note(f"  warning: {finding.kind.sentence} {finding.evidence}.")
    if config.script.control != NONE:
        return  # a placebo is meant not to pay for answers
    found = audit(
        rewards,
        matched[:NUM_PROBLEMS],
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
    failing = {name for one in found.findings if one.kind is Kind.FAILS for name in one.rewards}
    for reward in rewards:
        if reward.__name__ in failing and (why := _always_fails(reward, problems)):
            raise RewardError(
                f"A reward fails on every reply that was tried. {why}",
                "Mend it, or leave it out of --reward_funcs.",
            )
    hacks = [one for one in found.findings if one.kind is Kind.HACKABLE]
    if hacks and not config.script.allow_hackable_rewards:
        raise RewardError(
            f"These rewards would teach a hack: {hacks[0].evidence}.",
            "`abacist audit` with the same --reward_funcs shows what is wrong. To train on them "
            "all the same: --allow_hackable_rewards.",
        )
    of_rewards = [one for one in found.findings if one.kind is not Kind.LONG_GOLD]  # said above
    watcher.note(f"  rewards: {replace(found, findings=tuple(of_rewards)).summary()}")
    if hacks:
        watcher.note("  They are trained on all the same (allow_hackable_rewards).")
    for remark in found.remarks:
        watcher.note(f"  {remark}")


def _always_fails(reward: Any, problems: Sequence[Problem]) -> str:
    """What a reward says when it fails on every solution of several problems; "" if it does not."""
    said = ""
    for problem in problems[:NUM_TRIED_PROBLEMS]:
        trial = Trial(reward, MAX_SECONDS)
        variants = list(layouts(problem))
        texts, names = [one.text for one in variants], [one.name for one in variants]
        trial.pay(texts, problem.question, columns_of(problem), names)
        failures = [one for one in trial.mishaps if one.kind is MishapKind.FAILED]
        if trial.is_usable or len(failures) < len(trial.mishaps):  # one that hangs may be slow only
            return ""
        said = failures[0].message
    return said
