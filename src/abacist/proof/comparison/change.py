"""What changed between two evaluations of the same problems, figure by figure.

The unit is the problem, and every change is paired: a problem is set against itself. Where a
problem has several replies, what is paired is the share of them of which a measure is true.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from abacist.proof.comparison.alike import refuse_unlike
from abacist.proof.evaluation import Evaluation
from abacist.proof.metrics import SHARES, by_problem, keeps_answer, keeps_format
from abacist.proof.statistics import (
    Interval,
    clustered_difference,
    clustered_mean,
    mcnemar,
    paired_difference,
    proportion,
    sign_flip,
)
from abacist.records.rollout import REWARD_PREFIX

MCNEMAR = "McNemar, exact, two-sided"
SIGN_FLIP = "sign-flip permutation, two-sided"


@dataclass(frozen=True, slots=True)
class Paired:
    """A measure of the same problems before and after; ids in the problems' order.

    Gained is a problem of which the measure is true after and was not before, lost the reverse;
    with several replies to a problem, one of which it is true more often, or less often. What
    stayed as it was is in ``both`` if the measure was ever true of it, else in ``neither``.
    """

    before: Interval
    after: Interval
    change: Interval
    p_value: float
    gained: tuple[str, ...]
    lost: tuple[str, ...]
    both: tuple[str, ...]
    neither: tuple[str, ...]
    test: str = MCNEMAR

    @classmethod
    def of(cls, before: Mapping[str, bool], after: Mapping[str, bool]) -> Paired:
        """Pairs two yes-or-no measurements by problem id; both must hold the same ids."""
        first = [before[problem_id] for problem_id in before]
        second = [after[problem_id] for problem_id in before]
        gained, lost, both, neither = _groups(before, after)
        return cls(
            before=proportion(first),
            after=proportion(second),
            change=paired_difference(first, second),
            p_value=mcnemar(len(gained), len(lost)),
            gained=gained,
            lost=lost,
            both=both,
            neither=neither,
        )

    @classmethod
    def of_shares(
        cls,
        before: Mapping[str, float],
        after: Mapping[str, float],
        shares: tuple[Interval, Interval],
    ) -> Paired:
        """Pairs the shares of several replies by problem id; ``shares`` are those of all replies,
        before and after, clustered by problem."""
        pairs = [(before[problem_id], after[problem_id]) for problem_id in before]
        change = clustered_difference(*shares, pairs)
        p_value = sign_flip([became - was for was, became in pairs])
        return cls(*shares, change, p_value, *_groups(before, after), test=SIGN_FLIP)

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
            "test": self.test,
            "gained": list(self.gained),
            "lost": list(self.lost),
            "both": len(self.both),
            "neither": len(self.neither),
        }


Ids = tuple[str, ...]


def _groups(before: Mapping[str, float], after: Mapping[str, float]) -> tuple[Ids, Ids, Ids, Ids]:
    """The ids of the problems gained, lost, and unchanged: true of some reply, or of none."""
    return (
        tuple(i for i in before if after[i] > before[i]),
        tuple(i for i in before if after[i] < before[i]),
        tuple(i for i in before if after[i] == before[i] > 0),
        tuple(i for i in before if after[i] == before[i] == 0),
    )


def changes(
    before: Evaluation, after: Evaluation, *, allow_different: Collection[str] = ()
) -> dict[str, Interval]:
    """The paired change of every figure, under the names of :attr:`Evaluation.figures`.

    Works for greedy and sampled evaluations: the unit is the problem, whose replies are averaged.
    Raises AbacistError as :func:`~abacist.proof.comparison.alike.refuse_unlike` does.
    """
    refuse_unlike(before, after, allow_different=allow_different)
    first, second = _per_problem(before), _per_problem(after)
    found: dict[str, Interval] = {}
    for name in before.figures:
        if name not in after.figures or name not in first or name not in second:
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
