"""What the rows of a decoding batch remember: keys and values, a prompt's only once.

A group of completions shares its prompt, so keys and values are kept in two parts: those of each
prompt in the batch, and those of each row's own completion. A token attends to both in one
softmax; against the prompt, the queries of a whole group meet the same keys in one product. What
all prompts begin with (a system text, worked examples) is computed once and copied.

Rows and prompts leave by letting the last ones move into their places, so that what is alive
always lies in front: a batch shrinks, or is refilled, at the cost of the rows that moved.

Shapes: L layers, P prompts and N rows alive, H key heads, G query heads to a key head, D numbers
of a head, S the most rows a prompt has, T prompt tokens, W completion tokens so far.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from abacist.policy.kernels import attention as kernel
from abacist.policy.lean import Attend, LeanNetwork

_PREFILL_TOKENS = 8192


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
    ) -> None:
        self._network = network
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
        network, past = self._network, self._prefix_tokens
        lengths = [len(ids) - past for ids in prompts]
        count = len(prompts)
        keys, values = self._prompts[:, :, first : first + count]
        tokens = torch.tensor([token for ids in prompts for token in ids[past:]])
        columns = torch.cat([torch.arange(length) for length in lengths])
        rows = torch.repeat_interleave(torch.arange(count), torch.tensor(lengths))
        ends = torch.tensor(lengths).cumsum(0) - 1
        tokens, columns, rows, ends = (
            x.to(network.device, non_blocking=True) for x in (tokens, columns, rows, ends)
        )
        places = past + columns
        if network.decoder is None:  # which never reads beyond a prompt's end
            self._prompts[:, :, first : first + count, :, past:] = 0  # whoever was here before
        if kernel.takes(keys, keys, values):
            attended = self._attended_as_tree(keys, values, lengths)
        else:
            attended = self._attended_padded(keys, values, (rows, columns), max(lengths))

        def attend(
            layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
        ) -> torch.Tensor:
            keys[layer][rows, :, places] = key
            values[layer][rows, :, places] = value
            return attended(layer, query, key, value)

        return network.forward(tokens, places, attend)[ends]

    def _attended_as_tree(
        self, keys: torch.Tensor, values: torch.Tensor, lengths: Sequence[int]
    ) -> Attend:
        """Packed prompts that grow from their prefix."""
        past = self._prefix_tokens
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
        self, keys: torch.Tensor, values: torch.Tensor, at: tuple[torch.Tensor, ...], longest: int
    ) -> Attend:
        """Prompts behind their prefix as one padded batch, ``at`` these rows and columns of it."""
        past = self._prefix_tokens
        count, known = keys.shape[1], past + longest
        mask = None
        if past:
            seen = torch.arange(known, device=keys.device)
            mask = seen <= seen[past:, None]

        def attend(
            layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
        ) -> torch.Tensor:
            padded = query.new_zeros(count, longest, *query.shape[1:])
            padded[at] = query
            read = F.scaled_dot_product_attention(
                padded.transpose(1, 2),
                keys[layer, :, :, :known],
                values[layer, :, :, :known],
                attn_mask=mask,
                is_causal=mask is None,
                scale=1.0,
                enable_gqa=True,
            )
            return read.transpose(1, 2)[at]

        return attend

    def arrange(self, prompt_of_row: Sequence[int], prompt_tokens: Sequence[int]) -> None:
        """Say which prompt each living row belongs to, and how long each living prompt is."""
        device = self._network.device
        self._prompt_of_row = torch.tensor(prompt_of_row, device=device)
        if self._network.decoder is not None:
            return
        self._num_rows, self._num_prompts = len(prompt_of_row), len(prompt_tokens)
        taken = [0] * self._num_prompts
        places = []
        for prompt in prompt_of_row:
            places.append(taken[prompt])
            taken[prompt] += 1
        self._most = most = max(taken)
        slots = [p * most + place for p, place in zip(prompt_of_row, places, strict=True)]
        in_order = slots == list(range(self._num_prompts * most))
        self._slots = None if in_order else torch.tensor(slots, device=device)
        self._all_rows = torch.arange(self._num_rows, device=device)
        self._longest_prompt = longest = max(prompt_tokens)
        self._prompt_mask = None
        if min(prompt_tokens) < longest:
            lengths = torch.tensor(prompt_tokens, device=device)
            self._prompt_mask = self._bias(torch.arange(longest, device=device) >= lengths[:, None])

    def move_rows(self, sources: Sequence[int], targets: Sequence[int], tokens: int) -> None:
        """Let rows ``sources``, ``tokens`` long so far, take the places ``targets``."""
        self._rows[:, :, list(targets), :, :tokens] = self._rows[:, :, list(sources), :, :tokens]

    def clear_rows(self, first: int, end: int, tokens: int) -> None:
        """Forget what the rows from ``first`` to ``end`` held; new ones begin there."""
        if self._network.decoder is None:  # which never reads beyond what a row has written
            self._rows[:, :, first:end, :, :tokens] = 0

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
        *,
        in_step: bool,
    ) -> torch.Tensor:
        """The hidden states of one new token a row, [N, hidden].

        Row n has ``prompt_tokens[n]`` and ``written[n]`` tokens behind it; ``window`` is the
        largest of ``written`` plus one, and ``in_step`` says that all of ``written`` are equal.
        """
        network = self._network
        if network.decoder is not None:
            return network.decoder.step(
                self._prompts, self._rows, tokens, self._prompt_of_row, prompt_tokens, written
            )
        number, size = self._num_rows, network.head_dim
        heads, most, prompts = network.key_heads, self._most, self._num_prompts
        group = network.query_heads // heads
        longest, slots, rows = self._longest_prompt, self._slots, self._all_rows
        prompt_mask, own_mask = self._prompt_mask, None
        if not in_step:
            own_mask = self._bias(torch.arange(window, device=tokens.device) > written[:, None])
        prompt_keys, prompt_values = self._prompts[:, :, :prompts, :, :longest]
        own_keys, own_values = self._rows[:, :, :number, :, :window]

        def by_prompt(x: torch.Tensor) -> torch.Tensor:
            """[N, H, G, …] -> [P, H, S·G, …], empty places filled with zeros."""
            if slots is not None:
                x = x.new_zeros(prompts * most, *x.shape[1:]).index_copy_(0, slots, x)
            x = x.reshape(prompts, most, heads, group, -1)
            return x.transpose(1, 2).reshape(prompts, heads, most * group, -1)

        def by_row(x: torch.Tensor) -> torch.Tensor:
            x = x.view(prompts, heads, most, group, -1).transpose(1, 2)
            x = x.reshape(prompts * most, heads, group, -1)
            return x if slots is None else x.index_select(0, slots)

        def attend(
            layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
        ) -> torch.Tensor:
            if in_step:
                own_keys[layer, :, :, -1] = key
                own_values[layer, :, :, -1] = value
            else:
                own_keys[layer][rows, :, written] = key
                own_values[layer][rows, :, written] = value
            query = query.reshape(number, heads, group, size)
            to_prompt = by_prompt(query) @ prompt_keys[layer].transpose(-1, -2)
            to_own = query @ own_keys[layer].transpose(-1, -2)
            if prompt_mask is not None:
                to_prompt += prompt_mask
            if own_mask is not None:
                to_own += own_mask
            scores = torch.cat((by_row(to_prompt), to_own), dim=-1)
            weights = scores.softmax(dim=-1, dtype=torch.float32).to(query.dtype)
            read = by_row(by_prompt(weights[..., :longest]) @ prompt_values[layer])
            return read + weights[..., longest:] @ own_values[layer]

        return network.forward(tokens, prompt_tokens + written, attend)

    def _bias(self, hidden: torch.Tensor) -> torch.Tensor:
        """Minus infinity where ``hidden`` [B, K] is true, to be added to scores; [B, 1, 1, K]."""
        bias = torch.zeros(hidden.shape, dtype=self._network.dtype, device=hidden.device)
        return bias.masked_fill_(hidden, -torch.inf)[:, None, None]


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
