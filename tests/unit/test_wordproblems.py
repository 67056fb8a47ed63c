"""The generated problems: right, in GSM8K's form, and kept apart by split and structure."""

from __future__ import annotations

import itertools
import random
import re
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from abacist.task.wordproblems import (
    LARGEST_NUMBER,
    SPLITS,
    Slip,
    draw_story,
    generate,
    is_unseen,
    split_of,
    stories,
)

ANNOTATION = re.compile(r"(\d+)([-+*/])(\d+)=<<(\d+)([-+*/])(\d+)=(\d+)>>(\d+)")
seeds = st.integers(0, 10**9)


def value_of(a: int, operator: str, b: int) -> Fraction:
    return {"+": Fraction(a + b), "-": Fraction(a - b), "*": Fraction(a * b)}.get(
        operator, Fraction(a, b)
    )


@given(seeds)
def test_every_equation_is_true_and_annotated_as_in_gsm8k(seed: int) -> None:
    answer = str(generate(1, seed=seed)[0]["answer"])
    *lines, last = answer.split("\n")
    assert re.fullmatch(r"#### \d+", last)
    for line in lines:
        found = ANNOTATION.findall(line)
        assert len(found) == 1, line
        a, operator, b, *again, result, shown = found[0]
        assert [a, operator, b] == again and result == shown
        assert value_of(int(a), operator, int(b)) == int(result)


@given(seeds)
def test_the_last_equation_gives_the_gold(seed: int) -> None:
    answer = str(generate(1, seed=seed)[0]["answer"])
    assert answer.split(">>")[-1].split()[0] == answer.split("#### ")[1]


@given(seeds)
def test_numbers_stay_whole_positive_and_small(seed: int) -> None:
    record = generate(1, seed=seed)[0]
    numbers = map(int, re.findall(r"\d+", f"{record['question']} {record['answer']}"))
    assert all(0 < number <= LARGEST_NUMBER for number in numbers)


def test_no_question_is_in_two_splits_whatever_the_seeds() -> None:
    questions = {
        split: {r["question"] for seed in range(3) for r in generate(100, seed=seed, split=split)}
        for split in SPLITS
    }
    for one, other in itertools.combinations(SPLITS, 2):
        assert not questions[one] & questions[other]
    assert all(split_of(str(q)) == split for split in SPLITS for q in questions[split])


@pytest.mark.parametrize("split", ["train", "selection"])
def test_unseen_structures_are_never_in_training_or_selection(split: str) -> None:
    assert not any(record["unseen_structure"] for record in generate(500, seed=1, split=split))


def test_a_third_of_the_heldout_problems_has_an_unseen_structure() -> None:
    unseen = [record["unseen_structure"] for record in generate(300, seed=1, split="heldout")]
    assert sum(map(bool, unseen)) == 100


def test_the_same_seed_gives_the_same_problems_and_more_begin_with_the_fewer() -> None:
    assert generate(50, seed=4) == generate(80, seed=4)[:50]
    assert generate(50, seed=4) != generate(50, seed=5)


def test_problems_are_varied() -> None:
    records = generate(2000, seed=0)
    assert len({record["question"] for record in records}) == 2000
    assert len({record["structure"] for record in records}) > 300
    assert {str(record["answer"]).count("\n") for record in records} == {1, 2, 3, 4}


def test_an_unknown_split_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match="no split 'test'"):
        generate(1, seed=0, split="test")


@given(seeds)
def test_a_distractor_slip_counts_exactly_the_irrelevant_number(seed: int) -> None:
    story = draw_story(random.Random(seed))
    slipped, right = story.solve(Slip.DISTRACTOR), story.solve()
    assert right is not None
    if slipped is None:
        return
    assert story.distractor is not None
    extra = [line for line in slipped[0] if f"+{story.distractor.n}=" in line]
    assert extra and len(slipped[0]) == len(right[0]) + 1


@given(seeds)
def test_a_skipped_event_leaves_lines_out_and_adds_no_false_arithmetic(seed: int) -> None:
    story = draw_story(random.Random(seed))
    slipped, right = story.solve(Slip.SKIPPED_EVENT), story.solve()
    assert right is not None
    if slipped is None:
        return
    assert 0 < len(slipped[0]) < len(right[0])
    for line in slipped[0]:
        a, operator, b, result = re.search(r"(\d+)([-+*/])(\d+)=(\d+)", line).groups()  # type: ignore[union-attr]
        assert value_of(int(a), operator, int(b)) == int(result)


def test_stories_with_a_wanted_length_have_it() -> None:
    rng = random.Random(0)
    for wanted in (1, 2, 3, 4):
        solution = draw_story(rng, wanted).solve()
        assert solution is not None and len(solution[0]) == wanted


def test_the_stream_of_stories_agrees_with_its_split() -> None:
    for story in itertools.islice(stories("train", seed=9), 50):
        assert split_of(story.question()) == "train" and not is_unseen(story.structure)
