"""Lay a batch out as one sequence in which whatever its rows have in common stands once.

The rows of a GRPO batch are a tree: all prompts may open alike (system text, worked examples),
G completions follow each prompt. Every branch is laid out once, all of them one after another in
a single sequence of T tokens, without padding. Norms, linear layers and activations do not care
where a token stands, so the model runs on that sequence as it is; only attention must know that a
token sees its own branch up to itself and all that its branch grew from
(:mod:`abacist.policy.attention`).

This is exact: in a causal model a token's state depends on what stands before it, and that is the
same in every row that shares it. Nothing depends on the last token of a completion, so it is left
out too.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    from abacist.policy.varlen import Varlen

_LEAST_SAVING_TOKENS = 64  # a common opening that saves fewer costs more than it brings


@dataclass
class Level:
    """Branches that start at the same depth: padded, [branches, longest]; packed, [tokens].

    Attributes:
        tokens: how many tokens the branches have together.
        shape: (number of branches, length of the longest).
        slots: [tokens], where each token stands in the flattened padded form; None: no padding.
        sources: [branches * longest], the token in each slot (any token where there is none).
        is_empty: [branches * longest, 1, 1], whether there is none.
        parents: [branches], each branch's parent in the level above; None for the root level.
        sees: [branches, tokens above], which of its parent's tokens, and those above it, exist.
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

    def unpack(self, packed: Tensor) -> Tensor:
        """[tokens, …] -> [branches, longest, …]; empty slots hold something finite."""
        if self.slots is not None:
            packed = _Rearrange.apply(packed, self.sources, self.slots, None)
        return packed.view(*self.shape, *packed.shape[1:])

    def pack(self, padded: Tensor) -> Tensor:
        """[branches, longest, …] -> [tokens, …]."""
        flat = padded.reshape(-1, *padded.shape[2:])
        if self.slots is None:
            return flat
        return _Rearrange.apply(flat, self.slots, self.sources, self.is_empty)

    def bias(self, dtype: torch.dtype, repeats: int) -> Tensor:
        """What is added to the scores, [branches, 1, repeats * longest, tokens above + longest].

        Made once for all layers: 0 where a token may look, minus infinity elsewhere.
        """
        if (dtype, repeats) not in self._bias:
            assert self.sees is not None
            branches, longest = self.shape
            own = torch.ones(longest, longest, dtype=torch.bool, device=self.sees.device).tril_()
            allowed = torch.cat(
                [
                    self.sees[:, None, :].expand(-1, longest, -1),
                    own.expand(branches, -1, -1),
                ],
                dim=2,
            )
            bias = torch.zeros(allowed.shape, dtype=dtype, device=allowed.device)
            bias.masked_fill_(~allowed, -torch.inf)
            self._bias[dtype, repeats] = bias.repeat(1, repeats, 1)[:, None]
        return self._bias[dtype, repeats]


@dataclass
class Layout:
    """A batch as one packed sequence, and where its log-probabilities come from.

    Attributes:
        token_ids: [T]; the levels one after another, in each the branches one after another.
        position_ids: [T], as each token would have in its own row without padding.
        levels: one to three: what all prompts share, prompts, completions.
        branches: [branches, 3] on the CPU, the same for a kernel that walks the tree: each
            branch's first token, how many it has, and the number of its parent (-1: none).
        predictors: [N], the place in T whose state predicts each scored token.
        targets: [N], the scored tokens.
        places: [N], where their values belong in the flattened [B, C] result.
        batch_shape: (B, C).
        layers_attended: how many layers have attended by this layout so far. One that did not
            would have seen the whole sequence as one text.
        varlen: the variable-length kernel that attends, where one does.
    """

    token_ids: Tensor
    position_ids: Tensor
    levels: list[Level]
    branches: Tensor
    predictors: Tensor
    targets: Tensor
    places: Tensor
    batch_shape: tuple[int, int]
    layers_attended: int = 0
    varlen: Varlen | None = None


def lay_out(
    input_ids: Tensor,
    attention_mask: Tensor,
    completion_width: int,
    skip_rows: Tensor | None = None,
) -> Layout | None:
    """The layout of a batch: [B, P+C] left-padded prompts, then right-padded completions.

    ``skip_rows`` [B] names rows to leave out. Returns None when no completion token is left.
    Raises :class:`ValueError` when the padding is elsewhere or a scored row has no prompt.
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
    shared = _common_opening(prompts)
    tree: list[tuple[list[np.ndarray], list[int], list[int]]] = []
    if shared:
        tree.append(([prompts[0][:shared]], [], [0]))
    tree.append(([p[shared:] for p in prompts], [0] * len(prompts), [shared] * len(prompts)))
    if grows := [index for index, completion in enumerate(completions) if len(completion) > 1]:
        above = [prompt_of[index] for index in grows]
        branches = [completions[index][:-1] for index in grows]
        tree.append((branches, above, [len(prompts[number]) for number in above]))

    # A completion's first token is predicted at the end of its prompt, the others by their
    # forerunners, which stand behind all prompts.
    prompt_ends = shared + np.cumsum([len(prompt) - shared for prompt in prompts]) - 1
    following = prompt_ends[-1] + 1
    predictors, places = [], []
    for row, number, completion in zip(rows, prompt_of, completions, strict=True):
        count = len(completion)
        predictors += [prompt_ends[number : number + 1], following + np.arange(count - 1)]
        places.append(row * completion_width + np.arange(count))
        following += count - 1

    device = input_ids.device
    return Layout(
        token_ids=_tensor(np.concatenate([b for level in tree for b in level[0]]), device),
        position_ids=_tensor(
            np.concatenate(
                [
                    depth + np.arange(len(branch))
                    for branches, _, depths in tree
                    for branch, depth in zip(branches, depths, strict=True)
                ]
            ),
            device,
        ),
        levels=_levels([level[:2] for level in tree], device),
        branches=_branches([level[:2] for level in tree]),
        predictors=_tensor(np.concatenate(predictors), device),
        targets=_tensor(np.concatenate(completions), device),
        places=_tensor(np.concatenate(places), device),
        batch_shape=(ids.shape[0], completion_width),
    )


def _lengths(mask: np.ndarray, middle: int) -> tuple[np.ndarray, np.ndarray]:
    """How many tokens the prompt and the completion of each row have."""
    prompt, completion = mask[:, :middle], mask[:, middle:]
    if (prompt[:, :-1] > prompt[:, 1:]).any():
        raise ValueError("attention_mask: prompts must be padded on the left only")
    if (completion[:, :-1] < completion[:, 1:]).any():
        raise ValueError("attention_mask: completions must be padded on the right only")
    return prompt.sum(1), completion.sum(1)


def _common_opening(prompts: list[np.ndarray]) -> int:
    """How many tokens all prompts begin with, leaving at least one to each; 0 if not worth it."""
    if len(prompts) < 2:
        return 0
    most = min(len(prompt) for prompt in prompts) - 1
    heads = np.stack([prompt[:most] for prompt in prompts])
    differs = np.flatnonzero((heads != heads[0]).any(axis=0))
    shared = int(differs[0]) if differs.size else most
    return shared if shared * (len(prompts) - 1) >= _LEAST_SAVING_TOKENS else 0


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


class _Rearrange(torch.autograd.Function):
    """Rows picked by index, where the backward is known to be a picking too (no addition)."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, index: Tensor, inverse: Tensor, unused: Any) -> Tensor:
        ctx.inverse, ctx.unused = inverse, unused
        return rows.index_select(0, index)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        back = grad.index_select(0, ctx.inverse)
        return back if ctx.unused is None else back.masked_fill_(ctx.unused, 0), None, None, None


class Pick(torch.autograd.Function):
    """Rows by index, in ``dtype``; what several picks give back to one row is added up in float32
    at least, for bfloat16 sums would lose what few add."""

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
