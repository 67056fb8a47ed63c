"""Outcome gating: once the format is learned, groups without an outcome get zero advantages.

In a group in which every completion is correct, or none, the answer says nothing about what to
do more of; the advantages then come from shaping rewards alone. While the format is being learned
that is what they are for. Afterwards they are noise about form, so the advantages of such a group
become zero, as if all its rewards were equal. A KL term still acts on it.

The format counts as learned in a generation batch of which nine replies in ten are strict. Where
replies that are cut off are not trained on (``mask_truncated_completions``), they do not count: a
batch of long replies says nothing about the format. This needs no memory, so a resumed run gates as
an uninterrupted one does. It is off by default: what it brought on the built-in task is in
docs/lab.md.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from accelerate.utils import gather_object

from abacist.errors import DataError
from abacist.learning import processes
from abacist.learning.rollout_rows import Scored
from abacist.task.reply import completion_text, parse_reply

LEARNED_STRICT_FRACTION = 0.9


def is_wanted(trainer: Any) -> bool:
    """Whether ``trainer.args`` asks for it. Raises DataError if outcomes cannot be known."""
    wanted = bool(getattr(trainer.args, "outcome_gating", False))
    names = getattr(trainer.train_dataset, "column_names", None)  # unknown for some streams
    if wanted and names and "answer" not in names:
        raise DataError(
            "outcome_gating needs the column answer, and the training data has none",
            "Add each problem's gold answer as text, or leave --outcome_gating out.",
        )
    return wanted


def silenced(outcomes: Sequence[bool | None], strict: Sequence[bool], size: int) -> torch.Tensor:
    """Which groups of ``size`` replies are to say nothing, by the outcome of each reply.

    A group with an outcome of None, without a gold, is none of them. ``strict`` says of the replies
    that count for the format whether they have it; nine in ten must.
    """
    unknown = torch.tensor([outcome is None for outcome in outcomes]).view(-1, size)
    solved = torch.tensor([bool(outcome) for outcome in outcomes]).view(-1, size)
    alike: torch.Tensor = (solved == solved[:, :1]).all(dim=1) & ~unknown.any(dim=1)
    # The mean over none is NaN, and the format then counts as not learned.
    return alike & bool(torch.tensor(strict).float().mean() >= LEARNED_STRICT_FRACTION)


def gate(trainer: Any, scored: Scored, advantages: torch.Tensor) -> None:
    """Set the advantages of groups without an outcome to zero, in place.

    ``scored`` and ``advantages`` [N] are this process's part of a generation batch; the groups and
    the share of strict replies are those of all processes.
    """
    replies = [parse_reply(completion_text(completion)) for completion in scored.completions]
    leaves_out = trainer.mask_truncated_completions
    cut = scored.cut_off(trainer.eos_token_ids)
    known = [
        (is_right, reply.strict, not (leaves_out and is_cut))
        for reply, is_right, is_cut in zip(replies, scored.outcomes(), cut, strict=True)
    ]
    everyones = gather_object(known)
    alike = silenced(
        [outcome for outcome, _, _ in everyones],
        [is_strict for _, is_strict, counts in everyones if counts],
        trainer.num_generations,
    )
    gated = alike.repeat_interleave(trainer.num_generations)
    mine = processes.own_rows(trainer.accelerator, len(known))
    advantages[gated[mine].to(advantages.device)] = 0.0
    trainer._metrics["train"]["frac_outcome_gated"].append(alike.float().mean().item())
