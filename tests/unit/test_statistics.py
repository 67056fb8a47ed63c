"""Intervals that cover what they claim to cover, and a paired test that is exact."""

from __future__ import annotations

import math
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from abacist.proof.statistics import (
    Interval,
    clustered_difference,
    clustered_mean,
    clustered_proportion,
    mcnemar,
    paired_difference,
    proportion,
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


@pytest.mark.parametrize("share", [0.1, 0.35, 0.8])
def test_ninety_five_percent_of_wilson_intervals_cover_the_truth(share: float) -> None:
    n = 300
    covered = 0.0
    for successes in range(n + 1):
        interval = proportion(outcomes(successes, n))
        if interval.low <= share <= interval.high:
            covered += float(stats.binom.pmf(successes, n, share))
    assert 0.93 <= covered <= 0.97


@pytest.mark.parametrize(("gains", "losses"), [(0.4, 0.02), (0.1, 0.1), (0.05, 0.0)])
def test_ninety_five_percent_of_paired_intervals_cover_the_truth(
    gains: float, losses: float
) -> None:
    rng = random.Random(7)
    stays_right = 0.3
    repeats, covered = 1000, 0
    for _ in range(repeats):
        before, after = [], []
        for _ in range(200):
            draw = rng.random()
            before.append(draw < stays_right + losses)
            after.append(draw < stays_right or 0 <= draw - stays_right - losses < gains)
        change = paired_difference(before, after)
        covered += change.low <= gains - losses <= change.high
    assert 0.93 <= covered / repeats <= 0.975


def test_ninety_five_percent_of_clustered_intervals_cover_the_truth() -> None:
    rng = random.Random(11)
    repeats, problems, replies = 600, 100, 4
    clusters = [problem for problem in range(problems) for _ in range(replies)]
    shares = means = 0
    for _ in range(repeats):
        # Solve rates differ between problems: replies to one problem are alike.
        rates = [rng.betavariate(0.6, 0.9) for _ in range(problems)]
        flags = [rng.random() < rates[problem] for problem in clusters]
        share = clustered_proportion(flags, clusters)
        mean = clustered_mean([float(flag) for flag in flags], clusters)
        shares += share.low <= 0.4 <= share.high
        means += mean.low <= 0.4 <= mean.high
    assert 0.93 <= shares / repeats <= 0.97
    assert 0.93 <= means / repeats <= 0.97


def test_ninety_five_percent_of_clustered_differences_cover_the_truth() -> None:
    rng = random.Random(13)
    repeats, problems, replies = 400, 100, 4
    clusters = [problem for problem in range(problems) for _ in range(replies)]
    covered = 0
    for _ in range(repeats):
        # Rates rise by 0.2 on average, more where there is more to gain.
        rates = [rng.betavariate(0.6, 0.9) for _ in range(problems)]
        risen = [rate + (1 - rate) / 3 for rate in rates]
        sides = [[rng.random() < of[problem] for problem in clusters] for of in (rates, risen)]
        before, after = (clustered_proportion(flags, clusters) for flags in sides)
        shares = [[sum(flags[i : i + replies]) / replies for i in range(0, len(flags), replies)]
                  for flags in sides]  # fmt: skip
        change = clustered_difference(before, after, list(zip(*shares, strict=True)))
        covered += change.low <= 0.2 <= change.high
    assert 0.93 <= covered / repeats <= 0.97


def test_clustered_differences_without_spread_still_leave_doubt() -> None:
    nothing, everything = (
        clustered_proportion([value] * 40, [i // 4 for i in range(40)]) for value in (False, True)
    )
    change = clustered_difference(nothing, everything, [(0.0, 1.0)] * 10)
    assert change.value == 1 and change.low < 0.7 and change.n == 10
    assert math.isnan(clustered_difference(proportion([]), proportion([]), []).value)


def test_the_paired_test_raises_no_more_false_alarms_than_it_promises() -> None:
    # 60 problems change by chance alone: the exact probability of p < 0.05.
    alarms = sum(
        float(stats.binom.pmf(gained, 60, 0.5))
        for gained in range(61)
        if mcnemar(gained, 60 - gained) < 0.05
    )
    assert alarms <= 0.05
