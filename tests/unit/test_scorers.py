"""lm-eval's two GSM8K filters, verdict for verdict, on any text and in linear time."""

from __future__ import annotations

import re
import time
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from abacist.proof.scorers import lm_eval_flexible, lm_eval_strict, until_stop

Scorer = Callable[[str, str], bool]
SCORERS = [lm_eval_strict, lm_eval_flexible]
any_text = st.text(st.characters(), max_size=80)
number_soup = st.text("0123456789.,$-# \n<>/aé٣", max_size=60)


@pytest.mark.parametrize(
    ("text", "gold", "strict", "flexible"),
    [
        ("6 * 3 = 18\n#### 18", "18", True, True),
        ("#### 18 and #### 19", "18", True, False),  # the first match, and the last
        ("<answer>\n18\n</answer>", "18", False, True),
        ("so it is $1,450.", "1450", False, True),
        ("#### 1,450", "1,450", True, True),
        ("#### $18", "18", False, True),  # strict knows no currency sign
        ("18.00", "18", False, False),
        ("#### 18.", "18", True, True),
        ("#### 18..", "18", False, False),
        ("it is 18 ...", "18", False, False),  # "..." is taken for the answer
        ("12 or 13", "13", False, True),
        ("#### -7", "-7", True, True),
        ("-$7", "-7", False, True),  # the sign stands before the currency sign
        ("7 - 3", "3", False, True),
        ("no number here", "18", False, False),
        ("", "18", False, False),
        ("٣", "3", False, False),  # digits are ASCII
        ("18", "so 6 * 3 = 18\n#### 18", False, True),  # a gold with its worked solution
    ],
)
def test_known_verdicts(text: str, gold: str, strict: bool, flexible: bool) -> None:
    assert lm_eval_strict(text, gold) is strict
    assert lm_eval_flexible(text, gold) is flexible


def described(text: str, gold: str, pattern: str, which: int) -> bool:
    """The harness's rule as its documentation words it, without regard to speed."""

    def cleaned(answer: str) -> str:
        for ignored in (",", r"\$", r"(?s).*#### ", r"\.$"):
            answer = re.sub(ignored, "", answer)
        return answer.lower()

    found = [m.group().removeprefix("#### ").strip() for m in re.finditer(pattern, text)]
    return cleaned(found[which] if found else "[invalid]") == cleaned(gold)


@settings(deadline=None)
@given(number_soup | any_text, number_soup)
def test_every_verdict_is_the_described_one(text: str, gold: str) -> None:
    assert lm_eval_strict(text, gold) is described(text, gold, r"#### (\-?[0-9\.\,]+)", 0)
    flexible = r"(-?[$0-9.,]{2,})|(-?[0-9]+)"
    assert lm_eval_flexible(text, gold) is described(text, gold, flexible, -1)


@pytest.mark.parametrize("scorer", SCORERS)
@settings(deadline=None)
@given(text=any_text, gold=any_text)
def test_no_text_raises(scorer: Scorer, text: str, gold: str) -> None:
    assert scorer(text + "\ud800\x00", gold) in (True, False)


@pytest.mark.parametrize("scorer", SCORERS)
@pytest.mark.parametrize("unit", ["-", "1", "#### ", "#", "$.", "-1,", "x", "#### -", "\ud800\x00"])
def test_a_hundred_thousand_characters_take_at_most_fifty_milliseconds(
    scorer: Scorer, unit: str
) -> None:
    text = unit * (100_000 // len(unit))

    def seconds() -> float:
        start = time.process_time()
        scorer(text, "18")
        return time.process_time() - start

    assert min(seconds() for _ in range(5)) <= 0.05


def test_a_text_that_goes_on_to_the_next_question_is_cut_before_it() -> None:
    text = "6*3 = 18\n#### 18\n\nQuestion: Ada has 3 eggs.\nAnswer: #### 3"
    assert until_stop(text) == "6*3 = 18\n#### 18\n\n"
    assert not lm_eval_flexible(text, "18") and lm_eval_flexible(until_stop(text), "18")
    assert until_stop("18</s>19<|im_end|>") == until_stop("18<|im_end|></s>") == "18"
    assert until_stop("no stop, question: none") == "no stop, question: none"
