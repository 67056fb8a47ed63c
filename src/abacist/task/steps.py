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

An expression is found in prose by writing one letter per token, as in ``answer_letters``, so that
what it may look like is a pattern:

- ``n`` a numeral;
- ``+ * / ^ ( )`` themselves; ``-`` a minus sign; ``~`` one that touches only what follows it;
- ``t`` an operator in words: "times", "plus", "divided by", "x", "of" after a percentage;
- ``w`` a word that may be a unit; ``s`` a word that is none;
- ``v`` an unknown, or what must not be taken for a number: "2y", "A4", "7:50";
- ``;`` anything else, which ends the expression.

Where an expression is not certain ("x + 3", "28 / 1/5", "3 000") there is none. Its value is exact:
Dijkstra's shunting yard on rationals, without ``eval`` or recursion. Both are bounded: at most
``MAX_EXPRESSION_CHARS`` are looked at, and numbers of more than ``MAX_BITS`` bits have no value.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import islice, pairwise
from typing import NamedTuple

from abacist.task.numerals import plain_text, read_numeral

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


MAX_EXPRESSION_CHARS = 200


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


class Part(NamedTuple):
    """A token; ``text`` is the numeral as written, or the operator that is meant."""

    letter: str
    text: str = ""
    value: Fraction = Fraction(0)
    is_percent: bool = False


Expression = Sequence[Part]

_TOKEN = re.compile(
    r"""
      (?P<unclear> (?<= /\  ) [0-9]+/[0-9]+ )  # "28 / 1/5": divided by a fifth, or by 1, then by 5?
    | (?P<clock> [0-9]+:[0-9]+ )
    | (?P<mixed> [0-9]{1,9}\ [0-9]{1,9}/[0-9]{1,9} (?![0-9/.,]) )
    | (?P<numeral> \.?[0-9]+ (?: [.,]+[0-9]+ )* )
    | (?P<times> [xX] (?= \ * [$£€¥]? \ * \(? \.?[0-9] ) | (?: times | multiplied\ by )\b
        | (?<= %\  ) of\b )
    | (?P<plus> plus\b ) | (?P<minus> minus\b ) | (?P<over> divided\ by\b )
    | (?P<word> [^\W\d_]{2,}\^[23](?![0-9]) | [^\W\d_]+ (?: ['/-][^\W\d_]+ )* | /\ ?[^\W\d_]{2,} )
    | (?P<power> (?<= [0-9)] )\*\*(?= [0-9(] ) )
    | (?P<skipped> [^\S\n]+ | \*\*+ | << | [$¢£¤¥₠-₿"'`_{}] | \\[A-Za-z]+ | \\.
        | (?<= [0-9] )-(?= [^\W\d_]{2} ) )
    | (?P<operator> [-+*/÷^()%\[\]] )
    | (?P<root> √ )
    """,
    re.VERBOSE,
)
_WORD_OPERATORS = {"times": "*", "plus": "+", "minus": "-", "over": "/"}
_SAME = {"÷": "/", "[": "(", "]": ")"}
# Words that end the unit after a number, for something else is being said.
_NO_UNITS = _words(
    """and so then but or if when since because therefore thus which that this it he she they we i
    is are was were has have had makes gives get gets total left will to from with"""
)
_UNITS_OF_ONE_LETTER = frozenset("amgslhdL")  # after a space: "5 m", but "5m" may be 5 times m

# An expression as far as it goes, read from its end (before "=") and from its start (after it).
_BACKWARDS = re.compile(
    r"""
    [w)]{0,8} n (?: ~(?=[-+*/^t(]) )? \(*
    (?: [-+*/^t~] [w)]{0,8} n (?: ~(?=[-+*/^t(]) )? \(* )*
    """,
    re.VERBOSE,
)
_FORWARDS = re.compile(r"[-~]? \(* ~? n [w)]{0,8} (?: [-+*/^t~] \(* ~? n [w)]{0,8} )*", re.VERBOSE)


def expression_before(text: str) -> Expression | None:
    """The expression that ends where ``text`` ends, or None if there is none to be sure of."""
    text = text.rstrip().rpartition("\n")[2]
    is_cut = len(text) > MAX_EXPRESSION_CHARS
    parts = _parts(text[-MAX_EXPRESSION_CHARS:])
    letters = "".join(part.letter for part in reversed(parts))
    found = _BACKWARDS.match(letters)
    if found is None or (is_cut and found.end() == len(letters)):
        return None
    start = len(parts) - found.end()
    preceding = letters[found.end() : found.end() + 2]  # the two letters before it, nearest first
    if preceding[:1] == "~":
        start -= 1  # a sign
    is_bullet = preceding in ("-", "*", "-;", "*;")
    is_dangling = preceding[:1] in tuple("+-*/^nv") and not is_bullet
    is_unclear = is_dangling or preceding in ("~v", "tv", ")n")
    is_lone = found[0].count("n") == 1 and (found[0] != "n" or preceding[:1] not in ("", ";"))
    if is_unclear or is_lone:  # "2 days = 7 + 2" is about days
        return None
    return _without_units(parts[start:], opening=True)


def expression_after(text: str) -> Expression | None:
    """The expression that begins where ``text`` begins, or None if there is none to be sure of."""
    text = text.lstrip().partition("\n")[0]
    is_cut = len(text) > MAX_EXPRESSION_CHARS
    parts = _parts(text[:MAX_EXPRESSION_CHARS])
    letters = "".join(part.letter for part in parts)
    found = _FORWARDS.match(letters)
    if found is None or (is_cut and found.end() == len(letters)):
        return None
    following = letters[found.end() : found.end() + 2]
    is_dash = following in ("-w", "-s", "-;", "*", "*;")
    if following[:1] in tuple("+-*/^~nv") and not is_dash:
        return None
    return _without_units(parts[: found.end()], opening=False)


def _without_units(parts: Sequence[Part], opening: bool) -> Expression | None:
    """The numerals, operators and brackets, without a bracket around the whole equation."""
    kept = [part for part in parts if part.letter != "w"]
    surplus = sum((part.letter == "(") - (part.letter == ")") for part in kept)
    bracket, edge = ("(", 0) if opening else (")", -1)
    for _ in range(surplus if opening else -surplus):
        if kept[edge].letter != bracket:
            return None
        del kept[edge]
    return kept if surplus == 0 or (surplus > 0) == opening else None


def _parts(text: str) -> list[Part]:
    text = text.strip()
    parts: list[Part] = []
    position = end_of_last = 0
    while position < len(text):
        found = _TOKEN.match(text, position)
        start, position = position, found.end() if found else position + 1
        group, token = (found.lastgroup, found[0]) if found else ("other", "")
        if group == "skipped":
            continue
        last = parts[-1].letter if parts and start == end_of_last else ""  # of what it touches
        end_of_last = position
        if group == "numeral":
            value = read_numeral(token)
            letter = ";" if value is None else "v" if last in ("w", "s", "v") else "n"
            parts.append(Part(letter, token, value or Fraction(0)))
        elif group == "mixed":
            whole, numerator, denominator = map(int, re.split("[ /]", token))
            proper = numerator < denominator
            value = whole + Fraction(numerator, denominator) if proper else Fraction(0)
            parts.append(Part("n" if proper else ";", token, value))
        elif group == "word":
            letter = _letter_of_word(token)
            if last == "n" and len(token) == 1:
                parts[-1] = Part("v")  # "2y"
            else:
                parts.append(Part(letter))
        elif token == "%" and last == "n":
            parts[-1] = parts[-1]._replace(is_percent=True)
        elif group == "operator" and token != "%":
            letter = _SAME.get(token, token)
            if letter == "(" and last in ("n", ")"):
                parts.append(Part("*", "*"))
            if letter == "-" and not last and re.match(r"[\d.$(]", text[position : position + 1]):
                letter = "~"
            parts.append(Part(letter, letter))
        elif group in _WORD_OPERATORS:
            parts.append(Part("t", _WORD_OPERATORS[group]))
        else:
            letter = {"power": "^", "root": "v", "clock": "v"}.get(group or "", ";")
            parts.append(Part(letter, letter))
    return parts


def _letter_of_word(word: str) -> str:
    if word.lower() in _NO_UNITS:
        return "s"
    return "v" if len(word) == 1 and word not in _UNITS_OF_ONE_LETTER else "w"


MAX_EXPONENT = 64
MAX_BITS = 4_096  # of a numerator or denominator on the way

_OPERATIONS: dict[str, Callable[..., Fraction]] = {
    "+": operator.add, "-": operator.sub, "*": operator.mul, "/": operator.truediv,
    "^": operator.pow,
}  # fmt: skip
_PRECEDENCE = {"+": 1, "-": 1, "*": 2, "/": 2, "~": 3, "^": 4}


def evaluate(expression: Sequence[Fraction | str]) -> Fraction | None:
    """The value of numbers, operators ``+ - * / ^``, signs ``~`` and brackets, in reading order.

    None where there is no value: a malformed expression, a division by zero, a power that is not
    a small integer, or a number of more than ``MAX_BITS`` bits.

    >>> half = Fraction(1, 2)
    >>> evaluate(["~", half, "+", Fraction(3), "*", "(", half, "+", half, ")"])
    Fraction(5, 2)
    >>> evaluate([half, "/", Fraction(0)]) is evaluate([half, "+"]) is None
    True
    """
    values: list[Fraction] = []
    waiting: list[str] = []  # operators and opening brackets
    wants_number = True
    for part in expression:
        if isinstance(part, Fraction) or part in "~(":
            if not wants_number:
                return None
            if isinstance(part, Fraction):
                values.append(part)
                wants_number = False
            else:
                waiting.append(part)
            continue
        if wants_number:
            return None
        binds = _PRECEDENCE.get(part, 0)  # a closing bracket: 0, all up to its opening one is done
        while waiting and waiting[-1] != "(" and _PRECEDENCE[waiting[-1]] + (part != "^") > binds:
            if not _apply(waiting.pop(), values):
                return None
        if part == ")":
            if not waiting:
                return None
            waiting.pop()
        else:
            waiting.append(part)
            wants_number = True
    while waiting:
        if waiting[-1] == "(" or wants_number or not _apply(waiting.pop(), values):
            return None
    return values[0] if len(values) == 1 else None


def _apply(sign: str, values: list[Fraction]) -> bool:
    """Replace the last one or two values by their result; False where there is none."""
    right = values.pop()
    if sign == "~":
        values.append(-right)
        return True
    left = values.pop()
    if sign == "/" and right == 0:
        return False
    if sign == "^" and (
        right.denominator != 1 or abs(right) > MAX_EXPONENT or (left == 0 and right <= 0)
    ):
        return False
    result = _OPERATIONS[sign](left, right)
    values.append(result)
    return max(result.numerator.bit_length(), result.denominator.bit_length()) <= MAX_BITS
