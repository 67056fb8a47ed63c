"""The replies of a run, found by what one asks for: step, problem, outcome, reward, text.

Reads the Parquet files of a run column by column, without pandas, and makes a
:class:`~abacist.records.rollout.Rollout` only of what is shown. A damaged file is named and the
rest is read.
"""

from __future__ import annotations

import math
import random
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa

from abacist.errors import RunError
from abacist.proof.outcomes import Outcome, outcome_of
from abacist.records.rollout import (
    Rollout,
    StopReason,
    question_of,
    read_rollout_table,
    rollout_files,
    rollouts_in,
)
from abacist.records.rundir import RunDir

TRAIN = "train"
# The second group names one of several generations of the step.
_FILE_OF_STEP = re.compile(r"step-(\d{1,12})(?:-(part\d{1,12})(?!\d))?(?:\D.*)?\.parquet")
_COLUMNS = (
    "step", "group", "problem_id", "completion", "gold", "is_correct", "stop_reason", "reward",
    "messages",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Query:
    """What is asked for; None asks for nothing. ``text`` is looked for in the reply and in the
    question, whatever its case; ``problem_id`` is the whole of it."""

    step: int | None = None
    problem_id: str | None = None
    outcome: Outcome | None = None
    min_reward: float | None = None
    max_reward: float | None = None
    text: str | None = None

    @property
    def is_empty(self) -> bool:
        """Whether nothing is asked for."""
        return self == Query()


@dataclass(frozen=True, slots=True)
class Source:
    """The files in which the replies of a split are kept, in the order of the steps."""

    path: Path
    split: str
    files: tuple[Path, ...]
    is_finished: bool | None = None  # of a run; None of anything else


class Place(NamedTuple):
    """Where a reply stands."""

    step: int
    group: int
    file: Path
    row: int
    outcome: Outcome


@dataclass
class Found:
    """What a query found: every place in order, newest step first; and what could not be read."""

    places: list[Place] = field(default_factory=list)
    num_read: int = 0
    steps: set[int] = field(default_factory=set)
    problem_ids: set[str] = field(default_factory=set)
    damaged: list[str] = field(default_factory=list)

    @property
    def outcomes(self) -> Counter[Outcome]:
        """How many of the places are of each outcome."""
        return Counter(place.outcome for place in self.places)


def source_of(path: Path, split: str | None = None) -> Source:
    """Where the replies are that ``path`` holds: those of the training, or of a measurement.

    ``path`` is a run, the output of ``abacist.GRPOTrainer``, an evaluation's folder or one Parquet
    file. ``split`` is ``train`` or the name of a folder in the run's ``evals/``. Raises RunError
    where there are none, saying what there is.
    """
    kept = "rollouts.parquet"
    single = path if path.is_file() else path / kept
    if single.is_file():
        if split is not None:
            raise RunError(f"{path}: holds one kind of replies.", "Leave out --split.")
        return Source(path, single.parent.name or str(path), (single,))
    is_finished = _is_finished(path)
    training = tuple(rollout_files(path / "rollouts"))
    measured = sorted(file.parent.name for file in (path / "evals").glob(f"*/{kept}"))
    named = [TRAIN] * bool(training) + measured
    if split is None and training:
        return Source(path, TRAIN, training, is_finished)
    if split is not None and split in named:
        files = training if split == TRAIN else (path / "evals" / split / kept,)
        return Source(path, split, files, is_finished)
    there = f"There is --split {', '.join(named)}." if named else ""
    if split is not None:
        raise RunError(f"{path}: keeps no replies of {split!r}.", there or _how_to_keep(path))
    raise RunError(f"{path}: keeps no replies of its training.", there or _how_to_keep(path))


def _is_finished(path: Path) -> bool | None:
    run = RunDir(path)
    if path.is_dir() and not run.manifest_path.exists():
        return None
    try:
        return bool(run.read_manifest().get("finished"))
    except RunError:
        if not path.is_dir():
            raise
        return None  # a damaged manifest hides no reply


def _how_to_keep(path: Path) -> str:
    if RunDir(path).manifest_path.exists():
        return "Its first step has not ended yet, or it was trained with --keep_rollouts false."
    if (path / "completions").is_dir():
        return (
            "TRL's own tables of completions are in completions/. abacist.GRPOConfig("
            "keep_rollouts=True) with abacist.GRPOTrainer keeps rollouts, which this shows."
        )
    return (
        "Give a run of `abacist train`, or the output of abacist.GRPOTrainer with "
        "abacist.GRPOConfig(keep_rollouts=True)."
    )


def find(source: Source, query: Query) -> Found:
    """Every reply that fits the query. Without a query: those of the newest step."""
    found = Found()
    latest: int | None = None
    for file in reversed(source.files):
        named = _FILE_OF_STEP.fullmatch(file.name)
        step = int(named[1]) if named else None
        if step is not None:
            found.steps.add(step)
            if query.step is not None and step != query.step:
                continue
            if query.is_empty and latest is not None and step != latest:
                continue
        try:
            table = read_rollout_table(file)
            places = list(_places(file, table, query, found))
        except RunError as error:
            found.damaged.append(error.message)
            continue
        found.places += places
        latest = step if step is not None else latest
    found.places.sort(key=lambda place: -place.step)  # stable: files, then rows, in their order
    if query.is_empty and found.places:
        newest = found.places[0].step
        found.places = [place for place in found.places if place.step == newest]
    return found


def _places(file: Path, table: pa.Table, query: Query, found: Found) -> Iterator[Place]:
    try:
        columns = table.select(_COLUMNS[: None if query.text else -1]).to_pydict()
    except (pa.ArrowException, ValueError) as error:
        raise RunError(f"{file}: not a readable rollout file ({error}).") from error
    if unknown := set(columns["stop_reason"]) - set(StopReason):
        raise RunError(
            f"{file}: not a rollout file, it has the stop reason {min(map(repr, unknown))}."
        )
    found.num_read += table.num_rows
    found.steps.update(step for step in columns["step"] if isinstance(step, int))
    found.problem_ids.update(str(name) for name in columns["problem_id"] if name is not None)
    keep = _test(query, columns)
    for row in range(table.num_rows):
        if not keep(row):
            continue
        outcome = outcome_of(
            str(columns["completion"][row] or ""),
            columns["gold"][row],
            columns["is_correct"][row],
            columns["stop_reason"][row],
        )
        if query.outcome in (None, outcome):
            step, group = columns["step"][row], columns["group"][row]
            yield Place(step or 0, group or 0, file, row, outcome)


def _test(query: Query, columns: dict[str, list[Any]]) -> Callable[[int], bool]:
    """Whether the row of this number fits what the columns say without judging."""
    text = None if query.text is None else query.text.casefold()

    def keep(row: int) -> bool:
        if query.step is not None and columns["step"][row] != query.step:
            return False
        if query.problem_id is not None and columns["problem_id"][row] != query.problem_id:
            return False
        if query.min_reward is not None or query.max_reward is not None:
            reward = columns["reward"][row]
            if not isinstance(reward, int | float) or math.isnan(reward):
                return False
            low = -math.inf if query.min_reward is None else query.min_reward
            high = math.inf if query.max_reward is None else query.max_reward
            if not low <= reward <= high:
                return False
        if text is not None and text not in str(columns["completion"][row]).casefold():
            return text in question_of(columns["messages"][row]).casefold()
        return True

    return keep


def chosen(places: Sequence[Place], count: int, *, seed: int | None = None) -> list[Place]:
    """At most ``count`` places: the first ones, or with a seed a random sample in their order."""
    if seed is None or count >= len(places):
        return list(places[:count])
    picked = random.Random(seed).sample(range(len(places)), count)
    return [places[index] for index in sorted(picked)]


def _generation(file: Path) -> Path | str:
    """What the files of a generation batch have in common: each process writes one."""
    named = _FILE_OF_STEP.fullmatch(file.name)
    return f"{int(named[1])} {named[2]}" if named else file


def _group_key(place: Place) -> tuple[Path | str, int, int]:
    return _generation(place.file), place.step, place.group


def one_of_each_group(places: Sequence[Place]) -> list[Place]:
    """The first place of each group, in their order."""
    first: dict[tuple[Path | str, int, int], Place] = {}
    for place in places:
        first.setdefault(_group_key(place), place)
    return list(first.values())


def one_of_each_outcome(found: Found, count: int) -> list[Place]:
    """One reply of each outcome, of one group as far as it has them.

    Right first, then right but unformatted, cut off, and wrong.
    """
    in_group: dict[tuple[Path | str, int, int], set[Outcome]] = {}
    for place in found.places:
        in_group.setdefault(_group_key(place), set()).add(place.outcome)
    most = max(in_group, key=lambda group: len(in_group[group]), default=None)
    ordered = sorted(found.places, key=lambda place: _group_key(place) != most)
    first: dict[Outcome, Place] = {}
    for place in ordered:
        first.setdefault(place.outcome, place)
    shown = [first[outcome] for outcome in Outcome if outcome in first]
    return shown[:count]


def rollouts_at(places: Sequence[Place]) -> list[Rollout]:
    """The replies at these places, in their order. Raises RunError where a file has gone bad."""
    tables = {file: read_rollout_table(file) for file in {place.file for place in places}}
    return [_row_of(tables[place.file], place.row, place.file) for place in places]


def _row_of(table: pa.Table, row: int, file: Path) -> Rollout:
    # A slice, because `take` would import pandas where that is installed.
    return rollouts_in(table.slice(row, 1), file)[0]


def group_of(source: Source, place: Place) -> list[Rollout]:
    """All replies of the group in which a reply stands, by their number.

    Of an evaluation with one reply to each problem that is the reply alone.
    """
    # In older files the groups of each of a step's generations are numbered from 0.
    generation = _generation(place.file)
    files = [file for file in source.files if _generation(file) == generation]
    members: list[Rollout] = []
    for file in files:
        try:
            table = read_rollout_table(file)
        except RunError:  # another process's part of the step; `find` has named it
            continue
        steps, groups = table["step"].to_pylist(), table["group"].to_pylist()
        members += [
            _row_of(table, row, file)
            for row, where in enumerate(zip(steps, groups, strict=True))
            if where == (place.step, place.group)
        ]
    return sorted(members, key=lambda one: one.member)
