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


class Softmax:
    """The softmax of rows whose logits come part by part: log-probabilities and entropies.

    Args:
        targets: [T] token ids.
        inverse_temperature: logits are multiplied by it.
        like: a tensor on the device of the logits.
    """

    def __init__(self, targets: Tensor, inverse_temperature: float, like: Tensor) -> None:
        self._targets, self._inverse_temperature = targets.contiguous(), inverse_temperature
        shape = targets.shape
        self._most, self._factors, self._target_logits = like.new_zeros(
            (3, *shape), dtype=torch.float32
        )
        # The many rare tokens of a large vocabulary add up. Not every GPU has float64.
        wide = torch.float64 if like.device.type == "cpu" else torch.float32
        self._totals, self._surprises = like.new_zeros((2, *shape), dtype=wide)

    def weigh(self, logits: Tensor, first: int) -> tuple[Tensor, Tensor]:
        """Weights [T, V'] of the tokens from ``first`` on, by their ``logits``, overwritten.

        Weights are relative to the largest logit so far. So those of earlier parts have to be
        multiplied with the factors [T], which are returned too, before both are added up.
        """
        if _supports(logits):
            _call(
                "softmax_part",
                *(logits, self._targets, first, *logits.shape, self._inverse_temperature),
                *(self._most, self._totals, self._surprises, self._factors, self._target_logits),
            )
            return logits, self._factors
        is_first = self._totals == 0
        largest = logits.amax(dim=-1)
        most = torch.where(is_first, largest, torch.maximum(self._most, largest))
        here = self._targets - first
        is_here = (here >= 0) & (here < logits.shape[1])
        chosen = logits.gather(-1, here.clamp(0, logits.shape[1] - 1)[:, None]).squeeze(-1)
        self._target_logits = torch.where(is_here, chosen, self._target_logits)
        lower = torch.where(is_first, 0, (self._most - most) * self._inverse_temperature)
        self._factors = torch.where(is_first, 0, lower.exp())
        logits.sub_(most[:, None]).mul_(self._inverse_temperature)
        weights = logits.exp()
        self._surprises += lower * self._totals
        self._surprises *= self._factors
        self._surprises += logits.mul_(weights).sum(dim=-1, dtype=self._totals.dtype)
        self._totals *= self._factors
        self._totals += weights.sum(dim=-1, dtype=self._totals.dtype)
        self._most = most
        return weights, self._factors

    @property
    def totals(self) -> Tensor:
        """The sum [T] of all weights, in float32."""
        return self._totals.float()

    @property
    def logps(self) -> Tensor:
        """The log-probability [T] of each target, in float32."""
        target = (self._target_logits - self._most) * self._inverse_temperature
        return (target - self._totals.log()).float()

    @property
    def entropies(self) -> Tensor:
        """The entropies [T] of the tempered distribution, in nats and float32."""
        return (self._totals.log() - self._surprises / self._totals).float()


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
