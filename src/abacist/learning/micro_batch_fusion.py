"""Micro-batch fusion: several micro-batches of one optimizer step in one forward, same gradient.

Under gradient accumulation TRL forwards one micro-batch at a time, so that no more has to be held.
Of packed micro-batches (``policy.scoring.packing``) several often fit where TRL holds one. In one
forward they share what all prompts begin with, in fewer and larger operations.

The loss of each micro-batch stays TRL's own. With micro-batches 0, 1, 2 fused:

    forward of all           -> logps [3B, C], with a graph into the network
    loss of 0 on a leaf copy of logps[0:B];  backward ends there: leaf.grad
    loss of 1 on a leaf copy of logps[B:2B]; backward ends there: leaf.grad
    loss of 2 on logps[2B:3B], which leads into the network; its backward takes
        cat(grad of 0, grad of 1, grad of 2) along

By the chain rule the weights get the sum of the three gradients, whatever the loss and its scaling;
until the last backward they get nothing of these micro-batches.

Where not all micro-batches fit into one forward, what all their prompts begin with is read once for
them (``scoring.forward.SharedPrefix``), and gets its backward behind the last.

Shapes: B rows of a micro-batch, C completion width.
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
from abacist.policy.common_prefix import common_prefix_tokens
from abacist.policy.families import FastPart, compute_dtype_of
from abacist.policy.model_parts import base_of
from abacist.policy.scoring.forward import SharedPrefix
from abacist.policy.scoring.packing import pack

Values = tuple[Tensor, Tensor | None]
"""Log-probabilities [B, C], and entropies or None."""
Score = Callable[[Tensor, Tensor, Tensor | None], Values]
"""Of input ids and attention mask [B, P+C], and the rows [B] to skip."""
SHARE_OF_STOCK = 1 / 3
LEAST_PREFIX_TOKENS = 64  # for fewer, two passes through the layers are not worth it


class MicroBatchFusion(TrainerCallback):
    """Knows the micro-batches to come in an optimizer step, and those already forwarded."""

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer
        self._left = self._in_all = 0  # in this optimizer step, the present one included
        self._fused: _FusedBatches | None = None
        self._prefix: SharedPrefix | None = None

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._fused = self._prefix = None
        self._left = self._in_all = self.trainer.current_gradient_accumulation_steps

    @property
    def position(self) -> tuple[int, int]:
        """How many micro-batches of this optimizer step are done, and how many it has."""
        return self._in_all - self._left, self._in_all

    @contextlib.contextmanager
    def micro_batch(self) -> Iterator[None]:
        """Around forward and backward of one. If that fails, what was fused with it is dropped."""
        try:
            yield
            if self._prefix is not None and self._left <= 1:
                self._prefix.backward()
        except BaseException as error:
            prefix, self._fused, self._prefix = self._prefix, None, None
            if prefix is not None and isinstance(error, Exception):
                # A script may go on with what the micro-batches before have given the weights.
                with contextlib.suppress(Exception):
                    prefix.backward()
            raise
        finally:
            self._left = max(0, self._left - 1)

    def prefix(self) -> SharedPrefix | None:
        """What all prompts of this optimizer step begin with, if they are read in several parts.

        Asked at the first micro-batch that is scored, and kept for the others.
        """
        if self._left < 1 or not torch.is_grad_enabled():
            return None
        if self._left == self._in_all and self._prefix is None:
            together = 1 if self._fused is None else len(self._fused.batches)
            if together < self._left:
                self._prefix = _prefix_of(self.trainer, self._left)
        return self._prefix

    def values_of(
        self, input_ids: Tensor, attention_mask: Tensor, skip: Tensor | None, score: Score
    ) -> Values | None:
        """The present micro-batch's log-probabilities and entropies, from a fused forward.

        None: score this micro-batch alone. Either no other fits beside it, or it is not what the
        trainer had buffered (a script has changed it, or scores it a second time).
        """
        step = self.trainer._step
        if self._left < 1 or not torch.is_grad_enabled():
            return None
        if self._fused is None or step >= self._fused.end:
            self.close()
            self._fused = _largest_set(self.trainer, self._left)
        if self._fused is None or step < self._fused.next_step:  # it was given its part already
            return None
        if step == self._fused.next_step and self._fused.holds(input_ids, attention_mask, skip):
            return self._fused.next_part(score)
        self.close()
        return None

    def close(self) -> None:
        """Give up the fused forward; gradients of parts handed out go back into the network."""
        if self._fused is not None:
            self._fused.backward()
        self._fused = None


class _FusedBatches:
    """Micro-batches in one forward, and how many of them have been handed out."""

    def __init__(
        self, batches: Sequence[Mapping[str, Any]], skips: Sequence[Tensor | None], step: int
    ) -> None:
        self.batches, self.first_step, self.next_step = batches, step, step
        self.end = step + len(batches)
        self.input_ids = torch.cat([_joined(batch, "ids") for batch in batches])
        self.attention_mask = torch.cat([_joined(batch, "mask") for batch in batches])
        self.completion_width: int = batches[0]["completion_ids"].shape[1]
        self.skip = torch.zeros_like(self.input_ids[:, 0], dtype=torch.bool)
        for number, rows in enumerate(skips):
            if rows is not None:
                self.skip[self._rows(step + number)] = rows
        self._logps: Tensor | None = None
        self._entropies: Tensor | None = None
        self._parts: list[Tensor] = []

    def holds(self, input_ids: Tensor, attention_mask: Tensor, skip: Tensor | None) -> bool:
        """Whether this is the next micro-batch, and no row is wanted that was skipped."""
        rows = self._rows(self.next_step)
        missing = self.skip[rows] if skip is None else self.skip[rows] & ~skip
        have, want = (self.input_ids[rows], self.attention_mask[rows]), (input_ids, attention_mask)
        return all(map(torch.equal, have, want)) and not bool(missing.any())

    def next_part(self, score: Score) -> Values:
        """What belongs to the next micro-batch."""
        if self._logps is None:
            self._logps, self._entropies = score(self.input_ids, self.attention_mask, self.skip)
        rows = self._rows(self.next_step)
        entropies = None if self._entropies is None else self._entropies[rows]
        self.next_step += 1
        if self.next_step < self.end:
            part = self._logps.detach()[rows].clone().requires_grad_()
            self._parts.append(part)
            return part, entropies
        last: Tensor = _LastPart.apply(self._logps, self._parts)
        self._logps = None  # the graph belongs to the last loss now
        return last, entropies

    def backward(self) -> None:
        """Send the gradients of the parts into the network, where no last loss will do it."""
        if self._logps is not None:
            with torch.enable_grad():
                last = _LastPart.apply(self._logps, self._parts)
                last.backward(torch.zeros_like(last))

    def _rows(self, step: int) -> slice:
        size, number = len(self.input_ids) // len(self.batches), step - self.first_step
        return slice(number * size, (number + 1) * size)


class _LastPart(torch.autograd.Function):
    """The rows of ``logps`` after those of ``parts``; the backward puts the parts' before them."""

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


def _coming(trainer: Any, left: int) -> list[Mapping[str, Any]]:
    """The micro-batches from the present one on, of one generation and one step.

    Empty where they may not be computed together, or there is only one.
    """
    at = trainer._step % trainer.args.steps_per_generation
    coming = (trainer._buffered_inputs or [])[at : at + left]
    if len(coming) < 2 or fastpath.unsupported_setting(trainer, FastPart.MICRO_BATCH_FUSION):
        return []
    return list(coming)


def _prefix_of(trainer: Any, left: int) -> SharedPrefix | None:
    """What the prompts of the coming micro-batches begin with; None: not worth it, or not exact."""
    coming, base = _coming(trainer, left), base_of(trainer.model)
    if (
        not coming
        or any(layer.gradient_checkpointing for layer in base.model.layers)
        or compute_dtype_of(base) != torch.float32
    ):
        return None
    prompts = {
        tuple(ids[mask > 0].tolist())
        for batch in coming
        for ids, mask in zip(batch["prompt_ids"], batch["prompt_mask"], strict=True)
    }
    shared = common_prefix_tokens([*prompts])
    return SharedPrefix(next(iter(prompts))[:shared]) if shared >= LEAST_PREFIX_TOKENS else None


def _largest_set(trainer: Any, left: int) -> _FusedBatches | None:
    """As many micro-batches from the present one on as may be fused; None: only one."""
    if not (coming := _coming(trainer, left)):
        return None
    skips = [fastpath.zero_advantage_rows(trainer, batch) for batch in coming]

    def first(count: int) -> _FusedBatches:
        return _FusedBatches(coming[:count], skips[:count], trainer._step)

    counts = range(2, len(coming) + 1)
    most = 1 + bisect.bisect_left(counts, True, key=lambda count: not _fits(first(count)))
    even = math.ceil(len(coming) / math.ceil(len(coming) / most))  # sets of one size hold least
    return None if most == 1 else first(even)


def _fits(fused: _FusedBatches) -> bool:
    """Whether the packed tokens are few beside those of one padded micro-batch of stock TRL.

    The size of a micro-batch is how a user bounds memory, and most of what packing saves should
    stay saved. A third is enough to read worked examples once for several micro-batches. Groups
    without worked examples gain little by being fused, and mostly stay alone.
    """
    packing = pack(fused.input_ids, fused.attention_mask, fused.completion_width, fused.skip)
    padded_tokens = fused.input_ids.numel() / len(fused.batches)
    return packing is None or len(packing.token_ids) <= SHARE_OF_STOCK * padded_tokens
