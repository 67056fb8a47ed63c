"""The matrix products of the lean network: adapters merged, laid out for the fastest at hand.

On a CPU in float32 that is our own kernel (:mod:`abacist.policy.kernels`), made for the few dozen
rows of decoding; else PyTorch's own product. Merging makes fresh tensors; nothing of the live model
is ever written to.
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
    if type(linear) is nn.Linear:
        return linear.weight.detach(), None if linear.bias is None else linear.bias.detach()
    base = linear.base_layer
    weight = base.weight.detach()
    # Adapters that PEFT has merged already are in the weight.
    active = [name for name in linear.active_adapters if name in linear.lora_A]
    if not linear.disable_adapters and not linear.merged and active:
        total = weight.float()
        for name in active:
            outer = linear.lora_B[name].weight.detach().float()
            inner = linear.lora_A[name].weight.detach().float()
            total = torch.addmm(total, outer, inner, alpha=linear.scaling[name])
        weight = total.to(weight.dtype)
    return weight, None if base.bias is None else base.bias.detach()
