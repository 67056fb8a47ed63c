"""The rows that are written together: who is in work, where they lie, who comes and goes.

What a step needs of a row lies in tensors that never move (``_state`` and its companions), so
that a step can be recorded (:mod:`abacist.policy.graphs`). Between steps rows and prompts leave and
come, in place. A row's first token is chosen by the scores of its prompt; a step then lets every
row read its last token and choose the next.

Shapes: R rows at most, N of them decoded, V vocabulary entries.
"""

from __future__ import annotations

import itertools
from collections import Counter, deque
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import torch

from abacist.policy import graphs, nonfinite
from abacist.policy.cache import Cache, closed_up, common_prefix_tokens
from abacist.policy.drawing import Sampling, penalise_repetition, sample_tokens
from abacist.policy.lean import LeanNetwork
from abacist.policy.progress import Decoded, Progress

Ids = list[int]
Ended = Callable[[int, Ids], None]
"""Told the number of a row that has ended, and its ids."""

_PREFIX_WORTH_SHARING_TOKENS = 8
# Letting rows leave costs about what decoding this fraction of them for one token more does; with
# graphs a token costs much less, and reading the prompts of those who come as much as before.
_LEAVING_FRACTION, _LEAVING_FRACTION_WITH_GRAPHS = 1 / 16, 1 / 4


class _Rows(NamedTuple):
    """Rows in neighbouring places, as views of what :class:`Batch` keeps of all."""

    tokens: torch.Tensor  # chosen last and not yet read, [N]
    prompt_tokens: torch.Tensor
    read: torch.Tensor  # tokens of the completion
    slots: torch.Tensor  # where the next token goes, and lies in wait its luck: [rows, budget]
    counts: torch.Tensor  # read and slots, [2, N]
    finished: torch.Tensor
    largest: torch.Tensor  # of its scores so far
    seen: torch.Tensor  # in prompt or completion, if anybody asks, [N, V]


class Batch:
    """One call of the engine; its arguments are those of ``Engine`` and ``Engine.complete``."""

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
        replays: graphs.Replays | None,
        ended: Ended | None = None,
    ) -> None:
        self._network, self._prompts, self._budget_tokens = network, prompts, budget_tokens
        self._sampling, self._progress, self._replays = sampling, progress, replays
        self._ended = ended
        self._device = device = network.device
        # One row more, for those that nobody reads.
        self._luck = None
        if uniforms is not None:
            wide = torch.float32 if device.type == "mps" else torch.float64
            luck = uniforms[:, :budget_tokens]
            self._luck = torch.cat((luck, luck[:1])).to(device, wide)
        self._written_ids = torch.full((len(prompts) + 1, budget_tokens), pad_id, device=device)
        self._stop_ids = torch.tensor(stop_ids, device=device)
        # Equal prompts together, the longest first: memory that does not suffice shows at once.
        order = sorted(range(len(prompts)), key=lambda row: (-len(prompts[row]), prompts[row]))
        self._waiting = deque(order)
        self._max_rows = min(max_rows, len(prompts))
        distinct = Counter(prompts)
        self._cache = Cache(
            network,
            max_rows=self._max_rows,
            max_prompts=min(self._max_rows, len(distinct)),
            prompt_tokens=max(map(len, distinct)),
            completion_tokens=budget_tokens,
            rows_a_prompt=min(self._max_rows, max(distinct.values())),
        )
        self._prefix = prompts[0][: common_prefix_tokens(list(distinct))]
        # Tokens, prompt tokens, read and slots: see _Rows.
        self._state = torch.zeros(4, self._max_rows, dtype=torch.long, device=device)
        self._finished = torch.zeros(self._max_rows, dtype=torch.bool, device=device)
        self._largest = torch.zeros(self._max_rows, device=device)
        self._seen = torch.empty(0)
        if sampling is not None and sampling.repetition_penalty != 1:
            shape = (self._max_rows, len(network.embedding))
            self._seen = torch.zeros(shape, dtype=torch.bool, device=device)
        self._rows: list[int] = []  # alive, in the order of their places
        self._births: list[int] = []  # the step at which each of them came
        self._places: list[tuple[int, ...]] = []  # prompts alive, in the order of their places
        self._first_logits: dict[tuple[int, ...], torch.Tensor] = {}
        self._step = self._deepest = self._done = self._done_tokens = 0

    def run(self) -> list[Ids]:
        """Decode until nobody is left; the ids of each row, in the order of ``prompts``."""
        self._tell()
        if len(self._prefix) >= _PREFIX_WORTH_SHARING_TOKENS:
            self._cache.keep_prefix(self._prefix)
        self._fill()
        self._tell()
        while self._rows:
            if self._is_time_to_leave():
                self._leave()
                self._fill()
            else:
                self._advance()
            self._tell()
        return self._results()

    def _tell(self) -> None:
        """Say how far the batch is, as far as that is known without waiting for a device."""
        if self._progress is None:
            return
        alive = len(self._rows)
        self._progress(
            Decoded(
                replies=len(self._prompts),
                ended=self._done,
                ended_tokens=self._done_tokens,
                open=alive,
                open_tokens=alive * (self._step + 1) - sum(self._births),
                oldest_tokens=self._step + 1 - self._oldest if alive else 0,
                budget_tokens=self._budget_tokens,
            )
        )

    def _is_time_to_leave(self) -> bool:
        if self._step - self._oldest + 1 >= self._budget_tokens:
            return True
        if self._replays is not None and self._step % graphs.TOKENS_BETWEEN_LOOKS:
            return False
        # The only wait for a GPU.
        return int(self._alive.finished.sum()) >= self._enough

    def _advance(self) -> None:
        """Let every row read the token it wrote, and choose the next."""
        window = self._step - self._oldest + 1
        goes_on = True
        if self._replays is None:
            self._write_next(self._alive, window)
        else:
            padded = graphs.padded_window(window, self._budget_tokens)
            key = (self._decoded, padded, self._cache.shape)
            step = partial(self._write_next, self._places_of(0, self._decoded), padded)
            changed = [self._state, self._finished, self._largest, self._seen]
            goes_on = self._replays.take(key, step, changed, padded - window + 1)
        self._step += 1
        self._deepest = max(self._deepest, window)
        if not goes_on:
            self._replays = None
            self._arrange(coming=0)

    def _places_of(self, start: int, end: int) -> _Rows:
        rows = slice(start, end)
        tokens, prompt_tokens, read, slots = self._state[:, rows]
        return _Rows(
            tokens,
            prompt_tokens,
            read,
            slots,
            counts=self._state[2:, rows],
            finished=self._finished[rows],
            largest=self._largest[rows],
            seen=self._seen[rows],
        )

    def _write_next(self, rows: _Rows, window: int) -> torch.Tensor:
        """The step: it touches only tensors that stay, and can be recorded."""
        states = self._cache.step(rows.tokens, rows.prompt_tokens, rows.read, window)
        logits = self._network.head(states)
        self._write(logits, rows)
        rows.counts.add_(1)
        return logits

    def _write(self, logits: torch.Tensor, rows: _Rows) -> None:
        """Choose the next token of ``rows`` by ``logits``, and note it."""
        tokens = self._choose(logits, rows)
        nonfinite.keep_largest(logits, rows.largest)
        self._written_ids.put_(rows.slots, tokens)
        rows.finished.logical_or_((tokens[:, None] == self._stop_ids).any(dim=1))
        if self._penalises:
            rows.seen.scatter_(1, tokens[:, None], True)
        rows.tokens.copy_(tokens)

    def _choose(self, logits: torch.Tensor, rows: _Rows) -> torch.Tensor:
        """The next token of each of ``rows``, [N]."""
        sampling = self._sampling
        if sampling is None or self._luck is None:
            return logits.argmax(dim=-1)
        logits = logits.float()
        if self._penalises:
            logits = penalise_repetition(logits, rows.seen, sampling.repetition_penalty)
        return sample_tokens(
            logits,
            self._luck.take(rows.slots),
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            top_k=sampling.top_k,
            min_p=sampling.min_p,
        )

    def _leave(self) -> None:
        """Let finished rows go, the last ones taking their places."""
        nonfinite.check(self._alive.largest)
        oldest = self._step + 1 - self._budget_tokens
        finished = self._alive.finished.tolist()
        gone = [done or birth <= oldest for done, birth in zip(finished, self._births, strict=True)]
        self._finished[:] = False
        if self._ended is not None:
            leaving = [row for row, goes in zip(self._rows, gone, strict=True) if goes]
            for row, ids in zip(leaving, self._ids_of(self._written_ids[leaving]), strict=True):
                self._ended(row, ids)
        order, sources, targets = closed_up(gone)
        ended = [birth for birth, done in zip(self._births, gone, strict=True) if done]
        self._done += len(ended)
        self._done_tokens += len(ended) * (self._step + 1) - sum(ended)
        self._rows = [self._rows[place] for place in order]
        self._births = [self._births[place] for place in order]
        if sources:
            self._cache.move_rows(sources, targets, self._deepest)
            self._state[0, targets] = self._state[0, sources]
            if self._penalises:
                self._seen[targets] = self._seen[sources]
        needed = {self._prompts[row] for row in [*self._rows, *itertools.islice(self._waiting, 1)]}
        order_of_prompts, *moved = closed_up([prompt not in needed for prompt in self._places])
        self._cache.move_prompts(*moved)
        self._places = [self._places[place] for place in order_of_prompts]
        self._first_logits = {prompt: self._first_logits[prompt] for prompt in self._places}

    def _fill(self) -> None:
        """Let waiting rows in while there is room, reading those prompts that are new."""
        room = min(self._max_rows - len(self._rows), len(self._waiting))
        coming = [self._waiting.popleft() for _ in range(room)]
        wanted = dict.fromkeys(self._prompts[row] for row in coming)
        new = [prompt for prompt in wanted if prompt not in self._first_logits]
        if new:
            states = self._cache.read_prompts(new, len(self._places))
            self._first_logits.update(zip(new, self._network.head(states), strict=True))
            self._places += new
        self._rows += coming
        self._births += [self._step] * room
        self._arrange(room)
        if not coming:
            return
        newcomers = self._places_of(len(self._rows) - room, len(self._rows))
        if self._penalises:
            newcomers.seen.zero_()
            for place, row in enumerate(coming):
                newcomers.seen[place, list(self._prompts[row])] = True
        first = [self._first_logits[self._prompts[row]] for row in coming]
        self._write(torch.stack(first), newcomers)
        newcomers.slots.add_(1)

    def _arrange(self, coming: int) -> None:
        """Bring what is derived from rows, births and places up to date.

        The last ``coming`` rows have not chosen a token yet.
        """
        if not self._rows:
            return
        alive = self._decoded = len(self._rows)
        padded = None
        if self._replays is None:
            leaving = round(_LEAVING_FRACTION * alive)
        else:
            padded = self._decoded = graphs.padded_rows(alive, self._max_rows)
            if self._waiting:
                leaving = round(_LEAVING_FRACTION_WITH_GRAPHS * alive)
            else:  # fewer rows cost as much as long as they are not so few
                leaving = alive - graphs.fewer_rows(padded)
        self._enough = max(1, leaving)
        place_of = {prompt: place for place, prompt in enumerate(self._places)}
        prompts = [self._prompts[row] for row in self._rows]
        self._cache.arrange(
            [place_of[prompt] for prompt in prompts], list(map(len, self._places)), padded
        )
        self._oldest = min(self._births)
        nobodys = self._decoded - alive  # they write into a row of ids that nobody reads
        read = [self._step - birth for birth in self._births] + [0] * nobodys
        chosen = [1] * (alive - coming) + [0] * (coming + nobodys)
        lengths = [len(prompt) for prompt in prompts] + [1] * nobodys
        rows = self._rows + [len(self._prompts)] * nobodys
        slots = [
            row * self._budget_tokens + before + own
            for row, before, own in zip(rows, read, chosen, strict=True)
        ]
        self._state[1:, : self._decoded] = torch.tensor([lengths, read, slots], device=self._device)
        self._finished[alive:] = True
        self._alive = self._places_of(0, alive)

    @property
    def _penalises(self) -> bool:
        return self._sampling is not None and self._sampling.repetition_penalty != 1

    def _results(self) -> list[Ids]:
        return self._ids_of(self._written_ids[:-1])

    def _ids_of(self, written: torch.Tensor) -> list[Ids]:
        """What these rows of ids hold, [rows, budget], up to their first stop token."""
        stops = (written[..., None] == self._stop_ids).any(dim=-1)
        # Behind its stop a row may have written on until it left.
        lengths = torch.where(stops.any(dim=1), stops.int().argmax(dim=1) + 1, self._budget_tokens)
        return [
            ids[:length] for ids, length in zip(written.tolist(), lengths.tolist(), strict=True)
        ]
