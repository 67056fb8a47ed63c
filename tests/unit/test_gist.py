"""The historic rewards, against a second rendering of what the gist's functions do."""

from __future__ import annotations

import pickle
import re
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from abacist.task import gist
from abacist.task.rewards import REWARD_SETS

# --- written from the description of the gist's semantics, slow where the gist is slow ------------


def reference_extract(text: str) -> str:
    return text.split("<answer>")[-1].split("</answer>")[0].strip()


def reference_scores(text: str, gold: str) -> dict[str, float]:
    strict = r"^<reasoning>\n.*?\n</reasoning>\n<answer>\n.*?\n</answer>\n$"
    soft = r"<reasoning>.*?</reasoning>\s*<answer>.*?</answer>"
    xml = 0.0
    if text.count("<reasoning>\n") == 1:
        xml += 0.125
    if text.count("\n</reasoning>\n") == 1:
        xml += 0.125
    if text.count("\n<answer>\n") == 1:
        xml += 0.125
        xml -= len(text.split("\n</answer>\n")[-1]) * 0.001
    if text.count("\n</answer>") == 1:
        xml += 0.125
        xml -= (len(text.split("\n</answer>")[-1]) - 1) * 0.001
    return {
        "xmlcount_reward_func": xml,
        "soft_format_reward_func": 0.5 if re.match(soft, text) else 0.0,
        "strict_format_reward_func": 0.5 if re.match(strict, text) else 0.0,
        "int_reward_func": 0.5 if reference_extract(text).isdigit() else 0.0,
        "correctness_reward_func": 2.0 if reference_extract(text) == gold else 0.0,
    }


def scores(text: str, gold: str) -> dict[str, float]:
    completions = [[{"role": "assistant", "content": text}]]
    return {
        func.__name__: func(prompts=[[]], completions=completions, answer=[gold])[0]
        for func in REWARD_SETS["gist"]
    }


PIECES = ["<reasoning>", "</reasoning>", "<answer>", "</answer>", "\n", "\n", " ", "\t", "12", "-5"]
PIECES += ["²", "x", "\u2028", "\r", "\x1c", "<reasoning>\n", "\n</reasoning>\n", "\n<answer>\n"]
PIECES += ["\n</answer>\n", "\n</answer>", "<reasoning>\na\n</reasoning>\n<answer>\n12\n</answer>"]
replies = st.lists(st.sampled_from(PIECES), max_size=12).map("".join) | st.text()
golds = st.sampled_from(["12", "-5", "", "1,450", "²"])


@settings(max_examples=400)
@given(replies, golds)
def test_every_score_is_the_historic_one_to_the_last_bit(text: str, gold: str) -> None:
    assert scores(text, gold) == reference_scores(text, gold)


@given(replies)
def test_right_or_wrong_by_string_equality_with_what_is_extracted(text: str) -> None:
    gold = reference_extract(text)
    assert scores(text, gold)["correctness_reward_func"] == 2.0


@pytest.mark.parametrize(
    ("text", "total"),
    [
        ("42", 2.5),
        ("<reasoning>\nwork\n</reasoning>\n<answer>\n42\n</answer>\n", 3.5),
        ("<reasoning>\nmore\nwork\n</reasoning>\n<answer>\n42\n</answer>\n", 3.0),
        ("<reasoning>\nmore\nwork\n</reasoning>\n<answer>\n42\n</answer>", 3.0 - 0.056 + 0.001),
        ("<reasoning>work</reasoning><answer>42</answer>", 3.0),
        ("<answer>1</answer><answer>42</answer>", 2.5),
        ("<answer>$42</answer>", 0.0),
        ("<answer>42.</answer>", 0.0),
        ("<answer>**42**</answer>", 0.0),
    ],
)
def test_known_totals(text: str, total: float) -> None:
    assert sum(scores(text, "42").values()) == pytest.approx(total)


def test_historic_order_and_names() -> None:
    assert [func.__name__ for func in REWARD_SETS["gist"]] == [
        "xmlcount_reward_func",
        "soft_format_reward_func",
        "strict_format_reward_func",
        "int_reward_func",
        "correctness_reward_func",
    ]
    assert all(pickle.loads(pickle.dumps(func)) is func for func in REWARD_SETS["gist"])


def test_callable_as_the_gist_did_without_prompts_and_with_short_golds() -> None:
    completions = [[{"content": "<answer>12</answer>"}]] * 2
    assert gist.int_reward_func(completions=completions) == [0.5, 0.5]
    assert gist.correctness_reward_func([[]], completions, ["12"]) == [2.0]


def test_what_made_the_gist_raise_is_read_as_text() -> None:
    completions = [None, [], [{"content": None}], "12", [{"content": [{"text": "12"}]}]]
    assert gist.int_reward_func(completions=completions) == [0.0, 0.0, 0.0, 0.5, 0.5]


def test_golds_lose_commas_and_dollar_signs_as_in_the_gists_data_set() -> None:
    assert gist.gist_gold("She has $<<2*725=1450>>1,450.\n#### $1,450") == "1450"


def test_the_defects_are_listed_as_sentences() -> None:
    assert len(gist.GIST_DEFECTS) >= 10
    assert all(defect.endswith(".") for defect in gist.GIST_DEFECTS)


HOSTILE = {
    "block changes": "</reasoning><answer>",
    "block changes over lines": "</reasoning>\n<answer>",
    "answers": "<answer>",
    "closings": "\n</answer>\n",
    "spaces": " ",
    "lines": "\n",
    "digits": "9",
    "reasoning closings and spaces": "</reasoning>  ",
}


@pytest.mark.parametrize("unit", HOSTILE.values(), ids=HOSTILE.keys())
def test_no_text_of_100_kb_takes_more_than_50_ms(unit: str) -> None:
    text = "<reasoning>" + (unit * 100_000)[:100_000]
    for func in REWARD_SETS["gist"]:
        best = float("inf")
        for _ in range(5):
            start = time.process_time()
            func(completions=[text], answer=["12"])
            best = min(best, time.process_time() - start)
        assert best < 0.05, func.__name__
