"""Our problems as the Parquet files that verl's ``RLHFDataset`` reads."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from abacist.errors import DataError, RunError
from abacist.task.problems import Problem
from abacist.task.prompts import SYSTEM_PROMPT, Shots, build_messages

_TEXT = pa.string()
SCHEMA = pa.schema(
    [
        ("data_source", _TEXT),
        ("prompt", pa.list_(pa.struct([("role", _TEXT), ("content", _TEXT)]))),
        ("ability", _TEXT),
        ("reward_model", pa.struct([("style", _TEXT), ("ground_truth", _TEXT)])),
        ("extra_info", pa.struct(
            [("split", _TEXT), ("index", pa.int64()), ("problem_id", _TEXT), ("question", _TEXT),
             ("answer", _TEXT)])),
    ]
)  # fmt: skip


def write_verl_data(
    folder: Path,
    splits: Mapping[str, Iterable[Problem]],
    *,
    data_source: str = "abacist",
    system_prompt: str | None = SYSTEM_PROMPT,
    shots: Shots | Sequence[Problem] = (),
) -> list[Path]:
    """Write ``<split>.parquet`` for each split; returns the paths.

    ``verl_reward.compute_score`` pays for replies to these prompts. Raises DataError for a split
    without problems, RunError if a file exists or cannot be written.
    """
    tables = {
        folder / f"{split}.parquet": _table(
            split, list(problems), data_source, system_prompt, shots
        )
        for split, problems in splits.items()
    }
    for path in tables:
        if path.exists():
            raise RunError(f"{path} exists already.", "Choose another folder.")
    for path, table in tables.items():
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            pq.write_table(table, path)
        except OSError as error:
            path.unlink(missing_ok=True)
            raise RunError(f"{path} cannot be written: {error}.", "Choose another folder.") from (
                error
            )
    return list(tables)


def _table(
    split: str,
    problems: list[Problem],
    data_source: str,
    system_prompt: str | None,
    shots: Shots | Sequence[Problem],
) -> pa.Table:
    if not problems:
        raise DataError(f"The split {split!r} holds no problems.", "Give some, or leave it out.")
    rows = [
        {
            "data_source": data_source,
            "prompt": build_messages(
                problem.question,
                system_prompt=system_prompt,
                shots=shots,
                problem_id=problem.problem_id,
            ),
            "ability": "math",
            "reward_model": {"style": "rule", "ground_truth": problem.answer},
            "extra_info": {
                "split": split,
                "index": index,
                "problem_id": problem.problem_id,
                "question": problem.question,
                "answer": problem.solution or "",
            },
        }
        for index, problem in enumerate(problems)
    ]
    return pa.Table.from_pylist(rows, schema=SCHEMA)
