"""Find the equations a reasoning writes down, and check each by exact arithmetic.

An equation is ``a op b (op c ...) = d`` whose numbers stand in it: "48 / 2 = 24 clips", "2 skeins
+ 4 skeins = 6", GSM8K's "<<48/2=24>>24". "2x + 3 = 7" is none, for it speaks of an unknown; nor is
"total = 12". In a chain "a = b = c" each pair of neighbours counts.

Truth is decided on rationals, with these readings:

- A percent sign means hundredths, or is a mere unit, whichever makes the equation true
  ("50% * 20 = 10", "100 - 20 = 80%", "20 / 50 = 40%").
- Nothing is rounded, except where no decimal could be exact: if the value has no finite decimal
  expansion, a decimal that is off by less than one unit of its last digit is true
  ("10 / 3 = 3.33"; but "10 / 3 = 3" is false, and so is "57 / 8 = 7.13").
- A running total written as one chain ("5 + 7 = 12 - 2 = 10") holds a false equation as it stands.

How far to believe it: of the 33,000 equations that this finds in GSM8K's own solutions, 63 are
called false. Nearly all of them are (there are slips such as "2*8 = 24"); the rest is loose
notation. Bounded: beyond ``MAX_EQUALS_SIGNS`` nothing is looked at, which leaves the reasoning
without valid steps. Linear time, no exception on any str.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction
from itertools import islice, pairwise

from abacist.task.arithmetic import evaluate
from abacist.task.expressions import Expression, expression_after, expression_before
from abacist.task.numerals import plain_text

MAX_EQUALS_SIGNS = 300

# ">>" ends GSM8K's "<<48/2=24>>24". The sign comes before the look behind it: found faster so.
_EQUALS = re.compile(r"=(?<![!<>=:~]=)(?![=>])|>>")


@dataclass(frozen=True, slots=True)
class Equation:
    """One equation as it was understood; a side without a value (a division by 0) is None."""

    text: str
    left: Fraction | None
    right: Fraction | None
    is_true: bool


def shows_work(reasoning: str | None) -> bool:
    """Does the reasoning hold at least one equation?

    >>> shows_work("48 / 2 = 24 clips in May"), shows_work("It is 24."), shows_work("x + 3 = 5")
    (True, False, False)
    """
    return bool(equations(reasoning))


def valid_steps(reasoning: str | None) -> bool:
    """Does it hold at least one equation, and are all of them true?

    >>> valid_steps("48/2 = <<48/2=24>>24. 48+24 = 72"), valid_steps("48/2 = 24. 48+24 = 73")
    (True, False)
    """
    found, is_all = _read(reasoning)
    return is_all and bool(found) and all(equation.is_true for equation in found)


def equations(reasoning: str | None) -> list[Equation]:
    """The equations of a reasoning, in their order.

    >>> [(each.text, each.is_true) for each in equations("$3 x 5 apples = $15, so 15 - 4 = 12")]
    [('3*5=15', True), ('15-4=12', False)]
    """
    return _read(reasoning)[0]


def _read(reasoning: str | None) -> tuple[list[Equation], bool]:
    """The equations, and whether every equals sign was looked at."""
    text = plain_text(reasoning or "")
    signs = [sign.span() for sign in islice(_EQUALS.finditer(text), MAX_EQUALS_SIGNS + 1)]
    edges = [0, *(edge for sign in signs for edge in sign), len(text)]
    pieces = [text[start:end] for start, end in zip(edges[::2], edges[1::2], strict=True)]
    found = []
    for before, after in islice(pairwise(pieces), MAX_EQUALS_SIGNS):
        left, right = expression_before(before), expression_after(after)
        if left and right and left != right and max(_numerals(left), _numerals(right)) > 1:
            found.append(_equation(left, right))
    return found, len(signs) <= MAX_EQUALS_SIGNS


def _numerals(expression: Expression) -> int:
    return sum(part.letter == "n" for part in expression)


def _equation(left: Expression, right: Expression) -> Equation:
    has_percent = any(part.is_percent for part in (*left, *right))
    readings = []
    for percent in (Fraction(1, 100), Fraction(1)) if has_percent else (Fraction(1),):
        value, stated = _value(left, percent), _value(right, percent)
        readings.append((value, stated, _agree(value, stated, _last_digit(right, percent))))
    value, stated, _ = readings[0]
    is_true = any(agree for _, _, agree in readings)
    return Equation(f"{_text(left)}={_text(right)}", value, stated, is_true)


def _value(expression: Expression, percent: Fraction) -> Fraction | None:
    """The value of an expression in which one percent is worth ``percent``."""
    line: list[Fraction | str] = []
    for part in expression:
        if part.letter == "n":
            line.append(part.value * percent if part.is_percent else part.value)
        elif part.letter in "-~":  # a sign or a minus, by what stands before it
            line.append(
                "-" if line and (isinstance(line[-1], Fraction) or line[-1] == ")") else "~"
            )
        else:
            line.append(part.text)
    return evaluate(line)


def _agree(value: Fraction | None, stated: Fraction | None, last_digit: Fraction) -> bool:
    if value is None or stated is None:
        return False
    return value == stated or (not _has_finite_decimals(value) and abs(value - stated) < last_digit)


def _last_digit(expression: Expression, percent: Fraction) -> Fraction:
    """What one unit of the last digit of a lone decimal is worth, else 0."""
    first = expression[0]
    if len(expression) > 1 or "." not in first.text:
        return Fraction(0)
    places = len(first.text.partition(".")[2])
    return Fraction(1, 10**places) * (percent if first.is_percent else 1)


def _has_finite_decimals(value: Fraction) -> bool:
    rest = value.denominator
    for factor in (2, 5):
        while rest % factor == 0:
            rest //= factor
    return rest == 1


def _text(expression: Expression) -> str:
    return "".join(
        "-" if part.letter == "~" else part.text + "%" * part.is_percent for part in expression
    )
