"""Logits that are NaN or infinite: found without waiting for the device, and reported with a cause.

Sampling from NaN or infinity still yields tokens, which mean nothing. So decoding keeps the largest
logit of each completion. It becomes NaN or infinite with the first logit that is, stays so, and is
checked when a row has ended.
"""

from __future__ import annotations

from typing import Any

import torch

from abacist.errors import ModelError


class NotFiniteError(ArithmeticError):
    """The logits of ``broken`` completions out of ``total`` were NaN or infinite."""

    def __init__(self, broken: int, total: int) -> None:
        super().__init__(broken, total)
        self.broken, self.total = broken, total


def keep_largest(logits: torch.Tensor, largest: torch.Tensor) -> None:
    """``largest`` [N] = max(``largest``, each row of ``logits`` [N, V]); NaN is the largest."""
    torch.maximum(largest, logits.amax(dim=-1).float(), out=largest)


def check(largest: torch.Tensor) -> None:
    """Raises :class:`NotFiniteError` if a value of ``largest`` [N] is not finite."""
    if broken := int((~largest.isfinite()).sum()):
        raise NotFiniteError(broken, len(largest))


def refuse(largest: torch.Tensor, model: Any) -> None:
    """As :func:`check`, with a :class:`ModelError` that names the cause in ``model``."""
    try:
        check(largest)
    except NotFiniteError as found:
        raise explained(found, model) from None


def explained(found: NotFiniteError, model: Any) -> ModelError:
    """The error for a user: what was found in decoding with ``model``, why, and how to mend it."""
    what = (
        f"The model's scores for the next token were NaN or infinite in {found.broken} of "
        f"{found.total} completions: what it wrote means nothing"
    )
    damaged = [name for name, x in model.named_parameters() if not bool(x.isfinite().all())]
    if damaged:
        others = f" and {len(damaged) - 1} other weights are" if len(damaged) > 1 else " is"
        return ModelError(
            f"{what}. {damaged[0]}{others} NaN or infinite.",
            "Go back to an earlier checkpoint or load the weights anew; if training made them so, "
            "lower --learning_rate.",
        )
    dtype = str(next(model.parameters()).dtype).removeprefix("torch.")
    return ModelError(
        f"{what}. All weights are finite, so numbers overflowed on the way, in {dtype}.",
        "Use --dtype float32 (or bfloat16 in place of float16), or an earlier checkpoint: weights "
        "that have grown this large were trained at too high a --learning_rate.",
    )
