"""Rollouts: what was written is what is read, byte for byte the same for the same rows."""

from __future__ import annotations

import dataclasses
import math
import re
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from abacist.errors import RunError
from abacist.records.rollout import (
    SCHEMA_VERSION,
    Rollout,
    StopReason,
    read_rollout_table,
    read_rollouts,
    write_rollouts,
)
from abacist.task.step_rewards import StepReward

ROLLOUT = Rollout(
    run_id="tiny-001",
    step=3,
    split="train",
    group=0,
    member=1,
    messages=[{"role": "user", "content": "How many?"}],
    completion="<answer>\n4\n</answer>",
    completion_ids=[5, 6, 2],
    prompt_tokens=9,
    completion_tokens=3,
    stop_reason=StopReason.STOPPED,
    problem_id="abc",
    difficulty=2,
    gold="4",
    read_answer="4",
    is_correct=True,
    rewards={"correctness": 2.0, "integer": None},
    reward=2.0,
    advantage=0.5,
)

# Every column in the order of the file; a stranger's tool may rely on these names.
COLUMNS = [
    *("run_id", "step", "split", "problem_id", "difficulty", "group", "member"),
    *("messages", "completion", "completion_ids", "prompt_tokens", "completion_tokens"),
    *("stop_reason", "gold", "read_answer", "is_correct"),
    *("reward_correctness", "reward_integer", "reward", "advantage", "schema_version"),
]

TEXT = st.text(st.one_of(st.characters(), st.characters(categories=["Cs"])))
BOUND = st.integers(-(2**31), 2**31 - 1)
NUMBER = st.none() | st.floats(allow_nan=False)
ROLLOUTS = st.lists(
    st.builds(
        Rollout,
        run_id=TEXT,
        step=st.integers(0, 2**40),
        split=TEXT,
        group=st.integers(0, 2**20),
        member=st.integers(0, 2**20),
        messages=st.lists(st.fixed_dictionaries({"role": TEXT, "content": TEXT}), max_size=3),
        completion=TEXT,
        completion_ids=st.lists(st.integers(0, 2**31 - 1), max_size=5),
        prompt_tokens=st.integers(0, 2**20),
        completion_tokens=st.integers(0, 2**20),
        stop_reason=st.sampled_from(StopReason),
        problem_id=st.none() | TEXT,
        difficulty=st.none() | st.integers(1, 20),
        gold=st.none() | TEXT,
        read_answer=st.none() | TEXT,
        is_correct=st.none() | st.booleans(),
        rewards=st.fixed_dictionaries({"a": NUMBER, "b": NUMBER}),
        reward=NUMBER,
        advantage=NUMBER,
        trained=st.none() | st.booleans(),
        steps=st.none() | st.lists(st.builds(StepReward, BOUND, BOUND, NUMBER), max_size=3),
        schema_version=st.just(SCHEMA_VERSION),
    ),
    min_size=1,
    max_size=4,
)


def without_lone_surrogates(rollout: Rollout) -> Rollout:
    def clean(value: object) -> object:
        if isinstance(value, dict):
            return {key: clean(inner) for key, inner in value.items()}
        if isinstance(value, list) and not (value and isinstance(value[0], StepReward)):
            return [clean(inner) for inner in value]
        if isinstance(value, str) and not isinstance(value, StopReason):
            return re.sub("[\ud800-\udfff]", "\ufffd", value)
        return value

    fields = {f.name: clean(getattr(rollout, f.name)) for f in dataclasses.fields(rollout)}
    return Rollout(**fields)  # type: ignore[arg-type]


@settings(max_examples=40, deadline=None)
@given(rollouts=ROLLOUTS)
def test_any_rollout_survives_writing_but_for_lone_surrogates(
    tmp_path_factory: pytest.TempPathFactory, rollouts: list[Rollout]
) -> None:
    path = tmp_path_factory.mktemp("run") / "step.parquet"
    write_rollouts(path, rollouts)
    assert read_rollouts(path) == [without_lone_surrogates(rollout) for rollout in rollouts]


def test_the_same_rows_give_the_same_bytes(tmp_path: Path) -> None:
    for name in ("a.parquet", "b.parquet"):
        write_rollouts(tmp_path / name, [ROLLOUT] * 50)
    assert (tmp_path / "a.parquet").read_bytes() == (tmp_path / "b.parquet").read_bytes()


def test_the_columns_are_the_published_ones_compressed_with_zstd(tmp_path: Path) -> None:
    write_rollouts(tmp_path / "x.parquet", [ROLLOUT])
    file = pq.ParquetFile(tmp_path / "x.parquet")
    assert file.schema_arrow.names == COLUMNS
    assert file.metadata.row_group(0).column(0).compression == "ZSTD"
    nullable = {field.name for field in file.schema_arrow if field.nullable}
    assert nullable == {
        *("problem_id", "difficulty", "gold", "read_answer", "is_correct"),
        *("reward_correctness", "reward_integer", "reward", "advantage"),
    }


@pytest.mark.parametrize(
    ("changes", "last"),
    [
        ({"trained": False}, ["trained"]),
        ({"steps": [StepReward(0, 9, 1.0)]}, ["steps"]),
        ({"steps": []}, ["steps"]),
        ({"steps": [StepReward(0, 9, None)], "trained": True}, ["trained", "steps"]),
    ],
)
def test_columns_that_not_every_run_has_stand_last_and_only_where_a_reply_has_them(
    tmp_path: Path, changes: dict[str, object], last: list[str]
) -> None:
    other = dataclasses.replace(ROLLOUT, **changes)  # type: ignore[arg-type]
    write_rollouts(tmp_path / "step-1.parquet", [ROLLOUT, other])
    write_rollouts(tmp_path / "step-2.parquet", [ROLLOUT])
    assert pq.read_schema(tmp_path / "step-1.parquet").names == COLUMNS + last
    assert pq.read_schema(tmp_path / "step-2.parquet").names == COLUMNS
    assert read_rollouts(tmp_path) == [ROLLOUT, other, ROLLOUT]


def test_the_steps_of_a_file_are_structs_of_whole_characters_and_a_reward(tmp_path: Path) -> None:
    steps = [StepReward(0, 9, 1.0), StepReward(9, 12, None)]
    write_rollouts(tmp_path / "x.parquet", [dataclasses.replace(ROLLOUT, steps=steps)])
    table = pq.read_table(tmp_path / "x.parquet")
    step = table.schema.field("steps").type.value_type
    assert {field.name: str(field.type) for field in step} == {
        "start": "int32", "end": "int32", "reward": "double",
    }  # fmt: skip
    assert table["steps"].to_pylist() == [[step._asdict() for step in steps]]


def test_a_step_without_bounds_is_none_and_the_others_are_read(tmp_path: Path) -> None:
    write_rollouts(tmp_path / "x.parquet", [ROLLOUT])
    theirs = [[None, {"start": 3, "end": 5.0}, {"start": 5, "end": None}]]  # no column of rewards
    table = pq.read_table(tmp_path / "x.parquet").append_column("steps", pa.array(theirs))
    pq.write_table(table, tmp_path / "x.parquet")
    (back,) = read_rollouts(tmp_path)
    assert back.steps == [StepReward(3, 5, None)]


def test_folders_are_made_and_nothing_is_left_beside_the_file(tmp_path: Path) -> None:
    write_rollouts(tmp_path / "rollouts" / "x.parquet", [ROLLOUT])
    write_rollouts(tmp_path / "rollouts" / "x.parquet", [])
    assert [path.name for path in (tmp_path / "rollouts").iterdir()] == ["x.parquet"]
    assert read_rollouts(tmp_path / "rollouts") == []


def test_a_folder_is_read_in_order_of_name_and_its_rewards_are_joined(tmp_path: Path) -> None:
    other = dataclasses.replace(ROLLOUT, rewards={"mine": 1.0}, step=1)
    write_rollouts(tmp_path / "step-2.parquet", [ROLLOUT])
    write_rollouts(tmp_path / "step-1.parquet", [other])
    (tmp_path / ".step-3.parquet.17.tmp").write_bytes(b"half a fi")
    first, second = read_rollouts(tmp_path)
    assert (first.step, second.step) == (1, 3)
    assert first.rewards == {"mine": 1.0, "correctness": None, "integer": None}
    assert second.rewards == {"mine": None, "correctness": 2.0, "integer": None}
    assert read_rollout_table(tmp_path / "step-1.parquet").num_rows == 1


def test_an_empty_folder_has_no_rollouts(tmp_path: Path) -> None:
    assert read_rollouts(tmp_path) == []


def test_columns_of_a_stranger_do_not_disturb(tmp_path: Path) -> None:
    write_rollouts(tmp_path / "x.parquet", [ROLLOUT])
    table = pq.read_table(tmp_path / "x.parquet").append_column("note", pa.array(["mine"]))
    pq.write_table(table, tmp_path / "x.parquet")
    assert read_rollouts(tmp_path / "x.parquet") == [ROLLOUT]


def test_a_strangers_column_that_python_cannot_hold_does_not_disturb(tmp_path: Path) -> None:
    write_rollouts(tmp_path / "x.parquet", [ROLLOUT])
    beyond = pa.array([2**45], pa.timestamp("s"))  # after the year 9999
    table = pq.read_table(tmp_path / "x.parquet").append_column("when", beyond)
    pq.write_table(table, tmp_path / "x.parquet")
    assert read_rollouts(tmp_path / "x.parquet") == [ROLLOUT]


def test_a_column_that_stands_there_twice_is_named(tmp_path: Path) -> None:
    write_rollouts(tmp_path / "x.parquet", [ROLLOUT])
    table = pq.read_table(tmp_path / "x.parquet").append_column("reward", pa.array([1.0]))
    pq.write_table(table, tmp_path / "x.parquet")
    with pytest.raises(RunError, match="two columns reward"):
        read_rollouts(tmp_path / "x.parquet")


def test_what_cannot_be_read_is_an_error_that_says_why(tmp_path: Path) -> None:
    path = tmp_path / "x.parquet"
    with pytest.raises(RunError, match="not a readable rollout file"):
        read_rollouts(path)
    path.write_bytes(b"PAR1 torn")
    with pytest.raises(RunError, match="not a readable rollout file"):
        read_rollouts(tmp_path)
    pq.write_table(pa.table({"step": [1]}), path)
    with pytest.raises(RunError, match="no column run_id, split"):
        read_rollouts(path)
    write_rollouts(path, [dataclasses.replace(ROLLOUT, schema_version=SCHEMA_VERSION + 1)])
    with pytest.raises(RunError, match="rollout format 2"):
        read_rollouts(path)


def test_an_unknown_stop_reason_is_an_error(tmp_path: Path) -> None:
    write_rollouts(tmp_path / "x.parquet", [ROLLOUT])
    table = pq.read_table(tmp_path / "x.parquet")
    table = table.drop_columns("stop_reason").append_column("stop_reason", pa.array(["bored"]))
    pq.write_table(table, tmp_path / "x.parquet")
    with pytest.raises(RunError, match="bored"):
        read_rollouts(tmp_path)


def test_nan_rewards_are_kept_as_nan(tmp_path: Path) -> None:
    write_rollouts(tmp_path / "x.parquet", [dataclasses.replace(ROLLOUT, reward=math.nan)])
    (back,) = read_rollouts(tmp_path)
    assert back.reward is not None and math.isnan(back.reward)


def test_every_stop_reason_has_a_sentence() -> None:
    assert all(reason.sentence.endswith(".") for reason in StopReason)


@pytest.mark.parametrize(
    ("ids", "reason"),
    [
        ([], StopReason.EMPTY),
        ([2], StopReason.EMPTY),
        ([7, 2], StopReason.STOPPED),
        ([2, 7], StopReason.LENGTH),
        ([7], StopReason.LENGTH),
    ],
)
def test_the_stop_reason_is_read_from_the_token_ids(ids: list[int], reason: StopReason) -> None:
    assert StopReason.of(ids, stop_ids={2, 3}) is reason
