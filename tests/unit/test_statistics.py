"""Intervals are what their formulas say, in every corner; test_coverage.py simulates them."""

from __future__ import annotations

import math
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from abacist.proof.statistics import (
    Interval,
    bootstrap_mean,
    clustered_difference,
    clustered_mean,
    clustered_proportion,
    crossed_mean,
    mcnemar,
    net_change,
    paired_counts,
    paired_difference,
    proportion,
    sign_flip,
)

counts = st.integers(0, 60)


def outcomes(successes: int, n: int) -> list[bool]:
    return [True] * successes + [False] * (n - successes)


@given(counts, counts)
@settings(max_examples=60, deadline=None)
def test_a_share_has_the_wilson_interval_of_scipy(successes: int, failures: int) -> None:
    n = successes + failures
    ours = proportion(outcomes(successes, n))
    if n == 0:
        assert math.isnan(ours.value) and ours.n == 0
        return
    theirs = stats.binomtest(successes, n).proportion_ci(method="wilson")
    assert (ours.low, ours.high) == pytest.approx((theirs.low, theirs.high), abs=1e-12)


@given(counts, counts)
@settings(max_examples=60, deadline=None)
def test_mcnemar_is_the_two_sided_binomial_test_and_symmetric(gained: int, lost: int) -> None:
    assert mcnemar(gained, lost) == mcnemar(lost, gained)
    expected = stats.binomtest(gained, gained + lost).pvalue if gained + lost else 1.0
    assert mcnemar(gained, lost) == pytest.approx(expected)


@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=50))
@settings(max_examples=100, deadline=None)
def test_a_paired_difference_is_bounded_ordered_and_antisymmetric(
    pairs: list[tuple[bool, bool]],
) -> None:
    before, after = zip(*pairs, strict=True)
    forth, back = paired_difference(before, after), paired_difference(after, before)
    assert -1 <= forth.low <= forth.value + 1e-12 and forth.value <= forth.high + 1e-12 <= 1 + 1e-9
    assert (forth.value, forth.low) == pytest.approx((-back.value, -back.high), abs=1e-12)


def test_without_correlation_the_bounds_are_squared_and_added() -> None:
    # Nothing was right before, so the two measurements carry no correlation.
    change = paired_difference([False] * 50, outcomes(20, 50))
    before, after = proportion([False] * 50), proportion(outcomes(20, 50))
    assert change.value == pytest.approx(0.4)
    assert change.low == pytest.approx(0.4 - math.hypot(0.4 - after.low, before.high))
    assert change.high == pytest.approx(after.high)


@pytest.mark.parametrize(
    ("both", "gained", "lost", "neither", "correlation"),
    [
        # (25 · 18 - 5 · 2 - 50 / 2) / √(27 · 23 · 30 · 20): half an n is taken off, for continuity.
        (25, 5, 2, 18, 415 / math.sqrt(27 * 23 * 30 * 20)),
        (12, 6, 6, 4, 0.0),  # 12 · 4 - 6 · 6 is less than half of 28
        (3, 14, 15, 3, -201 / math.sqrt(18 * 17 * 17 * 18)),  # nothing is taken off
    ],
)
def test_a_paired_change_has_the_bounds_of_newcombes_method_10(
    both: int, gained: int, lost: int, neither: int, correlation: float
) -> None:
    n = both + gained + lost + neither
    change = paired_counts(both, gained, lost, neither)
    before, after = (proportion(outcomes(right, n)) for right in (both + lost, both + gained))

    def joined(one: float, other: float) -> float:
        return math.sqrt(one**2 - 2 * correlation * one * other + other**2)

    assert change.value == pytest.approx((gained - lost) / n)
    assert change.value - change.low == pytest.approx(
        joined(after.value - after.low, before.high - before.value)
    )
    assert change.high - change.value == pytest.approx(
        joined(after.high - after.value, before.value - before.low)
    )


def test_what_is_measured_twice_alike_narrows_the_interval() -> None:
    before = outcomes(25, 50)
    alike = paired_difference(before, outcomes(30, 50))
    opposed = paired_difference(before, list(reversed(outcomes(30, 50))))
    assert alike.value == opposed.value
    assert alike.high - alike.low < opposed.high - opposed.low


def test_without_data_the_value_is_nan_and_json_says_null() -> None:
    for empty in (proportion([]), clustered_mean([], []), paired_difference([], [])):
        assert math.isnan(empty.value) and empty.n == 0
        assert empty.to_json()["value"] is None


def test_json_carries_every_field() -> None:
    assert Interval(0.5, 0.4, math.nan, 3, "m").to_json() == {
        "value": 0.5,
        "low": 0.4,
        "high": None,
        "n": 3,
        "method": "m",
    }


def test_one_reply_per_problem_is_the_plain_interval() -> None:
    flags = outcomes(13, 40)
    assert clustered_proportion(flags, range(40)) == proportion(flags)


def test_repeating_every_reply_adds_no_certainty() -> None:
    flags = outcomes(13, 40)
    plain = proportion(flags)
    repeated = clustered_proportion(flags * 8, list(range(40)) * 8)
    assert repeated.value == plain.value and repeated.n == 40
    assert repeated.low <= plain.low and repeated.high >= plain.high
    assert repeated.high - repeated.low < 1.1 * (plain.high - plain.low)


@pytest.mark.parametrize("last", [False, True])
def test_replies_that_balance_each_other_within_a_problem_are_no_more_than_independent_ones(
    last: bool,
) -> None:
    flags = [True, False] * 19 + [True, last]
    share, plain = clustered_proportion(flags, [i // 2 for i in range(40)]), proportion(flags)
    assert share.value == plain.value and share.n == 20
    assert share.low <= plain.low and share.high >= plain.high


def test_equal_outcomes_still_leave_doubt() -> None:
    share = clustered_proportion([True] * 80, [i // 8 for i in range(80)])
    assert share.value == share.high == 1.0 and share.low == proportion([True] * 10).low


def test_a_mean_with_an_infinite_value_is_unknown_and_of_one_cluster_unbounded() -> None:
    assert math.isnan(clustered_mean([1.0, math.inf], [1, 2]).value)
    alone = clustered_mean([1.0, 2.0], ["p", "p"])
    assert alone.value == 1.5 and math.isnan(alone.low)


def test_single_value_clusters_give_the_usual_student_interval() -> None:
    values = [0.5, 1.0, 2.5, 3.0, 1.0]
    ours = clustered_mean(values, range(5))
    theirs = stats.ttest_1samp(values, 0).confidence_interval(0.95)
    assert (ours.low, ours.high) == pytest.approx((theirs.low, theirs.high))


def test_clustered_differences_without_spread_still_leave_doubt() -> None:
    nothing, everything = (
        clustered_proportion([value] * 40, [i // 4 for i in range(40)]) for value in (False, True)
    )
    change = clustered_difference(nothing, everything, [(0.0, 1.0)] * 10)
    assert change.value == 1 and change.low < 0.7 and change.n == 10
    assert math.isnan(clustered_difference(proportion([]), proportion([]), []).value)


@given(st.integers(0, 40), st.integers(0, 40), st.integers(0, 60))
@settings(max_examples=60, deadline=None)
def test_a_net_change_lies_in_its_interval_and_turns_round_with_gains_and_losses(
    gained: int, lost: int, rest: int
) -> None:
    n = gained + lost + rest
    change = net_change(gained, lost, n)
    if n == 0:
        assert math.isnan(change.value)
        return
    assert -1 <= change.low <= change.value <= change.high <= 1 and change.n == n
    back = net_change(lost, gained, n)
    assert (change.low, change.high) == pytest.approx((-back.high, -back.low))


@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=50))
@settings(max_examples=50, deadline=None)
def test_counting_the_pairs_first_changes_nothing(pairs: list[tuple[bool, bool]]) -> None:
    cells = [pairs.count(cell) for cell in ((True, True), (False, True), (True, False))]
    counted = paired_counts(*cells, len(pairs) - sum(cells))
    assert counted == paired_difference(*map(list, zip(*pairs, strict=True)))


def test_seeds_that_agree_leave_the_problems_doubt_and_seeds_that_differ_add_theirs() -> None:
    rng = random.Random(2)
    row = [rng.choice([0.0, 0.0, 1.0]) for _ in range(80)]
    alike = crossed_mean([row, row, row])
    plain = clustered_mean(row, range(80))
    assert (alike.low, alike.high) == pytest.approx((plain.low, plain.high))
    other = [1.0 - value for value in row]
    apart = crossed_mean([row, row, other])
    assert apart.high - apart.low > 2 * (alike.high - alike.low)
    assert alike.n == apart.n == 80


def test_too_little_to_tell_the_spread_leaves_the_bounds_of_seeds_open() -> None:
    assert math.isnan(crossed_mean([[0.0, 1.0, 1.0]]).low)
    assert math.isnan(crossed_mean([]).value)
    all_gained = crossed_mean([[1.0] * 50] * 3)
    assert all_gained.value == 1 and 0.8 < all_gained.low < 1 and all_gained.n == 50


def test_the_bootstrap_agrees_with_students_interval_where_that_is_right() -> None:
    rng = random.Random(4)
    values = [rng.gauss(0.2, 1.0) for _ in range(200)]
    ours, student = bootstrap_mean(values), clustered_mean(values, range(200))
    assert ours == bootstrap_mean(values)  # a fixed seed: the same bounds every time
    assert ours.value == pytest.approx(student.value)
    assert (ours.low, ours.high) == pytest.approx((student.low, student.high), abs=0.02)


def test_the_bootstrap_knows_nothing_where_all_values_are_alike() -> None:
    alike = bootstrap_mean([1.0] * 20)
    assert alike.value == 1 and math.isnan(alike.low) and math.isnan(bootstrap_mean([]).value)


@given(st.integers(0, 6), st.integers(0, 6))
@settings(max_examples=20, deadline=None)
def test_exchanging_before_and_after_is_mcnemar_where_replies_are_single(
    gained: int, lost: int
) -> None:
    p = sign_flip([1.0] * gained + [-1.0] * lost + [0.0] * 9)
    assert p == pytest.approx(mcnemar(gained, lost))
