"""The keys and values of a decoding batch, each prompt's only once, and the two passes over them.

A group of completions shares its prompt. So keys and values are kept in two parts: those of each
prompt, and those of each row's own completion.

* **Prefill** (:meth:`Cache.read_prompts`) reads prompts, many at once, packed without padding. What
  all prompts begin with (a system text, worked examples) is computed once and copied.
* **A step** (:meth:`Cache.step`) reads one token per row. Each token attends to its prompt and to
  its own completion in one softmax. The queries of all rows of a prompt meet the prompt's keys in
  one product, so the prompt is read from memory once for the group, not once per row. Our kernel
  takes what all prompts begin with in tiles of queries of any rows, so that too is read about once.

Rows and prompts leave by letting the last ones move into their places. So the rows and prompts in
use are always the first ones, and a batch shrinks, or is refilled, at the cost of the rows that
move. Places not in use, and what their last holder left there, are masked and never cleared.

A step reads only tensors that stay where they are, and does nothing that a CUDA graph cannot
record: what it computes depends on the contents of these tensors and on ``Cache.shape``.

Shapes: L layers, P prompts and N rows in use, M most rows of a prompt, H query heads, K key heads,
Q = H / K query heads per key head, S prompt tokens, W window (completion tokens attended to),
D head dim, C hidden size, T packed tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from abacist.policy.decoding.network import Attend, DecodingNetwork
from abacist.policy.kernels import tree_attention
from abacist.policy.scoring.attention_backend import grouped_attention

PREFILL_TOKENS = 8192


class Shape(NamedTuple):
    """How much a step computes, whichever rows and prompts are in use."""

    prompts: int  # P
    rows_a_prompt: int  # M
    prompt_tokens: int  # S
    in_order: bool  # rows are sorted by prompt and every prompt has M: no reordering is needed


class Cache:
    """Keys and values for at most ``max_rows`` rows of at most ``max_prompts`` prompts."""

    def __init__(
        self,
        network: DecodingNetwork,
        *,
        max_rows: int,
        max_prompts: int,
        prompt_tokens: int,
        completion_tokens: int,
        rows_a_prompt: int | None = None,
    ) -> None:
        self._network, self._rows_a_prompt = network, rows_a_prompt or max_rows
        heads, layers, size = network.key_heads, network.num_layers, network.head_dim
        # Zeros rather than empty: masked values are multiplied by 0, and 0 · NaN would be NaN.
        self._prompts = torch.zeros(  # keys and values [2, L, prompts, K, prompt tokens, D]
            (2, layers, max_prompts, heads, prompt_tokens, size),
            dtype=network.dtype,
            device=network.device,
        )
        self._rows = torch.zeros(  # keys and values [2, L, rows, K, completion tokens, D]
            (2, layers, max_rows, heads, completion_tokens, size),
            dtype=network.dtype,
            device=network.device,
        )
        self._prefix_tokens = 0
        self.shape = Shape(0, 0, 0, in_order=True)
        self._prompt_of_row = torch.empty(0)
        # A slot is one of the M rows of one of the P prompts: slot = prompt · M + number.
        self._row_of_slot, self._slot_of_row = (
            torch.zeros(count, dtype=torch.long, device=network.device)
            for count in (max_prompts * self._rows_a_prompt, max_rows)
        )

    def keep_prefix(self, ids: Sequence[int]) -> None:
        """Read what every prompt begins with, once for all of them."""
        self._prefill([ids], first=0)
        length = self._prefix_tokens = len(ids)
        self._prompts[:, :, 1:, :, :length] = self._prompts[:, :, :1, :, :length]

    def read_prompts(self, prompts: Sequence[Sequence[int]], first: int) -> torch.Tensor:
        """Prefill ``prompts`` into the places from ``first`` on.

        Each begins with the prefix, if there is one, and is longer than it. Returns the hidden
        state of each prompt's last token, [P, C].
        """
        start, states = 0, []
        while start < len(prompts):
            longest = max(len(ids) for ids in prompts[start:]) - self._prefix_tokens
            end = start + max(1, PREFILL_TOKENS // longest)
            states.append(self._prefill(prompts[start:end], first + start))
            start = end
        return torch.cat(states)

    def _prefill(self, prompts: Sequence[Sequence[int]], first: int) -> torch.Tensor:
        keys, values = self._prompts[:, :, first : first + len(prompts)]
        return _prefill(self._network, prompts, keys, values, self._prefix_tokens)

    def arrange(
        self,
        prompt_of_row: Sequence[int],
        prompt_tokens: Sequence[int],
        padded_rows: int | None = None,
    ) -> None:
        """Set which prompt each row in use belongs to, and how long each prompt in use is.

        ``padded_rows``: let steps compute this many rows, and the most prompts, rows per prompt and
        prompt tokens these can need. Then the shape stays the same while rows come and go, and so
        does the CUDA graph.
        """
        device = self._network.device
        if self._network.decoder is not None:
            self._prompt_of_row = torch.tensor(prompt_of_row, device=device)
            return
        # The rows of a prompt are numbered in the order of their places.
        rows_so_far = [0] * len(prompt_tokens)
        number_in_prompt = []
        for prompt in prompt_of_row:
            number_in_prompt.append(rows_so_far[prompt])
            rows_so_far[prompt] += 1
        if padded_rows is None:
            rows, prompts = len(prompt_of_row), len(prompt_tokens)
            most, longest = max(rows_so_far), max(prompt_tokens)
        else:
            rows, prompts = padded_rows, min(padded_rows, self._prompts.shape[2])
            most, longest = min(padded_rows, self._rows_a_prompt), self._prompts.shape[4]
        slots = [
            prompt * most + number
            for prompt, number in zip(prompt_of_row, number_in_prompt, strict=True)
        ]
        in_order = prompts * most == rows and slots == list(range(len(slots)))
        self.shape = Shape(prompts, most, longest, in_order)
        if not in_order:
            # An empty slot repeats row 0, and a padding row reads slot 0: nobody reads the results.
            row_of_slot = [0] * (prompts * most)
            for row, slot in enumerate(slots):
                row_of_slot[slot] = row
            self._row_of_slot[: prompts * most] = torch.tensor(row_of_slot, device=device)
            slots += [0] * (rows - len(slots))
            self._slot_of_row[:rows] = torch.tensor(slots, device=device)

    def move_rows(self, sources: Sequence[int], targets: Sequence[int], tokens: int) -> None:
        """Move rows ``sources``, with at most ``tokens`` tokens so far, to places ``targets``."""
        self._rows[:, :, list(targets), :, :tokens] = self._rows[:, :, list(sources), :, :tokens]

    def move_prompts(self, sources: Sequence[int], targets: Sequence[int]) -> None:
        """Move prompts ``sources`` to places ``targets``."""
        own = slice(self._prefix_tokens, None)  # the prefix is in every place already
        self._prompts[:, :, list(targets), :, own] = self._prompts[:, :, list(sources), :, own]

    def step(
        self,
        tokens_N: torch.Tensor,
        prompt_tokens_N: torch.Tensor,
        written_N: torch.Tensor,
        window: int,
    ) -> torch.Tensor:
        """The hidden states [N, C] after each row has read one more token.

        Row n has read ``prompt_tokens_N[n]`` tokens of its prompt and ``written_N[n]`` of its
        completion before this one. All of ``written_N`` are below ``window``.
        """
        network = self._network
        if network.decoder is not None:
            return network.decoder.step(
                self._prompts,
                self._rows,
                tokens_N,
                self._prompt_of_row,
                prompt_tokens_N,
                written_N,
                self._prefix_tokens,
            )
        rows, heads, size = len(tokens_N), network.key_heads, network.head_dim
        group = network.query_heads // heads  # Q
        prompts, most, longest, in_order = self.shape
        slot_of_row, row_of_slot = self._slot_of_row[:rows], self._row_of_slot[: prompts * most]
        prompt_keys, prompt_values = self._prompts[:, :, :prompts, :, :longest]  # [L, P, K, S, D]
        own_keys, own_values = self._rows[:, :, :rows, :, :window]  # [L, N, K, W, D]

        # Where the new key and value of each row and head go, as an index into the flattened
        # [rows · K · completion tokens] of a layer. One index instead of three (row, head, token)
        # keeps the write a single kernel.
        all_keys, all_values = self._rows.flatten(2, 4)  # [L, rows · K · completion tokens, D]
        head_NK = torch.arange(rows * heads, device=tokens_N.device).view(rows, heads)
        now_NK = head_NK * self._rows.shape[4] + written_N[:, None]

        # Columns are the tokens of the prompt, then those of the completion. Hidden are the columns
        # past the end of the row's own prompt and past the token it reads now.
        columns = torch.arange(max(longest, window), device=tokens_N.device)
        past_prompt_NS = columns[:longest] >= prompt_tokens_N[:, None]
        past_own_NW = columns[:window] > written_N[:, None]
        hidden = torch.cat((past_prompt_NS, past_own_NW), 1)  # [N, S + W]
        bias = torch.zeros(hidden.shape, dtype=network.dtype, device=tokens_N.device)
        bias = bias.masked_fill_(hidden, -torch.inf)[:, None, None]  # [N, 1, 1, S + W]

        def by_prompt(x_NKQ: torch.Tensor) -> torch.Tensor:
            """[N, K, Q, …] -> [P, K, M · Q, …]: the queries of a prompt's rows in one matrix."""
            x = x_NKQ if in_order else x_NKQ.index_select(0, row_of_slot)
            x = x.view(prompts, most, heads, group, -1)
            return x.transpose(1, 2).reshape(prompts, heads, most * group, -1)

        def by_row(x: torch.Tensor) -> torch.Tensor:
            """[P, K, M · Q, …] -> [N, K, Q, …]: the way back."""
            x = x.view(prompts, heads, most, group, -1).transpose(1, 2)
            x = x.reshape(prompts * most, heads, group, -1)
            return x if in_order else x.index_select(0, slot_of_row)

        def attend(
            layer: int, query_NHD: torch.Tensor, key_NKD: torch.Tensor, value_NKD: torch.Tensor
        ) -> torch.Tensor:
            all_keys[layer][now_NK] = key_NKD
            all_values[layer][now_NK] = value_NKD
            query_NKQD = query_NHD.reshape(rows, heads, group, size)
            # [P, K, M · Q, D] times [P, K, D, S]: each prompt's keys are read once.
            to_prompt = by_prompt(query_NKQD) @ prompt_keys[layer].transpose(-1, -2)
            to_own_NKQW = query_NKQD @ own_keys[layer].transpose(-1, -2)
            scores = torch.cat((by_row(to_prompt), to_own_NKQW), dim=-1)  # [N, K, Q, S + W]
            weights = scores.add_(bias).softmax(dim=-1)
            of_prompt = by_row(by_prompt(weights[..., :longest]) @ prompt_values[layer])
            return of_prompt + weights[..., longest:] @ own_values[layer]  # [N, K, Q, D]

        return network.forward(tokens_N, prompt_tokens_N + written_N, attend)


def _prefill(
    network: DecodingNetwork,
    prompts: Sequence[Sequence[int]],
    keys: torch.Tensor,
    values: torch.Tensor,
    past: int,
) -> torch.Tensor:
    """Read ``prompts`` and write their ``keys`` and ``values``, each [L, P, K, S, D].

    The first ``past`` tokens of each prompt are there already. Returns the hidden state of each
    prompt's last token, [P, C].
    """
    lengths = [len(ids) - past for ids in prompts]
    # The prompts without their prefix, one after another. The token at t is token column_T[t]
    # behind the prefix of prompt_T[t].
    tokens = torch.tensor([token for ids in prompts for token in ids[past:]])
    columns = torch.cat([torch.arange(length) for length in lengths])
    numbers = torch.repeat_interleave(torch.arange(len(prompts)), torch.tensor(lengths))
    ends = torch.tensor(lengths).cumsum(0) - 1
    tokens_T, column_T, prompt_T, end_P = (
        x.to(network.device, non_blocking=True) for x in (tokens, columns, numbers, ends)
    )
    position_T = past + column_T
    if tree_attention.supports(keys, keys, values):
        attend_packed = _attend_as_tree(keys, values, past, lengths)
    else:
        attend_packed = _attend_padded(keys, values, past, (prompt_T, column_T), max(lengths))

    def attend(
        layer: int, query_THD: torch.Tensor, key_TKD: torch.Tensor, value_TKD: torch.Tensor
    ) -> torch.Tensor:
        keys[layer][prompt_T, :, position_T] = key_TKD
        values[layer][prompt_T, :, position_T] = value_TKD
        return attend_packed(layer, query_THD, key_TKD, value_TKD)

    return network.forward(tokens_T, position_T, attend)[end_P]


def _attend_as_tree(
    keys: torch.Tensor, values: torch.Tensor, past: int, lengths: Sequence[int]
) -> Attend:
    """Attention for packed prompts by our kernel: the prefix is a trunk, each prompt a branch."""
    branches = [(0, past, -1)] if past else []
    for length in lengths:
        start = branches[-1][0] + branches[-1][1] if branches else 0
        branches.append((start, length, 0 if past else -1))
    tree = torch.tensor(branches)
    # Keys and values of the prefix, [L, past, K, D]; every prompt has the same, so the first's.
    prefix_keys = keys[:, 0, :, :past].transpose(1, 2)
    prefix_values = values[:, 0, :, :past].transpose(1, 2)

    def attend(
        layer: int, query_THD: torch.Tensor, key_TKD: torch.Tensor, value_TKD: torch.Tensor
    ) -> torch.Tensor:
        query, key, value = query_THD, key_TKD, value_TKD
        if past:
            # The kernel wants queries for every token. Those of the prefix are not needed: zeros.
            query = torch.cat((query.new_zeros(past, *query.shape[1:]), query))
            key = torch.cat((prefix_keys[layer], key))
            value = torch.cat((prefix_values[layer], value))
        query, key, value = (x.transpose(0, 1)[None] for x in (query, key, value))
        return tree_attention.attend(query, key, value, tree, 1.0)[0, past:]

    return attend


def _attend_padded(
    keys: torch.Tensor, values: torch.Tensor, past: int, at: tuple[torch.Tensor, ...], longest: int
) -> Attend:
    """Attention for packed prompts by PyTorch, as one padded batch; ``at`` [T] each these rows and
    columns of it."""
    prompts, key_heads = keys.shape[1:3]
    known = past + longest
    columns = torch.arange(known, device=keys.device)
    mask = columns <= columns[past:, None]  # [longest, known]

    def attend(
        layer: int, query_THD: torch.Tensor, key_TKD: torch.Tensor, value_TKD: torch.Tensor
    ) -> torch.Tensor:
        padded = query_THD.new_zeros(prompts, longest, *query_THD.shape[1:])
        padded[at] = query_THD
        key, value = keys[layer, :, :, :known], values[layer, :, :, :known]
        group_mask = mask.repeat(query_THD.shape[1] // key_heads, 1)
        return grouped_attention(padded, key, value, group_mask, 1.0)[at]

    return attend


def closed_up(gone: Sequence[bool]) -> tuple[list[int], list[int], list[int]]:
    """The new order after those ``gone`` left and the last ones moved into their places.

    Returns the old place of each new place, then the old and the new places of those that moved.

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
