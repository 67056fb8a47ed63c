"""95 % means 95 %: intervals cover the truth they claim to cover, and the gate rarely errs.

Simulated at the sizes and rates of real evaluations, from fixed seeds. The domain of each claim is
in the docstring of ``proof.statistics``; outside of it only the safe side is asserted.
"""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from scipy import stats
from scipy.special import expit

from abacist.proof.comparison.change import Paired
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
    proportion,
)

LOW, HIGH = 0.93, 0.971
DRAWS = 20_000
SIZES = (50, 100, 300, 1319)
# Shares of problems right both times, gained, lost.
RATES = [
    (0.3, 0.4, 0.02), (0.3, 0.1, 0.1), (0.3, 0.05, 0.0), (0.4, 0.02, 0.02), (0.7, 0.03, 0.01),
    (0.05, 0.02, 0.01), (0.9, 0.02, 0.02), (0.45, 0.52, 0.0), (0.0, 0.05, 0.0), (0.3, 0.2, 0.2),
]  # fmt: skip


def covers(interval: Interval, truth: float) -> bool:
    return interval.low - 1e-12 <= truth <= interval.high + 1e-12


def tables(n: int, rates: tuple[float, float, float]) -> list[tuple[list[int], float]]:
    """Different outcomes of ``n`` problems (both, gained, lost, neither), with their share."""
    rng = np.random.default_rng(n)
    drawn = rng.multinomial(n, [*rates, 1 - sum(rates)], size=DRAWS)
    cells, counts = np.unique(drawn, axis=0, return_counts=True)
    return [(row.tolist(), count / DRAWS) for row, count in zip(cells, counts, strict=True)]


@pytest.mark.parametrize("n", SIZES)
def test_shares_are_covered_where_five_problems_are_expected_right_and_five_wrong(n: int) -> None:
    intervals = [proportion([True] * k + [False] * (n - k)) for k in range(n + 1)]
    for share in (0.01, 0.02, 0.05, 0.1, 0.3, 0.5, 0.9, 0.98):
        chances = stats.binom.pmf(np.arange(n + 1), n, share)
        covered = sum(c for c, one in zip(chances, intervals, strict=True) if covers(one, share))
        assert covered >= 0.91
        if n * min(share, 1 - share) >= 5:
            assert LOW <= covered <= HIGH


@pytest.mark.parametrize(("n", "rates"), [*itertools.product(SIZES, RATES)])
def test_paired_changes_are_covered_where_ten_problems_are_expected_to_change(
    n: int, rates: tuple[float, float, float]
) -> None:
    truth = rates[1] - rates[2]
    by_pairs = by_counts = 0.0
    for (both, gained, lost, neither), weight in tables(n, rates):
        by_pairs += weight * covers(paired_counts(both, gained, lost, neither), truth)
        by_counts += weight * covers(net_change(gained, lost, n), truth)
    assert by_pairs >= LOW and by_counts >= 0.92
    if n * (rates[1] + rates[2]) >= 10:
        assert LOW <= by_pairs <= HIGH and LOW <= by_counts <= HIGH


@pytest.mark.parametrize(("n", "churn"), [*itertools.product(SIZES, (0.02, 0.1, 0.4))])
def test_the_gate_lets_at_most_one_in_forty_through_that_are_no_better(
    n: int, churn: float
) -> None:
    alarms = 0.0
    for (both, gained, lost, neither), weight in tables(n, (0.5, churn / 2, churn / 2)):
        change = paired_counts(both, gained, lost, neither)
        alarms += weight * (change.low > 0 and mcnemar(gained, lost) < 0.05)
    assert alarms <= 0.025


def test_a_paired_comparison_that_says_better_is_the_gate_that_was_simulated() -> None:
    rng = np.random.default_rng(3)
    for _ in range(50):
        was, became = (rng.random(40) < rate for rate in (0.4, 0.6))
        pairs = list(zip(was.tolist(), became.tolist(), strict=True))
        before, after = ({f"p{i}": pair[side] for i, pair in enumerate(pairs)} for side in (0, 1))
        found = Paired.of(before, after)
        gained, lost = pairs.count((False, True)), pairs.count((True, False))
        counts = pairs.count((True, True)), gained, lost, pairs.count((False, False))
        expected = paired_counts(*counts).low > 0 and mcnemar(gained, lost) < 0.05
        assert found.is_better is expected and found.change == paired_counts(*counts)


def test_the_bootstrap_over_problems_covers_too() -> None:
    n, covered = 100, 0.0
    cells: dict[tuple[int, int], float] = {}
    for (_, gained, lost, _), weight in tables(n, (0.4, 0.2, 0.05)):
        cells[gained, lost] = cells.get((gained, lost), 0.0) + weight
    likely = sorted(cells, key=lambda cell: -cells[cell])[:200]
    for gained, lost in likely:
        values = [1.0] * gained + [-1.0] * lost + [0.0] * (n - gained - lost)
        covered += cells[gained, lost] * covers(bootstrap_mean(values, resamples=999), 0.15)
    # What was left out for speed may be covered or not: either way the claim holds.
    rest = 1 - sum(cells[cell] for cell in likely)
    assert covered >= LOW - rest and covered <= HIGH and rest < 0.05


@pytest.mark.parametrize(
    ("rise", "skill", "replies"), [(0.0, 0.0, 4), (0.3, 0.0, 4), (1.0, 2.5, 8), (2.0, -2.0, 4)]
)
def test_sampled_figures_are_covered_and_their_gate_holds(
    rise: float, skill: float, replies: int
) -> None:
    rng = np.random.default_rng(6)
    problems, repeats = 100, 700
    clusters = np.repeat(np.arange(problems), replies).tolist()
    many = rng.standard_normal(1_000_000) * 1.5
    truths = [float(expit(skill + many + up).mean()) for up in (0.0, rise)]
    share = mean = change = alarms = 0
    for _ in range(repeats):
        hard = rng.standard_normal(problems) * 1.5
        sides = [rng.random((problems, replies)) < expit(skill + hard + up)[:, None]
                 for up in (0.0, rise)]  # fmt: skip
        first, second = (clustered_proportion(s.ravel().tolist(), clusters) for s in sides)
        pairs = list(zip(*(s.mean(axis=1).tolist() for s in sides), strict=True))
        difference = clustered_difference(first, second, pairs)
        share += covers(second, truths[1])
        mean += covers(clustered_mean([b - a for a, b in pairs], range(problems)),
                       truths[1] - truths[0])  # fmt: skip
        change += covers(difference, truths[1] - truths[0])
        alarms += difference.low > 0
    for covered in (share, mean, change):
        assert LOW <= covered / repeats <= HIGH
    if rise == 0:
        assert alarms / repeats <= 0.035  # 0.025, and two standard errors of the simulation


def of_method(
    rng: np.random.Generator, seeds: int, problems: int, spread: float
) -> np.ndarray[tuple[int, int], np.dtype[np.float64]]:
    """After less before of each seed (row) and problem (column); seeds differ by ``spread``."""
    skill = rng.standard_normal(problems) * 1.5
    before = rng.random(problems) < expit(skill)
    own = rng.standard_normal((seeds, problems)) * 0.5
    chance = expit(1.5 + skill + rng.standard_normal((seeds, 1)) * spread + own)
    after: np.ndarray[tuple[int, int], np.dtype[np.bool_]] = rng.random((seeds, problems)) < chance
    return after.astype(float) - before


@pytest.mark.parametrize(
    ("seeds", "problems", "spread"),
    [*itertools.product((3, 5), (100, 300), (0.0, 0.3, 1.0)), (2, 300, 0.1), (2, 300, 0.6)],
)
def test_several_seeds_are_covered_whether_seeds_differ_or_not(
    seeds: int, problems: int, spread: float
) -> None:
    rng = np.random.default_rng([seeds, problems, int(100 * spread)])
    draws = rng.standard_normal((3, 1_000_000)) * [[1.5], [spread], [0.5]]
    truth = float(expit(1.5 + draws.sum(axis=0)).mean()) - 0.5
    repeats, covered = 1000, 0
    for _ in range(repeats):
        table = of_method(rng, seeds, problems, spread)
        covered += covers(crossed_mean(table), truth)  # type: ignore[arg-type]
    assert covered / repeats >= LOW
    if seeds > 2:  # two seeds tell too little of their spread: the safe side is taken
        assert covered / repeats <= HIGH
