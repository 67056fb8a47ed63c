"""Linear layers and LoRA: matrix products by the fastest library at hand, in few passes.

On a CPU in float32 the product is our own kernel: PyTorch's reaches half of what some processors
can do, and oneDNN's compiles anew for every shape, of which every training step has a new one.
PEFT's LoRA layer makes seven passes over its activations (two small products, a scale, an
addition, casts); :func:`call_linear` makes two, and keeps less for the backward pass. The tests
compare values and gradients with PyTorch's and PEFT's.

Shape suffixes: N tokens, I inputs, O outputs, R rank of the adapter.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from peft.tuners.lora.layer import Linear as LoraLinear
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from abacist.policy import integrity
from abacist.policy.families import FastPart, compute_dtype, unsupported_linear
from abacist.policy.kernels import build as kernels
from abacist.policy.kernels.multiply import multiply

LowRank = tuple[Tensor, Tensor]
"""[N, R] and [O, R], whose product, the second transposed, is added: all of one dtype."""


def product(
    x_NI: Tensor, weight_OI: Tensor, bias_O: Tensor | None = None, low_rank: LowRank | None = None
) -> Tensor:
    """``x`` times ``weight`` transposed, plus ``bias``: [N, O]; without autograd.

    ``weight`` may be bfloat16 where ``kernels.widens`` it and ``x`` is float32.
    """
    if kernels.supports(x_NI) and kernels.supports_weight(weight_OI):
        return multiply(x_NI, weight_OI, bias_O, low_rank=low_rank)
    y_NO = F.linear(x_NI, weight_OI, bias_O)
    return y_NO if low_rank is None else product_added(*low_rank, y_NO)


def product_added(
    x_NI: Tensor, weight_OI: Tensor, to_NO: Tensor, low_rank: LowRank | None = None
) -> Tensor:
    """:func:`product` plus ``to``, in one pass; ``to`` is overwritten with the result."""
    if kernels.supports(x_NI, to_NO) and kernels.supports_weight(weight_OI):
        return multiply(x_NI, weight_OI, to=to_NO, low_rank=low_rank)
    to_NO.addmm_(x_NI, weight_OI.t())
    return to_NO if low_rank is None else product_added(*low_rank, to_NO)


def weight_in(dtype: torch.dtype, weight: Tensor) -> Tensor:
    """``weight`` for a :func:`product` in ``dtype``: cast, unless our kernels widen it."""
    return weight if dtype == torch.float32 and kernels.widens(weight) else weight.to(dtype)


def call_linear(module: nn.Module, x: Tensor) -> Tensor:
    """``module(x)``, with autograd: in fewer passes for LoRA, by our kernel for a plain layer.

    ``x`` is [..., I]. Whatever else ``module`` is (an adapter with dropout, a hook) is called.
    """
    x_NI, dtype = x.reshape(-1, x.shape[-1]), compute_dtype(x)
    if type(module) is nn.Linear and _is_for_kernel(module, x_NI):
        y_NO: Tensor = _Linear.apply(x_NI, module.weight, module.bias)
    elif (
        type(module) is LoraLinear
        and not any(map(integrity.is_changed, (module, module.base_layer)))
        and unsupported_linear(module, FastPart.LORA_PRODUCTS, dtype) is None
    ):
        with torch.autocast(x.device.type, enabled=False):
            y_NO = call_fused(x_NI, FusedLinear.of(module, dtype))
    else:
        called: Tensor = module(x)
        return called
    return y_NO.view(*x.shape[:-1], y_NO.shape[-1])


def _is_for_kernel(module: nn.Linear, x: Tensor) -> bool:
    return (
        not torch.is_autocast_enabled(x.device.type)
        and kernels.supports(x, module.weight)
        and not integrity.is_changed(module)
    )


@dataclass(frozen=True, slots=True)
class FusedLinear:
    """``x W' + b + s (x A') B'``: frozen W [O, I] and b; A [R, I] and B [O, R] may be trained.

    Without autograd: a backward of ours calls :meth:`gradients`. Computed in ``dtype``. ``inner``
    is A and ``outer`` B; both None: a frozen linear layer.
    """

    weight: Tensor
    bias: Tensor | None
    inner: Tensor | None
    outer: Tensor | None
    scale: float
    dtype: torch.dtype

    @classmethod
    def of(cls, module: Any, dtype: torch.dtype) -> FusedLinear:
        """``module``, plain or LoRA, as it is set now; ``unsupported_linear`` must be None."""
        if not isinstance(module, LoraLinear):
            return cls(module.weight, module.bias, None, None, 0.0, dtype)
        base: Any = module.base_layer
        names = [name for name in module.active_adapters if name in module.lora_A]
        if module.disable_adapters or not names:
            return cls(base.weight, base.bias, None, None, 0.0, dtype)
        (name,) = names
        inner: Any = module.lora_A[name]
        outer: Any = module.lora_B[name]
        return cls(base.weight, base.bias, inner.weight, outer.weight, module.scaling[name], dtype)

    def __call__(self, x: Tensor) -> Tensor:
        """[N, I] -> [N, O]."""
        x, bias = x.to(self.dtype), None if self.bias is None else self.bias.to(self.dtype)
        low_rank = None
        if self.inner is not None and self.outer is not None:
            low_rank = (self._inner_product(x), self.outer.to(self.dtype))
        return product(x, weight_in(self.dtype, self.weight), bias, low_rank)

    def gradients(
        self, grad: Tensor, x: Tensor, *, by_x: bool = True, to: Tensor | None = None
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Gradients with respect to ``x``, A and B, from that of the output, [N, O].

        The gradient of ``x`` is added to ``to``, in the dtype of ``x``, where ``to`` is given.
        ``x A'`` is not kept by the forward: with R numbers a token it is cheap to compute again.
        """
        grad, back, x_dtype = grad.to(self.dtype), weight_in(self.dtype, self.weight).t(), x.dtype
        x = x.to(self.dtype)
        if self.inner is None or self.outer is None:
            return (self._added(grad, back, None, to, x_dtype) if by_x else None), None, None
        inner, outer = self.inner.to(self.dtype), self.outer.to(self.dtype)
        grad_NR = product(grad, outer.t()).mul_(self.scale)
        grad_x = self._added(grad, back, (grad_NR, inner.t()), to, x_dtype) if by_x else None
        # The narrow factor first: of the two, that one is copied when it is transposed.
        grad_outer = product(self._inner_product(x).t(), grad.t()).t()
        grad_inner = product(grad_NR.t(), x.t())
        return grad_x, grad_inner.to(self.inner.dtype), grad_outer.to(self.outer.dtype)

    def _added(
        self,
        x: Tensor,
        weight: Tensor,
        low_rank: LowRank | None,
        to: Tensor | None,
        dtype: torch.dtype,
    ) -> Tensor:
        """``x`` times ``weight`` transposed, plus ``low_rank`` and ``to``, in ``dtype``."""
        if dtype != self.dtype:
            total = product(x, weight).to(dtype) if to is None else to.add_(product(x, weight))
            return total if low_rank is None else total.add_(product(*low_rank))
        if to is None:
            return product(x, weight, low_rank=low_rank)
        return product_added(x, weight, to, low_rank)

    def _inner_product(self, x: Tensor) -> Tensor:
        assert self.inner is not None
        return product(x, self.inner.to(self.dtype)).mul_(self.scale)


def call_fused(x_NI: Tensor, linear: FusedLinear) -> Tensor:
    """``linear(x)`` [N, O] with autograd."""
    y_NO: Tensor = _Lora.apply(x_NI, linear.inner, linear.outer, linear)
    return y_NO


class _Linear(torch.autograd.Function):
    """``x W' + b`` on a CPU in float32."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(weight, x if weight.requires_grad else None)
        return product(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        weight, x = ctx.saved_tensors
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad
        return (
            product(grad, weight.t()) if needs_x else None,
            product(grad.t(), x.t()) if needs_weight else None,
            grad.sum(0) if needs_bias else None,
        )


class _Lora(torch.autograd.Function):
    """``linear(x)``; its ``inner`` and ``outer`` are arguments so that autograd sees them."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, inner: Tensor | None, outer: Tensor | None, linear: FusedLinear
    ) -> Tensor:
        ctx.linear = linear
        ctx.save_for_backward(x)
        return linear(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (x,) = ctx.saved_tensors
        grad_x, grad_inner, grad_outer = ctx.linear.gradients(grad, x, by_x=ctx.needs_input_grad[0])
        return grad_x, grad_inner, grad_outer, None
