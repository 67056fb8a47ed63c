"""The exact value of a flat arithmetic expression, in bounded time.

The caller has found the numerals, operators and brackets; here is only precedence. No ``eval``, no
recursion: Dijkstra's shunting yard on rationals, which gives up when numbers grow absurdly long.
"""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction

MAX_EXPONENT = 64
MAX_BITS = 4_096  # of a numerator or denominator on the way

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


def _apply(operator: str, values: list[Fraction]) -> bool:
    """Replace the last one or two values by their result; False where there is none."""
    right = values.pop()
    if operator == "~":
        values.append(-right)
        return True
    left = values.pop()
    match operator:
        case "+":
            result = left + right
        case "-":
            result = left - right
        case "*":
            result = left * right
        case "/":
            if right == 0:
                return False
            result = left / right
        case _:
            if right.denominator != 1 or abs(right) > MAX_EXPONENT or (left == 0 and right <= 0):
                return False
            result = left ** int(right)
    values.append(result)
    return max(result.numerator.bit_length(), result.denominator.bit_length()) <= MAX_BITS
