"""Where a change in accuracy comes from: the format, the parser, or the reasoning.

Each reply is one of four things: *right*; *misplaced*, the right number stands at its end but not
in one answer block; *misread*, there is an answer block, and lm-eval's flexible rule takes the
right number from the reply where ours does not; *wrong*, no rule finds the right number. A problem
that was not right and has become so counts for the part it came from, one that was right and is no
longer for the part it went to, so the three parts add up to the change:

- **format**: misplaced → right, less right → misplaced. No better reasoning was needed.
- **parser**: misread → right, less right → misread. The two rules disagree on one text.
- **reasoning**: wrong → right, less right → wrong.

With several replies to a problem each is set against each: the parts are then expected shares, and
still add up.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from abacist.proof.evaluation import Evaluation
from abacist.proof.metrics import Mark
from abacist.proof.statistics import Interval, clustered_mean, net_change


class Kind(StrEnum):
    """What a reply is; each but the first names the part of a change that it stands for."""

    RIGHT = "right"
    MISPLACED = "format"
    MISREAD = "parser"
    WRONG = "reasoning"


PARTS = (Kind.MISPLACED, Kind.MISREAD, Kind.WRONG)


@dataclass(frozen=True, slots=True)
class Part:
    """One part of a change: how much, and the problems that were gained and lost by it."""

    change: Interval
    gained: tuple[str, ...]
    lost: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """The interval as an object, the problems by id."""
        shown = {"gained": list(self.gained), "lost": list(self.lost)}
        return {"change": self.change.to_json(), **shown}


Shares = Mapping[str, Mapping[Kind, float]]


def kind_of(mark: Mark, *, correct: bool, answer: str | None) -> Kind:
    """What one reply is. ``answer`` is what stands in its one answer block, None without one."""
    if correct:
        return Kind.RIGHT
    if not mark.any_format:
        return Kind.WRONG
    return Kind.MISPLACED if answer is None else Kind.MISREAD


def kinds_by_problem(evaluation: Evaluation, correct: Sequence[bool]) -> Shares:
    """For each problem, which share of its replies is of which kind."""
    counts: dict[str, dict[Kind, int]] = {}
    rows = zip(evaluation.marks, evaluation.rollouts, correct, strict=True)
    for mark, rollout, is_correct in rows:
        of_one = counts.setdefault(mark.problem_id, dict.fromkeys(Kind, 0))
        of_one[kind_of(mark, correct=is_correct, answer=rollout.read_answer)] += 1
    replies = evaluation.settings.num_samples
    return {i: {kind: n / replies for kind, n in one.items()} for i, one in counts.items()}


def split_of(before: Shares, after: Shares) -> dict[str, Part]:
    """The parts by name, in the order of :data:`PARTS`. Both must hold the same problems."""
    return {part.value: _part(part, before, after) for part in PARTS}


def differences(part: Kind, before: Shares, after: Shares) -> dict[str, float]:
    """What each problem adds to a part: 1 gained, -1 lost, between with several replies."""
    return {
        i: before[i][part] * after[i][Kind.RIGHT] - before[i][Kind.RIGHT] * after[i][part]
        for i in before
    }


def _part(part: Kind, before: Shares, after: Shares) -> Part:
    found = differences(part, before, after)
    gained = tuple(i for i, value in found.items() if value > 0)
    lost = tuple(i for i, value in found.items() if value < 0)
    if all(value in (-1.0, 0.0, 1.0) for value in found.values()):
        change = net_change(len(gained), len(lost), len(found))
    else:
        change = clustered_mean(list(found.values()), list(found))
    return Part(change, gained, lost)
