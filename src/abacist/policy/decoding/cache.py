"""What the rows of a decoding batch remember: keys and values, a prompt's only once.

A group of completions shares its prompt, so keys and values are kept in two parts: those of each
prompt in the batch, and those of each row's own completion. A token attends to both in one
softmax; against the prompt, the queries of a whole group meet the same keys in one product. What
all prompts begin with (a system text, worked examples) is computed once and copied.

Rows and prompts leave by letting the last ones move into their places, so that what is alive
always lies in front: a batch shrinks, or is refilled, at the cost of the rows that moved. Places
that nobody holds, and what their last holder left there, are masked and never cleared.

A step reads only tensors that stay where they are, and does nothing that a CUDA graph cannot hold:
what it computes depends on their contents, and on the numbers in ``Cache.shape``.

Shapes: L layers, P prompts and N rows alive, H key heads, G query heads to a key head, D numbers
of a head, M the most rows a prompt has, S prompt tokens, W completion tokens so far.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F

from abacist.policy.decoding.network import Attend, LeanNetwork
from abacist.policy.kernels import tree_attention

_PREFILL_TOKENS = 8192


class Shape(NamedTuple):
    """How much a step computes, whoever is alive."""

    prompts: int
    rows_a_prompt: int
    prompt_tokens: int
    in_order: bool  # row after row, the rows of a prompt and the prompts follow each other


class Cache:
    """Keys and values for at most ``max_rows`` rows of at most ``max_prompts`` prompts."""

    def __init__(
        self,
        network: LeanNetwork,
        *,
        max_rows: int,
        max_prompts: int,
        prompt_tokens: int,
        completion_tokens: int,
        rows_a_prompt: int | None = None,
    ) -> None:
        self._network, self._rows_a_prompt = network, rows_a_prompt or max_rows
        heads, layers, size = network.key_heads, network.num_layers, network.head_dim
        # Zeros, for what is masked must still be finite.
        self._prompts = torch.zeros(  # keys, values
            (2, layers, max_prompts, heads, prompt_tokens, size),
            dtype=network.dtype,
            device=network.device,
        )
        self._rows = torch.zeros(
            (2, layers, max_rows, heads, completion_tokens, size),
            dtype=network.dtype,
            device=network.device,
        )
        self._prefix_tokens = 0
        self.shape = Shape(0, 0, 0, in_order=True)
        self._prompt_of_row = torch.empty(0)
        # To the rows in the order of their prompts, and back.
        self._row_of_slot, self._slot_of_row = (
            torch.zeros(count, dtype=torch.long, device=network.device)
            for count in (max_prompts * self._rows_a_prompt, max_rows)
        )

    def keep_prefix(self, ids: Sequence[int]) -> None:
        """Compute what every prompt begins with, once for all of them."""
        self._prefill([ids], first=0)
        length = self._prefix_tokens = len(ids)
        self._prompts[:, :, 1:, :, :length] = self._prompts[:, :, :1, :, :length]

    def read_prompts(self, prompts: Sequence[Sequence[int]], first: int) -> torch.Tensor:
        """Prefill ``prompts`` into the places from ``first`` on; the last hidden states, [P, …].

        Each begins with the prefix, if there is one, and is longer than it.
        """
        start, states = 0, []
        while start < len(prompts):
            longest = max(len(ids) for ids in prompts[start:]) - self._prefix_tokens
            end = start + max(1, _PREFILL_TOKENS // longest)
            states.append(self._prefill(prompts[start:end], first + start))
            start = end
        return torch.cat(states)

    def _prefill(self, prompts: Sequence[Sequence[int]], first: int) -> torch.Tensor:
        keys, values = self._prompts[:, :, first : first + len(prompts)]
        return _read(self._network, prompts, keys, values, self._prefix_tokens)

    def arrange(
        self,
        prompt_of_row: Sequence[int],
        prompt_tokens: Sequence[int],
        padded_rows: int | None = None,
    ) -> None:
        """Say which prompt each living row belongs to, and how long each living prompt is.

        ``padded_rows``: compute so many rows and what they can need at most, whoever is alive.
        """
        device = self._network.device
        if self._network.decoder is not None:
            self._prompt_of_row = torch.tensor(prompt_of_row, device=device)
            return
        taken = [0] * len(prompt_tokens)
        places = []
        for prompt in prompt_of_row:
            places.append(taken[prompt])
            taken[prompt] += 1
        if padded_rows is None:
            number, prompts, most = len(prompt_of_row), len(prompt_tokens), max(taken)
            longest = max(prompt_tokens)
        else:
            number, prompts = padded_rows, min(padded_rows, self._prompts.shape[2])
            most, longest = min(padded_rows, self._rows_a_prompt), self._prompts.shape[4]
        slots = [p * most + place for p, place in zip(prompt_of_row, places, strict=True)]
        in_order = prompts * most == number and slots == list(range(len(slots)))
        self.shape = Shape(prompts, most, longest, in_order)
        if not in_order:
            row_of_slot = [0] * (prompts * most)  # an empty slot repeats a row: nobody looks
            for row, slot in enumerate(slots):
                row_of_slot[slot] = row
            self._row_of_slot[: prompts * most] = torch.tensor(row_of_slot, device=device)
            slots += [0] * (number - len(slots))
            self._slot_of_row[:number] = torch.tensor(slots, device=device)

    def move_rows(self, sources: Sequence[int], targets: Sequence[int], tokens: int) -> None:
        """Let rows ``sources``, ``tokens`` long so far, take the places ``targets``."""
        self._rows[:, :, list(targets), :, :tokens] = self._rows[:, :, list(sources), :, :tokens]

    def move_prompts(self, sources: Sequence[int], targets: Sequence[int]) -> None:
        """Let prompts ``sources`` take the places ``targets``."""
        own = slice(self._prefix_tokens, None)
        self._prompts[:, :, list(targets), :, own] = self._prompts[:, :, list(sources), :, own]

    def step(
        self,
        tokens: torch.Tensor,
        prompt_tokens: torch.Tensor,
        written: torch.Tensor,
        window: int,
    ) -> torch.Tensor:
        """The hidden states of one new token a row, [N, hidden].

        Row n has ``prompt_tokens[n]`` and ``written[n]`` tokens behind it; all of ``written`` are
        below ``window``.
        """
        network = self._network
        if network.decoder is not None:
            return network.decoder.step(
                self._prompts, self._rows, tokens, self._prompt_of_row, prompt_tokens, written
            )
        number, size, heads = len(tokens), network.head_dim, network.key_heads
        group = network.query_heads // heads
        prompts, most, longest, in_order = self.shape
        slot_of_row, row_of_slot = self._slot_of_row[:number], self._row_of_slot[: prompts * most]
        prompt_keys, prompt_values = self._prompts[:, :, :prompts, :, :longest]
        own_keys, own_values = self._rows[:, :, :number, :, :window]
        all_keys, all_values = self._rows.flatten(2, 4)
        own_heads = torch.arange(number * heads, device=tokens.device).view(number, heads)
        now = own_heads * self._rows.shape[4] + written[:, None]
        columns = torch.arange(max(longest, window), device=tokens.device)
        masked = torch.cat(
            (columns[:longest] >= prompt_tokens[:, None], columns[:window] > written[:, None]), 1
        )
        bias = torch.zeros(masked.shape, dtype=network.dtype, device=tokens.device)
        bias = bias.masked_fill_(masked, -torch.inf)[:, None, None]

        def by_prompt(x: torch.Tensor) -> torch.Tensor:
            """[N, H, G, …] -> [P, H, M·G, …]."""
            x = x if in_order else x.index_select(0, row_of_slot)
            x = x.view(prompts, most, heads, group, -1)
            return x.transpose(1, 2).reshape(prompts, heads, most * group, -1)

        def by_row(x: torch.Tensor) -> torch.Tensor:
            x = x.view(prompts, heads, most, group, -1).transpose(1, 2)
            x = x.reshape(prompts * most, heads, group, -1)
            return x if in_order else x.index_select(0, slot_of_row)

        def attend(
            layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
        ) -> torch.Tensor:
            all_keys[layer][now] = key
            all_values[layer][now] = value
            query = query.reshape(number, heads, group, size)
            to_prompt = by_prompt(query) @ prompt_keys[layer].transpose(-1, -2)
            to_own = query @ own_keys[layer].transpose(-1, -2)
            scores = torch.cat((by_row(to_prompt), to_own), dim=-1)
            weights = scores.add_(bias).softmax(dim=-1)
            read = by_row(by_prompt(weights[..., :longest]) @ prompt_values[layer])
            return read + weights[..., longest:] @ own_values[layer]

        return network.forward(tokens, prompt_tokens + written, attend)


def _read(
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
    if tree_attention.takes(keys, keys, values):
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
        return tree_attention.attend(query, key, value, tree, 1.0)[0, past:]

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


def closed_up(gone: Sequence[bool]) -> tuple[list[int], list[int], list[int]]:
    """Who stands where after those ``gone`` left and the last ones took their places.

    Returns for each new place its old one, then where the movers came from and went to.

    >>> closed_up([True, False, True, False, False])
    ([3, 1, 4], [3, 4], [0, 2])
    """
    left = len(gone) - sum(gone)
    targets = [place for place in range(left) if gone[place]]
    sources = [place for place in range(left, len(gone)) if not gone[place]]
    order = list(range(left))
    for source, target in zip(sources, targets, strict=True):
        order[target] = source
    return order, sources, targets


def common_prefix_tokens(prompts: Sequence[tuple[int, ...]]) -> int:
    """How many tokens all of several ``prompts`` begin with, leaving each at least one more.

    >>> common_prefix_tokens([(1, 2, 3, 4), (1, 2, 5), (1, 2, 3)])
    2
    """
    if len(prompts) < 2:
        return 0
    least, most = min(prompts), max(prompts)  # whatever these two share, all between them do
    shared = 0
    for a, b in zip(least[:-1], most[:-1], strict=False):
        if a != b:
            break
        shared += 1
    return min(shared, min(map(len, prompts)) - 1)
