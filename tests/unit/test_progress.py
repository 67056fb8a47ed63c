"""How far a generation is: bounded, never optimistic because short replies end first."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from abacist.policy.decoding.progress import Decoded


def after_tokens(lengths: list[int], tokens: int, budget: int) -> Decoded:
    """A batch in which all replies began together, and each has written so many tokens."""
    ended = [length for length in lengths if length <= tokens]
    count = len(lengths) - len(ended)
    return Decoded(
        replies=len(lengths), ended=len(ended), ended_tokens=sum(ended), open=count,
        open_tokens=count * tokens, oldest_tokens=tokens * bool(count), budget_tokens=budget,
    )  # fmt: skip


batches = st.integers(1, 200).flatmap(
    lambda budget: st.tuples(
        st.lists(st.integers(1, budget), min_size=1, max_size=50),
        st.integers(0, budget),
        st.just(budget),
    )
)


@given(batches)
def test_what_is_expected_lies_between_what_is_written_and_the_budget(
    batch: tuple[list[int], int, int],
) -> None:
    found = after_tokens(*batch)
    assert found.written_tokens <= found.expected_tokens <= len(batch[0]) * batch[2]


@given(batches)
def test_when_all_have_ended_nothing_is_left(batch: tuple[list[int], int, int]) -> None:
    found = after_tokens(batch[0], batch[2], batch[2])
    assert found.expected_tokens == found.written_tokens == sum(batch[0])
    assert found == Decoded.all_ended(batch[0], batch[2])


def test_a_few_early_ends_do_not_make_the_rest_look_short_or_endless() -> None:
    """Of 64 replies 6 end early. By ended replies alone ten times as much would seem to be left."""
    lengths = [20] * 6 + [120] * 58
    found = after_tokens(lengths, 60, 320)
    left, really = found.expected_tokens - found.written_tokens, 58 * 60
    by_replies = found.written_tokens * 58 / 6
    assert by_replies >= 10 * really
    assert really <= left <= 58 * (320 - 60)  # no more than the budget allows


@pytest.mark.parametrize("seed", range(5))
def test_replies_that_end_at_random_are_foretold_within_a_third_halfway(seed: int) -> None:
    drawn = random.Random(seed)
    lengths = [min(400, 1 + int(drawn.expovariate(1 / 80))) for _ in range(200)]
    found = after_tokens(lengths, 55, 400)
    assert found.expected_tokens == pytest.approx(sum(lengths), rel=1 / 3)


def test_parts_of_one_piece_of_work_add_up() -> None:
    greedy = Decoded.all_ended([10, 30], 50)
    sampled = Decoded(8, 1, 5, 4, 40, 12, 50)
    whole = sampled.after(greedy)
    assert (whole.replies, whole.ended, whole.written_tokens) == (10, 3, 85)
    assert whole.words() == "3 of 10 replies, token 12 of at most 50"
    before = greedy.before(8)
    assert before.replies == 10 and before.expected_tokens == 40 + 8 * 20
    assert before.words() == "2 of 10 replies"
