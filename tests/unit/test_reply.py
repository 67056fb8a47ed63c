"""The reply format: one layout to write, every text to read."""

from __future__ import annotations

import pickle
import time
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from abacist.errors import UsageError
from abacist.task.reply import (
    TAGS,
    Defect,
    completion_text,
    parse_reply,
    render_reply,
)

CANONICAL = "<reasoning>\n5 + 7 = 12\n</reasoning>\n<answer>\n12\n</answer>"

tag_free = st.text().filter(lambda text: text.strip() and not any(tag in text for tag in TAGS))
pieces = st.sampled_from([*TAGS, "\n", " ", "12", "13", "12 apples", "x", "<", "\u200b"])
reply_like = st.lists(pieces, max_size=14).map("".join)


def test_the_canonical_layout_is_strict_and_soft_with_or_without_one_final_newline() -> None:
    for text in (CANONICAL, CANONICAL + "\n"):
        reply = parse_reply(text)
        assert (reply.reasoning, reply.answer, reply.defects) == ("5 + 7 = 12", "12", ())
        assert reply.strict and reply.soft and reply.text == text
    assert render_reply(" 5 + 7 = 12\n", "12") == CANONICAL


@given(tag_free, tag_free)
def test_what_is_rendered_parses_back_strictly(reasoning: str, answer: str) -> None:
    reply = parse_reply(render_reply(reasoning, answer))
    assert reply.strict
    assert (reply.reasoning, reply.answer) == (reasoning.strip(), answer.strip())


@pytest.mark.parametrize(
    ("text", "defects"),
    [
        ("", {"no_reasoning", "no_answer"}),
        ("12", {"no_reasoning", "no_answer"}),
        ("<answer>\n12\n</answer>", {"no_reasoning"}),
        (
            CANONICAL.replace("<reasoning>", ""),
            {"no_reasoning", "stray_closing_tag", "text_before"},
        ),
        (CANONICAL.replace("</answer>", ""), {"unclosed_answer", "text_after"}),
        (CANONICAL.replace("</reasoning>", ""), {"unclosed_reasoning"}),
        ("<reasoning>\na\n</reasoning>", {"no_answer"}),
        (CANONICAL + CANONICAL, {"repeated_reasoning", "repeated_answer"}),
        (
            CANONICAL + "\n<answer>\n13\n</answer>",
            {"repeated_answer", "disagreeing_answers"},
        ),
        (CANONICAL.replace("5 + 7 = 12", " "), {"empty_reasoning"}),
        (CANONICAL.replace("\n12\n<", "\n<"), {"empty_answer"}),
        ("<answer>\n12\n</answer>\n<reasoning>\na\n</reasoning>", {"wrong_order"}),
        ("<reasoning>\n<answer>\n12\n</answer>\n</reasoning>", {"wrong_order"}),
        ("</answer>12<answer>", {"no_reasoning", "unclosed_answer", "stray_closing_tag"}),
        ("Sure! " + CANONICAL, {"text_before"}),
        (CANONICAL.replace("\n<answer>", "\nSo:\n<answer>"), {"text_between"}),
        (CANONICAL + "\nDone.", {"text_after"}),
        ("<reasoning>a</reasoning>\n<answer>12</answer>", {"tag_not_on_own_line"}),
        (CANONICAL.replace("\n<answer>", "<answer>"), {"tag_not_on_own_line"}),
        ("\n" + CANONICAL, {"extra_white_space"}),
        (CANONICAL + "\n\n", {"extra_white_space"}),
        (CANONICAL.replace("\n<answer>", "\n\n<answer>"), {"extra_white_space"}),
    ],
)
def test_each_defect_is_named(text: str, defects: set[str]) -> None:
    reply = parse_reply(text)
    assert set(reply.defects) == defects
    assert not reply.strict
    assert reply.soft == (
        defects <= {"tag_not_on_own_line", "extra_white_space", "empty_reasoning", "empty_answer"}
    )


def test_answer_tags_mentioned_in_the_reasoning_spoil_the_layout() -> None:
    for mention in ("<answer>3</answer>", "<answer>", "</answer>"):
        reply = parse_reply(CANONICAL.replace("5 + 7", f"I use {mention}: 5 + 7"))
        assert reply.answer == "12" and reply.reasoning is not None
        assert not reply.strict and not reply.soft
        assert reply.defects == (Defect.REPEATED_ANSWER,)


@pytest.mark.parametrize("value", [None, 5, b"<answer>1</answer>", [{"content": "1"}]])
def test_what_is_no_text_is_refused_with_its_kind(value: object) -> None:
    with pytest.raises(UsageError, match=f"given a {type(value).__name__}, not a text"):
        parse_reply(value)


def test_reasoning_may_have_many_lines() -> None:
    assert parse_reply(render_reply("a\n\nb\n  c", "12")).strict


def test_every_defect_has_a_sentence_and_can_be_pickled() -> None:
    assert all(defect.sentence.endswith(".") for defect in Defect)
    assert len({defect.sentence for defect in Defect}) == len(Defect)
    reply = parse_reply("x" + CANONICAL)
    assert pickle.loads(pickle.dumps(reply)) == reply
    assert Defect("text_before") is reply.defects[0]


ELEVEN = "".join(f"<answer>{n}</answer>" for n in range(1, 12))


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("<answer>12", None),
        ("12</answer>", None),
        ("The answer is 12.", None),
        ("<answer></answer>", None),
        ("<answer> \n </answer>", None),
        ("so <answer> 12 apples </answer> it is", "12 apples"),
        ("<reasoning><answer>12</answer>", "12"),
        ("<answer>12</answer> <answer>13", "12"),
        ("<answer><answer>12</answer></answer>", "12"),
        ("<answer>12</answer><answer>12</answer>", "12"),
        ("<answer>1,200</answer><answer>+1200</answer>", "1,200"),
        ("<answer>12</answer><answer>13</answer>", None),
        ("<answer>12</answer><answer>12</answer><answer>13</answer>", None),
        ("<answer>12 apples</answer><answer>12 pears</answer>", None),
        ("".join(f"<answer>{n}</answer>" for n in range(1, 13)), None),
        ("<Answer>12</Answer>", None),
        (f"<answer>{'7' * 5_000}</answer><answer>0{'7' * 5_000}</answer>", "7" * 5_000),
        (f"<answer>{'7' * 5_000}</answer><answer>{'7' * 4_999}8</answer>", None),
        # A mention in the one reasoning block is text, where an answer block stands behind it.
        ("<reasoning>as <answer>3</answer></reasoning><answer>12 apples</answer>", "12 apples"),
        ("<reasoning>in <answer> tags</reasoning><answer>12 apples</answer>", "12 apples"),
        ("<reasoning>to </answer></reasoning>\n<answer>12 apples</answer>", "12 apples"),
        ("<reasoning></answer><answer></reasoning><answer>12 apples</answer>", "12 apples"),
        (f"<reasoning>{ELEVEN}</reasoning><answer>12</answer>", "12"),
        ("<reasoning><answer>3</answer></reasoning> 12", "3"),  # nothing behind it
        (f"<reasoning>{ELEVEN}</reasoning> 12", None),
        (f"<reasoning>{ELEVEN}</reasoning><answer>12", None),
        (f"<reasoning>{ELEVEN}<answer>12</answer>", None),  # reasoning without end
        (f"{ELEVEN}</reasoning><answer>12</answer>", None),  # or without a beginning
        ("<reasoning>a</reasoning><answer>3</answer><answer>12</answer>", None),
        ("<answer>3</answer><reasoning>a</reasoning><answer>12</answer>", None),
        ("<answer>3</answer><reasoning><answer>3</answer></reasoning><answer>12</answer>", None),
        ("<reasoning><answer>3</reasoning></answer><answer>12 apples</answer>", None),
        ("<reasoning><answer>3</answer></reasoning>" * 2 + "<answer>12</answer>", None),
    ],
)
def test_the_answer_is_what_stands_in_the_one_closed_block(text: str, answer: str | None) -> None:
    assert parse_reply(text).answer == answer


@given(st.text() | reply_like)
def test_any_text_is_read_and_strict_implies_soft_implies_the_four_tags_in_order(text: str) -> None:
    reply = parse_reply(text)
    assert len(set(reply.defects)) == len(reply.defects)
    if reply.strict:
        assert reply.soft and reply.reasoning and reply.answer
        assert text.removesuffix("\n") == render_without_stripping(text)
    if reply.soft:
        positions = [text.index(tag) for tag in TAGS]
        assert all(text.count(tag) == 1 for tag in TAGS)
        assert all(first < second for first, second in pairwise(positions))


def render_without_stripping(text: str) -> str:
    """The canonical layout of what stands between the tags of a well-formed text."""
    reasoning = text.split("<reasoning>\n")[1].split("\n</reasoning>")[0]
    answer = text.split("<answer>\n")[1].split("\n</answer>")[0]
    return f"<reasoning>\n{reasoning}\n</reasoning>\n<answer>\n{answer}\n</answer>"


@given(st.text(), st.text())
def test_text_outside_the_answer_block_never_changes_the_answer(before: str, after: str) -> None:
    if not any(tag in f"{before}|{after}" for tag in TAGS):
        assert parse_reply(f"{before}<answer>12</answer>{after}").answer == "12"


@pytest.mark.parametrize(
    ("completion", "text"),
    [
        ("a", "a"),
        (None, ""),
        ([], ""),
        ([None], ""),
        ([{"role": "assistant", "content": "a"}], "a"),
        ([{"role": "assistant", "content": None}], ""),
        ([{"role": "assistant"}], ""),
        ([{"role": "tool", "content": "x"}, {"role": "assistant", "content": "a"}], "a"),
        ([{"content": [{"type": "text", "text": "a"}, {"type": "image"}, "b", 3]}], "ab"),
        (3, ""),
    ],
)
def test_a_completion_is_text_whatever_form_it_arrives_in(completion: object, text: str) -> None:
    assert completion_text(completion) == text


HOSTILE = {
    "opening tags": "<answer>",
    "closing tags": "</answer>",
    "pairs": "<answer></answer>",
    "equal answers": "<answer>1</answer>",
    "block changes": "</reasoning><answer>",
    "brackets": "<",
    "slashes": "</",
    "lines": "\n",
    "spaces": " ",
    "surrogates": "\ud800",
    "tags on lines": "\n<answer>\n",
}


@pytest.mark.parametrize("unit", HOSTILE.values(), ids=HOSTILE.keys())
def test_no_text_of_100_kb_takes_more_than_50_ms(unit: str) -> None:
    text = (unit * 100_000)[:100_000]
    assert best_cpu_seconds(text) < 0.05


def test_thousands_of_different_spellings_of_one_integer_take_less_than_50_ms() -> None:
    text = "".join(f"<answer>{'0' * (n % 30)}1</answer>" for n in range(2_800))
    assert parse_reply(text).answer == "1"
    assert best_cpu_seconds(text) < 0.05


def best_cpu_seconds(text: str) -> float:
    best = float("inf")
    for _ in range(5):
        start = time.process_time()
        parse_reply(text)
        best = min(best, time.process_time() - start)
    return best
