"""Pack a batch into one sequence in which whatever its rows have in common stands once.

The rows of a GRPO batch are a tree: all prompts may begin alike (system text, worked examples),
and G completions follow each prompt. Every branch of the tree is packed once, one after another,
into a single sequence of T tokens without padding. Norms, linear layers and activations treat each
token by itself, so they run on that sequence as it is. Only attention must know that a token
attends to its own branch up to itself and to the branches above
(:mod:`abacist.policy.scoring.attention_backend`).

This is exact: in a causal model a token's state depends on the tokens before it, and these are the
same in every row that shares them. Nothing depends on the last token of a completion, so it is
not packed.

Example, two prompts that share "S", with two completions each:

    level 0   S                       one branch, no parent
    level 1   P0  P1                  what each prompt adds to S
    level 2   C0  C1  C2  C3          completions; parents P0 P0 P1 P1
    packed    S P0 P1 C0 C1 C2 C3     T tokens; positions go on from the parent's end

If S was read before, for several such batches (``scoring.forward.SharedPrefix``), it stays a branch
of the tree and its tokens are left out.

Shape suffixes: B rows, C completion width, T packed tokens, N scored tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from abacist.policy.common_prefix import common_prefix_tokens

_MIN_SAVED_TOKENS = 64  # sharing a prefix adds a level; for fewer tokens it is not worth it


@dataclass
class Level:
    """Branches that start at the same depth: padded, [branches, longest]; packed, [tokens].

    Attributes:
        tokens: number of tokens of all branches.
        shape: (number of branches, length of the longest).
        slots: [tokens], where each token stands in the flattened padded form; None: no padding.
        sources: [branches * longest], the token in each slot (any token in an empty slot).
        is_empty: [branches * longest, 1, 1], whether a slot holds no token.
        parents: [branches], each branch's parent in the level above; None for the root level.
        sees: [branches, tokens above], whether a branch attends to a key of the padded branches
            above it (its parent's, and those above that); False for padding.
        is_last: no branch grows from this level.
    """

    tokens: int
    shape: tuple[int, int]
    slots: Tensor | None
    sources: Tensor | None
    is_empty: Tensor | None
    parents: Tensor | None
    sees: Tensor | None
    is_last: bool
    _bias: dict[tuple[torch.dtype, int], Tensor] = field(default_factory=dict)

    def pad(self, packed: Tensor) -> Tensor:
        """[tokens, …] -> [branches, longest, …]; empty slots hold any finite value."""
        if self.slots is not None:
            packed = _PermuteRows.apply(packed, self.sources, self.slots, None)
        return packed.view(*self.shape, *packed.shape[1:])

    def unpad(self, padded: Tensor) -> Tensor:
        """[branches, longest, …] -> [tokens, …]."""
        flat = padded.reshape(-1, *padded.shape[2:])
        if self.slots is None:
            return flat
        return _PermuteRows.apply(flat, self.slots, self.sources, self.is_empty)

    def bias(self, dtype: torch.dtype, repeats: int) -> Tensor:
        """The attention bias, [branches, 1, repeats * longest, tokens above + longest].

        0 where a token attends, minus infinity elsewhere. Made once and kept for all layers.
        """
        if (dtype, repeats) not in self._bias:
            assert self.sees is not None
            branches, longest = self.shape
            own = torch.ones(longest, longest, dtype=torch.bool, device=self.sees.device).tril_()
            allowed = torch.cat(
                [self.sees[:, None, :].expand(-1, longest, -1), own.expand(branches, -1, -1)], dim=2
            )
            bias = torch.zeros(allowed.shape, dtype=dtype, device=allowed.device)
            bias.masked_fill_(~allowed, -torch.inf)
            self._bias[dtype, repeats] = bias.repeat(1, repeats, 1)[:, None]
        return self._bias[dtype, repeats]


@dataclass
class Packing:
    """A batch as one packed sequence, and where its log-probabilities come from.

    Attributes:
        token_ids: [T]; the levels one after another, in each the branches one after another,
            without those of ``read_tokens``.
        position_ids: [T], as each token would have in its own row without padding.
        levels: one to three: what all prompts share, prompts, completions.
        branches: [branches, 3] on the CPU, the same tree for a kernel: each branch's first token,
            its number of tokens, and the number of its parent (-1: none).
        predictors: [N], the place in T whose state predicts each scored token.
        targets: [N], the scored tokens.
        places: [N], where their values belong in the flattened [B, C] result.
        batch_shape: (B, C).
        read_tokens: tokens of the first branch, where they were read before; else 0.
    """

    token_ids: Tensor
    position_ids: Tensor
    levels: list[Level]
    branches: Tensor
    predictors: Tensor
    targets: Tensor
    places: Tensor
    batch_shape: tuple[int, int]
    read_tokens: int = 0

    def spread(self, values_N: Tensor) -> Tensor:
        """[N] -> [B, C], 0 where nothing was scored."""
        batch, width = self.batch_shape
        flat = values_N.new_zeros(batch * width)
        return flat.index_copy(0, self.places, values_N).view(batch, width)


def pack(
    input_ids: Tensor,
    attention_mask: Tensor,
    completion_width: int,
    skip_rows: Tensor | None = None,
    read: Sequence[int] = (),
) -> Packing | None:
    """Pack a batch [B, P+C] of left-padded prompts, then right-padded completions.

    ``skip_rows`` [B] names rows to leave out. ``read`` are tokens that every prompt begins with and
    that are left out, because they were read before; ignored if a prompt does not go on behind
    them. Returns None when no completion token is left. Raises :class:`ValueError` when the padding
    is elsewhere or a scored row has no prompt.
    """
    ids = input_ids.cpu().numpy()
    middle = ids.shape[1] - completion_width
    prompt_tokens, completion_tokens = _lengths(attention_mask.cpu().numpy() > 0, middle)
    wanted = completion_tokens > 0
    if skip_rows is not None:
        wanted &= ~skip_rows.cpu().numpy().astype(bool)
    rows = np.flatnonzero(wanted)
    if rows.size == 0:
        return None
    if not prompt_tokens[rows].all():
        raise ValueError("attention_mask: a completion without any prompt cannot be scored")

    numbers: dict[bytes, int] = {}
    prompts: list[np.ndarray] = []
    prompt_of: list[int] = []
    for row in rows:
        prompt = ids[row, middle - prompt_tokens[row] : middle]
        prompt_of.append(numbers.setdefault(prompt.tobytes(), len(prompts)))
        if prompt_of[-1] == len(prompts):
            prompts.append(prompt)
    completions = [ids[row, middle : middle + completion_tokens[row]] for row in rows]

    # Each level is (branches, parents, depths); the last token of a completion is in none.
    read_tokens = len(read)
    if not all(len(p) > read_tokens and p[:read_tokens].tolist() == [*read] for p in prompts):
        read_tokens = 0
    shared = common_prefix_tokens([tuple(prompt.tolist()) for prompt in prompts])
    if read_tokens:
        shared = read_tokens
    elif shared * (len(prompts) - 1) < _MIN_SAVED_TOKENS:
        shared = 0
    tree: list[tuple[list[np.ndarray], list[int], list[int]]] = []
    if shared:
        tree.append(([prompts[0][:shared]], [], [0]))
    tree.append(([p[shared:] for p in prompts], [0] * len(prompts), [shared] * len(prompts)))
    if grows := [index for index, completion in enumerate(completions) if len(completion) > 1]:
        above = [prompt_of[index] for index in grows]
        branches = [completions[index][:-1] for index in grows]
        tree.append((branches, above, [len(prompts[number]) for number in above]))

    # A completion's first token is predicted by the last token of its prompt, every other one by
    # the token before it. Completions are packed after all prompts, in the order of `rows`.
    prompt_ends = shared + np.cumsum([len(prompt) - shared for prompt in prompts]) - 1
    following = prompt_ends[-1] + 1
    predictors, places = [], []
    for row, number, completion in zip(rows, prompt_of, completions, strict=True):
        count = len(completion)
        predictors += [prompt_ends[number : number + 1], following + np.arange(count - 1)]
        places.append(row * completion_width + np.arange(count))
        following += count - 1

    device = input_ids.device
    token_ids = np.concatenate([b for level in tree for b in level[0]])
    return Packing(
        token_ids=_tensor(token_ids[read_tokens:], device),
        position_ids=_tensor(
            np.concatenate(
                [
                    depth + np.arange(len(branch))
                    for branches, _, depths in tree
                    for branch, depth in zip(branches, depths, strict=True)
                ]
            )[read_tokens:],
            device,
        ),
        levels=_levels([level[:2] for level in tree], device),
        branches=_branches([level[:2] for level in tree]),
        predictors=_tensor(np.concatenate(predictors) - read_tokens, device),
        targets=_tensor(np.concatenate(completions), device),
        places=_tensor(np.concatenate(places), device),
        batch_shape=(ids.shape[0], completion_width),
        read_tokens=read_tokens,
    )


def pack_tokens(token_ids: Sequence[int], device: torch.device) -> Packing:
    """One branch, of which nothing is scored."""
    ids = np.array(token_ids)
    tree: list[tuple[list[np.ndarray], list[int]]] = [([ids], [])]
    nothing = torch.zeros(0, dtype=torch.int64, device=device)
    return Packing(
        token_ids=_tensor(ids, device),
        position_ids=_tensor(np.arange(len(ids)), device),
        levels=_levels(tree, device),
        branches=_branches(tree),
        predictors=nothing,
        targets=nothing,
        places=nothing,
        batch_shape=(0, 0),
    )


def _lengths(mask: np.ndarray, middle: int) -> tuple[np.ndarray, np.ndarray]:
    """Number of tokens of the prompt and of the completion of each row."""
    prompt, completion = mask[:, :middle], mask[:, middle:]
    if (prompt[:, :-1] > prompt[:, 1:]).any():
        raise ValueError("attention_mask: prompts must be padded on the left only")
    if (completion[:, :-1] < completion[:, 1:]).any():
        raise ValueError("attention_mask: completions must be padded on the right only")
    return prompt.sum(1), completion.sum(1)


def _levels(tree: list[tuple[list[np.ndarray], list[int]]], device: torch.device) -> list[Level]:
    levels: list[Level] = []
    exists = np.zeros((0, 0), dtype=bool)  # [branches of the level above, tokens seen from there]
    for branches, parents in tree:
        lengths = np.array([len(branch) for branch in branches])
        is_token = np.arange(lengths.max()) < lengths[:, None]
        slots = np.flatnonzero(is_token)
        sources = np.zeros(is_token.size, dtype=np.int64)
        sources[slots] = np.arange(slots.size)
        padded = slots.size < is_token.size
        sees = exists[parents] if levels else None
        exists = is_token if sees is None else np.concatenate([sees, is_token], axis=1)
        levels.append(
            Level(
                tokens=slots.size,
                shape=(is_token.shape[0], is_token.shape[1]),
                slots=_tensor(slots, device) if padded else None,
                sources=_tensor(sources, device) if padded else None,
                is_empty=_tensor(~is_token.reshape(-1, 1, 1), device) if padded else None,
                parents=_tensor(np.array(parents), device) if levels else None,
                sees=None if sees is None else _tensor(sees, device),
                is_last=len(levels) == len(tree) - 1,
            )
        )
    return levels


def _branches(tree: list[tuple[list[np.ndarray], list[int]]]) -> Tensor:
    found: list[tuple[int, int, int]] = []
    start = above = 0  # where the branch begins; how many branches the levels above have
    for branches, parents in tree:
        level = len(found)
        for number, branch in enumerate(branches):
            found.append((start, len(branch), above + parents[number] if level else -1))
            start += len(branch)
        above = level
    return _tensor(np.array(found), torch.device("cpu"))


def _tensor(array: np.ndarray, device: torch.device) -> Tensor:
    kind = array.dtype if array.dtype == bool else np.int64
    return torch.from_numpy(np.ascontiguousarray(array, dtype=kind)).to(device)


class _PermuteRows(torch.autograd.Function):
    """``rows[index]`` where ``inverse`` undoes ``index``: the backward gathers, it adds nothing.

    ``unused`` marks rows that ``index`` does not pick, whose gradient is zero.
    """

    @staticmethod
    def forward(ctx: Any, rows: Tensor, index: Tensor, inverse: Tensor, unused: Any) -> Tensor:
        ctx.inverse, ctx.unused = inverse, unused
        return rows.index_select(0, index)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        back = grad.index_select(0, ctx.inverse)
        return back if ctx.unused is None else back.masked_fill_(ctx.unused, 0), None, None, None


class GatherRows(torch.autograd.Function):
    """``rows[index]`` in ``dtype``; the gradients of a row that is picked often add up in float32.

    A key of the shared prefix gets a gradient from every completion. bfloat16 has 8 bits: once the
    sum is 256 times a summand, adding more changes nothing.
    """

    @staticmethod
    def forward(ctx: Any, rows: Tensor, index: Tensor, dtype: torch.dtype) -> Tensor:
        ctx.index, ctx.rows = index, (rows.shape, rows.dtype)
        return rows.to(dtype).index_select(0, index)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        shape, dtype = ctx.rows
        wide = torch.promote_types(dtype, torch.float32)
        total = torch.zeros(shape, dtype=wide, device=grad.device)
        return total.index_add_(0, ctx.index, grad.to(wide)).to(dtype), None, None
