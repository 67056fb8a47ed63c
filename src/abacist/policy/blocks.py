"""The layers of Llama and Qwen2 under LoRA, forward and backward by hand.

Left to autograd, a layer keeps the output of each small step between its products. Here it keeps
what cannot quickly be made again: the states that enter its two halves, queries, keys and
values as they are attended, and what the gate and its companion put out. Norms, rotations and
activations are computed anew in the backward, no product of a frozen weight is. That is fewer
passes over the activations, and a third to a half of their memory. The norm behind the last layer,
whose passes autograd makes where most is kept, is done in one as well.

It applies to the packed batches of :mod:`abacist.policy.scoring`, layer by layer, where all weights
but LoRA's are frozen; every other call takes the layer's own forward.

Shapes: T packed tokens, H numbers of a state, D numbers of a head.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.models.llama.modeling_llama import (
    LlamaDecoderLayer,
    LlamaModel,
)
from transformers.models.qwen2.modeling_qwen2 import Qwen2DecoderLayer, Qwen2Model

from abacist.policy import instances
from abacist.policy.attention import attend
from abacist.policy.kernels import build as kernels
from abacist.policy.kernels import pointwise
from abacist.policy.layout import Layout
from abacist.policy.products import Adapted, adapted, linear

_LAYERS = (LlamaDecoderLayer, Qwen2DecoderLayer)
_BACKBONES = (LlamaModel, Qwen2Model)
_BLOCK_TOKENS = 256
"""What the backward of a gated half takes at once by our kernels, which are as fast on so few."""


def fuse_layers(model: nn.Module) -> None:
    """Give the decoder layers of ``model`` a forward that computes the same in fewer passes.

    As with :func:`abacist.policy.products.fuse_linears`, it asks at every call whether it
    applies, and stays for as long as the model does.
    """
    for module in model.modules():
        if type(module) in _LAYERS:
            instances.stand_in(module, _forward)
        elif type(module) in _BACKBONES:
            instances.stand_in(cast(nn.Module, module.norm), _last_norm)


@dataclass(frozen=True, slots=True)
class _Norm:
    """What goes before the products of a half."""

    weight: Tensor
    epsilon: float


def _last_norm(self: Any, hidden_states: Tensor) -> Tensor:
    if (
        self.weight.requires_grad
        or torch.compiler.is_compiling()
        or not kernels.supports(hidden_states, self.weight)
    ):
        found: Tensor = type(self).forward(self, hidden_states)
        return found
    norm = _Norm(self.weight.detach(), self.variance_epsilon)
    y: Tensor = _Normed.apply(hidden_states.reshape(-1, hidden_states.shape[-1]), norm)
    return y.view_as(hidden_states)


# Up to some version of transformers a layer's __call__ checkpoints, later its class's forward.
_CALL_CHECKPOINTS = "__call__" in vars(GradientCheckpointingLayer)


def _forward(self: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    linears = _linears(self, hidden_states) if "shared_layout" in kwargs else None
    if linears is None:
        found: Tensor = type(self).forward(self, hidden_states, *args, **kwargs)
        return found
    layout, positions = kwargs["shared_layout"], kwargs["position_embeddings"]
    compute = functools.partial(_fused, self, linears, layout, positions)
    if self.gradient_checkpointing and self.training and not _CALL_CHECKPOINTS:
        compute = functools.partial(self._gradient_checkpointing_func, compute)
    return compute(hidden_states)


def _fused(
    layer: Any,
    linears: list[Adapted],
    layout: Layout,
    positions: tuple[Tensor, Tensor],
    hidden_states: Tensor,
) -> Tensor:
    *heads, out, gate, up, down = linears
    attention, mlp = (
        _Norm(norm.weight.detach(), norm.variance_epsilon)
        for norm in (layer.input_layernorm, layer.post_attention_layernorm)
    )
    hidden = hidden_states[0]
    cosines, sines = (table[0] for table in positions)
    size = layer.self_attn.head_dim
    with torch.autocast(hidden.device.type, enabled=False):
        found = _Heads.apply(hidden, attention, cosines, sines, size, heads, *_learning(heads))
    query, key, value = (states.transpose(0, 1)[None] for states in found)
    read = attend(query, key, value, layout, layer.self_attn.scaling)
    with torch.autocast(hidden.device.type, enabled=False):
        hidden = _sum(linear(read[0].flatten(1), out), hidden)
        hidden = _Mlp.apply(hidden, mlp, [gate, up, down], *_learning([gate, up, down]))
    return hidden[None]


def _sum(more: Tensor, hidden: Tensor) -> Tensor:
    """Of both; ``more`` is used up."""
    return more.add_(hidden) if more.dtype == hidden.dtype else hidden + more


def _linears(layer: Any, hidden: Tensor) -> list[Adapted] | None:
    """The seven linear layers of ``layer``; None if it is to compute as it is itself."""
    attention, mlp = layer.self_attn, layer.mlp
    norms = (layer.input_layernorm, layer.post_attention_layernorm)
    if (
        type(mlp.act_fn).__name__ not in ("SiLU", "SiLUActivation")
        or any(norm.weight.requires_grad for norm in norms)
        or any(instances.is_changed(module) for module in layer.modules() if module is not layer)
    ):
        return None
    found = []
    for module in (
        *(attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj),
        *(mlp.gate_proj, mlp.up_proj, mlp.down_proj),
    ):
        one = adapted(module, hidden)
        if one is None:
            return None
        found.append(one)
    return found


def _learning(linears: list[Adapted]) -> list[Tensor | None]:
    """What learns in ``linears``, in the order in which :func:`_flat` gives its gradients."""
    return [weight for one in linears for weight in (one.inner, one.outer)]


def _flat(gradients: list[tuple[Tensor | None, ...]]) -> tuple[Tensor | None, ...]:
    return tuple(grad for _, by_inner, by_outer in gradients for grad in (by_inner, by_outer))


class _Heads(torch.autograd.Function):
    """Queries, keys and values [T, heads, D] as they are attended, from the states before."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        norm: _Norm,
        cosines: Tensor,
        sines: Tensor,
        size: int,
        linears: list[Adapted],
        *_: Tensor | None,
    ) -> tuple[Tensor, ...]:
        ctx.norm, ctx.linears = norm, linears
        ctx.save_for_backward(hidden, cosines, sines)
        normed = pointwise.norm(hidden, norm.weight, norm.epsilon)
        query, key, value = (one(normed).view(len(hidden), -1, size) for one in linears)
        return (
            pointwise.rotary(query, cosines, sines),
            pointwise.rotary(key, cosines, sines),
            value,
        )

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        hidden, cosines, sines = ctx.saved_tensors
        norm, learns = ctx.norm, ctx.needs_input_grad[0]
        of_query, of_key, of_value = (grad.contiguous() for grad in grads)
        of_query, of_key = (
            pointwise.rotary(grad, cosines, sines, direction=-1.0) for grad in (of_query, of_key)
        )
        normed = pointwise.norm(hidden, norm.weight, norm.epsilon)
        total, found = None, []
        for one, grad in zip(ctx.linears, (of_query, of_key, of_value), strict=True):
            found.append(one.gradients(grad.flatten(1), normed, by_x=learns, to=total))
            total = found[-1][0]
        of_hidden = None
        if total is not None:
            of_hidden = torch.zeros_like(hidden)
            pointwise.add_norm_gradient(of_hidden, total, hidden, norm.weight, norm.epsilon)
        return of_hidden, None, None, None, None, None, *_flat(found)


class _Mlp(torch.autograd.Function):
    """The states [T, H] and what the gated products make of them."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, norm: _Norm, linears: list[Adapted], *_: Tensor | None
    ) -> Tensor:
        gate, up, down = linears
        normed = pointwise.norm(hidden, norm.weight, norm.epsilon)
        gates, ups = gate(normed), up(normed)
        ctx.norm, ctx.linears = norm, linears
        ctx.save_for_backward(hidden, gates, ups)
        return _sum(down(pointwise.swiglu(gates, ups)), hidden)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        grad, saved = grad.contiguous(), ctx.saved_tensors
        of_hidden, total = grad.clone(), None
        for rows in _blocks(grad):
            here = of_hidden[rows], grad[rows], *(states[rows] for states in saved)
            found = _Mlp._gradients(ctx, *here)
            total = found if total is None else [*map(_added, total, found)]
        assert total is not None
        return of_hidden, None, None, *total

    @staticmethod
    def _gradients(
        ctx: Any, of_hidden: Tensor, grad: Tensor, hidden: Tensor, gates: Tensor, ups: Tensor
    ) -> list[Tensor | None]:
        """Of some rows: what comes home through the gate is added to ``of_hidden``."""
        norm, (gate, up, down) = ctx.norm, ctx.linears
        of_down = down.gradients(grad, pointwise.swiglu(gates, ups))
        of_gates, of_ups = pointwise.swiglu_gradients(of_down[0], gates, ups)
        normed = pointwise.norm(hidden, norm.weight, norm.epsilon)
        of_gate = gate.gradients(of_gates, normed)
        of_up = up.gradients(of_ups, normed, to=of_gate[0])
        pointwise.add_norm_gradient(of_hidden, of_up[0], hidden, norm.weight, norm.epsilon)
        return [*_flat([of_gate, of_up, of_down])]


class _Normed(torch.autograd.Function):
    """The states [T, H], normed."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, norm: _Norm) -> Tensor:
        ctx.norm = norm
        ctx.save_for_backward(hidden)
        return pointwise.norm(hidden, norm.weight, norm.epsilon)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (hidden,), norm = ctx.saved_tensors, ctx.norm
        total = torch.zeros_like(hidden)
        pointwise.add_norm_gradient(total, grad.contiguous(), hidden, norm.weight, norm.epsilon)
        return total, None


def _blocks(states: Tensor) -> list[slice]:
    """Rows of ``states`` [T, H] that are taken through a backward together.

    Nothing that it holds for a while is as wide as what lies between the gated products, so of
    that it holds some rows only; not where adding up their gradients would round once more.
    """
    count = math.ceil(len(states) / _BLOCK_TOKENS) if kernels.supports(states) else 1
    size = math.ceil(len(states) / count)
    return [slice(start, start + size) for start in range(0, len(states), size)]


def _added(total: Tensor | None, more: Tensor | None) -> Tensor | None:
    return None if total is None or more is None else total.add_(more)
