"""Norm, rotary embedding, SwiGLU and softmax in one pass each, by kernel where there is one.

PyTorch makes half a dozen passes over the activations for each of these, and keeps most of the
intermediate results. Without kernels (on a GPU, in half precision, without a compiler) PyTorch's
own operations compute the same. None of these functions records gradients.

Shapes: T tokens, C hidden size, D head dim, V vocabulary entries.
"""

from __future__ import annotations

import ctypes
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from abacist.policy.kernels import build

_OPERATIONS = 100  # a number costs about as much time as this many: memory, exponentials


def norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """RMS normalisation of ``x`` [T, C], computed in float32."""
    if not _supports(x, weight):
        wide = x.float()
        factor = torch.rsqrt(wide.square().mean(-1, keepdim=True) + epsilon)
        return weight * (wide * factor).to(x.dtype)
    y = torch.empty_like(x)
    _call("norm_forward", x, weight, *x.shape, epsilon, y)
    return y


def add_norm_gradient(
    total: Tensor, grad: Tensor, x: Tensor, weight: Tensor, epsilon: float
) -> None:
    """Add to ``total`` [T, C] the gradient of :func:`norm` by ``x``; ``grad`` is its output's."""
    if _supports(total, grad, x, weight):
        _call("norm_backward", grad, x, weight, *x.shape, epsilon, total)
        return
    wide, slope = x.float(), (grad * weight).float()
    factor = torch.rsqrt(wide.square().mean(-1, keepdim=True) + epsilon)
    along = (slope * wide).mean(-1, keepdim=True) * factor.square()
    total += (slope.sub_(wide * along) * factor).to(total.dtype)


def rotary(x: Tensor, cosines: Tensor, sines: Tensor, direction: float = 1.0) -> Tensor:
    """The rotary embedding of ``x`` [T, heads, D]; may overwrite ``x``.

    ``cosines`` and ``sines`` are [T, D], as transformers makes them. ``direction`` -1 is the
    inverse rotation, which also gives the gradient.
    """
    if _supports(x, cosines, sines):
        _call("rotary", x, cosines, sines, *x.shape, direction)
        return x
    first, second = x.chunk(2, dim=-1)
    crossed = torch.cat((-second, first), dim=-1)
    return x * cosines[:, None] + crossed * (direction * sines[:, None])


def swiglu(gates: Tensor, ups: Tensor) -> Tensor:
    """silu(``gates``) times ``ups``."""
    if not _supports(gates, ups):
        return F.silu(gates) * ups
    y = torch.empty_like(gates)
    _call("swiglu_forward", gates, ups, gates.numel(), y)
    return y


def swiglu_gradients(grad: Tensor, gates: Tensor, ups: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients of :func:`swiglu` by both; ``grad`` is its output's and may be overwritten."""
    if _supports(grad, gates, ups):
        by_ups = torch.empty_like(ups)
        _call("swiglu_backward", grad, gates, ups, gates.numel(), grad, by_ups)
        return grad, by_ups
    return torch.ops.aten.silu_backward(grad * ups, gates), grad * F.silu(gates)


def softmax(
    logits: Tensor, targets: Tensor, inverse_temperature: float, compute_entropy: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """The softmax of ``logits`` [T, V], not yet normalised; overwrites ``logits``.

    Returns the weights [T, V], the largest of each row being 1; their sums [T]; the log-probability
    of each of ``targets`` [T]; and the entropies [T] of the tempered distribution, in nats, or
    None.
    """
    if _supports(logits):
        totals, logps, entropies = logits.new_empty(3, len(logits))
        targets = targets.contiguous()
        wanted = entropies if compute_entropy else None
        _call("softmax", logits, targets, *logits.shape, inverse_temperature, totals, logps, wanted)
        return logits, totals, logps, wanted
    logits.sub_(logits.amax(dim=-1, keepdim=True)).mul_(inverse_temperature)
    weights = logits.exp()
    totals = weights.sum(dim=-1)
    logps = logits.gather(-1, targets[:, None]).squeeze(-1) - totals.log()
    if not compute_entropy:
        return weights, totals, logps, None
    entropies = totals.log() - logits.mul_(weights).sum(dim=-1) / totals
    return weights, totals, logps, entropies


def _supports(*tensors: Tensor) -> bool:
    return all(x.is_contiguous() for x in tensors) and build.supports(*tensors)


def _call(name: str, *arguments: Tensor | float | int | None) -> None:
    converted: list[Any] = []
    for value in arguments:
        if value is None:
            converted.append(None)
        elif isinstance(value, Tensor):
            converted.append(ctypes.c_void_p(value.data_ptr()))
        elif isinstance(value, int):
            converted.append(ctypes.c_int64(value))
        else:
            converted.append(ctypes.c_float(value))
    work = _OPERATIONS * max(x.numel() for x in arguments if isinstance(x, Tensor))
    getattr(build.library(), name)(*converted, build.threads(work))
