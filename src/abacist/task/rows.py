"""From a row of a source to a :class:`Problem`, or the reason why it cannot be one.

Every row is checked before the first one is used: a gold answer that is missing, doubled or no
number would teach a model nothing, or worse, quietly; and a question that stands in the test split
as well would make its verdict worthless.
"""

from __future__ import annotations

import functools
import hashlib
import logging
import re
import unicodedata
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from decimal import Decimal
from types import MappingProxyType

from abacist.errors import DataError
from abacist.task.columns import (
    Columns,
    answer_in,
    choose_columns,
    has_column,
    is_empty,
    number_text,
    question_in,
    value_of,
)
from abacist.task.extras import shared_extras
from abacist.task.golds import (
    GOLD_MARK,
    DecimalMark,
    GoldError,
    doubt_about_mark,
    find_gold,
    settled,
)
from abacist.task.sources import Row, shown

MAX_QUESTION_CHARACTERS = 20_000  # GSM8K's longest has 985
_NUM_EXAMPLES = 3
_QUOTED = re.compile(r""": ('(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*")""")

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Problem:
    """One question with its gold answer.

    ``solution`` is the worked solution without its ``####`` line, calculator annotations and
    all ("" if the source has only golds); ``answer`` is the gold as it stands in the source,
    stripped, and with a decimal point; ``difficulty`` counts the non-empty lines of the solution,
    and is at least 1. ``columns`` are the columns of the source that rewards receive by name, as in
    TRL; two problems that differ only in them are equal.
    """

    problem_id: str
    question: str
    solution: str
    answer: str
    difficulty: int
    structure: str | None = None
    unseen_structure: bool | None = None
    columns: Mapping[str, object] = field(default_factory=dict, compare=False, repr=False)


class _BadRow(Exception):
    """Why a row cannot be used; the text completes "line 7 …"."""


def normalise_question(question: str) -> str:
    """The question without differences that do not count: case, spacing, Unicode composition.

    >>> normalise_question(" How  many\\neggs? ") == normalise_question("how many eggs?")
    True
    """
    return " ".join(unicodedata.normalize("NFC", question).casefold().split())


def problems_of(
    rows: Iterable[Row],
    source: str,
    question_column: str,
    answer_column: str,
    *,
    skip_bad_rows: bool,
    needs_gold: bool = True,
    reserved: Mapping[str, str] = MappingProxyType({}),
    decimal_mark: DecimalMark = "auto",
    keep_columns: bool = True,
) -> list[Problem]:
    """The rows as problems.

    ``reserved`` says where the questions stand that belong to the test split. Raises DataError for
    the first row that is bad, with the number of all, unless ``skip_bad_rows`` leaves such rows out
    and logs how many for which reason; if nothing is left; and if the golds leave open what their
    decimal mark is, unless ``decimal_mark`` decides. Without ``needs_gold`` an unusable gold
    becomes "". Without ``keep_columns`` the problems have no columns for rewards.
    """
    rows = list(rows)
    columns = choose_columns(rows, question_column, answer_column)
    if columns.note:
        _warn_once(f"{source}: {columns.note}.")
    if decimal_mark == "auto" and (
        doubt := doubt_about_mark(_written_golds(rows, columns), source, columns.answer)
    ):
        raise doubt
    problems: list[Problem] = []
    kept: list[Mapping[str, object]] = []
    places: dict[str, str] = {}  # problem id, and normalised question -> where it stands
    faults: list[tuple[Row, str]] = []
    for row in rows:
        place = f"{row.file}, {row.place}"
        try:
            problem = _problem_of(row, columns, decimal_mark, needs_gold=needs_gold)
            keys = ("id " + problem.problem_id, "question " + normalise_question(problem.question))
            if earlier := next((places[key] for key in keys if key in places), None):
                raise _BadRow(f"repeats the question or the id of {earlier}")
            if tested := reserved.get(keys[1]):
                raise _BadRow(f"is in the test split too: it has the question of {tested}")
        except _BadRow as fault:
            faults.append((row, str(fault)))
        else:
            problems.append(problem)
            kept.append(row.fields)
            places.update(dict.fromkeys(keys, place))
    if faults and not skip_bad_rows:
        more = f" {len(faults):,} rows are bad: {_counted(faults)}." if len(faults) > 1 else ""
        raise DataError(
            _sentence(*faults[0]) + more,
            "Mend the row, or leave such rows out with --skip_bad_rows.",
        )
    if not problems:
        raise DataError(
            f"{source}: no problems in it." + (f" {_sentence(*faults[0])}" if faults else ""),
            "Give rows with a question and a worked answer that ends in '#### number'.",
        )
    if faults:
        _warn_once(f"{source}: bad rows left out: {len(faults)}, {_counted(faults)}. The first: "
                   f"{_sentence(*faults[0])}")  # fmt: skip
    if not keep_columns:
        return problems
    extras, note = shared_extras(kept, answer_column=columns.answer, prompt_column=columns.question)
    if note:
        _warn_once(f"{source}: {note}.")
    return [replace(problem, columns=more) for problem, more in zip(problems, extras, strict=True)]


def questions_of(rows: Sequence[Row], question_column: str) -> Iterator[tuple[str, str]]:
    """The normalised question of each row that has one, and where it stands."""
    column = choose_columns(rows, question_column, "").question
    for row in rows:
        question = question_in(value_of(row.fields, column))
        if isinstance(question, str):
            yield normalise_question(question), f"{row.file}, {row.place}"


@functools.cache  # every split of a source reads its rows again
def _warn_once(message: str) -> None:
    _log.warning("%s", message)


def _sentence(row: Row, fault: str) -> str:
    return f"{row.file}, {row.place}: the row {fault}."


def _counted(faults: Sequence[tuple[Row, str]]) -> str:
    """How many rows for which reason, the most common first, each with examples."""
    by_reason: dict[str, list[str]] = defaultdict(list)
    for row, fault in faults:
        reason = re.split(r": | \(| of ", fault)[0]
        value = _QUOTED.search(fault)
        by_reason[reason].append(row.place + (f": {value[1]}" if value else ""))
    return ", ".join(
        f"{len(places):,} × “{reason}” ({', '.join(places[:_NUM_EXAMPLES])}"
        + ", …" * (len(places) > _NUM_EXAMPLES)
        + ")"
        for reason, places in sorted(by_reason.items(), key=lambda one: -len(one[1]))
    )


def _problem_of(
    row: Row, columns: Columns, decimal_mark: DecimalMark, *, needs_gold: bool
) -> Problem:
    if row.defect:
        raise _BadRow(row.defect)
    question = _text(row.fields, columns.question, "--question_column")
    if len(question) > MAX_QUESTION_CHARACTERS:
        raise _BadRow(
            f"has a question too long to be one: {len(question):,} characters, of which "
            f"{MAX_QUESTION_CHARACTERS:,} are allowed ({shown(question)})"
        )
    try:
        solution, gold = _solution_and_gold(row.fields, columns, decimal_mark)
    except (_BadRow, GoldError) as fault:
        if needs_gold:
            raise _BadRow(str(fault)) from None
        solution, gold = "", ""
    names = (row.fields.get(column) for column in ("problem_id", "id"))
    named = next((str(name) for name in names if not is_empty(name)), None)
    hashed = hashlib.sha256(normalise_question(question).encode()).hexdigest()[:16]
    structure, unseen = row.fields.get("structure"), row.fields.get("unseen_structure")
    structure = structure if isinstance(structure, str) else None
    for where, text in (("id", named), ("solution", solution), ("structure", structure)):
        _refuse_broken(text or "", f"in its {where}")
    for name in row.fields:
        _refuse_broken(str(name), "in a column's name")
    return Problem(
        problem_id=named or hashed,
        question=question,
        solution=solution,
        answer=gold,
        difficulty=max(1, sum(bool(line.strip()) for line in solution.split("\n"))),
        structure=structure,
        unseen_structure=unseen if isinstance(unseen, bool) else None,
    )


def _solution_and_gold(
    fields: Mapping[str, object], columns: Columns, decimal_mark: DecimalMark
) -> tuple[str, str]:
    text = _text(fields, columns.answer, "--answer_column")
    gold = find_gold(text, columns.answer)
    is_number = not isinstance(answer_in(value_of(fields, columns.answer)), str)  # its point is one
    answer = settled(gold, columns.answer, "point" if is_number else decimal_mark)
    return gold.solution or _worked_solution(fields, columns.solution), answer


def _worked_solution(fields: Mapping[str, object], column: str | None) -> str:
    worked = value_of(fields, column) if column else None
    return worked.partition(GOLD_MARK)[0].strip() if isinstance(worked, str) else ""


def _written_golds(rows: Sequence[Row], columns: Columns) -> Iterator[tuple[str, str]]:
    """The place and text of each gold that is text and does not stand behind ``####``."""
    for row in rows:
        value = answer_in(value_of(row.fields, columns.answer))
        if isinstance(value, str):
            with suppress(GoldError):
                gold = find_gold(value.strip())
                if not gold.is_marked and "\n" not in gold.text:
                    yield row.place, gold.text


def _text(fields: Mapping[str, object], column: str, flag: str) -> str:
    """The stripped text of a column; numbers are taken as their digits."""
    if not has_column(fields, column):
        has = ", ".join(map(str, list(fields)[:12])) or "none"
        raise _BadRow(f"has no column {column!r} (its columns: {has}; choose with {flag})")
    value = value_of(fields, column)
    value = question_in(value) if flag == "--question_column" else answer_in(value)
    if is_empty(value):
        raise _BadRow(f"has an empty {column!r}: {shown(value)}")
    text = value if isinstance(value, str) else number_text(value)
    if text is None:
        wanted = "a finite number" if isinstance(value, float | Decimal) else "text"
        raise _BadRow(f"has a {type(value).__name__} in {column!r}, not {wanted}: {shown(value)}")
    _refuse_broken(text, f"in {column!r}")
    return text.strip()


def _refuse_broken(text: str, where: str) -> None:
    """Raise _BadRow for half of a surrogate pair, which neither UTF-8 nor Parquet can hold."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise _BadRow(f"has broken Unicode {where} (a lone surrogate): {shown(text)}") from None
