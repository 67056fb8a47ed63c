"""Golds as people write them: one rule wherever they stand, and doubt is said, not decided."""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import suppress
from decimal import Decimal
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from abacist.errors import DataError, UsageError
from abacist.task.answers import read_answer, same_answer
from abacist.task.boxes import MAX_BOXES, boxes
from abacist.task.golds import (
    DecimalMark,
    Gold,
    GoldError,
    doubt_about_mark,
    find_gold,
    settled,
    with_point,
)
from abacist.task.problems import Problem, load_problems
from abacist.task.sources import MAX_SHOWN_CHARS, shown


def problems(folder: Path, golds: Sequence[object], **options: object) -> list[Problem]:
    path = folder / "golds.jsonl"
    rows = [{"question": f"Number {n}?", "answer": gold} for n, gold in enumerate(golds)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return load_problems(path, split="all", **options)  # type: ignore[arg-type]


def golds(folder: Path, given: Sequence[object], **options: object) -> list[str]:
    return [problem.answer for problem in problems(folder, given, **options)]


AS_A_REPLY = {
    "12 apples": "12",
    "$18.50": "18.5",
    "18 €": "18",
    "75%": "75",
    r"\boxed{12}": "12",
    r"$\boxed{\frac{3}{4}}$": "3/4",
    "The answer is 12.": "12",
    "**1,450**": "1450",
    "−7": "-7",
    "5 + 7 = 12": "12",
    "2.5 million": "2500000",
    "USD 40": "40",
}


@pytest.mark.parametrize("marked", [False, True])
@pytest.mark.parametrize("gold", AS_A_REPLY)
def test_a_gold_is_read_as_a_reply_is_with_and_without_a_mark(
    gold: str, marked: bool, tmp_path: Path
) -> None:
    (problem,) = problems(tmp_path, [f"Work.\n#### {gold}" if marked else gold])
    assert same_answer(AS_A_REPLY[gold], problem.answer)
    assert same_answer(problem.answer, problem.answer)


@pytest.mark.parametrize("marked", [False, True])
@pytest.mark.parametrize("gold", ["12 or 13", "about 12", "twelve", "12, 13", "5 + 7", "n/a"])
def test_what_commits_to_no_number_is_no_gold_and_is_shown(
    gold: str, marked: bool, tmp_path: Path
) -> None:
    with pytest.raises(DataError) as caught:
        problems(tmp_path, ["4", f"Work.\n#### {gold}" if marked else gold])
    assert "line 2" in str(caught.value)
    assert repr(gold) in str(caught.value) and "'answer'" in str(caught.value)


def test_a_solution_that_ends_in_a_box_holds_its_gold_there(tmp_path: Path) -> None:
    worked = "First \\boxed{12} is found.\nSo the answer is $\\boxed{\\text{12 cm}}$."
    (problem,) = problems(tmp_path, [worked])
    assert same_answer("12", problem.answer) and problem.solution == worked
    assert problem.difficulty == 2


def test_a_reply_in_the_layout_is_a_solution_with_its_gold(tmp_path: Path) -> None:
    reply = "<reasoning>\n5 + 7 = 12\n</reasoning>\n<answer>\n12\n</answer>"
    (problem,) = problems(tmp_path, [reply])
    assert (problem.solution, problem.answer) == ("5 + 7 = 12", "12")


def test_a_sentence_that_repeats_the_marked_gold_is_no_second_gold(tmp_path: Path) -> None:
    assert golds(tmp_path, ["Work.\n#### 110\nThe answer is: 110"]) == ["110"]
    with pytest.raises(DataError, match="no number"):
        golds(tmp_path, ["Work.\n#### 110\nThe answer is: 111"])


def test_an_answer_block_whose_box_agrees_is_read_and_its_gold_is_its_text(tmp_path: Path) -> None:
    (problem,) = problems(tmp_path, ["<answer>\n\\boxed{12}\n</answer>"])
    assert same_answer("12", problem.answer) and problem.solution == ""
    with pytest.raises(DataError, match="has no gold"):  # two blocks that disagree are none
        problems(tmp_path, ["<answer>12</answer> <answer>13</answer>"])


def test_several_boxes_must_agree(tmp_path: Path) -> None:
    agree = "First \\boxed{1/2}.\nSo \\fbox{0.5}."
    assert golds(tmp_path, [agree, r"Half: \boxed{\boxed{4}}"]) == ["0.5", r"\boxed{4}"]
    with pytest.raises(DataError, match=r"several \\boxed\{\} that do not agree in 'answer'"):
        golds(tmp_path, ["First \\boxed{12}.\nSo \\boxed{13}."])


@given(st.text(alphabet="\\\\boxedf{} 12", max_size=200))
def test_what_a_box_holds_stands_in_the_text_with_its_braces_matched(text: str) -> None:
    for inside in boxes(text):
        assert inside in text
        assert inside.replace(r"\{", "").count("{") == inside.replace(r"\}", "").count("}")


@pytest.mark.parametrize("text", [r"\boxed{", r"\boxed{{", r"\boxed{7}", "{}", r"\boxed{7\}"])
def test_boxes_are_found_in_linear_time_and_bounded_number(text: str) -> None:
    found = boxes(text * 50_000 + r"\boxed{5}")
    assert found[-1] == "5" and len(found) <= MAX_BOXES


def test_boxes_nest_and_unclosed_ones_hold_nothing() -> None:
    assert find_gold(r"Thus \boxed{\frac{1}{2}}") == Gold(
        r"Thus \boxed{\frac{1}{2}}", r"\frac{1}{2}", False
    )
    assert find_gold(r"Thus \boxed{12") == Gold("", r"Thus \boxed{12", False)


@given(st.text(alphabet="0123456789.,#\\boxed{}$ \nab<>/answer", max_size=120))
def test_any_text_has_a_gold_or_a_reason_and_never_raises(text: str) -> None:
    try:
        found = find_gold(text)
    except GoldError as reason:
        assert "\n" not in str(reason)
        return
    doubt_about_mark([("row 1", found.text)], "data", "answer")
    marks: tuple[DecimalMark, ...] = ("auto", "point", "comma")
    for mark in marks:
        with suppress(GoldError):
            assert read_answer(settled(found, "answer", mark)) is not None


@given(st.text(max_size=200))
def test_no_text_makes_the_question_of_the_decimal_mark_raise(text: str) -> None:
    doubt_about_mark([("row 1", text), ("row 2", text)], "data", "answer")
    with_point(text)


# Numbers that come as numbers.


def test_numbers_keep_every_digit_they_have_and_no_more(tmp_path: Path) -> None:
    given_ = [0.1, 0.3333333333333333, 1e-05, 2e16, 12.0, -3, 1e22, 2.5, 10**15]
    found = golds(tmp_path, given_)
    assert found[:2] == ["0.1", "0.3333333333333333"] and found[4] == "12"
    for number, gold in zip(given_, found, strict=True):
        assert read_answer(gold) is not None and float(gold) == number


@pytest.mark.parametrize("kind", [pa.float32(), pa.float16()], ids=str)
@pytest.mark.parametrize("suffix", ["parquet", "arrow"])
def test_a_narrow_float_column_gives_the_decimals_that_were_stored(
    kind: pa.DataType, suffix: str, tmp_path: Path
) -> None:
    import numpy as np

    numbers = [0.1, 0.7, 12.0, 2.125, -3.5, 1024.0]
    scalar = np.float32 if kind == pa.float32() else np.float16
    table = pa.table(
        {
            "question": [f"Number {n}?" for n in range(len(numbers))],
            "answer": pa.array(list(map(scalar, numbers)), type=kind),
            "weight": pa.array(list(map(scalar, numbers)), type=kind),
        }
    )
    path = tmp_path / f"data.{suffix}"
    if suffix == "parquet":
        pq.write_table(table, path)
    else:
        with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, table.schema) as writer:
            writer.write_table(table)
    found = load_problems(path, split="all")
    assert [p.answer for p in found] == ["0.1", "0.7", "12", "2.125", "-3.5", "1024"]
    assert [p.columns["weight"] for p in found] == numbers


def test_whole_numbers_in_a_float_column_with_gaps_are_whole(tmp_path: Path) -> None:
    path = tmp_path / "data.parquet"
    columns = {
        "question": ["One?", "Two?"],
        "answer": [12.0, float("nan")],
        "id": [float("nan")] * 2,
    }
    pq.write_table(pa.table(columns), path)
    with pytest.raises(DataError, match="row 2: the row has an empty 'answer': nan"):
        load_problems(path, split="all")
    (problem,) = load_problems(path, split="all", skip_bad_rows=True)
    assert problem.answer == "12" and problem.problem_id != "nan"


def test_a_decimal_column_keeps_its_digits(tmp_path: Path) -> None:
    path = tmp_path / "data.parquet"
    pq.write_table(pa.table({"question": ["One?"], "answer": [Decimal("12.50")]}), path)
    (problem,) = load_problems(path, split="all")
    assert problem.answer == "12.50"


# Which decimal mark.

IN_DOUBT = [
    ["3,5", "7"],
    ["3.500", "12.000"],
    ["1.234,50", "12"],
    ["1,450", "3.500"],
    ["3.500"],
    ["1.500 kg", "7"],
    ["0,125"],
    ["1.234.567", "5"],
    ["3,5 kg", "2.25 kg"],
    ["12,50 €"],
]
NO_DOUBT = [
    ["1,450", "12"],
    ["0.75", "3.500", "1,450"],
    ["1,234.50", "3.500"],
    ["12", "7"],
    ["1,234,567", "2.125"],
    ["$18", "3/4", "50%"],
]


@pytest.mark.parametrize("given_", IN_DOUBT, ids=" ".join)
def test_golds_that_contradict_a_decimal_point_are_shown_and_a_flag_decides(
    given_: list[str], tmp_path: Path
) -> None:
    with pytest.raises(DataError) as caught:
        golds(tmp_path, given_)
    message = str(caught.value)
    assert "golds.jsonl" in message and "'answer'" in message and "line 1: " in message
    assert "--decimal_mark comma" in message and "--decimal_mark point" in message
    assert repr(given_[0]) in message
    # Not even where bad rows are left out: they would be left out, or misread, silently.
    with pytest.raises(DataError, match="decimal_mark"):
        golds(tmp_path, given_, skip_bad_rows=True)


@pytest.mark.parametrize("given_", NO_DOUBT, ids=" ".join)
def test_golds_that_fit_a_decimal_point_are_read_so_without_a_question(
    given_: list[str], tmp_path: Path
) -> None:
    assert golds(tmp_path, given_) == given_


def test_the_flag_decides_either_way(tmp_path: Path) -> None:
    written = ["3,5", "1.234,50", "12.000", "7", "1.234.567", "12,50 €"]
    assert golds(tmp_path, written, decimal_mark="comma") == [
        "3.5", "1234.50", "12000", "7", "1234567", "12.50 €",
    ]  # fmt: skip
    assert golds(tmp_path, ["3.500", "12.000"], decimal_mark="point") == ["3.500", "12.000"]
    with pytest.raises(DataError, match="'3,5'"):
        golds(tmp_path, ["12", "3,5"], decimal_mark="point")


@pytest.mark.parametrize("gold", ["3.5", "1,234.5", "1,2,3", "12.34,5"])
def test_with_a_decimal_comma_a_point_only_groups_thousands(gold: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="decimal comma"):
        golds(tmp_path, [gold], decimal_mark="comma")


def test_numbers_that_come_as_numbers_have_no_decimal_mark_to_ask_for(tmp_path: Path) -> None:
    assert golds(tmp_path, [3.5, 12.125]) == ["3.5", "12.125"]
    assert golds(tmp_path, [3.5, "1,5"], decimal_mark="comma") == ["3.5", "1.5"]


def test_behind_the_mark_a_comma_in_a_proper_group_is_thousands_whatever_the_flag(
    tmp_path: Path,
) -> None:
    marked = ["Work.\n#### 1,450", "Work.\n#### 2,125,000", "Work.\n#### 3.500", "Work.\n#### 7"]
    assert golds(tmp_path, marked) == ["1,450", "2,125,000", "3.500", "7"]
    for mark in ("point", "comma"):
        assert golds(tmp_path, marked[:2], decimal_mark=mark) == ["1,450", "2,125,000"]
    assert golds(tmp_path, ["Work.\n#### 3,5"], decimal_mark="comma") == ["3.5"]
    with pytest.raises(DataError, match="no number: '3,5'"):
        golds(tmp_path, ["Work.\n#### 3,5"])


def test_a_pair_in_brackets_is_no_decimal_comma(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no gold: '\(3,5\)'"):
        golds(tmp_path, ["7", "(3,5)"])


def test_an_unknown_decimal_mark_is_a_usage_error(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="decimal mark"):
        golds(tmp_path, ["7"], decimal_mark="dot")


@given(st.integers(0, 10**9), st.integers(0, 999))
def test_a_number_written_with_a_comma_is_the_same_number(whole: int, thousandths: int) -> None:
    german = f"{whole:,}".replace(",", ".") + f",{thousandths:03}"
    written = with_point(german)
    assert written is not None and read_answer(written) == read_answer(f"{whole}.{thousandths:03}")


# What is said of many bad rows.


def test_all_bad_golds_are_counted_with_examples(tmp_path: Path) -> None:
    with pytest.raises(DataError) as caught:
        golds(tmp_path, ["4", "many", "few", "5", "", "none", "lots"])
    message = str(caught.value)
    assert (
        "5 rows are bad: 4 × “has no gold” (line 2: 'many', line 3: 'few', line 6: 'none', …)"
        in (message)
    )
    assert "1 × “has an empty 'answer'” (line 5: '')" in message


@given(st.text(), st.integers(0, 3))
def test_a_shown_value_is_short_and_on_one_printable_line(text: str, depth: int) -> None:
    value: object = text * 50
    for _ in range(depth):
        value = [value] * 20
    said = shown(value)
    assert len(said) <= 2 * MAX_SHOWN_CHARS and "\n" not in said and said.isprintable()


# Through a file, as people have it.


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return path


def read(path: Path, **how: Any) -> list[str]:
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
            read(path)
        assert repr(cell) in refused.value.message  # the value is shown
        return
    [gold] = read(path)
    assert same_answer(right, gold) and not same_answer(wrong, gold)


@pytest.mark.parametrize("cell", ["twelve or so", "12 or 13", "#### 3, 4", "x" * 500, "3\n4"])
def test_a_gold_that_no_reply_can_match_is_refused_with_its_value_and_line(
    cell: str, tmp_path: Path
) -> None:
    path = write(tmp_path / "data.jsonl", asked("7", cell))
    with pytest.raises(DataError) as refused:
        read(path)
    shown = cell.removeprefix("#### ")[:20].split("\n")[0]
    assert "line 2" in refused.value.message and shown in refused.value.message
    assert len(refused.value.message) < 300
    assert read(path, skip_bad_rows=True) == ["7"]


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
    assert read(tmp_path / "data.parquet") == [gold]


def test_a_column_of_typed_numbers_is_never_taken_for_one_with_decimal_commas(
    tmp_path: Path,
) -> None:
    columns = {"question": ["a?", "b?"], "answer": pa.array([3.125, 12.375], pa.float64())}
    pq.write_table(pa.table(columns), tmp_path / "data.parquet")
    assert read(tmp_path / "data.parquet") == ["3.125", "12.375"]


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
        read(path)
    assert "'answer'" in refused.value.message and "line" in refused.value.message
    assert "--decimal_mark comma" in refused.value.hint
    assert read(path, decimal_mark="comma") == by_comma


@pytest.mark.parametrize(
    "cells",
    [["1,200", "7"], ["1,234.50", "2.5"], ["3.500", "0.25"], ["12.000", "1.5"]],
)
def test_golds_that_a_point_explains_are_read_without_a_question(
    cells: list[str], tmp_path: Path
) -> None:
    assert read(write(tmp_path / "data.jsonl", asked(*cells))) == cells


def test_behind_the_mark_a_comma_is_thousands_whatever_other_rows_hold(tmp_path: Path) -> None:
    path = write(
        tmp_path / "data.jsonl", asked("so\n#### 1,200", "so\n#### 3.500", "so\n#### 12.000")
    )
    assert read(path) == ["1,200", "3.500", "12.000"]
