"""Read prompts into a cache: many at once, packed, each behind the prefix they share.

Shapes: L layers, P prompts, H key heads, S the tokens a prompt may have, D numbers of a head.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from abacist.policy.kernels import attention as kernel
from abacist.policy.lean import Attend, LeanNetwork


def read(
    network: LeanNetwork,
    prompts: Sequence[Sequence[int]],
    keys: torch.Tensor,
    values: torch.Tensor,
    past: int,
) -> torch.Tensor:
    """Write keys and values [L, P, H, S, D] of ``prompts``; their last hidden states, [P, hidden].

    The first ``past`` tokens of each are there already.
    """
    lengths = [len(ids) - past for ids in prompts]
    tokens = torch.tensor([token for ids in prompts for token in ids[past:]])
    columns = torch.cat([torch.arange(length) for length in lengths])
    rows = torch.repeat_interleave(torch.arange(len(prompts)), torch.tensor(lengths))
    ends = torch.tensor(lengths).cumsum(0) - 1
    tokens, columns, rows, ends = (
        x.to(network.device, non_blocking=True) for x in (tokens, columns, rows, ends)
    )
    places = past + columns
    if kernel.takes(keys, keys, values):
        attended = _attended_as_tree(keys, values, past, lengths)
    else:
        attended = _attended_padded(keys, values, past, (rows, columns), max(lengths))

    def attend(
        layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
    ) -> torch.Tensor:
        keys[layer][rows, :, places] = key
        values[layer][rows, :, places] = value
        return attended(layer, query, key, value)

    return network.forward(tokens, places, attend)[ends]


def _attended_as_tree(
    keys: torch.Tensor, values: torch.Tensor, past: int, lengths: Sequence[int]
) -> Attend:
    """Packed prompts that grow from their prefix."""
    branches = [(0, past, -1)] if past else []
    for length in lengths:
        start = branches[-1][0] + branches[-1][1] if branches else 0
        branches.append((start, length, 0 if past else -1))
    tree = torch.tensor(branches)
    trunks = keys[:, 0, :, :past].transpose(1, 2), values[:, 0, :, :past].transpose(1, 2)

    def attend(
        layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
    ) -> torch.Tensor:
        if past:  # whose own queries have been answered
            query = torch.cat((query.new_zeros(past, *query.shape[1:]), query))
            key, value = (
                torch.cat((trunk[layer], own))
                for trunk, own in zip(trunks, (key, value), strict=True)
            )
        query, key, value = (x.transpose(0, 1)[None] for x in (query, key, value))
        return kernel.attend(query, key, value, tree, 1.0)[0, past:]

    return attend


def _attended_padded(
    keys: torch.Tensor,
    values: torch.Tensor,
    past: int,
    at: tuple[torch.Tensor, ...],
    longest: int,
) -> Attend:
    """Prompts behind their prefix as one padded batch, ``at`` these rows and columns of it.

    The query heads that share a key head are put behind each other as further queries, with a mask:
    asked to share key heads itself, PyTorch has on a GPU only one kernel for a mask, or for
    float32, and that one keeps all scores.
    """
    _, count, key_heads, _, size = keys.shape
    known = past + longest
    seen = torch.arange(known, device=keys.device)
    mask = seen <= seen[past:, None]

    def attend(
        layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
    ) -> torch.Tensor:
        repeats = query.shape[1] // key_heads
        padded = query.new_zeros(count, longest, *query.shape[1:])
        padded[at] = query
        padded = padded.view(count, longest, key_heads, repeats, size).permute(0, 2, 3, 1, 4)
        read = F.scaled_dot_product_attention(
            padded.reshape(count, key_heads, repeats * longest, size),
            keys[layer, :, :, :known],
            values[layer, :, :, :known],
            attn_mask=mask.repeat(repeats, 1),
            scale=1.0,
        )
        read = read.view(count, key_heads, repeats, longest, size).permute(0, 3, 1, 2, 4)
        return read.reshape(count, longest, -1, size)[at]

    return attend
