"""Teacher forcing: what a model makes of given replies, the distribution before every token.

There are two forwards to read by. Ours (``policy.scoring``) reads what the prompts of a batch have
in common once, and takes less than half the time. transformers' own shares nothing with the engine
that wrote the replies, which is what a proof about that engine needs.

Shapes: B rows of a batch, C tokens of a reply, W tokens of the longest one, V vocabulary entries.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from abacist.policy.families import FastPart, unsupported_reason
from abacist.policy.loading import Policy
from abacist.policy.model_parts import base_of
from abacist.policy.scoring.score import completion_logits

Row = tuple[Sequence[int], Sequence[int]]
"""The token ids of a prompt and of the reply to it."""

_ROWS = 16  # of ours at a time; logits come some tokens at a time
_MOST_TOKENS, _MOST_LOGITS = 8192, 2**26  # of one forward of transformers, which gives them at once


def reply_logits(
    policy: Policy, rows: Sequence[Row], *, by_transformers: bool = False
) -> Iterator[tuple[int, Tensor]]:
    """The number of each row and the logits [C, V] in float32 that predict each token of its reply.

    Rows come with the shortest reply first, each on the model's device and without gradients.
    Prompts must not be empty, replies may be. With ``by_transformers`` the forward is always the
    model's own; otherwise it is ours where that knows the family.
    """
    is_ours = not by_transformers and unsupported_reason(policy.model, FastPart.SCORING) is None
    order = sorted(range(len(rows)), key=lambda at: len(rows[at][1]))
    for at in order:
        if not rows[at][1]:
            yield at, torch.zeros(0, vocabulary_of(policy), device=policy.device)
    order = [at for at in order if rows[at][1]]
    forward: Callable[[Policy, Sequence[Row]], Iterator[Tensor]]
    forward, batches = (_ours, _by_rows(order)) if is_ours else (
        _transformers, _by_size(order, rows, vocabulary_of(policy))
    )  # fmt: skip
    for batch in batches:
        yield from zip(batch, forward(policy, [rows[at] for at in batch]), strict=True)


def vocabulary_of(policy: Policy) -> int:
    """How many tokens the model can be asked for."""
    model: Any = policy.model
    return int(model.get_input_embeddings().weight.shape[0])


def _by_rows(order: Sequence[int]) -> Iterator[Sequence[int]]:
    for start in range(0, len(order), _ROWS):
        yield order[start : start + _ROWS]


def _by_size(order: Sequence[int], rows: Sequence[Row], vocabulary: int) -> Iterator[Sequence[int]]:
    """Batches whose tokens and logits are bounded, or of one row."""
    batch: list[int] = []
    longest = widest = 0
    for at in order:
        prompt, reply = rows[at]
        longest, widest = max(longest, len(prompt) + len(reply)), max(widest, len(reply))
        size = len(batch) + 1
        if batch and (size * longest > _MOST_TOKENS or size * widest * vocabulary > _MOST_LOGITS):
            yield batch
            batch, longest, widest = [], len(prompt) + len(reply), len(reply)
        batch.append(at)
    if batch:
        yield batch


def _padded(policy: Policy, rows: Sequence[Row]) -> tuple[Tensor, Tensor, int]:
    """Token ids and mask with every reply beginning in the same column; W."""
    before = max(len(prompt) for prompt, _ in rows)
    width = max(len(reply) for _, reply in rows)
    ids = torch.full((len(rows), before + width), policy.chat.pad_id)
    mask = torch.zeros_like(ids)
    for number, (prompt, reply) in enumerate(rows):
        part = slice(before - len(prompt), before + len(reply))
        ids[number, part] = torch.tensor([*prompt, *reply])
        mask[number, part] = 1
    return ids.to(policy.device), mask.to(policy.device), width


@torch.inference_mode()
def _ours(policy: Policy, rows: Sequence[Row]) -> Iterator[Tensor]:
    ids, mask, width = _padded(policy, rows)
    waiting: dict[int, list[Tensor]] = {}
    for places, logits in completion_logits(policy.model, ids, mask, width):
        for row in (places // width).unique().tolist():
            waiting.setdefault(row, []).append(logits[places // width == row])
        # Replies come one after another: all but the last one here are whole.
        for row in sorted(waiting)[:-1]:
            yield torch.cat(waiting.pop(row))
    for row in sorted(waiting):
        yield torch.cat(waiting.pop(row))


@torch.inference_mode()
def _transformers(policy: Policy, rows: Sequence[Row]) -> Iterator[Tensor]:
    model: Any = policy.model
    ids, mask, width = _padded(policy, rows)
    # Nothing is predicted from a row's last column.
    ids, mask = ids[:, :-1], mask[:, :-1]
    known = inspect.signature(base_of(model).forward).parameters
    wanted: dict[str, Any] = {
        "position_ids": (mask.cumsum(dim=1) - 1).clamp(min=0),
        "logits_to_keep": width,
    }
    found = model(
        input_ids=ids,
        attention_mask=mask,
        use_cache=False,
        **{name: value for name, value in wanted.items() if name in known},
    ).logits[:, -width:]
    for logits_WV, (_, reply) in zip(found, rows, strict=True):
        yield logits_WV[: len(reply)].float()
