"""Data given in Python, problems, dicts, a ``datasets.Dataset`` or a table of pandas, as text.

A run is resumed, evaluated and checked by others long after the process that began it has ended.
So data that stands in no file is written as JSON Lines, and read from that text as a file would be:
what a run keeps of it is what the run was trained on.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any

from abacist.errors import DataError
from abacist.task.golds import GOLD_MARK
from abacist.task.plain import plain, shortest
from abacist.task.rows import Problem
from abacist.task.sources import Row, kinds_of, shown

NAME = "the given data"
_WHAT_TO_GIVE = (
    "Give a list of problems or of dicts such as {'question': …, 'answer': …}, a "
    "datasets.Dataset, a table of pandas, or the name of a data set."
)

GivenData = Iterable[Problem | Mapping[str, Any]]


def lines_of(data: GivenData) -> list[str]:
    """One line of JSON for each row of ``data``.

    Raises DataError for what is no table, for a row that is none, and for a value that JSON has no
    form for, with the row and the column.

    >>> lines_of([{"question": "1 + 1?", "answer": 2}])
    ['{"question": "1 + 1?", "answer": 2}']
    """
    kinds = kinds_of(data)
    if hasattr(data, "iloc") and hasattr(data, "dtypes") and hasattr(data, "to_dict"):
        kinds = {str(column): str(kind).lower() for column, kind in data.dtypes.items()}
        data = data.to_dict("records")
    if isinstance(data, Mapping):
        if data and all(hasattr(part, "column_names") for part in data.values()):
            names = ", ".join(map(repr, data))
            raise DataError(
                f"The data has several splits: {names}.", "Give one of them, as data['train']."
            )
        raise DataError("The data is one dict, and rows are wanted.", _WHAT_TO_GIVE)
    if not isinstance(data, Iterable):
        raise DataError(f"The data is a {type(data).__name__}.", _WHAT_TO_GIVE)
    return [_line(row, number, kinds) for number, row in enumerate(data, 1)]


def rows_in(lines: Iterable[str]) -> list[Row]:
    """The rows in what :func:`lines_of` gave."""
    return [Row(NAME, f"row {number}", json.loads(line)) for number, line in enumerate(lines, 1)]


def _line(row: object, number: int, kinds: Mapping[str, str]) -> str:
    if isinstance(row, Problem):
        row = _fields_of(row)
    if not isinstance(row, Mapping):
        raise DataError(
            f"The data: row {number} is a {type(row).__name__}, not a dict: {shown(row)}.",
            _WHAT_TO_GIVE,
        )
    kept = {}
    for name, value in shortest(row, kinds).items():
        try:
            kept[str(name)] = plain(value)
            json.dumps(kept[str(name)])
        except (TypeError, ValueError, RecursionError) as error:
            raise DataError(
                f"The data: row {number} has a {type(value).__name__} in {shown(name)}, which "
                f"cannot be kept: {error}.",
                "Give numbers, texts, lists and dicts; leave other columns out.",
            ) from error
    return json.dumps(kept)


def _fields_of(problem: Problem) -> dict[str, Any]:
    """A row from which the same problem is read again."""
    structure = {
        name: value
        for name in ("structure", "unseen_structure")
        if (value := getattr(problem, name)) is not None
    }
    gold = f"{problem.solution}\n{GOLD_MARK} {problem.answer}" if problem.answer else ""
    own = {"problem_id": problem.problem_id, "question": problem.question, "answer": gold}
    return {**problem.columns, **own, **structure}
