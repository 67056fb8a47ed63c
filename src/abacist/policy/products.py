"""Matrix products by the fastest library at hand, and LoRA in as few passes as it needs.

On a CPU in float32 that is our own kernel: PyTorch's product uses half of what some processors can
do, and oneDNN's compiles anew for every shape, of which a training step has another one each
time. PEFT's LoRA layer makes seven passes over its activations (two small products, a scale, an
addition, casts); :func:`fuse_linears` lets the same layer do it in three, keeping less for the
backward pass. Both compute what they stand in for: the tests hold values and gradients against it.

Shapes: N tokens, I inputs, O outputs, R the rank of the adapter.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from peft.tuners.lora.layer import Linear as LoraLinear
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from abacist.policy import instances
from abacist.policy.kernels import build as kernels
from abacist.policy.kernels.multiply import multiply


def product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``x`` [N, I] times ``weight`` [O, I] transposed, plus ``bias``; no autograd."""
    if kernels.supports(x, weight):
        return multiply(x, weight, bias)
    return F.linear(x, weight, bias)


def product_added(x: Tensor, weight: Tensor, to: Tensor) -> Tensor:
    """:func:`product` plus ``to`` [N, O], in one pass; ``to`` is used up."""
    if kernels.supports(x, weight, to):
        return multiply(x, weight, to=to)
    return to.addmm_(x, weight.t())


def fuse_linears(model: nn.Module) -> None:
    """Give the linear layers of ``model`` a forward that computes the same in fewer passes.

    The new forward stands on the instance and asks at every call whether it applies: adapters
    may be switched off, merged or changed, and then PEFT's own runs. It stays for as long as the
    model does: a checkpointed layer is run once more in the backward pass, and must then
    keep the same tensors as it did before.
    """
    for module in model.modules():
        if type(module) is LoraLinear:
            instances.stand_in(module, _lora_forward)
        elif type(module) is nn.Linear and kernels.supports(module.weight):
            instances.stand_in(module, _linear_forward)


def _linear_forward(self: nn.Linear, x: Tensor) -> Tensor:
    if torch.is_autocast_enabled("cpu") or not kernels.supports(x, self.weight):
        return F.linear(x, self.weight, self.bias)
    flat = x.reshape(-1, x.shape[-1])
    y: Tensor = _Linear.apply(flat, self.weight, self.bias)
    return y.view(*x.shape[:-1], y.shape[-1])


def _lora_forward(self: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    found = None if args or kwargs else adapted(self, x)
    if found is None or found.inner is None:
        return LoraLinear.forward(self, x, *args, **kwargs)
    with torch.autocast(x.device.type, enabled=False):
        y = linear(x.reshape(-1, x.shape[-1]), found)
    return y.view(*x.shape[:-1], y.shape[-1])


@dataclass(frozen=True, slots=True)
class Adapted:
    """``x W' + b + s (x A') B'`` with a frozen W [O, I] and b; A [R, I] and B [O, R] may learn.

    No autograd: :meth:`gradients` is what a backward asks for. Computed in ``dtype``. Without A
    and B it is a frozen linear layer.
    """

    weight: Tensor
    bias: Tensor | None
    inner: Tensor | None
    outer: Tensor | None
    scale: float
    dtype: torch.dtype

    def __call__(self, x: Tensor) -> Tensor:
        """[N, I] -> [N, O]."""
        x, bias = x.to(self.dtype), None if self.bias is None else self.bias.to(self.dtype)
        y = product(x, self.weight.to(self.dtype), bias)
        if self.inner is None or self.outer is None:
            return y
        return product_added(self._within(x), self.outer.to(self.dtype), y)

    def gradients(
        self, grad: Tensor, x: Tensor, *, by_x: bool = True, to: Tensor | None = None
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """The gradients by ``x`` (added to ``to``, which is used up), by A and by B.

        Of the activations only ``x`` is asked for: ``x A'`` is R numbers a token and quickly made
        again. What is added up for ``x`` is added up in its own dtype.
        """
        grad, back, x_dtype = grad.to(self.dtype), self.weight.to(self.dtype).t(), x.dtype
        x = x.to(self.dtype)
        grad_x = self._added(grad, back, to, x_dtype) if by_x else None
        if self.inner is None or self.outer is None:
            return grad_x, None, None
        inner, outer = self.inner.to(self.dtype), self.outer.to(self.dtype)
        grad_within = product(grad, outer.t()).mul_(self.scale)  # [N, R]
        if grad_x is not None:
            grad_x = self._added(grad_within, inner.t(), grad_x, x_dtype)
        # The narrow factor first: that one is copied when it is transposed.
        grad_outer = product(self._within(x).t(), grad.t()).t()
        grad_inner = product(grad_within.t(), x.t())
        return grad_x, grad_inner.to(self.inner.dtype), grad_outer.to(self.outer.dtype)

    def _added(self, x: Tensor, weight: Tensor, to: Tensor | None, dtype: torch.dtype) -> Tensor:
        """``x`` times ``weight`` transposed, plus ``to``, in ``dtype``."""
        if to is None:
            return product(x, weight).to(dtype)
        return product_added(x, weight, to) if dtype == self.dtype else to.add_(product(x, weight))

    def _within(self, x: Tensor) -> Tensor:
        assert self.inner is not None
        return product(x, self.inner.to(self.dtype)).mul_(self.scale)


def linear(x: Tensor, layer: Adapted) -> Tensor:
    """``layer`` of ``x`` [N, I], with autograd."""
    y: Tensor = _Lora.apply(x, layer.inner, layer.outer, layer)
    return y


def adapted(linear: Any, x: Tensor) -> Adapted | None:
    """What ``linear`` computes of ``x`` as it is set now; None if that is more than LoRA."""
    device = x.device.type
    autocasts = torch.is_autocast_enabled(device)
    dtype = torch.get_autocast_dtype(device) if autocasts else x.dtype
    is_lora = type(linear) is LoraLinear
    base = linear.base_layer if is_lora else linear
    if type(base) is not nn.Linear or base.weight.requires_grad:
        return None
    if is_lora and instances.is_changed(base):
        return None
    if base.bias is not None and base.bias.requires_grad:
        return None
    # Without autocast PEFT casts between the dtypes of base and adapter; that stays its own.
    if not autocasts and base.weight.dtype != dtype:
        return None
    names = [name for name in linear.active_adapters if name in linear.lora_A] if is_lora else []
    if not names or linear.disable_adapters:
        if is_lora and linear.merged:
            return None
        return Adapted(base.weight, base.bias, None, None, 0.0, dtype)
    if linear.merged or len(names) != 1:
        return None
    (name,) = names
    inner, outer = linear.lora_A[name], linear.lora_B[name]
    is_plain = (
        not any(type(one) is not nn.Linear or instances.is_changed(one) for one in (inner, outer))
        and inner.bias is None
        and outer.bias is None
        and name not in linear.lora_variant
        and (not linear.training or isinstance(linear.lora_dropout[name], nn.Identity))
        and (autocasts or inner.weight.dtype == dtype)
    )
    if not is_plain:
        return None
    scale: float = linear.scaling[name]
    return Adapted(base.weight, base.bias, inner.weight, outer.weight, scale, dtype)


class _Linear(torch.autograd.Function):
    """``x W' + b`` on a CPU in float32."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        learns = weight.requires_grad
        ctx.save_for_backward(weight, x if learns else None)
        return product(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        weight, x = ctx.saved_tensors
        of_x, of_weight, of_bias = ctx.needs_input_grad
        return (
            product(grad, weight.t()) if of_x else None,
            product(grad.t(), x.t()) if of_weight else None,
            grad.sum(0) if of_bias else None,
        )


class _Lora(torch.autograd.Function):
    """``layer`` of ``x``; ``inner`` and ``outer`` are its own, named for autograd."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, inner: Tensor | None, outer: Tensor | None, layer: Adapted
    ) -> Tensor:
        ctx.layer = layer
        ctx.save_for_backward(x)
        return layer(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (x,) = ctx.saved_tensors
        by_x, by_inner, by_outer = ctx.layer.gradients(grad, x, by_x=ctx.needs_input_grad[0])
        return by_x, by_inner, by_outer, None
