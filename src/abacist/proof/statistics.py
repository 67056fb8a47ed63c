"""The figures a verdict rests on: a share, a mean, a paired change, a paired test.

Every figure comes back as an :class:`Interval` that carries its 95 % bounds, the number of
independent units behind it, and the method, so that no number travels without its doubt. The
methods are closed formulas, but for :func:`bootstrap_mean` and :func:`sign_flip`, which draw from a
fixed seed: the same data give the same bounds.

The unit is the **problem**. Several sampled replies to one problem are not independent; they
count as one cluster, never as several problems.

Where 95 % means 93 to 97 % was simulated (``tests/unit/test_coverage.py``): shares with at least
five problems expected right and five wrong; paired changes of at least 50 problems of which ten
are expected to change; figures of several seeds from three seeds on. Below that a paired change
errs on the safe side (its interval is too wide), and a share of almost nothing or almost
everything is covered in 91 % of cases or more.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import asdict, dataclass
from typing import TypeVar

import numpy as np
from scipy import stats

CONFIDENCE = 0.95
TAIL = (1 + CONFIDENCE) / 2
Z = float(stats.norm.ppf(TAIL))

Value = TypeVar("Value", bound=float)


@dataclass(frozen=True, slots=True)
class Interval:
    """An estimate with its 95 % bounds.

    ``n`` counts independent units (problems). With nothing to estimate from, ``value`` and the
    bounds are nan; a bound that the data cannot give (a mean of one value) is nan too.
    """

    value: float
    low: float
    high: float
    n: int
    method: str

    def to_json(self) -> dict[str, float | int | str | None]:
        """The fields, with None for nan (JSON has no nan)."""
        fields = asdict(self)
        numbers = {name: fields[name] for name in ("value", "low", "high")}
        return fields | {name: x if math.isfinite(x) else None for name, x in numbers.items()}


def _unknown(method: str) -> Interval:
    return Interval(math.nan, math.nan, math.nan, 0, method)


def wilson_bounds(share: float, n: float) -> tuple[float, float]:
    """Wilson's score bounds; ``n`` may be fractional (an effective sample size)."""
    shrink = Z * Z / n
    centre = (share + shrink / 2) / (1 + shrink)
    half = Z / (1 + shrink) * math.sqrt(share * (1 - share) / n + shrink / (4 * n))
    low = 0.0 if share == 0 else max(0.0, centre - half)
    high = 1.0 if share == 1 else min(1.0, centre + half)
    return low, high


def proportion(outcomes: Sequence[bool]) -> Interval:
    """The share of True among independent outcomes, by Wilson's score interval.

    >>> share = proportion([True] * 30 + [False] * 70)
    >>> share.value, round(share.low, 3), round(share.high, 3), share.n
    (0.3, 0.219, 0.396, 100)
    """
    return _wilson(sum(outcomes), len(outcomes))


def _wilson(true: int, n: int) -> Interval:
    method = "Wilson"
    if not n:
        return _unknown(method)
    return Interval(true / n, *wilson_bounds(true / n, n), n, method)


def clustered_proportion(outcomes: Sequence[bool], clusters: Sequence[Hashable]) -> Interval:
    """The share of True among replies that come in clusters (several replies to one problem).

    Wilson's interval on the *effective* number of replies: their number divided by the design
    effect, with Student's correction for few clusters (the idea of Korn and Graubard). When
    every reply has the same outcome the design effect is unknown and the number of clusters is
    taken. With one reply per cluster it is :func:`proportion`.
    """
    groups = _grouped(outcomes, clusters)
    if len(groups) == len(outcomes):
        return proportion(outcomes)
    method = "Wilson, clustered"
    replies, count = len(outcomes), len(groups)
    share = sum(outcomes) / replies
    spread = replies * share * (1 - share)
    if spread == 0 or count == 1:
        effective = float(count)
    else:
        residuals = (sum(group) - len(group) * share for group in groups)
        design_effect = max(1.0, sum(r * r for r in residuals) / spread)
        student = float(stats.t.ppf(TAIL, count - 1))
        effective = replies / design_effect * (Z / student) ** 2
    return Interval(share, *wilson_bounds(share, effective), count, method)


def clustered_mean(values: Sequence[float], clusters: Sequence[Hashable]) -> Interval:
    """The mean of values that come in clusters, with Student's interval between clusters.

    The variance is that of the ratio of cluster sums to cluster sizes, so clusters may differ
    in size. Values that are not finite make the mean unknown rather than wrong.
    """
    method = "Student, clustered"
    groups = _grouped(values, clusters)
    if not groups or not all(math.isfinite(value) for value in values):
        return _unknown(method)
    total, count = len(values), len(groups)
    mean = math.fsum(values) / total
    if count == 1:
        return Interval(mean, math.nan, math.nan, 1, method)
    residuals = (math.fsum(group) - len(group) * mean for group in groups)
    variance = count / (count - 1) * math.fsum(r * r for r in residuals) / total**2
    half = float(stats.t.ppf(TAIL, count - 1)) * math.sqrt(variance)
    return Interval(mean, mean - half, mean + half, count, method)


def _grouped(values: Sequence[Value], clusters: Sequence[Hashable]) -> list[list[Value]]:
    groups: dict[Hashable, list[Value]] = {}
    for value, cluster in zip(values, clusters, strict=True):
        groups.setdefault(cluster, []).append(value)
    return list(groups.values())


def paired_difference(before: Sequence[bool], after: Sequence[bool]) -> Interval:
    """The change of a share measured twice on the same problems: after minus before.

    Newcombe's square-and-add interval (Statistics in Medicine 17, 1998, method 10): Wilson's
    bounds of the two shares, combined with the correlation between the two measurements. It
    holds its coverage for few problems and for shares near 0 and 1, where resampling does not.

    >>> change = paired_difference([False] * 60 + [True] * 40, [True] * 90 + [False] * 10)
    >>> round(change.value, 3), change.low > 0, change.n
    (0.5, True, 100)
    """
    pairs = list(zip(before, after, strict=True))
    return paired_counts(
        pairs.count((True, True)),
        pairs.count((False, True)),
        pairs.count((True, False)),
        pairs.count((False, False)),
    )


def paired_counts(both: int, gained: int, lost: int, neither: int) -> Interval:
    """:func:`paired_difference`, of how many problems were right both times, gained, lost, or
    right neither time."""
    method = "Newcombe, paired"
    n = both + gained + lost + neither
    if not n:
        return _unknown(method)
    spread = math.sqrt((both + lost) * (gained + neither) * (both + gained) * (lost + neither))
    product = float(both * neither - gained * lost)
    if product > 0:
        product = max(0.0, product - n / 2)  # Newcombe's continuity correction
    correlation = product / spread if spread else 0.0
    first, second = (_wilson(true, n) for true in (both + lost, both + gained))
    return _square_and_add(first, second, correlation, method)


def clustered_difference(
    before: Interval, after: Interval, means: Sequence[tuple[float, float]]
) -> Interval:
    """The change of a share whose problems have several replies each: after minus before.

    Square-and-add as in :func:`paired_difference`, on two :func:`clustered_proportion` intervals;
    ``means`` holds each problem's share before and after, whose correlation is taken.
    """
    first, second = zip(*means, strict=True) if means else ((), ())
    varies = len(set(first)) > 1 and len(set(second)) > 1
    correlation = float(stats.pearsonr(first, second).statistic) if varies else 0.0
    return _square_and_add(before, after, correlation, "Newcombe, clustered")


def _square_and_add(before: Interval, after: Interval, correlation: float, method: str) -> Interval:
    if not after.n:
        return _unknown(method)

    def joined(one: float, other: float) -> float:
        return math.sqrt(max(0.0, one * one - 2 * correlation * one * other + other * other))

    difference = after.value - before.value
    low = difference - joined(after.value - after.low, before.high - before.value)
    high = difference + joined(after.high - after.value, before.value - before.low)
    return Interval(difference, max(-1.0, low), min(1.0, high), after.n, method)


def net_change(gained: int, lost: int, n: int) -> Interval:
    """The share of ``n`` problems gained less that lost, from these counts alone.

    The adjusted Wald interval of Agresti and Min (Statistics in Medicine 24, 2005): half an
    observation is added to each cell of the paired table. For a part of a change, where nobody
    knows how many of the other problems would have been right both times.

    >>> part = net_change(12, 2, 300)
    >>> round(part.value, 4), round(part.low, 4), round(part.high, 4)
    (0.0333, 0.0083, 0.058)
    """
    method = "Agresti-Min, paired"
    if not n:
        return _unknown(method)
    up, down, size = gained + 0.5, lost + 0.5, n + 2
    centre = (up - down) / size
    half = Z * math.sqrt(up + down - (up - down) ** 2 / size) / size
    return Interval(
        (gained - lost) / n, max(-1.0, centre - half), min(1.0, centre + half), n, method
    )


def crossed_mean(rows: Sequence[Sequence[float]]) -> Interval:
    """The mean of a table with a row for each seed and a column for each problem.

    Its bounds are those for *new* problems and *new* seeds. Both vary, and each by itself is too
    narrow: seeds differ on the same problems, and problems differ for the same seed. Student's
    half-width between problems and Student's half-width between seeds are squared and added;
    the part of the second that is only the scatter of single cells, which the first holds
    already, is taken off (with two seeds, too few to tell it, it is left in). ``n`` counts
    problems. The bounds are nan with one seed or one problem, and where all problems and all seeds
    have the same mean although cells differ. Where all cells are alike nothing
    tells how much they vary: a table of 1, 0 or -1 alone gets the bounds of :func:`net_change`.
    """
    method = f"Student, problems crossed with {len(rows)} seeds"
    table = np.asarray(rows, dtype=float)
    if table.size == 0:
        return _unknown(method)
    seeds, problems = table.shape
    mean = float(table.mean())
    if np.ptp(table) == 0 and mean in (-1, 0, 1):
        return net_change(problems * (mean == 1), problems * (mean == -1), problems)
    if seeds < 2 or problems < 2:
        return Interval(mean, math.nan, math.nan, problems, method)
    by_problem, by_seed = table.mean(axis=0), table.mean(axis=1)
    between_problems = float(by_problem.var(ddof=1)) / problems
    between_seeds = float(by_seed.var(ddof=1)) / seeds
    scatter = table - by_problem[None, :] - by_seed[:, None] + mean
    of_cells = float((scatter**2).sum()) / ((seeds - 1) * (problems - 1)) / (seeds * problems)
    own = max(0.0, between_seeds - of_cells) if seeds > 2 else between_seeds
    half = math.sqrt(
        float(stats.t.ppf(TAIL, problems - 1)) ** 2 * between_problems
        + float(stats.t.ppf(TAIL, seeds - 1)) ** 2 * own
    )
    if half == 0:
        return Interval(mean, math.nan, math.nan, problems, method)
    return Interval(mean, mean - half, mean + half, problems, method)


def mcnemar(gained: int, lost: int) -> float:
    """The exact two-sided p of McNemar's test.

    How often a fair coin, tossed once for every problem whose outcome changed, falls at least
    as far from even as ``gained`` and ``lost`` did. 1.0 when nothing changed.

    >>> mcnemar(0, 0), mcnemar(6, 0), mcnemar(0, 6)
    (1.0, 0.03125, 0.03125)
    """
    changed = gained + lost
    return float(stats.binomtest(gained, changed, 0.5).pvalue) if changed else 1.0


RESAMPLES = 9999
#: The smallest p that :func:`sign_flip` can find where it draws.
SMALLEST_P = 2 / (RESAMPLES + 1)


def bootstrap_mean(values: Sequence[float], *, resamples: int = RESAMPLES) -> Interval:
    """The mean of one value a problem, with bounds by drawing the problems anew (BCa).

    It assumes no shape, so it stands beside the closed formulas as a check on them; it knows
    nothing where all values are alike, and its bounds are nan there.
    """
    method = f"bootstrap over problems, BCa, {resamples:,} draws"
    if not values:
        return Interval(math.nan, math.nan, math.nan, 0, method)
    sample = np.asarray(values, dtype=float)
    mean = math.fsum(values) / len(values)
    if np.ptp(sample) == 0 or not np.isfinite(sample).all():
        return Interval(mean, math.nan, math.nan, len(values), method)
    found = stats.bootstrap(
        (sample,), np.mean, confidence_level=CONFIDENCE, n_resamples=resamples, batch=1000,
        method="BCa", rng=np.random.default_rng(0),
    ).confidence_interval  # fmt: skip
    return Interval(mean, float(found.low), float(found.high), len(values), method)


def sign_flip(differences: Sequence[float]) -> float:
    """The two-sided p of a mean of paired differences, by exchanging before and after at random.

    How often the mean is at least as far from 0 when each problem's two measurements change places
    by a fair coin: exact for few problems, else from a fixed seed. 1.0 when nothing changed.
    With one reply to a problem it is what :func:`~abacist.proof.statistics.mcnemar` computes.

    >>> sign_flip([1, 1, 1, 1, 1, 1, 0]), sign_flip([0.0, 0.0])
    (0.03125, 1.0)
    """
    changed = [difference for difference in differences if difference]
    if len(changed) < 2:  # one coin falls as far from even either way
        return 1.0
    found = stats.permutation_test(
        (np.asarray(changed, dtype=float),), np.mean, permutation_type="samples", batch=1000,
        n_resamples=RESAMPLES, alternative="two-sided", vectorized=True,
        rng=np.random.default_rng(0),
    )  # fmt: skip
    return float(found.pvalue)
