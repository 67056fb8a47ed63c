"""Faults in a data set, through the command line: row, reason and a way on, or a count."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from abacist.cli.main import main
from abacist.task.problems import load_problems
from faults import fault

pytestmark = pytest.mark.e2e

Captured = pytest.CaptureFixture[str]


def good(number: int) -> dict[str, Any]:
    return {
        "question": f"Ada has {number} pens and gets 2 more. How many pens are there?",
        "answer": f"{number}+2=<<{number}+2={number + 2}>>{number + 2}\n#### {number + 2}",
    }


GOOD = [json.dumps(good(number)).encode() for number in range(30)]


def row(**fields: Any) -> bytes:
    return json.dumps(good(99) | fields).encode()


def data(folder: Path, *bad: bytes) -> Path:
    """A file of good rows with the bad ones as lines 4, 5, …"""
    path = folder / "data.jsonl"
    path.write_bytes(b"".join(line + b"\n" for line in [*GOOD[:3], *bad, *GOOD[3:]]))
    return path


def train(path: Path, *flags: str) -> int:
    few = ["--max_steps", "1", "--num_heldout_problems", "0", "--num_selection_problems", "0"]
    few += ["--per_device_train_batch_size", "4", "--num_generations", "4"]
    few += ["--max_completion_length", "4", "--save_strategy", "no"]
    run = path.parent / "run"
    return main(["train", "--dataset_name", str(path), "--output_dir", str(run), *few, *flags])


BAD: dict[str, tuple[list[bytes], str]] = {
    "no ####": ([row(answer="It is seven.")], "line 4: the row has no gold"),
    "two ####": ([row(answer="#### 7\n#### 8")], "line 4: the row has #### twice"),
    "a gold that is no number": ([row(answer="x\n#### seven")], "line 4: .* no number: 'seven'"),
    "an empty gold": ([row(answer="x\n#### ")], "line 4: .* no number: ''"),
    "a null question": ([row(question=None)], "line 4: the row has an empty 'question'"),
    "an empty question": ([row(question=" \n")], "line 4: the row has an empty 'question'"),
    "a question that is no text": ([row(question=["a"])], "line 4: the row has a list in"),
    "bad UTF-8": ([b'{"question": "caf\xe9", "answer": "#### 1"}'], "line 4: .* valid UTF-8"),
    "a lone surrogate": ([b'{"question": "a\\ud800", "answer": "#### 1"}'], "line 4: .*surrogate"),
    "a lone surrogate in an id": ([row(id="\udfff")], "line 4: .* in its id .*surrogate"),
    "a lone surrogate in a column's name": ([row(**{"\ud800x": 1})],
                                            "line 4: .* in a column's name .*surrogate"),
    "a JSON line cut short": ([GOOD[7][:40]], "line 4: the row is not valid JSON"),
    "a row that is no object": ([b"[1, 2]"], "line 4: the row holds a list"),
    "a missing column": ([b'{"answer": "#### 1"}'], "line 4: the row has no column 'question'"),
    "a question that stands twice": ([GOOD[0]], "line 4: the row repeats .* line 1"),
    "a question of a megabyte": ([row(question="How many pens? " * 70_000)],
                                 "line 4: .* too long to be one: 1,049,999 characters"),
    "duplicate ids": ([row(id="a", question="One?"), row(id="a", question="Two?")],
                      "line 5: the row repeats the question or the id of .* line 4"),
}  # fmt: skip


@pytest.mark.parametrize(
    ("bad", "said"),
    [pytest.param(bad, said, id=name, marks=fault("data", name, "file, line and reason"))
     for name, (bad, said) in BAD.items()],
)  # fmt: skip
def test_a_bad_row_is_named_by_file_line_and_reason_before_anything_is_written(
    bad: list[bytes], said: str, tmp_path: Path, capsys: Captured
) -> None:
    path = data(tmp_path, *bad)
    assert train(path) == 1
    error = " ".join(capsys.readouterr().err.split())
    assert error.startswith(f"error: {path}, ") and error.count("error:") == 1
    assert "Traceback" not in error and "--skip_bad_rows" in error
    assert re.search(said, error), error
    assert not (tmp_path / "run").exists()


@fault("data", "any of these, with --skip_bad_rows",
       "how many rows are left out for which reason; the run goes on", 0)  # fmt: skip
def test_bad_rows_that_are_skipped_are_counted_by_reason(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = data(tmp_path, *(line for bad, _ in BAD.values() for line in bad))
    assert train(path, "--skip_bad_rows") == 0
    (said,) = [
        record.getMessage() for record in caplog.records if "left out" in record.getMessage()
    ]
    assert f"bad rows left out: {len(BAD)}" in said and "line 4: the row has no gold" in said
    for reason in (
        "1 × “has no gold”",
        "2 × “has a gold that is no number”",
        "1 × “is not valid UTF-8”",
        "2 × “has an empty 'question'”",
        "2 × “repeats the question or the id”",
    ):
        assert reason in said, (reason, said)


@fault("data", "U+2028 and other separators inside a record", "nothing: they are text", 0)
def test_a_line_separator_inside_a_record_ends_no_line(tmp_path: Path) -> None:
    question = "Ada\u2028has\u2029one\x85pen,\x0bor\x0ctwo?"
    path = data(
        tmp_path, json.dumps(good(99) | {"question": question}, ensure_ascii=False).encode()
    )
    (found,) = [one for one in load_problems(path, split="all") if "\u2028" in one.question]
    assert found.question == question and len(load_problems(path, split="all")) == 31


@fault("data", "a question that does not fit the model's context",
       "its id, its tokens and the context")  # fmt: skip
def test_a_question_longer_than_the_context_is_refused(tmp_path: Path, capsys: Captured) -> None:
    assert train(data(tmp_path, row(question="How many pens? " * 1000))) == 1
    error = capsys.readouterr().err
    assert "prompt of" in error and "context" in error and error.count("error:") == 1
    assert not (tmp_path / "run").exists()


@fault("data", "a train file and a test file that share a question",
       "both rows; a verdict on what was trained on would mean nothing")  # fmt: skip
def test_a_test_row_that_is_in_train_is_refused(tmp_path: Path, capsys: Captured) -> None:
    folder = tmp_path / "set"
    folder.mkdir()
    (folder / "train.jsonl").write_bytes(b"\n".join(GOOD))
    (folder / "test.jsonl").write_bytes(row(question="Another?") + b"\n" + GOOD[3])
    assert train(folder) == 1
    error = capsys.readouterr().err
    assert "train.jsonl, line 4: the row is in the test split too" in error
    assert "test.jsonl, line 2" in error and "Traceback" not in error
    problems = load_problems(folder, split="all")
    kept = [p for name in ("train", "selection", "heldout")
            for p in load_problems(folder, split=name, skip_bad_rows=True)]  # fmt: skip
    assert len(problems) == 30 and len(kept) == 29
    assert good(3)["question"] not in {problem.question for problem in kept}


@fault("data", "an empty file, or one in which every row is bad", "the file and its first fault")
def test_data_in_which_nothing_is_left_is_refused(tmp_path: Path, capsys: Captured) -> None:
    path = tmp_path / "data.jsonl"
    for content, said in ((b"", "no problems in it"), (b'{"question": ""}\n', "line 1")):
        path.write_bytes(content)
        assert train(path, "--skip_bad_rows") == 1
        assert said in capsys.readouterr().err
