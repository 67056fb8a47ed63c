"""Files as programs write them: spreadsheets, old encodings, archives with another name."""

from __future__ import annotations

import csv
import io
import json
import logging
import os
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset, DatasetDict
from hypothesis import given
from hypothesis import strategies as st

from abacist.errors import DataError
from abacist.task.problems import Problem, load_problems

ROWS = [("Wie viel ist 5 × 8, Zoë?", "40"), ("Und 3 + 4?", "7"), ("Und 9 − 9?", "0")]
TABLE = "question,answer\n" + "".join(f'"{question}",{answer}\n' for question, answer in ROWS)
LINES = "".join(
    json.dumps({"question": question, "answer": answer}, ensure_ascii=False) + "\n"
    for question, answer in ROWS
)


def read(path: Path, **options: object) -> list[Problem]:
    return load_problems(path, split="all", **options)  # type: ignore[arg-type]


def pairs(problems: list[Problem]) -> list[tuple[str, str]]:
    return [(problem.question, problem.answer) for problem in problems]


def message_of(path: Path) -> str:
    with pytest.raises(DataError) as caught:
        read(path)
    return str(caught.value)


ENCODINGS = {
    "UTF-8 with a mark": lambda text: text.encode("utf-8-sig"),
    "UTF-16 as Excel and PowerShell write it": lambda text: b"\xff\xfe" + text.encode("utf-16-le"),
    "UTF-16, big end first": lambda text: b"\xfe\xff" + text.encode("utf-16-be"),
    "UTF-16 without a mark": lambda text: text.encode("utf-16-le"),
    "UTF-16, big end first, without a mark": lambda text: text.encode("utf-16-be"),
    "UTF-32": lambda text: text.encode("utf-32"),
    "UTF-32 without a mark": lambda text: text.encode("utf-32-le"),
    "UTF-32, big end first, without a mark": lambda text: text.encode("utf-32-be"),
}


@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize("suffix", ["csv", "tsv", "jsonl", "json"])
def test_every_unicode_encoding_is_read(encoding: str, suffix: str, tmp_path: Path) -> None:
    text = {
        "csv": TABLE.replace("\n", "\r\n"),
        "tsv": TABLE.replace(",4", "\t4").replace(",7", "\t7").replace(",0", "\t0")
                    .replace("question,answer", "question\tanswer"),
        "jsonl": LINES,
        "json": json.dumps([json.loads(line) for line in LINES.splitlines()], ensure_ascii=False),
    }[suffix]  # fmt: skip
    path = tmp_path / f"data.{suffix}"
    path.write_bytes(ENCODINGS[encoding](text))
    assert pairs(read(path)) == ROWS


def test_damage_in_utf_16_is_named_as_what_it_is(tmp_path: Path) -> None:
    path = tmp_path / "data.csv"
    path.write_bytes(b"\xff\xfe" + TABLE.encode("utf-16-le")[:-1])
    assert "is UTF-16, and damaged at byte" in message_of(path)


@pytest.mark.parametrize("suffix", ["csv", "jsonl"])
def test_windows_1252_is_named_with_the_letter_it_would_be(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"data.{suffix}"
    text = (TABLE if suffix == "csv" else LINES).replace("−", "-")
    path.write_bytes(text.encode("windows-1252"))
    message = message_of(path)
    assert "is not valid UTF-8 (byte 0xD7, “×” in Windows-1252, after " in message
    assert "ist 5 " in message and "save the file as UTF-8" in message
    (line,) = [number for number in (1, 2) if f"line {number}:" in message]
    assert line == (2 if suffix == "csv" else 1)


@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
@pytest.mark.parametrize("says_so", [False, True])
def test_the_delimiter_is_what_the_header_has(
    delimiter: str, says_so: bool, tmp_path: Path
) -> None:
    buffer = io.StringIO()
    csv.writer(buffer, delimiter=delimiter).writerows([("question", "answer"), *ROWS])
    path = tmp_path / "data.csv"
    start = f"sep={delimiter}\r\n" if says_so else ""
    path.write_text(start + buffer.getvalue(), encoding="utf-8", newline="")
    assert pairs(read(path)) == ROWS


def test_a_line_that_names_the_delimiter_counts_as_a_line(tmp_path: Path) -> None:
    path = tmp_path / "data.csv"
    path.write_text("sep=;\nquestion;answer\nOne?;1\nTwo?;many\n", encoding="utf-8")
    assert "line 4: the row has no gold: 'many'" in message_of(path)


def test_what_a_spreadsheet_leaves_at_the_edges_is_no_data(tmp_path: Path) -> None:
    path = tmp_path / "data.csv"
    path.write_text(
        ",question , answer,,\n0,One?,1,,\n1,Two?,2,,,,\n,,,,\n , ,,,\n", encoding="utf-8"
    )
    problems = read(path)
    assert pairs(problems) == [("One?", "1"), ("Two?", "2")]
    assert dict(problems[0].columns) == {"question": "One?"}
    path.write_text("question,answer\nOne?,1\nTwo?,\n", encoding="utf-8")
    assert "line 3: the row has an empty 'answer': ''" in message_of(path)


def test_an_unquoted_comma_shows_the_row_it_cut(tmp_path: Path) -> None:
    path = tmp_path / "data.csv"
    path.write_text("question,answer\nOne, or two?,1\n", encoding="utf-8")
    assert "3 fields, the header has 2: ['One', ' or two?', '1']" in message_of(path)


def test_a_column_named_twice_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "data.csv"
    path.write_text("question,answer,answer\nOne?,1,2\n", encoding="utf-8")
    assert "names the column 'answer' twice" in message_of(path)


@pytest.mark.parametrize(
    ("start", "said"),
    [(b"PK\x03\x04", "Excel"), (b"\x1f\x8b\x08", "gzip"), (b"PAR1", "Parquet")],
)
def test_what_is_no_text_is_named_whatever_its_name_says(
    start: bytes, said: str, tmp_path: Path
) -> None:
    for suffix in ("csv", "jsonl", "xlsx", "gz", "txt"):
        path = tmp_path / f"data.{suffix}"
        path.write_bytes(start + b"\x00\x14 more")
        assert said in message_of(path)


def test_an_excel_workbook_is_refused_with_the_way_to_save_it(tmp_path: Path) -> None:
    sheet = tmp_path / "data.xlsx"
    sheet.write_bytes(b"PK\x03\x04 and more")
    assert "CSV UTF-8" in message_of(sheet)
    sheet.write_bytes(b"")
    assert "cannot read a .xlsx file" in message_of(sheet)


def test_bytes_that_are_no_text_are_refused_at_once(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    path.write_bytes(b"\x00\x00\x00\x00" * 100)
    assert "is no text" in message_of(path)
    # One null byte is a damaged line, not a damaged file.
    path.write_bytes(LINES.encode() + b"\x00\n")
    assert pairs(read(path, skip_bad_rows=True)) == ROWS


def test_an_arrow_file_is_read_as_a_stream_is(tmp_path: Path) -> None:
    table = pa.table({"question": [q for q, _ in ROWS], "answer": [a for _, a in ROWS]})
    for name, open_writer in (("a.arrow", pa.ipc.new_file), ("b.arrow", pa.ipc.new_stream)):
        with open_writer(str(tmp_path / name), table.schema) as writer:
            writer.write_table(table)
        assert pairs(read(tmp_path / name)) == ROWS
    (tmp_path / "a.arrow").write_bytes(b"ARROW1 and no more")
    assert "not a readable Arrow file" in message_of(tmp_path / "a.arrow")


def test_a_value_that_python_cannot_hold_and_a_column_that_is_there_twice_are_refused(
    tmp_path: Path,
) -> None:
    columns = {"question": [q for q, _ in ROWS], "answer": [a for _, a in ROWS]}
    beyond = pa.array([2**45] * len(ROWS), pa.timestamp("s"))  # after the year 9999
    pq.write_table(pa.table({**columns, "when": beyond}), tmp_path / "a.parquet")
    assert "not a readable Parquet file" in message_of(tmp_path / "a.parquet")
    twice = pa.table([columns["question"], columns["answer"]] * 2, ["question", "answer"] * 2)
    pq.write_table(twice, tmp_path / "b.parquet")
    assert "has two columns 'question'" in message_of(tmp_path / "b.parquet")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes here")
def test_a_pipe_is_refused_and_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "data.jsonl")
    assert "is no regular file" in message_of(tmp_path / "data.jsonl")


def test_what_datasets_saved_to_disk_is_read(tmp_path: Path) -> None:
    data = Dataset.from_list([{"question": q, "answer": a} for q, a in ROWS])
    data.save_to_disk(str(tmp_path / "one"), num_shards=2)
    assert pairs(read(tmp_path / "one")) == ROWS
    with pytest.raises(DataError, match="no file for the split 'test'"):
        load_problems(tmp_path / "one", split="test")
    (tmp_path / "one" / "data-00001-of-00002.arrow").unlink()
    assert "of 2 shards only these are there" in message_of(tmp_path / "one")
    both = DatasetDict({"train": data, "test": data.select([0])})
    both.save_to_disk(str(tmp_path / "both"))
    (tmp_path / "both" / "train" / "cache-0a1b.arrow").write_bytes(b"not to be read")
    assert pairs(read(tmp_path / "both")) == ROWS
    assert pairs(load_problems(tmp_path / "both", split="test")) == ROWS[:1]


@given(st.binary(max_size=200), st.sampled_from(["csv", "tsv", "jsonl", "json", "arrow"]))
def test_any_bytes_are_read_or_refused(
    tmp_path_factory: pytest.TempPathFactory, data: bytes, suffix: str
) -> None:
    path = tmp_path_factory.mktemp("data") / f"data.{suffix}"
    path.write_bytes(data)
    logging.disable()
    try:
        read(path, skip_bad_rows=True)
    except DataError as error:
        assert str(path) in str(error)
    finally:
        logging.disable(logging.NOTSET)
