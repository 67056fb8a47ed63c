"""One reply of the model and what it earned, and the Parquet files that keep such rows.

Training, evaluation and ``ask`` write this one record, and report and compare read it. The
rows hold no time of day (times live in ``timings.jsonl``), so the same rollouts give the same
bytes, and a resumed run can be compared with an uninterrupted one file by file.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from abacist.errors import RunError
from abacist.records.rundir import write_aside
from abacist.task.sentence_enum import SentenceEnum
from abacist.task.step_rewards import StepReward

SCHEMA_VERSION = 1
REWARD_PREFIX = "reward_"

_LONE_SURROGATE = re.compile("[\ud800-\udfff]")


class StopReason(SentenceEnum):
    """Why a reply ended where it did."""

    STOPPED = "stopped", "The model ended its reply itself."
    LENGTH = "length", "The reply was cut off: its budget of tokens was used up."
    EMPTY = "empty", "The model ended its reply before writing anything."

    @classmethod
    def of(cls, completion_ids: Sequence[int], stop_ids: Collection[int]) -> StopReason:
        """The reason, read from the token ids (decoded text has lost its stop token).

        ``completion_ids`` may end in the stop token, and holds no padding.

        >>> StopReason.of([5, 6, 2], stop_ids={2}).sentence
        'The model ended its reply itself.'
        """
        ended = bool(completion_ids) and completion_ids[-1] in stop_ids
        written_tokens = len(completion_ids) - ended
        if written_tokens == 0:
            return cls.EMPTY
        return cls.STOPPED if ended else cls.LENGTH


@dataclass(frozen=True, slots=True)
class Rollout:
    """One completion in its context. None stands for what a stranger's data may not have.

    ``group`` counts the prompts of a step and ``member`` the completions of a group, both from
    0. ``rewards`` maps a reward's name to what it paid, None where it did not apply; ``reward``
    is their weighted sum, None where none applied; ``read_answer`` is the answer that was read, as
    text. ``trained`` says whether a step learned from it; None where it was not a matter of choice.
    ``steps`` says how each step of its reasoning was paid; None where steps were not paid.
    """

    run_id: str
    step: int
    split: str
    group: int
    member: int
    messages: Sequence[Mapping[str, str]]
    completion: str
    completion_ids: Sequence[int]
    prompt_tokens: int
    completion_tokens: int
    stop_reason: StopReason
    problem_id: str | None = None
    difficulty: int | None = None
    gold: str | None = None
    read_answer: str | None = None
    is_correct: bool | None = None
    rewards: Mapping[str, float | None] = field(default_factory=dict)
    reward: float | None = None
    advantage: float | None = None
    trained: bool | None = None
    steps: Sequence[StepReward] | None = None
    schema_version: int = SCHEMA_VERSION

    def __repr__(self) -> str:
        """One line; the reply is in ``completion``."""
        outcome = {True: "right", False: "wrong", None: "no gold"}[self.is_correct]
        begins = repr(self.completion[:40]) + ("…" if len(self.completion) > 40 else "")
        place = f"step {self.step}, group {self.group}, member {self.member}"
        return f"<Rollout: {place}, {outcome}, {self.completion_tokens} tokens, {begins}>"


def question_of(messages: Iterable[Mapping[str, Any] | None] | None) -> str:
    """What was asked: the last turn of the user, behind any worked examples; "" if there is none.

    >>> question_of([{"role": "user", "content": "1 + 1?"}, {"role": "assistant", "content": "2"}])
    '1 + 1?'
    """
    asked = [turn.get("content") for turn in messages or () if turn and turn.get("role") == "user"]
    return str(asked[-1] or "").strip() if asked else ""


_MESSAGE = pa.struct([pa.field("role", pa.string()), pa.field("content", pa.string())])


def _required(name: str, kind: pa.DataType) -> pa.Field:
    return pa.field(name, kind, nullable=False)


# The columns of a file, in order; one ``reward_<name>`` per reward follows ``is_correct``.
_BEFORE_REWARDS = [
    _required("run_id", pa.string()),
    _required("step", pa.int64()),
    _required("split", pa.string()),
    pa.field("problem_id", pa.string()),
    pa.field("difficulty", pa.int32()),
    _required("group", pa.int32()),
    _required("member", pa.int32()),
    _required("messages", pa.list_(_MESSAGE)),
    _required("completion", pa.string()),
    _required("completion_ids", pa.list_(pa.int32())),
    _required("prompt_tokens", pa.int32()),
    _required("completion_tokens", pa.int32()),
    _required("stop_reason", pa.string()),
    pa.field("gold", pa.string()),
    pa.field("read_answer", pa.string()),
    pa.field("is_correct", pa.bool_()),
]
_AFTER_REWARDS = [
    pa.field("reward", pa.float64()),
    pa.field("advantage", pa.float64()),
    _required("schema_version", pa.int32()),
]
_STEP = pa.struct(
    [
        pa.field("start", pa.int32()),
        pa.field("end", pa.int32()),
        pa.field("reward", pa.float64()),
    ]
)
# Stand last, in files of runs that have them: ``trained`` where some replies only were trained on
# (--train_replies), ``steps`` where steps were paid (--step_reward_weight), in characters.
_OPTIONAL = [pa.field("trained", pa.bool_()), pa.field("steps", pa.list_(_STEP))]


def rollout_schema(reward_names: Sequence[str], optional: Collection[str] = ()) -> pa.Schema:
    """The Arrow schema of a file whose rollouts were paid by these rewards.

    ``optional`` names those of the columns ``trained`` and ``steps`` that it has.
    """
    rewards = [pa.field(REWARD_PREFIX + name, pa.float64()) for name in reward_names]
    last = [column for column in _OPTIONAL if column.name in optional]
    return pa.schema([*_BEFORE_REWARDS, *rewards, *_AFTER_REWARDS, *last])


def write_rollouts(path: Path, rollouts: Sequence[Rollout]) -> None:
    """Write the rollouts as one Parquet file (zstd), whole or not at all, replacing any before.

    Reward columns come in the order in which the rewards are first met; a rollout that lacks
    one has null there. A lone surrogate, which no Parquet text can hold, is stored as U+FFFD.
    """
    names = list(dict.fromkeys(name for rollout in rollouts for name in rollout.rewards))
    rows = [_row_of(rollout, names) for rollout in rollouts]
    present = [one.name for one in _OPTIONAL if any(row[one.name] is not None for row in rows)]
    table = pa.Table.from_pylist(rows, schema=rollout_schema(names, present))
    buffer = pa.BufferOutputStream()
    pq.write_table(table, buffer, compression="zstd")
    write_aside(path, buffer.getvalue().to_pybytes())


def rollout_files(folder: Path) -> list[Path]:
    """The Parquet files of a folder, in the order of their steps.

    Numbers within names are compared as numbers: ``step-1000000.parquet`` is the one after
    ``step-999999.parquet``.
    """

    def key(path: Path) -> list[str | int]:
        parts = re.split("([0-9]+)", path.name)  # text and numbers in turn
        return [int(part) if number % 2 else part for number, part in enumerate(parts)]

    return sorted(folder.glob("*.parquet"), key=key)


def read_rollout_table(source: Path) -> pa.Table:
    """The rows of one file, or of a folder's :func:`rollout_files`, as one table.

    Files with different rewards are joined, with nulls where a file had no such reward; columns
    of a stranger are kept. Raises RunError for a file that is missing, damaged, lacks a
    column, or was written by a newer Abacist; a folder without files gives no rows.
    """
    paths = rollout_files(source) if source.is_dir() else [source]
    tables = [_read_file(path) for path in paths]
    if not tables:
        return rollout_schema([]).empty_table()
    try:
        return pa.concat_tables(tables, promote_options="default")
    except pa.ArrowException as error:
        raise RunError(f"{source}: its files do not fit together ({error}).") from error


def read_sound_rollouts(
    folder: Path, columns: Collection[str] | None = None
) -> tuple[pa.Table, dict[str, str]]:
    """The rows of every sound file of a folder, and why each other one cannot be used, by name.

    For showing what is left of a run. ``columns`` names what is wanted beside the rewards; all, if
    None.
    """
    tables, damaged = [], {}
    for path in rollout_files(folder):
        try:
            tables.append(_read_file(path, columns))
        except RunError as error:
            damaged[path.name] = error.message
    if not tables:
        return rollout_schema([]).empty_table(), damaged
    return pa.concat_tables(tables, promote_options="default"), damaged


def read_rollouts(source: Path) -> list[Rollout]:
    """The rollouts of one file or of a folder; see :func:`read_rollout_table` for the errors."""
    return rollouts_in(read_rollout_table(source), source)


def rollouts_in(table: pa.Table, source: Path) -> list[Rollout]:
    """The rows of a table that was read from ``source``, or of a part of it, as rollouts.

    Raises RunError for a value that no rollout has.
    """
    try:
        return [_rollout_of(row) for row in table.select(_of_rollouts(table)).to_pylist()]
    except ValueError as error:
        raise RunError(f"{source}: {error}.") from error


def _of_rollouts(table: pa.Table) -> list[str]:
    """The columns that make a rollout. A stranger's may hold what Python cannot."""
    ours = {column.name for column in (*_BEFORE_REWARDS, *_AFTER_REWARDS, *_OPTIONAL)}
    names = table.column_names
    return [name for name in names if name in ours or name.startswith(REWARD_PREFIX)]


def _read_file(path: Path, columns: Collection[str] | None = None) -> pa.Table:
    """One file's table; of many columns only those in ``columns``, rewards and what is checked."""
    try:
        with pq.ParquetFile(path) as file:
            there = file.schema_arrow.names
            if twice := [name for name, count in Counter(there).items() if count > 1]:
                raise RunError(f"{path}: not a rollout file, it has two columns {twice[0][:60]}.")
            table = file.read([one.name for one in file.schema_arrow if _is_wanted(one, columns)])
    except (pa.ArrowException, OSError) as error:
        raise RunError(f"{path}: not a readable rollout file ({error}).") from error
    base = [*_BEFORE_REWARDS, *_AFTER_REWARDS]
    if missing := [column.name for column in base if column.name not in there]:
        raise RunError(f"{path}: not a rollout file, it has no column {', '.join(missing)}.")
    newest = max((v for v in table["schema_version"].to_pylist() if v is not None), default=1)
    if newest > SCHEMA_VERSION:
        raise RunError(
            f"{path}: written in rollout format {newest}, this Abacist reads up to "
            f"{SCHEMA_VERSION}.",
            "Install a newer Abacist.",
        )
    return _checked(table, path)


def _is_wanted(column: pa.Field, columns: Collection[str] | None) -> bool:
    if column.name.startswith(REWARD_PREFIX):  # words are a stranger's remark on a reward
        return not (pa.types.is_string(column.type) or pa.types.is_large_string(column.type))
    return columns is None or column.name in columns or column.name == "schema_version"


def _checked(table: pa.Table, path: Path) -> pa.Table:
    """The table with our types. Another program may have written the file, or changed it."""
    rewards = [pa.field(n, pa.float64()) for n in table.column_names if n.startswith(REWARD_PREFIX)]
    for column in [*_BEFORE_REWARDS, *rewards, *_AFTER_REWARDS, *_OPTIONAL]:
        if column.name not in table.column_names:
            continue
        values = table[column.name]
        if not column.nullable and values.null_count:
            raise RunError(
                f"{path}: not a rollout file, {values.null_count:,} of its rows have no "
                f"{column.name}."
            )
        if values.type == column.type:
            continue
        try:
            values = values.cast(column.type)
        except (pa.ArrowException, ValueError) as error:
            raise RunError(
                f"{path}: not a rollout file, its column {column.name} holds {values.type}."
            ) from error
        table = table.set_column(table.column_names.index(column.name), column, values)
    return table


def _row_of(rollout: Rollout, reward_names: Sequence[str]) -> dict[str, Any]:
    columns = [*_BEFORE_REWARDS, *_AFTER_REWARDS, *_OPTIONAL]
    row = {column.name: getattr(rollout, column.name) for column in columns}
    row |= {REWARD_PREFIX + name: rollout.rewards.get(name) for name in reward_names}
    row["messages"] = [
        {"role": storable(turn["role"]), "content": storable(str(turn["content"]))}
        for turn in rollout.messages
    ]
    if rollout.steps is not None:
        row["steps"] = [step._asdict() for step in rollout.steps]
    return {name: storable(value) for name, value in row.items()}


def storable(value: Any) -> Any:
    """A text without halves of surrogate pairs, which no Parquet text can hold; all else as is."""
    return _LONE_SURROGATE.sub("\ufffd", value) if isinstance(value, str) else value


def steps_in(values: Sequence[Mapping[str, Any] | None] | None) -> list[StepReward] | None:
    """The steps of a row of the column ``steps``; what has no bounds is none.

    Another program may have written them: ``task.step_rewards.within`` leaves those out that do not
    lie in the completion.
    """
    if values is None:
        return None
    return [
        StepReward(value["start"], value["end"], value["reward"])
        for value in values
        if value is not None and value["start"] is not None and value["end"] is not None
    ]


def _rollout_of(row: dict[str, Any]) -> Rollout:
    base = [column.name for column in (*_BEFORE_REWARDS, *_AFTER_REWARDS)]
    fields = {name: row[name] for name in base}
    fields["trained"] = row.get("trained")
    fields["steps"] = steps_in(row.get("steps"))
    fields["messages"] = [
        {name: turn.get(name) or "" for name in ("role", "content")}
        for turn in row["messages"]
        if turn is not None
    ]
    fields["stop_reason"] = StopReason(row["stop_reason"])
    fields["rewards"] = {
        name.removeprefix(REWARD_PREFIX): value
        for name, value in row.items()
        if name.startswith(REWARD_PREFIX)
    }
    return Rollout(**fields)
