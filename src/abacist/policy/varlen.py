"""Attention over a packed batch by a variable-length kernel: one call, no padding and no mask.

To such a kernel every branch of the tree is one sequence. Its queries are the branch's own tokens,
its keys those of all it grew from and then its own; causal, with the diagonal at the bottom right,
each token so sees what stands before it in its own row. Keys and values are repeated for every
branch that grows from them, which grouped-query attention makes cheap; scores are never held.

Two kernels do this: FlashAttention's, and the one that PyTorch brings with it. Which of them
serves is decided in :mod:`abacist.policy.attending`.

Shapes: T packed tokens, S keys of all branches together, H query heads, K key heads, D numbers of
a head.
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.modeling_flash_attention_utils import lazy_import_flash_attention

from abacist.errors import ModelError
from abacist.policy.layout import Pick


@dataclass(frozen=True)
class Sequences:
    """The branches of a layout, one after another, as a kernel is told of them.

    Attributes:
        keys: [S], which packed token each key is of.
        query_ends: [branches + 1] int32, where each branch's queries begin, and the last end.
        key_ends: [branches + 1] int32, the same of its keys.
        most_queries: of one branch.
        most_keys: of one branch.
    """

    keys: Tensor
    query_ends: Tensor
    key_ends: Tensor
    most_queries: int
    most_keys: int

    @classmethod
    def of(cls, branches: Tensor, device: torch.device) -> Sequences:
        """Of :attr:`abacist.policy.layout.Layout.branches`."""
        seen: list[Tensor] = []
        for start, length, parent in branches.tolist():
            own = torch.arange(start, start + length)
            seen.append(own if parent < 0 else torch.cat((seen[parent], own)))
        queries = branches[:, 1]
        keys = torch.tensor([len(branch) for branch in seen])
        return cls(
            torch.cat(seen).to(device),
            _ends(queries).to(device),
            _ends(keys).to(device),
            int(queries.max()),
            int(keys.max()),
        )


Kernel = Callable[[Tensor, Tensor, Tensor, Sequences, float], Tensor]
"""[T, H, D] by [S, K, D] twice -> [T, H, D], with gradients; the last is the scores' scale."""


@dataclass(frozen=True)
class Varlen:
    """A kernel, and the batch that it is to read."""

    kernel: Kernel
    sequences: Sequences

    def attend(self, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        """[1, H, T, D] by [1, K, T, D] twice -> [1, T, H, D], in the dtype of autocast if it is on.

        The gradients of a key that many branches see are added up in float32.
        """
        device = query.device.type
        autocast = torch.is_autocast_enabled(device)
        dtype = torch.get_autocast_dtype(device) if autocast else query.dtype
        query, key, value = (states[0].transpose(0, 1) for states in (query, key, value))
        key, value = (Pick.apply(x, self.sequences.keys, dtype) for x in (key, value))
        return self.kernel(query.to(dtype), key, value, self.sequences, scale)[None]


def flash_kernel(implementation: str) -> Kernel:
    """FlashAttention's, as transformers has it for this ``attn_implementation``.

    Raises whatever its import raises, or :class:`ModelError` when it is not one of this kind.
    """
    (_, function, *_), _ = lazy_import_flash_attention(implementation)
    if function is None:
        raise ModelError(f"'{implementation}' has no variable-length kernel.", "Use sdpa.")
    has_deterministic = "deterministic" in inspect.signature(function).parameters

    def run(q: Tensor, k: Tensor, v: Tensor, sequences: Sequences, scale: float) -> Tensor:
        options: dict[str, Any] = {}
        if has_deterministic:
            options["deterministic"] = _wants_determinism()
        out = function(
            q=q,
            k=k,
            v=v,
            cu_seqlens_q=sequences.query_ends,
            cu_seqlens_k=sequences.key_ends,
            max_seqlen_q=sequences.most_queries,
            max_seqlen_k=sequences.most_keys,
            softmax_scale=scale,
            causal=True,
            **options,
        )
        read: Tensor = out[0] if isinstance(out, tuple) else out  # some add the log-sum-exp
        return read

    return run


def pytorch_kernel() -> Kernel:
    """The flash kernel that is built into PyTorch.

    Raises :class:`ImportError`, or :class:`ModelError` when this version's cannot do what we need.
    """
    from torch.nn.attention.varlen import varlen_attn

    known = inspect.signature(varlen_attn).parameters
    if not {"scale", "window_size"} <= known.keys():
        raise ModelError(
            f"varlen_attn of PyTorch {torch.__version__} takes no scale or no window.",
            "Update PyTorch.",
        )

    def run(q: Tensor, k: Tensor, v: Tensor, sequences: Sequences, scale: float) -> Tensor:
        options: dict[str, Any] = {}
        if (repeats := q.shape[1] // k.shape[1]) > 1:
            if "enable_gqa" in known:
                options["enable_gqa"] = True
            else:
                k, v = (x.repeat_interleave(repeats, dim=1) for x in (k, v))
        read: Any = varlen_attn(
            q,
            k,
            v,
            sequences.query_ends,
            sequences.key_ends,
            sequences.most_queries,
            sequences.most_keys,
            scale=scale,
            window_size=(-1, 0),  # which is how it is told to be causal
            **options,
        )
        return read  # type: ignore[no-any-return]

    return run


def _ends(lengths: Tensor) -> Tensor:
    return torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).to(torch.int32)


def _wants_determinism() -> bool:
    """As transformers understands it, or PyTorch, whose own kernels ask the latter."""
    asked = os.environ.get("FLASH_ATTENTION_DETERMINISTIC", "0") == "1"
    return asked or torch.are_deterministic_algorithms_enabled()
