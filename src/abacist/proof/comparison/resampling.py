"""Two figures by drawing instead of by formula, from a fixed seed: the same data, the same result.

They assume no shape of what they sum up. The bootstrap stands beside the closed formulas of
:mod:`abacist.proof.statistics` as a check on them; the sign-flip test is McNemar's where problems
have several replies each.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from scipy import stats

from abacist.proof.statistics import CONFIDENCE, Interval

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
