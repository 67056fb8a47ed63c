"""Log-probabilities from hidden states: the last matrix product, in chunks.

With a vocabulary of 150,000 the logits of one step are larger than everything else in memory, and
their gradient is as large again. Neither is ever held whole: on a CPU a part of the vocabulary is
taken for all tokens, so that a part of the weights serves them all and logits stay in the caches;
elsewhere some tokens at a time. With a frozen head (LoRA) the gradient
of a token's log-probability by its hidden state is ``(W[target] - softmax(z) @ W) / temperature``,
which is known in the forward. So the forward keeps this one vector of H numbers for each token,
and the backward is a multiplication by a number: two matrix products instead of three, and no
logits kept. With a trained head it is four products: the head's own gradient depends on the loss,
so the backward computes the logits again, chunk by chunk.

Logits are rounded to the dtype they are computed in and then treated in float32, as in TRL.

Shape suffixes: N scored tokens, n tokens of a chunk, H numbers of a state, V vocabulary, v a part
of it.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

from abacist.policy.families import compute_dtype
from abacist.policy.kernels import pointwise
from abacist.policy.scoring.linears import product, product_added, weight_in

_CHUNK_ELEMENTS = {"cpu": 2**21, "cuda": 2**27}
"""Logits held at once by default: 8 MB on a CPU, whose caches are small."""
_CPU_VOCABULARY = 2048
"""Tokens of the vocabulary at a time, on a CPU. The same for any number of rows: a row's sums, and
so its result to the bit, depend on it."""
_MIN_CHUNK_TOKENS = 128  # below that, reading the head's weights costs more than the product


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
    device, dtype = hidden.device.type, compute_dtype(hidden)
    head = _TrainedHead if weight.requires_grad and torch.is_grad_enabled() else _FrozenHead
    if chunk_tokens is None:
        # The backward of a trained head holds the logits of a whole vocabulary.
        width = _vocabulary_at_once(weight) if head is _FrozenHead else len(weight)
        budget = _CHUNK_ELEMENTS.get(device, _CHUNK_ELEMENTS["cuda"])
        most = max(_MIN_CHUNK_TOKENS, budget // width)
        count = max(1, math.ceil(len(hidden) / most))
        chunk_tokens = max(1, math.ceil(len(hidden) / count))  # equal chunks need the least memory
    with torch.autocast(device, enabled=False):
        logps, entropies = head.apply(
            hidden, weight, targets, dtype, 1.0 / temperature, compute_entropy, chunk_tokens
        )
    return logps, entropies


def _vocabulary_at_once(weight: Tensor) -> int:
    return min(len(weight), _CPU_VOCABULARY) if weight.device.type == "cpu" else len(weight)


def _parts(weight: Tensor) -> list[slice]:
    """The vocabulary in parts."""
    size = _vocabulary_at_once(weight)
    return [slice(start, start + size) for start in range(0, len(weight), size)]


def logits(hidden: Tensor, weight: Tensor, dtype: torch.dtype) -> Tensor:
    """[n, v] in float32, of the states [n, H] and the rows [v, H] of a head; without autograd."""
    return product(hidden.to(dtype), weight_in(dtype, weight)).float()


class _FrozenHead(torch.autograd.Function):
    """[N, H] -> log-probabilities and entropies [N]; keeps [N, H] for the backward."""

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
        weight = weight_in(dtype, weight)
        logps_N = hidden.new_empty(len(hidden), dtype=torch.float32)
        entropies_N = torch.empty_like(logps_N) if compute_entropy else None
        slope_NH = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        for start in range(0, len(hidden), chunk_tokens):
            here = slice(start, start + chunk_tokens)
            softmax = pointwise.Softmax(targets[here], inverse_temperature, hidden)
            expected_nH = None  # exp(z - max z) @ W, over all parts so far
            for part in _parts(weight):
                logits_nv = logits(hidden[here], weight[part], dtype)
                exps_nv, factors_n = softmax.weigh(logits_nv, part.start)
                if slope_NH is None:
                    continue
                exps_nv, back_Hv = exps_nv.to(dtype), weight[part].t()
                if expected_nH is None:
                    expected_nH = product(exps_nv, back_Hv).float()
                elif dtype == torch.float32:
                    expected_nH = product_added(
                        exps_nv, back_Hv, expected_nH.mul_(factors_n[:, None])
                    )
                else:
                    expected_nH.mul_(factors_n[:, None]).add_(product(exps_nv, back_Hv))
                del logits_nv, exps_nv  # before the next part's are made
            logps_N[here] = softmax.logps
            if entropies_N is not None:
                entropies_N[here] = softmax.entropies
            if slope_NH is not None and expected_nH is not None:
                expected_nH.div_(softmax.totals[:, None])
                difference_nH = weight.index_select(0, targets[here]).float() - expected_nH
                slope_NH[here] = difference_nH.mul_(inverse_temperature)
        _finish(ctx, entropies_N)
        if slope_NH is not None:
            ctx.save_for_backward(slope_NH)
        return logps_N, entropies_N

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor | None, *_: Any) -> tuple[Any, ...]:
        if grad is None or not ctx.needs_input_grad[0]:
            return (None,) * 7
        (slope_NH,) = ctx.saved_tensors
        return ((slope_NH * grad[:, None]).to(slope_NH.dtype), *(None,) * 6)


class _TrainedHead(torch.autograd.Function):
    """The same where the head has a gradient of its own; keeps what it was given."""

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
        logps_N = hidden.new_empty(len(hidden), dtype=torch.float32)
        entropies_N = torch.empty_like(logps_N) if compute_entropy else None
        for start in range(0, len(hidden), chunk_tokens):
            here = slice(start, start + chunk_tokens)
            softmax = pointwise.Softmax(targets[here], inverse_temperature, hidden)
            for part in _parts(weight):
                softmax.weigh(logits(hidden[here], cast[part], dtype), part.start)
            logps_N[here] = softmax.logps
            if entropies_N is not None:
                entropies_N[here] = softmax.entropies
        _finish(ctx, entropies_N)
        return logps_N, entropies_N

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
            softmax = pointwise.Softmax(targets[here], inverse_temperature, hidden)
            exps_nV = softmax.weigh(logits(hidden[here], cast, dtype), 0)[0]
            # d logp / d z = onehot(target) - softmax(z)
            grad_logits_nV = exps_nV.mul_((-grad[here] / softmax.totals)[:, None])
            grad_logits_nV.scatter_add_(1, targets[here, None], grad[here, None])
            grad_logits_nV = grad_logits_nV.to(dtype)
            if grad_hidden is not None:
                grad_hidden[here] = product(grad_logits_nV, cast.t())
            # Chunks are added up in float32: rounding each would bias what is learned.
            grad_weight.addmm_(grad_logits_nV.t().float(), hidden[here].to(dtype).float())
        return (grad_hidden, grad_weight.to(weight.dtype), *(None,) * 5)


def _finish(ctx: FunctionCtx, entropies: Tensor | None) -> None:
    ctx.set_materialize_grads(False)
    if entropies is not None:
        ctx.mark_non_differentiable(entropies)
