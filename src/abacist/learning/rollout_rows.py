"""A generation batch as rollout rows: prompt, completion, rewards and advantage of each."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from abacist.records.rollout import Rollout, StopReason
from abacist.task.answers import gold_of, same_answer
from abacist.task.reply import completion_text, parse_reply
from abacist.task.step_rewards import StepReward


@dataclass(frozen=True, slots=True)
class Scored:
    """One process's part of a generation batch, group by group; ``rewards`` is [N, functions]."""

    rows: Sequence[dict[str, Any]]
    prompts: Sequence[Any]
    completions: Sequence[Any]
    completion_ids: Sequence[Sequence[int]]
    rewards: torch.Tensor

    def outcomes(self) -> list[bool | None]:
        """Whether the answer of each completion is right; None where its problem has no gold."""
        found: list[bool | None] = []
        for row, completion in zip(self.rows, self.completions, strict=True):
            gold = gold_of(row.get("answer"))
            answer = parse_reply(completion_text(completion)).answer
            found.append(None if gold is None else same_answer(answer, gold))
        return found

    def cut_off(self, stop_ids: Collection[int]) -> list[bool]:
        """Whether the budget of tokens ended each completion."""
        ends = set(stop_ids)
        return [StopReason.of(ids, ends) is StopReason.LENGTH for ids in self.completion_ids]


def rollouts_of(
    trainer: Any,
    scored: Scored,
    prompt_lengths: Sequence[int],
    advantages: Sequence[float],
    trained: Sequence[bool] | None = None,
    steps: Sequence[Sequence[StepReward]] | None = None,
    *,
    first_group: int = 0,
) -> list[Rollout]:
    """One :class:`Rollout` for each completion of ``scored``, in its order.

    ``trained`` says which were trained on, where that was not all (``reply_selection``);
    ``steps`` holds those of each reply, where steps were paid (``process_supervision``).
    ``first_group`` is the number of the first group of all processes' generation batch.
    """
    weights = trainer.reward_weights.to(scored.rewards.device)
    sums = torch.nansum(scored.rewards * weights, dim=1)
    sums[scored.rewards.isnan().all(dim=1)] = math.nan  # no reward applied: not the same as 0
    totals = sums.tolist()
    first = trainer.accelerator.process_index * len(totals)
    stop_ids = set(trainer.eos_token_ids)
    outcomes = scored.outcomes()
    rollouts = []
    for index, (row, prompt, completion, ids) in enumerate(
        zip(scored.rows, scored.prompts, scored.completions, scored.completion_ids, strict=True)
    ):
        text = completion_text(completion)
        paid = zip(trainer.reward_func_names, scored.rewards[index].tolist(), strict=True)
        rollouts.append(
            Rollout(
                run_id=Path(str(trainer.args.output_dir)).name,
                step=trainer.state.global_step + 1,
                split="train",
                group=first_group + (first + index) // trainer.num_generations,
                member=(first + index) % trainer.num_generations,
                messages=_messages(prompt),
                completion=text,
                completion_ids=list(ids),
                prompt_tokens=prompt_lengths[index],
                completion_tokens=len(ids),
                stop_reason=StopReason.of(ids, stop_ids),
                problem_id=_as_text(row.get("problem_id")),
                difficulty=_as_level(row.get("difficulty")),
                gold=gold_of(row.get("answer")),
                read_answer=parse_reply(text).answer,
                is_correct=outcomes[index],
                rewards={name: None if math.isnan(value) else value for name, value in paid},
                reward=None if math.isnan(totals[index]) else totals[index],
                advantage=advantages[index],
                trained=None if trained is None else trained[index],
                steps=None if steps is None else steps[index],
            )
        )
    return rollouts


def _as_text(value: Any) -> str | None:
    return None if value is None else str(value)


def _as_level(value: Any) -> int | None:
    """A difficulty that is a whole number; a stranger's data may hold anything there."""
    is_whole = isinstance(value, int | float) and float(value).is_integer()
    return int(value) if is_whole and abs(value) < 2**31 else None


def _messages(prompt: Any) -> list[dict[str, str]]:
    """A prompt as messages; plain-text prompts (a stranger's data) become one user turn."""
    if isinstance(prompt, str):
        return [{"role": "user", "content": prompt}]
    return [{"role": turn["role"], "content": completion_text([turn])} for turn in prompt]
