"""An evaluation drops nothing, derives every figure from its replies, and survives being kept."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from abacist.errors import DataError, RunError
from abacist.proof.comparison.compare import compare
from abacist.proof.evaluate import evaluate
from abacist.proof.evaluation import Evaluation
from abacist.proof.statistics import proportion
from abacist.records.rollout import StopReason, write_rollouts
from abacist.task.custom_rewards import checked
from abacist.task.problems import Problem
from abacist.task.reply import render_reply
from abacist.task.rewards import load_reward_funcs
from evaluated import BARE, GOOD, POLICY, SILENT, WORKLESS, WRONG, evaluation, problem, saying


def values(found: Evaluation) -> dict[str, float]:
    return {name: round(interval.value, 4) for name, interval in found.figures.items()}


def test_every_reply_becomes_a_rollout_in_the_order_of_the_problems() -> None:
    problems = [problem(n, difficulty=1 + n % 3) for n in range(3)]
    found = evaluation([[GOOD, WRONG], [BARE, GOOD], [SILENT, GOOD]], problems)
    places = [(r.problem_id, r.group, r.member) for r in found.rollouts]
    assert places == [
        ("p000", 0, 0), ("p000", 0, 1), ("p001", 1, 0),
        ("p001", 1, 1), ("p002", 2, 0), ("p002", 2, 1),
    ]  # fmt: skip
    assert [r.is_correct for r in found.rollouts] == [True, False, False, True, False, True]
    assert [r.read_answer for r in found.rollouts] == ["7", "8", None, "7", None, "7"]
    assert [r.difficulty for r in found.rollouts] == [1, 1, 2, 2, 3, 3]
    assert found.rollouts[4].stop_reason is StopReason.EMPTY
    assert found.rollouts[0].prompt_tokens == 1 and found.rollouts[0].gold == "7"
    assert found.settings.kind == "sampled"


def test_the_figures_count_what_they_name() -> None:
    found = evaluation([GOOD, WORKLESS, WRONG, BARE, f"{GOOD} and more", SILENT])
    shown = values(found)
    assert shown["correct"] == pytest.approx(3 / 6, abs=1e-4)
    assert shown["any_format"] == pytest.approx(4 / 6, abs=1e-4)
    assert shown["strict"] == pytest.approx(3 / 6, abs=1e-4)
    assert shown["shows_work"] == pytest.approx(3 / 6, abs=1e-4)
    assert shown["adheres"] == pytest.approx(2 / 6, abs=1e-4)
    assert shown["valid_steps"] == pytest.approx(2 / 6, abs=1e-4)
    assert shown["stopped"] == 1.0
    assert "format_consistency" not in shown
    assert found.accuracy == proportion([True] * 3 + [False] * 3)
    assert found.format_consistency is None and found.answer_consistency is None


def test_the_five_rewards_are_paid_to_every_reply_and_averaged() -> None:
    found = evaluation([GOOD, SILENT])
    names = ["correctness", "integer", "strict_format", "soft_format", "xml_count"]
    assert sorted(found.rewards) == sorted(names)
    assert found.rewards["correctness"].value == 1.0
    assert found.rollouts[0].rewards["correctness"] == 2.0
    total = sum(value or 0 for value in found.rollouts[0].rewards.values())
    assert found.rollouts[0].reward == pytest.approx(total)


def test_a_reply_that_uses_up_its_budget_is_not_stopped_and_one_without_words_is() -> None:
    found = evaluation(["word " * 60, SILENT, GOOD], max_completion_tokens=20)
    assert [mark.stopped for mark in found.marks] == [False, True, True]
    assert found.figures["completion_tokens"].value == pytest.approx(
        sum(r.completion_tokens for r in found.rollouts) / 3
    )


def test_consistency_is_by_problem_and_by_value() -> None:
    same_number = render_reply("3 + 4 = 7", "7.0")
    found = evaluation(
        [[GOOD, same_number], [GOOD, WRONG], [GOOD, BARE], [SILENT, SILENT], [WRONG, WRONG]]
    )
    assert found.format_consistency == proportion([True, True, False, False, True])
    assert found.answer_consistency == proportion([True, False, False, False, True])


def test_tables_split_the_problems_and_leave_out_unknown_structures() -> None:
    kinds = [(2, True), (1, False), (2, False), (3, None)]
    problems = [problem(n, steps, unseen) for n, (steps, unseen) in enumerate(kinds)]
    found = evaluation([GOOD, WRONG, WRONG, GOOD], problems)
    by_steps = [(row.label, row.n, row.accuracy.value) for row in found.by_difficulty()]
    assert by_steps == [("1 step", 1, 0.0), ("2 steps", 2, 0.5), ("3 steps", 1, 1.0)]
    by_structure = [(row.label, row.n, row.accuracy.value) for row in found.by_structure()]
    assert by_structure == [("seen structures", 2, 0.0), ("unseen structures", 1, 1.0)]
    assert evaluation([GOOD]).by_structure() == []


def test_what_is_asked_reaches_generate_and_the_settings() -> None:
    seen: dict[str, Any] = {}

    def generate(policy: Any, prompts: Any, **given: Any) -> Any:
        seen.update(given, prompts=prompts)
        return saying([[GOOD]])(policy, prompts, **given)

    calls: list[tuple[int, int]] = []
    found = evaluate(
        POLICY, [problem(0)], system_prompt="Be exact.", shots=[problem(1)],
        max_completion_tokens=33, batch_size=5, prefill="<reasoning>\n", seed=9,
        progress=lambda found: calls.append((found.ended, found.replies)),
        run_id="r", split="test", step=4, generate=generate,
    )  # fmt: skip
    assert [turn["role"] for turn in seen["prompts"][0]] == ["system", "user", "assistant", "user"]
    assert seen["max_completion_tokens"] == 33 and seen["batch_size"] == 5 and seen["seed"] == 9
    assert seen["prefill"] == found.settings.prefill == "<reasoning>\n"
    assert found.settings.num_shots == 1 and found.settings.kind == "greedy"
    rollout = found.rollouts[0]
    assert (rollout.run_id, rollout.split, rollout.step) == ("r", "test", 4)
    assert rollout.prompt_tokens == 4 + len("<reasoning>\n")
    assert calls == [(1, 1)]


def test_no_problems_or_two_under_one_id_are_refused() -> None:
    with pytest.raises(DataError, match="no problems"):
        evaluate(POLICY, [], max_completion_tokens=5)
    with pytest.raises(DataError, match="'p000'"):
        evaluate(POLICY, [problem(0), problem(0)], max_completion_tokens=5)


def test_a_kept_evaluation_is_the_same_evaluation(tmp_path: Path) -> None:
    problems = [problem(0, 2, True), problem(1, 1, False)]
    found = evaluation([[GOOD, BARE], [WRONG, SILENT]], problems, system_prompt="Be exact.")
    found.save(tmp_path / "evals" / "after")
    again = Evaluation.load(tmp_path / "evals" / "after")
    assert again.problems == found.problems and again.settings == found.settings
    assert again.marks == found.marks and again.figures == found.figures
    assert again.to_json() == found.to_json()
    kept = json.loads(
        (tmp_path / "evals" / "after" / "evaluation.json").read_text(encoding="utf-8")
    )
    assert kept["evaluation"]["figures"]["correct"]["value"] == 0.25


def test_a_damaged_or_missing_evaluation_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="no evaluation is kept there"):
        Evaluation.load(tmp_path)
    found = evaluation([GOOD, WRONG])
    found.save(tmp_path)
    write_rollouts(tmp_path / "rollouts.parquet", found.rollouts[:1])
    with pytest.raises(RunError, match=r"rollouts\.parquet"):
        Evaluation.load(tmp_path)
    for broken in ("{", "[]", '{"format_version": 1}', '{"format_version": 99}'):
        (tmp_path / "evaluation.json").write_text(broken, encoding="utf-8")
        with pytest.raises(RunError):
            Evaluation.load(tmp_path)


@pytest.mark.parametrize(
    ("place", "name", "value"),
    [
        ("problems", "difficulty", "x"),
        ("problems", "difficulty", 1.5),
        ("problems", "difficulty", True),
        ("problems", "question", None),
        ("problems", "unseen_structure", "yes"),
        ("problems", "columns", []),
        ("problems", "another", 1),
        ("settings", "temperature", None),
        ("settings", "temperature", float("nan")),
        ("settings", "temperature", 10**400),
        ("settings", "num_samples", "2"),
        ("settings", "num_samples", 0),
        ("settings", "system_prompt", 7),
    ],
)
def test_a_wrong_type_in_a_kept_evaluation_is_named(
    place: str, name: str, value: object, tmp_path: Path
) -> None:
    evaluation([GOOD]).save(tmp_path)
    kept = json.loads((tmp_path / "evaluation.json").read_text(encoding="utf-8"))
    entry = kept["problems"][0] if place == "problems" else kept["evaluation"]["settings"]
    entry[name] = value
    (tmp_path / "evaluation.json").write_text(json.dumps(kept), encoding="utf-8")
    named = r"rollouts\.parquet" if value == 0 and name == "num_samples" else name
    with pytest.raises(RunError, match=named):
        Evaluation.load(tmp_path)


def test_figures_that_nothing_is_known_about_are_null_in_json() -> None:
    found = evaluation([GOOD])
    unpaid = replace(found, rollouts=(replace(found.rollouts[0], rewards={"mine": None}),))
    assert unpaid.to_json()["figures"]["reward_mine"]["value"] is None
    json.dumps(unpaid.to_json(), allow_nan=False)


@given(st.lists(st.text(st.characters(), max_size=40), min_size=1, max_size=4))
@settings(max_examples=30, deadline=None)
def test_no_reply_can_break_an_evaluation(texts: list[str]) -> None:
    found = evaluation([text + "\ud800\x00</answer>" for text in texts])
    assert found.accuracy.value == 0 or "7" in "".join(texts)
    json.dumps(found.to_json(), allow_nan=False)


def lengths(
    prompts: Any, completions: Any, completion_ids: Any, hint: Any, **columns: Any
) -> list[float]:
    assert all(turns[0]["role"] == "assistant" for turns in completions)
    return [len(ids) + float(of or 0) for ids, of in zip(completion_ids, hint, strict=True)]


async def later(prompts: Any, completions: Any, **columns: Any) -> list[float | None]:
    return [None if columns["problem_id"][0] == "p001" else 1.0 for _ in completions]


def test_the_rewards_that_are_named_are_reported_with_the_columns_of_training() -> None:
    problems = [replace(problem(n), columns={"hint": 10 * n}) for n in range(2)]
    given = [*load_reward_funcs(["integer"]), checked(lengths), checked(later)]
    found = evaluation([GOOD, BARE], problems, rewards=given, reward_weights=[1.0, 0.0, 3.0])
    assert list(found.rewards) == ["integer", "lengths", "later"]
    ids = [len(rollout.completion_ids) for rollout in found.rollouts]
    assert [r.rewards["lengths"] for r in found.rollouts] == [ids[0], ids[1] + 10]
    assert [r.rewards["later"] for r in found.rollouts] == [1.0, None]
    assert [r.reward for r in found.rollouts] == [0.5 + 3.0, 0.0]
    assert "rewards" not in found.conditions


def test_a_reward_that_fails_costs_its_own_figures_and_no_reply() -> None:
    calls = []

    def fragile(prompts: Any, completions: Any, answer: Any, **columns: Any) -> list[float]:
        calls.append(answer[0])
        return [1.0 / (7 - int(answer[0]) + len(calls) % 2) for _ in completions]

    problems = [replace(problem(n), answer=gold) for n, gold in enumerate(["", "7", "7", "7"])]
    given = [checked(fragile, 0), *load_reward_funcs(["correctness"])]
    found = evaluation([GOOD] * 4, problems, rewards=given)
    # Without a gold a failure says nothing of the reward: in training there always is one.
    assert [r.rewards["fragile"] for r in found.rollouts] == [None, 1.0, None, None]
    assert "fragile" in found.conditions["rewards"]
    assert "ZeroDivisionError" in found.conditions["rewards"]
    assert [r.rewards["correctness"] for r in found.rollouts] == [None, 2.0, 2.0, 2.0]
    assert calls.count("7") <= 3 and len(found.rollouts) == 4


def test_the_historic_rewards_get_golds_without_commas_and_ours_the_same_value() -> None:
    of_thousand = replace(problem(0), answer="1,450")
    reply = render_reply("a", "1450")
    given = load_reward_funcs(["gist", "correctness"])
    found = evaluation([reply], [of_thousand], rewards=given)
    paid = found.rollouts[0].rewards
    assert paid["correctness_reward_func"] == paid["correctness"] == 2.0
    assert found.rollouts[0].gold == "1,450"


def test_no_rewards_is_a_choice_too() -> None:
    found = evaluation([GOOD], rewards=[])
    assert found.rewards == {} and found.rollouts[0].rewards == {} and found.accuracy.value == 1.0


def test_a_reply_to_which_no_reward_applies_has_no_reward_and_not_a_reward_of_zero() -> None:
    def of_the_first(prompts: Any, completions: Any, answer: Any, **_: Any) -> list[float | None]:
        return [None] * len(completions)

    none, zero = (
        evaluation([GOOD], rewards=rewards).rollouts[0]
        for rewards in ([of_the_first], [lambda completions, **_: [0.0] * len(completions)])
    )
    assert none.reward is None and zero.reward == 0.0


def test_under_its_native_prompt_every_figure_reads_the_form_that_was_asked_for(
    tmp_path: Path,
) -> None:
    replies = ["So it is \\boxed{7}.", "So it is \\boxed{8}."] * 3
    problems = [problem(n, difficulty=1 + n % 2) for n in range(6)]

    def bare_question(one: Problem) -> list[dict[str, str]]:
        return [{"role": "user", "content": one.question}]

    found = evaluation(replies, problems, native_messages=bare_question)
    found.save(tmp_path)
    for one in (found, Evaluation.load(tmp_path)):
        assert one.accuracy.value == 0.5 and one.own_form_accuracy == one.accuracy
        assert [row.accuracy.value for row in one.by_difficulty()] == [1.0, 0.0]
        assert [reply.is_correct for reply in one.rollouts] == [True, False] * 3
    change = compare(evaluation([WRONG] * 6, problems), found, allow_different=("prompt",))
    assert change.accuracy.after.value == change.after.figures["correct"].value == 0.5
