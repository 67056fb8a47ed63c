"""Steps of a reasoning are found and paid by the results of the reference solution."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from abacist.task.problems import load_problems
from abacist.task.reply import render_reply
from abacist.task.step_rewards import step_rewards
from abacist.task.steps import MAX_EQUALS_SIGNS, valid_steps

GSM8K = Path(__file__).parents[3] / "shared" / "gsm8k"
SOLUTION = "In May 48/2 = <<48/2=24>>24 clips.\nIn all 48+24 = <<48+24=72>>72 clips."


def paid(
    completion: str, *, is_correct: bool | None, solution: str = SOLUTION, is_cut: bool = False
) -> list[float | None]:
    steps = step_rewards(completion, solution, is_correct=is_correct, is_cut=is_cut)
    return [one.reward for one in steps]


def test_a_step_is_right_where_it_reaches_a_result_of_the_reference() -> None:
    assert paid("48 / 2 = 24\n24 + 48 = 72", is_correct=True) == [1, 1]
    assert paid("48 / 2 = 24\n24 + 24 = 48", is_correct=False) == [1, 0]


def test_a_result_is_paid_once_and_to_repeat_it_is_no_error() -> None:
    assert paid("48 / 2 = 24\n12 + 12 = 24\n24 * 2 = 48", is_correct=False) == [1, None, 0]
    assert paid("48 / 2 = 24\n48 / 2 = 24\nSo 24.", is_correct=False) == [1, None, 0]
    assert paid("48 / 2 = 24\n48 / 2 = 25", is_correct=False) == [1, 0]


def test_a_result_that_stands_twice_in_the_reference_is_paid_twice() -> None:
    there_and_back = "38 + 20 = 58\n58 * 2 = 116\n116 / 2 = 58"
    assert paid(there_and_back, is_correct=False, solution=there_and_back) == [1, 1, 1]
    again = there_and_back + "\n60 - 2 = 58"
    assert paid(again, is_correct=False, solution=there_and_back) == [1, 1, 1, None]
    both = "38 + 20 = 58, then 116 / 2 = 58\n60 - 2 = 58"
    assert paid(both, is_correct=False, solution=there_and_back) == [1, None]


def test_the_last_line_of_a_reply_that_was_cut_off_is_not_judged_on_half_a_numeral() -> None:
    cut = "48 / 2 = 24\n24 + 48 = 7"
    assert paid(cut, is_correct=False) == [1, 0]
    assert paid(cut, is_correct=False, is_cut=True) == [1, 0]  # the second is the conclusion
    assert paid("<reasoning>\n48 / 2 = 2", is_correct=None, is_cut=True) == [None]
    # A line that has its end is whole, and so is one before the tag that ends the reasoning.
    assert paid("48 / 2 = 25\n", is_correct=False, is_cut=True) == [0]
    assert paid("48 / 2 = 24</reasoning>\n<ans", is_correct=False, is_cut=True) == [1, 0]
    *shown, conclusion = step_rewards(cut, SOLUTION, is_correct=False, is_cut=True)
    assert len(shown) == 1 and cut[conclusion.start : conclusion.end] == "24 + 48 = 7"


def test_the_way_of_a_right_reply_is_right_whichever_it_is() -> None:
    assert paid("48 * 3 = 144\n144 / 2 = 72", is_correct=True) == [1, 1]
    assert paid("48 * 3 = 144\n144 / 2 = 72", is_correct=False) == [0, 1]
    # What is false is not, in a right reply either.
    assert paid("48 * 3 = 145\n144 / 2 = 72", is_correct=True) == [0, 1]


def test_only_the_first_step_that_goes_astray_is_blamed() -> None:
    astray = "48 - 2 = 46\n46 + 1 = 47\n47 + 1 = 48\n48 / 2 = 24\n24 + 1 = 25\n1 + 1 = 3"
    assert paid(astray, is_correct=False) == [0, None, None, 1, None, 0]


def test_a_false_equation_with_a_right_result_is_not_right() -> None:
    assert paid("50 / 2 = 24", is_correct=False) == [0]
    assert paid("48 / 2 = 24, and 24 + 48 = 73", is_correct=False) == [0]


def test_a_percentage_is_its_hundredths_or_the_number_before_the_sign() -> None:
    assert paid("12 / 30 = 40%", is_correct=False, solution="12/30*100 = 40") == [1]
    assert paid("12 / 30 = 40%", is_correct=False, solution="12/30 = 0.4") == [1]
    assert paid("12 / 30 = 0.4", is_correct=False, solution="12/30 = 40%") == [1]


def test_a_percentage_on_the_left_is_no_result() -> None:
    assert paid("500 * 2 = 1000", is_correct=False, solution="50% * 20 = 10") == [0]
    assert paid("5 * 2 = 10", is_correct=False, solution="50% * 20 = 10") == [1]
    # "%" is a mere unit here: the left side is 20.5 by the other reading.
    assert paid("41 / 2 = 20.5", is_correct=False, solution="50% + 20 = 70") == [0]


@pytest.mark.parametrize(
    "way", ["10 / 3 = 3.33", "10 / 3 = 3.3333", "20 / 6 = 3.3", "1.33 + 2 = 3.33"]
)
def test_a_result_that_was_rounded_is_the_same_to_however_many_digits(way: str) -> None:
    assert paid(way, is_correct=False, solution="10 / 3 = 3.33") == [1]


def test_a_result_that_can_be_written_in_two_ways_is_paid_once() -> None:
    again = "12 / 30 = 0.4\n0.4 * 100 = 40"
    assert paid(again, is_correct=False, solution="12 / 30 = 40%") == [1, None]
    again = "10 / 3 = 3.3\n20 / 6 = 3.33"
    assert paid(again, is_correct=False, solution="10 / 3 = 3.33") == [1, None]


def test_a_line_is_paid_for_what_it_comes_to_and_not_for_all_that_it_lists() -> None:
    every = ", ".join(f"{number} + 0 = {number}" for number in range(1, 101))
    assert paid(every, is_correct=False) == [0]
    assert paid("48 / 2 = 24, then 24 + 24 = 48", is_correct=False) == [0]
    assert paid("25 - 1 = 24, then 24 + 48 = 72\n48 / 2 = 24", is_correct=False) == [1, None]
    assert paid("In all 24 + 48 = 70 + 2 = 72", is_correct=False) == [1]


def test_a_line_with_more_than_anyone_reads_is_not_right() -> None:
    unread = "24 * 3 = 72, " * (MAX_EQUALS_SIGNS - 1) + "48 / 2 = 24, and 1 + 1 = 3"
    assert paid(unread, is_correct=False) == paid(unread, is_correct=True) == [0]


def test_where_nobody_knows_the_answer_the_conclusion_is_not_judged() -> None:
    assert paid("48 / 2 = 24\n24 + 48 = 72\nSo 72.", is_correct=None) == [1, 1, None]
    assert paid("48 / 2 = 24\n24 + 24 = 48\nSo 48.", is_correct=None) == [1, 0, None]


def test_words_belong_to_the_step_that_they_lead_to_and_what_is_left_to_the_conclusion() -> None:
    text = render_reply("First:\n48 / 2 = 24\nThen\nin all:\n48 + 24 = 72\nSo 72.", "1 + 1 = 2")
    steps = step_rewards(text, SOLUTION, is_correct=True)
    *shown, conclusion = [text[one.start : one.end] for one in steps]
    assert shown == ["\nFirst:\n48 / 2 = 24\n", "Then\nin all:\n48 + 24 = 72\n"]
    assert conclusion.startswith("So 72.\n</reasoning>") and conclusion.endswith("</answer>")


def test_a_conclusion_is_right_with_the_answer_and_wrong_where_nothing_before_it_was() -> None:
    assert paid("48 / 2 = 24\nSo 24.", is_correct=True) == [1, 1]
    assert paid("48 / 2 = 24\nSo 24.", is_correct=False) == [1, 0]  # it stopped too early
    assert paid("48 - 2 = 46\nSo 46.", is_correct=False) == [0, None]
    assert paid("It is 24.", is_correct=True) == [1]
    assert paid("It is 24.", is_correct=False) == [0]
    assert paid("48 / 2 = 24", is_correct=False) == [1]  # there is none


@pytest.mark.parametrize(
    "text",
    [
        "<reasoning>48 / 2 = 24",  # cut off
        "48 / 2 = 24 <answer>1 + 1 = 2</answer>",
        "<reasoning>48 / 2 = 24</reasoning> 1 + 1 = 2 <answer>24</answer>",
        "48 / 2 = 24 <answer>1 + 1 = 2</answer></reasoning>",
        "48 / 2 = 24",
        "</reasoning> <reasoning>48 / 2 = 24</reasoning> 1 + 1 = 2",
    ],
)
def test_the_reasoning_is_found_however_little_of_its_layout_there_is(text: str) -> None:
    step, *_ = step_rewards(text, SOLUTION, is_correct=False)
    assert step.reward == 1 and "48 / 2 = 24" in text[step.start : step.end]
    assert "1 + 1" not in text[step.start : step.end]


def test_without_results_in_the_reference_or_without_a_reply_there_is_nothing_to_reach() -> None:
    assert paid("48 / 2 = 24", is_correct=False, solution="It is 24.") == [0]
    assert paid("", is_correct=True) == []


_PIECES = st.sampled_from(
    ["48 / 2 = 24", "2 = 3", "1 + 1 = 3", "\n", " ", "é", "²", "\u2028", "\r\n", "=", "%",
     "<reasoning>", "</reasoning>", "<answer>", "</answer>", "5 + 5 = 10 = 4 + 6", ">>", "\ud800"]
)  # fmt: skip


@given(st.lists(_PIECES | st.text(max_size=8)).map("".join), st.booleans())
def test_steps_of_any_text_are_in_order_and_within_it(text: str, is_correct: bool) -> None:
    steps = step_rewards(text, SOLUTION, is_correct=is_correct)
    edges = [edge for one in steps for edge in (one.start, one.end)]
    assert edges == sorted(edges) and all(0 <= edge <= len(text) for edge in edges)
    assert all(one.start < one.end and one.reward in (0, 1, None) for one in steps)


@pytest.mark.skipif(not GSM8K.is_dir(), reason="GSM8K is not in ../shared/gsm8k")
def test_gsm8ks_own_solutions_are_right_from_step_to_step() -> None:
    counts = {0.0: 0, 1.0: 0, None: 0}
    for problem in load_problems(GSM8K, split="selection"):
        text = problem.solution
        for one in step_rewards(text, text, is_correct=None):
            counts[one.reward] += 1
            # What stands in the reference is wrong only where it is false arithmetic.
            line = text[one.start : one.end]
            assert one.reward != 0 or not valid_steps(line), line
    # The conclusions are not judged, as nobody knows the answers, nor are lines that repeat.
    assert counts[1.0] > 700 and counts[0.0] < 0.02 * counts[1.0], counts


def test_a_long_reply_takes_linear_time() -> None:
    text = "48 / 2 = 24\n" * 20_000
    assert len(step_rewards(text, SOLUTION, is_correct=False)) == 20_000
    assert step_rewards("1" * 200_000, SOLUTION, is_correct=False) == [(0, 200_000, 0.0)]
