"""Several attempts at a problem: pass@k and majority@k over all problems, with intervals.

Each problem gives one number between 0 and 1 (:mod:`abacist.proof.repeated`), and problems are
the independent units. Their mean has Wilson's interval on the *effective* number of problems: how
many yes-or-no outcomes would vary as much as these numbers do. For k = all replies, where a
problem's number is a plain yes or no, that is Wilson's interval itself, and unlike Student's it
keeps its coverage where nearly all problems are solved, or none.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

from abacist.proof.metrics import Mark, by_problem
from abacist.proof.repeated import majority_at, pass_at
from abacist.proof.statistics import Interval, proportion, wilson_bounds
from abacist.task.answers import read_answer


def attempt_counts(num_samples: int) -> list[int]:
    """The k of the tables: powers of two below ``num_samples``, and that itself.

    >>> attempt_counts(6)
    [1, 2, 4, 6]
    """
    powers = [2**exponent for exponent in range(num_samples.bit_length())]
    return [*(k for k in powers if k < num_samples), num_samples]


def pass_at_each(marks: Sequence[Mark]) -> dict[str, Interval]:
    """``pass@k`` by name: how often at least one of k replies is right."""
    return _at_each("pass@", marks, lambda k, of_one: pass_at(
        k, len(of_one), sum(mark.correct for mark in of_one)
    ))  # fmt: skip


def majority_at_each(marks: Sequence[Mark], golds: Mapping[str, str]) -> dict[str, Interval]:
    """``majority@k`` by name, from k = 3 on: how often the commonest of k answers is right."""
    values = {problem_id: read_answer(gold) for problem_id, gold in golds.items()}
    return _at_each("majority@", marks, lambda k, of_one: majority_at(
        k, [mark.number for mark in of_one], values[of_one[0].problem_id]
    ), least=3)  # fmt: skip


def _at_each(
    name: str,
    marks: Sequence[Mark],
    figure: Callable[[int, Sequence[Mark]], float],
    least: int = 1,
) -> dict[str, Interval]:
    problems = list(by_problem(marks).values())
    counts = attempt_counts(min(map(len, problems), default=0))
    return {
        f"{name}{k}": bounded_mean([figure(k, of_one) for of_one in problems])
        for k in counts
        if k >= least
    }


def bounded_mean(values: Sequence[float]) -> Interval:
    """The mean of independent numbers between 0 and 1, one a problem.

    >>> mean = bounded_mean([0.5, 1.0, 0.0, 0.5] * 25)
    >>> mean.value, 0.4 < mean.low < 0.5 < mean.high < 0.6, mean.n
    (0.5, True, 100)
    """
    n = len(values)
    if not n:
        return proportion([])
    mean = math.fsum(values) / n
    spread = math.fsum((value - mean) ** 2 for value in values) / n
    most = mean * (1 - mean)  # the spread of yes and no with this mean
    effective = n * most / spread if most > 0 and spread > 0 else float(n)
    return Interval(mean, *wilson_bounds(mean, effective), n, "Wilson, effective n")
