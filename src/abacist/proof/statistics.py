"""The four figures a verdict rests on: a share, a mean, a paired change, a paired test.

Every figure comes back as an :class:`Interval` that carries its 95 % bounds, the number of
independent units behind it, and the method, so that no number travels without its doubt. The
methods are closed formulas: the same data give the same bounds, without a seed.

The unit is the **problem**. Several sampled replies to one problem are not independent; they
count as one cluster, never as several problems.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import TypeVar

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
        return {
            "value": _or_none(self.value),
            "low": _or_none(self.low),
            "high": _or_none(self.high),
            "n": self.n,
            "method": self.method,
        }


def _or_none(number: float) -> float | None:
    return number if math.isfinite(number) else None


def _unknown(method: str) -> Interval:
    return Interval(math.nan, math.nan, math.nan, 0, method)


def _wilson_bounds(share: float, n: float) -> tuple[float, float]:
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
    method = "Wilson"
    if not outcomes:
        return _unknown(method)
    n = len(outcomes)
    share = sum(outcomes) / n
    return Interval(share, *_wilson_bounds(share, n), n, method)


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
    return Interval(share, *_wilson_bounds(share, effective), count, method)


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
    n = len(pairs)
    gained, lost = pairs.count((False, True)), pairs.count((True, False))
    both, neither = pairs.count((True, True)), pairs.count((False, False))
    spread = math.sqrt((both + lost) * (gained + neither) * (both + gained) * (lost + neither))
    product = float(both * neither - gained * lost)
    if product > 0:
        product = max(0.0, product - n / 2)  # Newcombe's continuity correction
    correlation = product / spread if spread else 0.0
    return _square_and_add(proportion(before), proportion(after), correlation, "Newcombe, paired")


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
    return _square_and_add(before, after, correlation, "Newcombe, paired and clustered")


def _square_and_add(before: Interval, after: Interval, correlation: float, method: str) -> Interval:
    if not after.n:
        return _unknown(method)

    def joined(one: float, other: float) -> float:
        return math.sqrt(max(0.0, one * one - 2 * correlation * one * other + other * other))

    difference = after.value - before.value
    low = difference - joined(after.value - after.low, before.high - before.value)
    high = difference + joined(after.high - after.value, before.value - before.low)
    return Interval(difference, max(-1.0, low), min(1.0, high), after.n, method)


def mcnemar(gained: int, lost: int) -> float:
    """The exact two-sided p of McNemar's test.

    How often a fair coin, tossed once for every problem whose outcome changed, falls at least
    as far from even as ``gained`` and ``lost`` did. 1.0 when nothing changed.

    >>> mcnemar(0, 0), mcnemar(6, 0), mcnemar(0, 6)
    (1.0, 0.03125, 0.03125)
    """
    changed = gained + lost
    return float(stats.binomtest(gained, changed, 0.5).pvalue) if changed else 1.0
