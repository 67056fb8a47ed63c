"""The forward pass of the supported models on bare weights, for writing tokens.

transformers' modules support training, hooks and replacement. Called once per token, they cost
more than the arithmetic. :class:`DecodingNetwork` reads a model's weights once and computes the
same function of them: adapters are merged, projections with the same input are fused, and on a
CPU in float32 weights are packed for our own kernels, which run a token through all layers in one
call. Merging makes new tensors; the model itself is never written to.

The network knows nothing of caches and batches. Tokens come packed in one row, and ``attend`` says
what each may look at. ``policy.families`` names the models that the network supports.

Shapes: T packed tokens, C hidden size, H query heads, K key heads, D head dim, V vocabulary
entries, I inputs and O outputs of a projection, R rank of an adapter.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from peft.tuners.lora.layer import LoraLayer
from torch import nn

from abacist.policy import model_parts, mxint8, quantization
from abacist.policy.kernels import build
from abacist.policy.kernels import decode as kernels
from abacist.policy.kernels.blocks import Blocks, Weight
from abacist.policy.kernels.multiply import multiply, multiply_row

Attend = Callable[[int, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
"""Attention of one layer: (number of the layer, queries [T, H, D], keys and values [T, K, D]) to
[T, H, D]. The queries are already scaled."""

SwiGLU = Callable[[torch.Tensor], torch.Tensor]
"""silu(gate(x)) · up(x)."""

NO_COPY_WEIGHTS = 2**28
"""A CPU that writes a single row with a model of this many weights or more reads them in place. A
copy would take gigabytes, and longer to make than it saves."""


class DecodingNetwork:
    """The function of ``model``, with its weights as they are now.

    Args:
        model: one that ``FastPart.DECODING`` supports.
        max_tokens: the most tokens of one text.
        max_rows: how many rows will be written together, if known.

    Build and call it under ``torch.inference_mode``.
    """

    def __init__(self, model: Any, max_tokens: int, max_rows: int | None = None) -> None:
        base: Any = model_parts.base_of(model)
        copied = max_rows != 1 or not _is_too_large_to_copy(base)
        product: Callable[..., Projection] = fused if copied else Uncopied
        swiglu: Callable[..., SwiGLU] = fused_swiglu if copied else uncopied_swiglu
        first = base.model.layers[0].self_attn
        self.num_layers: int = len(base.model.layers)
        self.head_dim: int = first.head_dim
        # From the modules, not the config: the config may have been changed since they were built.
        self.key_heads: int = first.k_proj.out_features // self.head_dim
        self.query_heads: int = first.q_proj.out_features // self.head_dim
        self.embedding: torch.Tensor = base.model.embed_tokens.weight.detach()  # [V, C]
        self.device = self.embedding.device
        # bfloat16 on a CPU is how weights are held; our kernels compute in float32.
        widens = build.widens(self.embedding)
        self.dtype = torch.float32 if widens else self.embedding.dtype

        def norm(module: Any) -> Any:
            weight = None if module is None else module.weight.detach()
            return weight.float() if widens and weight is not None else weight

        self.epsilon: float = base.model.norm.variance_epsilon
        self.final_norm: Any = norm(base.model.norm)
        self.head: Projection = product(base.lm_head)
        self.layers = [
            kernels.DecoderLayer(
                attention_norm=norm(layer.input_layernorm),
                query_key_value=product(
                    layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj
                ),
                query_norm=norm(getattr(layer.self_attn, "q_norm", None)),
                key_norm=norm(getattr(layer.self_attn, "k_norm", None)),
                attention_out=product(layer.self_attn.o_proj),
                mlp_norm=norm(layer.post_attention_layernorm),
                swiglu=swiglu(layer.mlp.gate_proj, layer.mlp.up_proj),
                down=product(layer.mlp.down_proj),
            )
            for layer in base.model.layers
        ]
        self.scale: float = first.scaling
        # Computed by the model's own module, which knows every scaling of the frequencies.
        positions = torch.arange(max_tokens, device=self.device)[None]
        cos, sin = base.model.rotary_emb(self.embedding[:1].to(self.dtype), positions)
        self.cos, self.sin = cos[0].unsqueeze(1), sin[0].unsqueeze(1)  # [max_tokens, 1, D]
        # Multiplied into cos and sin, so that scaling the queries costs nothing more. The first
        # half of the sine's is negative: rotary embedding is x · cos + (-x2, x1) · sin for the
        # halves (x1, x2) of x, and (x2, x1) is a plain roll of x.
        scales = torch.ones(self.query_heads + self.key_heads, self.head_dim, device=self.device)
        scales[: self.query_heads] = self.scale
        signs = torch.ones(self.head_dim, device=self.device)
        signs[: self.head_dim // 2] = -1
        self._cos_scales = scales.to(self.dtype)  # [H + K, D]
        self._sin_scales = (scales * signs).to(self.dtype)
        self.decoder = kernels.decoder(self.weights())
        self._logits: torch.Tensor | None = None

    def weights(self) -> kernels.DecoderWeights:
        """The weights, as the decoding kernel takes them."""
        return kernels.DecoderWeights(
            layers=self.layers,
            embedding=self.embedding,
            final_norm=self.final_norm,
            cos=self.cos,
            sin=self.sin,
            query_heads=self.query_heads,
            key_heads=self.key_heads,
            head_dim=self.head_dim,
            epsilon=self.epsilon,
            scale=self.scale,
        )

    def forward(
        self, tokens_T: torch.Tensor, positions_T: torch.Tensor, attend: Attend
    ) -> torch.Tensor:
        """The hidden states after the last norm, [T, C], of packed tokens."""
        tokens, num_query_heads = len(tokens_T), self.query_heads
        # Queries and keys are rotated together.
        cos = self.cos[positions_T] * self._cos_scales  # [T, H + K, D]
        sin = self.sin[positions_T] * self._sin_scales
        hidden_TC = F.embedding(tokens_T, self.embedding).to(self.dtype)
        for number, layer in enumerate(self.layers):
            projected = layer.query_key_value(self._norm(hidden_TC, layer.attention_norm))
            # Heads of queries, of keys and of values stand side by side: [T, H + 2 K, D].
            heads = projected.view(tokens, -1, self.head_dim)
            query_key = heads[:, : num_query_heads + self.key_heads]
            value_TKD = heads[:, num_query_heads + self.key_heads :]
            if layer.query_norm is not None and layer.key_norm is not None:
                query_THD = self._norm(query_key[:, :num_query_heads], layer.query_norm)
                key_TKD = self._norm(query_key[:, num_query_heads:], layer.key_norm)
                query_key = torch.cat((query_THD, key_TKD), dim=1)
            rolled = query_key.roll(self.head_dim // 2, dims=-1)
            query_key = torch.addcmul(query_key * cos, rolled, sin)
            query_THD, key_TKD = query_key[:, :num_query_heads], query_key[:, num_query_heads:]
            attended_THD = attend(number, query_THD, key_TKD, value_TKD)
            hidden_TC = layer.attention_out(attended_THD.reshape(tokens, -1), hidden_TC)
            hidden_TC = layer.down(layer.swiglu(self._norm(hidden_TC, layer.mlp_norm)), hidden_TC)
        return self._norm(hidden_TC, self.final_norm)

    def logits(self, states_NC: torch.Tensor) -> torch.Tensor:
        """The logits [N, V] of hidden states. The next call may write over them."""
        if not isinstance(self.head, kernels.Packed):
            return self.head(states_NC)
        # Kept, because so much memory comes anew from the system each time it is asked for, and
        # touching it first took almost a third of the product's time.
        rows = len(states_NC)
        if self._logits is None or len(self._logits) < rows:
            self._logits = states_NC.new_empty(rows, self.head.outputs)
        return self.head(states_NC, out=self._logits[:rows])

    def _norm(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return F.rms_norm(x, weight.shape, weight, self.epsilon)


def _is_too_large_to_copy(base: nn.Module) -> bool:
    weights = list(base.parameters())
    return weights[0].device.type == "cpu" and (
        sum(weight.numel() for weight in weights) >= NO_COPY_WEIGHTS
    )


class Projection(Protocol):
    """Linear layers that read the same input as one product, their outputs side by side."""

    def __call__(self, x: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor:
        """``x`` [T, I] times the weights, plus the bias, plus ``residual`` [T, O].

        May write the result into ``residual``.
        """


def fused(*linears: Any) -> Projection:
    """One product for ``linears``, plain or with LoRA, that read the same input."""
    if _are_widened(linears):
        return _unmerged(linears)
    return _side_by_side(*_merged(*linears))


def fused_swiglu(gate: Any, up: Any) -> SwiGLU:
    """silu(gate(x)) · up(x), both products as one."""
    if _are_widened((gate, up)):
        return _unmerged((gate, up), gated=True)
    weights, biases = _merged(gate, up)
    if kernels.supports(*weights, *biases):
        return kernels.Packed(weights, biases, gated=True)
    both = _side_by_side(weights, biases)

    def swiglu(x: torch.Tensor) -> torch.Tensor:
        gates, ups = both(x).chunk(2, dim=-1)
        return F.silu(gates) * ups

    return swiglu


class _Plain:
    """The product by PyTorch."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        self.weight, self.bias = weight, bias

    def __call__(self, x: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor:
        if residual is None:
            return F.linear(x, self.weight, self.bias)
        if self.bias is not None:
            residual += self.bias
        return residual.addmm_(x, self.weight.t())


class Uncopied:
    """A projection that reads the model's own weights, adapters apart, and copies none of them."""

    def __init__(self, *linears: Any) -> None:
        self._linears = linears

    def __call__(self, x: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor:
        outputs = [_uncopied(x, linear) for linear in self._linears]
        y = torch.cat(outputs, dim=-1) if len(outputs) > 1 else outputs[0]
        return y if residual is None else residual.add_(y)


def uncopied_swiglu(gate: Any, up: Any) -> SwiGLU:
    """Like :func:`fused_swiglu`, without a copy of the weights."""
    return lambda x: F.silu(_uncopied(x, gate)).mul_(_uncopied(x, up))


def _are_widened(linears: Sequence[Any]) -> bool:
    return all(build.widens(mxint8.weight_of(_base_layer(linear))) for linear in linears)


def _unmerged(linears: Sequence[Any], *, gated: bool = False) -> kernels.Packed:
    """``linears`` in bfloat16 or 8 bits, adapters beside them: merged, they would be rounded."""
    weights, biases = zip(*map(_base, linears), strict=True)
    adapters = [
        [kernels.Adapter(lora_a, lora_b * scale) for lora_a, lora_b, scale in _adapters(linear)]
        for linear in linears
    ]
    return kernels.Packed(weights, biases, gated=gated, adapters=adapters)


def _side_by_side(weights: list[torch.Tensor], biases: list[torch.Tensor | None]) -> Projection:
    if kernels.supports(*weights, *biases):
        return kernels.Packed(weights, biases)
    weight = torch.cat(weights) if len(weights) > 1 else weights[0]
    bias = None
    if any(one is not None for one in biases):
        both = zip(weights, biases, strict=True)
        bias = torch.cat([w.new_zeros(len(w)) if b is None else b for w, b in both])
    return _Plain(weight, bias)


def _merged(*linears: Any) -> tuple[list[torch.Tensor], list[torch.Tensor | None]]:
    """Weights and biases of ``linears`` with their active adapters merged."""
    merged = [_merged_one(linear) for linear in linears]
    return [weight for weight, _ in merged], [bias for _, bias in merged]


def _merged_one(linear: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Weight and bias of ``linear`` with its active adapters merged, summed in float32."""
    weight, bias = _base(linear)
    assert isinstance(weight, torch.Tensor)  # what our kernels widen is never merged
    if adapters := _adapters(linear):
        total = weight.float()
        for lora_a, lora_b, scale in adapters:
            total = torch.addmm(total, lora_b, lora_a, alpha=scale)
        weight = total.to(weight.dtype)
    return weight, bias


def _uncopied(x: torch.Tensor, linear: Any) -> torch.Tensor:
    """``x`` [T, I] through ``linear`` and its active adapters, [T, O]."""
    weight, bias = _base(linear)
    if build.widens(weight):
        is_row = len(x) == 1 and (isinstance(weight, Blocks) or weight.is_contiguous())
        y = (multiply_row if is_row else multiply)(
            x, weight, None if bias is None else bias.float()
        )
    else:
        assert isinstance(weight, torch.Tensor)
        y = F.linear(x, weight, bias)
    for lora_a, lora_b, scale in _adapters(linear):
        y += F.linear(F.linear(x.float(), lora_a), lora_b).mul_(scale).to(y.dtype)
    return y


def _base_layer(linear: Any) -> Any:
    """``linear`` itself, or what its adapter is put around."""
    return linear.base_layer if isinstance(linear, LoraLayer) else linear


def _base(linear: Any) -> tuple[Weight, torch.Tensor | None]:
    base = _base_layer(linear)
    bias = None if base.bias is None else base.bias.detach()
    if type(base) is mxint8.Linear:
        return base.blocks, bias
    return quantization.dense_weight(base), bias


def _adapters(linear: Any) -> list[tuple[torch.Tensor, torch.Tensor, float]]:
    """A [R, I], B [O, R] and the scale of each active adapter that is not merged already."""
    layer: Any = linear
    if not isinstance(linear, LoraLayer) or layer.disable_adapters or layer.merged:
        return []
    return [
        (
            layer.lora_A[name].weight.detach().float(),
            layer.lora_B[name].weight.detach().float(),
            layer.scaling[name],
        )
        for name in layer.active_adapters
        if name in layer.lora_A
    ]
