"""From a row of a source to a :class:`Problem`, or the reason why it cannot be one.

Every row is checked before the first one is used: a gold answer that is missing, doubled or no
number would teach a model nothing, or worse, quietly; and a question that stands in the test split
as well would make its verdict worthless.
"""

from __future__ import annotations

import functools
import hashlib
import logging
import math
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

from abacist.errors import DataError
from abacist.task.answers import read_answer
from abacist.task.sources import Row

GOLD_MARK = "####"
MAX_QUESTION_CHARACTERS = 20_000  # GSM8K's longest has 985
_BARE_GOLD = re.compile(r"[-+−]?\$?\d[\d,]*(\.\d+)?(/\d+)?%?")

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
) -> list[Problem]:
    """The rows as problems.

    ``reserved`` says where the questions stand that belong to the test split. Raises DataError for
    the first row that is bad, unless ``skip_bad_rows`` leaves such rows out and logs how many for
    which reason; and if nothing is left. Without ``needs_gold`` an unusable gold becomes "".
    """
    problems: list[Problem] = []
    places: dict[str, str] = {}  # problem id, and normalised question -> where it stands
    faults: list[str] = []
    reasons: Counter[str] = Counter()
    for row in rows:
        place = f"{row.file}, {row.place}"
        try:
            problem = _problem_of(row, question_column, answer_column, needs_gold=needs_gold)
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
    if faults:
        counts = ", ".join(f"{count} × “{reason}”" for reason, count in reasons.most_common())
        _warn_once(f"{source}: left out {len(faults)} bad rows: {counts}. The first: {faults[0]}")
    return problems


@functools.cache  # every split of a source reads its rows again
def _warn_once(message: str) -> None:
    _log.warning("%s", message)


def _problem_of(row: Row, question_column: str, answer_column: str, *, needs_gold: bool) -> Problem:
    if row.defect:
        raise _BadRow(row.defect)
    question = _text(row.fields, question_column, "--question_column")
    if len(question) > MAX_QUESTION_CHARACTERS:
        raise _BadRow(
            f"has a question too long to be one: {len(question):,} characters, of which "
            f"{MAX_QUESTION_CHARACTERS:,} are allowed"
        )
    try:
        solution, gold = _solution_and_gold(row.fields, answer_column)
    except _BadRow:
        if needs_gold:
            raise
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
    )


def _solution_and_gold(fields: Mapping[str, object], answer_column: str) -> tuple[str, str]:
    solution, mark, gold = _text(fields, answer_column, "--answer_column").partition(GOLD_MARK)
    if not mark:
        if not _BARE_GOLD.fullmatch(solution):
            raise _BadRow(f"has no gold: no {GOLD_MARK} in {answer_column!r}, nor a bare number")
        solution, gold = "", solution
    solution, gold = solution.rstrip(), gold.strip()
    if GOLD_MARK in gold:
        raise _BadRow(f"has {GOLD_MARK} twice in {answer_column!r}")
    if "\n" in gold or read_answer(gold) is None:
        raise _BadRow(f"has a gold that is no number: {gold[:40]!r}")
    return solution, gold


def _text(fields: Mapping[str, object], column: str, flag: str) -> str:
    """The stripped text of a column; numbers are taken as their digits."""
    if column not in fields:
        has = ", ".join(map(str, list(fields)[:12])) or "none"
        raise _BadRow(f"has no column {column!r} (its columns: {has}; choose with {flag})")
    value = fields[column]
    if isinstance(value, float) and math.isfinite(value):
        value = f"{value:.15g}"
    elif isinstance(value, int) and not isinstance(value, bool):
        value = str(value)
    if value is None or (isinstance(value, str) and not value.strip()):
        raise _BadRow(f"has an empty {column!r}")
    if not isinstance(value, str):
        raise _BadRow(f"has a {type(value).__name__} in {column!r}, not text")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise _BadRow(f"has broken Unicode in {column!r} (a lone surrogate)") from None
    return value.strip()
