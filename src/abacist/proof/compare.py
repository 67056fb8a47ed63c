"""Before against after: a training judged problem by problem.

Both were measured on the same problems, so what counts is which problems changed: a paired
interval and an exact test see a gain that two separate intervals would hide.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from abacist.errors import AbacistError
from abacist.proof.change import Paired, changes, refuse_unlike
from abacist.proof.evaluation import Evaluation
from abacist.proof.statistics import Interval
from abacist.records.rollout import Rollout
from abacist.task.problems import Problem

__all__ = ["Comparison", "Example", "Paired", "changes", "compare"]


@dataclass(frozen=True, slots=True)
class Example:
    """One problem with the reply before and the reply after, and what became of it."""

    outcome: str
    problem: Problem
    before: Rollout
    after: Rollout


@dataclass(frozen=True)
class Comparison:
    """What changed between two greedy evaluations of the same problems. Made by :func:`compare`."""

    before: Evaluation
    after: Evaluation

    def paired(self, measure: str, among: Collection[str] | None = None) -> Paired:
        """Any measure of ``metrics.SHARES``, on all problems or on those whose id is ``among``."""

        def outcomes(evaluation: Evaluation) -> dict[str, bool]:
            return {
                mark.problem_id: bool(getattr(mark, measure))
                for mark in evaluation.marks
                if among is None or mark.problem_id in among
            }

        return Paired.of(outcomes(self.before), outcomes(self.after))

    @cached_property
    def accuracy(self) -> Paired:
        """Right by our rule."""
        return self.paired("correct")

    @cached_property
    def any_format(self) -> Paired:
        """Right wherever the number stands: what is left of a gain without the format."""
        return self.paired("any_format")

    @cached_property
    def unseen(self) -> Paired | None:
        """Accuracy on problems of structures never trained on; None if there are none."""
        ids = {p.problem_id for p in self.before.problems if p.unseen_structure}
        return self.paired("correct", ids) if ids else None

    @cached_property
    def shown_work(self) -> Paired | None:
        """Accuracy where work is shown both before and after; None if there is no such problem.

        A change here is neither format nor the mere habit of working things out.
        """
        ids = set(self.paired("shows_work").both)
        return self.paired("correct", ids) if ids else None

    @cached_property
    def changes(self) -> dict[str, Interval]:
        """The paired change of every figure, under the names of :attr:`Evaluation.figures`."""
        return changes(self.before, self.after)

    def examples(self, count: int = 3) -> list[Example]:
        """Up to ``count`` problems before and after, the same ones every time.

        One gained, one gained on an unseen structure (from three on), one still wrong; what is
        missing is filled up from the lost and the gained. Among candidates come first those whose
        later reply has form and work to look at, then two-step problems, then short replies.
        """
        gained = self._ranked(self.accuracy.gained)
        wrong = self._ranked(self.accuracy.neither)
        lost = self._ranked(self.accuracy.lost)
        unseen = {p.problem_id for p in self.before.problems if p.unseen_structure}
        on_seen = [problem_id for problem_id in gained if problem_id not in unseen]
        on_unseen = [problem_id for problem_id in gained if problem_id in unseen]
        wished = (on_seen or gained)[:1] + (on_unseen[:1] if count > 2 else []) + wrong[:1]
        chosen = list(dict.fromkeys([*wished, *lost, *gained, *wrong]))[:count]
        # What is still wrong comes last, whatever filled the places before it.
        chosen.sort(key=lambda problem_id: problem_id in wrong)
        return [self._example(problem_id) for problem_id in chosen]

    def _ranked(self, problem_ids: Collection[str]) -> list[str]:
        problems = {problem.problem_id: problem for problem in self.before.problems}
        adheres = {mark.problem_id: mark.adheres for mark in self.after.marks}
        first, second = _by_id(self.before), _by_id(self.after)

        def key(problem_id: str) -> tuple[bool, int, int, str]:
            length = len(first[problem_id].completion) + len(second[problem_id].completion)
            distance = abs(problems[problem_id].difficulty - 2)
            return not adheres[problem_id], distance, length, problem_id

        return sorted(problem_ids, key=key)

    def _example(self, problem_id: str) -> Example:
        outcomes = {
            "gained": self.accuracy.gained,
            "lost": self.accuracy.lost,
            "still wrong": self.accuracy.neither,
        }
        return Example(
            outcome=next(name for name, ids in outcomes.items() if problem_id in ids),
            problem=next(p for p in self.before.problems if p.problem_id == problem_id),
            before=_by_id(self.before)[problem_id],
            after=_by_id(self.after)[problem_id],
        )

    def to_json(self) -> dict[str, Any]:
        """Both evaluations' figures, every change, and the paired tests; without the replies."""
        parts = {
            "accuracy": self.accuracy,
            "any_format": self.any_format,
            "unseen_structures": self.unseen,
            "work_shown_both_times": self.shown_work,
        }
        return {
            "before": self.before.to_json(),
            "after": self.after.to_json(),
            "changes": {name: found.to_json() for name, found in self.changes.items()},
            "paired": {name: part and part.to_json() for name, part in parts.items()},
        }


def _by_id(evaluation: Evaluation) -> dict[str, Rollout]:
    return {rollout.problem_id or "": rollout for rollout in evaluation.rollouts}


def compare(before: Evaluation, after: Evaluation) -> Comparison:
    """Pair two greedy evaluations.

    Raises AbacistError, naming the difference, for evaluations of different problems or budgets,
    and for several replies to a problem: their figures can be set side by side with
    :func:`changes`, but no single problem is gained or lost.
    """
    refuse_unlike(before, after)
    if before.settings.num_samples != 1:
        raise AbacistError(
            f"Gained and lost problems need one reply to each, not {before.settings.num_samples}.",
            "Compare greedy evaluations (num_samples=1, temperature=0).",
        )
    return Comparison(before, after)
