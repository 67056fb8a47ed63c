"""The matrix product of ``multiply.cpp``: any shape, any strides, no packing beforehand."""

from __future__ import annotations

import ctypes
from typing import Any

import torch
from torch import Tensor

from abacist.policy.kernels.blocks import Blocks, Weight, format_of, memory_of, strides_of
from abacist.policy.kernels.build import library, multiplies_pairs, threads


def multiply(
    x: Tensor,
    weight: Weight,
    bias: Tensor | None = None,
    to: Tensor | None = None,
    low_rank: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """``x`` [N, I] times ``weight`` [O, I] transposed, plus ``bias`` [O], in float32.

    ``weight`` may be in bfloat16 or 8 bits: each number is widened, which is exact. ``low_rank``, a
    pair of [N, R] and [O, R] in float32, adds their product. If ``to`` [N, O] is given, the result
    is added to it.
    """
    if to is not None:
        assert to.is_contiguous()
    y = x.new_empty(len(x), len(weight)) if to is None else to
    bias = None if bias is None else bias.contiguous()
    kernels: Any = library()
    kernels.multiply_any(
        *_with_strides(x),
        ctypes.c_void_p(memory_of(weight).data_ptr()),
        *map(ctypes.c_int64, strides_of(weight)),
        None if bias is None else ctypes.c_void_p(bias.data_ptr()),
        *_low_rank(low_rank),
        ctypes.c_void_p(y.data_ptr()),
        *map(ctypes.c_int64, (*x.shape, len(weight), to is not None)),
        ctypes.c_int64(held := format_of(weight)),
        ctypes.c_int64(held > 0 and multiplies_pairs()),
        threads(2.0 * x.numel() * len(weight)),
    )
    return y


def multiply_row(x: Tensor, weight: Weight, bias: Tensor | None = None) -> Tensor:
    """``x`` [1, I] times ``weight`` [O, I] transposed, plus ``bias`` [O].

    ``weight`` is contiguous, in bfloat16 or 8 bits.

    Reads the weights in place, which is what takes the time.
    """
    x, y = x.contiguous(), x.new_empty(1, len(weight))
    bias = None if bias is None else bias.contiguous()
    kernels: Any = library()
    by = kernels.multiply_row_in_blocks if isinstance(weight, Blocks) else kernels.multiply_row
    parts = (x, memory_of(weight), bias)
    by(
        *(None if part is None else ctypes.c_void_p(part.data_ptr()) for part in parts),
        ctypes.c_void_p(y.data_ptr()),
        ctypes.c_int64(weight.shape[1]),
        ctypes.c_int64(len(weight)),
        threads(2.0 * weight.shape.numel()),
    )
    return y


def _low_rank(factors: tuple[Tensor, Tensor] | None) -> tuple[Any, ...]:
    if factors is None:
        nothing = (None, ctypes.c_int64(0), ctypes.c_int64(0))
        return (*nothing, *nothing, ctypes.c_int64(0))
    x, weight = factors
    assert x.dtype == weight.dtype == torch.float32
    return (*_with_strides(x), *_with_strides(weight), ctypes.c_int64(x.shape[1]))


def _with_strides(matrix: Tensor) -> tuple[Any, ...]:
    return (ctypes.c_void_p(matrix.data_ptr()), *map(ctypes.c_int64, matrix.stride()))
