"""Sample the next token of each row by a uniform number that belongs to the row alone.

Tokens are sampled by inverse CDF at a given uniform number, instead of ``torch.multinomial``. The
distribution is the same, but what a row samples depends on nothing outside the row: neither on the
batch it is decoded in nor on when its neighbours finish.

Shapes: N rows, V vocabulary entries.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from abacist.errors import ModelError
from abacist.policy.kernels import decode


@dataclass(frozen=True)
class Sampling:
    """How tokens are sampled. Names and order are those of TRL and transformers.

    The repetition penalty applies to the raw logits of every token in the prompt or in the
    completion so far. Temperature, top-k, top-p and min-p follow in this order. ``top_p`` 1,
    ``top_k`` 0, ``min_p`` None and ``repetition_penalty`` 1 are off.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float | None = None
    repetition_penalty: float = 1.0

    def __post_init__(self) -> None:
        for name, fits, wanted in (
            ("temperature", self.temperature > 0, "above 0; greedy is no sampling"),
            ("top_p", 0 <= self.top_p <= 1, "between 0 and 1; 1 is off"),
            ("top_k", self.top_k >= 0, "0 (off) or more"),
            ("min_p", 0 <= (self.min_p or 0.0) <= 1, "between 0 and 1"),
            ("repetition_penalty", self.repetition_penalty > 0, "above 0; 1 is off"),
        ):
            if not fits:
                given = f"{name}={getattr(self, name)}"
                raise ModelError(f"Tokens cannot be sampled with {given}.", f"Use {wanted}.")


def sample_tokens(
    logits_NV: torch.Tensor, uniforms_N: torch.Tensor, sampling: Sampling
) -> torch.Tensor:
    """One token id per row of ``logits_NV``, sampled at its number in ``uniforms_N``, in [0, 1).

    The result [N] is the first token whose cumulative probability exceeds the number. The
    distribution is that of ``torch.multinomial``. A repetition penalty is not applied here.
    """
    logits_NV = logits_NV.float()
    is_plain = sampling.top_p >= 1 and sampling.top_k <= 0 and not sampling.min_p
    if is_plain and decode.supports(logits_NV):
        return decode.sample(logits_NV, uniforms_N, sampling.temperature)
    cumulative_NV = cumulative(logits_NV, sampling)
    wide = cumulative_NV.dtype
    # A uniform just below 1 may round to 1, which would choose an impossible token at the end.
    below_one = uniforms_N.to(wide).clamp(max=1 - torch.finfo(wide).eps)
    targets = below_one[:, None] * cumulative_NV[:, -1:]
    chosen = torch.searchsorted(cumulative_NV, targets, right=True)[:, 0]
    return chosen.clamp_(max=logits_NV.shape[-1] - 1)


def cumulative(logits_NV: torch.Tensor, sampling: Sampling) -> torch.Tensor:
    """The cumulative distribution [N, V] that tokens are sampled from, in float64 where there is
    one; its last column is 1 up to rounding. A repetition penalty is not applied here."""
    top_p, top_k, min_p = sampling.top_p, sampling.top_k, sampling.min_p
    logits_NV = logits_NV.float()
    if sampling.temperature != 1:
        logits_NV = logits_NV / sampling.temperature
    if 0 < top_k < logits_NV.shape[-1]:
        smallest_kept = logits_NV.topk(top_k, dim=-1).values[:, -1:]
        logits_NV = logits_NV.masked_fill(logits_NV < smallest_kept, -torch.inf)
    probabilities_NV = logits_NV.softmax(dim=-1)
    if top_p < 1:
        sorted_NV, order_NV = probabilities_NV.sort(dim=-1, descending=True)
        # Drop a token if those before it already sum to top_p. The first always stays.
        dropped_NV = sorted_NV.cumsum(dim=-1) - sorted_NV >= top_p
        dropped_NV[:, 0] = False
        dropped_NV = dropped_NV.scatter(-1, order_NV, dropped_NV)
        probabilities_NV = probabilities_NV.masked_fill(dropped_NV, 0.0)
    if min_p:
        least = min_p * probabilities_NV.amax(dim=-1, keepdim=True)
        probabilities_NV = probabilities_NV.masked_fill(probabilities_NV < least, 0.0)
    # In float32 the cumulative sums of a large vocabulary would not grow at rare tokens. On a GPU,
    # which adds in parallel, they could even fall.
    wide = widest_float(logits_NV.device)
    return probabilities_NV.cumsum(dim=-1, dtype=wide)


def penalise_repetition(
    logits_NV: torch.Tensor, seen_NV: torch.Tensor, penalty: float
) -> torch.Tensor:
    """``logits_NV`` with every token of ``seen_NV`` made less likely (``penalty`` > 1)."""
    penalised = torch.where(logits_NV < 0, logits_NV * penalty, logits_NV / penalty)
    return torch.where(seen_NV, penalised, logits_NV)


def uniforms_of(streams: Sequence[int], length: int) -> torch.Tensor:
    """Numbers in [0, 1), [N, ``length``], each row from a generator seeded by its stream."""
    generator = torch.Generator()
    rows = []
    for stream in streams:
        generator.manual_seed(stream % 2**63)
        rows.append(torch.rand(length, generator=generator, dtype=torch.float64))
    return torch.stack(rows)


def widest_float(device: torch.device) -> torch.dtype:
    """float64, or float32 on Apple GPUs, which have no float64."""
    return torch.float32 if device.type == "mps" else torch.float64
