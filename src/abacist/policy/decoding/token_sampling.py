"""Choose the next token: greedy, or drawn by a number that belongs to the row alone.

Drawing is by inverse CDF on a given uniform number instead of ``torch.multinomial``: the
distribution is the same, but what a row draws depends on nothing outside the row, so neither on
the batch it is decoded in nor on when its neighbours finish.

Shapes: B rows of a batch, V vocabulary entries.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from abacist.errors import ModelError
from abacist.policy.kernels import decode as kernels


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn, each name as in TRL and transformers, applied in their order.

    The repetition penalty works on the raw logits of every token that stands in the prompt or in
    the completion so far; then come temperature, top-k, top-p and min-p. Off: ``top_p`` 1,
    ``top_k`` 0, ``min_p`` None, ``repetition_penalty`` 1.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float | None = None
    repetition_penalty: float = 1.0

    def __post_init__(self) -> None:
        for name, value, fits, wanted in (
            ("temperature", self.temperature, self.temperature > 0, "above 0; greedy is no draw"),
            ("top_p", self.top_p, 0 <= self.top_p <= 1, "between 0 and 1; 1 is off"),
            ("top_k", self.top_k, self.top_k >= 0, "0 (off) or more"),
            ("min_p", self.min_p, 0 <= (self.min_p or 0.0) <= 1, "between 0 and 1"),
            (
                "repetition_penalty",
                self.repetition_penalty,
                self.repetition_penalty > 0,
                "above 0; 1 is off",
            ),
        ):
            if not fits:
                raise ModelError(f"Tokens cannot be drawn with {name}={value}.", f"Use {wanted}.")


def sample_tokens(
    logits: torch.Tensor,
    uniforms: torch.Tensor,
    *,
    temperature: float,
    top_p: float,
    top_k: int,
    min_p: float | None = None,
) -> torch.Tensor:
    """One token id for each row of ``logits`` [B, V], chosen by its number in ``uniforms`` [B].

    Inverse-CDF sampling: the first token at which the cumulated probability exceeds the number. It
    draws from the same distribution as ``torch.multinomial``, but a row's choice depends on nothing
    outside the row.
    """
    logits = logits.float()
    if top_p >= 1 and top_k <= 0 and not min_p and kernels.takes(logits):
        return kernels.sample(logits, uniforms, temperature)
    if temperature != 1:
        logits = logits / temperature
    if 0 < top_k < logits.shape[-1]:
        smallest_kept = logits.topk(top_k, dim=-1).values[:, -1:]
        logits = logits.masked_fill(logits < smallest_kept, -torch.inf)
    probabilities = logits.softmax(dim=-1)
    if top_p < 1:
        ordered, order = probabilities.sort(dim=-1, descending=True)
        # A token goes when those before it already make up top_p; the first always stays.
        dropped = ordered.cumsum(dim=-1) - ordered >= top_p
        dropped[:, 0] = False
        probabilities = probabilities.masked_fill(dropped.scatter(-1, order, dropped), 0.0)
    if min_p:
        floor = min_p * probabilities.amax(dim=-1, keepdim=True)
        probabilities = probabilities.masked_fill(probabilities < floor, 0.0)
    # In float32 the sums of a large vocabulary would stand still where its rare tokens are, and a
    # GPU, which adds in parallel, could even let them fall.
    wide = torch.float32 if logits.device.type == "mps" else torch.float64  # Apple has no float64
    cumulated = probabilities.cumsum(dim=-1, dtype=wide)
    # Below 1 after rounding too, or an impossible token at the very end could be chosen.
    below_one = uniforms.to(wide).clamp(max=1 - torch.finfo(wide).eps)
    targets = below_one[:, None] * cumulated[:, -1:]
    return torch.searchsorted(cumulated, targets, right=True).clamp_(max=logits.shape[-1] - 1)[:, 0]


def penalise_repetition(logits: torch.Tensor, seen: torch.Tensor, penalty: float) -> torch.Tensor:
    """``logits`` [B, V] with every token of ``seen`` [B, V] made less likely (``penalty`` > 1)."""
    penalised = torch.where(logits < 0, logits * penalty, logits / penalty)
    return torch.where(seen, penalised, logits)
