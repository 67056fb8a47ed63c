"""How a gold is read: by the rule that reads replies, whatever column it stands in.

Behind GSM8K's ``####`` a comma in a proper group of three marks thousands. In a column of bare
golds it may be a decimal mark instead, and no row shows which; where the column as a whole
contradicts the reading by point, the person is asked (``--decimal_mark``).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Literal

from abacist.task.answers import same_answer

GOLD_MARK = "####"
SHOWN_CHARACTERS = 40
DecimalMark = Literal["auto", "point", "comma"]

# The number of a short gold: digits with points and commas between them.
_NUMERAL = re.compile(r"\d[\d.,]*\d|\d")
_BOXED = re.compile(r"\\boxed\s*\{")


class GoldError(ValueError):
    """Why a gold cannot be used; the text completes "the row …"."""


def shown(value: object) -> str:
    """A value as an error shows it: quoted, escaped and cut.

    >>> shown("twelve or so"), shown("1" * 50)
    ("'twelve or so'", "'1111111111111111111111111111111111111111'…")
    """
    if isinstance(value, str) and len(value) > SHOWN_CHARACTERS:
        return repr(value[:SHOWN_CHARACTERS]) + "…"
    return repr(value) if isinstance(value, str) else repr(value)[:SHOWN_CHARACTERS]


def solution_and_gold(text: str, column: str, mark: DecimalMark = "auto") -> tuple[str, str]:
    """The worked solution ("" if there is none) and the gold of a cell.

    The gold is what stands behind ``####``, else a cell of one line, else the last ``\\boxed{}``
    of a solution. Raises GoldError, with the value, for anything that is no number.

    >>> solution_and_gold("3 * 6 = 18\\n#### 18", "answer")
    ('3 * 6 = 18', '18')
    >>> solution_and_gold("$1,200", "answer"), solution_and_gold("12,5 kg", "answer", "comma")
    (('', '$1,200'), ('', '12.5 kg'))
    >>> solution_and_gold("So it is 3 * 6.\\nHence \\\\boxed{18}.", "solution")
    ('So it is 3 * 6.\\nHence \\\\boxed{18}.', '18')
    """
    solution, marked, gold = text.partition(GOLD_MARK)
    solution = solution.rstrip()
    if marked:
        if GOLD_MARK in gold:
            raise GoldError(f"has {GOLD_MARK} twice in {column!r}: {shown(text[-60:])}")
        gold = gold.strip()
    elif "\n" in solution or _BOXED.search(solution):
        boxed = _last_boxed(solution)
        if boxed is None:
            raise GoldError(
                f"has no gold: no {GOLD_MARK} and no \\boxed{{}} in {column!r}: "
                f"{shown(solution[-SHOWN_CHARACTERS:])}"
            )
        gold = boxed
    else:
        solution, gold = "", in_points(solution) if mark == "comma" else solution
    if "\n" in gold or not same_answer(gold, gold):
        if not marked:
            raise GoldError(
                f"has no gold: no {GOLD_MARK} in {column!r}, nor a number: {shown(gold)}"
            )
        raise GoldError(f"has a gold that is no number: {shown(gold)}")
    return solution, gold


def in_points(gold: str) -> str:
    """A gold written with a decimal comma, written with a point and without separators.

    >>> in_points("1.234,50 €"), in_points("3,5"), in_points("12.000")
    ('1234.50 €', '3.5', '12000')
    """
    return _NUMERAL.sub(lambda found: found[0].replace(".", "").replace(",", "."), gold)


def contradiction(golds: Sequence[tuple[str, str]]) -> list[tuple[str, str]]:
    """Bare golds, as (place, text), that speak against the point as decimal mark; at most three.

    Either one that no reading by point allows (``3,5``, ``1.234,50``), or several that all have
    exactly three digits behind one point (``3.500`` beside ``12.000``), as thousands would.

    >>> contradiction([("row 1", "1,200"), ("row 2", "3,5")])
    [('row 2', '3,5')]
    >>> contradiction([("row 1", "3.500"), ("row 2", "12.000"), ("row 3", "7")])
    [('row 1', '3.500'), ('row 2', '12.000')]
    >>> contradiction([("row 1", "3.500"), ("row 2", "0.125")])
    []
    """
    against, thousands = [], []
    has_fraction = False
    for place, gold in golds:
        numeral = _NUMERAL.search(gold)
        if numeral is None:
            continue
        text = numeral[0]
        if re.fullmatch(r"(\d+|\d{1,3}(\.\d{3})+),\d+", text) and not _is_grouped(text, ","):
            against.append((place, gold))
        elif _is_grouped(text, "."):
            thousands.append((place, gold))
        elif "." in text:
            has_fraction = True
    if against:
        return against[:3]
    several = len(thousands) > 1 or any(text.count(".") > 1 for _, text in thousands)
    return thousands[:3] if several and not has_fraction else []


def _is_grouped(text: str, separator: str) -> bool:
    """Whether ``text`` is a whole number in proper groups of three.

    >>> _is_grouped("1,200", ","), _is_grouped("0,125", ","), _is_grouped("12,50", ",")
    (True, False, False)
    """
    mark = re.escape(separator)
    return re.fullmatch(rf"[1-9]\d{{0,2}}({mark}\d{{3}})+", text) is not None


def _last_boxed(text: str) -> str | None:
    """What the last ``\\boxed{}`` holds, braces within it balanced; None without one."""
    found = list(_BOXED.finditer(text))
    if not found:
        return None
    start, depth = found[-1].end(), 1
    for at in range(start, len(text)):
        depth += (text[at] == "{") - (text[at] == "}")
        if depth == 0:
            return text[start:at].strip()
    return None
