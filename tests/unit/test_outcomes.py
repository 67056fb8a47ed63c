"""What became of a reply: each has one outcome, and it agrees with the figures of the verdict."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from abacist.proof.metrics import mark_of
from abacist.proof.outcomes import Outcome, outcome_of, rollout_outcome
from abacist.records.rollout import Rollout, StopReason
from abacist.task.answers import same_answer
from abacist.task.reply import parse_reply, render_reply


def rollout(completion: str, gold: str | None = "12", stopped: bool = True) -> Rollout:
    answer = parse_reply(completion).answer
    return Rollout(
        run_id="r", step=1, split="train", group=0, member=0,
        messages=[{"role": "user", "content": "?"}], completion=completion, completion_ids=[1],
        prompt_tokens=1, completion_tokens=1,
        stop_reason=StopReason.STOPPED if stopped else StopReason.LENGTH, gold=gold,
        read_answer=answer, is_correct=None if gold is None else same_answer(answer, gold),
    )  # fmt: skip


@pytest.mark.parametrize(
    ("completion", "stopped", "expected"),
    [
        (render_reply("5 + 7 = 12", "12"), True, Outcome.RIGHT),
        (render_reply("5 + 7 = 12", "12"), False, Outcome.RIGHT),  # cut off behind its answer
        ("5 + 7 = 12, so the answer is 12.", True, Outcome.UNFORMATTED),
        ("<answer>13</answer> no, it is 12", True, Outcome.UNFORMATTED),
        ("#### 12\nand again #### 12", False, Outcome.UNFORMATTED),
        ("<reasoning>\n5 +", False, Outcome.TRUNCATED),
        ("", False, Outcome.TRUNCATED),
        (render_reply("5 + 7 = 13", "13"), True, Outcome.WRONG),
        ("12 at first, and then 13", True, Outcome.WRONG),
        ("", True, Outcome.WRONG),
    ],
)
def test_a_reply_has_the_first_outcome_that_fits(completion, stopped, expected):
    assert rollout_outcome(rollout(completion, stopped=stopped)) is expected


def test_without_a_gold_a_reply_is_not_called_wrong():
    assert rollout_outcome(rollout("It is 12.", gold=None)) is Outcome.UNJUDGED
    assert rollout_outcome(rollout("It is", gold=None, stopped=False)) is Outcome.TRUNCATED


@given(st.text(max_size=80) | st.sampled_from(["12", "#### 12", "$12.", "1,2", "<answer>12"]))
def test_right_and_unformatted_together_are_what_the_verdict_counts(completion):
    for row in (rollout(completion), rollout(completion, stopped=False)):
        mark = mark_of(row)
        good = rollout_outcome(row) in (Outcome.RIGHT, Outcome.UNFORMATTED)
        assert good == (mark.correct or mark.any_format)


def test_outcomes_are_told_from_the_columns_of_a_file():
    assert outcome_of("12", "12", True, "stopped") is Outcome.RIGHT
    assert outcome_of("\ud800\x00 1", "12", None, "length") is Outcome.TRUNCATED


def test_every_outcome_has_a_sentence():
    assert all(outcome.sentence.endswith(".") for outcome in Outcome)
