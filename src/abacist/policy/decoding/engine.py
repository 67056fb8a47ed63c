"""The decoding engine: many completions at once, with no work on rows that have ended.

transformers' ``generate`` prefills a prompt once for each of its samples, keeps decoding finished
rows until the slowest has ended, and pays for adapters and modules at every token. Here

* each prompt is read once, and what all prompts begin with once for all (``cache.py``);
* the network is the bare arithmetic on merged weights (``network.py``); a single row of a large
  model reads the model's own weights instead of a copy;
* finished rows leave and waiting rows take their places (continuous batching, ``batch.py``);
* on CUDA a token is one replay of a recorded graph (``graphs.py``);
* each row samples by its own uniform numbers (``token_sampling.py``). So none of the above changes
  what a row writes, beyond the rounding of its logits.

The engine reads the model's weights when it is called and never writes to the model. Reading takes
milliseconds for a small model, a few seconds for one with billions of weights.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch

from abacist.errors import ModelError
from abacist.policy import nonfinite
from abacist.policy.decoding import graphs
from abacist.policy.decoding.batch import Batch, Ended, Ids, Wrote
from abacist.policy.decoding.network import DecodingNetwork
from abacist.policy.decoding.progress import Progress
from abacist.policy.decoding.token_sampling import Sampling
from abacist.policy.families import FastPart, unsupported_reason

__all__ = ["Engine", "Sampling"]


class Engine:
    """Writes completions with ``model``.

    Args:
        model: one that ``FastPart.DECODING`` supports; for others raises :class:`ModelError`.
        stop_ids: every token that ends a completion.
        pad_id: fills the ids of rows behind their end; never part of a result.
        max_rows: how many completions are in work at a time; memory grows with it.
    """

    def __init__(
        self, model: Any, *, stop_ids: Sequence[int], pad_id: int, max_rows: int = 64
    ) -> None:
        if (found := unsupported_reason(model, FastPart.DECODING)) is not None:
            raise ModelError(
                f"The decoding engine does not support this model: {found}.",
                "Use policy.decoding.generation.generate, which falls back to transformers.",
            )
        self._model = model
        self._stop_ids, self._pad_id = list(stop_ids), pad_id
        self._max_rows = max(1, max_rows)

    def complete(
        self,
        prompt_ids: Sequence[Sequence[int]],
        num_samples: int | Sequence[int],
        max_completion_tokens: int,
        sampling: Sampling | None,
        uniforms: torch.Tensor | torch.Generator | None = None,
        progress: Progress | None = None,
        ended: Ended | None = None,
        wrote: Wrote | None = None,
    ) -> list[list[Ids]]:
        """The completions of each prompt, stop token included.

        Args:
            prompt_ids: a list of token ids per prompt, none of them empty. Equal prompts are read
                once but get completions of their own.
            num_samples: completions of each prompt, or of every prompt.
            max_completion_tokens: where a completion without a stop token is cut.
            sampling: None is greedy.
            uniforms: the numbers in [0, 1) each row samples by, [rows, max_completion_tokens], rows
                in the order of the result; or the generator to draw them from (None: torch's global
                CPU generator, on every device).
            progress: called before the prompts are read and after every token.
            ended: called with each completion soon after its end, in no particular order: its row
                in the order of the result, and its ids. May be called twice for a row.
            wrote: called with the ids so far after every token, of one completion only.

        The model, its training mode and its gradients are not changed. Raises :class:`ModelError`
        for an empty prompt or budget, and if the model's logits are NaN or infinite.
        """
        samples = [num_samples] * len(prompt_ids) if isinstance(num_samples, int) else num_samples
        if max_completion_tokens < 1:
            raise ModelError("A completion of no tokens was asked for.", "Allow at least one.")
        for number, ids in enumerate(prompt_ids):
            if not ids:
                raise ModelError(f"Prompt {number} has no tokens.", "Leave it out.")
        prompts = [
            tuple(ids) for ids, count in zip(prompt_ids, samples, strict=True) for _ in range(count)
        ]
        if not prompts:
            return [[] for _ in samples]
        drawn = uniforms if isinstance(uniforms, torch.Tensor) else None
        if drawn is None and sampling is not None:
            generator = uniforms if isinstance(uniforms, torch.Generator) else None
            shape = (len(prompts), max_completion_tokens)
            drawn = torch.rand(shape, generator=generator, dtype=torch.float64)
        device = self._model.device

        def written(replays: graphs.Replays | None) -> list[Ids]:
            longest = max(map(len, prompts)) + max_completion_tokens
            batch = Batch(
                DecodingNetwork(self._model, longest, min(self._max_rows, len(prompts))),
                prompts,
                max_completion_tokens,
                sampling,
                drawn,
                stop_ids=self._stop_ids,
                pad_id=self._pad_id,
                max_rows=self._max_rows,
                progress=progress,
                replays=replays,
                ended=ended,
                wrote=wrote if len(prompts) == 1 else None,
            )
            return batch.run()

        with torch.inference_mode(), torch.autocast(device.type, enabled=False):
            try:
                rows = iter(graphs.with_replays(written, device, max_completion_tokens))
            except nonfinite.NotFiniteError as found:
                raise nonfinite.explained(found, self._model) from None
        return [list(itertools.islice(rows, count)) for count in samples]
