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
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from abacist.policy import instances
from abacist.policy.families import FastPart, unsupported_reason
from abacist.policy.kernels import decoding as kernels
from abacist.policy.projections import Live, Projection, gated, live_gated, projection

Attend = Callable[[int, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
"""(layer, queries [N, query heads, D], keys and values [N, key heads, D]) -> like queries. The
queries are scaled already."""

WEIGHTS_WORTH_NO_COPY = 2**28
"""From so many on, a CPU that writes a single row reads them where they lie: the copy would take
gigabytes, and longer to make than it saves."""


def obstacle(model: Any) -> str | None:
    """Why the lean network cannot take ``model``, as the end of a sentence; None: it can."""
    return unsupported_reason(model, FastPart.DECODING)


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
