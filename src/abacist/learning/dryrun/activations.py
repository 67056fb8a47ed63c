"""What a forward keeps for its backward: counted, not guessed.

How many bytes of a model's inner states survive the forward depends on the model, the adapter,
mixed precision, the attention and the path the training takes; a formula for all of that would be
wrong somewhere. So a small batch is sent through the very forward that will train, autograd's own
list of saved tensors is added up, and the sum is scaled to the real batch, in which it is linear.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from abacist.learning import fastpath
from abacist.policy.families import FastPart


@dataclass(frozen=True)
class Forward:
    """What one forward keeps for its backward, without gradient checkpointing.

    ``group_bytes`` is for one group with the whole budget written; ``fixed_bytes`` does not grow
    with the batch (weights cast once, for example).
    """

    fixed_bytes: float
    group_bytes: float
    group_tokens: int  # positions that the backbone computes for one group
    group_size: int
    completion_tokens: int

    def kept_bytes(self, rows: float, hidden_bytes: int, layers: int, checkpointing: bool) -> float:
        """For a micro-batch of ``rows`` completions; ``hidden_bytes`` of one position."""
        groups = rows / self.group_size
        if not checkpointing:
            return self.fixed_bytes + groups * self.group_bytes
        # Only the input of each layer is kept, and one layer at a time is computed again.
        inputs = groups * self.group_tokens * hidden_bytes * layers
        return self.fixed_bytes + inputs + groups * self.group_bytes / layers


def measure_forward(trainer: Any, prompt_tokens: int, completion_tokens: int) -> Forward:
    """Send three small batches through the trainer's own forward and scale up what they keep.

    Call it before training: gradient checkpointing must not be on yet.
    """
    size = min(trainer.num_generations, trainer.args.per_device_train_batch_size)
    short = max(8, min(completion_tokens // 2, 32))
    one = _saved_bytes(trainer, 1, size, prompt_tokens, short)
    longer = _saved_bytes(trainer, 1, size, prompt_tokens, 2 * short)
    two = _saved_bytes(trainer, 2, size, prompt_tokens, short)
    each_token = max(0.0, (longer - one) / short)
    fixed = max(0.0, 2.0 * one - two)
    reads_prompt_once = fastpath.unsupported_reason(trainer, FastPart.SCORING) is None
    return Forward(
        fixed_bytes=fixed,
        group_bytes=one - fixed + each_token * (completion_tokens - short),
        group_tokens=(1 if reads_prompt_once else size) * prompt_tokens + size * completion_tokens,
        group_size=size,
        completion_tokens=completion_tokens,
    )


def _saved_bytes(trainer: Any, groups: int, size: int, prompt: int, completion: int) -> int:
    """Bytes that autograd keeps of one forward, the model's own weights left out."""
    model = trainer.model
    own = {t.untyped_storage().data_ptr() for t in [*model.parameters(), *model.buffers()]}
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    generator = torch.Generator().manual_seed(0)
    vocabulary = min(100, model.config.get_text_config().vocab_size)
    opening = torch.randint(vocabulary, (groups, 1, prompt), generator=generator)
    replies = torch.randint(vocabulary, (groups, size, completion), generator=generator)
    ids = torch.cat([opening.expand(-1, size, -1), replies], dim=2).flatten(0, 1)
    ids = ids.to(model.device)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t), torch.enable_grad():
        with trainer.accelerator.autocast():
            # The graph must live until all is counted, or a storage could be counted twice.
            graph = trainer._get_per_token_logps_and_entropies(
                model, ids, torch.ones_like(ids), completion, compute_entropy=True
            )
        found = sum(kept.values())
        del graph
    return found
