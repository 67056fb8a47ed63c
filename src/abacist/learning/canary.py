"""A canary for vLLM: do the engine that samples and the model that learns agree?

An adapter that never reached the sampling engine, a stale weight or a wrong temperature does not
show in the rewards at first. So every few steps the log-probabilities that vLLM reported for its
own tokens are compared with those of the training model. A vLLM in bfloat16 and a model in float32
differed by 0.03 to 0.05 on a CPU, weights that stayed behind by 0.8 after one large step; what
moves the policy less than rounding does is not seen (docs/engines.md). Not run on a GPU.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from abacist.errors import ModelError
from abacist.learning.reply_selection import loss_mask

LARGEST_MEAN_DIFFERENCE = 0.1


def filters(trainer: Any) -> bool:
    """Whether sampling changes the distribution beside its temperature: then vLLM reports the
    log-probabilities of the changed one, and they cannot be compared."""
    return bool(
        trainer.top_p < 1.0
        or (trainer.top_k or 0) > 0
        or trainer.min_p
        or trainer.repetition_penalty != 1.0
    )


def check(trainer: Any, output: Mapping[str, Any], step: int) -> None:
    """Compare vLLM's log-probabilities in ``output`` with the training model's.

    Raises :class:`ModelError` if they differ, on average over the tokens, by more than
    ``LARGEST_MEAN_DIFFERENCE``. Does nothing where vLLM reported none, or where they cannot be
    compared (:func:`filters`).
    """
    theirs = output.get("sampling_per_token_logps")
    if theirs is None or filters(trainer):
        return
    ours = output.get("old_per_token_logps")
    if ours is None:
        ids = torch.cat([output["prompt_ids"], output["completion_ids"]], dim=1)
        mask = torch.cat([output["prompt_mask"], output["completion_mask"]], dim=1)
        with torch.no_grad():
            ours, _, _ = trainer._get_per_token_logps_and_entropies(
                trainer.model,
                ids,
                mask,
                output["completion_ids"].size(1),
                batch_size=trainer.args.per_device_train_batch_size,
            )
    written = loss_mask(output).bool() & ~torch.isnan(theirs)
    found = torch.stack([(ours - theirs)[written].abs().sum(), written.sum()])
    # All processes compare all tokens: one that stopped alone would leave the others waiting.
    total, count = trainer.accelerator.reduce(found.float(), reduction="sum").tolist()
    difference = total / count if count else 0.0
    if not difference <= LARGEST_MEAN_DIFFERENCE:
        raise ModelError(
            f"At step {step} vLLM and the training model disagree about vLLM's own tokens: their "
            f"log-probabilities differ by {difference:.3g} on average, where rounding allows "
            f"{LARGEST_MEAN_DIFFERENCE}. vLLM is sampling from another model than the one that "
            "learns.",
            "Check that the server holds the same base model and receives the adapter, or train "
            "without --use_vllm.",
        )
