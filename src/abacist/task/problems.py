"""What is asked: a :class:`Problem`, and how a data set becomes a checked list of them.

A source is the word ``generated``, a Hub id such as ``openai/gsm8k``, a folder with one file
per split, or a single file. Every row is checked before the first one is used: a gold answer
that is missing, doubled or no number would teach a model nothing, or worse, quietly.

Splits. ``train``, ``selection`` and ``heldout`` are all cut from the source's *train* rows, each
row by the hash of its own id: the cut does not depend on row order, and a row stays where it is
when others are added. ``test`` is the source's own test file, and no other split reads it.
GSM8K's 7,473 train rows become 6,585 to train on, 284 for selection and 604 held out.
"""

from __future__ import annotations

import hashlib
import logging
import math
import os
import re
import unicodedata
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from abacist.errors import DataError, UsageError
from abacist.task.answers import read_answer
from abacist.task.sources import Row, read_file, read_folder, read_hub

GOLD_MARK = "####"
SPLITS = ("train", "selection", "heldout", "test", "all")
HELDOUT_FRACTION = 0.08
SELECTION_FRACTION = 0.034
_EDGES = (HELDOUT_FRACTION, HELDOUT_FRACTION + SELECTION_FRACTION)
GENERATED_COUNTS = {"train": 4000, "selection": 250, "heldout": 600}
_DEFAULT_CONFIGS = {"openai/gsm8k": "main", "gsm8k": "main"}

_HUB_ID = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")
_FILE_SUFFIX = re.compile(r".*\.(jsonl?|csv|parquet|txt|tsv|gz|zip)", re.IGNORECASE)
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


def load_problems(
    source: str | os.PathLike[str],
    *,
    split: str = "train",
    limit: int | None = None,
    seed: int = 0,
    question_column: str = "question",
    answer_column: str = "answer",
    dataset_config: str | None = None,
    train_split: str = "train",
    test_split: str = "test",
    skip_bad_rows: bool = False,
) -> list[Problem]:
    """The checked problems of one split, in source order, or ``limit`` of them drawn by ``seed``.

    ``split`` is ``train``, ``selection``, ``heldout``, ``test`` or ``all`` (every train row,
    uncut: for few-shot examples, or a test set that is a file of its own). ``train_split`` and
    ``test_split`` are the source's own names for its parts, as in TRL. A larger ``limit`` with
    the same seed begins with the smaller one's problems. The answer column holds a worked
    solution that ends in ``#### gold``, or a bare number. A column ``problem_id`` or ``id``
    names the problems; without one the name is a hash of the question.

    Raises DataError, naming file, line and reason, for a source that cannot be found or read,
    a row that is bad (``skip_bad_rows`` leaves those out and logs how many), or a split in
    which nothing is left; UsageError for an unknown split or a limit below 1.
    """
    if split not in SPLITS:
        raise UsageError(f"There is no split {split!r}.", f"Choose one of {', '.join(SPLITS)}.")
    if limit is not None and limit < 1:
        raise UsageError(f"A limit of {limit} problems leaves nothing.", "Give 1 or more, or none.")
    name = os.fspath(source)
    if name == "generated":
        rows = _generated_rows(split, limit, seed)
        return _checked(rows, name, "question", "answer", skip_bad_rows=False)
    part = test_split if split == "test" else train_split
    rows = _rows_of(name, part, dataset_config, wants_test=split == "test")
    problems = _checked(rows, name, question_column, answer_column, skip_bad_rows=skip_bad_rows)
    if split not in ("test", "all"):
        problems = _cut(problems, split, name)
    return problems if limit is None else draw(problems, seed=seed, purpose="limit")[:limit]


def draw(problems: Iterable[Problem], *, seed: int, purpose: str) -> list[Problem]:
    """``problems`` shuffled by ``seed``, whatever order they came in.

    Different ``purpose`` texts shuffle independently. Cut to the length you want: a longer cut
    begins with the shorter one.
    """
    salt = f"{purpose} {seed}"
    return sorted(problems, key=lambda problem: _fraction(salt, problem.problem_id))


def _generated_rows(split: str, limit: int | None, seed: int) -> Iterator[Row]:
    from abacist.task.wordproblems import generate

    if split not in GENERATED_COUNTS:
        raise DataError(
            f"Generated problems have no split {split!r}.",
            f"Choose one of {', '.join(GENERATED_COUNTS)}.",
        )
    records = generate(limit or GENERATED_COUNTS[split], seed=seed, split=split)
    return (Row("generated", f"row {number}", row) for number, row in enumerate(records, 1))


def _rows_of(name: str, part: str, config: str | None, *, wants_test: bool) -> Iterator[Row]:
    path = Path(os.path.expanduser(name))
    if name and path.is_dir():
        return read_folder(path, part, config)
    if name and path.exists():
        if wants_test:
            raise DataError(
                f"{name}: a single file has train rows only, no test split.",
                "Give a folder with train and test files, or read this file whole with the "
                "split 'all'.",
            )
        return read_file(path)
    if _HUB_ID.fullmatch(name) and not _FILE_SUFFIX.fullmatch(name):
        return read_hub(name, part, config or _DEFAULT_CONFIGS.get(name))
    raise DataError(
        f"{name}: no such file or folder, seen from {Path.cwd()}.",
        "Check the path, or use --dataset_name openai/gsm8k or --dataset_name generated.",
    )


def _checked(
    rows: Iterable[Row],
    source: str,
    question_column: str,
    answer_column: str,
    *,
    skip_bad_rows: bool,
) -> list[Problem]:
    problems: list[Problem] = []
    places: dict[str, str] = {}  # problem id, and normalised question -> where it stands
    faults: list[str] = []
    for row in rows:
        place = f"{row.file}, {row.place}"
        try:
            problem = _problem_of(row, question_column, answer_column)
            keys = ("id " + problem.problem_id, "question " + normalise_question(problem.question))
            if earlier := next((places[key] for key in keys if key in places), None):
                raise _BadRow(f"repeats the question or the id of {earlier}")
        except _BadRow as fault:
            faults.append(f"{place}: the row {fault}.")
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
        _log.warning("%s: left out %d bad rows; the first: %s", source, len(faults), faults[0])
    return problems


def _problem_of(row: Row, question_column: str, answer_column: str) -> Problem:
    if row.defect:
        raise _BadRow(row.defect)
    question = _text(row.fields, question_column, "--question_column")
    solution, mark, gold = _text(row.fields, answer_column, "--answer_column").partition(GOLD_MARK)
    if not mark:
        if not _BARE_GOLD.fullmatch(solution):
            raise _BadRow(f"has no gold: no {GOLD_MARK} in {answer_column!r}, nor a bare number")
        solution, gold = "", solution
    solution, gold = solution.rstrip(), gold.strip()
    if GOLD_MARK in gold:
        raise _BadRow(f"has {GOLD_MARK} twice in {answer_column!r}")
    if "\n" in gold or read_answer(gold) is None:
        raise _BadRow(f"has a gold that is no number: {gold[:40]!r}")
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


def _fraction(salt: str, key: str) -> float:
    """A number in [0, 1) that depends on the texts alone: the same on every machine and day."""
    digest = hashlib.sha256(f"{salt} {key}".encode("utf-8", "surrogatepass")).digest()
    return int.from_bytes(digest[:8], "big") / 2**64


def _cut(problems: list[Problem], split: str, source: str) -> list[Problem]:
    """The rows of ``split``. One that the thresholds leave empty takes the nearest row instead."""
    if len(problems) < 3:
        raise DataError(
            f"{source}: {len(problems)} rows cannot be cut into train, selection and heldout.",
            "Give at least 3 rows, and some hundreds for figures that mean anything.",
        )
    place = {p.problem_id: _fraction("split", p.problem_id) for p in problems}
    ranked = sorted(place, key=lambda problem_id: (place[problem_id], problem_id))
    below = [sum(at < edge for at in place.values()) for edge in _EDGES]
    heldout = min(max(below[0], 1), len(ranked) - 2)
    selection = min(max(below[1], heldout + 1), len(ranked) - 1)
    cuts = {"heldout": (0, heldout), "selection": (heldout, selection), "train": (selection, None)}
    kept = set(ranked[slice(*cuts[split])])
    return [problem for problem in problems if problem.problem_id in kept]
