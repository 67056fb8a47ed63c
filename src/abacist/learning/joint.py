"""Several micro-batches of one optimizer step through the network at once: the same gradient.

Under gradient accumulation TRL reads one micro-batch at a time, so that no more has to be held. Of
micro-batches packed as ours are (``policy.layout``), several often fit where TRL holds one; read
together they share what all prompts begin with, in fewer and larger operations.

The loss of each stays TRL's own. It is computed from the micro-batch's part of the common
log-probabilities, cut off from the network: its backward ends there and leaves its gradient. Only
the last part leads on into the network, and its backward takes the gradients of all parts along. By
the chain rule that is what they would have added up to one by one, whatever the loss and its
scaling; until then the weights have no gradient of these micro-batches.
"""

from __future__ import annotations

import bisect
import contextlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import TrainerCallback

from abacist.learning import fastpath
from abacist.policy.layout import lay_out

Values = tuple[Tensor, Tensor | None]
SHARE_OF_STOCK = 1 / 3
Score = Callable[[Tensor, Tensor, Tensor | None], Values]  # of ids, mask and rows to leave out


class MicroBatches(TrainerCallback):
    """The micro-batches that are still to come in an optimizer step, some of them read already."""

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer
        self._left = self._in_all = 0  # in this optimizer step, the present one included
        self._set: _Set | None = None

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._set = None
        self._left = self._in_all = self.trainer.current_gradient_accumulation_steps

    @property
    def position(self) -> tuple[int, int]:
        """How many micro-batches of this optimizer step are behind the present one, and all."""
        return self._in_all - self._left, self._in_all

    @contextlib.contextmanager
    def turn(self) -> Iterator[None]:
        """One micro-batch, forward and backward. If it fails, what was read with it is dropped."""
        try:
            yield
        except BaseException:
            self._set = None
            raise
        finally:
            self._left = max(0, self._left - 1)

    def part(
        self, input_ids: Tensor, attention_mask: Tensor, silent: Tensor | None, score: Score
    ) -> Values | None:
        """The present micro-batch's log-probabilities and entropies, from a common forward.

        None: read it by itself, as the only one that fits, or no part of a step as foreseen.
        """
        step = self.trainer._step
        if self._left < 1 or not torch.is_grad_enabled():
            return None
        if self._set is None or step >= self._set.end:
            self.close()
            self._set = _largest_set(self.trainer, self._left)
        if self._set is None or step < self._set.next_step:  # its turn came, and it asks again
            return None
        if step == self._set.next_step and self._set.holds(input_ids, attention_mask, silent):
            return self._set.take(score)
        self.close()
        return None

    def close(self) -> None:
        """Give up what was read ahead; the gradients of parts that had their turn come home."""
        if self._set is not None:
            self._set.backward()
        self._set = None


class _Set:
    """Micro-batches that are read together, and how many of them have had their turn."""

    def __init__(
        self, batches: Sequence[Mapping[str, Any]], silent: Sequence[Tensor | None], step: int
    ) -> None:
        self.batches, self.first_step, self.next_step = batches, step, step
        self.end = step + len(batches)
        self.input_ids = torch.cat([_joined(batch, "ids") for batch in batches])
        self.attention_mask = torch.cat([_joined(batch, "mask") for batch in batches])
        self.completion_width: int = batches[0]["completion_ids"].shape[1]
        self.silent = torch.zeros_like(self.input_ids[:, 0], dtype=torch.bool)
        for number, rows in enumerate(silent):
            if rows is not None:
                self.silent[self._rows(step + number)] = rows
        self._logps: Tensor | None = None
        self._entropies: Tensor | None = None
        self._parts: list[Tensor] = []

    def holds(self, input_ids: Tensor, attention_mask: Tensor, silent: Tensor | None) -> bool:
        """Whether this is the next micro-batch, with no row wanted that was to be left out."""
        rows = self._rows(self.next_step)
        missing = self.silent[rows] if silent is None else self.silent[rows] & ~silent
        have, want = (self.input_ids[rows], self.attention_mask[rows]), (input_ids, attention_mask)
        return all(map(torch.equal, have, want)) and not bool(missing.any())

    def take(self, score: Score) -> Values:
        """What belongs to the next micro-batch."""
        if self._logps is None:
            self._logps, self._entropies = score(self.input_ids, self.attention_mask, self.silent)
        rows = self._rows(self.next_step)
        entropies = None if self._entropies is None else self._entropies[rows]
        self.next_step += 1
        if self.next_step < self.end:
            part = self._logps.detach()[rows].clone().requires_grad_()
            self._parts.append(part)
            return part, entropies
        last: Tensor = _Last.apply(self._logps, self._parts)
        self._logps = None  # the graph is the last loss's now
        return last, entropies

    def backward(self) -> None:
        """Bring home what the parts have gathered, when no last micro-batch will do it."""
        if self._logps is not None:
            last = _Last.apply(self._logps, self._parts)
            last.backward(torch.zeros_like(last))

    def _rows(self, step: int) -> slice:
        size, number = len(self.input_ids) // len(self.batches), step - self.first_step
        return slice(number * size, (number + 1) * size)


class _Last(torch.autograd.Function):
    """The rows after all parts; their gradient takes those of the parts along."""

    @staticmethod
    def forward(ctx: Any, logps: Tensor, parts: list[Tensor]) -> Tensor:
        ctx.parts = parts
        return logps[sum(map(len, parts)) :].clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return torch.cat([*map(_gradient, ctx.parts), grad]), None


def _gradient(part: Tensor) -> Tensor:
    return torch.zeros_like(part) if part.grad is None else part.grad


def _joined(batch: Mapping[str, Any], kind: str) -> Tensor:
    return torch.cat([batch[f"prompt_{kind}"], batch[f"completion_{kind}"]], dim=1)


def _largest_set(trainer: Any, left: int) -> _Set | None:
    """As many micro-batches from the present one on as may be read together; None: only one."""
    at = trainer._step % trainer.args.steps_per_generation
    coming = (trainer._buffered_inputs or [])[at : at + left]  # of one generation and one step
    if len(coming) < 2 or "lomo" in trainer.args.optim:  # which takes a step in each backward
        return None
    silent = [fastpath.silent_rows(trainer, batch) for batch in coming]

    def first(count: int) -> _Set:
        return _Set(coming[:count], silent[:count], trainer._step)

    counts = range(2, len(coming) + 1)
    most = 1 + bisect.bisect_left(counts, True, key=lambda count: not _fits(first(count)))
    even = math.ceil(len(coming) / math.ceil(len(coming) / most))  # sets of one size hold least
    return None if most == 1 else first(even)


def _fits(together: _Set) -> bool:
    """Whether a set is small beside what stock TRL reads, padding and all, as one micro-batch.

    A micro-batch is how a user bounds memory. What packing spares should stay spared for the most
    part, so it is a share: enough for worked examples to be read once for all, while groups
    that are large without them, and gain little by company, stay alone.
    """
    layout = lay_out(
        together.input_ids, together.attention_mask, together.completion_width, together.silent
    )
    padded = together.input_ids.numel() / len(together.batches)
    return layout is None or len(layout.token_ids) <= SHARE_OF_STOCK * padded
