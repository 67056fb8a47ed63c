"""Decoder layers under LoRA with a forward and backward of our own: fewer passes, less kept.

Autograd would keep the output of every small step between the matrix products. The two halves of
a layer, attention inputs and MLP, keep only what is expensive to compute again: the states that
enter them, queries, keys and values as attention sees them, the outputs of the gate and up
projections, and the few numbers that LoRA's A makes of each input. Norms, rotations and activations
are computed again in the backward, products of frozen weights are not. That is fewer passes over
the activations, and a third to a half of their memory.

:meth:`FusedLayer.of` says whether a layer qualifies: all weights but LoRA's are frozen, and so on
(``families.SUPPORT``). Any other layer is computed by its own modules, see ``scoring.forward``.

Shape suffixes: T packed tokens, H numbers of a state, A query heads, K key heads, D numbers of a
head, F width of the MLP.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from abacist.policy import integrity
from abacist.policy.families import unsupported_layer
from abacist.policy.kernels import build as kernels
from abacist.policy.kernels import pointwise
from abacist.policy.scoring.attention_backend import Attend
from abacist.policy.scoring.linears import FusedLinears, call_fused

_BLOCK_TOKENS = 1024
"""Tokens of a block in the backward of the MLP; every block packs the weights again."""

Rotary = tuple[Tensor, Tensor]
"""Cosines and sines [1, T, D], as transformers' rotary embedding makes them."""


@dataclass(frozen=True, slots=True)
class Norm:
    """A frozen RMSNorm."""

    weight: Tensor
    epsilon: float

    @classmethod
    def of(cls, module: Any, dtype: torch.dtype) -> Norm:
        """What transformers' ``module`` computes of states in ``dtype``."""
        weight = module.weight.detach()
        widened = dtype == torch.float32 and kernels.widens(weight)
        return cls(weight.float() if widened else weight, module.variance_epsilon)

    def __call__(self, x: Tensor) -> Tensor:
        """``x`` [..., H], normalized over its last dimension."""
        flat = x.reshape(-1, x.shape[-1])
        return pointwise.norm(flat, self.weight, self.epsilon).view_as(x)

    def add_gradient(self, total: Tensor, grad: Tensor, x: Tensor) -> None:
        """``total`` [..., H] += the gradient of ``x``, that of the output being ``grad``."""
        flat_total, flat_grad, flat_x = (y.view(-1, y.shape[-1]) for y in (total, grad, x))
        pointwise.add_norm_gradient(flat_total, flat_grad, flat_x, self.weight, self.epsilon)


@dataclass(frozen=True, slots=True)
class FusedLayer:
    """A decoder layer as it is set now, computed in two halves of our own.

    ``query_norm`` and ``key_norm`` are over each head (Qwen3) or None; ``rotates`` is False for a
    layer without rotary embedding (SmolLM3).
    """

    attention_norm: Norm
    query_key_value: FusedLinears
    query_norm: Norm | None
    key_norm: Norm | None
    rotates: bool
    head_dim: int
    scale: float
    out: FusedLinears
    mlp_norm: Norm
    gate_up: FusedLinears
    down: FusedLinears

    @classmethod
    def of(cls, layer: Any, dtype: torch.dtype) -> FusedLayer | None:
        """``layer``, computing in ``dtype``; None where it does not qualify."""
        if unsupported_layer(layer, dtype) is not None:
            return None
        attention, mlp = layer.self_attn, layer.mlp
        has_head_norms = hasattr(attention, "q_norm")
        return cls(
            attention_norm=Norm.of(layer.input_layernorm, dtype),
            query_key_value=FusedLinears.of(
                dtype, attention.q_proj, attention.k_proj, attention.v_proj
            ),
            query_norm=Norm.of(attention.q_norm, dtype) if has_head_norms else None,
            key_norm=Norm.of(attention.k_norm, dtype) if has_head_norms else None,
            rotates=bool(getattr(attention, "use_rope", True)),
            head_dim=attention.head_dim,
            scale=attention.scaling,
            out=FusedLinears.of(dtype, attention.o_proj),
            mlp_norm=Norm.of(layer.post_attention_layernorm, dtype),
            gate_up=FusedLinears.of(dtype, mlp.gate_proj, mlp.up_proj),
            down=FusedLinears.of(dtype, mlp.down_proj),
        )

    def __call__(self, hidden_1TH: Tensor, rotary: Rotary, attend: Attend) -> Tensor:
        """[1, T, H] -> [1, T, H]."""
        hidden_TH, device = hidden_1TH[0], hidden_1TH.device.type
        # Products cast by themselves; autocast would cast what norms compute in float32.
        with torch.autocast(device, enabled=False):
            trained = self.query_key_value.trained
            heads = _AttentionInputs.apply(hidden_TH, self, *(x[0] for x in rotary), *trained)
        query_1ATD, key_1KTD, value_1KTD = (states.transpose(0, 1)[None] for states in heads)
        attended_1TAD = attend(query_1ATD, key_1KTD, value_1KTD, self.scale)
        with torch.autocast(device, enabled=False):
            attended = call_fused(attended_1TAD[0].flatten(1), self.out)
            hidden_TH = _residual(attended, hidden_TH)
            trained = [*self.gate_up.trained, *self.down.trained]
            hidden_TH = _Mlp.apply(hidden_TH, self, *trained)
        return hidden_TH[None]


def final_norm(module: Any, hidden_1TH: Tensor) -> Tensor:
    """``module(hidden)``; by our kernel where it is frozen and there is one, keeping less."""
    if (
        module.weight.requires_grad
        or integrity.is_changed(module)
        or not kernels.supports(hidden_1TH)
        or not kernels.supports_weight(module.weight)
    ):
        normed: Tensor = module(hidden_1TH)
        return normed
    normed = _FrozenNorm.apply(hidden_1TH, Norm.of(module, hidden_1TH.dtype))
    return normed


class _AttentionInputs(torch.autograd.Function):
    """Query [T, A, D], key and value [T, K, D] as attention takes them, from the states [T, H].

    Arguments after ``sin_TD`` are what is trained, so that autograd asks for their gradients.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden_TH: Tensor,
        layer: FusedLayer,
        cos_TD: Tensor,
        sin_TD: Tensor,
        *_: Tensor | None,
    ) -> tuple[Tensor, ...]:
        projected, inner = layer.query_key_value(layer.attention_norm(hidden_TH))
        query_TAD, key_TKD, value_TKD = (
            states.view(len(hidden_TH), -1, layer.head_dim) for states in projected
        )
        # A norm over each head needs its input again; a rotation needs nothing but its angles.
        before_norm: list[Tensor | None] = [None, None]
        if layer.query_norm is not None and layer.key_norm is not None:
            before_norm = [query_TAD, key_TKD]
            query_TAD, key_TKD = layer.query_norm(query_TAD), layer.key_norm(key_TKD)
        if layer.rotates:
            query_TAD, key_TKD = (
                pointwise.rotary(heads, cos_TD, sin_TD) for heads in (query_TAD, key_TKD)
            )
        ctx.layer = layer
        ctx.save_for_backward(hidden_TH, cos_TD, sin_TD, inner, *before_norm)
        return query_TAD, key_TKD, value_TKD

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        hidden_TH, cos_TD, sin_TD, inner, *before_norm = ctx.saved_tensors
        layer: FusedLayer = ctx.layer
        needs_hidden = ctx.needs_input_grad[0]
        grad_query, grad_key, grad_value = (grad.contiguous() for grad in grads)
        if layer.rotates:  # a rotation's gradient is the rotation back
            grad_query, grad_key = (
                pointwise.rotary(grad, cos_TD, sin_TD, direction=-1.0)
                for grad in (grad_query, grad_key)
            )
        if layer.query_norm is not None and layer.key_norm is not None:
            grad_query = _norm_gradient(layer.query_norm, grad_query, before_norm[0])
            grad_key = _norm_gradient(layer.key_norm, grad_key, before_norm[1])
        grad_normed, of_trained = layer.query_key_value.gradients(
            [grad.flatten(1) for grad in (grad_query, grad_key, grad_value)],
            layer.attention_norm(hidden_TH),
            inner,
            by_x=needs_hidden,
        )
        grad_hidden = None
        if grad_normed is not None:
            grad_hidden = _norm_gradient(layer.attention_norm, grad_normed, hidden_TH)
        return grad_hidden, None, None, None, *of_trained


class _Mlp(torch.autograd.Function):
    """The states [T, H] plus what the MLP makes of them."""

    @staticmethod
    def forward(ctx: Any, hidden_TH: Tensor, layer: FusedLayer, *_: Tensor | None) -> Tensor:
        (gate_TF, up_TF), inner = layer.gate_up(layer.mlp_norm(hidden_TH))
        (more_TH,), inner_of_down = layer.down(pointwise.swiglu(gate_TF, up_TF))
        ctx.layer = layer
        ctx.save_for_backward(hidden_TH, gate_TF, up_TF, inner, inner_of_down)
        return _residual(more_TH, hidden_TH)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_TH: Tensor) -> tuple[Any, ...]:
        grad_TH, saved = grad_TH.contiguous(), ctx.saved_tensors
        # The residual passes its gradient on; each block of rows adds that of the MLP.
        grad_hidden, total = grad_TH.clone(), None
        for rows in _blocks(grad_TH):
            some: Any = (None if states is None else states[rows] for states in saved)
            found = _mlp_gradients(ctx.layer, grad_hidden[rows], grad_TH[rows], *some)
            total = found if total is None else [*map(_added, total, found)]
        assert total is not None
        return grad_hidden, None, *total


def _mlp_gradients(
    layer: FusedLayer,
    grad_hidden: Tensor,
    grad_TH: Tensor,
    hidden_TH: Tensor,
    gate_TF: Tensor,
    up_TF: Tensor,
    inner: Tensor | None,
    inner_of_down: Tensor | None,
) -> list[Tensor | None]:
    """Gradients of the trained weights by some rows; those of the states go to ``grad_hidden``."""
    activated_TF = pointwise.swiglu(gate_TF, up_TF)
    grad_activated, of_down = layer.down.gradients([grad_TH], activated_TF, inner_of_down)
    assert grad_activated is not None
    grads = pointwise.swiglu_gradients(grad_activated, gate_TF, up_TF)
    grad_normed, of_gate_up = layer.gate_up.gradients(grads, layer.mlp_norm(hidden_TH), inner)
    assert grad_normed is not None
    layer.mlp_norm.add_gradient(grad_hidden, grad_normed, hidden_TH)
    return [*of_gate_up, *of_down]


class _FrozenNorm(torch.autograd.Function):
    """The states [..., H], normalized; keeps its input and nothing else."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, norm: Norm) -> Tensor:
        ctx.norm = norm
        ctx.save_for_backward(hidden)
        return norm(hidden)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (hidden,) = ctx.saved_tensors
        return _norm_gradient(ctx.norm, grad.contiguous(), hidden), None


def _norm_gradient(norm: Norm, grad: Tensor, x: Tensor) -> Tensor:
    total = torch.zeros_like(x, memory_format=torch.contiguous_format)
    norm.add_gradient(total, grad, x)
    return total


def _residual(more: Tensor, hidden: Tensor) -> Tensor:
    """Their sum; may overwrite ``more``."""
    return more.add_(hidden) if more.dtype == hidden.dtype else hidden + more


def _blocks(states_TH: Tensor) -> list[slice]:
    """Rows that go through the backward of the MLP together.

    Its temporaries are F wide, so with blocks they are held for some rows only. Without our
    kernels there is one block: in half precision, adding up gradients would round once more.
    """
    count = math.ceil(len(states_TH) / _BLOCK_TOKENS) if kernels.supports(states_TH) else 1
    size = math.ceil(len(states_TH) / count)
    return [slice(start, start + size) for start in range(0, len(states_TH), size)]


def _added(total: Tensor | None, more: Tensor | None) -> Tensor | None:
    return None if total is None or more is None else total.add_(more)
