"""How often a policy solves its problems, and what groups of other sizes would then hold.

GRPO learns from a group only if its rewards differ; of a group in which every reply is right, or
every reply wrong, the outcome teaches nothing. Whether a group of G replies is *mixed* depends on
the problem's own solve rate p: the chance is 1 - p^G - (1 - p)^G. A few replies to each of a few
problems do not give every p, but they do give the distribution of p over problems, and that is
all that a prediction for another G needs.

The distribution is taken to be a Beta, so that the solved replies of a problem are Beta-binomial.
Its mean and its concentration are not estimated as one pair: every pair on a grid is weighed by
its likelihood (flat in the mean and in the logarithm of the concentration), which yields the
interval too, also where no reply was right or none wrong and a best pair would claim certainty.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from scipy.special import betaln

from abacist.proof.statistics import CONFIDENCE, Interval, proportion

GROUP_SIZES = (4, 8, 16, 32)
METHOD = "Beta-binomial over problems, weighed on a grid"

_MEANS = (np.arange(100) + 0.5) / 100
# From "each problem always or never" to "every problem alike".
_CONCENTRATIONS = np.geomspace(0.1, 300, 40)


@dataclass(frozen=True)
class SolveRates:
    """Of ``samples`` replies to each problem, ``solved`` were right, a number for each problem."""

    solved: Sequence[int]
    samples: int

    @property
    def mean(self) -> float:
        """The share of replies that are right."""
        return sum(self.solved) / (self.samples * len(self.solved))

    def histogram(self) -> list[int]:
        """How many problems have 0, 1, … ``samples`` right replies.

        >>> SolveRates([0, 2, 2, 1], samples=2).histogram()
        [1, 1, 2]
        """
        return [list(self.solved).count(right) for right in range(self.samples + 1)]

    def observed_mixed(self) -> Interval:
        """The share of these very groups that are mixed."""
        return proportion([0 < right < self.samples for right in self.solved])

    def predicted_mixed(self, group_size: int) -> Interval:
        """The share of groups of ``group_size`` replies that will be mixed.

        With 95 % bounds for the share over all problems like these; ``n`` counts problems.
        """
        first, second = self._shapes
        whole = betaln(first, second)
        all_right = np.exp(betaln(first + group_size, second) - whole)
        all_wrong = np.exp(betaln(first, second + group_size) - whole)
        shares = (1 - all_right - all_wrong).ravel()
        order = np.argsort(shares)
        reached = np.cumsum(self._weights[order])
        tail = (1 - CONFIDENCE) / 2
        places = np.searchsorted(reached, [tail, 1 - tail]).clip(max=len(order) - 1)
        low, high = shares[order[places]].tolist()
        value = float(self._weights @ shares)
        return Interval(value, low, high, len(self.solved), METHOD)

    @property
    def _shapes(self) -> tuple[np.ndarray, np.ndarray]:
        """Both parameters of each Beta on the grid, [concentrations, means]."""
        return _CONCENTRATIONS[:, None] * _MEANS, _CONCENTRATIONS[:, None] * (1 - _MEANS)

    @cached_property
    def _weights(self) -> np.ndarray:
        """How well each Beta on the grid explains what was seen; they add up to 1."""
        first, second = self._shapes
        likelihood = np.zeros_like(first)
        for right, problems in enumerate(self.histogram()):
            if problems:
                likelihood += problems * betaln(first + right, second + self.samples - right)
        likelihood -= len(self.solved) * betaln(first, second)
        weights = np.exp(likelihood - likelihood.max()).ravel()
        return weights / weights.sum()
