"""A gloss: what stands in brackets behind a number and says it again, in other words.

"18 (eighteen)", "18 (3 boxes of 6)", "18 (20 - 2)". A careful grader reads 18, provided that the
gloss does not name another number: "18 (19)", "18 (17 to 19)" and "18 (3 boxes of 7)" leave a doubt
about what the writer means. So a gloss has to come to the same number: as one quantity, as an
equation that ends in it, as an expression, or as the product or the sum of its numbers. This is the
one place where the answer rule calculates, and it can only take an answer away: what is read is
always the number before the brackets.

Brackets that hold no number are decoration, as they are everywhere. Linear time.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from decimal import Decimal
from fractions import Fraction

from abacist.task.answer_letters import letters_of
from abacist.task.numerals import NUMBER_WORDS, Number, as_number
from abacist.task.steps import equations

MAX_NUMBERS = 10  # of a gloss
MAX_DIGITS = 40  # of each, where it is calculated with

_SCALES = {"thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12}
_OTHER_WORDS = {"half": "0.5", "twice": "2 *", "double": "2 *", "triple": "3 *", "dozen": "12"}

_SIMPLE = "|".join(NUMBER_WORDS)
_SCALE = "|".join(("hundred", *_SCALES))
_SIMPLE_WORD = re.compile(rf"\b(?:{_SIMPLE})\b", re.IGNORECASE)
_IN_WORDS = re.compile(
    rf"\b(?:{_SIMPLE}|an?(?= (?:{_SCALE})))\b(?:[ -](?:and )?(?:{_SIMPLE}|{_SCALE})\b)*",
    re.IGNORECASE,
)
_OTHER_WORD = re.compile(rf"\b(?:a )?({'|'.join(_OTHER_WORDS)})\b", re.IGNORECASE)
_COUNTED_DOZENS = re.compile(r"(?<=[0-9]) ?dozens?\b", re.IGNORECASE)

# Behind a word, a unit or closing decoration; with at most one pair of brackets inside.
_BRACKETS = re.compile(
    r"""
    (?: (?<= [\w%$"'`}\])!.] ) | (?<= \*\* ) )
    (?P<space> [^\S\n]* )
    (?: \( (?P<round> (?: [^()\n] | \([^()\n]*\) )*+ ) \) | \[ (?P<square> [^\[\]\n]*+ ) \] )
    """,
    re.VERBOSE,
)
_ENDS_IN_OPERATOR = re.compile(r"(?:\b|(?<=[0-9]))(?:x|times|of|by|plus|minus|over|and)\Z", re.I)
_NUMERAL = re.compile(r"[0-9]+(?:[.,]+[0-9]+)*")
_OPERATION = re.compile(r"(?:[-_+P/|÷*^xn]|a[wW]?)\**[iIdDfF]")
_TWO_IN_A_ROW = re.compile("[iIdDfF]{2}")
_SPACE_IN_NUMERAL = re.compile("(?<=[0-9]) (?=[0-9])")
_CLAUSE = re.compile(r"[;\n]|[.!](?:\s|\Z)")


def without_glosses(text: str) -> tuple[str, list[str]]:
    """A plain text without the glosses behind its numbers, and these.

    >>> without_glosses("18 (3 boxes of 6)"), without_glosses("4 * (1 + 2) = 12 (in all)")
    (('18 ', ['3 boxes of 6']), ('4 * (1 + 2) = 12 (in all)', []))
    """
    pieces, glosses, end = [], [], 0
    for found in _BRACKETS.finditer(text):
        content = found["round"] or found["square"] or ""
        # "5(7)" is a product, and "(apples)" is decoration.
        is_gloss = found["space"] if _NUMERAL.search(content) else _IN_WORDS.search(content)
        line = text.rfind("\n", 0, found.start()) + 1
        is_behind_number = _NUMERAL.search(text, line, found.start()) is not None
        if (
            is_gloss
            and is_behind_number
            and not _ENDS_IN_OPERATOR.search(text[max(end, found.start() - 6) : found.start()])
        ):
            pieces.append(text[end : found.start()])
            glosses.append(content)
            end = found.end()
    return " ".join([*pieces, text[end:]]), glosses


def comes_to(gloss: str, answer: Number, read: Callable[[str], Number | None]) -> bool:
    """Does the gloss come to the answer? ``read`` is the rule for a text without a gloss."""
    clauses = _CLAUSE.split(in_numerals(gloss).strip(" ="))
    return all(_comes_to(clause, answer, read) for clause in clauses)


def _comes_to(clause: str, answer: Number, read: Callable[[str], Number | None]) -> bool:
    tokens = letters_of(clause)
    if tokens is None:  # a hedge, a negation
        return False
    letters = tokens[0]
    values = [value for letter, value in zip(*tokens, strict=True) if letter in "iIdDfF"]
    if not values or read(clause) == answer:
        return True
    if "=" in clause:
        steps = clause.split(", ")
        return all("=" in step for step in steps) and read(steps[-1]) == answer
    numbers = [as_number(value) for value in values if value.adjusted() < MAX_DIGITS]
    if not 1 < len(numbers) == len(values) <= MAX_NUMBERS or isinstance(answer, Decimal):
        return False
    if _TWO_IN_A_ROW.search(letters):
        return False
    if _OPERATION.search(letters) or "%" in clause:
        return _equals(clause, answer)
    is_hedge = "z" in letters and not re.search(r"\bthan\b", clause)
    return not is_hedge and answer in (sum(numbers), math.prod(numbers))


def _equals(expression: str, answer: Fraction) -> bool:
    """Is the whole text one expression, and the answer its value?"""
    equation = f"{_SPACE_IN_NUMERAL.sub('', expression)} = {answer}"
    found = equations(equation)
    is_whole = len(found) == 1 and _count(found[0].text) == _count(equation)
    return is_whole and found[0].is_true


def _count(text: str) -> int:
    return len(_NUMERAL.findall(text))


def in_numerals(text: str) -> str:
    """The text with its numbers in words as numerals.

    >>> in_numerals("one hundred and twenty-five, twice six, six and seven, 2 dozen, a thousand")
    '125, 2 * 6, 6 and 7, 2 * 12, 1000'
    """
    text = _COUNTED_DOZENS.sub(" * 12", _IN_WORDS.sub(_as_numeral, text))
    return _OTHER_WORD.sub(lambda found: _OTHER_WORDS[found[1].lower()], text)


def _as_numeral(found: re.Match[str]) -> str:
    value = _cardinal(re.findall("[a-z]+", found[0].lower()))
    if value is not None:
        return str(value)
    return _SIMPLE_WORD.sub(lambda word: str(NUMBER_WORDS[word[0].lower()]), found[0])


def _cardinal(words: Sequence[str]) -> int | None:
    """The number that the words say together; None for "six and seven" or "one eight"."""
    total, below, least_scale = 0, 0, 10**15
    for word in words:
        if word in _SCALES:
            if below == 0 or _SCALES[word] >= least_scale:
                return None
            least_scale = _SCALES[word]
            total, below = total + below * least_scale, 0
        elif word == "hundred":
            if not 0 < below < 100:
                return None
            below *= 100
        elif word != "and":
            number = 1 if word in ("a", "an") else NUMBER_WORDS[word]
            follows_tens = 0 < number < 10 and below % 100 >= 20 and below % 10 == 0
            if below % 100 and not follows_tens:
                return None
            below += number
    return total + below
