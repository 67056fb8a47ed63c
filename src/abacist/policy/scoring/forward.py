"""The forward of a packed batch, from token ids to the states behind the last norm.

This is what transformers' ``LlamaModel.forward`` and its relatives do, written out, with attention
over the packed tree in the place of theirs: embedding, layers one after another, last norm. Every
family of ``policy.families`` runs through it. A layer that qualifies is computed in two halves of
our own (``scoring.layers``); any other by its own submodules, in transformers' order and dtypes,
so that nothing but the attention differs.

Shape suffixes: 1 the batch dimension of transformers' modules, T packed tokens, H numbers of a
state, A query heads, K key heads, D numbers of a head, F width of the MLP.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from abacist.policy.families import FastPart, lacks
from abacist.policy.scoring.attention_backend import Attend, AttentionBackend
from abacist.policy.scoring.layers import FusedLayer, Rotary, final_norm
from abacist.policy.scoring.linears import call_linear
from abacist.policy.scoring.packing import Packing


def hidden_states(
    causal_lm: Any, packing: Packing, backend: AttentionBackend, dtype: torch.dtype
) -> Tensor:
    """The states [T, H] of ``packing``, as the head takes them. Call it within autocast, if any.

    ``dtype`` is what the layers compute in (``families.compute_dtype_of``).
    """
    model = causal_lm.model
    # The embedding is called as a module: checkpointing needs the hook by which PEFT and
    # transformers make its output require a gradient (enable_input_require_grads).
    hidden_1TH = model.embed_tokens(packing.token_ids[None])
    if not torch.is_autocast_enabled(hidden_1TH.device.type):
        hidden_1TH = hidden_1TH.to(dtype)  # from bfloat16 to float32, on a CPU
    rotary = model.rotary_emb(hidden_1TH, packing.position_ids[None])
    attend = backend.on(packing)
    may_fuse = lacks(causal_lm, FastPart.FUSED_LAYERS) is None
    for layer in model.layers:
        # Decided here, once: a checkpointed layer must keep the same tensors when it runs again.
        fused = FusedLayer.of(layer, dtype) if may_fuse else None
        compute: Callable[..., Tensor] = fused or functools.partial(_plain_layer, layer)
        forward = functools.partial(compute, rotary=rotary, attend=attend)
        if layer.gradient_checkpointing and layer.training:
            # What gradient_checkpointing_enable() set; the states are its one tensor argument.
            hidden_1TH = layer._gradient_checkpointing_func(forward, hidden_1TH)
        else:
            hidden_1TH = forward(hidden_1TH)
    states: Tensor = final_norm(model.norm, hidden_1TH)[0]
    return states


def _plain_layer(layer: Any, hidden_1TH: Tensor, rotary: Rotary, attend: Attend) -> Tensor:
    """One decoder layer by its own submodules, [1, T, H] -> [1, T, H]."""
    attention, mlp = layer.self_attn, layer.mlp
    residual_1TH = hidden_1TH
    hidden_1TH = layer.input_layernorm(hidden_1TH)
    query_1ATD, key_1KTD, value_1KTD = _heads(attention, hidden_1TH, rotary)
    attended_1TAD = attend(query_1ATD, key_1KTD, value_1KTD, attention.scaling)
    hidden_1TH = residual_1TH + call_linear(attention.o_proj, attended_1TAD.flatten(2))

    residual_1TH = hidden_1TH
    hidden_1TH = layer.post_attention_layernorm(hidden_1TH)
    gate_1TF, up_1TF = (call_linear(x, hidden_1TH) for x in (mlp.gate_proj, mlp.up_proj))
    return residual_1TH + call_linear(mlp.down_proj, mlp.act_fn(gate_1TF) * up_1TF)


def _heads(attention: Any, hidden_1TH: Tensor, rotary: Rotary) -> tuple[Tensor, Tensor, Tensor]:
    """Query [1, A, T, D], key and value [1, K, T, D], normed and rotated where the family does."""
    shape = (*hidden_1TH.shape[:-1], -1, attention.head_dim)
    query, key, value = (
        call_linear(projection, hidden_1TH).view(shape)
        for projection in (attention.q_proj, attention.k_proj, attention.v_proj)
    )
    if hasattr(attention, "q_norm"):  # Qwen3
        query, key = attention.q_norm(query), attention.k_norm(key)
    query, key, value = (states.transpose(1, 2) for states in (query, key, value))
    if getattr(attention, "use_rope", True):  # SmolLM3 has layers without
        # The family's own function; `policy.integrity` checks that no script has replaced it.
        rotate = sys.modules[type(attention).__module__].apply_rotary_pos_emb  # type: ignore[attr-defined]
        query, key = rotate(query, key, *rotary)
    return query, key, value
