"""``--step_reward_weight W``: each token is also paid for the step that it belongs to.

An outcome pays all tokens of a reply alike, and where no reply of a group is right it pays none.
GRPO with process supervision (Shao et al. 2024, section 4.1.3) pays steps. Here no reward model
judges them: a step is right where it reaches a result of the problem's reference solution
(``task.step_rewards``). A token t of step k of reply i has

    A[i, t] = A[i] + W * (r[i, k] - mean of r[:, k]) / (std of r + 1e-4)

where r are the step rewards of the group. Tokens outside the steps, and those of steps that are not
judged, keep ``A[i]``. There are three departures from the paper:

- ``A[i]``, what the reply as a whole earns by ``--reward_funcs``, stays.
- The baseline is the mean over the steps *of the same place*, k, in the group, and not over all its
  steps. Later steps are wrong more often than first ones, so compared with all they teach replies
  to end early (docs/lab.md, 2026-11-30).
- A token is paid for its own step, and not for all steps to come: those are what the outcome pays
  for, and a sum would grow with their number.

Shapes: N completions of a generation batch of this process, G of a group, T tokens.
"""

from __future__ import annotations

import functools
import math
import statistics
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from itertools import zip_longest
from typing import Any

import torch
from accelerate.utils import gather_object

from abacist.errors import DataError, UsageError
from abacist.learning import processes
from abacist.learning.rollout_rows import Scored
from abacist.task.rows import Problem
from abacist.task.step_rewards import StepReward, step_rewards
from abacist.task.steps import equations

SOLUTION = "solution"
"""The column of the training data that holds the reference solutions."""

SILENT_STEPS = "frac_step_reward_zero_std"
"""The share of groups whose steps all have an advantage of 0, beside TRL's of whole replies."""

_TRIED_PROBLEMS = 200
_TRL_EPSILON = 1e-4
# vespo weighs whole replies by the sign of their advantage, luspo has no ratio for a token.
_NOT_BY_TOKEN = ("luspo", "vespo")


def weight_of(args: Any) -> float:
    """W; 0 for none. A plain ``trl.GRPOConfig`` has no such field."""
    return float(getattr(args, "step_reward_weight", 0.0))


def refuse_contradictions(args: Any, named: str) -> None:
    """Raise UsageError where ``step_reward_weight`` of ``args`` cannot be meant."""
    weight = weight_of(args)
    if not weight:
        return
    if not 0 < weight < math.inf:
        raise UsageError(
            f"{named} {weight:g} must be a finite number of at least 0",
            "Leave it out to pay no steps.",
        )
    whole_replies = {
        f"--loss_type {args.loss_type}": args.loss_type in _NOT_BY_TOKEN,
        "--importance_sampling_level sequence": args.importance_sampling_level == "sequence",
        "--off_policy_mask_threshold": args.off_policy_mask_threshold is not None,
        "--use_liger_kernel": args.use_liger_kernel,
    }
    for setting, applies in whole_replies.items():
        if applies:
            raise UsageError(
                f"{named} {weight:g} pays tokens, and {setting} weighs whole replies",
                "Leave out one of the two.",
            )


def showing_steps(problems: Sequence[Problem]) -> tuple[int, int]:
    """How many worked solutions show a true equation, and of how many that were looked at."""
    # Spread over all: a file may begin with those that have none.
    tried = problems[:: math.ceil(len(problems) / _TRIED_PROBLEMS) or 1]
    showing = sum(
        any(equation.is_true for equation in equations(reference_of(problem))) for problem in tried
    )
    return showing, len(tried)


def refuse_without_equations(showing: int, tried: int) -> None:
    """Raise DataError where no worked solution shows one, as :func:`showing_steps` counts: then
    only a right answer would tell which steps are right."""
    if not showing:
        raise DataError(
            f"--step_reward_weight needs worked solutions, and none of {tried} problems "
            "that were looked at has one with a true equation, such as 48 / 2 = 24",
            "Give solutions in the answer column, before ####, or in a column solution; or leave "
            "it out.",
        )


def refuse_without_solutions(trainer: Any) -> None:
    """Raise DataError where the training data has no reference solutions."""
    names = getattr(trainer.train_dataset, "column_names", None)  # unknown for some streams
    if weight_of(trainer.args) and names and not {SOLUTION, "answer"} <= set(names):
        raise DataError(
            "step_reward_weight needs the columns answer and solution, and the training data has "
            f"{', '.join(names)}",
            "Add each problem's gold answer and worked solution as text, or leave it out.",
        )


def reference_in(row: Mapping[str, Any]) -> str:
    """The reference solution of a training row, "" where it is no text."""
    solution = row[SOLUTION]
    return solution if isinstance(solution, str) else ""


def reference_of(problem: Problem) -> str:
    """What :func:`reference_in` finds in the training row of a problem."""
    return reference_in({SOLUTION: problem.columns.get(SOLUTION, problem.solution)})


def pay_steps(trainer: Any, scored: Scored, batch: dict[str, Any]) -> list[list[StepReward]]:
    """Make the advantages [N] of a generation batch advantages [N, T], in place.

    Logs ``step_reward``, the share of judged steps that are right, and :data:`SILENT_STEPS`.

    Returns the steps of each reply of this process, for its rollout.
    """
    texts = [CompletionText(ids, trainer._tokenizer.decode) for ids in scored.completion_ids]
    cut = scored.cut_off(trainer.eos_token_ids)
    steps = [
        step_rewards(text.whole, reference_in(row), is_correct=is_right, is_cut=is_cut)
        for text, row, is_right, is_cut in zip(
            texts, scored.rows, scored.outcomes(), cut, strict=True
        )
    ]
    everyones = gather_object([[step.reward for step in of_reply] for of_reply in steps])
    size = trainer.num_generations
    advantages = [
        of_reply
        for at in range(0, len(everyones), size)
        for of_reply in step_advantages(everyones[at : at + size])
    ]
    metrics = trainer._metrics["train"]
    judged = [reward for of_reply in everyones for reward in of_reply if reward is not None]
    if judged:
        metrics["step_reward"].append(sum(judged) / len(judged))
    groups = [advantages[at : at + size] for at in range(0, len(advantages), size)]
    silent = sum(not any(map(any, of_group)) for of_group in groups)
    metrics[SILENT_STEPS].append(silent / len(groups))

    alone = batch["advantages"]
    mine = processes.own_rows(trainer.accelerator, len(steps))
    paid = by_token(texts, steps, advantages[mine], batch["completion_ids"].shape[1])
    by_step = weight_of(trainer.args) * paid.to(alone.device, alone.dtype)
    batch["advantages"] = (alone[:, None] + by_step) * batch["completion_mask"]
    return steps


def step_advantages(rewards: Sequence[Sequence[float | None]]) -> list[list[float]]:
    """The advantage of each step in a group, reply by reply; 0 for one that is not judged.

    ``rewards`` holds those of each reply, None for a step that is not judged.

    >>> found = step_advantages([[1.0, 1.0], [1.0, 0.0], [1.0], [0.0, None]])
    >>> [[round(one, 2) for one in of_reply] for of_reply in found]
    [[0.48, 0.97], [0.48, -0.97], [0.48], [-1.45, 0.0]]
    """
    judged = [reward for of_reply in rewards for reward in of_reply if reward is not None]
    if len(set(judged)) < 2:
        return [[0.0] * len(of_reply) for of_reply in rewards]
    scale = statistics.stdev(judged) + _TRL_EPSILON
    means = []
    for place in zip_longest(*rewards):
        known = [reward for reward in place if reward is not None]
        means.append(statistics.fmean(known) if known else 0.0)
    return [
        [
            0.0 if reward is None else (reward - mean) / scale
            for reward, mean in zip(of_reply, means, strict=False)
        ]
        for of_reply in rewards
    ]


def by_token(
    texts: Sequence[CompletionText],
    steps: Sequence[Sequence[StepReward]],
    advantages: Sequence[Sequence[float]],
    width: int,
) -> torch.Tensor:
    """The advantage of the step that each token belongs to, [N, ``width``]; 0 outside the steps."""
    paid = torch.zeros(len(texts), width)
    for row, (text, of_reply) in enumerate(zip(texts, steps, strict=True)):
        for step, advantage in zip(of_reply, advantages[row], strict=True):
            if advantage:
                tokens = slice(text.tokens_until(step.start), text.tokens_until(step.end))
                paid[row, tokens] = advantage
    return paid


class CompletionText:
    """The text of a completion, and how many of its tokens write its beginning."""

    def __init__(self, ids: Sequence[int], decode: Any) -> None:
        self._ids, self._decode = list(ids), decode
        # Steps share their edges, and searches for them begin alike.
        self._length = functools.cache(lambda count: len(self._beginning(count)))
        self.whole = self._beginning(len(self._ids))

    def _beginning(self, count: int) -> str:
        text: str = self._decode(self._ids[:count], skip_special_tokens=True)
        return text

    def tokens_until(self, chars: int) -> int:
        """The least number of tokens whose text has ``chars`` characters. A token that reaches
        over the end of a step belongs to that step."""
        counts = range(len(self._ids) + 1)
        return bisect_left(counts, chars, key=self._length)
