"""The gold of a row: where it stands, and which number it says.

One rule for every gold: it is what a careful grader reads in it, exactly as in a reply
(``answers``), so units, currency, a percent sign and ``\\boxed{}`` are decoration. It stands behind
``####``, else in the one ``<answer>`` block, else in the last ``\\boxed{}`` (if there are several,
they must agree), else it is the whole cell, which must then be a single line.

**The decimal mark.** A point is the decimal mark and a comma groups thousands, unless
``--decimal_mark comma`` says otherwise. Golds behind ``####`` are read so without a question, as
GSM8K means them. Other columns may come from a place where it is the other way round, and ``1.500``
does not tell. Where the golds of a column contradict the reading by point, or show nothing but
points where thousands would have them, :func:`doubt_about_mark` says so, and a person decides.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from typing import Literal, NamedTuple, get_args

from abacist.errors import DataError
from abacist.task.answers import Number, read_answer
from abacist.task.boxes import boxes
from abacist.task.reply import parse_reply
from abacist.task.sources import shown

GOLD_MARK = "####"
DecimalMark = Literal["auto", "point", "comma"]
DECIMAL_MARKS: tuple[str, ...] = get_args(DecimalMark)

_NUMERAL = re.compile(r"\d(?:[\d.,]*\d)?")
_COMMA_NUMERAL = re.compile(r"(?:\d+|[1-9]\d{0,2}(?:\.\d{3})+)(?:,\d+)?")


class GoldError(ValueError):
    """Why a gold cannot be used; the text completes "the row …"."""


class Gold(NamedTuple):
    """A gold as it stands in the source, and the worked solution before it ("" if none)."""

    solution: str
    text: str
    is_marked: bool  # behind ####


def find_gold(text: str, column: str = "answer") -> Gold:
    """The gold in a stripped text, not yet read. Raises GoldError where there are several.

    >>> find_gold("2+2=4\\n#### 4"), find_gold("So it is \\\\boxed{4}.").text
    (Gold(solution='2+2=4', text='4', is_marked=True), '4')
    """
    solution, mark, gold = text.partition(GOLD_MARK)
    if mark:
        if GOLD_MARK in gold:
            raise GoldError(f"has {GOLD_MARK} twice in {column!r}: {shown(text[-60:])}")
        gold = gold.strip()
        if "\n" in gold and read_answer(gold) is not None:
            # A sentence behind it that says the same: "#### 110\nThe answer is: 110".
            gold = gold.partition("\n")[0].strip()
        return Gold(solution.rstrip(), gold, True)
    reply = parse_reply(text)
    if reply.answer is not None:
        return Gold((reply.reasoning or "").strip(), reply.answer.strip(), False)
    boxed = boxes(text)
    if not boxed:
        return Gold("", text, False)
    if len(set(map(read_answer, boxed))) > 1:
        raise GoldError(f"has several \\boxed{{}} that do not agree in {column!r}: {shown(boxed)}")
    is_alone = text.strip("$. ") == rf"\boxed{{{boxed[-1]}}}"
    return Gold("" if is_alone else text, boxed[-1], False)


def settled(gold: Gold, column: str, mark: DecimalMark = "auto") -> str:
    """The text of a gold, written with a point as decimal mark.

    Behind ``####`` a comma in a proper group stays a thousands mark, whatever ``mark`` is. Raises
    GoldError, with the value, for what says no number.

    >>> settled(Gold("", "3,5 kg", False), "a", "comma"), settled(Gold("", "1,450", True), "a")
    ('3.5 kg', '1,450')
    """
    text: str | None = gold.text
    keeps_groups = gold.is_marked and "," in gold.text and read_answer(gold.text) is not None
    if mark == "comma" and not keeps_groups:
        text = with_point(gold.text) or (gold.text if gold.is_marked else None)
    if text is not None and "\n" not in text and read_answer(text) is not None:
        return text
    if gold.is_marked:
        raise GoldError(f"has a gold that is no number: {shown(gold.text)} (column {column!r})")
    by_comma = " with a decimal comma" if mark == "comma" else ""
    raise GoldError(
        f"has no gold: {shown(gold.text)} (column {column!r}) is no number{by_comma}, and has no "
        f"{GOLD_MARK}"
    )


def with_point(gold: str) -> str | None:
    """A gold in which the comma is the decimal mark, written with a point; None if it is not so.

    >>> with_point("1.234,50 €"), with_point("12.000"), with_point("3.5"), with_point("1,234.5")
    ('1234.50 €', '12000', None, None)
    """
    if any(not _COMMA_NUMERAL.fullmatch(numeral) for numeral in _NUMERAL.findall(gold)):
        return None
    return _NUMERAL.sub(lambda found: found[0].replace(".", "").replace(",", "."), gold)


def doubt_about_mark(
    golds: Iterable[tuple[str, str]], source: str, column: str
) -> DataError | None:
    """The question which decimal mark a column has, if its golds leave that open.

    ``golds`` are pairs of a place ("line 7") and a text that does not stand behind ``####``. The
    error names the column, some rows and the flag that decides. None where a point is the mark.
    """
    comma: list[tuple[str, str]] = []  # a number with a decimal comma only: "3,5", "1.234,50"
    either: list[tuple[str, str]] = []  # a decimal, or thousands: "3.500"
    grouped: list[tuple[str, str]] = []  # thousands, or a decimal with a comma: "1,450"
    point: list[tuple[str, str]] = []  # a number with a decimal point only: "0.75", "1,234.5"
    for place, gold in golds:
        if "," not in gold and "." not in gold:
            continue
        by_point, by_comma = read_answer(gold), _value_with_comma(gold)
        # "(3,5)" is a pair.
        if by_comma is not None and by_point is None and not re.search(r"[(\[{]", gold):
            comma.append((place, gold))
        elif by_comma is None and by_point is not None:
            point.append((place, gold))
        elif by_comma != by_point:
            (either if "." in gold else grouped).append((place, gold))
    if not comma and (point or not either):
        return None
    rows = [*comma[:2], *either[:2], *grouped[:1], *point[:1]]
    listed = ", ".join(f"{place}: {shown(gold)}" for place, gold in rows)
    gold = rows[0][1]
    return DataError(
        f"{source}: the golds in {column!r} do not say what their decimal mark is: {listed}.",
        f"With --decimal_mark comma {shown(gold)} is {_plain(_value_with_comma(gold))}; with "
        f"--decimal_mark point it is {_plain(read_answer(gold))}.",
    )


def _value_with_comma(gold: str) -> Number | None:
    text = with_point(gold)
    return None if text is None else read_answer(text)


def _plain(value: Number | None) -> str:
    """A number as a hint shows it."""
    if value is None:
        return "no number"
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    return f"{number:.12g}" if math.isfinite(number) else "a number of many digits"
