"""Several seeds are one method: their mean, the doubt of problems and seeds, and the worst."""

from __future__ import annotations

import json
import math

import pytest

from abacist.errors import AbacistError, UsageError
from abacist.proof.comparison.compare import Comparison, compare
from abacist.proof.comparison.seeds import SeedsComparison, combine
from abacist.proof.statistics import crossed_mean
from evaluated import BARE, GOOD, WRONG, evaluation, problem

PROBLEMS = [problem(n, difficulty=1 + n % 2) for n in range(60)]


def seed_of(right: int, start: int = 0, before: int = 10) -> Comparison:
    """A run that was right on ``before`` problems and is right on ``right``, from ``start`` on."""
    first = [GOOD] * before + [WRONG] * (60 - before)
    second = [GOOD if start <= n < start + right else WRONG for n in range(60)]
    return compare(evaluation(first, PROBLEMS), evaluation(second, PROBLEMS))


def of(*seeds: Comparison) -> SeedsComparison:
    return combine([f"run {n}" for n in range(len(seeds))], seeds)


def test_the_estimate_is_the_mean_of_the_seeds_and_the_worst_is_named() -> None:
    found = of(seed_of(40), seed_of(34), seed_of(46))
    assert found.combined.value == pytest.approx(30 / 60)
    assert (found.mean_before, found.mean_after) == pytest.approx((10 / 60, 40 / 60))
    assert found.worst == 1 and found.between_seeds == pytest.approx(0.1)
    assert found.over_seeds.n == 3 and found.combined.n == found.over_problems.n == 60
    assert found.is_better and not found.is_worse


def test_seeds_that_disagree_prove_nothing_however_sure_each_one_is() -> None:
    up, down = seed_of(55), seed_of(0)
    assert up.accuracy.is_better and down.accuracy.is_worse
    found = of(up, down, seed_of(12))
    assert not found.is_better and not found.is_worse
    assert found.combined.low < found.over_problems.low


def test_seeds_that_agree_to_the_problem_do_not_tell_how_far_others_are() -> None:
    found = of(seed_of(40), seed_of(40, start=10))
    assert found.over_seeds.value == pytest.approx(0.5)
    assert math.isnan(found.over_seeds.low) and math.isnan(found.over_seeds.high)
    two = crossed_mean([[1.0, 0.0], [0.0, 1.0]])
    assert two.value == 0.5 and math.isnan(two.low)


def test_the_parts_add_up_and_kinds_are_shown_apart() -> None:
    mixed = compare(
        evaluation([BARE] * 30 + [WRONG] * 30, PROBLEMS), evaluation([GOOD] * 60, PROBLEMS)
    )
    found = of(mixed, seed_of(40), seed_of(34))
    assert sum(part.value for part in found.split.values()) == pytest.approx(found.combined.value)
    assert list(found.by_kind()) == ["1 step", "2 steps"]
    assert sum(one.n for one in found.by_kind().values()) == 60


def test_runs_that_cannot_stand_beside_each_other_are_refused() -> None:
    with pytest.raises(UsageError):
        of(seed_of(40))
    other = compare(evaluation([GOOD] * 5), evaluation([GOOD] * 5))
    with pytest.raises(AbacistError, match="different problems"):
        of(seed_of(40), other)


def test_the_json_holds_every_seed_and_every_estimate() -> None:
    document = json.loads(json.dumps(of(seed_of(40), seed_of(34)).to_json(), allow_nan=False))
    assert list(document["seeds"]) == ["run 0", "run 1"] and document["worst"] == "run 1"
    for name in ("combined", "over_problems", "over_seeds"):
        assert document[name]["method"].startswith("Student")
