"""What is asked: how a data set becomes a checked list of :class:`Problem`, split by split.

A source is the word ``generated`` or ``gsm_symbolic`` (both are made on the spot), a Hub id such as
``openai/gsm8k``, a folder with one file per split, or a single file. Every row is checked before
the first one is used (``task.rows``).

Splits. ``train``, ``selection`` and ``heldout`` are all cut from the source's *train* rows, each
row by the hash of its own id: the cut does not depend on row order, and a row stays where it is
when others are added. ``test`` is the source's own test file, and no other split reads it.
GSM8K's 7,473 train rows become 6,585 to train on, 284 for selection and 604 held out.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from abacist.errors import DataError, UsageError
from abacist.task import given
from abacist.task.golds import DECIMAL_MARKS, DecimalMark
from abacist.task.plain import is_whole, plain
from abacist.task.rows import Problem, problems_of, questions_of
from abacist.task.rows import normalise_question as normalise_question
from abacist.task.sources import Row, read_file, read_folder, read_hub

# Sources whose problems are made on the spot; a file or folder of the same name is not read.
MADE_HERE = ("generated", "gsm_symbolic")
_MOST_MADE = 1_000_000
SPLITS = ("train", "selection", "heldout", "test", "all")
HELDOUT_FRACTION = 0.08
SELECTION_FRACTION = 0.034
_EDGES = (HELDOUT_FRACTION, HELDOUT_FRACTION + SELECTION_FRACTION)
GENERATED_COUNTS = {"train": 4000, "selection": 250, "heldout": 600}
_DEFAULT_CONFIGS = {"openai/gsm8k": "main", "gsm8k": "main"}

_HUB_ID = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")
_FILE_SUFFIX = re.compile(r".*\.(jsonl?|csv|parquet|arrow|txt|tsv|xlsx?|ods|gz|zip)", re.IGNORECASE)


# What says how a source is read: the parameter of `load_problems`, and the setting of a run.
_SETTINGS = {
    "question_column": "question_column",
    "answer_column": "answer_column",
    "decimal_mark": "decimal_mark",
    "dataset_config": "dataset_config",
    "skip_bad_rows": "skip_bad_rows",
    "train_split": "dataset_train_split",
    "test_split": "dataset_test_split",
}


def whole_split(source: object) -> str:
    """The split that is all of a source: of one that is made on the spot what it makes to train."""
    is_made_here = isinstance(source, str | os.PathLike) and os.fspath(source) in MADE_HERE
    return "train" if is_made_here else "all"


def reading_options(settings: Mapping[str, Any]) -> dict[str, Any]:
    """What ``settings`` say of how a source is read, as :func:`load_problems` takes it."""
    return {ours: settings[name] for ours, name in _SETTINGS.items() if name in settings}


def load_problems(
    source: str | os.PathLike[str] | given.GivenData,
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
    keep_without_gold: bool = False,
    decimal_mark: DecimalMark = "auto",
) -> list[Problem]:
    """The checked problems of one split, in source order, or ``limit`` of them drawn by ``seed``.

    ``source`` is ``"generated"`` (word problems, made on the spot), a Hub id, a file, a folder, or
    the rows themselves: problems, dicts, a ``datasets.Dataset`` or a table of pandas.

    >>> load_problems([{"question": "2 + 3?", "answer": "5"}], split="all")[0].answer
    '5'

    ``split`` is ``train``, ``selection``, ``heldout``, ``test`` or ``all`` (every train row,
    uncut: for few-shot examples, or a test set that is a file of its own). ``train_split`` and
    ``test_split`` are the source's own names for its parts, as in TRL. A larger ``limit`` with
    the same seed begins with the smaller one's problems. The answer column holds a worked
    solution that ends in ``#### gold`` or ``\\boxed{gold}``, or the gold alone (``task.golds``);
    where the data lacks the default columns, the usual names are tried (``task.columns``). A column
    ``problem_id`` or ``id`` names the problems; without one the name is a hash of the question. The
    columns are kept for rewards (``task.extras``). ``keep_without_gold`` is for measuring: a row
    with a question but no usable gold becomes a problem with the answer "".

    Raises DataError, naming file, line and reason, for a source that cannot be found or read,
    a row that is bad (``skip_bad_rows`` leaves those out and logs how many for which reason;
    a train row whose question is in the test split is one), golds that leave open what their
    decimal mark is, or a split in which nothing is left; UsageError for an unknown split or decimal
    mark, or a limit below 1.
    """
    if split not in SPLITS:
        raise UsageError(f"There is no split {split!r}.", f"Choose one of {', '.join(SPLITS)}.")
    limit = plain(limit)
    if limit is not None and not is_whole(limit):
        raise UsageError(f"A limit of {limit!r} problems is no whole number.")
    if limit is not None and limit < 1:
        raise UsageError(f"A limit of {limit} problems leaves nothing.", "Give 1 or more, or none.")
    for name, column in (("question_column", question_column), ("answer_column", answer_column)):
        if not isinstance(column, str):
            raise UsageError(f"{name} is {column!r}, not the name of a column.")
    if decimal_mark not in DECIMAL_MARKS:
        raise UsageError(
            f"There is no decimal mark {decimal_mark!r}.",
            f"--decimal_mark is one of {', '.join(DECIMAL_MARKS)}.",
        )
    name = os.fspath(source) if isinstance(source, str | os.PathLike) else given.NAME
    if isinstance(source, str | os.PathLike) and name in MADE_HERE:
        made = _made_rows(name, split, limit, seed)
        return problems_of(
            made, name, "question", "answer", skip_bad_rows=False, keep_columns=False
        )
    part = test_split if split == "test" else train_split
    reserved: dict[str, str] = {}
    rows: Iterable[Row]
    if isinstance(source, str | os.PathLike):
        rows = _rows_of(name, part, dataset_config, wants_test=split == "test")
        if split not in ("test", "all") and train_split != test_split:
            reserved = _test_questions(name, test_split, dataset_config, question_column)
    elif split == "test":
        raise DataError(
            f"{name}: has train rows only, no test split.", "Read it whole, with the split 'all'."
        )
    else:
        rows = given.rows_in(given.lines_of(source))
    problems = problems_of(
        rows,
        name,
        question_column,
        answer_column,
        skip_bad_rows=skip_bad_rows,
        needs_gold=not keep_without_gold,
        reserved=reserved,
        decimal_mark=decimal_mark,
    )
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


def _made_rows(name: str, split: str, limit: int | None, seed: int) -> Iterator[Row]:
    from abacist.task.symbolic import gsm_symbolic
    from abacist.task.wordproblems import generate

    if split not in GENERATED_COUNTS:
        raise DataError(
            f"{'Generated' if name == 'generated' else name} problems have no split {split!r}.",
            f"Choose one of {', '.join(GENERATED_COUNTS)}.",
        )
    if limit is not None and limit > _MOST_MADE:
        raise DataError(
            f"{limit:,} {name} problems were asked for.",
            f"At most {_MOST_MADE:,} are made: each is drawn until it differs from all others.",
        )
    make = generate if name == "generated" else gsm_symbolic
    records = make(limit or GENERATED_COUNTS[split], seed=seed, split=split)
    return (Row(name, f"row {number}", row) for number, row in enumerate(records, 1))


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


def _test_questions(name: str, part: str, config: str | None, column: str) -> dict[str, str]:
    """Where each question of the test split stands; nothing if the source has no such split."""
    if Path(os.path.expanduser(name)).is_file():
        return {}
    try:
        rows = list(_rows_of(name, part, config, wants_test=True))
    except DataError:
        return {}
    return {"question " + question: place for question, place in questions_of(rows, column)}


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
