"""Read a number from an answer, and say whether two answers are the same.

The specification is a *careful human grader*: somebody who looks at the text of an answer, ignores
decoration that does not change the value ("$1,450.00", "**12** apples", "5 + 7 = 12"), and gives no
credit where the writer has not committed to one number ("12 or 13", "about 12", "5 + 7", "12-15").
One rule serves reward and evaluation. Nothing is evaluated, comparison is exact arithmetic on
rationals, numerals of any length included, and any text whatever is read in bounded time without an
exception.

How a text is read: ``answer_letters`` writes each of its tokens as one letter, so that the grammar
stands here in one place, as patterns over those letters. The text falls into statements (lines,
sentences); a statement that holds a number must be one quantity, or working that ends in one
("... = quantity"), and all statements must agree.

Where the grader had to choose:

- "2.5 million" is 2,500,000, all that a reader can mean; "12k" is too short to be sure of.
- "1 1/2" is a mixed number, 3/2. "24/2" is a fraction and read by its value, as "3/4" is;
  "24 / 2" and "24 ÷ 2" are divisions that were not carried out.
- "about 12", "at least 12", "12+" name a neighbourhood, not a number: no answer.
- A percent sign, "dozen" and "quarters" are units, because GSM8K's golds count in them.
- Numbers in words ("twelve", "12 and a half") are not read, and spoil a text that has digits too.
- "(12)" is 12, not an accountant's -12. "- 12" is -12, but "— 12" and "Total - 12" may hold a dash:
  no answer.
- "12 345" is 12,345, for the group is complete; "1 23" and "12 3456" are two numbers. "12 345/678"
  can be read in two ways: no answer.
- "18 (3 boxes of 6)" says 18 twice: what stands in brackets behind a number is a gloss (``gloss``),
  and must say the same. "18 (19)", "18 (or 19)" and "18 (not 17)" leave a doubt: no answer.
- In "5 + 7 = 13" the writer says 13: the working is not checked here (``steps`` does that).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from decimal import Decimal
from fractions import Fraction
from typing import Any

from abacist.errors import UsageError
from abacist.task.answer_letters import letters_of
from abacist.task.gloss import comes_to, without_glosses
from abacist.task.numerals import Number, as_number, is_integer_numeral, plain_text, scaled
from abacist.task.plain import plain

__all__ = ["Number", "gold_of", "gold_text", "is_integer_numeral", "read_answer", "same_answer"]

Answer = str | int | float | Decimal | Fraction | None

# Beside the digits: nobody who was asked for one number writes more.
MAX_ANSWER_CHARS = 1_000
MAX_EXPONENT = 10**9
_LONG_NUMERALS = re.compile(r"\d+(?:[,\u0020\u00a0\u2007\u2009\u202f]\d+)*")
_DASH_BEFORE_NUMBER = re.compile(r"^\s*[—―]\s", re.MULTILINE)

# The grammar, over the letters that are listed at the top of answer_letters.
_LABEL = r"(?: [-_](?=W) )? [wWcxvzmpo,*]*"  # words before a number, perhaps after a bullet
_OPERAND = r"c? [-_+P]? [iIdDfF] [wWM]*"
_OPERATOR = r"(?: \*+ | \** (?: [-_+P/|÷^on] | x(?=[iIdDfF]) | a[wW]? ) \** )"

_SILENT = re.compile(r"[-_wWcxvzmpo,*/|]*")  # a statement without a number
_WORKING = re.compile(
    rf"{_LABEL} | {_LABEL} (?<![vx]) {_OPERAND} (?: {_OPERATOR} {_OPERAND} )+ \**", re.VERBOSE
)
_QUANTITY = re.compile(
    rf"""
    (?! .* (?: [vx]\*[iIdDfF] | [iIdDfF]\*[vx] ) )  # not "12*x"
    {_LABEL} (?<![zm])                            # not "about 12", not "May 12"
    (?P<sign> (?<![a-zA-Z])[-+_P] | [_P] (?=[idf]) | n (?=[IDF]) )?
    (?: (?=[IDF]) | (?<![wWxvzmpo])(?=[id]) | (?<![wWcxvzmpo])(?=f) )  # not glued to a word
    (?P<number>
        (?P<mixed> [iI] I / i )
      | (?P<ratio> [iI] / i )
      | (?P<power> [iIdDfF] [*x] [iI] \^ (?P<down> [-_] )? [+P]? [iI] )
      | [iIdDfF]
    )
    (?P<magnitudes> M{{0,3}} )
    (?! [pmvx] | [wW]?o?m )                       # not "2 thirds", "12k", "12th of May"
    (?: -w | [/|][wW] )?                          # "12-year-old", "12 / hour"
    (?: [wWcxvzmpo,*] | [/|](?=[wW]) )*
    """,
    re.VERBOSE,
)


def same_answer(answer: Answer, gold: Answer) -> bool:
    """Is ``answer`` the number that ``gold`` says? ``gold`` may be a whole GSM8K solution.

    Either may be a number itself; a float is the shortest decimal that it is written as. False when
    either is not a number: None, nan, inf and words equal nothing, not even themselves. Raises
    UsageError for what is neither text nor number, such as a list.

    >>> same_answer("**$1,450.00**", "1450"), same_answer("12 or 13", "12"), same_answer(None, "1")
    (True, False, False)
    >>> same_answer("0.1", 0.1), same_answer(Fraction(1, 2), "0.5"), same_answer("18", 18)
    (True, True, True)
    """
    value = _value_of(answer)
    if value is None:
        return False
    return value == _value_of(gold_text(gold) if isinstance(gold, str) else gold)


def _value_of(answer: Answer) -> Number | None:
    """The number that an answer is or, as text, commits to."""
    if isinstance(answer, str):
        return read_answer(answer)
    value = answer if isinstance(answer, Decimal) else plain(answer)
    if value is None or isinstance(value, bool):
        return None
    if isinstance(value, Fraction):
        return value
    if isinstance(value, int | float):
        value = Decimal(repr(value)) if isinstance(value, float) else Decimal(value)
    if not isinstance(value, Decimal):
        raise UsageError(
            f"same_answer() was given a {type(answer).__name__}", "Give texts or numbers."
        )
    return as_number(value) if value.is_finite() else None


def gold_of(value: Any) -> str | None:
    """A gold as a data set holds it, text or a number, as text; None where there is none."""
    return None if value is None else str(value)


def gold_text(solution: str) -> str:
    """The gold answer of a GSM8K record: what stands after the last ``####``, or all of it.

    >>> gold_text("48 / 2 = <<48/2=24>>24 clips\\n#### 24"), gold_text(" 24 ")
    ('24', '24')
    """
    return solution.rpartition("####")[2].strip()


def read_answer(text: str) -> Number | None:
    """The one number that ``text`` commits to, exactly, or None where it commits to none.

    A Fraction; a Decimal, to be compared and no more, where it has more than 1,000 digits.

    >>> [str(read_answer(text)) for text in ("x = 12", "3/4 cup", "-$1,450.50", "5 + 7", "3:30")]
    ['12', '3/4', '-2901/2', 'None', 'None']
    >>> read_answer("18 (3 boxes of 6)") == 18, read_answer("18 (or 19)") is None
    (True, True)
    """
    text = text.strip()
    if len(text) > MAX_ANSWER_CHARS and len(_LONG_NUMERALS.sub("", text)) > MAX_ANSWER_CHARS:
        return None
    if _DASH_BEFORE_NUMBER.search(text):
        return None
    text = plain_text(text)
    answer = _read_statements(text)
    if answer is None and ("(" in text or "[" in text):
        text, glosses = without_glosses(text)
        answer = _read_statements(text) if glosses else None
        if answer is None or not all(comes_to(each, answer, _read_statements) for each in glosses):
            return None
    return answer


def _read_statements(text: str) -> Number | None:
    """The one number of a plain text without glosses."""
    tokens = letters_of(text)
    if tokens is None:
        return None
    letters, values = tokens
    answer: Number | None = None
    for statement in re.finditer("[^;]+", letters):
        if _SILENT.fullmatch(statement[0]):
            continue
        said = _read_statement(statement[0], values[statement.start() : statement.end()])
        if said is None or (answer is not None and said != answer):
            return None
        answer = said
    return answer


def _read_statement(letters: str, values: Sequence[Decimal]) -> Number | None:
    """The number of "quantity", or of "working = ... = quantity"."""
    start = letters.rfind("=") + 1
    answer = _read_quantity(letters[start:], values[start:])
    if answer is None:
        return None
    start = 0
    for working in letters.split("=")[:-1]:
        end = start + len(working)
        if not (
            _WORKING.fullmatch(working) or _read_quantity(working, values[start:end]) == answer
        ):
            return None
        start = end + 1
    return answer


def _read_quantity(letters: str, values: Sequence[Decimal]) -> Number | None:
    """The one number among words and units that leave its value alone."""
    quantity = _QUANTITY.fullmatch(letters)
    if quantity is None:
        return None
    parts = values[quantity.start("number") : quantity.end("number")]
    magnitudes = values[quantity.start("magnitudes") : quantity.end("magnitudes")]
    power = sum(magnitude.adjusted() for magnitude in magnitudes)
    if quantity["power"]:
        base, exponent = parts[2], as_number(parts[-1])
        if base != 10 or exponent > MAX_EXPONENT:
            return None
        power += int(-exponent if quantity["down"] else exponent)
    value: Number | None = as_number(scaled(parts[0], power))
    if quantity["mixed"] or quantity["ratio"]:
        value = _with_fraction(parts, power)
    if value is not None and quantity["sign"] and quantity["sign"] in "-_n":
        return -value if isinstance(value, Fraction) else value.copy_negate()
    return value


def _with_fraction(parts: Sequence[Decimal], power: int) -> Fraction | None:
    """The value of "3/4" or "1 1/2" times ten to the power; None if it has none or is too long."""
    numbers = [number for number in map(as_number, parts) if isinstance(number, Fraction)]
    if len(numbers) < len(parts):
        return None
    *whole, numerator, _, denominator = numbers
    if denominator == 0 or (whole and not numerator < denominator):
        return None
    return (sum(whole) + numerator / denominator) * Fraction(10) ** power
