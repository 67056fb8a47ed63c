"""What stands in brackets behind a number: the same again, or a reason not to read it."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from abacist.task.answers import read_answer
from abacist.task.gloss import in_numerals


@given(st.integers(-999, 999), st.integers(-999, 999))
def test_a_gloss_never_changes_what_is_read(number: int, other: int) -> None:
    for gloss in (str(other), f"{other} apples", f"{other} + 0", f"{number - other} more, {other}"):
        text = f"{number} ({gloss})"
        assert read_answer(text) in (number, None), text
    assert read_answer(f"{number} ({other})") == (number if number == other else None)
    assert read_answer(f"{number} ({number} or {other})") is None


@given(st.integers(0, 10**15 - 1))
def test_every_number_in_words_is_read_as_a_gloss(number: int) -> None:
    words = in_words(number)
    assert in_numerals(words) == str(number)
    assert read_answer(f"{number} ({words} apples)") == number
    assert read_answer(f"{number + 1} ({words})") is None


def in_words(number: int) -> str:
    """British English, without hyphens."""
    for scale, name in ((12, "trillion"), (9, "billion"), (6, "million"), (3, "thousand")):
        if number >= 10**scale:
            rest = number % 10**scale
            joint = " and " if 0 < rest < 100 else " "
            return (
                in_words(number // 10**scale)
                + f" {name}"
                + (joint + in_words(rest) if rest else "")
            )
    if number >= 100:
        rest = number % 100
        return f"{ONES[number // 100]} hundred" + (f" and {in_words(rest)}" if rest else "")
    if number >= 20:
        return TENS[number // 10] + (f" {ONES[number % 10]}" if number % 10 else "")
    return ONES[number]


_ONES = """zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen
fifteen sixteen seventeen eighteen nineteen"""
_TENS = "- - twenty thirty forty fifty sixty seventy eighty ninety"
ONES, TENS = _ONES.split(), _TENS.split()
