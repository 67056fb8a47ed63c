"""Several replies to one problem: would one of k be right, and would the majority of k?

Both figures ask what a *smaller* number k of replies would have shown, given the n that were
drawn. They are averages over all ways to choose k of the n, counted and not simulated: exact,
without a seed, and for k = n simply what the n replies show.

They are figures of one problem. The mean over problems, and its interval, is
:func:`abacist.proof.statistics.clustered_mean` with one value per problem.

pass@k: the unbiased estimator of Chen et al., "Evaluating Large Language Models Trained on Code",
2021, section 2.1. majority@k is the same average for the vote of Wang et al., "Self-Consistency
Improves Chain of Thought Reasoning in Language Models", 2022.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from fractions import Fraction
from functools import lru_cache
from math import comb

from abacist.task.answers import Number


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
