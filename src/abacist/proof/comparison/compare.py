"""Before and after a training, compared problem by problem.

Both were measured on the same problems, so what counts is which problems changed: a paired
interval and an exact test see a gain that two separate intervals would hide.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from abacist.proof.comparison.alike import refuse_unlike
from abacist.proof.comparison.change import Paired, changes
from abacist.proof.comparison.split import Part, Shares, kinds_by_problem, split_of
from abacist.proof.evaluation import Evaluation
from abacist.proof.metrics import steps_label, structure_label
from abacist.proof.statistics import Interval, bootstrap_mean, clustered_proportion
from abacist.records.rollout import Rollout
from abacist.task.problems import Problem

__all__ = ["Comparison", "Example", "Paired", "changes", "compare"]

CONTROLS = NO_CONTROL, RANDOM, FORMAT = "none", "random", "format"


@dataclass(frozen=True, slots=True)
class Example:
    """One problem with the reply before and the reply after, and what became of it."""

    outcome: str
    problem: Problem
    before: Rollout
    after: Rollout

    def to_json(self, before: str = "before", after: str = "after") -> dict[str, str]:
        """What was asked, and both replies under these names."""
        return {
            "outcome": self.outcome,
            "problem_id": self.problem.problem_id,
            "question": self.problem.question,
            "gold": self.problem.answer,
            before: self.before.completion,
            after: self.after.completion,
        }


@dataclass(frozen=True)
class Comparison:
    """What changed between two evaluations of the same problems. Made by :func:`compare`.

    ``control`` says on which placebo rewards the later policy was trained, "none" for real ones.
    ``names`` are what a person calls the two, ``notes`` what else sets them apart.
    """

    before: Evaluation
    after: Evaluation
    control: str = NO_CONTROL
    allowed: tuple[str, ...] = ()
    names: tuple[str, str] = ("before", "after")
    notes: tuple[str, ...] = ()

    def __repr__(self) -> str:
        """One line; every figure is in ``changes``, the paired test in ``accuracy``."""
        control = f", control {self.control}" if self.control != NO_CONTROL else ""
        return f"<Comparison: {change_words(self)}{control}>"

    @property
    def is_sampled(self) -> bool:
        """Whether problems have several replies each, on either side."""
        return max(self.before.settings.num_samples, self.after.settings.num_samples) > 1

    def paired(self, measure: str, among: Collection[str] | None = None) -> Paired:
        """Any measure of ``metrics.SHARES``, on all problems or on those whose id is ``among``."""
        sides = [_values(side, measure, among) for side in (self.before, self.after)]
        if not self.is_sampled:
            was, became = ({i: value > 0 for i, value in side.items()} for side in sides)
            return Paired.of(was, became)
        whole = [_share(side, measure, among) for side in (self.before, self.after)]
        return Paired.of_shares(sides[0], sides[1], (whole[0], whole[1]))

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

        A change here is not the mere habit of working things out; see :attr:`shown_reasoning`. None
        too where problems have several replies, of which some show work and some do not.
        """
        return self._where_work_is_shown("correct")

    @cached_property
    def shown_reasoning(self) -> Paired | None:
        """The same in any format: what is left of :attr:`shown_work` without the layout."""
        return self._where_work_is_shown("any_format")

    def _where_work_is_shown(self, measure: str) -> Paired | None:
        if self.is_sampled:
            return None
        ids = set(self.paired("shows_work").both)
        return self.paired(measure, ids) if ids else None

    @cached_property
    def changes(self) -> dict[str, Interval]:
        """The paired change of every figure, under the names of :attr:`Evaluation.figures`."""
        return changes(self.before, self.after, allow_different=self.allowed)

    @cached_property
    def differences(self) -> dict[str, float]:
        """Accuracy after minus before of each problem, by id, in the problems' order."""
        was, became = _values(self.before, "correct"), _values(self.after, "correct")
        return {i: became[i] - was[i] for i in was}

    @cached_property
    def resampled(self) -> Interval:
        """The change in accuracy by bootstrap over problems, beside that of :attr:`accuracy`."""
        return bootstrap_mean(list(self.differences.values()))

    @cached_property
    def kinds(self) -> tuple[Shares, Shares]:
        """What the replies to each problem are, before and after: see :mod:`.split`."""
        first, second = (
            kinds_by_problem(side, _outcomes(side, "correct")) for side in (self.before, self.after)
        )
        return first, second

    @cached_property
    def split(self) -> dict[str, Part]:
        """The change in accuracy in its parts "format", "parser" and "reasoning"."""
        return split_of(*self.kinds)

    def by_kind(self) -> dict[str, Paired]:
        """Accuracy by number of steps, fewest first, then by seen and unseen structures."""
        return {label: self.paired("correct", ids) for label, ids in self.labelled().items()}

    def labelled(self) -> dict[str, set[str]]:
        """The ids of the problems of each kind that :meth:`by_kind` tells apart."""
        by_steps = sorted(self.before.problems, key=lambda problem: problem.difficulty)
        by_structure = sorted(self.before.problems, key=lambda p: bool(p.unseen_structure))
        return _ids(by_steps, steps_label) | _ids(by_structure, structure_label)

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
        outcome = next(name for name, ids in outcomes.items() if problem_id in ids)
        # Of several replies one that shows the change: gained is seen from wrong to right.
        was_right = outcome == "lost"
        return Example(
            outcome=outcome,
            problem=next(p for p in self.before.problems if p.problem_id == problem_id),
            before=_by_id(self.before, was_right)[problem_id],
            after=_by_id(self.after, outcome == "gained")[problem_id],
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
            "control": self.control,
            "before": self.before.to_json(),
            "after": self.after.to_json(),
            "changes": {name: found.to_json() for name, found in self.changes.items()},
            "paired": {name: part and part.to_json() for name, part in parts.items()},
            "accuracy_by_bootstrap": self.resampled.to_json(),
            "split": {name: part.to_json() for name, part in self.split.items()},
            "by_kind": {label: found.to_json() for label, found in self.by_kind().items()},
        }


def _outcomes(evaluation: Evaluation, measure: str) -> list[bool]:
    """Whether the measure is true, for each reply."""
    return [bool(getattr(mark, measure)) for mark in evaluation.marks]


def _values(
    evaluation: Evaluation, measure: str, among: Collection[str] | None = None
) -> dict[str, float]:
    """The share of each problem's replies of which the measure is true."""
    counts: dict[str, int] = {}
    for mark, outcome in zip(evaluation.marks, _outcomes(evaluation, measure), strict=True):
        if among is None or mark.problem_id in among:
            counts[mark.problem_id] = counts.get(mark.problem_id, 0) + outcome
    return {i: count / evaluation.settings.num_samples for i, count in counts.items()}


def _share(evaluation: Evaluation, measure: str, among: Collection[str] | None) -> Interval:
    owners = [mark.problem_id for mark in evaluation.marks]
    rows = zip(owners, _outcomes(evaluation, measure), strict=True)
    kept = [row for row in rows if among is None or row[0] in among]
    return clustered_proportion([outcome for _, outcome in kept], [owner for owner, _ in kept])


def _ids(
    problems: Collection[Problem], label_of: Callable[[Problem], str | None]
) -> dict[str, set[str]]:
    found: dict[str, set[str]] = {}
    for problem in problems:
        if (label := label_of(problem)) is not None:
            found.setdefault(label, set()).add(problem.problem_id)
    return found


def _by_id(evaluation: Evaluation, is_correct: bool | None = None) -> Mapping[str, Rollout]:
    """The first reply to each problem, of those with this outcome where there is one."""
    first: dict[str, Rollout] = {}
    for rollout in evaluation.rollouts:
        key = rollout.problem_id or ""
        known = first.setdefault(key, rollout)
        if known.is_correct != is_correct and rollout.is_correct == is_correct:
            first[key] = rollout
    return first


def change_words(comparison: Comparison) -> str:
    """What became of the accuracy, as the end of a sentence."""
    pair = comparison.accuracy
    before, after = (f"{100 * side.value:.1f} %" for side in (pair.before, pair.after))
    problems = f"{pair.change.n:,} problem{'s' * (pair.change.n != 1)}"
    return f"{before} → {after} correct on {problems}"


def compare(
    before: Evaluation,
    after: Evaluation,
    *,
    control: str = NO_CONTROL,
    allow_different: Collection[str] = (),
) -> Comparison:
    """Pair two evaluations of the same problems, greedy or sampled.

    ``control`` names the placebo the later policy was trained on, ``allow_different`` what may
    differ on purpose (``alike.ALLOWABLE``). Raises AbacistError, naming every difference, for
    evaluations of different problems, golds, prompts, shots, budgets or sampling.
    """
    refuse_unlike(before, after, allow_different=allow_different)
    return Comparison(before, after, known_control(control), tuple(allow_different))


def known_control(named: object) -> str:
    """The control that a run's settings name. They may be a stranger's, and are printed.

    >>> known_control("format"), known_control("\\x1b[2J")
    ('format', 'unknown')
    """
    return str(named) if named in CONTROLS else "unknown"
