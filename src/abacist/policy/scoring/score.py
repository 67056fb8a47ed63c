"""Log-probabilities of a batch of completions: shared prefixes once, no padding, a chunked head.

Stock TRL forwards every prompt once for each of its completions, and the padding with it. Here

1. :func:`~abacist.policy.scoring.packing.pack` packs the batch into one sequence,
2. :func:`~abacist.policy.scoring.forward.hidden_states` runs the decoder layers on it,
3. :func:`~abacist.policy.scoring.head.score_tokens` runs the head on the states that predict a
   completion token.

The mathematics is the same; the tests compare log-probabilities and gradients with TRL's own.
``families.unsupported_reason(model, FastPart.SCORING)`` says which models it is not made for.

Shape suffixes: B rows, P+C prompt and completion width, T packed tokens, N scored tokens, H numbers
of a state, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from abacist.policy.choices import Choice
from abacist.policy.families import compute_dtype_of
from abacist.policy.model_parts import base_of
from abacist.policy.scoring.attention_backend import AttentionBackend, HeadShape, choose_backend
from abacist.policy.scoring.forward import SharedPrefix, hidden_states
from abacist.policy.scoring.head import logits, score_tokens
from abacist.policy.scoring.linears import weight_in
from abacist.policy.scoring.packing import GatherRows, pack


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
    prefix: SharedPrefix | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Log-probabilities of completion tokens, as ``trl.GRPOTrainer`` defines them.

    Call it within the same autocast as a forward of the model.

    Args:
        model: one that scoring supports (``families.unsupported_reason``), as it is now.
        input_ids: [B, P+C], prompts padded on the left, then completions padded on the right.
        attention_mask: [B, P+C], 1 for tokens, 0 for padding. Completion tokens that are 0 here
            are not scored.
        logits_to_keep: C.
        temperature: logits are divided by it.
        compute_entropy: return entropies too. They carry no gradient.
        head_chunk_tokens: tokens whose logits are held at once; None: chosen by the vocabulary.
        skip_rows: [B], True for rows to leave out: their values are 0 and without gradient.
            That is exact only where such a row adds nothing to the loss.
        prefix: what prompts begin with, if several batches share its states.

    Returns:
        Log-probabilities [B, C] in float32 (0 where nothing was scored), differentiable by the
        model's trainable weights, and entropies [B, C] or None.

    Raises:
        ValueError: the padding is not as above, or a completion has no prompt.
    """
    causal_lm = base_of(model)
    read = () if prefix is None else prefix.token_ids
    packing = pack(input_ids, attention_mask, logits_to_keep, skip_rows, read)

    def forward() -> tuple[Tensor, Tensor | None]:
        if packing is None:
            zeros_BC = torch.zeros(len(input_ids), logits_to_keep, device=input_ids.device)
            return zeros_BC + _zero_of(causal_lm), zeros_BC if compute_entropy else None
        dtype = compute_dtype_of(causal_lm)
        hidden_TH = hidden_states(causal_lm, packing, _backend(causal_lm, dtype), dtype, prefix)
        # A prompt's last state predicts the first token of each of its completions, so its
        # gradient is a sum over them.
        logps_N, entropies_N = score_tokens(
            GatherRows.apply(hidden_TH, packing.predictors, hidden_TH.dtype),
            causal_lm.lm_head.weight,
            packing.targets,
            temperature=temperature,
            compute_entropy=compute_entropy,
            chunk_tokens=head_chunk_tokens,
        )
        entropies_BC = None if entropies_N is None else packing.spread(entropies_N)
        return packing.spread(logps_N), entropies_BC

    if isinstance(model, DistributedDataParallel):
        return _call_with_swapped_forward(model, forward)
    return forward()


@torch.inference_mode()
def completion_logits(
    model: Any,
    input_ids: Tensor,
    attention_mask: Tensor,
    logits_to_keep: int,
    *,
    chunk_tokens: int = 256,
) -> Iterator[tuple[Tensor, Tensor]]:
    """The whole distribution at every completion token, some tokens at a time; no gradients.

    Takes what :func:`score` takes. Yields places [n] in the flattened [B, C], each once, and the
    logits [n, V] in float32 that predict the token there.
    """
    causal_lm = base_of(model)
    packing = pack(input_ids, attention_mask, logits_to_keep)
    if packing is None:
        return
    dtype = compute_dtype_of(causal_lm)
    hidden_TH = hidden_states(causal_lm, packing, _backend(causal_lm, dtype), dtype)
    states_NH = hidden_TH[packing.predictors]
    weight = weight_in(dtype, causal_lm.lm_head.weight.detach())
    for start in range(0, len(states_NH), chunk_tokens):
        chunk = slice(start, start + chunk_tokens)
        yield packing.places[chunk], logits(states_NH[chunk], weight, dtype)


def attention_choice(model: Any) -> Choice:
    """The attention backend that :func:`score` uses for ``model``, and why; same autocast."""
    causal_lm = base_of(model)
    return _backend(causal_lm, compute_dtype_of(causal_lm)).choice


def _backend(causal_lm: Any, dtype: torch.dtype) -> AttentionBackend:
    config, device = causal_lm.config, causal_lm.model.embed_tokens.weight.device
    size = causal_lm.model.layers[0].self_attn.head_dim
    heads = HeadShape(config.num_attention_heads, config.num_key_value_heads, size)
    return choose_backend(config._attn_implementation, device, dtype, heads)


def _call_with_swapped_forward(model: DistributedDataParallel, forward: Callable[[], Any]) -> Any:
    """``model()`` with ``forward`` in the place of the wrapped module's own, for this one call.

    DDP prepares its reduction of gradients in its own call, around the module's forward.
    """
    inner: Any = model.module
    before = vars(inner).get("forward")
    inner.forward = forward
    try:
        return model()
    finally:
        if before is None:
            del inner.forward
        else:
            inner.forward = before


def _zero_of(causal_lm: nn.Module) -> Tensor:
    """A zero that leaves every trained weight with a gradient of zero, as TRL's loss does."""
    trained = [weight for weight in causal_lm.parameters() if weight.requires_grad]
    return sum((0.0 * weight.reshape(-1)[:1].float().sum() for weight in trained), torch.zeros(()))
