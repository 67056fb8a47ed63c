"""What the benches train on: prompts, replies of drawn lengths, and a reward for each.

Every step has a batch of its own, drawn from its number: other problems, other lengths, other
tokens. A library that compiles for every shape it has not met (oneDNN does) would pay for that
once on one batch again and again, and pays all the time in a real run. The same number is the
same batch, whoever trains on it.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

from abacist.task.problems import load_problems
from abacist.task.prompts import SYSTEM_PROMPT, choose_shots, to_dataset_rows
from models import SHAPES, TINY, build_tokenizer

_PROBLEMS_FOR_SHOTS = 40
_SMALL_REPLY_TOKENS = 3


@dataclass(frozen=True)
class Batch:
    """One step's work: ``rows`` as TRL reads them, one a prompt, and the ``replies`` (token ids)
    that are trained on, one for each sample of each prompt."""

    rows: list[dict[str, Any]]
    replies: list[list[int]]

    @property
    def lengths(self) -> list[int]:
        return [len(ids) for ids in self.replies]


def draw_batch(name: str, *, shots: int, prompts: int, generations: int, number: int) -> Batch:
    """The batch of step ``number`` for ``SHAPES[name]``.

    One reply, anywhere in the batch, has the longest length of the shape. The worked examples in
    front of every problem are the same in all steps, as they are in a run.
    """
    known = _PROBLEMS_FOR_SHOTS + prompts * number
    problems = load_problems("generated", split="train", limit=known + prompts, seed=0)
    rows = to_dataset_rows(
        problems[known:],
        # The built-in model was taught without the system text, as its recipe says.
        system_prompt=None if name == TINY else SYSTEM_PROMPT,
        shots=choose_shots(problems[:_PROBLEMS_FOR_SHOTS], shots, seed=0),
    )
    shortest, longest = SHAPES[name].lengths
    draw = random.Random(number)
    lengths = [draw.randint(shortest, longest) for _ in range(prompts * generations)]
    lengths[draw.randrange(len(lengths))] = longest
    return Batch(rows, _replies(name, lengths, draw))


def small_batch(name: str, *, prompts: int, generations: int) -> Batch:
    """As many rows, but of hardly any tokens: it runs the code and holds next to nothing."""
    rows = [{"prompt": [{"role": "user", "content": str(place)}]} for place in range(prompts)]
    lengths = [_SMALL_REPLY_TOKENS] * (prompts * generations)
    return Batch(rows, _replies(name, lengths, random.Random(0)))


def uneven_reward(prompts: list[Any], completions: list[Any], **columns: Any) -> list[float]:
    """A reward of nothing but the row's place: every group has variance, no row can be skipped."""
    return [(3 * place % 8) / 4 for place in range(len(completions))]


def _replies(name: str, lengths: list[int], draw: random.Random) -> list[list[int]]:
    """Ordinary tokens, and the end token last, as in replies that were not cut off."""
    tokenizer = build_tokenizer(name)
    special = set(tokenizer.all_special_ids)
    ordinary = [index for index in range(len(tokenizer)) if index not in special]
    return [[*draw.choices(ordinary, k=n - 1), tokenizer.eos_token_id] for n in lengths]
