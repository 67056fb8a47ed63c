"""Make two decoders end every reply at a length that was drawn beforehand, each in its own way.

Hugging Face's ``generate`` takes a logits processor that leaves only the end token possible when a
row has reached its length. Our engine is given the end token at the same place, where it chooses
tokens; that reaches into its private ``_choose``, and :func:`check` fails loudly should it
no longer take effect. Everything behind the choice (stopping, retiring, replacing rows) is the
decoder's own, and both pay for choosing the token that is then overruled.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module, util
from typing import Any
from unittest import mock

import torch
from transformers import LogitsProcessor, LogitsProcessorList

ENGINE = "abacist.policy.decoding.batch"
_TOLERATED = 0.1  # an end token sampled by chance shortens a row; a length ignored does far more


class _EndAt(LogitsProcessor):
    def __init__(self, lengths: Sequence[int], end_id: int) -> None:
        self.lengths, self.end_id, self.written = lengths, end_id, 0

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self.written += 1
        if ending := [row for row, length in enumerate(self.lengths) if length == self.written]:
            scores = scores.clone()
            scores[ending] = -torch.inf
            scores[ending, self.end_id] = 0.0
        return scores


@contextmanager
def forced_generate(model: Any, lengths: Sequence[int], end_id: int) -> Iterator[None]:
    """Within, row r of one generation by ``model.generate`` ends with ``end_id`` as its
    ``lengths[r]``-th token."""
    processors = LogitsProcessorList([_EndAt(lengths, end_id)])
    generate = functools.partial(model.generate, logits_processor=processors)
    with mock.patch.object(model, "generate", generate):
        yield


@contextmanager
def forced_engine(lengths: Sequence[int], end_id: int) -> Iterator[None]:
    """The same for our engine. A replaced ``generate`` would be called instead of it."""
    if util.find_spec(ENGINE) is None:  # a tree from before the engine
        yield
        return
    batch: Any = import_module(ENGINE).Batch
    choose = batch._choose
    ends: dict[Any, torch.Tensor] = {}  # on each device: what is recorded must find it there

    def choose_or_end(self: Any, logits: torch.Tensor, rows: Any) -> torch.Tensor:
        tokens: torch.Tensor = choose(self, logits, rows)
        device = tokens.device
        if device not in ends:
            table = torch.zeros(self._written_ids.shape, dtype=torch.bool)
            table[torch.arange(len(lengths)), torch.tensor(lengths) - 1] = True
            ends[device] = table.to(device)
        return tokens.masked_fill_(ends[device].take(rows.slots), end_id)

    with mock.patch.object(batch, "_choose", choose_or_end):
        yield


def check(completion_ids: Sequence[Sequence[int]], lengths: Sequence[int]) -> None:
    """Raise RuntimeError if the replies are not of the lengths that were asked for."""
    written, wanted = sum(map(len, completion_ids)), sum(lengths)
    if abs(written - wanted) > _TOLERATED * wanted:
        raise RuntimeError(
            f"{written} tokens were decoded instead of {wanted}: the lengths of the replies were "
            "not forced (bench/forcing.py), and the two trainers cannot be compared."
        )
