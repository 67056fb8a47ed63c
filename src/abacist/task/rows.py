"""From a row of a source to a :class:`Problem`, or the reason why it cannot be one.

Every row is checked before the first one is used: a gold answer that is missing, doubled or no
number would teach a model nothing, or worse, quietly; and a question that stands in the test split
as well would make its verdict worthless.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import logging
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType

from abacist.errors import DataError
from abacist.task import columns
from abacist.task.golds import (
    GOLD_MARK,
    DecimalMark,
    GoldError,
    contradiction,
    shown,
    solution_and_gold,
)
from abacist.task.sources import Row

MAX_QUESTION_CHARACTERS = 20_000  # GSM8K's longest has 985
# Columns whose meaning is fixed: no column of a data set is handed to rewards under these names.
_TAKEN = frozenset(
    ("prompt", "prompts", "completion", "completions", "completion_ids", "answer", "problem_id",
     "difficulty", "id", "structure", "unseen_structure", "trainer_state", "images", "tools",
     # TRL takes any one of these, in the order of a set, to tell a chat from a text.
     "messages", "chosen", "rejected")
)  # fmt: skip
# A column is known by its first rows; a later one may hold more, which rewards then miss.
_ROWS_LOOKED_AT = 100

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Problem:
    """One question with its gold answer.

    ``solution`` is the worked solution without its ``####`` line, calculator annotations and
    all ("" if the source has only golds); ``answer`` is the gold as it stands in the source,
    stripped; ``difficulty`` counts the non-empty lines of the solution, and is at least 1.
    """

    problem_id: str
    question: str
    solution: str
    answer: str
    difficulty: int
    structure: str | None = None
    unseen_structure: bool | None = None
    columns: Mapping[str, object] = field(default_factory=dict, compare=False, repr=False)
    """The other columns of its row, which rewards receive by name, as in TRL."""


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
) -> list[Problem]:
    """The rows as problems.

    ``reserved`` says where the questions stand that belong to the test split. Raises DataError for
    the first row that is bad, unless ``skip_bad_rows`` leaves such rows out and logs how many for
    which reason; and if nothing is left. Without ``needs_gold`` an unusable gold becomes "".
    Golds that speak against the point as decimal mark are refused unless ``decimal_mark`` decides.
    """
    rows = list(rows)
    asked = question_column, answer_column
    question_column, answer_column = columns_read(rows, *asked)
    if decimal_mark == "auto":
        _refuse_unclear_golds(rows, source, answer_column)
    problems: list[Problem] = []
    places: dict[str, str] = {}  # problem id, and normalised question -> where it stands
    faults: list[str] = []
    reasons: Counter[str] = Counter()
    for row in rows:
        place = f"{row.file}, {row.place}"
        try:
            problem = _problem_of(
                row, question_column, answer_column, decimal_mark, needs_gold=needs_gold
            )
            keys = ("id " + problem.problem_id, "question " + normalise_question(problem.question))
            if earlier := next((places[key] for key in keys if key in places), None):
                raise _BadRow(f"repeats the question or the id of {earlier}")
            if tested := reserved.get(keys[1]):
                raise _BadRow(f"is in the test split too: it has the question of {tested}")
        except _BadRow as fault:
            faults.append(f"{place}: the row {fault}.")
            reasons[re.split(r": | \(| of ", str(fault))[0]] += 1
            if not skip_bad_rows:
                raise DataError(
                    faults[0], "Mend the row, or leave such rows out with --skip_bad_rows."
                ) from None
        else:
            problems.append(problem)
            places.update(dict.fromkeys(keys, place))
    if not problems:
        raise DataError(
            f"{source}: no problems in it." + (f" {faults[0]}" if faults else ""),
            "Give rows with a question and a worked answer that ends in '#### number'.",
        )
    if (question_column, answer_column) != asked:
        _warn_once(
            f"{source}: questions are taken from the column {question_column!r}, answers from "
            f"{answer_column!r} (--question_column and --answer_column choose others)"
        )
    if faults:
        counts = ", ".join(f"{count} × “{reason}”" for reason, count in reasons.most_common())
        _warn_once(f"{source}: left out {len(faults)} bad rows: {counts}. The first: {faults[0]}")
    return problems


@functools.cache  # every split of a source reads its rows again
def _warn_once(message: str) -> None:
    _log.warning("%s", message)


def columns_read(rows: Sequence[Row], question_column: str, answer_column: str) -> tuple[str, str]:
    """The columns of the question and the gold, by what the first rows hold."""
    names = itertools.chain.from_iterable(row.fields for row in rows[:_ROWS_LOOKED_AT])
    return columns.choose(names, question_column, answer_column)


def _refuse_unclear_golds(rows: Iterable[Row], source: str, column: str) -> None:
    """Raise DataError where a column of bare golds may be written with a decimal comma."""
    bare = [
        (row.place, value.strip())
        for row in rows
        if isinstance(value := row.fields.get(column), str)
        if GOLD_MARK not in value and "\n" not in value.strip()
    ]
    if against := contradiction(bare):
        places = ", ".join(f"{shown(gold)} ({place})" for place, gold in against)
        raise DataError(
            f"{source}: the column {column!r} may be written with a decimal comma: {places}.",
            "Say which it is: --decimal_mark comma, or --decimal_mark point.",
        )


def _problem_of(
    row: Row,
    question_column: str,
    answer_column: str,
    decimal_mark: DecimalMark,
    *,
    needs_gold: bool,
) -> Problem:
    if row.defect:
        raise _BadRow(row.defect)
    question = _text(row.fields, question_column, "--question_column", "user")
    if len(question) > MAX_QUESTION_CHARACTERS:
        raise _BadRow(
            f"has a question too long to be one: {len(question):,} characters, of which "
            f"{MAX_QUESTION_CHARACTERS:,} are allowed"
        )
    try:
        text = _text(row.fields, answer_column, "--answer_column", "assistant")
        typed = not isinstance(row.fields[answer_column], str)  # its point is one
        solution, gold = solution_and_gold(text, answer_column, "point" if typed else decimal_mark)
    except (_BadRow, GoldError) as fault:
        if needs_gold:
            raise _BadRow(str(fault)) from None
        solution, gold = "", ""
    names = (row.fields.get(column) for column in ("problem_id", "id"))
    named = next((str(name) for name in names if name not in (None, "")), None)
    hashed = hashlib.sha256(normalise_question(question).encode()).hexdigest()[:16]
    structure, unseen = row.fields.get("structure"), row.fields.get("unseen_structure")
    return Problem(
        problem_id=named or hashed,
        question=question,
        solution=solution,
        answer=gold,
        difficulty=max(1, sum(bool(line.strip()) for line in solution.split("\n"))),
        structure=structure if isinstance(structure, str) else None,
        unseen_structure=unseen if isinstance(unseen, bool) else None,
        columns={
            name: value
            for name, value in row.fields.items()
            if name not in _TAKEN and name not in (question_column, answer_column)
        },
    )


def _text(fields: Mapping[str, object], column: str, flag: str, role: str) -> str:
    """The stripped text of a column: numbers as their digits, of a chat the turn of ``role``."""
    if column not in fields:
        has = ", ".join(map(str, list(fields)[:12])) or "none"
        raise _BadRow(f"has no column {column!r} (its columns: {has}; choose with {flag})")
    value = fields[column]
    if columns.is_empty(value):
        raise _BadRow(f"has an empty {column!r}")
    text = value if isinstance(value, str) else columns.number_text(value)
    if text is None:
        text = columns.turn_of(value, role)
    if text is None:
        raise _BadRow(f"has a {type(value).__name__} in {column!r}, not text: {shown(value)}")
    if not text.strip():
        raise _BadRow(f"has an empty {column!r}")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise _BadRow(f"has broken Unicode in {column!r} (a lone surrogate)") from None
    return text.strip()
