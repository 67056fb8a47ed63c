"""Training, recomputed from the recorded replies: answers, rewards, advantages, logged metrics."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from trl.trainer.utils import nanstd

from abacist.delivery.findings import Check, alike
from abacist.delivery.opened import Opened
from abacist.errors import AbacistError, RunError
from abacist.learning.outcome_gating import silenced
from abacist.learning.process_supervision import reference_of
from abacist.learning.reply_selection import ROUNDING, groups_with_equal_rewards
from abacist.learning.rewards import control_rewards
from abacist.learning.task import Task
from abacist.proof.comparison.compare import RANDOM
from abacist.records.rollout import Rollout, StopReason
from abacist.task.answers import same_answer
from abacist.task.custom_rewards import RewardFunc
from abacist.task.reply import parse_reply
from abacist.task.rewards import is_built_in_name, load_reward_funcs, pay
from abacist.task.step_rewards import StepReward, step_rewards

# What a logged step says that only training again would tell.
_OF_THE_OPTIMIZER = (
    "loss", "grad_norm", "learning_rate", "entropy", "kl", "epoch", "rollout_time",
)  # fmt: skip
_ZERO_STD = "frac_reward_zero_std"


@dataclass(frozen=True)
class Paid:
    """The rewards of a run that can be recomputed here, and the weight of each by name."""

    rewards: list[RewardFunc]
    weights: dict[str, float]
    unknown: list[str]

    @property
    def is_whole(self) -> bool:
        """Whether all rewards of the run are known here."""
        return not self.unknown


def paid_in(opened: Opened, check: Check) -> Paid:
    """The rewards that training paid. One that is code of its own is not in a bundle."""
    settings = opened.settings
    names = settings.get("reward_funcs") or ["default"]
    names = [str(name) for name in ([names] if isinstance(names, str) else names)]
    own = [name for name in names if not is_built_in_name(name)]
    rewards = load_reward_funcs([name for name in names if is_built_in_name(name)])
    given = settings.get("reward_weights")
    weights = [float(weight) for weight in given] if isinstance(given, list) else None
    control = str(settings.get("control") or "none")
    check.same("run/manifest.json", "control", opened.manifest.get("control", "none"), control)
    if own:
        check.not_checked.append(
            f"rewards that are code of their own ({', '.join(own)}), and the sums and advantages "
            "that they are part of"
        )
        weights = None
    else:
        seed = int(settings.get("seed") or opened.manifest.get("seed") or 0)
        rewards, weights = control_rewards(control, rewards, weights, seed=seed)
    by_name = dict(zip((r.__name__ for r in rewards), weights or [1.0] * len(rewards), strict=True))
    return Paid(rewards, by_name, own)


def check_training(opened: Opened) -> Check:
    """Recompute what each training reply earned, and each logged step, from the replies."""
    check = Check("training")
    paid = paid_in(opened, check)
    by_step: dict[int, list[list[Rollout]]] = {}
    replies = 0
    for name in opened.rollout_names():
        try:
            rollouts = opened.rollouts(name)
        except RunError as error:
            check.fault(name, "", "rollouts", error.message)
            continue
        step = int(re.findall(r"step-(\d+)", name)[0])
        _check_rollouts(opened, name, step, rollouts, paid, check)
        by_step.setdefault(step, []).append(rollouts)
        replies += len(rollouts)
    logged = _check_metrics(opened, by_step, paid, check)
    check.looked_at = (
        f"{replies:,} replies of {len(by_step):,} steps read, paid and normalised again; "
        f"{logged:,} logged steps recomputed from them"
    )
    check.numbers = {"replies": replies, "steps": len(by_step), "logged_steps": logged}
    if logged:
        names = ", ".join(_OF_THE_OPTIMIZER[:4])
        check.not_checked.append(
            f"what only training again would tell: {names}, clip ratios and evaluations on the "
            "selection split in metrics.jsonl"
        )
    return check


def _check_rollouts(
    opened: Opened, name: str, step: int, rollouts: list[Rollout], paid: Paid, check: Check
) -> None:
    size = _group_size(opened)
    if not rollouts or len(rollouts) % size:
        check.fault(name, "rows", f"groups of {size}", f"{len(rollouts)} replies")
        return
    first = rollouts[0].group
    for at, one in enumerate(rollouts):
        item = item_of(one)
        check.same(name, f"{item}, step", one.step, step)
        place = (first + at // size, at % size)
        check.same(name, f"row {at + 1}, place", (one.group, one.member), place)
        check.same(name, f"{item}, split", one.split, "train")
        check_run_id(opened, name, one, rollouts[0], check)
        check.same(name, f"{item}, messages", one.messages, rollouts[at - at % size].messages)
        check.same(name, f"{item}, gold", one.gold, rollouts[at - at % size].gold)
        check_reading(name, one, check)
    wanted = _recomputed(rollouts, step, paid)
    for one, rewards in zip(rollouts, wanted, strict=True):
        for reward, value in rewards.items():
            claimed = one.rewards.get(reward)
            check.same(name, f"{item_of(one)}, reward {reward}", claimed, value)
        if paid.is_whole:
            for reward in one.rewards.keys() - rewards.keys():
                check.fault(name, f"{item_of(one)}, reward {reward}", "a reward", "none of its run")
    if not paid.is_whole:
        return
    totals = totals_of(wanted, paid)
    equal = groups_with_equal_rewards(_weighted(wanted, paid), size)
    advantages = _advantages(opened, rollouts, wanted, paid, check)
    for at, one in enumerate(rollouts):
        total = float(totals[at])
        claimed = float("nan") if one.reward is None else one.reward
        check.same(name, f"{item_of(one)}, reward", claimed, total)
        if advantages is None:
            continue
        found = float(advantages[at])
        # Runs from before 2026-11-30 have what rounding makes of 0, on another machine another.
        if equal[at // size] and abs(one.advantage or 0.0) <= _residue(total, opened):
            found = one.advantage or 0.0
        check.same(name, f"{item_of(one)}, advantage", one.advantage, found)


def check_steps(opened: Opened, task: Task | None, check: Check) -> int:
    """Recompute how each step of the training replies was paid; how many steps those were.

    That takes the reference solutions of the problems: ``task`` is the data, None if not at hand.
    """
    pays = bool(opened.settings.get("step_reward_weight"))
    solutions: dict[str, str] | None = None
    steps, kept, unkept = 0, 0, 0
    for name in opened.rollout_names():
        try:
            rollouts = opened.rollouts(name)
        except RunError:
            continue  # check_training names it
        for one in rollouts:
            if one.steps is None:
                unkept += pays
                continue
            kept += 1
            if task is None:
                continue
            if solutions is None:
                solutions = {each.problem_id: reference_of(each) for each in task.train}
            # Without its problem a reply is named by check_data, and paid by no solution.
            solution = solutions.get(str(one.problem_id), "")
            is_cut = one.stop_reason is StopReason.LENGTH
            wanted = step_rewards(
                one.completion, solution, is_correct=one.is_correct, is_cut=is_cut
            )
            _check_steps_of(name, one, one.steps, wanted, check)
            steps += len(wanted)
    if unkept:
        check.not_checked.append(
            f"how the steps of {unkept:,} replies were paid: their rollouts do not hold it"
        )
    if kept and task is None:
        check.not_checked.append(
            f"how the steps of {kept:,} replies were paid, which takes the data's worked solutions"
        )
    return steps


def _check_steps_of(
    name: str, one: Rollout, claimed: Sequence[StepReward], wanted: Sequence[StepReward],
    check: Check,
) -> None:  # fmt: skip
    if len(claimed) != len(wanted):
        check.fault(name, f"{item_of(one)}, number of steps", len(claimed), len(wanted))
        return
    for number, (ours, found) in enumerate(zip(claimed, wanted, strict=True), start=1):
        item = f"{item_of(one)}, step {number} of its reasoning"
        check.same(name, f"{item}, characters", (ours.start, ours.end), (found.start, found.end))
        rewards = ("not judged" if it.reward is None else it.reward for it in (ours, found))
        check.same(name, f"{item}, reward", *rewards)


def item_of(rollout: Rollout) -> str:
    """Which reply it is, in words."""
    if rollout.split == "train":
        return f"step {rollout.step}, group {rollout.group}, member {rollout.member}"
    return f"problem {str(rollout.problem_id)[:60]}, reply {rollout.member + 1}"


def check_run_id(opened: Opened, name: str, one: Rollout, first: Rollout, check: Check) -> None:
    """A file's rows are of one run, and that is the bundle's. A run that was renamed and resumed
    has several names, and the bundle lists them."""
    ids = opened.run_ids
    if one.run_id != first.run_id or one.run_id not in ids:
        wanted = (
            first.run_id if first.run_id in ids else " or ".join(ids[:4]) or "named in the index"
        )
        check.fault(name, f"{item_of(one)}, run_id", one.run_id, wanted)


def check_reading(name: str, one: Rollout, check: Check) -> None:
    """Read the answer again, judge it again, count the tokens again."""
    answer = parse_reply(one.completion).answer
    check.same(name, f"{item_of(one)}, read_answer", one.read_answer, answer)
    is_correct = None if one.gold is None else same_answer(answer, one.gold)
    check.same(name, f"{item_of(one)}, is_correct", one.is_correct, is_correct)
    check.same(
        name, f"{item_of(one)}, completion_tokens", one.completion_tokens, len(one.completion_ids)
    )


def _recomputed(
    rollouts: Sequence[Rollout], step: int, paid: Paid
) -> list[dict[str, float | None]]:
    found: list[dict[str, float | None]] = [{} for _ in rollouts]
    columns: dict[str, Any] = {
        "answer": [one.gold for one in rollouts],
        "problem_id": [one.problem_id for one in rollouts],
        "difficulty": [one.difficulty for one in rollouts],
    }
    prompts = [[dict(turn) for turn in one.messages] for one in rollouts]
    texts = [[{"role": "assistant", "content": one.completion}] for one in rollouts]
    ids = [list(one.completion_ids) for one in rollouts]
    values: Any
    for reward in paid.rewards:
        if reward.__name__ == f"{RANDOM}_control":
            state = SimpleNamespace(global_step=step - 1)
            values = reward(prompts, texts, trainer_state=state)
        else:
            ((_, values),) = pay([reward], prompts, texts, ids, columns)
        if isinstance(values, Exception):
            raise RunError(f"The reward {reward.__name__} cannot be recomputed ({values}).")
        for row, value in zip(found, values, strict=True):
            row[reward.__name__] = value
    return found


def totals_of(rewards: Sequence[Mapping[str, float | None]], paid: Paid) -> torch.Tensor:
    """The weighted sum of each reply's rewards [N], NaN where none applied; as TRL computes it."""
    weighted = _weighted(rewards, paid)
    totals = weighted.nansum(dim=1)
    totals[weighted.isnan().all(dim=1)] = torch.nan
    return totals


def _weighted(rewards: Sequence[Mapping[str, float | None]], paid: Paid) -> torch.Tensor:
    """[N, rewards] times their weights, NaN where one did not apply."""
    return _table(rewards, paid) * torch.tensor(list(paid.weights.values()))


def _residue(total: float, opened: Opened) -> float:
    """The most that rounding can make of an advantage of 0, for a reward of ``total``."""
    apart = ROUNDING * abs(total)
    return apart if _scale(opened) == "none" else min(1.0, apart / 1e-4)


def _table(rewards: Sequence[Mapping[str, float | None]], paid: Paid) -> torch.Tensor:
    """[N, rewards], NaN where one did not apply."""
    return torch.tensor(
        [
            [float("nan") if (value := row.get(name)) is None else value for name in paid.weights]
            for row in rewards
        ],
        dtype=torch.float32,
    )


def _advantages(
    opened: Opened,
    rollouts: Sequence[Rollout],
    rewards: Sequence[Mapping[str, float | None]],
    paid: Paid,
    check: Check,
) -> torch.Tensor | None:
    """The advantages [N] of a generation batch, by TRL's rule; None where the rule is another."""
    settings = opened.settings
    size = _group_size(opened)
    if settings.get("multi_objective_aggregation", "sum_then_normalize") != "sum_then_normalize":
        note = "advantages: they are normalised reward by reward"
        if note not in check.not_checked:
            check.not_checked.append(note)
        return None
    totals = totals_of(rewards, paid)
    groups = totals.view(-1, size)
    means = groups.nanmean(dim=1).repeat_interleave(size)
    scale = _scale(opened)
    advantages = totals - means
    if scale == "group":
        advantages = advantages / (nanstd(groups, dim=1).repeat_interleave(size) + 1e-4)
    elif scale == "batch":
        advantages = advantages / (nanstd(totals) + 1e-4)
    advantages = advantages.nan_to_num(nan=0.0)
    if settings.get("outcome_gating"):
        leaves_out = settings.get("mask_truncated_completions")
        strict = [
            parse_reply(one.completion).strict
            for one in rollouts
            if not leaves_out or one.stop_reason is not StopReason.LENGTH
        ]
        without_outcome = silenced([one.is_correct for one in rollouts], strict, size)
        advantages[without_outcome.repeat_interleave(size)] = 0.0
    return advantages


def _check_metrics(
    opened: Opened, by_step: Mapping[int, list[list[Rollout]]], paid: Paid, check: Check
) -> int:
    """Recompute the logged steps of which every reply is there; how many those are."""
    name = "run/metrics.jsonl"
    before, tokens_before, logged = 0, 0.0, 0
    # Several steps share one generation where `steps_per_generation` or `num_iterations` ask for
    # it; then a step without rollouts has no replies of its own.
    reuses = any(
        int(opened.settings.get(setting) or 1) > 1
        for setting in ("steps_per_generation", "num_iterations")
    )
    every = opened.settings.get("logging_steps", 10)
    # A share of the run below 1; transformers takes 1.0 for one step.
    every = int(every) if isinstance(every, int | float) and every >= 1 else None
    for number, row in enumerate(opened.lines(name), start=1):
        if "reward" not in row and "loss" not in row:  # a measurement, or the end of the training
            continue
        step = row.get("step")
        if isinstance(step, bool) or not isinstance(step, int) or step <= before:
            check.fault(name, f"line {number}, step", step, f"a whole number above {before}")
            return logged
        if every is not None and step - before > every:
            check.fault(name, f"steps {before + 1} to {step}", "one line", f"one every {every}")
        window = range(before + 1, step + 1)
        is_whole = len(window) <= len(by_step) and all(number in by_step for number in window)
        if is_whole and not reuses:
            there = [batch for number in window for batch in by_step[number]]
            _check_line(opened, name, row, there, paid, tokens_before, check)
            logged += 1
        before, tokens_before = step, row.get("num_tokens") or 0.0
    # The step in work when a run was killed has rollouts and no line.
    last = max(by_step, default=0) - (0 if opened.manifest.get("finished") else 1)
    if every is not None and opened.has(name) and last - before >= every:
        check.fault(name, f"steps {before + 1} to {last}", "no line", "rollouts of them")
    return logged


def _check_line(
    opened: Opened,
    name: str,
    row: Mapping[str, Any],
    batches: Sequence[Sequence[Rollout]],
    paid: Paid,
    tokens_before: float,
    check: Check,
) -> None:
    values = [_metrics_of(batch, paid, opened) for batch in batches]
    # TRL logs the mean over the generations since it last did.
    means = {key: sum(one[key] for one in values) / len(values) for key in values[0]}
    for key, found in means.items():
        if key not in row:
            check.fault(name, f"step {row['step']}, {key}", None, found)
            continue
        claimed = float("nan") if row[key] is None else row[key]
        if key == _ZERO_STD and _is_of_an_older_run(claimed, batches, paid, opened):
            continue
        check.same(name, f"step {row['step']}, {key}", claimed, found)
    shares = [share for batch in batches if (share := _share_of_right_steps(batch)) is not None]
    if shares:
        item = f"step {row['step']}, step_reward"
        check.same(name, item, row.get("step_reward"), sum(shares) / len(shares))
    if "num_tokens" in row:
        new = sum(one.prompt_tokens + len(one.completion_ids) for b in batches for one in b)
        if row["num_tokens"] != tokens_before + new:  # a count: nothing is rounded
            item = f"step {row['step']}, num_tokens"
            check.fault(name, item, row["num_tokens"], tokens_before + new)


def _share_of_right_steps(batch: Sequence[Rollout]) -> float | None:
    """The mean reward of the judged steps of a generation; None where there are none."""
    judged = [s.reward for one in batch for s in one.steps or () if s.reward is not None]
    return sum(judged) / len(judged) if judged else None


def _metrics_of(batch: Sequence[Rollout], paid: Paid, opened: Opened) -> dict[str, float]:
    """What TRL logs of one generation, from its replies as they were recorded."""
    size = _group_size(opened)
    sums_first = opened.settings.get("multi_objective_aggregation") in (None, "sum_then_normalize")
    is_scaled_by_group = sums_first and _scale(opened) != "batch"
    lengths = torch.tensor([float(len(one.completion_ids)) for one in batch])
    cut = torch.tensor([one.stop_reason is StopReason.LENGTH for one in batch])
    ended = lengths[~cut] if not bool(cut.all()) else torch.zeros(1)
    found = {
        "completions/clipped_ratio": cut.float().mean(),
        **{f"completions/{k}_length": v for k, v in _three(lengths).items()},
        **{f"completions/{k}_terminated_length": v for k, v in _three(ended).items()},
    }
    if paid.is_whole:
        recorded = [dict(one.rewards) for one in batch]
        table, totals = _table(recorded, paid), totals_of(recorded, paid)
        for at, reward in enumerate(paid.weights):
            found[f"rewards/{reward}/mean"] = table[:, at].nanmean()
            found[f"rewards/{reward}/std"] = nanstd(table[:, at])
        found |= {"reward": totals.nanmean(), "reward_std": nanstd(totals)}
        if is_scaled_by_group:
            equal = groups_with_equal_rewards(_weighted(recorded, paid), size)
            found[_ZERO_STD] = equal.float().mean()
    return {key: float(value) for key, value in found.items()}


def _is_of_an_older_run(
    claimed: float, batches: Sequence[Sequence[Rollout]], paid: Paid, opened: Opened
) -> bool:
    """Whether a share of groups without signal is as it was counted until 2026-11-30: TRL's, which
    misses groups whose mean is rounded, and those with fewer than two rewards."""
    shares = []
    for batch in batches:
        groups = totals_of([one.rewards for one in batch], paid).view(-1, _group_size(opened))
        stds = nanstd(groups, dim=1)
        zero = torch.isclose(stds, torch.zeros_like(stds)).float().mean()
        without = ((~groups.isnan()).sum(dim=1) < 2).float().mean()
        shares.append(float((zero + without).clamp(max=1)))
    return alike(claimed, sum(shares) / len(shares))


def _three(values: torch.Tensor) -> dict[str, torch.Tensor]:
    return {"mean": values.mean(), "min": values.min(), "max": values.max()}


def _group_size(opened: Opened) -> int:
    return max(1, int(opened.settings.get("num_generations") or 8))


def _scale(opened: Opened) -> str:
    """``scale_rewards`` as TRL reads it."""
    given = opened.settings.get("scale_rewards", "group")
    return {True: "group", False: "none"}[given] if isinstance(given, bool) else str(given)


def named(error: AbacistError, opened: Opened) -> str:
    """An error's message without the folder that the bundle was laid out in."""
    return error.message.replace(f"{opened.folder}/", "")
