"""Several replies to one problem: would one of k be right, and would the majority of k?

pass@k and majority@k ask what a *smaller* number k of replies would have shown, given the n that
were drawn. They are averages over all ways to choose k of the n, counted and not simulated: exact,
without a seed, and for k = n simply what the n replies show. pass@k is the unbiased estimator of
Chen et al., "Evaluating Large Language Models Trained on Code", 2021, section 2.1; majority@k the
same average for the vote of Wang et al., "Self-Consistency Improves Chain of Thought Reasoning in
Language Models", 2022.

Each problem gives one number between 0 and 1, and problems are the independent units. Their mean
has Wilson's interval on the *effective* number of problems: how many yes-or-no outcomes would vary
as much as these numbers do. For k = all replies, where a problem's number is a plain yes or no,
that is Wilson's interval itself, and unlike Student's it keeps its coverage where nearly all
problems are solved, or none.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction
from functools import lru_cache
from math import comb

from scipy import stats

from abacist.proof.metrics import Mark, by_problem
from abacist.proof.statistics import TAIL, Interval, Z, proportion, wilson_bounds
from abacist.task.answers import Number, read_answer


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
    name: str, marks: Sequence[Mark], figure: Callable[[int, Sequence[Mark]], float], least: int = 1
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
    spread = math.fsum((value - mean) ** 2 for value in values) / max(1, n - 1)
    most = mean * (1 - mean)  # the spread of yes and no with this mean
    effective = float(n)
    if spread > 0 and not {0.0, 1.0} >= set(values):
        # The spread is known from n problems only, as in `clustered_proportion`.
        effective *= most / spread * (Z / float(stats.t.ppf(TAIL, n - 1))) ** 2
    return Interval(mean, *wilson_bounds(mean, effective), n, "Wilson, effective n")


def pass_at(k: int, num_samples: int, num_correct: int) -> float:
    """The chance that at least one of ``k`` replies is right, drawn from ``num_samples`` replies
    of which ``num_correct`` are.

    Unbiased for the chance that one of k fresh replies is right. Raises ValueError unless
    1 ≤ k ≤ num_samples and 0 ≤ num_correct ≤ num_samples.

    >>> pass_at(1, 4, 1), pass_at(2, 4, 1), pass_at(4, 4, 1), pass_at(2, 4, 3)
    (0.25, 0.5, 1.0, 1.0)
    """
    _check(k, num_samples)
    if not 0 <= num_correct <= num_samples:
        raise ValueError(f"{num_correct} correct of {num_samples} replies")
    # Fraction, because a quotient of two floats is inf / inf for thousands of replies.
    return float(1 - Fraction(comb(num_samples - num_correct, k), comb(num_samples, k)))


def majority_at(k: int, answers: Sequence[Number | None], gold: Number | None) -> float:
    """The chance that the most frequent answer among ``k`` of the replies is ``gold``.

    ``answers`` holds what each reply answers, by value: 12 and 12.0 are one answer. A reply that
    answers nothing (None) casts no vote, and where nobody votes nothing is right. A tie is
    decided by lot: gold, first together with one other answer, counts one half. Without a gold
    (None) nothing is right. Raises ValueError unless 1 ≤ k ≤ the number of answers.

    >>> twelve, thirteen = Fraction(12), Fraction(13)
    >>> majority_at(3, [twelve, twelve, thirteen], twelve), majority_at(2, [None, None], twelve)
    (1.0, 0.0)
    >>> majority_at(2, [twelve, thirteen], twelve), majority_at(1, [twelve, None], twelve)
    (0.5, 0.5)
    """
    _check(k, len(answers))
    votes = Counter(answer for answer in answers if answer is not None)
    for_gold = votes.pop(gold, 0) if gold is not None else 0
    rivals = tuple(sorted(votes.values()))
    return float(_majority(k, for_gold, rivals, len(answers) - for_gold - sum(rivals)))


@lru_cache(maxsize=4_096)  # many problems share a pattern of votes
def _majority(k: int, for_gold: int, rivals: tuple[int, ...], abstaining: int) -> Fraction:
    """The chance that gold wins the vote of k, by the number of replies behind each answer."""
    won = Fraction(0)
    for votes in range(1, min(k, for_gold) + 1):
        # Choices in which no rival has more votes: {(chosen so far, rivals with as many): ways}.
        ways = {(votes, 0): comb(for_gold, votes)}
        for behind in rivals:
            grown: Counter[tuple[int, int]] = Counter()
            for (chosen, tied), count in ways.items():
                for taken in range(min(behind, votes, k - chosen) + 1):
                    grown[chosen + taken, tied + (taken == votes)] += count * comb(behind, taken)
            ways = grown
        for (chosen, tied), count in ways.items():
            won += Fraction(count * comb(abstaining, k - chosen), tied + 1)
    return won / comb(for_gold + sum(rivals) + abstaining, k)


def _check(k: int, num_samples: int) -> None:
    if not 1 <= k <= num_samples:
        raise ValueError(f"k = {k} of {num_samples} replies: k must be 1 to {num_samples}")
