"""Linear layers and LoRA: matrix products by the fastest library at hand, in few passes.

On a CPU in float32 the product is our own kernel: PyTorch's reaches half of what some processors
can do, and oneDNN's compiles anew for every shape, of which every training step has a new one.
PEFT's LoRA layer makes seven passes over its activations (two small products, a scale, an
addition, casts); here there are two, and less is kept for the backward pass. The tests compare
values and gradients with PyTorch's and PEFT's.

Shape suffixes: N tokens, I inputs, O outputs, R rank of the adapter.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, overload

import torch
import torch.nn.functional as F
from peft.tuners.lora.layer import Linear as LoraLinear
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from abacist.policy import integrity, mxint8
from abacist.policy.families import FastPart, compute_dtype, unsupported_linear
from abacist.policy.kernels import build as kernels
from abacist.policy.kernels.blocks import Blocks, Weight
from abacist.policy.kernels.multiply import multiply

LowRank = tuple[Tensor, Tensor]
"""[N, R] and [O, R] in the dtype of ``x``; their product, the second transposed, is added."""


def product(
    x_NI: Tensor, weight_OI: Weight, bias_O: Tensor | None = None, low_rank: LowRank | None = None
) -> Tensor:
    """``x`` times ``weight`` transposed, plus ``bias``: [N, O]; without autograd.

    ``weight`` may be in bfloat16 or 8 bits where ``kernels.widens`` it and ``x`` is float32.
    """
    if kernels.supports(x_NI) and kernels.supports_weight(weight_OI):
        return multiply(x_NI, weight_OI, bias_O, low_rank=low_rank)
    assert isinstance(weight_OI, Tensor)
    y_NO = F.linear(x_NI, weight_OI, bias_O)
    return y_NO if low_rank is None else product_added(*low_rank, y_NO)


def product_added(
    x_NI: Tensor, weight_OI: Weight, to_NO: Tensor, low_rank: LowRank | None = None
) -> Tensor:
    """:func:`product` plus ``to``, in one pass; ``to`` is overwritten with the result."""
    if kernels.supports(x_NI, to_NO) and kernels.supports_weight(weight_OI):
        return multiply(x_NI, weight_OI, to=to_NO, low_rank=low_rank)
    assert isinstance(weight_OI, Tensor)
    to_NO.addmm_(x_NI, weight_OI.t())
    return to_NO if low_rank is None else product_added(*low_rank, to_NO)


@overload
def weight_in(dtype: torch.dtype, weight: Tensor) -> Tensor: ...
@overload
def weight_in(dtype: torch.dtype, weight: Weight) -> Weight: ...
def weight_in(dtype: torch.dtype, weight: Weight) -> Weight:
    """``weight`` for a :func:`product` in ``dtype``: cast, unless our kernels widen it."""
    if dtype == torch.float32 and kernels.widens(weight):
        return weight
    return weight.dense(dtype) if isinstance(weight, Blocks) else weight.to(dtype)


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
            y_NO = call_fused(x_NI, FusedLinears.of(dtype, module))
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

    Computed in ``dtype``. ``inner`` is A and ``outer`` B; both None: a frozen linear layer.
    """

    weight: Weight
    bias: Tensor | None
    inner: Tensor | None
    outer: Tensor | None
    scale: float
    dtype: torch.dtype

    @classmethod
    def of(cls, module: Any, dtype: torch.dtype) -> FusedLinear:
        """``module``, plain or LoRA, as it is set now; ``unsupported_linear`` must be None."""
        if not isinstance(module, LoraLinear):
            return cls(mxint8.weight_of(module), module.bias, None, None, 0.0, dtype)
        base: Any = module.base_layer
        weight = mxint8.weight_of(base)
        names = [name for name in module.active_adapters if name in module.lora_A]
        if module.disable_adapters or not names:
            return cls(weight, base.bias, None, None, 0.0, dtype)
        (name,) = names
        inner: Any = module.lora_A[name]
        outer: Any = module.lora_B[name]
        return cls(weight, base.bias, inner.weight, outer.weight, module.scaling[name], dtype)

    @property
    def ranks(self) -> int:
        """R; 0 without an adapter."""
        return 0 if self.inner is None else len(self.inner)


class FusedLinears:
    """Linear layers of one input, such as query, key and value; without autograd.

    What concerns the input alone is done once for all: one product with their A, and one for the
    gradients of their A. Shape suffix: S the sum of their ranks.
    """

    def __init__(self, *linears: FusedLinear) -> None:
        self.linears = linears
        self.dtype = linears[0].dtype

    @classmethod
    def of(cls, dtype: torch.dtype, *modules: Any) -> FusedLinears:
        """:meth:`FusedLinear.of` each of ``modules``."""
        return cls(*(FusedLinear.of(module, dtype) for module in modules))

    @property
    def trained(self) -> list[Tensor | None]:
        """A and B of each, None where it has none: the order of :meth:`gradients`."""
        return [weight for linear in self.linears for weight in (linear.inner, linear.outer)]

    def __call__(self, x: Tensor) -> tuple[list[Tensor], Tensor | None]:
        """The outputs [N, O] for ``x`` [N, I], and ``s x A'`` [N, S] of all; None without any."""
        x = x.to(self.dtype)
        inners = [
            linear.inner.to(self.dtype) for linear in self.linears if linear.inner is not None
        ]
        inner_NS = product(x, torch.cat(inners)) if inners else None
        outputs = []
        for linear, inner_NR in zip(self.linears, self._split(inner_NS), strict=True):
            bias = None if linear.bias is None else linear.bias.to(self.dtype)
            low_rank = None
            if inner_NR is not None and linear.outer is not None:
                low_rank = (inner_NR.mul_(linear.scale), linear.outer.to(self.dtype))
            outputs.append(product(x, weight_in(self.dtype, linear.weight), bias, low_rank))
        return outputs, inner_NS

    def gradients(
        self,
        grads: Sequence[Tensor],
        x: Tensor,
        inner_NS: Tensor | None,
        *,
        by_x: bool = True,
    ) -> tuple[Tensor | None, list[Tensor | None]]:
        """Gradients with respect to ``x``, in its dtype, and to A and B of each linear.

        ``grads`` are those of the outputs, and ``inner_NS`` is what came with these. The gradients
        of the A are parts of one tensor.
        """
        grad_x, x_dtype, x = None, x.dtype, x.to(self.dtype)
        grad_inners: list[Tensor] = []
        of_outers: list[Tensor | None] = []
        for linear, grad, inner_NR in zip(self.linears, grads, self._split(inner_NS), strict=True):
            grad, low_rank, of_outer = grad.to(self.dtype), None, None
            if inner_NR is not None and linear.inner is not None and linear.outer is not None:
                grad_NR = product(grad, linear.outer.to(self.dtype).t()).mul_(linear.scale)
                low_rank = (grad_NR, linear.inner.to(self.dtype).t())
                grad_inners.append(grad_NR)
                # The narrow factor first: of the two, that one is copied when it is transposed.
                of_outer = product(inner_NR.t(), grad.t()).t()
            of_outers.append(of_outer)
            if by_x:
                back = weight_in(self.dtype, linear.weight).t()
                grad_x = self._added(grad, back, low_rank, grad_x, x_dtype)
        together = product(torch.cat(grad_inners, 1).t(), x.t()) if grad_inners else None
        pairs = zip(self._split(together, dim=0), of_outers, strict=True)
        of_trained = [grad for pair in pairs for grad in pair]
        return grad_x, [
            None if weight is None or grad is None else grad.to(weight.dtype)
            for weight, grad in zip(self.trained, of_trained, strict=True)
        ]

    def _added(
        self,
        x: Tensor,
        weight: Weight,
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

    def _split(self, together: Tensor | None, dim: int = 1) -> list[Tensor | None]:
        """The part of each linear, None where it has no adapter."""
        if together is None:
            return [None] * len(self.linears)
        parts = together.split([linear.ranks for linear in self.linears], dim)
        return [
            part if linear.ranks else None for linear, part in zip(self.linears, parts, strict=True)
        ]


def call_fused(x_NI: Tensor, linear: FusedLinears) -> Tensor:
    """The one output [N, O] of ``linear`` with autograd."""
    y_NO: Tensor = _Lora.apply(x_NI, linear, *linear.trained)
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
    """One linear; what it trains are arguments so that autograd sees them."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, linear: FusedLinears, *_: Tensor | None) -> Tensor:
        (y,), inner_x = linear(x)
        ctx.linear = linear
        ctx.save_for_backward(x, inner_x)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        x, inner_x = ctx.saved_tensors
        by_x = ctx.needs_input_grad[0]
        grad_x, of_trained = ctx.linear.gradients([grad], x, inner_x, by_x=by_x)
        return grad_x, None, *of_trained
