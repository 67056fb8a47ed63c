"""Log-probabilities of a batch of completions: what is common once, no padding, a lean head.

Stock TRL forwards every prompt once for each of its completions, and the padding with it. Here a
batch is laid out as a tree (:mod:`abacist.policy.layout`), the backbone runs on that, and the
head (:mod:`abacist.policy.head`) sees only the states that predict a completion token. The
mathematics is the same; the tests hold log-probabilities and gradients against TRL's own.

The path is an allow-list: :func:`obstacle` says why a model cannot take it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from abacist.errors import ModelError
from abacist.policy import attending, instances
from abacist.policy.attention import attend
from abacist.policy.choices import Choice
from abacist.policy.head import score_tokens
from abacist.policy.instances import FAMILIES
from abacist.policy.layout import Layout, Pick, lay_out

_FIXED_ROTARY = ("default", "linear", "llama3", "yarn")  # the same at every sequence length


def obstacle(model: Any) -> str | None:
    """Why ``model``, as it is set now, cannot be scored by :func:`score`; None: it can.

    Give it the model as :func:`score` will get it: wrapped by ``accelerate``, in training mode if
    it will be trained. It looks at every module.
    """
    base = instances.base_of(model)
    if type(base) not in FAMILIES:
        return instances.obstacle(model)
    for config in getattr(base, "peft_config", {}).values():
        if getattr(config, "alora_invocation_tokens", None):
            return "the adapter is an activated LoRA, which looks at token positions"
    return _obstacle_in_config(base) or instances.obstacle(model) or _dropout(base)


def attention_choice(model: Any) -> Choice:
    """Which attention :func:`score` reads ``model`` with, and why; ask within the same autocast."""
    return _attending(instances.base_of(model)).choice


def score(
    model: Any,
    input_ids: Tensor,
    attention_mask: Tensor,
    logits_to_keep: int,
    *,
    temperature: float,
    compute_entropy: bool = False,
    head_chunk_tokens: int | None = None,
    skip_rows: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Log-probabilities of completion tokens, as ``trl.GRPOTrainer`` defines them.

    Call it within the same autocast as a forward of the model.

    Args:
        model: one that :func:`obstacle` has nothing to say about.
        input_ids: [B, P+C], prompts padded on the left, then completions padded on the right.
        attention_mask: [B, P+C], 1 for tokens, 0 for padding. Completion tokens that are 0 here
            are not scored.
        logits_to_keep: C.
        temperature: logits are divided by it.
        compute_entropy: return entropies too. They carry no gradient.
        head_chunk_tokens: tokens whose logits are held at once; None: chosen by the vocabulary.
        skip_rows: [B], True for rows to leave out: their values are 0 and without gradient.
            That is exact only where such a row adds nothing to the loss.

    Returns:
        Log-probabilities [B, C] in float32 (0 where nothing was scored), differentiable by the
        model's trainable weights, and entropies [B, C] or None.

    Raises:
        ModelError: the model's layers do not use the attention that is registered for them.
        ValueError: the padding is not as above, or a completion has no prompt.
    """
    causal = instances.base_of(model)
    layout = lay_out(input_ids, attention_mask, logits_to_keep, skip_rows)
    shape = (input_ids.shape[0], logits_to_keep)

    def forward() -> tuple[Tensor, Tensor | None]:
        if layout is None:
            nothing = torch.zeros(shape, device=input_ids.device)
            return nothing + _zero_of(causal), nothing if compute_entropy else None
        hidden = _hidden_states(causal, layout)
        logps, entropies = score_tokens(
            Pick.apply(hidden, layout.predictors, hidden.dtype),
            causal.lm_head.weight,
            layout.targets,
            temperature=temperature,
            compute_entropy=compute_entropy,
            chunk_tokens=head_chunk_tokens,
        )
        return _spread(logps, layout), None if entropies is None else _spread(entropies, layout)

    return _within(model, forward)


def _hidden_states(causal: Any, layout: Layout) -> Tensor:
    """[T, hidden] of the packed batch, normed as the head wants it."""
    _attending(causal).prepare(layout)
    _teach_sharing(causal.config._attn_implementation)
    output = causal.model(
        input_ids=layout.token_ids[None],
        position_ids=layout.position_ids[None],
        # A mask of four dimensions is passed on as it is, and ours is in the layout: without one
        # transformers would build T x T.
        attention_mask=torch.ones(1, 1, 1, 1, dtype=torch.bool, device=layout.token_ids.device),
        use_cache=False,
        shared_layout=layout,
    )
    if layout.layers_attended != causal.config.num_hidden_layers:
        raise ModelError(
            f"{layout.layers_attended} of {causal.config.num_hidden_layers} layers of "
            f"{type(causal).__name__} used the shared attention; the others saw a wrong text.",
            "This version of transformers is not supported by the fast path.",
        )
    hidden: Tensor = output.last_hidden_state[0]
    return hidden


def _attending(causal: Any) -> attending.Attending:
    config, weight = causal.config, causal.model.embed_tokens.weight
    device, dtype = weight.device, weight.dtype
    if torch.is_autocast_enabled(device.type):
        dtype = torch.get_autocast_dtype(device.type)
    size = causal.model.layers[0].self_attn.head_dim
    heads = attending.Heads(config.num_attention_heads, config.num_key_value_heads, size)
    return attending.choose(config._attn_implementation, device, dtype, heads)


def _teach_sharing(implementation: str) -> None:
    """Put our attention in front of the registered one, to which all other calls go on.

    Which attention runs is looked up by name in every layer, once more when a checkpointed layer
    is recomputed in the backward pass. So the name stays the model's own and the layout travels
    with the call: nothing has to be switched back, and an ordinary forward is untouched.
    """
    registered = ALL_ATTENTION_FUNCTIONS[implementation]
    if not hasattr(registered, "hands_on_to"):
        ALL_ATTENTION_FUNCTIONS[implementation] = _sharing(registered)


def _sharing(registered: Callable[..., Any]) -> Callable[..., Any]:
    def attention(
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        *args: Any,
        shared_layout: Layout | None = None,
        **kwargs: Any,
    ) -> Any:
        if shared_layout is None:
            return registered(module, query, key, value, attention_mask, *args, **kwargs)
        return attend(query, key, value, shared_layout, kwargs["scaling"]), None

    attention.hands_on_to = registered  # type: ignore[attr-defined]
    return attention


def _within(model: Any, forward: Callable[[], Any]) -> Any:
    """Run ``forward`` where ``model``'s own would run, so that DDP prepares its reduction."""
    if not isinstance(model, DistributedDataParallel):
        return forward()
    inner: Any = model.module
    before = inner.__dict__.get("forward")
    inner.forward = forward
    try:
        return model()
    finally:
        if before is None:
            del inner.forward
        else:
            inner.forward = before


def _zero_of(causal: nn.Module) -> Tensor:
    """A zero that leaves every trainable weight with a gradient of zero, as stock does."""
    trained = [weight for weight in causal.parameters() if weight.requires_grad]
    return sum((0.0 * weight.reshape(-1)[:1].float().sum() for weight in trained), torch.zeros(()))


def _spread(values: Tensor, layout: Layout) -> Tensor:
    batch, width = layout.batch_shape
    flat = values.new_zeros(batch * width)
    return flat.index_copy(0, layout.places, values).view(batch, width)


def _obstacle_in_config(causal: Any) -> str | None:
    config = causal.config
    if getattr(causal, "is_quantized", False) or getattr(config, "quantization_config", None):
        return "the base model is quantised"
    attention = config._attn_implementation
    if attention != "sdpa" and "flash" not in attention:
        return f"its attention is '{attention}', not sdpa or FlashAttention"
    if attention not in ALL_ATTENTION_FUNCTIONS:
        return f"its attention, '{attention}', is not registered with transformers"
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    if kinds != {"full_attention"} or getattr(causal.model, "has_sliding_layers", False):
        return "it has layers with sliding-window attention"
    if getattr(config, "final_logit_softcapping", None):
        return "its logits are soft-capped"
    rotary = causal.model.rotary_emb.rope_type
    if rotary not in _FIXED_ROTARY:
        return f"its rotary embedding ({rotary}) depends on the length of the batch"
    if causal.training and hasattr(causal.model.embed_tokens, "neftune_noise_alpha"):
        return "it trains with noise on embeddings (NEFTune)"
    if causal.training and config.attention_dropout > 0:
        return "it trains with dropout on attention"
    head = causal.lm_head
    if type(head) is not nn.Linear or head.bias is not None:
        return "its head is not a plain linear layer without bias"
    return None


def _dropout(causal: Any) -> str | None:
    """Whether the adapters drop out; the rest of the families has no dropout but attention's."""
    for linear in instances.linears_of(causal):
        for drop in getattr(linear, "lora_dropout", {}).values():
            if type(drop) is nn.Dropout and drop.p > 0 and drop.training:
                return f"LoRA has dropout {drop.p}: rows that share a prompt would share its mask"
    return None
