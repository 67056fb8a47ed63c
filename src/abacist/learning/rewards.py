"""The rewards of a run: loaded by name, replaced by a placebo, refused where they can be hacked.

**Placebo.** A gain may come from training as such: from the format that every reply is pulled
towards, or from noise that happens to favour what the base does best (Shao et al. 2025, "Spurious
Rewards", arXiv 2506.10947, saw some models gain from random rewards). A control is a run with the
same budget whose rewards cannot tell a right answer:

- ``random`` pays a fair coin that knows nothing of the reply;
- ``format`` pays those of the run's rewards that look at the form only.

The coin is a hash of seed, step, place in the batch and text, so a resumed run gets the rewards
that an uninterrupted one gets, and no generator is touched. Note that ``problem_sampling:
solve_rate`` and ``outcome_gating`` still look at right answers. Steps are not paid
(``step_reward_weight``): right ones lead to right answers.

**Gate.** :func:`refuse_hackable` is the short form of ``abacist audit``: the same questions on a
few dozen of the run's own problems, within a second and before a model is loaded. Rewards under
which a hack earns what an honest solution does are refused.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

from abacist.errors import RewardError, UsageError
from abacist.learning import processes
from abacist.learning.config import Config
from abacist.learning.tracking import Watcher
from abacist.proof.comparison.compare import NO_CONTROL, RANDOM
from abacist.task.audit.audit import audit
from abacist.task.audit.findings import Kind
from abacist.task.audit.gold_findings import gold_findings
from abacist.task.audit.renderings import layouts
from abacist.task.audit.trial import MishapKind, Trial
from abacist.task.custom_rewards import (
    DEFAULT_TIMEOUT_SECONDS,
    RewardFunc,
    function_name,
    may_come_with,
    stands_in_no_file,
)
from abacist.task.gist import GIST_DEFECTS
from abacist.task.problems import Problem
from abacist.task.reply import completion_text
from abacist.task.rewards import built_in, is_built_in_name, load_reward_funcs

Control = Literal["none", "random", "format"]


def load_rewards(config: Config, watcher: Watcher) -> list[Any]:
    """The reward functions by name, with the historic set's defects said when it is chosen."""
    script = config.script
    rewards = load_reward_funcs(
        script.reward_funcs, script.reward_timeout_seconds, config.functions
    )
    if lost := [function_name(one) for one in config.functions if stands_in_no_file(one)]:
        watcher.note(
            f"  {', '.join(lost)}: given as a Python function that no file holds, so config.yaml "
            "alone cannot run again; to resume, give it again"
        )
    weights = config.training.reward_weights
    if weights is not None and len(weights) != len(rewards):
        raise UsageError(
            f"--reward_weights: {len(weights)} given, {len(rewards)} needed, one for each of "
            f"{', '.join(reward.__name__ for reward in rewards)}",
            "Give --reward_weights one number for each, in this order.",
        )
    if "gist" in config.script.reward_funcs:
        watcher.note(
            "The gist's rewards are the historic ones; what is known to be wrong with them:"
        )
        for defect in GIST_DEFECTS:
            watcher.note(f"  - {defect}")
    kind, seed = script.control, config.training.seed
    rewards, config.training.reward_weights = control_rewards(kind, rewards, weights, seed=seed)
    if kind != NO_CONTROL:
        names = ", ".join(reward.__name__ for reward in rewards)
        watcher.note(f"  control: this run is paid by {names} only, not for right answers")
    return rewards


def reported_rewards(
    settings: Mapping[str, Any],
    note: Callable[[str], None],
    *,
    brought_in: Path | None = None,
    trust: bool = False,
    given: Mapping[str, Callable[..., Any]] = MappingProxyType({}),
) -> tuple[list[RewardFunc], list[float] | None]:
    """The rewards, with their weights, that an evaluation of a run reports.

    ``settings`` are those of the run, {} for other models, which get the default set. For a control
    they are the rewards that the placebo replaced. A reward that cannot be loaded any more is left
    out, and ``note`` is told why: the replies can be measured without it.

    ``given`` holds functions that stand in no file, by name.

    ``brought_in`` is the folder that the settings were read from. A run from somebody else may
    bring code in it, and a name that is relative to wherever one is; such a reward is left out too,
    unless ``trust``. Runs made here name their rewards by whole paths, or as installed modules.
    """
    names = settings.get("reward_funcs") or ["default"]
    limit = settings.get("reward_timeout_seconds", DEFAULT_TIMEOUT_SECONDS)
    rewards: list[RewardFunc] = []
    is_whole = True
    for name in [names] if isinstance(names, str) else names:
        is_ours = trust or is_built_in_name(str(name))
        if brought_in is not None and not is_ours and may_come_with(str(name), brought_in):
            is_whole = False
            note(
                f"  not reported: the reward '{name}' may come with the run; --trust_remote_code "
                "runs it"
            )
            continue
        try:
            rewards += load_reward_funcs([str(name)], float(limit), given)
        except RewardError as error:
            is_whole = False
            note(f"  not reported: {error.message}")
    weights = settings.get("reward_weights")
    if not is_whole or not isinstance(weights, list) or len(weights) != len(rewards):
        return rewards, None
    return rewards, [float(weight) for weight in weights]


class RandomReward:
    """A reward function that pays 1 or 0 by a fair coin, the same one for the same seed, step,
    place in the generation batch, prompt and completion."""

    __name__ = "random_control"

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def __call__(
        self, prompts: Sequence[Any], completions: Sequence[Any], **columns: Any
    ) -> list[float]:
        state = columns.get("trainer_state")
        step = int(getattr(state, "global_step", 0))
        # The place among the completions of all processes, as their file of rollouts has them.
        first = processes.rank() * len(completions)
        pairs = enumerate(zip(prompts, completions, strict=True), start=first)
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
    control: str, rewards: Sequence[RewardFunc], weights: Sequence[float] | None, *, seed: int
) -> tuple[list[RewardFunc], list[float] | None]:
    """The rewards, with their weights, that a run is paid by as this control.

    "none" leaves them as they are. Raises UsageError if "format" would leave nothing to pay.
    """
    if control == NO_CONTROL:
        return list(rewards), None if weights is None else list(weights)
    if control == RANDOM:
        return [RandomReward(seed)], None
    ours = [built_in(one.__name__) for one in rewards]
    kept = [index for index, one in enumerate(ours) if one is not None and one.is_form_only]
    if not kept:
        raise UsageError(
            "--control format leaves no reward: none of "
            f"{', '.join(one.__name__ for one in rewards)} is known to look at the format only",
            "Choose --reward_funcs default, or --control random.",
        )
    chosen = None if weights is None else [weights[index] for index in kept]
    return [rewards[index] for index in kept], chosen


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
    if config.script.control != NO_CONTROL:
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
            "anyway: --allow_hackable_rewards.",
        )
    of_rewards = [one for one in found.findings if one.kind is not Kind.LONG_GOLD]  # said above
    watcher.note(f"  rewards: {replace(found, findings=tuple(of_rewards)).summary()}")
    if hacks:
        watcher.note("  They are used anyway (allow_hackable_rewards).")
    for remark in found.remarks:
        watcher.note(f"  {remark}")


def _always_fails(reward: Any, problems: Sequence[Problem]) -> str:
    """What a reward says when it fails on every solution of several problems; "" if it does not."""
    said = ""
    for problem in problems[:NUM_TRIED_PROBLEMS]:
        trial = Trial(reward, MAX_SECONDS)
        trial.pay(problem, list(layouts(problem)))
        failures = [one for one in trial.mishaps if one.kind is MishapKind.FAILED]
        if trial.is_usable or len(failures) < len(trial.mishaps):  # one that hangs may be slow only
            return ""
        said = failures[0].message
    return said
