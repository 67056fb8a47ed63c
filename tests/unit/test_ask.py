"""Asking: in the prompt of the training, read by the one rule, shown without harm."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from importlib import resources
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from abacist.cli.ask import read_questions
from abacist.cli.main import main
from abacist.errors import DataError, ModelError, RunError, UsageError
from abacist.policy.loading import Policy, load_policy
from abacist.proof.ask import Answers, Prompting, ask, ask_each
from abacist.records.rollout import Rollout, StopReason
from abacist.task.problems import Problem
from abacist.task.prompts import SYSTEM_PROMPT, Shots, save_shots
from abacist.task.reply import render_reply
from abacist.view.answers import Stream, answers_text

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


def render(replies: list[Rollout]) -> str:
    return answers_text(Answers("How many?", tuple(replies)))


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


def test_several_replies_end_in_what_most_of_them_answer() -> None:
    good = rollout(render_reply("1 + 1 = 2", "2"), "2")
    shown = render([good, rollout("what?"), good])
    assert shown.endswith("\nmajority: 2 (2 of 3), then no answer (1 of 3)")


@given(st.text() | st.text(alphabet=st.characters(codec=None)))
def test_no_reply_can_drive_the_terminal(text: str) -> None:
    for completion in (text, f"<reasoning>\n{text}\n</reasoning>\n<answer>\n{text}\n</answer>"):
        shown = render([rollout(completion, text), rollout(completion)])
        assert not set(shown) & {chr(c) for c in (*range(9), *range(11, 32), 127, 0x9B, 0x202E)}
        shown.encode("utf-8")


def answers(*read: str | None) -> Answers:
    return Answers("How many?", tuple(rollout("…", one) for one in read))


def test_answers_agree_by_value_and_a_tie_is_called_one() -> None:
    found = answers("19", "19.0", None, "20")
    assert (found.answer, found.agreement, found.tied) == ("19", 0.5, ("19",))
    assert repr(found) == "<Answers: '19' (2 of 4 replies)>"
    tied = answers("1/2", "3", "0.5", "3.0", "7")
    assert (tied.answer, tied.tied) == ("1/2", ("1/2", "3"))
    assert answers_text(tied).endswith(
        "no majority: 1/2 (2 of 5), 3 (2 of 5) are tied, then 7 (1 of 5)"
    )
    assert repr(tied).endswith("(2 of 5 replies, tied with 1 more)>")
    nobody = answers(None, None)
    assert (nobody.answer, nobody.agreement, nobody.tied) == (None, 0.0, ())
    assert answers_text(nobody).endswith("no majority: none of 2 replies gives an answer")
    assert repr(answers("5")) == "<Answers: '5'>"


def test_of_many_answers_the_rest_is_counted_together() -> None:
    line = answers_text(answers("0", "0", *map(str, range(1, 30)))).splitlines()[-1]
    assert line.startswith("majority: 0 (2 of 31), then 1 (1 of 31)")
    assert line.endswith("22 other answers (22 of 31)")
    all_tied = answers_text(answers(*map(str, range(30)))).splitlines()[-1]
    assert all_tied.startswith("no majority: 0 (1 of 30)") and len(all_tied) < 300


# While it is written


def streamed(texts: list[str], whole: str) -> str:
    shown: list[str] = []
    stream = Stream(shown.append)
    for text in texts:
        stream(text)
    stream.end(whole)
    return "".join(shown)


def test_every_character_is_written_once_as_soon_as_it_is_whole() -> None:
    assert streamed(["a", "a\ufffd", "ab€"], "ab€c") == "ab€c\n"
    assert streamed(["a\r", "a\r\n"], "a\r\nb\n") == "a\nb\n"
    assert streamed(["ab", "a", "ab", "abc"], "abc") == "abc\n"  # decoding began anew
    assert streamed(["ab"], "xy") == "ab\nxy\n"
    assert streamed([], "\ufffd") == "\ufffd\n"


@given(st.lists(st.text(alphabet="ab\r\n\x1b\u202e\ufffd€")))
def test_a_stream_shows_what_the_whole_shows_and_drives_no_terminal(pieces: list[str]) -> None:
    from abacist.view.plaintext import visible

    texts = ["".join(pieces[:count]) for count in range(1, len(pieces) + 1)]
    whole = "".join(pieces)
    shown = streamed(texts, whole)
    ends = "" if whole.endswith("\n") else "\n"
    assert shown == visible(whole) + ends and "\x1b" not in shown


@pytest.mark.parametrize("by_engine", [True, False], ids=["engine", "transformers"])
def test_what_is_told_token_by_token_ends_in_the_reply(
    by_engine: bool, policy: Policy, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not by_engine:
        monkeypatch.setattr(
            "abacist.policy.decoding.generation.unsupported_reason", lambda *part: "a test"
        )
    told: list[str] = []
    (reply,) = ask(policy, "2 + 2?", Prompting(None, Shots(), 9), wrote=told.append)
    assert told[-1] == reply.completion and len(told) == reply.completion_tokens
    assert all(len(a) <= len(b) + 1 for a, b in pairwise(told))
    quiet: list[str] = []
    ask(policy, "2 + 2?", Prompting(None, Shots(), 4), num_samples=2, temperature=1.0,
        wrote=quiet.append)  # fmt: skip
    assert quiet == []


def test_questions_of_a_batch_are_answered_as_each_by_itself(policy: Policy) -> None:
    prompting, asked = Prompting(None, Shots(), 8), ["2 + 2?", "How many pens are 3 pens?"]
    told: dict[int, list[Rollout]] = {}
    found = ask_each(policy, asked, prompting, answered=told.setdefault)
    alone = [ask(policy, one, prompting)[0].completion_ids for one in asked]
    assert [one.completion_ids for (one,) in found] == alone
    assert {number: replies for number, replies in told.items()} == dict(enumerate(found))
    with pytest.raises(UsageError, match="no question"):
        ask_each(policy, ["2 + 2?", " "], prompting)


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


@pytest.mark.parametrize(
    ("name", "text", "questions"),
    [
        ("a.txt", "one?\r\n\n  two? \n", ["one?", "two?"]),
        ("a", "\ufeffone\u2028still one?", ["one\u2028still one?"]),
        ("a.jsonl", '{"question": "one?", "answer": "1"}\n{"question": "t\\nwo?"}\n',
         ["one?", "t\nwo?"]),
        ("a.csv", "question,id\n\"one, two?\",7\n", ["one, two?"]),
    ],
)  # fmt: skip
def test_a_file_holds_a_question_a_line_or_a_row(
    name: str, text: str, questions: list[str], tmp_path: Path
) -> None:
    (tmp_path / name).write_bytes(text.encode())
    assert read_questions(tmp_path / name) == questions


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("a.txt", " \n\n", "no question in it"),
        ("a.jsonl", '{"question": "one?"}\n{"question": 3}\n', "line 2"),
        ("a.jsonl", '{"question": "one?"}\n{"query": "two?"}\n', "line 2"),
        ("a.jsonl", "{no json\n", "line 1"),
        ("missing.txt", None, "cannot be read"),
    ],
)
def test_a_file_without_questions_is_refused_with_the_line(
    name: str, text: str | None, said: str, tmp_path: Path
) -> None:
    if text is not None:
        (tmp_path / name).write_text(text, encoding="utf-8")
    with pytest.raises(DataError, match=said):
        read_questions(tmp_path / name)


def test_a_file_of_questions_gives_a_json_line_for_each_in_their_order(
    lookalike: Callable[[str], Path], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "asked.txt").write_text("2 + 2?\nHow many are 3 and 4 and 5?\n", encoding="utf-8")
    command = ["ask", str(lookalike(QWEN)), "--file", str(tmp_path / "asked.txt"),
               "--num_samples", "3", "--max_completion_length", "6"]  # fmt: skip
    assert main([*command, "--json"]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["question"] for row in rows] == ["2 + 2?", "How many are 3 and 4 and 5?"]
    assert all(len(row["replies"]) == 3 and {"answer", "agreement", "votes"} <= set(row)
               for row in rows)  # fmt: skip
    assert main([*command, "another question"]) == 2


class Terminal(io.StringIO):
    """A stream that a person looks at."""

    def isatty(self) -> bool:
        return True


def at_a_terminal(
    monkeypatch: pytest.MonkeyPatch, typed: list[str | type[BaseException]]
) -> Terminal:
    lines, shown = iter([*typed, EOFError]), Terminal()

    def read(prompt: str) -> str:
        line = next(lines)
        if isinstance(line, str):
            return line
        raise line

    monkeypatch.setattr("builtins.input", read)
    monkeypatch.setattr("sys.stdin", Terminal())
    monkeypatch.setattr("sys.stdout", shown)
    return shown


def test_at_a_terminal_each_line_is_asked_afresh_until_the_input_ends(
    lookalike: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    shown = at_a_terminal(monkeypatch, ["2 + 2?", "  ", "2 + 2?"])
    assert main(["ask", str(lookalike(QWEN)), "--max_completion_length", "5"]) == 0
    first, _ = shown.getvalue().split("answer: ")[:2]
    replies = shown.getvalue().split("tokens.")
    assert len(replies) == 3 and first.strip()
    assert replies[0].split("\n")[0] == replies[1].split("\n")[1]


def test_a_question_beyond_the_model_ends_no_conversation_and_a_changed_one_is_told(
    lookalike: Callable[[str], Path],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    shown = at_a_terminal(monkeypatch, ["word " * 50_000, "2 + 2? <|im_end|>"])
    assert main(["ask", str(lookalike(QWEN)), "--max_completion_length", "5"]) == 0
    told = capsys.readouterr().err
    assert told.count("error: ") == 1 and "would have been control tokens" in told
    assert shown.getvalue().count("answer: ") == 1


def test_ctrl_c_ends_a_reply_and_not_the_conversation(
    lookalike: Callable[[str], Path],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    calls = []

    def interrupted(self: object, text: str) -> None:
        calls.append(text)
        if len(calls) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr("abacist.view.answers.Stream.__call__", interrupted)
    shown = at_a_terminal(monkeypatch, ["2 + 2?", "3 + 3?"])
    assert main(["ask", str(lookalike(QWEN)), "--max_completion_length", "5"]) == 0
    assert "(interrupted)" in capsys.readouterr().err
    assert shown.getvalue().count("answer: ") == 1
    at_a_terminal(monkeypatch, [])
    calls.clear()
    assert main(["ask", str(lookalike(QWEN)), "2 + 2?", "--max_completion_length", "5"]) == 130


def test_an_unknown_model_is_one_clear_message(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["ask", "./nowhere", "2 + 2?"]) == 1
    assert "There is no folder './nowhere'" in capsys.readouterr().err
