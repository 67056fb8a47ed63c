"""Data as people have it: golds of every kind, columns by other names, files from spreadsheets."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from abacist.errors import DataError
from abacist.records.provenance import data_fingerprint
from abacist.task.answers import same_answer
from abacist.task.audit.audit import audit
from abacist.task.golds import contradiction, in_points
from abacist.task.problems import Problem, load_problems
from abacist.task.prompts import to_dataset_rows


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return path


def golds(path: Path, **how: Any) -> list[str]:
    return [problem.answer for problem in load_problems(path, split="all", **how)]


def asked(*values: Any) -> list[dict[str, Any]]:
    return [{"question": f"Number {n}?", "answer": value} for n, value in enumerate(values)]


@pytest.mark.parametrize(
    ("cell", "right", "wrong"),
    [
        ("18", "18", "19"),
        ("$1,200", "1200", "1.2"),
        ("18 apples", "18", "81"),
        ("40 %", "40", "0.4"),
        (r"\boxed{18}", "18", "1"),
        ("Half of 8 is 4.\nSo \\boxed{\\frac{3}{4}}.", "0.75", "4"),
        ("3 * 6 = 18\n#### 1,800", "1800", "1.8"),
        ("#### €1,800.50", "1800.5", "1800"),
        (1e-05, "0.00001", "1"),
        (2e16, "20000000000000000", "2"),
        (18.0, "18", "180"),
        ("seven or so", None, None),
        ("3/4", "0.75", "3"),
    ],
)
def test_a_gold_is_read_as_a_reply_is(
    cell: Any, right: str | None, wrong: str | None, tmp_path: Path
) -> None:
    path = write(tmp_path / "data.jsonl", asked(cell))
    if right is None or wrong is None:
        with pytest.raises(DataError) as refused:
            golds(path)
        assert repr(cell) in refused.value.message  # the value is shown
        return
    [gold] = golds(path)
    assert same_answer(right, gold) and not same_answer(wrong, gold)


@pytest.mark.parametrize("cell", ["twelve or so", "12 or 13", "#### 3, 4", "x" * 500, "3\n4"])
def test_a_gold_that_no_reply_can_match_is_refused_with_its_value_and_line(
    cell: str, tmp_path: Path
) -> None:
    path = write(tmp_path / "data.jsonl", asked("7", cell))
    with pytest.raises(DataError) as refused:
        golds(path)
    shown = cell.removeprefix("#### ")[:20].split("\n")[0]
    assert "line 2" in refused.value.message and shown in refused.value.message
    assert len(refused.value.message) < 300
    assert golds(path, skip_bad_rows=True) == ["7"]


@pytest.mark.parametrize(
    ("kind", "value", "gold"),
    [
        (pa.float32(), 0.1, "0.1"),
        (pa.float32(), 1e-5, "1e-05"),
        (pa.float16(), 0.3, "0.3"),
        (pa.float64(), 0.3333333333333333, "0.3333333333333333"),
        (pa.float64(), 12.0, "12"),
        (pa.float32(), 3.125, "3.125"),
        (pa.int64(), 7, "7"),
    ],
)
def test_a_number_of_a_typed_column_keeps_its_shortest_form(
    kind: Any, value: float, gold: str, tmp_path: Path
) -> None:
    columns = {
        "question": pa.array(["How many?"]),
        "answer": pa.array([value]).cast(kind),
    }
    pq.write_table(pa.table(columns), tmp_path / "data.parquet")
    assert golds(tmp_path / "data.parquet") == [gold]


def test_a_column_of_typed_numbers_is_never_taken_for_one_with_decimal_commas(
    tmp_path: Path,
) -> None:
    columns = {"question": ["a?", "b?"], "answer": pa.array([3.125, 12.375], pa.float64())}
    pq.write_table(pa.table(columns), tmp_path / "data.parquet")
    assert golds(tmp_path / "data.parquet") == ["3.125", "12.375"]


@pytest.mark.parametrize(
    ("cells", "by_comma"),
    [
        (["7", "3,5"], ["7", "3.5"]),
        (["3.500", "12.000"], ["3500", "12000"]),
        (["1.234,50 €", "7"], ["1234.50 €", "7"]),
        (["1.250.000", "8"], ["1250000", "8"]),
        (["0,125"], ["0.125"]),
    ],
)
def test_golds_that_speak_for_a_decimal_comma_are_named_and_a_flag_decides(
    cells: list[str], by_comma: list[str], tmp_path: Path
) -> None:
    path = write(tmp_path / "data.jsonl", asked(*cells))
    with pytest.raises(DataError) as refused:
        golds(path)
    assert "'answer'" in refused.value.message and "line" in refused.value.message
    assert "--decimal_mark comma" in refused.value.hint
    assert golds(path, decimal_mark="comma") == by_comma


@pytest.mark.parametrize(
    "cells",
    [["1,200", "7"], ["1,234.50", "2.5"], ["3.500", "0.25"], ["3.500"], ["12.000", "1.5"]],
)
def test_golds_that_a_point_explains_are_read_without_a_question(
    cells: list[str], tmp_path: Path
) -> None:
    assert golds(write(tmp_path / "data.jsonl", asked(*cells))) == cells


def test_behind_the_mark_a_comma_is_thousands_whatever_other_rows_hold(tmp_path: Path) -> None:
    path = write(
        tmp_path / "data.jsonl", asked("so\n#### 1,200", "so\n#### 3.500", "so\n#### 12.000")
    )
    assert golds(path) == ["1,200", "3.500", "12.000"]


@given(st.integers(0, 10**9), st.integers(0, 999))
def test_a_number_written_with_a_decimal_comma_is_read_back(whole: int, rest: int) -> None:
    german = f"{whole:,}".replace(",", ".") + f",{rest:03d}"
    assert in_points(german) == f"{whole}.{rest:03d}"
    # Two digits behind the comma are no group of three, so such a gold always speaks against.
    assert contradiction([("row 1", f"{whole},{rest % 100:02d}")])


@given(st.text(max_size=200))
def test_no_text_makes_the_reading_of_a_column_raise(text: str) -> None:
    contradiction([("row 1", text), ("row 2", text)])
    in_points(text)


@pytest.mark.parametrize(
    ("row", "question", "gold"),
    [
        ({"problem": "2 + 2?", "solution": "so \\boxed{4}"}, "2 + 2?", "4"),
        ({"prompt": "2 + 2?", "ground_truth": "4"}, "2 + 2?", "4"),
        ({"instruction": "2 + 2?", "output": "It is\n#### 4"}, "2 + 2?", "4"),
        ({"question": "2 + 2?", "label": 4, "response": "no idea"}, "2 + 2?", "4"),
        (
            {"prompt": [{"role": "system", "content": "Be brief."},
                        {"role": "user", "content": "2 + 2?"}], "answer": "4"},
            "2 + 2?",
            "4",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "text", "text": "2 + 2?"}]},
                          {"role": "assistant", "content": "2 + 2 = 4\n#### 4"}]},
            "2 + 2?",
            "4",
        ),
    ],
)  # fmt: skip
def test_columns_by_other_usual_names_are_taken_and_named(
    row: dict[str, Any],
    question: str,
    gold: str,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    [problem] = load_problems(write(tmp_path / "data.jsonl", [row]), split="all")
    assert (problem.question, problem.answer) == (question, gold)
    assert "taken from the column" in caplog.text or "question" in row


def test_a_column_that_is_asked_for_is_never_replaced(tmp_path: Path) -> None:
    path = write(tmp_path / "data.jsonl", [{"problem": "2 + 2?", "answer": "4"}])
    with pytest.raises(DataError, match="no column 'query'"):
        load_problems(path, split="all", question_column="query")


@pytest.mark.parametrize("encoding", ["utf-16", "utf-32", "utf-8-sig", "utf-8"])
@pytest.mark.parametrize("suffix", [".csv", ".jsonl", ".json"])
def test_a_file_is_read_in_the_encodings_a_spreadsheet_saves(
    encoding: str, suffix: str, tmp_path: Path
) -> None:
    text = {
        ".csv": "question;answer;x\nWie viele Äpfel?;18;a\n;;\n",
        ".jsonl": '{"question": "Wie viele Äpfel?", "answer": "18"}\n',
        ".json": '[{"question": "Wie viele Äpfel?", "answer": "18"}]',
    }[suffix]
    path = tmp_path / f"data{suffix}"
    path.write_bytes(text.encode(encoding))
    [problem] = load_problems(path, split="all")
    assert (problem.question, problem.answer) == ("Wie viele Äpfel?", "18")


@pytest.mark.parametrize(
    ("data", "named"),
    [
        ('{"question": "How many?", "answer": "18"}'.encode("utf-16-le"), "UTF-16"),
        (b"\xff\xfe" + b"\x00\xd8", "not valid UTF-16"),
        ("question,answer\ncafé?,18\n".encode("latin-1"), "not valid UTF-8"),
    ],
)
def test_an_encoding_that_cannot_be_read_is_named(data: bytes, named: str, tmp_path: Path) -> None:
    path = tmp_path / ("data.csv" if b"," in data else "data.jsonl")
    path.write_bytes(data)
    with pytest.raises(DataError, match=named):
        load_problems(path, split="all")


def by_topic(completions: Any, topic: list[str], **columns: Any) -> list[float]:
    return [0.1 if one == "sums" else 0.0 for one in topic]


def test_other_columns_reach_rewards_by_name_and_never_under_a_name_that_is_taken(
    tmp_path: Path,
) -> None:
    rows = [*asked("4", "5"), {"question": "And?", "answer": "6", "difficulty": "hard"}]
    rows[0] |= {"topic": "sums", "prompt": "mine", "difficulty": "easy"}
    problems = load_problems(write(tmp_path / "data.jsonl", rows), split="all")
    made = to_dataset_rows(problems)
    assert [row["topic"] for row in made] == ["sums", None, None]
    assert all(isinstance(row["prompt"], list) and row["difficulty"] == 1 for row in made)
    found = audit(["default", by_topic], problems, thorough=False)
    assert "no_column" not in [finding.kind for finding in found.findings]
    without = [Problem(p.problem_id, p.question, p.solution, p.answer, 1) for p in problems]
    assert data_fingerprint(problems) != data_fingerprint(without)
