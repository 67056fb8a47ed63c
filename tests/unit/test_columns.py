"""Whatever the columns are called, the right ones are taken, and it is said which."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from abacist.errors import DataError
from abacist.task import rows as task_rows
from abacist.task.columns import answer_in, question_in, turns
from abacist.task.problems import Problem, load_problems


@pytest.fixture(autouse=True)
def _say_again() -> None:
    task_rows._warn_once.cache_clear()


def read(folder: Path, *rows: dict[str, Any], **options: Any) -> list[Problem]:
    path = folder / "data.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return load_problems(path, split="all", **options)


def user(text: Any) -> dict[str, Any]:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, Any]:
    return {"role": "assistant", "content": text}


SHAPES: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "MATH": ({"problem": "1+1?", "solution": r"So $\boxed{2}$."}, ("problem", "solution")),
    "open-r1": ({"problem": "1+1?", "solution": "x", "answer": "2"}, ("problem", "solution")),
    "prompt and label": ({"prompt": "1+1?", "label": 2}, ("prompt", "label")),
    "ground truth": ({"prompt": "1+1?", "ground_truth": "2"}, ("prompt", "ground_truth")),
    "question and response": ({"question": "1+1?", "response": "#### 2"}, ("response",)),
    "MetaMath": ({"query": "1+1?", "response": "Sum.\n#### 2\nThe answer is: 2"},
                 ("query", "response")),
    "Alpaca": ({"instruction": "1+1?", "input": "", "output": "It is\n#### 2"},
               ("instruction", "not from 'input'", "output")),
    "a gold before a solution": ({"question": "1+1?", "label": 2, "response": "no idea"},
                                 ("'label'", "not from 'response'")),
    "OpenMathInstruct": ({"problem": "1+1?", "generated_solution": "x", "expected_answer": "2"},
                         ("problem", "expected_answer")),
    "target": ({"input": "1+1?", "target": "2"}, ("input", "target")),
    "capitals": ({"Question": "1+1?", "Answer ": "2"}, ("Question", "Answer ")),
    "chat messages": ({"messages": [user("1+1?"), assistant("#### 2")]}, ("messages",)),
    "a chat prompt": ({"prompt": [{"role": "system", "content": "Be brief."}, user("1+1?")],
                       "ground_truth": 2}, ("prompt", "ground_truth", "system turn of 1 is left")),
    "verl": ({"data_source": "g", "prompt": [user("1+1?")],
              "reward_model": {"style": "rule", "ground_truth": "2"}},
             ("prompt", "reward_model.ground_truth")),
    "ShareGPT": ({"conversations": [{"from": "human", "value": "1+1?"},
                                    {"from": "gpt", "value": "It is 2."}]}, ("conversations",)),
    "parts": ({"messages": [user([{"type": "text", "text": "1+1?"}]), assistant("2")]},
              ("messages",)),
}  # fmt: skip


@pytest.mark.parametrize("shape", SHAPES)
def test_usual_shapes_are_found_and_what_was_taken_is_said(
    shape: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    row, said = SHAPES[shape]
    (problem,) = read(tmp_path, row)
    assert problem.question == "1+1?" and "2" in problem.answer
    (message,) = [record.getMessage() for record in caplog.records]
    assert str(tmp_path / "data.jsonl") in message
    for word in said:
        assert word in message, message


def test_what_is_asked_for_is_taken_and_nothing_is_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    row = {"question": "1+1?", "answer": "2", "label": "3", "problem": "2+2?"}
    (problem,) = read(tmp_path, row)
    assert (problem.question, problem.answer) == ("1+1?", "2")
    (other,) = read(tmp_path, row, question_column="problem", answer_column="label")
    assert (other.question, other.answer) == ("2+2?", "3")
    said = [record.getMessage() for record in caplog.records]
    assert all("taken" not in message for message in said)


def test_a_wish_that_is_not_there_is_never_replaced(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no column 'gold_answer'"):
        read(tmp_path, {"question": "1+1?", "answer": "2"}, answer_column="gold_answer")
    with pytest.raises(DataError, match=r"no column 'question' \(its columns: text, value"):
        read(tmp_path, {"text": "1+1?", "value": "2"})


@pytest.mark.parametrize("name", ["Question", "QUESTION", " question "])
def test_a_name_that_was_given_is_taken_to_the_letter(name: str, tmp_path: Path) -> None:
    row = {name: "1+1?", "answer": "2", "query": "2+2?"}
    (problem,) = read(tmp_path, row)  # no name was given
    assert problem.question == "1+1?"
    (problem,) = read(tmp_path, row, question_column="query")
    assert problem.question == "2+2?"
    with pytest.raises(DataError, match="no column 'Query'"):
        read(tmp_path, row, question_column="Query")


def test_a_key_inside_a_column_is_taken_by_its_name(tmp_path: Path) -> None:
    row = {"question": "1+1?", "extra": {"final": "2"}, "answer": "3"}
    (problem,) = read(tmp_path, row, answer_column="extra.final")
    assert problem.answer == "2"
    with pytest.raises(DataError, match=r"no column 'extra\.first'"):
        read(tmp_path, row, answer_column="extra.first")


def test_where_several_columns_would_do_the_others_are_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    read(tmp_path, {"problem": "1+1?", "ground_truth": "2", "label": "easy"})
    assert "taken from 'ground_truth' (not from 'label')" in caplog.text


def test_a_column_in_some_rows_only_is_still_the_column(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="line 2: the row has no column 'answer'"):
        read(tmp_path, {"question": "1?", "answer": "1"}, {"question": "2?", "label": "2"})


def test_a_worked_solution_beside_a_bare_gold_serves_as_an_example(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    row = {"question": "1+1?", "solution": "First.\n1+1=2\n#### 2", "answer": "2"}
    (problem,) = read(tmp_path, row)
    assert (problem.solution, problem.difficulty) == ("First.\n1+1=2", 2)
    assert "worked solutions are taken from 'solution'" in caplog.text


def test_only_the_last_user_turn_is_asked_and_the_rest_is_counted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    longer = [user("1+1?"), assistant("2"), user("And 2+2?"), assistant("#### 4")]
    found = read(tmp_path, {"messages": longer}, {"messages": [user("3+3?"), assistant("6")]})
    assert [(p.question, p.answer) for p in found] == [("And 2+2?", "4"), ("3+3?", "6")]
    assert "what was said before it in 1 is left out" in caplog.text


def test_an_unanswered_chat_has_no_gold(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="has a list in 'messages', not text"):
        read(tmp_path, {"messages": [assistant("#### 2"), user("1+1?")]})


def test_a_list_of_one_gold_is_that_gold_and_of_two_none(tmp_path: Path) -> None:
    found = read(
        tmp_path, {"question": "1+1?", "answer": ["2"]}, {"question": "?", "answer": [2.5]}
    )
    assert [problem.answer for problem in found] == ["2", "2.5"]
    with pytest.raises(DataError, match=r"has a list in 'answer', not text: \['2', '3'\]"):
        read(tmp_path, {"question": "1+1?", "answer": ["2", "3"]})


@pytest.mark.parametrize(
    "value",
    [None, "text", [], ["a", "b"], [{"role": 1}], [{"role": "user"}], {}],
)
def test_what_is_no_chat_list_is_left_as_it_is(value: Any) -> None:
    assert turns(value) == [] and question_in(value) == value and answer_in(value) == value


def test_a_train_row_whose_question_is_tested_is_found_whatever_its_column(tmp_path: Path) -> None:
    for split in ("train", "test"):
        rows = [{"prompt": [user(f"Number {n}?")], "label": n} for n in range(5)]
        text = "".join(json.dumps(row) + "\n" for row in rows[: 1 if split == "test" else 5])
        (tmp_path / f"{split}.jsonl").write_text(text, encoding="utf-8")
    with pytest.raises(DataError, match="is in the test split too"):
        load_problems(tmp_path)
