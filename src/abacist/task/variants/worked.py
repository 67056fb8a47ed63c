"""A worked solution as the program it is: GSM8K's calculator annotations, run again.

In ``48/2=<<48/2=24>>24 clips. 48+24=<<48+24=72>>72`` stand two steps, each an expression over
numerals and its result. A :class:`Step` knows where its numerals stand in the text and can be run
with other operands, in exact arithmetic. Nothing is evaluated but ``+ - * /`` and brackets.
"""

from __future__ import annotations

import ast
import operator
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction

from abacist.task.variants.story_numbers import NUMERAL, Numeral, numerals, places

MAX_EXPRESSION_CHARS = 200
MAX_SIZE_RATIO = 4  # new to old, or old to new

_OPERATIONS: dict[type[ast.operator], Callable[[Fraction, Fraction], Fraction]] = {
    ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv,
}  # fmt: skip
_ANNOTATION = re.compile(r"<<([^<>=]*)=([^<>=]*)>>")


@dataclass(frozen=True, slots=True)
class Step:
    """One annotation. ``values`` are those of every part of its expression, the whole last;
    ``result`` is what the annotation says it is, which may be rounded or wrong.
    """

    operands: tuple[Numeral, ...]
    tree: ast.expr
    result: Numeral
    values: tuple[Fraction, ...]

    def run(self, operands: Sequence[Fraction]) -> tuple[Fraction, ...]:
        """``values`` with these operands instead. Raises ZeroDivisionError."""
        return tuple(_values(self.tree, operands))


def read_steps(solution: str) -> list[Step]:
    """The steps of a solution in order; none if one annotation is not plain arithmetic.

    >>> steps = read_steps("48/2=<<48/2=24>>24 clips. 48+24=<<48+24=72>>72")
    >>> [str(step.values[-1]) for step in steps], str(steps[0].run([Fraction(50), Fraction(5)])[-1])
    (['24', '72'], '10')
    """
    steps = []
    for found in _ANNOTATION.finditer(solution):
        step = _read_step(found)
        if step is None:
            return []
        steps.append(step)
    is_all = solution.count("<<") == solution.count(">>") == len(steps)
    return steps if is_all else []


def _read_step(found: re.Match[str]) -> Step | None:
    operands, results = _numerals_of(found, 1), _numerals_of(found, 2)
    if len(found[1]) > MAX_EXPRESSION_CHARS or [each.text for each in results] != [found[2]]:
        return None
    pieces = NUMERAL.split(found[1])
    if not all(set(piece) <= set("+-*/() ") for piece in pieces) or len(pieces) <= len(operands):
        return None
    source = "".join(f"{piece}n{index}" for index, piece in enumerate(pieces[:-1])) + pieces[-1]
    try:
        tree = ast.parse(source.strip(), mode="eval").body
        values = tuple(_values(tree, [operand.value for operand in operands]))
    except (SyntaxError, ValueError, ZeroDivisionError, IndexError, RecursionError, MemoryError):
        return None
    return Step(operands, tree, results[0], values)


def _numerals_of(found: re.Match[str], group: int) -> tuple[Numeral, ...]:
    start = found.start(group)
    return tuple(
        replace(each, start=each.start + start, end=each.end + start)
        for each in numerals(found[group])
    )


def _values(node: ast.expr, operands: Sequence[Fraction]) -> Iterator[Fraction]:
    """The value of every part of an expression, the whole last."""
    match node:
        case ast.Name(id=name):
            yield operands[int(name[1:])]
        case ast.BinOp(left=left, op=sign, right=right) if type(sign) in _OPERATIONS:
            lefts, rights = list(_values(left, operands)), list(_values(right, operands))
            yield from (*lefts, *rights)
            yield _OPERATIONS[type(sign)](lefts[-1], rights[-1])
        case _:
            raise ValueError(f"no arithmetic: {node}")


def is_like(old: Fraction, new: Fraction) -> bool:
    """May a value of a story become another: same sign, whole or not, one or many, a share or
    more, and of similar size?

    >>> is_like(Fraction(12), Fraction(17)), is_like(Fraction(12), Fraction(25, 2))
    (True, False)
    """
    if old == new:
        return True
    return (
        old * new > 0
        and (old.denominator == 1) == (new.denominator == 1)
        and 1 not in (abs(old), abs(new))
        and (abs(old) < 1) == (abs(new) < 1)
        and 1 <= max(old / new, new / old) <= MAX_SIZE_RATIO
        and _is_as_short(old, new)
    )


def _is_as_short(old: Fraction, new: Fraction) -> bool:
    """Does the new value need no more decimals than the old one, or than cents?"""
    before, after = places(old), places(new)
    return before is None or (after is not None and after <= max(2, before))
