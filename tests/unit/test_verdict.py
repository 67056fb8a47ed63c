"""The verdict is honest in every outcome, fits its columns, and cannot be hijacked by a reply."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.cells import cell_len

from abacist.proof.comparison.compare import Comparison, compare
from abacist.view.verdict import WIDTH, headline, verdict_json, verdict_text
from evaluated import BARE, GOOD, SILENT, WORKLESS, WRONG, evaluation, problem

PROBLEMS = [problem(n, difficulty=1 + n % 3, unseen=n % 2 == 1) for n in range(40)]


def of(before: list[str], after: list[str]) -> Comparison:
    problems = PROBLEMS[: len(before)]
    return compare(evaluation(before, problems), evaluation(after, problems))


LEARNED = of([WRONG] * 20 + [GOOD] * 20, [WRONG] * 4 + [GOOD] * 35 + [WRONG])
SAMPLED = (
    evaluation([[BARE, GOOD, WRONG, GOOD]] * 10, PROBLEMS[:10]),
    evaluation([[GOOD] * 4] * 9 + [[WRONG] * 4], PROBLEMS[:10]),
)


def test_the_headline_of_a_model_that_learned() -> None:
    assert headline(LEARNED) == (
        "Learned: 50.0 % → 87.5 % correct on 40 problems it never saw, +37.5 points "
        "[+19.0, +52.9], p=0.00027; gained 16, lost 1."
    )
    assert headline(LEARNED, "test problems").startswith(
        "Learned: 50.0 % → 87.5 % correct on 40 test problems,"
    )


@pytest.mark.parametrize(
    ("before", "after", "beginning"),
    [
        ([GOOD] * 20 + [WRONG] * 20, [GOOD] * 22 + [WRONG] * 18, "No proven change: 50.0 % → 55"),
        ([WRONG] * 40, [WRONG] * 40, "No proven change: 0.0 % → 0.0 %"),
        ([GOOD] * 40, [WRONG] * 15 + [GOOD] * 25, "Got worse: 100.0 % → 62.5 %"),
        ([WRONG] * 40, [GOOD] * 40, "Learned: 0.0 % → 100.0 %"),
    ],
)
def test_the_headline_never_claims_more_than_is_proven(
    before: list[str], after: list[str], beginning: str
) -> None:
    sentence = headline(of(before, after))
    assert sentence.startswith(beginning)
    assert ("Chance alone" in sentence) == (beginning == "No proven change: 50.0 % → 55")


def test_a_minute_p_value_is_bounded_not_printed_as_zero() -> None:
    problems = [problem(n) for n in range(200)]
    sure = compare(evaluation([WRONG] * 200, problems), evaluation([GOOD] * 200, problems))
    assert "p<1e-20" in headline(sure)


def test_a_gain_that_is_only_format_is_called_so() -> None:
    text = verdict_text(of([BARE] * 40, [GOOD] * 40))
    assert "Learned: 0.0 % → 100.0 %" in text
    assert "Beyond the format nothing is proven: in any format 100.0 % → 100.0 %" in text


def test_a_gain_bought_with_worse_arithmetic_is_a_warning() -> None:
    spoilt = of([BARE] * 40, [GOOD] * 20 + [WRONG] * 20)
    assert "Beware, it got worse when format is ignored" in verdict_text(spoilt)


def test_reasoning_is_judged_where_work_is_shown_both_times() -> None:
    assert "so the reasoning itself got better" in verdict_text(LEARNED).replace("\n", " ")
    same = verdict_text(of([GOOD] * 30 + [WORKLESS] * 10, [GOOD] * 40)).replace("\n", " ")
    assert "Where work is shown both times (30 problems)" in same
    assert "so better reasoning is not proven" in same


def test_an_answer_that_was_there_in_another_form_is_no_better_reasoning() -> None:
    only_form = of(["<reasoning>\n3 + 4 = 7\n</reasoning>\nThe answer is 7"] * 40, [GOOD] * 40)
    text = verdict_text(only_form).replace("\n", " ")
    assert "Where work is shown both times (40 problems): 0.0 % → 100.0 %" in text
    assert "in any format 100.0 % → 100.0 %" in text and "the layout may be all of it" in text
    assert "reasoning itself got better" not in text


@pytest.mark.parametrize(
    ("gained", "lost", "said"),
    [(42, 25, "p=0.0498"), (81, 57, "p=0.0498"), (22, 10, "p=0.0501"), (6, 0, "p=0.031")],
)
def test_a_p_on_either_side_of_a_twentieth_is_not_printed_as_one(
    gained: int, lost: int, said: str
) -> None:
    problems = [problem(n) for n in range(gained + lost)]
    before = [WRONG] * gained + [GOOD] * lost
    after = [GOOD] * gained + [WRONG] * lost
    found = compare(evaluation(before, problems), evaluation(after, problems))
    assert f"{said};" in headline(found)


def test_everything_that_was_measured_is_in_the_tables() -> None:
    text = verdict_text(LEARNED, *SAMPLED)
    for label in (
        "correct in any format", "strict format", "soft format", "structure adherence",
        "shows its work", "every step shown is true", "stopped by itself", "tokens a reply",
        "sampled, 4 replies to 10 problems", "all 4 in strict format (consistency)",
        "all 4 give the same answer", "1 step", "3 steps", "seen structures", "unseen structures",
        "correctness (2)", "xml_count (0.5)", "Example 1: gained", "an unseen structure",
        "still wrong", "The right answer is 7.", "before, wrong:", "after, right:",
    ):  # fmt: skip
        assert label in text, label
    lines = verdict_text(LEARNED).splitlines()
    rows = dict(line.strip().split("  ", 1) for line in lines if "  " in line.strip())
    assert rows["correct"].split()[:5] == ["50.0", "%", "87.5", "%", "+37.5"]
    assert rows["correctness (2)"].split() == ["1.00", "1.75", "+0.75", "[+0.40,", "+1.10]"]
    assert "sampled," not in verdict_text(LEARNED).split("Example 1")[0]


def test_it_is_plain_text_of_at_most_a_hundred_columns() -> None:
    for text in (verdict_text(LEARNED), verdict_text(LEARNED, *SAMPLED)):
        assert "\x1b" not in text and not text.endswith("\n")
        assert all(len(line) <= WIDTH and line == line.rstrip() for line in text.splitlines())


HOSTILE = ["\x1b[2J\x1b]0;owned\x07", "\u202eevil", "[red]x[/red]", "a" * 100_000, "\n" * 5000,
           "漢字" * 3000, "\ud800\x00", "\u2028\u0085\r", "e\u0301" * 500]  # fmt: skip


@pytest.mark.parametrize("reply", HOSTILE)
def test_a_hostile_reply_is_shown_harmless_and_short(reply: str) -> None:
    text = verdict_text(of([reply] * 4, [reply + GOOD] * 4))
    assert all(c.isprintable() or c == "\n" or c in "\u3000" for c in text)
    assert all(cell_len(line) <= WIDTH for line in text.split("\n"))
    assert len(text) < 20_000 and len(text.split("\n")) < 200
    json.dumps(verdict_json(of([reply] * 4, [GOOD] * 4)), allow_nan=False)


@given(st.lists(st.sampled_from([GOOD, WRONG, BARE, WORKLESS, SILENT]), min_size=2, max_size=2))
@settings(max_examples=10, deadline=None)
def test_every_outcome_has_a_verdict(replies: list[str]) -> None:
    text = verdict_text(of([replies[0]] * 40, [replies[1]] * 40))
    assert text.startswith(("Learned: ", "No proven change: ", "Got worse: "))
    assert "nan" not in text


def test_the_json_says_the_same_as_the_text() -> None:
    document = json.loads(json.dumps(verdict_json(LEARNED, *SAMPLED), allow_nan=False))
    assert document["judgement"] == "learned" and document["headline"] in verdict_text(
        LEARNED
    ).replace("\n", " ")
    assert document["greedy"]["paired"]["accuracy"]["change"]["value"] == pytest.approx(0.375)
    assert document["sampled"]["changes"]["answer_consistency"]["value"] == 1.0
    assert document["examples"][0]["outcome"] == "gained"
    assert document["examples"][-1]["after"] == WRONG
    assert verdict_json(LEARNED)["sampled"] is None
