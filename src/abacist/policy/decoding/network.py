"""The forward pass of Llama and Qwen on bare weights, made for writing tokens.

Hugging Face's modules are made to be trained, hooked and changed; called once a token, they cost
more than the arithmetic. :class:`LeanNetwork` reads a live model's weights once and computes the
same function of them: adapters merged, projections that read the same input fused, and on a CPU
in float32 laid out for our own kernels, which then take a token through all layers in one call.
Merging makes fresh tensors; nothing of the live model is ever written to.

It knows nothing of caches and batches: tokens come packed in one row, and ``attend`` says what
each may look at. :func:`obstacle` names what it cannot take, so that it never computes
another function than the model's own.

Shapes: N tokens, D numbers of a head, V vocabulary entries.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from peft.tuners.lora import Linear as LoraLinear
from torch import nn

from abacist.policy import instances
from abacist.policy.kernels import decode as kernels

Attend = Callable[[int, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
"""(layer, queries [N, query heads, D], keys and values [N, key heads, D]) -> like queries. The
queries are scaled already."""

# Their frequencies do not change with the length of the text.
_ROTARY_KINDS = ("default", "linear", "llama3", "yarn")
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
WEIGHTS_WORTH_NO_COPY = 2**28
"""From so many on, a CPU that writes a single row reads them where they lie: the copy would take
gigabytes, and longer to make than it saves."""


def obstacle(model: Any) -> str | None:
    """Why the lean network cannot take ``model``, as the end of a sentence; None: it can."""
    whole, model = model, instances.base_of(model)
    if type(model) not in instances.FAMILIES:
        return f"{type(model).__name__} is not Llama, Qwen2 or Qwen3"
    config = model.config
    if config.hidden_act != "silu":
        return f"its activation is {config.hidden_act}"
    if set(getattr(config, "layer_types", None) or ["full_attention"]) != {"full_attention"}:
        return "some of its layers attend through a sliding window"
    if getattr(model.model.rotary_emb, "rope_type", None) not in _ROTARY_KINDS:
        return "its rotary frequencies change with the length of the text"
    if type(model.model.embed_tokens) is not nn.Embedding:
        return "its token embedding carries an adapter, or is not a plain one"
    if found := instances.obstacle(whole, learns=False):
        return found
    for linear in (*instances.linears_of(model), model.lm_head):
        if found := _linear_obstacle(linear):
            return found
    weights = list(model.parameters())
    if any(type(weight.data) is not torch.Tensor or weight.numel() == 0 for weight in weights):
        return "its weights are sharded over processes"
    if model.model.embed_tokens.weight.dtype not in _DTYPES:
        return f"its weights are {model.model.embed_tokens.weight.dtype}"
    return None


def _linear_obstacle(linear: Any) -> str | None:
    if type(linear) is LoraLinear:
        if linear.merged and linear.disable_adapters:
            return "its adapter is merged and switched off at once"
        if any(linear.lora_bias.values()):
            return "its LoRA has a bias"
        if linear.fan_in_fan_out:
            return "its adapter sits on transposed weights"
        linear = linear.base_layer
    if type(linear) is not nn.Linear:
        return f"a projection is {type(linear).__module__}.{type(linear).__name__}, not a plain one"
    if not linear.weight.is_floating_point():
        return "its weights are quantised"
    return None


@dataclass(frozen=True)
class Layer:
    """One decoder layer: fused projections and what its norms need."""

    attention_norm: torch.Tensor
    query_key_value: Projection
    query_norm: torch.Tensor | None  # Qwen3
    key_norm: torch.Tensor | None
    attention_out: Projection
    mlp_norm: torch.Tensor
    gated: Callable[[torch.Tensor], torch.Tensor]
    down: Projection


class LeanNetwork:
    """``model``'s function, read from its weights as they are now; ``max_tokens`` a text.

    Build and call it under ``torch.inference_mode``. ``obstacle(model)`` must be None. ``max_rows``
    is how many rows will be written together, where that is known.
    """

    def __init__(self, model: Any, max_tokens: int, max_rows: int | None = None) -> None:
        base: Any = instances.base_of(model)
        copied = max_rows != 1 or not _is_worth_no_copy(base)
        product: Callable[..., Projection] = projection if copied else Live
        gated_product: Callable[..., Callable[[torch.Tensor], torch.Tensor]]
        gated_product = gated if copied else live_gated
        first = base.model.layers[0].self_attn
        self.num_layers: int = len(base.model.layers)
        self.head_dim: int = first.head_dim
        # From the modules: what they were built with counts, whatever the config says by now.
        self.key_heads: int = first.k_proj.out_features // self.head_dim
        self.query_heads: int = first.q_proj.out_features // self.head_dim
        self.embedding: torch.Tensor = base.model.embed_tokens.weight.detach()
        self.device, self.dtype = self.embedding.device, self.embedding.dtype
        self.epsilon: float = base.model.norm.variance_epsilon
        self.final_norm: torch.Tensor = base.model.norm.weight.detach()
        self.head: Projection = product(base.lm_head)
        self.layers = [
            Layer(
                attention_norm=layer.input_layernorm.weight.detach(),
                query_key_value=product(
                    layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj
                ),
                query_norm=_norm_weight(layer.self_attn, "q_norm"),
                key_norm=_norm_weight(layer.self_attn, "k_norm"),
                attention_out=product(layer.self_attn.o_proj),
                mlp_norm=layer.post_attention_layernorm.weight.detach(),
                gated=gated_product(layer.mlp.gate_proj, layer.mlp.up_proj),
                down=product(layer.mlp.down_proj),
            )
            for layer in base.model.layers
        ]
        scales = torch.ones(self.query_heads + self.key_heads, 1, device=self.device)
        self.scale: float = first.scaling
        scales[: self.query_heads] = self.scale
        self._scales = scales.to(self.dtype)
        # The model's own module knows every scaling of the frequencies.
        positions = torch.arange(max_tokens, device=self.device)[None]
        cos, sin = base.model.rotary_emb(self.embedding[:1], positions)
        half = self.head_dim // 2
        self.cos = cos[0].unsqueeze(1)  # [max_tokens, 1, D]
        # Rotating by half a head negates its first half; the sine carries that sign instead.
        self.sin = torch.cat((-sin[0, :, :half], sin[0, :, half:]), dim=-1).unsqueeze(1)
        self.decoder = kernels.decoder(self)

    def forward(
        self, tokens: torch.Tensor, positions: torch.Tensor, attend: Attend
    ) -> torch.Tensor:
        """The hidden states behind the last norm, [N, hidden], of N packed ``tokens``."""
        # The queries' scale rides on their rotation.
        cos, sin = self.cos[positions] * self._scales, self.sin[positions] * self._scales
        query_heads, turned_heads = self.query_heads, self.query_heads + self.key_heads
        hidden = F.embedding(tokens, self.embedding)
        for number, layer in enumerate(self.layers):
            heads = layer.query_key_value(self._normed(hidden, layer.attention_norm)).view(
                len(tokens), -1, self.head_dim
            )
            turned = heads[:, :turned_heads]
            if layer.query_norm is not None and layer.key_norm is not None:
                turned = torch.cat(
                    (
                        self._normed(turned[:, :query_heads], layer.query_norm),
                        self._normed(turned[:, query_heads:], layer.key_norm),
                    ),
                    dim=1,
                )
            turned = torch.addcmul(turned * cos, turned.roll(self.head_dim // 2, dims=-1), sin)
            read = attend(
                number,
                turned[:, :query_heads],
                turned[:, query_heads:],
                heads[:, turned_heads:],
            )
            hidden = layer.attention_out(read.reshape(len(tokens), -1), hidden)
            hidden = layer.down(layer.gated(self._normed(hidden, layer.mlp_norm)), hidden)
        return self._normed(hidden, self.final_norm)

    def _normed(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return F.rms_norm(x, weight.shape, weight, self.epsilon)


def _is_worth_no_copy(base: nn.Module) -> bool:
    weights = list(base.parameters())
    return weights[0].device.type == "cpu" and (
        sum(weight.numel() for weight in weights) >= WEIGHTS_WORTH_NO_COPY
    )


def _norm_weight(attention: Any, name: str) -> torch.Tensor | None:
    norm = getattr(attention, name, None)
    return None if norm is None else norm.weight.detach()


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
        found = [_live_product(x, linear) for linear in self._linears]
        y = torch.cat(found, dim=-1) if len(found) > 1 else found[0]
        return y if residual is None else residual.add_(y)


def live_gated(gate: Any, up: Any) -> Callable[[torch.Tensor], torch.Tensor]:
    """:func:`gated` by :class:`Live`."""
    return lambda x: F.silu(_live_product(x, gate)).mul_(_live_product(x, up))


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


def _live_product(x: torch.Tensor, linear: Any) -> torch.Tensor:
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
