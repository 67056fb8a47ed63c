"""The layers of Llama and Qwen2 under LoRA, forward and backward by hand.

Left to autograd, a layer keeps the output of each small step between its products. Here it keeps
what cannot quickly be made again: the states that enter its two halves, queries, keys and
values as they are attended, and what the gate and its companion put out. Norms, rotations and
activations are computed anew in the backward, no product of a frozen weight is. That is fewer
passes over the activations, and a third to a half of their memory.

It applies to the packed batches of :mod:`abacist.policy.scoring`, layer by layer, where all weights
but LoRA's are frozen; every other call takes the layer's own forward.

Shapes: T packed tokens, H numbers of a state, D numbers of a head.
"""

from __future__ import annotations

import functools
import types
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.models.llama.modeling_llama import LlamaDecoderLayer
from transformers.models.qwen2.modeling_qwen2 import Qwen2DecoderLayer

from abacist.policy.attention import attend
from abacist.policy.kernels import pointwise
from abacist.policy.layout import Layout
from abacist.policy.products import Adapted, adapted, linear

_LAYERS = (LlamaDecoderLayer, Qwen2DecoderLayer)


def fuse_layers(model: nn.Module) -> None:
    """Give the decoder layers of ``model`` a forward that computes the same in fewer passes.

    As with :func:`abacist.policy.products.fuse_linears`, it asks at every call whether it
    applies, and stays for as long as the model does.
    """
    for module in model.modules():
        if type(module) in _LAYERS:
            module.forward = types.MethodType(_forward, module)  # type: ignore[method-assign]


@dataclass(frozen=True, slots=True)
class _Norm:
    """What goes before the products of a half."""

    weight: Tensor
    epsilon: float


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
        hidden = hidden + linear(read[0].flatten(1), out)
        hidden = _Mlp.apply(hidden, mlp, [gate, up, down], *_learning([gate, up, down]))
    return hidden[None]


def _linears(layer: Any, hidden: Tensor) -> list[Adapted] | None:
    """The seven linear layers of ``layer``; None if it is to compute as it is itself."""
    attention, mlp = layer.self_attn, layer.mlp
    norms = (layer.input_layernorm, layer.post_attention_layernorm)
    if (
        type(mlp.act_fn).__name__ not in ("SiLU", "SiLUActivation")
        or any(norm.weight.requires_grad for norm in norms)
        or any(_is_watched(module) for module in layer.modules() if module is not layer)
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


def _is_watched(module: nn.Module) -> bool:
    """Whether somebody wants to see what goes into ``module`` or comes out of it."""
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
    )


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
            pointwise.turn(query, cosines, sines),
            pointwise.turn(key, cosines, sines),
            value,
        )

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        hidden, cosines, sines = ctx.saved_tensors
        norm, learns = ctx.norm, ctx.needs_input_grad[0]
        of_query, of_key, of_value = (grad.contiguous() for grad in grads)
        of_query, of_key = (
            pointwise.turn(grad, cosines, sines, direction=-1.0) for grad in (of_query, of_key)
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
        more = down(pointwise.gate(gates, ups))
        return more.add_(hidden) if more.dtype == hidden.dtype else hidden + more

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        hidden, gates, ups = ctx.saved_tensors
        norm, (gate, up, down) = ctx.norm, ctx.linears
        grad = grad.contiguous()
        of_down = down.gradients(grad, pointwise.gate(gates, ups))
        of_gates, of_ups = pointwise.gate_gradients(of_down[0], gates, ups)
        normed = pointwise.norm(hidden, norm.weight, norm.epsilon)
        of_gate = gate.gradients(of_gates, normed)
        of_up = up.gradients(of_ups, normed, to=of_gate[0])
        of_hidden = grad.clone()
        pointwise.add_norm_gradient(of_hidden, of_up[0], hidden, norm.weight, norm.epsilon)
        return of_hidden, None, None, *_flat([of_gate, of_up, of_down])
