"""Prompts: the layout asked for is the layout parsed, and no problem is its own example."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from abacist.errors import DataError, UsageError
from abacist.task.answers import is_integer_numeral, same_answer
from abacist.task.problems import Problem, load_problems
from abacist.task.prompts import (
    GIST_SHOT,
    SYSTEM_PROMPT,
    Shots,
    build_messages,
    choose_shots,
    load_shots,
    render_solution,
    save_shots,
    shots_path,
    to_dataset_rows,
)
from abacist.task.reply import parse_reply
from abacist.task.steps import valid_steps

GSM8K = Path(__file__).parents[3] / "shared" / "gsm8k"


def problem(number: int) -> Problem:
    return Problem(
        problem_id=f"p{number}",
        question=f"Ada has {number} eggs and finds 2. How many eggs has she?",
        solution=f"She has {number}+2=<<{number}+2={number + 2}>>{number + 2} eggs.",
        answer=str(number + 2),
        difficulty=1,
    )


PROBLEMS = [problem(number) for number in range(12)]


def roles(messages: list[dict[str, str]]) -> str:
    return "".join(message["role"][0] for message in messages)


def test_the_system_prompt_shows_the_very_layout_that_is_parsed() -> None:
    layout = SYSTEM_PROMPT[SYSTEM_PROMPT.index("<") :]
    assert parse_reply(layout).strict


@pytest.mark.parametrize("system_prompt", [None, ""])
def test_without_a_system_prompt_there_is_no_system_turn(system_prompt: str | None) -> None:
    assert build_messages("How many?", system_prompt=system_prompt) == [
        {"role": "user", "content": "How many?"}
    ]


def test_a_conversation_is_system_then_examples_then_the_question() -> None:
    messages = build_messages("How many?", shots=PROBLEMS[:2])
    assert roles(messages) == "suauau"
    assert messages[0]["content"] == SYSTEM_PROMPT
    assert messages[1]["content"] == PROBLEMS[0].question
    assert messages[2]["content"] == render_solution(PROBLEMS[0])
    assert messages[-1]["content"] == "How many?"


def test_an_example_is_a_perfect_reply_without_calculator_annotations() -> None:
    shot = render_solution(problem(3))
    assert "<<" not in shot and ">>" not in shot and "3+2=5 eggs." in shot
    assert parse_reply(shot).strict
    assert not shot.endswith("\n")


@pytest.mark.parametrize(
    ("gold", "shown"),
    [("1,450", "1450"), ("-3", "-3"), ("$18", "18"), ("18.00", "18"), ("1,000.50", "1000.50")],
)
def test_an_example_shows_its_gold_as_a_bare_numeral(gold: str, shown: str) -> None:
    example = dataclasses.replace(problem(1), answer=gold)
    reply = parse_reply(render_solution(example))
    assert reply.answer == shown
    assert same_answer(reply.answer, gold)


def test_every_gold_of_gsm8k_makes_a_perfect_example() -> None:
    if not GSM8K.is_dir():
        pytest.skip("the data of the project's lab (../shared/gsm8k) is not here")
    for example in load_problems(GSM8K, split="all") + load_problems(GSM8K, split="test"):
        reply = parse_reply(render_solution(example))
        assert reply.strict, example
        assert reply.answer is not None and is_integer_numeral(reply.answer)
        assert same_answer(reply.answer, example.answer), example


@settings(max_examples=50, deadline=None)
@given(count=st.integers(1, 11), seed=st.integers(0, 50), asked=st.integers(0, 11))
def test_a_problem_is_never_its_own_example_and_the_number_of_examples_holds(
    count: int, seed: int, asked: int
) -> None:
    shots = choose_shots(PROBLEMS, count, seed=seed)
    question = PROBLEMS[asked].question
    for wording in (question, question.upper().replace(" ", "  ")):
        messages = build_messages(wording, system_prompt=None, shots=shots)
        assert roles(messages) == "ua" * count + "u"
        assert question not in [message["content"] for message in messages[:-1]]


def test_an_example_with_the_asked_problems_id_makes_way_too() -> None:
    shots = Shots((problem(1), problem(2)), (problem(3),))
    shown = shots.for_question("Said in other words", problem_id="p2")
    assert shown == [problem(1), problem(3)]


def test_without_a_spare_the_example_is_left_out() -> None:
    assert roles(build_messages(problem(1).question, shots=[problem(1), problem(2)])) == "suau"


def test_examples_depend_on_seed_and_ids_and_not_on_order() -> None:
    five = choose_shots(PROBLEMS, 5, seed=1)
    assert five == choose_shots(PROBLEMS[::-1], 5, seed=1) == choose_shots(PROBLEMS, "5", seed=1)
    assert five != choose_shots(PROBLEMS, 5, seed=2)
    assert five.chosen == choose_shots(PROBLEMS, 7, seed=1).chosen[:5]
    assert len(five) == 5 and len(five.spares) == 1


def test_excluded_and_unusable_problems_are_passed_over() -> None:
    without_work = dataclasses.replace(problem(20), solution="")
    with_a_tag = dataclasses.replace(problem(21), solution="So </reasoning> it is.")
    pool = [without_work, with_a_tag, *PROBLEMS]
    shots = choose_shots(pool, 10, seed=4, exclude=["p0", "p1"])
    assert {shot.problem_id for shot in shots.chosen} == {f"p{n}" for n in range(2, 12)}
    assert shots.spares == ()


def test_too_few_worked_solutions_is_an_error() -> None:
    with pytest.raises(DataError, match=r"13 examples were asked for, but only 12 of 12"):
        choose_shots(PROBLEMS, 13)


@pytest.mark.parametrize("num_shots", [-1, "-1", "two", "", "gists"])
def test_a_number_of_examples_that_is_none_is_a_usage_error(num_shots: int | str) -> None:
    with pytest.raises(UsageError, match="gist"):
        choose_shots(PROBLEMS, num_shots)


def test_no_examples_need_no_problems() -> None:
    assert choose_shots([], 0) == choose_shots([], "0") == Shots()


def test_the_gists_one_shot_needs_no_problems_and_is_a_perfect_single_line_example() -> None:
    shots = choose_shots([], "gist")
    assert shots == Shots((GIST_SHOT,))
    reply = parse_reply(render_solution(GIST_SHOT))
    assert reply.strict and reply.answer == "7"
    assert reply.reasoning is not None and "\n" not in reply.reasoning


def test_dataset_rows_hold_what_trl_needs_and_nothing_of_the_solution() -> None:
    rows = to_dataset_rows(PROBLEMS, system_prompt=None, shots=choose_shots(PROBLEMS, 2))
    assert [set(row) for row in rows] == [{"prompt", "answer", "problem_id", "difficulty"}] * 12
    for row, asked in zip(rows, PROBLEMS, strict=True):
        prompt = row["prompt"]
        assert isinstance(prompt, list) and roles(prompt) == "uauau"
        assert (row["answer"], row["problem_id"]) == (asked.answer, asked.problem_id)
        assert render_solution(asked) not in [message["content"] for message in prompt]


def test_examples_may_come_from_a_file(tmp_path: Path) -> None:
    path = tmp_path / "shots.csv"
    path.write_text('question,answer\nTwo and two?,"2+2=<<2+2=4>>4\n#### 4"\n', encoding="utf-8")
    shots = choose_shots(load_problems(path, split="all"), 1)
    assert "\n2+2=4\n" in render_solution(shots.chosen[0])


def test_saved_examples_come_back_as_they_were_with_their_spare(tmp_path: Path) -> None:
    shots = choose_shots([problem(n) for n in range(9)], 3, seed=1)
    save_shots(tmp_path / "shots.jsonl", shots)
    assert load_shots(tmp_path / "shots.jsonl") == shots


def test_examples_may_stand_in_any_file_that_problems_may(tmp_path: Path) -> None:
    path = tmp_path / "shots.csv"
    text = 'question;answer\nOne?;"1+0=1\n#### 1"\nTwo?;"1+1=2\n#### 2"\n'
    path.write_bytes(text.encode("utf-16"))
    shots = load_shots(path)
    assert [shot.answer for shot in shots.chosen] == ["1", "2"] and not shots.spares


def test_the_worked_examples_that_come_with_the_package_are_right_step_by_step() -> None:
    shots = load_shots(shots_path("steps"))
    assert len(shots.all) >= 4
    for shot in shots.all:
        reply = parse_reply(render_solution(shot))
        assert reply.strict and same_answer(reply.answer, shot.answer)
        assert valid_steps(reply.reasoning)


def test_a_path_is_meant_where_no_built_in_examples_have_that_name(tmp_path: Path) -> None:
    assert shots_path(str(tmp_path / "steps")) == tmp_path / "steps"
    assert shots_path("./steps") == Path("steps")
