"""The matrix products of the lean network: adapters merged, laid out for the fastest at hand.

On a CPU in float32 that is our own kernel (:mod:`abacist.policy.kernels`), made for the few dozen
rows of decoding; else PyTorch's own product. Merging makes fresh tensors; nothing of the live model
is ever written to. Where a second copy of the weights is not worth its memory, :class:`Live` reads
the model's own.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import nn

from abacist.policy.kernels import decoding as kernels


class Projection(Protocol):
    """Linear layers that read the same input as one product, their outputs side by side."""

    def __call__(self, x: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor:
        """``x`` [N, in] times the weights, plus the bias, plus ``residual`` [N, out].

        The result may be written over ``residual``.
        """


def projection(*linears: Any) -> Projection:
    """``linears``, plain or with LoRA, that read the same input."""
    return _side_by_side(*_merged(*linears))


def gated(gate: Any, up: Any) -> Callable[[torch.Tensor], torch.Tensor]:
    """silu(gate(x)) · up(x)."""
    weights, biases = _merged(gate, up)
    if kernels.takes(*weights, *biases):
        return kernels.Packed(weights, biases, gated=True)
    both = _side_by_side(weights, biases)

    def fused(x: torch.Tensor) -> torch.Tensor:
        opened, passed = both(x).chunk(2, dim=-1)
        return F.silu(opened) * passed

    return fused


class _Plain:
    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        self.weight, self.bias = weight, bias

    def __call__(self, x: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor:
        if residual is None:
            return F.linear(x, self.weight, self.bias)
        if self.bias is not None:
            residual += self.bias
        return residual.addmm_(x, self.weight.t())


class Live:
    """``linears`` read where they lie, adapters beside them: no copy is made of any weight."""

    def __init__(self, *linears: Any) -> None:
        self._linears = linears

    def __call__(self, x: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor:
        found = [_product(x, linear) for linear in self._linears]
        y = torch.cat(found, dim=-1) if len(found) > 1 else found[0]
        return y if residual is None else residual.add_(y)


def live_gated(gate: Any, up: Any) -> Callable[[torch.Tensor], torch.Tensor]:
    """:func:`gated` by :class:`Live`."""
    return lambda x: F.silu(_product(x, gate)).mul_(_product(x, up))


def _side_by_side(weights: list[torch.Tensor], biases: list[torch.Tensor | None]) -> Projection:
    if kernels.takes(*weights, *biases):
        return kernels.Packed(weights, biases)
    weight = torch.cat(weights) if len(weights) > 1 else weights[0]
    bias = None
    if any(one is not None for one in biases):
        both = zip(weights, biases, strict=True)
        bias = torch.cat([w.new_zeros(len(w)) if b is None else b for w, b in both])
    return _Plain(weight, bias)


def _merged(*linears: Any) -> tuple[list[torch.Tensor], list[torch.Tensor | None]]:
    """Weights and biases of ``linears`` with their active adapters in them."""
    merged = [_merged_one(linear) for linear in linears]
    return [weight for weight, _ in merged], [bias for _, bias in merged]


def _merged_one(linear: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Weight and bias of ``linear`` with its active adapters in it, the sum taken in float32."""
    weight, bias = _base(linear)
    if adapters := _adapters(linear):
        total = weight.float()
        for inner, outer, scale in adapters:
            total = torch.addmm(total, outer, inner, alpha=scale)
        weight = total.to(weight.dtype)
    return weight, bias


def _product(x: torch.Tensor, linear: Any) -> torch.Tensor:
    """``x`` [N, in] through ``linear`` with its active adapters, [N, out]."""
    weight, bias = _base(linear)
    y = F.linear(x, weight, bias)
    for inner, outer, scale in _adapters(linear):
        y += F.linear(F.linear(x.float(), inner), outer).mul_(scale).to(y.dtype)
    return y


def _base(linear: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
    base = linear if type(linear) is nn.Linear else linear.base_layer
    return base.weight.detach(), None if base.bias is None else base.bias.detach()


def _adapters(linear: Any) -> list[tuple[torch.Tensor, torch.Tensor, float]]:
    """A [R, in], B [out, R] and the scale of each adapter that is not in the weight already."""
    if type(linear) is nn.Linear or linear.disable_adapters or linear.merged:
        return []
    return [
        (
            linear.lora_A[name].weight.detach().float(),
            linear.lora_B[name].weight.detach().float(),
            linear.scaling[name],
        )
        for name in linear.active_adapters
        if name in linear.lora_A
    ]
