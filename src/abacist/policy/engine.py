"""The decoding engine: many completions at once, every token of work spent on one still open.

Hugging Face's ``generate`` prefills a prompt once for each of its samples, goes on decoding
finished rows until the slowest ends, and pays for adapters and modules at every token. Here

* a prompt is read once, what all prompts begin with once altogether (``cache.py``);
* the network is the bare arithmetic on merged weights (``lean.py``);
* finished rows leave, and waiting ones take their places (continuous batching);
* a row draws by numbers of its own (``drawing.py``), so none of this changes what it writes
  beyond the rounding of its logits.

The engine reads the model's weights when it is built and never writes to it: build one for each
generation, it costs milliseconds.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import torch

from abacist.errors import ModelError
from abacist.policy.cache import Cache, closed_up, common_prefix_tokens
from abacist.policy.drawing import Sampling, penalise_repetition, sample_tokens
from abacist.policy.lean import LeanNetwork, obstacle

__all__ = ["Engine", "Sampling", "obstacle"]

Progress = Callable[[int, int], None]
Ids = list[int]

_PREFIX_WORTH_SHARING_TOKENS = 8
# Letting rows leave costs about what decoding this fraction of them for one token more does.
_LEAVING_FRACTION = 1 / 16


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
            progress: called with (completions done, completions in all).

        Model, training mode and gradients stay as they are. Raises :class:`ModelError` for an
        empty prompt or budget.
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
        device_type = self._model.device.type
        with torch.inference_mode(), torch.autocast(device_type, enabled=False):
            longest = max(map(len, prompts)) + max_completion_tokens
            batch = _Batch(
                LeanNetwork(self._model, longest),
                prompts,
                max_completion_tokens,
                sampling,
                luck,
                stop_ids=self._stop_ids,
                pad_id=self._pad_id,
                max_rows=self._max_rows,
                progress=progress,
            )
            rows = iter(batch.run())
        return [list(itertools.islice(rows, count)) for count in samples]


class _Batch:
    """The state of one call: which rows are alive, where they lie, what each has written.

    Shapes: N rows alive, V vocabulary entries.
    """

    def __init__(
        self,
        network: LeanNetwork,
        prompts: list[tuple[int, ...]],
        budget_tokens: int,
        sampling: Sampling | None,
        uniforms: torch.Tensor | None,
        *,
        stop_ids: Sequence[int],
        pad_id: int,
        max_rows: int,
        progress: Progress | None,
    ) -> None:
        self._network, self._prompts, self._budget_tokens = network, prompts, budget_tokens
        self._sampling, self._progress = sampling, progress
        self._device = network.device
        self._luck = None
        if uniforms is not None:
            wide = torch.float32 if self._device.type == "mps" else torch.float64
            self._luck = uniforms[:, :budget_tokens].to(self._device, wide)
        self._stop_ids = torch.tensor(stop_ids, device=self._device)
        self._written_ids = torch.full((len(prompts), budget_tokens), pad_id, device=self._device)
        # Equal prompts together, the longest first: memory that does not suffice shows at once.
        order = sorted(range(len(prompts)), key=lambda row: (-len(prompts[row]), prompts[row]))
        self._waiting = deque(order)
        self._max_rows = min(max_rows, len(prompts))
        distinct = list(dict.fromkeys(prompts))
        self._cache = Cache(
            network,
            max_rows=self._max_rows,
            max_prompts=min(self._max_rows, len(distinct)),
            prompt_tokens=max(map(len, distinct)),
            completion_tokens=budget_tokens,
        )
        prefix = common_prefix_tokens(distinct)
        if prefix >= _PREFIX_WORTH_SHARING_TOKENS:
            self._cache.keep_prefix(distinct[0][:prefix])
        self._rows: list[int] = []  # alive, in the order of their places
        self._births: list[int] = []  # the step at which each of them came
        self._places: list[tuple[int, ...]] = []  # prompts alive, in the order of their places
        self._first_logits: dict[tuple[int, ...], torch.Tensor] = {}
        self._logits = torch.empty(0)  # of the next token, [N, V]
        self._seen = torch.empty(0)  # in prompt or completion, [N, V], if anybody asks
        self._step = self._deepest = self._done = 0

    def run(self) -> list[Ids]:
        """Decode until nobody is left; the ids of each row, in the order of ``prompts``."""
        self._fill()
        while self._rows:
            tokens = self._choose()
            self._written_ids.put_(self._slots, tokens)
            self._finished |= (tokens[:, None] == self._stop_ids).any(dim=1)
            due = self._step - self._oldest + 1 >= self._budget_tokens
            if due or int(self._finished.sum()) >= self._enough:  # the only wait for a GPU
                tokens = self._leave(tokens)
            if self._rows:
                self._advance(tokens)
            self._fill()
        return self._results()

    def _choose(self) -> torch.Tensor:
        """The next token of each row, [N]."""
        logits, sampling = self._logits, self._sampling
        if sampling is None or self._luck is None:
            return logits.argmax(dim=-1)
        logits = logits.float()
        if sampling.repetition_penalty != 1:
            logits = penalise_repetition(logits, self._seen, sampling.repetition_penalty)
        return sample_tokens(
            logits,
            self._luck.take(self._slots),
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            top_k=sampling.top_k,
            min_p=sampling.min_p,
        )

    def _advance(self, tokens: torch.Tensor) -> None:
        """Let every row read the token it wrote; their logits are then of the next one."""
        window = self._step - self._oldest + 1
        states = self._cache.step(
            tokens, self._prompt_tokens, self._written, window, in_step=self._in_step
        )
        self._logits = self._network.head(states)
        if self._penalises:
            self._seen[torch.arange(len(tokens), device=self._device), tokens] = True
        self._written += 1
        self._slots += 1
        self._step += 1
        self._deepest = max(self._deepest, window)

    def _leave(self, tokens: torch.Tensor) -> torch.Tensor:
        """Let finished rows go, the last ones taking their places; ``tokens`` of those who stay."""
        oldest = self._step + 1 - self._budget_tokens
        gone = [
            finished or birth <= oldest
            for finished, birth in zip(self._finished.tolist(), self._births, strict=True)
        ]
        order, sources, targets = closed_up(gone)
        self._done += sum(gone)
        self._rows = [self._rows[place] for place in order]
        self._births = [self._births[place] for place in order]
        if self._rows:
            self._cache.move_rows(sources, targets, self._deepest)
        needed = {self._prompts[row] for row in [*self._rows, *itertools.islice(self._waiting, 1)]}
        order_of_prompts, *moved = closed_up([prompt not in needed for prompt in self._places])
        self._cache.move_prompts(*moved)
        self._places = [self._places[place] for place in order_of_prompts]
        self._first_logits = {prompt: self._first_logits[prompt] for prompt in self._places}
        kept = torch.tensor(order, dtype=torch.long, device=self._device)
        self._logits = self._logits[:0]  # read; `_advance` brings the next
        if self._penalises:
            self._seen = self._seen[kept]
        self._arrange()
        if self._progress is not None:
            self._progress(self._done, len(self._prompts))
        return tokens[kept]

    def _fill(self) -> None:
        """Let waiting rows in while there is room, reading those prompts that are new."""
        room = min(self._max_rows - len(self._rows), len(self._waiting))
        if room <= 0:
            return
        rows = [self._waiting.popleft() for _ in range(room)]
        coming = dict.fromkeys(self._prompts[row] for row in rows)
        new = [prompt for prompt in coming if prompt not in self._first_logits]
        if new:
            states = self._cache.read_prompts(new, len(self._places))
            self._first_logits.update(zip(new, self._network.head(states), strict=True))
            self._places += new
        first = torch.stack([self._first_logits[self._prompts[row]] for row in rows])
        self._logits = torch.cat((self._logits, first)) if self._rows else first
        if self._penalises:
            seen = torch.zeros_like(first, dtype=torch.bool)
            for place, row in enumerate(rows):
                seen[place, list(self._prompts[row])] = True
            self._seen = torch.cat((self._seen, seen)) if self._rows else seen
        self._cache.clear_rows(len(self._rows), len(self._rows) + room, self._deepest)
        self._rows += rows
        self._births += [self._step] * room
        self._arrange()

    def _arrange(self) -> None:
        """Bring what is derived from rows, births and places up to date."""
        if not self._rows:
            return
        place_of = {prompt: place for place, prompt in enumerate(self._places)}
        prompts = [self._prompts[row] for row in self._rows]
        self._cache.arrange([place_of[p] for p in prompts], [len(p) for p in self._places])
        self._oldest = min(self._births)
        self._in_step = self._oldest == max(self._births)
        self._prompt_tokens = torch.tensor([len(p) for p in prompts], device=self._device)
        self._written = self._step - torch.tensor(self._births, device=self._device)
        rows = torch.tensor(self._rows, device=self._device)
        # Where the next tokens go, and lie in wait their luck: both are [rows, budget].
        self._slots = rows * self._budget_tokens + self._written
        self._finished = torch.zeros(len(self._rows), dtype=torch.bool, device=self._device)
        self._enough = max(1, round(_LEAVING_FRACTION * len(self._rows)))

    @property
    def _penalises(self) -> bool:
        return self._sampling is not None and self._sampling.repetition_penalty != 1

    def _results(self) -> list[Ids]:
        stops = (self._written_ids[..., None] == self._stop_ids).any(dim=-1)
        # Behind its stop a row may have written on until it left.
        lengths = torch.where(stops.any(dim=1), stops.int().argmax(dim=1) + 1, self._budget_tokens)
        return [
            ids[:length]
            for ids, length in zip(self._written_ids.tolist(), lengths.tolist(), strict=True)
        ]
