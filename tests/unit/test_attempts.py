"""pass@k and majority@k over problems: exact at both ends, and their intervals cover."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from abacist.proof.attempts import attempt_counts, bounded_mean
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


@pytest.mark.parametrize(("solved", "n"), [(0.9, 100), (0.5, 60), (0.97, 300)])
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
    assert 0.92 <= covered / 500 <= 0.985
