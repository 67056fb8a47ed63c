"""Attention over a packed batch by ``tree_attention.cpp``: float32 on a CPU, forward and backward.

The batch is a tree: completions branch from their prompt, prompts from what they share. The kernel
reads queries, keys and values in place and never holds more than a block of scores. For the
backward it keeps two numbers per row. Sums have one order for any number of threads, so a run can
be repeated to the bit. NaN and infinity propagate.

Shapes: T packed tokens, H query heads, K key heads, D head dim.
"""

from __future__ import annotations

import ctypes
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from abacist.policy.kernels import build

_Address, _Count = ctypes.c_void_p, ctypes.c_int64


class _View(ctypes.Structure):
    _fields_ = [("at", _Address), ("token", _Count), ("head", _Count)]


class _Attention(ctypes.Structure):
    _fields_ = [
        *((name, _View) for name in ("query", "key", "value")),
        *((name, _Address) for name in ("out", "largest", "inverse_sum", "branches")),
        *((n, _Count) for n in ("branch_count", "tokens", "heads", "key_heads", "size")),
        ("scale", ctypes.c_float),
        ("threads", ctypes.c_int32),
    ]


class _Gradients(ctypes.Structure):
    _fields_ = [("out", _View), *((name, _Address) for name in ("query", "key", "value"))]


def supports(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """Whether the kernel is available and supports these tensors."""
    return (
        not torch.is_autocast_enabled("cpu")
        and not torch.compiler.is_compiling()
        and build.supports(query, key, value)
    )


def attend(query: Tensor, key: Tensor, value: Tensor, branches: Tensor, scale: float) -> Tensor:
    """Attention of ``query`` [1, H, T, D] to ``key`` and ``value`` [1, K, T, D] -> [1, T, H, D].

    ``branches`` [branches, 3] int64 holds for each branch its first token, its number of tokens and
    its parent (the number of an earlier branch; -1 for none). A token attends to its own branch up
    to itself and to all tokens of the branches above. Branches follow each other without gaps and
    cover all tokens.
    """
    assert int(branches[-1, :2].sum()) == query.shape[2]
    out: Tensor = _Attend.apply(query, key, value, branches, scale)
    return out


class _Attend(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, branches: Tensor, scale: float
    ) -> Tensor:
        query, key, value = (_in_rows(states) for states in (query, key, value))
        _, heads, tokens, size = query.shape
        out = query.new_empty(1, tokens, heads, size)
        kept = query.new_empty(2, heads * tokens)  # each row's largest score and inverse sum
        call = _call(query, key, value, out, kept, branches, scale)
        _library().attention_forward(ctypes.byref(call))
        ctx.save_for_backward(query, key, value, out, kept, branches)
        ctx.scale = scale
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        grad = _in_rows(grad.transpose(1, 2))
        query, key, value, out, kept, branches = ctx.saved_tensors
        found = [
            states.new_empty(1, states.shape[2], states.shape[1], states.shape[3])
            for states in (query, key, value)
        ]
        call = _call(query, key, value, out, kept, branches, ctx.scale)
        gradients = _Gradients(_view(grad), *(states.data_ptr() for states in found))
        _library().attention_backward(ctypes.byref(call), ctypes.byref(gradients))
        return *(states.transpose(1, 2) for states in found), None, None


def _library() -> ctypes.CDLL:
    library = build.library()
    assert library is not None
    return library


def _call(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    kept: Tensor,
    branches: Tensor,
    scale: float,
) -> _Attention:
    _, heads, tokens, size = query.shape
    return _Attention(
        *(_view(states) for states in (query, key, value)),
        *(states.data_ptr() for states in (out, *kept, branches)),
        *(len(branches), tokens, heads, key.shape[1], size),
        scale,
        build.threads(2.0 * heads * size * tokens * tokens),  # an upper bound: one single branch
    )


def _view(states: Tensor) -> _View:
    """The address and strides of ``states`` [1, heads, T, D]."""
    return _View(states.data_ptr(), states.stride(2), states.stride(1))


def _in_rows(states: Tensor) -> Tensor:
    """``states`` with stride 1 along D, copied if necessary."""
    return states if states.stride(3) == 1 else states.contiguous()
