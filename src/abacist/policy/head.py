"""Log-probabilities from hidden states: the last matrix product, chunked, never kept whole.

With a vocabulary of 150,000 the logits of one step are larger than everything else in memory,
and their gradient is as large again. Neither is ever needed whole. The gradient of a token's
log-probability by its hidden state is ``W[target] - softmax(z) @ W`` over the temperature, and
all of that is known in the forward pass. So where the head is frozen (LoRA), the forward keeps
this one vector for each token, and the backward is a multiplication by a number: two matrix
products instead of three, and no logits kept. A head that is trained pays four: its own gradient
depends on the loss, so the backward makes the logits again, chunk by chunk.

Logits are rounded to the dtype they are computed in and then treated in float32, as in TRL.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

from abacist.policy.kernels.pointwise import softmax
from abacist.policy.products import product

_CHUNK_ELEMENTS = {"cpu": 2**18, "cuda": 2**27}
"""Logits held at once where nobody says otherwise: 1 MB on a CPU, whose caches are small."""
_LEAST_CHUNK_TOKENS = 128  # below that, reading the head's weights costs more than the product


def score_tokens(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    temperature: float = 1.0,
    compute_entropy: bool = False,
    chunk_tokens: int | None = None,
) -> tuple[Tensor, Tensor | None]:
    """The log-probability of each target, and the entropy of the distribution it came from.

    Args:
        hidden: [N, H], the state that predicts each target. Differentiable.
        weight: [V, H] of the output embedding; differentiable if it requires a gradient.
        targets: [N] token ids.
        temperature: logits are divided by it.
        compute_entropy: also return entropies (nats, of the tempered distribution). They carry
            no gradient.
        chunk_tokens: tokens whose logits are held at once; None chooses by vocabulary and device.

    Returns:
        Log-probabilities [N] in float32, and entropies [N] in float32 or None.
    """
    device = hidden.device.type
    autocasts = torch.is_autocast_enabled(device)
    dtype = torch.get_autocast_dtype(device) if autocasts else hidden.dtype
    if chunk_tokens is None:
        budget = _CHUNK_ELEMENTS.get(device, _CHUNK_ELEMENTS["cuda"])
        most = max(_LEAST_CHUNK_TOKENS, budget // weight.shape[0])
        count = max(1, math.ceil(len(hidden) / most))
        chunk_tokens = max(1, math.ceil(len(hidden) / count))  # chunks of one size hold least
    head = _TrainedHead if weight.requires_grad and torch.is_grad_enabled() else _FrozenHead
    with torch.autocast(device, enabled=False):
        logps, entropies = head.apply(
            hidden, weight, targets, dtype, 1.0 / temperature, compute_entropy, chunk_tokens
        )
    return logps, entropies


def _logits(hidden: Tensor, weight: Tensor, dtype: torch.dtype) -> Tensor:
    """[n, V] in float32."""
    return product(hidden.to(dtype), weight.to(dtype)).float()


class _FrozenHead(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        dtype: torch.dtype,
        inverse_temperature: float,
        compute_entropy: bool,
        chunk_tokens: int,
    ) -> tuple[Tensor, Tensor | None]:
        learns = ctx.needs_input_grad[0]
        weight = weight.to(dtype)
        logps = hidden.new_empty(len(hidden), dtype=torch.float32)
        entropies = torch.empty_like(logps) if compute_entropy else None
        slope = torch.empty_like(hidden) if learns else None
        for start in range(0, len(hidden), chunk_tokens):
            here = slice(start, start + chunk_tokens)
            weights, totals, logps[here], entropy = softmax(
                _logits(hidden[here], weight, dtype),
                targets[here],
                inverse_temperature,
                compute_entropy,
            )
            if entropies is not None and entropy is not None:
                entropies[here] = entropy
            if slope is not None:
                expected = product(weights.to(dtype), weight.t()).float().div_(totals[:, None])
                difference = weight.index_select(0, targets[here]).float() - expected
                slope[here] = difference.mul_(inverse_temperature)
                del expected, difference
            del weights  # before the next chunk's are made
        _finish(ctx, entropies)
        if slope is not None:
            ctx.save_for_backward(slope)
        return logps, entropies

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor | None, *_: Any) -> tuple[Any, ...]:
        if grad is None or not ctx.needs_input_grad[0]:
            return (None,) * 7
        (slope,) = ctx.saved_tensors
        return ((slope * grad[:, None]).to(slope.dtype), *(None,) * 6)


class _TrainedHead(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        dtype: torch.dtype,
        inverse_temperature: float,
        compute_entropy: bool,
        chunk_tokens: int,
    ) -> tuple[Tensor, Tensor | None]:
        ctx.settings = dtype, inverse_temperature, chunk_tokens
        ctx.save_for_backward(hidden, weight, targets)
        cast = weight.to(dtype)
        logps = hidden.new_empty(len(hidden), dtype=torch.float32)
        entropies = torch.empty_like(logps) if compute_entropy else None
        for start in range(0, len(hidden), chunk_tokens):
            here = slice(start, start + chunk_tokens)
            _, _, logps[here], entropy = softmax(
                _logits(hidden[here], cast, dtype),
                targets[here],
                inverse_temperature,
                compute_entropy,
            )
            if entropies is not None and entropy is not None:
                entropies[here] = entropy
        _finish(ctx, entropies)
        return logps, entropies

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor | None, *_: Any) -> tuple[Any, ...]:
        if grad is None:
            return (None,) * 7
        hidden, weight, targets = ctx.saved_tensors
        dtype, inverse_temperature, chunk_tokens = ctx.settings
        cast = weight.to(dtype)
        grad = grad.float() * inverse_temperature
        grad_hidden = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        grad_weight = torch.zeros_like(weight, dtype=torch.float32)
        for start in range(0, len(hidden), chunk_tokens):
            here = slice(start, start + chunk_tokens)
            logits = _logits(hidden[here], cast, dtype)
            weights, totals = softmax(logits, targets[here], inverse_temperature, False)[:2]
            grad_logits = weights.mul_((-grad[here] / totals)[:, None])
            grad_logits.scatter_add_(1, targets[here, None], grad[here, None])
            grad_logits = grad_logits.to(dtype)
            if grad_hidden is not None:
                grad_hidden[here] = product(grad_logits, cast.t())
            # Chunks are added up in float32: rounding each would bias what is learned.
            grad_weight.addmm_(grad_logits.t().float(), hidden[here].to(dtype).float())
        return (grad_hidden, grad_weight.to(weight.dtype), *(None,) * 5)


def _finish(ctx: FunctionCtx, entropies: Tensor | None) -> None:
    ctx.set_materialize_grads(False)
    if entropies is not None:
        ctx.mark_non_differentiable(entropies)
