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
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from abacist.policy.families import FastPart, lacks
from abacist.policy.scoring.attention_backend import Attend, AttentionBackend
from abacist.policy.scoring.layers import FusedLayer, Rotary, final_norm
from abacist.policy.scoring.linears import call_linear
from abacist.policy.scoring.packing import Packing, pack_tokens


class SharedPrefix:
    """What the prompts of several batches begin with: read once, for all of them.

    Of a prefix, other tokens see its keys and values and nothing else. So they are computed once,
    and each batch attends to copies, whose gradients add up over the batches. :meth:`backward`
    sends the sums on into the prefix, and so into the weights: once, after the last batch.

    The sums are in the dtype of the states, so use it for float32 only. Checkpointed layers are not
    supported: their keys and values would be computed a second time. The weights must stay as they
    are until :meth:`backward`.
    """

    def __init__(self, token_ids: Sequence[int]) -> None:
        self.token_ids = token_ids
        self._computed: list[Tensor] = []  # key and value [1, K, P, D] of each layer, with a graph
        self._copies: list[Tensor] = []  # leaves

    def compute(self, causal_lm: Any, backend: AttentionBackend, dtype: torch.dtype) -> None:
        """Read the prefix, if that was not done yet."""
        if self._computed:
            return
        device = causal_lm.model.embed_tokens.weight.device

        def kept(attend: Attend, *states: Any) -> Tensor:
            self._computed += states[1:3]
            return attend(*states)

        packing = pack_tokens(self.token_ids, device)
        attends = functools.partial(kept, backend.on(packing))
        _through_layers(causal_lm, packing, dtype, lambda _: attends)
        self._copies = [
            states.detach().requires_grad_(states.requires_grad) for states in self._computed
        ]

    def attend(
        self, attend: Attend, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float
    ) -> Tensor:
        """``attend`` in a layer, with the prefix before the tokens of a batch: [1, T, A, D]."""
        key_before, value_before = self._copies[2 * layer : 2 * layer + 2]
        tokens = key_before.shape[2]
        # The prefix asks nothing again; its queries are there so that all have one length.
        nothing = query.new_zeros(1, query.shape[1], tokens, query.shape[3])
        query, key, value = (
            torch.cat(parts, dim=2)
            for parts in ((nothing, query), (key_before, key), (value_before, value))
        )
        return attend(query, key, value, scale)[:, tokens:]

    def backward(self) -> None:
        """Add to the gradients of the weights what all batches so far give them by the prefix."""
        with_gradient = [
            (states, copy.grad)
            for states, copy in zip(self._computed, self._copies, strict=True)
            if copy.grad is not None
        ]
        if with_gradient:
            states, gradients = zip(*with_gradient, strict=True)
            torch.autograd.backward(states, gradients)
        self._computed, self._copies = [], []


def hidden_states(
    causal_lm: Any,
    packing: Packing,
    backend: AttentionBackend,
    dtype: torch.dtype,
    prefix: SharedPrefix | None = None,
) -> Tensor:
    """The states [T, H] of ``packing``, as the head takes them. Call it within autocast, if any.

    ``dtype`` is what the layers compute in (``families.compute_dtype_of``). ``prefix`` holds what
    ``packing`` leaves out.
    """
    attend = backend.on(packing)
    if prefix is None or not packing.read_tokens:
        hidden_1TH = _through_layers(causal_lm, packing, dtype, lambda _: attend)
    else:
        prefix.compute(causal_lm, backend, dtype)
        after_prefix = functools.partial(functools.partial, prefix.attend, attend)
        hidden_1TH = _through_layers(causal_lm, packing, dtype, after_prefix)
    states: Tensor = final_norm(causal_lm.model.norm, hidden_1TH)[0]
    return states


def _through_layers(
    causal_lm: Any, packing: Packing, dtype: torch.dtype, attend_in: Callable[[int], Attend]
) -> Tensor:
    """The states [1, T, H] behind the last layer; ``attend_in`` gives each layer its attention."""
    model = causal_lm.model
    # The embedding is called as a module: checkpointing needs the hook by which PEFT and
    # transformers make its output require a gradient (enable_input_require_grads).
    hidden_1TH = model.embed_tokens(packing.token_ids[None])
    if not torch.is_autocast_enabled(hidden_1TH.device.type):
        hidden_1TH = hidden_1TH.to(dtype)  # from bfloat16 to float32, on a CPU
    rotary = model.rotary_emb(hidden_1TH, packing.position_ids[None])
    may_fuse = lacks(causal_lm, FastPart.FUSED_LAYERS) is None
    for number, layer in enumerate(model.layers):
        # Decided here, once: a checkpointed layer must keep the same tensors when it runs again.
        fused = FusedLayer.of(layer, dtype) if may_fuse else None
        compute: Callable[..., Tensor] = fused or functools.partial(_plain_layer, layer)
        forward = functools.partial(compute, rotary=rotary, attend=attend_in(number))
        if layer.gradient_checkpointing and layer.training:
            # What gradient_checkpointing_enable() set; the states are its one tensor argument.
            hidden_1TH = layer._gradient_checkpointing_func(forward, hidden_1TH)
        else:
            hidden_1TH = forward(hidden_1TH)
    return hidden_1TH


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
