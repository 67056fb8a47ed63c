"""What changed between two evaluations of the same problems, figure by figure.

The unit is the problem, and every change is paired: a problem is set against itself. What
cannot be paired is refused, never compared anyway.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from abacist.errors import AbacistError
from abacist.proof.evaluation import Evaluation
from abacist.proof.metrics import SHARES, by_problem, keeps_answer, keeps_format
from abacist.proof.statistics import (
    Interval,
    clustered_difference,
    clustered_mean,
    mcnemar,
    paired_difference,
    proportion,
)
from abacist.records.rollout import REWARD_PREFIX


@dataclass(frozen=True, slots=True)
class Paired:
    """A yes-or-no measure of the same problems before and after; ids in the problems' order.

    ``p_value`` is that of the exact two-sided McNemar test.
    """

    before: Interval
    after: Interval
    change: Interval
    p_value: float
    gained: tuple[str, ...]
    lost: tuple[str, ...]
    both: tuple[str, ...]
    neither: tuple[str, ...]

    @classmethod
    def of(cls, before: Mapping[str, bool], after: Mapping[str, bool]) -> Paired:
        """Pairs two measurements by problem id; both must hold the same ids."""
        first = [before[problem_id] for problem_id in before]
        second = [after[problem_id] for problem_id in before]

        def ids(was: bool, became: bool) -> tuple[str, ...]:
            return tuple(i for i in before if before[i] is was and after[i] is became)

        gained, lost = ids(False, True), ids(True, False)
        return cls(
            before=proportion(first),
            after=proportion(second),
            change=paired_difference(first, second),
            p_value=mcnemar(len(gained), len(lost)),
            gained=gained,
            lost=lost,
            both=ids(True, True),
            neither=ids(False, False),
        )

    @property
    def is_better(self) -> bool:
        """Whether interval and test agree that it rose."""
        return self.change.low > 0 and self.p_value < 0.05

    @property
    def is_worse(self) -> bool:
        """Whether interval and test agree that it fell."""
        return self.change.high < 0 and self.p_value < 0.05

    def to_json(self) -> dict[str, Any]:
        """Intervals as objects, the changed problems by id, the unchanged by their number."""
        return {
            "before": self.before.to_json(),
            "after": self.after.to_json(),
            "change": self.change.to_json(),
            "p_value": self.p_value,
            "test": "McNemar, exact, two-sided",
            "gained": list(self.gained),
            "lost": list(self.lost),
            "both": len(self.both),
            "neither": len(self.neither),
        }


def refuse_unlike(before: Evaluation, after: Evaluation) -> None:
    """Raise AbacistError, naming the difference, if problems or conditions are not the same."""
    first = {problem.problem_id: problem for problem in before.problems}
    second = {problem.problem_id: problem for problem in after.problems}
    hint = "Evaluate both models on the same problems: same source, split, limit and seed."
    if first.keys() != second.keys():
        only_first = [problem_id for problem_id in first if problem_id not in second]
        only_second = [problem_id for problem_id in second if problem_id not in first]
        named = ", ".join([*only_first[:2], *only_second[:2]])
        raise AbacistError(
            f"The evaluations are of different problems: {len(only_first)} only before, "
            f"{len(only_second)} only after (such as {named}), "
            f"{len(first.keys() & second.keys())} in both.",
            hint,
        )
    for problem_id, problem in first.items():
        other = second[problem_id]
        if (problem.question, problem.answer) != (other.question, other.answer):
            what = "answer" if problem.question == other.question else "question"
            raise AbacistError(f"Problem {problem_id} has another {what} before than after.", hint)
    for name in ("kind", "num_samples", "max_completion_tokens"):
        one, two = getattr(before.settings, name), getattr(after.settings, name)
        if one != two:
            raise AbacistError(
                f"The evaluations differ in {name}: {one} before, {two} after.",
                "Evaluate both models under the same conditions.",
            )


def changes(before: Evaluation, after: Evaluation) -> dict[str, Interval]:
    """The paired change of every figure, under the names of :attr:`Evaluation.figures`.

    Works for greedy and sampled evaluations: the unit is the problem, whose replies are averaged.
    """
    refuse_unlike(before, after)
    first, second = _per_problem(before), _per_problem(after)
    found: dict[str, Interval] = {}
    for name in before.figures:
        if name not in after.figures:
            continue
        ids = [i for i in first[name] if i in second[name]]
        pairs = [(first[name][i], second[name][i]) for i in ids]
        if all(isinstance(value, bool) for pair in pairs for value in pair):
            was, became = ([pair[side] > 0 for pair in pairs] for side in (0, 1))
            found[name] = paired_difference(was, became)
        elif name in SHARES:
            found[name] = clustered_difference(before.figures[name], after.figures[name], pairs)
        else:
            found[name] = clustered_mean([b - a for a, b in pairs], ids)
    return found


def _per_problem(evaluation: Evaluation) -> dict[str, dict[str, float]]:
    """Each figure's value for each problem; True or False where it is a yes or no."""
    replies = by_problem(evaluation.marks)
    is_single = evaluation.settings.num_samples == 1

    def averaged(field: str) -> dict[str, float]:
        return {i: _mean([getattr(mark, field) for mark in one]) for i, one in replies.items()}

    values: dict[str, dict[str, float]] = {"completion_tokens": averaged("completion_tokens")}
    for measure in SHARES:
        if is_single:
            values[measure] = {mark.problem_id: getattr(mark, measure) for mark in evaluation.marks}
        else:
            values[measure] = averaged(measure)
    values["format_consistency"] = {i: keeps_format(of_one) for i, of_one in replies.items()}
    values["answer_consistency"] = {i: keeps_answer(of_one) for i, of_one in replies.items()}
    for name in evaluation.rewards:
        paid: dict[str, list[float]] = {}
        for rollout in evaluation.rollouts:
            if (value := rollout.rewards.get(name)) is not None:
                paid.setdefault(rollout.problem_id or "", []).append(value)
        values[REWARD_PREFIX + name] = {i: _mean(several) for i, several in paid.items()}
    return values


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)
