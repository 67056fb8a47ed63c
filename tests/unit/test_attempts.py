"""pass@k and majority@k: exact for one problem, and with intervals over all of them."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import replace
from fractions import Fraction
from itertools import combinations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from abacist.proof.attempts import attempt_counts, bounded_mean, majority_at, pass_at
from abacist.proof.statistics import proportion
from evaluated import BARE, GOOD, SILENT, WRONG, evaluation


def test_pass_at_k_grows_from_accuracy_to_any_reply_right() -> None:
    found = evaluation([[GOOD, WRONG, SILENT, BARE], [WRONG] * 4, [GOOD] * 4])
    attempts = found.attempts
    assert [*attempts] == ["pass@1", "pass@2", "pass@4", "majority@4"]
    assert attempts["pass@1"].value == pytest.approx(found.accuracy.value)
    assert attempts["pass@2"].value == pytest.approx((1 / 2 + 0 + 1) / 3)
    assert attempts["pass@4"].value == pytest.approx(2 / 3)
    assert attempts["majority@4"].value == pytest.approx((1 / 2 + 0 + 1) / 3)
    assert all(found.n == 3 for found in attempts.values())


def test_one_reply_each_has_no_attempts() -> None:
    assert evaluation([GOOD, WRONG]).attempts == {}


@given(st.integers(1, 600))
def test_the_counts_rise_from_one_to_all_replies(num_samples: int) -> None:
    counts = attempt_counts(num_samples)
    assert counts[0] == 1 and counts[-1] == num_samples and counts == sorted(set(counts))


@given(st.lists(st.booleans(), min_size=1, max_size=50))
def test_for_yes_and_no_it_is_wilsons_interval(outcomes: list[bool]) -> None:
    ours, wilson = bounded_mean([float(value) for value in outcomes]), proportion(outcomes)
    assert (ours.value, ours.low, ours.high) == pytest.approx(
        (wilson.value, wilson.low, wilson.high)
    )


@given(st.lists(st.floats(0, 1), min_size=1, max_size=50))
def test_bounds_stay_between_nothing_and_all_and_hold_the_mean(values: list[float]) -> None:
    found = bounded_mean(values)
    assert 0 <= found.low <= found.value + 1e-9 and found.value - 1e-9 <= found.high <= 1


@pytest.mark.parametrize(("solved", "n"), [(0.9, 100), (0.5, 60), (0.97, 300), (0.5, 10)])
def test_intervals_cover_as_they_claim(solved: float, n: int) -> None:
    """Problems differ in how often they are solved; each gives pass@2 of four replies."""
    draw = random.Random(7)
    chances = [min(1.0, 2 * solved * draw.random()) for _ in range(4_000)]
    truth = sum(1 - (1 - chance) ** 2 for chance in chances) / len(chances)

    def pass_at_2(chance: float) -> float:
        right = sum(draw.random() < chance for _ in range(4))
        return 1 - (4 - right) * (3 - right) / 12

    covered = 0
    for _ in range(500):
        found = bounded_mean([pass_at_2(chance) for chance in draw.choices(chances, k=n)])
        covered += found.low <= truth <= found.high
    assert 0.92 <= covered / 500 <= (0.985 if n > 10 else 1)


def test_pass_at_1_is_not_surer_than_the_share_of_right_replies_to_few_problems() -> None:
    several = [[GOOD, WRONG, WRONG, WRONG], [GOOD] * 3 + [WRONG], [GOOD, GOOD, WRONG, WRONG],
               [GOOD] * 4, [WRONG] * 4]  # fmt: skip
    found = evaluation(several)
    share, once = found.accuracy, found.attempts["pass@1"]
    assert once.value == pytest.approx(share.value)
    assert once.high - once.low > 0.9 * (share.high - share.low)


def test_in_a_models_own_prompt_its_own_form_is_what_votes() -> None:
    boxed = evaluation([["So it is \\boxed{7}.", "\\boxed{7}", "#### 7", "It is 8."]] * 5)
    native = replace(boxed, settings=replace(boxed.settings, native_prompt=True))
    assert native.attempts["majority@4"].value == 1.0
    assert native.counts["replies_without_answer"] == 0
    alike = evaluation([["So it is \\boxed{8}.", "The answer is 8."]] * 5)
    alike = replace(alike, settings=replace(alike.settings, native_prompt=True))
    assert alike.answer_consistency is not None and alike.answer_consistency.value == 1.0
    assert boxed.attempts["majority@4"].value == 0.0  # by our tags


GOLD = Fraction(12)
ANSWERS = [GOLD, Fraction(13), Fraction(25, 2), Fraction(-12), None]
some_answers = st.lists(st.sampled_from(ANSWERS), min_size=1, max_size=8)


def mean(values: list[Fraction]) -> float:
    return float(sum(values) / len(values))


def vote(answers: tuple[Fraction | None, ...]) -> Fraction:
    counts = Counter(answer for answer in answers if answer is not None)
    first = [answer for answer, count in counts.items() if count == max(counts.values())]
    return Fraction(1, len(first)) if GOLD in first else Fraction(0)


@given(some_answers, st.data())
def test_both_are_the_mean_over_all_choices_of_k_replies(
    answers: list[Fraction | None], data: st.DataObject
) -> None:
    k = data.draw(st.integers(1, len(answers)))
    chosen = list(combinations(answers, k))
    assert majority_at(k, answers, GOLD) == mean([vote(choice) for choice in chosen])
    passed = mean([Fraction(GOLD in choice) for choice in chosen])
    assert pass_at(k, len(answers), answers.count(GOLD)) == passed


@given(some_answers)
def test_one_reply_passes_as_often_as_it_wins(answers: list[Fraction | None]) -> None:
    share = answers.count(GOLD) / len(answers)
    assert pass_at(1, len(answers), answers.count(GOLD)) == pytest.approx(share)
    assert majority_at(1, answers, GOLD) == pytest.approx(share)


@given(some_answers, st.randoms())
def test_the_order_of_the_replies_does_not_matter(
    answers: list[Fraction | None], random: object
) -> None:
    k = (len(answers) + 1) // 2
    before = majority_at(k, answers, GOLD)
    random.shuffle(answers)  # type: ignore[attr-defined]
    assert majority_at(k, answers, GOLD) == before


@given(st.integers(1, 40), st.data())
def test_more_tries_and_more_right_replies_never_lower_pass_at_k(
    num_samples: int, data: st.DataObject
) -> None:
    right = data.draw(st.integers(0, num_samples))
    by_k = [pass_at(k, num_samples, right) for k in range(1, num_samples + 1)]
    assert by_k == sorted(by_k) and by_k[-1] == (right > 0)
    by_right = [pass_at(1, num_samples, one) for one in range(num_samples + 1)]
    assert by_right == sorted(by_right)


def test_a_tie_is_shared_and_silence_neither_votes_nor_wins() -> None:
    thirteen, fourteen = Fraction(13), Fraction(14)
    assert majority_at(4, [GOLD, GOLD, thirteen, thirteen], GOLD) == 0.5
    assert majority_at(3, [GOLD, thirteen, fourteen], GOLD) == pytest.approx(1 / 3)
    assert majority_at(5, [None, None, None, None, GOLD], GOLD) == 1
    assert majority_at(2, [None, None], GOLD) == 0
    assert majority_at(2, [None, None], None) == majority_at(2, [thirteen, None], None) == 0


def test_equal_values_are_one_answer_however_they_were_made() -> None:
    assert majority_at(3, [Fraction("12.0"), Fraction(24, 2), Fraction(13)], GOLD) == 1


def test_hundreds_of_replies_stay_exact() -> None:
    assert pass_at(1000, 4000, 1) == 0.25
    answers = [GOLD] * 100 + [Fraction(n % 40) for n in range(100)] + [None] * 56
    assert 0.99 < majority_at(64, answers, GOLD) <= 1


@pytest.mark.parametrize(("k", "num_samples"), [(0, 4), (5, 4), (-1, 4), (1, 0)])
def test_a_k_that_cannot_be_chosen_is_refused(k: int, num_samples: int) -> None:
    with pytest.raises(ValueError, match="replies"):
        pass_at(k, num_samples, 0)
    with pytest.raises(ValueError, match="replies"):
        majority_at(k, [GOLD] * num_samples, GOLD)


@pytest.mark.parametrize("num_correct", [-1, 5])
def test_more_right_replies_than_replies_are_refused(num_correct: int) -> None:
    with pytest.raises(ValueError, match="correct of 4"):
        pass_at(2, 4, num_correct)
