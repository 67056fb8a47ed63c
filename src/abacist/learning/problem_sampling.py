"""Which problems next: those that the policy sometimes solves.

A group in which every completion, or none, is correct has no outcome variance, and GRPO learns
nothing about the answer from it. :class:`SolveRateSampler` keeps a running estimate of each
problem's solve rate p and prefers problems with large p(1 - p), the variance of an outcome.
Problems not yet tried borrow the rate of their difficulty (a Beta prior pooled by difficulty),
and a fixed share of every batch goes to them, so that exploration never ends.

It is off by default: on the built-in task it reaches no accuracy in fewer rollouts than shuffled
epochs do (docs/lab.md, 2026-11-22). Where problems are scarce or far apart in difficulty, measure.

Every problem it can name is a training problem, and every outcome it hears is of a rollout that
was trained on; held-out and selection problems never reach it. A batch is chosen when the data
loader asks for it. Accelerate's loader fetches one generation batch ahead, so the choice of
batch n + 1 knows the outcomes up to batch n - 1; each prefetching worker adds to that delay.
"""

from __future__ import annotations

import math
import random
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass
from typing import Any

import torch
from datasets import IterableDataset
from torch.utils.data import Sampler
from trl.trainer.utils import RepeatSampler

from abacist.errors import DataError, UsageError
from abacist.task.answers import gold_of, same_answer
from abacist.task.reply import completion_text, parse_reply

CHOICES = ("uniform", "solve_rate")

# How many outcomes the rate of a difficulty is worth in the estimate of one of its problems.
# Small: problems of one difficulty differ much.
PRIOR_OUTCOMES = 2.0
# The policy moves on, so outcomes count half after so many batches.
# A shorter memory and the most mixed problems first make more groups mixed, and teach no faster
# (docs/lab.md, 2026-11-22).
HALF_LIFE_BATCHES = 10.0

Outcome = tuple[str, bool]


class EpochSampler(RepeatSampler):
    """TRL's sampler, with a place that can be kept: the same order, from any epoch on."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._epochs_begun = 0
        self._is_resumed = False

    def __iter__(self) -> Iterator[int]:
        self._epochs_begun += not self._is_resumed
        self._is_resumed = False
        yield from super().__iter__()

    def state_dict(self) -> dict[str, Any]:
        """How many epochs have been begun; the order of each follows from the seed."""
        return {"epochs_begun": self._epochs_begun}

    def load_state_dict(self, state: Mapping[str, Any], *, mid_epoch: bool = True) -> None:
        """Begin next with the epoch that was under way, or with the one after it."""
        self._epochs_begun = int(state["epochs_begun"])
        self._is_resumed = mid_epoch
        if self.shuffle:
            # One generator serves all epochs, and each takes one permutation from it.
            self.generator.manual_seed(self.generator.initial_seed())
            for _ in range(self._epochs_begun - mid_epoch):
                torch.randperm(self.num_samples, generator=self.generator)


@dataclass(eq=False)
class SolveRateSampler(Sampler[int]):
    """Indices of training problems in TRL's order: groups, batches, batches again.

    Args:
        problem_ids: one for each row of the data set, in its order; no two alike.
        difficulties: any label of each row; rows with the same label share a prior.
        problems_per_batch: different problems in one generation batch.
        copies: how many times each index is given in a row (the group size).
        repeats: how many times each batch is given (updates made from one generation batch).
        seed: the order depends on this and on the outcomes heard, and on nothing else.
        fresh_fraction: least share of a batch that goes to problems not yet tried, as long as
            there are any.
    """

    problem_ids: Sequence[str]
    difficulties: Sequence[object]
    _: KW_ONLY
    problems_per_batch: int
    copies: int = 1
    repeats: int = 1
    seed: int = 0
    fresh_fraction: float = 0.5

    def __post_init__(self) -> None:
        if len(set(self.problem_ids)) != len(self.problem_ids):
            raise DataError(
                "two training problems have the same problem_id",
                "Give each its own, or use --problem_sampling uniform.",
            )
        if self.problems_per_batch > len(self.problem_ids):
            raise DataError(
                f"{len(self.problem_ids)} training problems do not fill a batch of "
                f"{self.problems_per_batch}",
                "Give more problems, or make the batch smaller.",
            )
        self._labels = [str(label) for label in self.difficulties]
        self._index = {problem_id: at for at, problem_id in enumerate(self.problem_ids)}
        # [solved, tried], decayed; by index and by difficulty. A problem that was drawn and whose
        # outcomes are not known yet has [0, 0]: it is no longer fresh.
        self._problems: dict[int, list[float]] = {}
        self._pools: dict[str, list[float]] = {}
        self._waiting: set[int] = set()
        self._batches_drawn = 0
        self._epoch: list[list[int]] = []
        self._is_resumed = False

    def __len__(self) -> int:
        """As many indices as one epoch of TRL's sampler has."""
        batches = len(self.problem_ids) // self.problems_per_batch
        return batches * self.problems_per_batch * self.copies * self.repeats

    def __iter__(self) -> Iterator[int]:
        """One epoch. After :meth:`load_state_dict`: the epoch that was under way, from its
        beginning, with the batches that were drawn then (a resumed trainer skips them)."""
        if not self._is_resumed:
            self._epoch = []
        self._is_resumed = False
        for number in range(len(self.problem_ids) // self.problems_per_batch):
            if number == len(self._epoch):
                self._epoch.append(self._draw())
            batch = self._epoch[number]
            for _ in range(self.repeats):
                for index in batch:
                    yield from [index] * self.copies

    def observe(self, outcomes: Sequence[Outcome]) -> None:
        """Learn from one generation batch: a problem's id and whether a completion solved it."""
        decay = 0.5 ** (1 / HALF_LIFE_BATCHES)
        for counts in (*self._problems.values(), *self._pools.values()):
            counts[0] *= decay
            counts[1] *= decay
        for problem_id, is_solved in outcomes:
            index = self._index[problem_id]
            self._waiting.discard(index)
            for counts in (
                self._problems.setdefault(index, [0.0, 0.0]),
                self._pools.setdefault(self._labels[index], [0.0, 0.0]),
            ):
                counts[0] += is_solved
                counts[1] += 1

    def variance(self, index: int) -> float:
        """The expected p(1 - p) of a problem: between 0 (exclusive) and 1/4."""
        solved, tried = self._problems.get(index, (0.0, 0.0))
        rate = self._pooled_rate(self._labels[index])
        right = PRIOR_OUTCOMES * rate + solved
        wrong = PRIOR_OUTCOMES * (1 - rate) + tried - solved
        total = right + wrong
        return right * wrong / (total * (total + 1))

    def state_dict(self) -> dict[str, Any]:
        """All that the next batches depend on, as JSON takes it."""
        return {
            "seed": self.seed,
            "batches_drawn": self._batches_drawn,
            "epoch": [[self.problem_ids[index] for index in batch] for batch in self._epoch],
            "waiting": sorted(self.problem_ids[index] for index in self._waiting),
            "problems": {self.problem_ids[at]: list(n) for at, n in self._problems.items()},
            "pools": {label: list(counts) for label, counts in self._pools.items()},
        }

    def load_state_dict(self, state: Mapping[str, Any], *, mid_epoch: bool = True) -> None:
        """Go on where :meth:`state_dict` was taken, in the epoch of then or with the next one.

        Raises DataError for other problems."""
        try:
            self._epoch = [[self._index[one] for one in batch] for batch in state["epoch"]]
            self._waiting = {self._index[one] for one in state["waiting"]}
            self._problems = {self._index[one]: list(n) for one, n in state["problems"].items()}
        except KeyError as error:
            raise DataError(
                f"the saved sampling names {error}, which is not among the training problems",
                "Resume with the data set that the run was started on.",
            ) from error
        self._pools = {label: list(counts) for label, counts in state["pools"].items()}
        self.seed = int(state["seed"])
        self._batches_drawn = int(state["batches_drawn"])
        self._is_resumed = mid_epoch

    def _pooled_rate(self, difficulty: str) -> float:
        # One imagined success and one failure keep it off 0 and 1.
        solved, tried = self._pools.get(difficulty, (0.0, 0.0))
        return (solved + 1) / (tried + 2)

    def _draw(self) -> list[int]:
        """The next batch: fresh problems, and such tried ones as promise more than those."""
        rng = random.Random(f"{self.seed}/{self._batches_drawn}")
        everything = range(len(self.problem_ids))
        fresh = [index for index in everything if index not in self._problems]
        fresh_weights = [self.variance(index) for index in fresh]
        # Fresh ones are drawn in proportion to their promise; this is what that yields on average.
        expected = (
            sum(weight * weight for weight in fresh_weights) / sum(fresh_weights) if fresh else 0.0
        )
        tried = {
            index: self.variance(index)
            for index in sorted(self._problems)
            if index not in self._waiting
        }
        worth_it = {index: weight for index, weight in tried.items() if weight > expected}
        least_fresh = round(self.fresh_fraction * self.problems_per_batch)
        again = max(self.problems_per_batch - least_fresh, self.problems_per_batch - len(fresh))
        batch = _pick(rng, list(worth_it), list(worth_it.values()), again)
        batch += _pick(rng, fresh, fresh_weights, self.problems_per_batch - len(batch))
        if len(batch) < self.problems_per_batch:
            rest = [index for index in everything if index not in set(batch)]
            weights = [self.variance(index) for index in rest]
            batch += _pick(rng, rest, weights, self.problems_per_batch - len(batch))
        for index in batch:
            self._problems.setdefault(index, [0.0, 0.0])
        self._waiting.update(batch)
        self._batches_drawn += 1
        return batch


def _pick(
    rng: random.Random, indices: Sequence[int], weights: Sequence[float], count: int
) -> list[int]:
    """At most ``count`` different indices, drawn in proportion to their weights.

    By the largest of u ** (1 / weight), after Efraimidis and Spirakis (2006); of its logarithm, for
    the powers of small weights are all 0.
    """
    keys = {
        index: math.log(rng.random() or sys.float_info.min) / weight
        for index, weight in zip(indices, weights, strict=True)
    }
    return sorted(keys, key=lambda index: (-keys[index], index))[: max(count, 0)]


def sampler_for(trainer: Any) -> SolveRateSampler | None:
    """The sampler that ``trainer.args.problem_sampling`` asks for; None leaves TRL's.

    Raises UsageError or DataError where solve rates cannot be measured or used.
    """
    args, rows = trainer.args, trainer.train_dataset
    wanted = getattr(args, "problem_sampling", "uniform")
    if wanted == "uniform":
        return None
    if wanted not in CHOICES:
        raise UsageError(
            f"problem_sampling {wanted!r} is not known", f"It is one of {', '.join(CHOICES)}."
        )
    if isinstance(rows, IterableDataset) or not args.shuffle_dataset:
        raise UsageError(
            "problem_sampling solve_rate chooses problems, and this data comes in its own order",
            "Use a data set that can be indexed, with shuffle_dataset on, or uniform sampling.",
        )
    missing = {"problem_id", "answer"} - set(rows.column_names)
    if missing:
        raise DataError(
            f"problem_sampling solve_rate needs the column {' and '.join(sorted(missing))}",
            "Add it to the training data, or use uniform sampling.",
        )
    labelled = "difficulty" in rows.column_names
    return SolveRateSampler(
        list(rows["problem_id"]),  # a column of a data set is slow to index
        rows["difficulty"] if labelled else [None] * len(rows),
        problems_per_batch=args.generation_batch_size // trainer.num_generations,
        copies=trainer.num_generations,
        repeats=trainer.num_iterations * args.steps_per_generation,
        seed=args.seed,
    )


def outcomes(rows: Sequence[Mapping[str, Any]], completions: Sequence[Any]) -> list[Outcome]:
    """Whose problem each completion answers, and whether it does so correctly, if it has a gold."""
    return [
        (
            row["problem_id"],
            same_answer(parse_reply(completion_text(completion)).answer, gold),
        )
        for row, completion in zip(rows, completions, strict=True)
        if (gold := gold_of(row["answer"])) is not None
    ]
