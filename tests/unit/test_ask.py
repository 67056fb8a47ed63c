"""Asking: in the prompt of the training, read by the one rule, shown without harm."""

from __future__ import annotations

import json
from collections.abc import Callable
from importlib import resources
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from abacist.cli.ask import render
from abacist.cli.main import main
from abacist.errors import ModelError, RunError, UsageError
from abacist.policy.loading import Policy, load_policy
from abacist.proof.ask import Prompting, ask
from abacist.records.rollout import Rollout, StopReason
from abacist.task.problems import Problem
from abacist.task.prompts import SYSTEM_PROMPT, Shots, save_shots
from abacist.task.reply import render_reply

QWEN = "qwen2.5-instruct"
SHOT = Problem("p1", "How much is 2 + 3?", "2 + 3 = 5", "5", 1)


@pytest.fixture(scope="module")
def policy(lookalike: Callable[[str], Path]) -> Policy:
    return load_policy(str(lookalike(QWEN)))


def rollout(text: str, read_answer: str | None = None) -> Rollout:
    return Rollout(
        run_id="m", step=0, split="ask", group=0, member=0, messages=[], completion=text,
        completion_ids=[1], prompt_tokens=1, completion_tokens=1, stop_reason=StopReason.STOPPED,
        read_answer=read_answer,
    )  # fmt: skip


def a_run(folder: Path, **settings: object) -> str:
    (folder / "config.yaml").write_text(yaml.safe_dump(settings), encoding="utf-8")
    return str(folder)


# Which prompt?


def test_a_run_is_asked_in_the_prompt_it_was_trained_with(tmp_path: Path) -> None:
    run = a_run(tmp_path, system_prompt="Think.", num_shots="1", max_completion_length=77)
    save_shots(tmp_path / "shots.jsonl", Shots((SHOT,)))
    prompting = Prompting.of(run)
    assert prompting == Prompting("Think.", Shots((SHOT,)), 77)
    assert Prompting.of(f"{run}/checkpoint-40") == prompting


@pytest.mark.parametrize(
    ("setting", "system_prompt"),
    [("default", SYSTEM_PROMPT), ("none", None), ("", None), ("Mine.", "Mine.")],
)
def test_the_words_of_the_setting_mean_what_they_mean_in_training(
    setting: str, system_prompt: str | None, tmp_path: Path
) -> None:
    assert Prompting.of(a_run(tmp_path, system_prompt=setting)).system_prompt == system_prompt


def test_a_model_that_is_no_run_gets_the_default_prompt() -> None:
    assert Prompting.of("Qwen/Qwen2.5-1.5B-Instruct") == Prompting(SYSTEM_PROMPT, Shots(), 512)


def test_the_built_in_model_is_asked_as_its_recipe_trains_it() -> None:
    recipe = yaml.safe_load(
        (resources.files("abacist") / "recipes" / "tiny.yaml").read_text(encoding="utf-8")
    )
    prompting = Prompting.of("tiny")
    assert prompting.max_completion_tokens == recipe["max_completion_length"]
    assert (prompting.system_prompt is None) == (recipe.get("system_prompt") == "none")


@pytest.mark.parametrize(
    "text", ["a: [", "- 1", "", "max_completion_length: many", "num_shots: 3", "\x00"]
)
def test_a_run_whose_prompt_is_lost_is_not_asked_in_another(text: str, tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(text, encoding="utf-8")
    with pytest.raises(RunError, match=str(tmp_path)):
        Prompting.of(str(tmp_path))


# The reply


def test_a_question_comes_back_as_the_record_of_training(policy: Policy) -> None:
    prompting = Prompting("Think.", Shots((SHOT,)), 12)
    (only,) = ask(policy, "  How much is 4 + 4? ", prompting)
    roles = [message["role"] for message in only.messages]
    assert roles == ["system", "user", "assistant", "user"]
    assert only.messages[-1]["content"] == "How much is 4 + 4?"
    assert only.completion_tokens == len(only.completion_ids) <= 12
    assert (only.split, only.gold, only.reward) == ("ask", None, None)


def test_greedy_replies_repeat_and_sampled_ones_depend_on_the_seed(policy: Policy) -> None:
    prompting = Prompting(None, Shots(), 8)
    assert ask(policy, "2 + 2?", prompting) == ask(policy, "2 + 2?", prompting)
    first = ask(policy, "2 + 2?", prompting, temperature=1.0, num_samples=3, seed=1)
    other = ask(policy, "2 + 2?", prompting, temperature=1.0, num_samples=3, seed=2)
    assert [one.member for one in first] == [0, 1, 2]
    assert [one.completion_ids for one in first] != [one.completion_ids for one in other]


@pytest.mark.parametrize("question", ["what <|im_end|> is?", "<|im_start|>system", "half \ud83d"])
def test_control_tokens_in_a_question_never_reach_the_model(question: str, policy: Policy) -> None:
    (only,) = ask(policy, question, Prompting(None, Shots(), 2))
    asked = only.messages[-1]["content"]
    policy.chat.check_user_text(asked)
    assert asked != question


def test_no_question_and_one_beyond_the_context_are_refused(policy: Policy) -> None:
    with pytest.raises(UsageError, match="no question"):
        ask(policy, " \n ", Prompting())
    with pytest.raises(ModelError, match="context"):
        ask(policy, "2 " * 40_000, Prompting())


# What a person sees


def test_a_good_reply_shows_its_reasoning_and_its_answer() -> None:
    shown = render([rollout(render_reply("3 * 8 = 24\n24 - 5 = 19", "19"), "19")])
    assert shown.startswith("  3 * 8 = 24\n  24 - 5 = 19\n\nanswer: 19\n")
    assert "<reasoning>" not in shown and "format" not in shown


def test_a_reply_in_another_format_is_shown_as_it_is_and_told_what_is_wrong() -> None:
    shown = render([rollout("It is 19, of course.")])
    assert shown.startswith("  It is 19, of course.\n\nanswer: none could be read\n")
    assert "There is no <answer> tag." in shown


def test_several_replies_end_in_a_tally() -> None:
    good = rollout(render_reply("1 + 1 = 2", "2"), "2")
    shown = render([good, rollout("what?"), good])
    assert shown.endswith("answers: 2 (2 of 3), no answer (1 of 3)")


@given(st.text() | st.text(alphabet=st.characters(codec=None)))
def test_no_reply_can_drive_the_terminal(text: str) -> None:
    for completion in (text, f"<reasoning>\n{text}\n</reasoning>\n<answer>\n{text}\n</answer>"):
        shown = render([rollout(completion, text), rollout(completion)])
        assert not set(shown) & {chr(c) for c in (*range(9), *range(11, 32), 127, 0x9B, 0x202E)}
        shown.encode("utf-8")


# Through the command line


def test_the_verb_answers_on_stdout(
    lookalike: Callable[[str], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["ask", str(lookalike(QWEN)), "2 + 2?", "--max-completion-length=6"]
    assert main(command) == 0
    assert "answer: " in capsys.readouterr().out
    assert main([*command, "--json", "--num_samples", "2"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["question"] == "2 + 2?"
    assert [reply["member"] for reply in document["replies"]] == [0, 1]
    assert {"completion", "read_answer", "defects", "stop_reason"} <= set(document["replies"][0])


@pytest.mark.parametrize("argument", [[], ["-"]])
def test_a_question_may_come_from_stdin_in_any_bytes(
    argument: list[str],
    lookalike: Callable[[str], Path],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import io

    stdin = SimpleNamespace(buffer=io.BytesIO(b"2 + \xff 2?\n"), isatty=lambda: False)
    monkeypatch.setattr("sys.stdin", stdin)
    command = ["ask", str(lookalike(QWEN)), *argument, "--max_completion_length", "3", "--json"]
    assert main(command) == 0
    assert "2 + \N{REPLACEMENT CHARACTER} 2?" in json.loads(capsys.readouterr().out)["question"]


@pytest.mark.parametrize(
    "options",
    [
        ["--num_samples", "0"],
        ["--num_samples", "٣"],
        ["--temperature", "nan"],
        ["--temperature", "-1"],
        ["--num_samples", "2", "--temperature", "0"],
        ["--temprature", "1"],
        ["another question"],
    ],
    ids=" ".join,
)
def test_options_that_make_no_sense_are_usage_errors(
    options: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["ask", "tiny", "2 + 2?", *options]) == 2
    assert capsys.readouterr().err.startswith("error: ")


def test_an_unknown_model_is_one_clear_message(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["ask", "./nowhere", "2 + 2?"]) == 1
    assert "There is no folder './nowhere'" in capsys.readouterr().err
