"""A running batch: which rows are in work, where they lie, who leaves and who takes the place.

A *row* is one completion. It waits, is in work for as many steps as it has tokens, and leaves. A
row's first token is chosen by the logits of its prompt (prefill); every step then lets each row
read its last token and chooses the next one.

How the rows are arranged:

* Rows in work are the first ones of every tensor below: places 0 to N - 1. When some leave, the
  last ones move into their places and waiting ones are added at the end (:meth:`Batch._leave`,
  :meth:`Batch._fill`), so a step never computes holes.
* Rows do not leave the moment they finish. Finding out who has finished waits for the device, and
  moving rows copies keys and values. So finished rows go on writing, unread, until enough have
  finished to be worth it (:meth:`Batch._arrange`).
* What a step needs to know of a row lies in tensors that never move (``_state`` and the ones below
  it), so that a step can be recorded as a CUDA graph (``graphs.py``). Only between steps are
  they written to from Python.
* A graph has a fixed number of rows. Where fewer are in work, the rest are *padding rows*: they
  repeat some computation and write into a line of ``_written_ids`` that nobody reads.

Shapes: R rows of the whole call, N rows in work (padding rows included), B token budget of a
completion, V vocabulary entries, C hidden size.
"""

from __future__ import annotations

import itertools
from collections import Counter, deque
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import torch

from abacist.policy import nonfinite
from abacist.policy.common_prefix import common_prefix_tokens
from abacist.policy.decoding import graphs
from abacist.policy.decoding.cache import Cache, closed_up
from abacist.policy.decoding.network import DecodingNetwork
from abacist.policy.decoding.progress import Decoded, Progress
from abacist.policy.decoding.token_sampling import (
    Sampling,
    penalise_repetition,
    sample_tokens,
    widest_float,
)

Ids = list[int]
Ended = Callable[[int, Ids], None]
"""Called with the number of a row that has ended, and its ids."""
Wrote = Callable[[Ids], None]
"""Called with the ids of the only row so far, after every token."""

_PREFIX_WORTH_SHARING_TOKENS = 8
# Rows leave once this fraction of them has finished. Letting rows leave costs about as much as
# decoding 1/16 of them for one more token. With graphs a token costs much less, but reading the
# prompts of new rows costs as much as before.
_LEAVING_FRACTION, _LEAVING_FRACTION_WITH_GRAPHS = 1 / 16, 1 / 4


class _Rows(NamedTuple):
    """What a step reads and writes of rows in neighbouring places: views of :class:`Batch`'s own
    tensors, so that writing to them changes the batch."""

    tokens: torch.Tensor  # [N], the token chosen last, which the next step reads
    prompt_tokens: torch.Tensor  # [N], length of the prompt
    read: torch.Tensor  # [N], tokens of the completion that have been read
    slots: torch.Tensor  # [N], index of the next token in the flattened [R + 1, B]
    counts: torch.Tensor  # [2, N], ``read`` and ``slots`` together
    finished: torch.Tensor  # [N], whether a stop token has been chosen
    largest: torch.Tensor  # [N], the largest logit so far
    seen: torch.Tensor  # [N, V], whether a token is in prompt or completion; empty if not needed


class Batch:
    """One call of the engine. For the arguments see ``Engine`` and ``Engine.complete``."""

    def __init__(
        self,
        network: DecodingNetwork,
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
        wrote: Wrote | None = None,
    ) -> None:
        self._network, self._prompts, self._budget_tokens = network, prompts, budget_tokens
        self._sampling, self._progress, self._replays = sampling, progress, replays
        self._ended, self._wrote = ended, wrote
        self._device = device = network.device
        # Line R of the next two is for padding rows.
        self._uniforms = None
        if uniforms is not None:
            uniforms_RB = uniforms[:, :budget_tokens]
            self._uniforms = torch.cat((uniforms_RB, uniforms_RB[:1])).to(
                device, widest_float(device)
            )
        self._written_ids = torch.full((len(prompts) + 1, budget_tokens), pad_id, device=device)
        self._stop_ids = torch.tensor(stop_ids, device=device)
        # Equal prompts together, so that their rows share what the cache holds. The longest first,
        # so that too little memory shows at once.
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
        # By place. The four lines are the tokens, prompt_tokens, read and slots of _Rows.
        self._state = torch.zeros(4, self._max_rows, dtype=torch.long, device=device)
        self._finished = torch.zeros(self._max_rows, dtype=torch.bool, device=device)
        self._largest = torch.zeros(self._max_rows, device=device)
        self._seen = torch.empty(0)
        if sampling is not None and sampling.repetition_penalty != 1:
            shape = (self._max_rows, len(network.embedding))
            self._seen = torch.zeros(shape, dtype=torch.bool, device=device)
        self._rows: list[int] = []  # rows in work, by place
        self._births: list[int] = []  # the step at which each of them came
        self._places: list[tuple[int, ...]] = []  # prompts in the cache, by place
        self._first_logits: dict[tuple[int, ...], torch.Tensor] = {}  # [V] of each of them
        # `_deepest` is the most completion tokens any row has had so far.
        self._step = self._deepest = self._done = self._done_tokens = 0

    def run(self) -> list[Ids]:
        """Decode until every row has ended; the ids of each, in the order of ``prompts``."""
        self._report_progress()
        if len(self._prefix) >= _PREFIX_WORTH_SHARING_TOKENS:
            self._cache.keep_prefix(self._prefix)
        self._fill()
        self._report_progress()
        self._tell_written()
        while self._rows:
            if self._is_time_to_leave():
                self._leave()
                self._fill()
            else:
                self._advance()
            self._report_progress()
            self._tell_written()
        return self._ids_of(self._written_ids[:-1])

    def _report_progress(self) -> None:
        """Report progress, as far as it is known without waiting for the device."""
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

    def _tell_written(self) -> None:
        """Tell what the only row has written; waits for the device."""
        if self._wrote is not None and self._rows:
            length = self._step - self._births[0] + 1
            (ids,) = self._ids_of(self._written_ids[self._rows[:1], :length])
            self._wrote(ids)

    def _is_time_to_leave(self) -> bool:
        if self._step - self._oldest + 1 >= self._budget_tokens:
            return True
        if self._replays is not None and self._step % graphs.TOKENS_BETWEEN_LOOKS:
            return False
        # The only place that waits for a GPU.
        return int(self._alive.finished.sum()) >= self._enough

    def _advance(self) -> None:
        """Let every row read the token it chose last, and choose the next."""
        window = self._step - self._oldest + 1  # tokens of the oldest row, the new one included
        goes_on = True
        if self._replays is None:
            self._write_next(self._alive, window)
        else:
            # A graph is recorded for sizes, so the sizes are rounded up to a few.
            padded = graphs.padded_window(window, self._budget_tokens)
            key = (self._decoded, padded, self._cache.shape)
            step = partial(self._write_next, self._rows_at(0, self._decoded), padded)
            changed = [self._state, self._finished, self._largest, self._seen]
            goes_on = self._replays.take(key, step, changed, padded - window + 1)
        self._step += 1
        self._deepest = max(self._deepest, window)
        if not goes_on:
            self._replays = None
            self._arrange(coming=0)

    def _rows_at(self, start: int, end: int) -> _Rows:
        """The rows in the places from ``start`` to ``end``."""
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
        """One step; returns the logits [N, V]. Where it is recorded, on CUDA, it touches only
        tensors that never move."""
        states_NC = self._cache.step(rows.tokens, rows.prompt_tokens, rows.read, window)
        logits_NV = self._network.logits(states_NC)
        self._write(logits_NV, rows)
        rows.counts.add_(1)
        return logits_NV

    def _write(self, logits_NV: torch.Tensor, rows: _Rows) -> None:
        """Choose the next token of each of ``rows`` and store it."""
        tokens_N = self._choose(logits_NV, rows)
        nonfinite.keep_largest(logits_NV, rows.largest)
        self._written_ids.put_(rows.slots, tokens_N)
        rows.finished.logical_or_((tokens_N[:, None] == self._stop_ids).any(dim=1))
        if self._penalises:
            rows.seen.scatter_(1, tokens_N[:, None], True)
        rows.tokens.copy_(tokens_N)

    def _choose(self, logits_NV: torch.Tensor, rows: _Rows) -> torch.Tensor:
        """The next token of each of ``rows``, [N]."""
        sampling = self._sampling
        if sampling is None or self._uniforms is None:
            return logits_NV.argmax(dim=-1)
        logits_NV = logits_NV.float()
        if self._penalises:
            logits_NV = penalise_repetition(logits_NV, rows.seen, sampling.repetition_penalty)
        return sample_tokens(logits_NV, self._uniforms.take(rows.slots), sampling)

    def _leave(self) -> None:
        """Remove finished rows, and the prompts that no row needs any more."""
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
            # The other lines of the state are written anew by _arrange.
            self._state[0, targets] = self._state[0, sources]
            if self._penalises:
                self._seen[targets] = self._seen[sources]
        # The prompt of the next waiting row stays too: it may have been read for its siblings.
        needed = {self._prompts[row] for row in [*self._rows, *itertools.islice(self._waiting, 1)]}
        order_of_prompts, *moved = closed_up([prompt not in needed for prompt in self._places])
        self._cache.move_prompts(*moved)
        self._places = [self._places[place] for place in order_of_prompts]
        self._first_logits = {prompt: self._first_logits[prompt] for prompt in self._places}

    def _fill(self) -> None:
        """Take in waiting rows while there is room, and read the prompts that are new."""
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
        newcomers = self._rows_at(len(self._rows) - room, len(self._rows))
        if self._penalises:
            newcomers.seen.zero_()
            for place, row in enumerate(coming):
                newcomers.seen[place, list(self._prompts[row])] = True
        first = [self._first_logits[self._prompts[row]] for row in coming]
        self._write(torch.stack(first), newcomers)
        newcomers.slots.add_(1)

    def _arrange(self, coming: int) -> None:
        """Derive the state of the next steps from the rows, births and places as they are now.

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
            else:
                # With nobody waiting, fewer rows save time only from the next smaller graph on.
                leaving = alive - graphs.fewer_rows(padded)
        self._enough = max(1, leaving)
        place_of = {prompt: place for place, prompt in enumerate(self._places)}
        prompts = [self._prompts[row] for row in self._rows]
        self._cache.arrange(
            [place_of[prompt] for prompt in prompts], list(map(len, self._places)), padded
        )
        self._oldest = min(self._births)
        padding = self._decoded - alive
        # A row has read all its tokens but the last, so it has chosen one more than it has read.
        read = [self._step - birth for birth in self._births] + [0] * padding
        chosen = [1] * (alive - coming) + [0] * (coming + padding)
        lengths = [len(prompt) for prompt in prompts] + [1] * padding
        rows = self._rows + [len(self._prompts)] * padding
        slots = [
            row * self._budget_tokens + count + one
            for row, count, one in zip(rows, read, chosen, strict=True)
        ]
        self._state[1:, : self._decoded] = torch.tensor([lengths, read, slots], device=self._device)
        self._finished[alive:] = True
        self._alive = self._rows_at(0, alive)

    @property
    def _penalises(self) -> bool:
        return self._sampling is not None and self._sampling.repetition_penalty != 1

    def _ids_of(self, written: torch.Tensor) -> list[Ids]:
        """The ids in these lines of ``_written_ids``, each up to its first stop token."""
        # A row may have written on behind its stop token until it left.
        stops = (written[..., None] == self._stop_ids).any(dim=-1)
        lengths = torch.where(stops.any(dim=1), stops.int().argmax(dim=1) + 1, self._budget_tokens)
        return [
            ids[:length] for ids, length in zip(written.tolist(), lengths.tolist(), strict=True)
        ]
