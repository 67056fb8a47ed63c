"""Matrix products by the fastest library at hand, and LoRA in as few passes as it needs.

On a CPU in float32 PyTorch multiplies by MKL, which on some processors (AMD's among them) uses half
of what the machine can do; oneDNN, which PyTorch carries too, uses all of it. PEFT's LoRA
layer makes seven passes over its activations (two small products, a scale, an addition, casts);
:func:`fuse_linears` lets the same layer do it in three, keeping less for the backward pass. Both
compute what they stand in for: the tests hold values and gradients against it.

Shapes: N tokens, I inputs, O outputs, R the rank of the adapter.
"""

from __future__ import annotations

import types
from typing import Any

import torch
import torch.nn.functional as F
from peft.tuners.lora.layer import Linear as LoraLinear
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


def has_onednn(like: Tensor) -> bool:
    """Whether oneDNN's products take ``like``: not public API, so each call asks for it."""
    return (
        like.device.type == "cpu"
        and like.dtype == torch.float32
        and torch.backends.mkldnn.is_available()
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    )


def product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``x`` [N, I] times ``weight`` [O, I] transposed, plus ``bias``; no autograd."""
    if has_onednn(x) and x.numel() and weight.dtype == x.dtype:
        found: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
        return found
    return F.linear(x, weight, bias)


def product_added(x: Tensor, weight: Tensor, to: Tensor) -> Tensor:
    """:func:`product` plus ``to`` [N, O], in one pass; ``to`` is used up."""
    if has_onednn(x) and x.numel():
        found: Tensor = torch.ops.mkldnn._linear_pointwise.binary(x, to, weight, None, "add")
        return found
    return to.addmm_(x, weight.t())


def filler_tokens(tokens: int) -> int:
    """How many tokens of nothing bring a packed batch to a size that has been met before.

    oneDNN compiles a product for each new shape, which costs about as much as one small product;
    packed batches are of another size in every step. So sizes go in steps of at most a sixteenth.

    >>> [n + filler_tokens(n) for n in (3, 450, 3000, 3010)]
    [32, 480, 3072, 3072]
    """
    return -tokens % max(32, 2 ** (tokens.bit_length() - 5))


def fuse_linears(model: nn.Module) -> None:
    """Give the linear layers of ``model`` a forward that computes the same in fewer passes.

    The new forward stands on the instance and asks at every call whether it applies: adapters
    may be switched off, merged or changed, and then PEFT's own runs. It stays for as long as the
    model does: a checkpointed layer is run once more in the backward pass, and must then
    keep the same tensors as it did before.
    """
    for module in model.modules():
        if type(module) is LoraLinear:
            module.forward = types.MethodType(_lora_forward, module)  # type: ignore[assignment]
        elif type(module) is nn.Linear and has_onednn(module.weight):
            module.forward = types.MethodType(_linear_forward, module)  # type: ignore[assignment]


def _linear_forward(self: nn.Linear, x: Tensor) -> Tensor:
    if torch.is_autocast_enabled("cpu") or not (has_onednn(x) and has_onednn(self.weight)):
        return F.linear(x, self.weight, self.bias)
    flat = x.reshape(-1, x.shape[-1])
    y: Tensor = _Linear.apply(flat, self.weight, self.bias)
    return y.view(*x.shape[:-1], y.shape[-1])


def _lora_forward(self: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    adapters = [name for name in self.active_adapters if name in self.lora_A]
    if self.disable_adapters or self.merged or args or kwargs or len(adapters) != 1:
        return LoraLinear.forward(self, x, *args, **kwargs)
    (name,) = adapters
    base, inner, outer = self.base_layer, self.lora_A[name], self.lora_B[name]
    device = x.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
    is_plain = (
        type(base) is nn.Linear
        and not base.weight.requires_grad
        and (base.bias is None or not base.bias.requires_grad)
        and inner.bias is None
        and outer.bias is None
        and name not in self.lora_variant
        and (not self.training or isinstance(self.lora_dropout[name], nn.Identity))
        # Without autocast PEFT casts between the dtypes of base and adapter; that stays its own.
        and (dtype != x.dtype or {base.weight.dtype, inner.weight.dtype} == {dtype})
    )
    if not is_plain:
        return LoraLinear.forward(self, x)
    with torch.autocast(device, enabled=False):
        flat = x.reshape(-1, x.shape[-1])
        y: Tensor = _Lora.apply(
            flat, base.weight, base.bias, inner.weight, outer.weight, self.scaling[name], dtype
        )
    return y.view(*x.shape[:-1], y.shape[-1])


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
    """``x W' + b + s (x A') B'`` with a frozen W [O, I] and b; A [R, I] and B [O, R] learn.

    Of the activations only ``x`` is kept: ``x A'`` is R numbers a token and quickly made again.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        inner: Tensor,
        outer: Tensor,
        scale: float,
        dtype: torch.dtype,
    ) -> Tensor:
        ctx.scale, ctx.dtype, ctx.grad_dtypes = scale, dtype, (x.dtype, inner.dtype, outer.dtype)
        x, weight, inner, outer = (t.to(dtype) for t in (x, weight, inner, outer))
        ctx.save_for_backward(x, weight, inner, outer)
        within = product(x, inner).mul_(scale)
        return product_added(
            within, outer, product(x, weight, None if bias is None else bias.to(dtype))
        )

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, inner, outer = ctx.saved_tensors
        of_x, of_inner, of_outer = (ctx.needs_input_grad[at] for at in (0, 3, 4))
        x_dtype, inner_dtype, outer_dtype = ctx.grad_dtypes
        grad = grad.to(ctx.dtype)
        grad_within = product(grad, outer.t()).mul_(ctx.scale)  # [N, R]
        grad_x = grad_inner = grad_outer = None
        if of_x:
            grad_x = product_added(grad_within, inner.t(), product(grad, weight.t())).to(x_dtype)
        if of_inner:
            grad_inner = product(grad_within.t(), x.t()).to(inner_dtype)
        if of_outer:
            within = product(x, inner).mul_(ctx.scale)
            # The narrow factor first: that one is copied when it is transposed.
            grad_outer = product(within.t(), grad.t()).t().to(outer_dtype)
        return grad_x, None, None, grad_inner, grad_outer, None, None
