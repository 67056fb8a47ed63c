"""Attention over a packed batch by ``attention.cpp``: float32 on a CPU, forward and backward.

The kernel reads queries, keys and values where they lie and holds no more than a block of scores;
for the backward it keeps two numbers a row. Sums are taken in one order whatever the number of
threads, so that a run can be repeated to the bit. What is not a number stays so.

Shapes: T packed tokens, H query heads, K key heads, D numbers of a head.
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
        *((name, _Address) for name in ("out", "largest", "share", "branches")),
        *((n, _Count) for n in ("branch_count", "tokens", "heads", "key_heads", "size")),
        ("scale", ctypes.c_float),
        ("threads", ctypes.c_int32),
    ]


class _Gradients(ctypes.Structure):
    _fields_ = [("out", _View), *((name, _Address) for name in ("query", "key", "value"))]


def takes(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """Whether there is a kernel, and it is made for these."""
    return (
        not torch.is_autocast_enabled("cpu")
        and not torch.compiler.is_compiling()
        and build.takes(query, key, value)
    )


def attend(query: Tensor, key: Tensor, value: Tensor, branches: Tensor, scale: float) -> Tensor:
    """[1, H, T, D] by [1, K, T, D] -> [1, T, H, D].

    ``branches`` [branches, 3] int64: the first token of each, how many there are, and the number
    of the branch it grows from (an earlier one; -1: none). They follow each other without gaps,
    and leave no token over.
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
        kept = query.new_empty(2, heads * tokens)  # the kernel's own, for the backward
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
        build.threads(2.0 * heads * size * tokens * tokens),  # at most: all see all before them
    )


def _view(states: Tensor) -> _View:
    """Of [1, heads, T, D]."""
    return _View(states.data_ptr(), states.stride(2), states.stride(1))


def _in_rows(states: Tensor) -> Tensor:
    """The numbers of a head next to each other, copied where they are not."""
    return states if states.stride(3) == 1 else states.contiguous()
