"""Bases whose linear layers are held in 8 bits on a CPU: MXINT8, see ``kernels.blocks``.

Weights are rounded once, when the model is loaded. From then on they are as exact as any weights in
bfloat16: what decodes, scores and trains multiplies by the same numbers, at half the memory.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable

from abacist.errors import ModelError
from abacist.policy.kernels import build
from abacist.policy.kernels.blocks import BLOCK, Blocks, Weight
from abacist.policy.kernels.multiply import multiply


class Linear(nn.Linear):
    """A frozen linear layer whose ``weight`` holds codes and exponents; see :attr:`blocks`."""

    def __init__(self, blocks: Blocks, bias: nn.Parameter | None) -> None:
        outputs, inputs = blocks.shape
        super().__init__(inputs, outputs, bias=False, device="meta")
        self.weight = nn.Parameter(blocks.rows, requires_grad=False)
        if bias is not None:
            self.bias = bias

    @property
    def blocks(self) -> Blocks:
        """The weight [O, I]."""
        return Blocks(self.weight.detach())

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """``input`` [..., I] times the weight, plus the bias, in its dtype: [..., O]."""
        bias = None if self.bias is None else self.bias.to(input.dtype)
        product: torch.Tensor = _Product.apply(input, self.blocks)
        return product if bias is None else product + bias


class _Product(torch.autograd.Function):
    """``x W'``, keeping no copy of W in other numbers."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, blocks: Blocks) -> torch.Tensor:
        ctx.blocks = blocks
        return _product(x, blocks)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        return _product(grad, ctx.blocks.t()), None


def _product(x: torch.Tensor, blocks: Blocks) -> torch.Tensor:
    if build.widens(blocks) and x.device.type == "cpu":
        flat = multiply(x.reshape(-1, x.shape[-1]).float(), blocks)
        return flat.view(*x.shape[:-1], len(blocks)).to(x.dtype)
    with torch.autocast(x.device.type, enabled=False):
        return F.linear(x, blocks.dense(x.dtype))


def hold_in_blocks(network: Any, dtype: torch.dtype) -> None:
    """Hold the linear layers of ``network``, a transformers model, in 8 bits, except its head.

    All other weights are held in ``dtype``, also those of a layer whose inputs are no whole blocks.
    Raises ModelError if there is no layer to hold so, or if a weight is NaN or infinite.
    """
    _replace(network, dtype, lambda linear, blocks: Linear(blocks, linear.bias))
    # The weights were mapped from their file, whose pages stay in memory as long as one is left.
    for weight in (*network.parameters(), *network.buffers()):
        if weight.dtype != torch.uint8:
            weight.data = weight.data.clone()


def round_weights(network: Any, dtype: torch.dtype) -> None:
    """Round the same layers to the same numbers, and hold them in ``dtype``. Raises the same."""

    def rounded(linear: nn.Linear, blocks: Blocks) -> nn.Linear:
        linear.weight.data = blocks.dense(dtype)
        return linear

    _replace(network, dtype, rounded)


def _replace(
    network: Any, dtype: torch.dtype, new: Callable[[nn.Linear, Blocks], nn.Linear]
) -> None:
    head, count = network.get_output_embeddings(), 0
    for path, module in list(network.named_modules()):
        for name, child in list(module.named_children()):
            if type(child) is not nn.Linear or child is head or child.in_features % BLOCK:
                continue
            if not torch.isfinite(child.weight).all():
                raise ModelError(
                    f"The weights hold numbers that are not finite (first in {path}.{name}).",
                    "The copy is damaged or was trained into NaN: fetch it again.",
                )
            setattr(module, name, new(child, Blocks.of(child.weight)))
            count += 1
    if not count:
        raise ModelError(
            f"No layer of {type(network).__name__} can be held in 8 bits (MXINT8): it has no plain "
            f"linear layer with a multiple of {BLOCK} inputs.",
            "Leave out --load_in_8bit.",
        )
    for weight in network.parameters():
        if weight.is_floating_point():
            weight.data = weight.data.to(dtype)


def num_exponents(network: nn.Module) -> int:
    """How many of the numbers in the parameters of ``network`` are exponents of blocks."""
    return sum(
        module.weight.numel() - module.in_features * module.out_features
        for module in network.modules()
        if type(module) is Linear
    )


def weight_of(linear: Any) -> Weight:
    """The weight [O, I] of a linear layer, as our kernels multiply by it."""
    return linear.blocks if type(linear) is Linear else linear.weight
