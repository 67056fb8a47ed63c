"""The decoding engine: many completions at once, every token of work spent on one still open.

Hugging Face's ``generate`` prefills a prompt once for each of its samples, goes on decoding
finished rows until the slowest ends, and pays for adapters and modules at every token. Here

* a prompt is read once, what all prompts begin with once altogether (``cache.py``);
* the network is the bare arithmetic on merged weights (``lean.py``); a single row of a large model
  reads the model's own, without a second copy;
* finished rows leave, and waiting ones take their places (continuous batching, ``batch.py``);
* on CUDA a token is one replay of a recorded graph (``graphs.py``);
* a row draws by numbers of its own (``drawing.py``), so none of this changes what it writes
  beyond the rounding of its logits.

The engine reads the model's weights when it is built and never writes to it: build one for each
generation. For a small model it costs milliseconds, for one of billions of weights a few seconds.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch

from abacist.errors import ModelError
from abacist.policy import graphs, nonfinite
from abacist.policy.batch import Batch, Ended, Ids
from abacist.policy.drawing import Sampling
from abacist.policy.lean import LeanNetwork, obstacle
from abacist.policy.progress import Progress

__all__ = ["Engine", "Sampling", "obstacle"]


class Engine:
    """Writes completions with ``model`` as its weights are now.

    Args:
        model: a model for which ``obstacle(model)`` is None; else :class:`ModelError`.
        stop_ids: every token that ends a completion.
        pad_id: unused by the arithmetic; what ids of finished rows are filled with.
        max_rows: completions in work at a time; memory grows with it.
    """

    def __init__(
        self, model: Any, *, stop_ids: Sequence[int], pad_id: int, max_rows: int = 64
    ) -> None:
        if (found := obstacle(model)) is not None:
            raise ModelError(
                f"The decoding engine cannot take this model: {found}.",
                "Let decoding.generate choose: it falls back to transformers.",
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
    ) -> list[list[Ids]]:
        """The completions of each prompt, the stop token included.

        Args:
            prompt_ids: one list of token ids for each prompt, none of them empty. Equal prompts
                are read once; they still get completions of their own.
            num_samples: completions of each prompt, or of every prompt.
            max_completion_tokens: where a completion without a stop token is cut.
            sampling: None is greedy.
            uniforms: the luck of each row, [rows, max_completion_tokens] in [0, 1), rows in the
                order of the result; or the generator to draw it from (None: torch's own, of the
                CPU on every device).
            progress: told how far it is, before the prompts are read and after every token.
            ended: called with each completion soon after its end, in no order: its place in the
                result, counted through all prompts, and its ids. Twice with the same, perhaps.

        Model, training mode and gradients stay as they are. Raises :class:`ModelError` for an
        empty prompt or budget, and where the model's scores are NaN or infinite.
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
        luck = uniforms if isinstance(uniforms, torch.Tensor) else None
        if luck is None and sampling is not None:
            generator = uniforms if isinstance(uniforms, torch.Generator) else None
            shape = (len(prompts), max_completion_tokens)
            luck = torch.rand(shape, generator=generator, dtype=torch.float64)
        device = self._model.device

        def written(replays: graphs.Replays | None) -> list[Ids]:
            longest = max(map(len, prompts)) + max_completion_tokens
            batch = Batch(
                LeanNetwork(self._model, longest, min(self._max_rows, len(prompts))),
                prompts,
                max_completion_tokens,
                sampling,
                luck,
                stop_ids=self._stop_ids,
                pad_id=self._pad_id,
                max_rows=self._max_rows,
                progress=progress,
                replays=replays,
                ended=ended,
            )
            return batch.run()

        with torch.inference_mode(), torch.autocast(device.type, enabled=False):
            try:
                rows = iter(graphs.with_replays(written, device, max_completion_tokens))
            except nonfinite.NotFiniteError as found:
                raise nonfinite.explained(found, self._model) from None
        return [list(itertools.islice(rows, count)) for count in samples]
