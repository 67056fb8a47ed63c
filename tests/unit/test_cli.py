"""The command line: which verb, its help, and what `abacist train` makes of its flags."""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import abacist
from abacist.cli import train
from abacist.cli.flags import nearest, normalise, not_negative, positive, render
from abacist.cli.main import VERBS, main
from abacist.errors import UsageError
from abacist.learning.helptext import TRAIN_FLAGS

SOURCE = Path(abacist.__file__).resolve().parents[1]


HELDOUT = [SimpleNamespace(question="How many figs has Tom's aunt?")]

# main: which verb?


@pytest.mark.parametrize("argv", [[], ["--help"], ["-h"], ["help"]])
def test_the_short_help_leads_a_newcomer_to_train(
    argv: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(argv) == 0
    out = capsys.readouterr().out
    assert "\n  abacist train\n" in out
    assert all(f"abacist {verb} " in out for verb in VERBS)


def test_version_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"abacist {abacist.__version__}\n"


@pytest.mark.parametrize(
    ("typed", "says"),
    [
        ("trian", "Did you mean `abacist train`?"),
        ("--versoin", "Did you mean `abacist --version`?"),
        ("frobnicate", f"There are: {', '.join(VERBS)}"),
        ("\x1b[2J" * 1000, f"There are: {', '.join(VERBS)}"),
    ],
)
def test_an_unknown_verb_is_a_usage_error_that_says_what_there_is(
    typed: str, says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([typed]) == 2
    err = capsys.readouterr().err
    assert says in err
    assert "\x1b" not in err


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_has_help_and_takes_json(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([verb, "--help"]) == 0
    out = capsys.readouterr().out
    assert f"usage: abacist {verb}" in out
    assert "--json" in out


# flags and the train verb


def test_the_table_fits_the_screen_and_names_each_flag_once() -> None:
    names = [flag.name for group in TRAIN_FLAGS for flag in group.flags]
    assert len(names) == len(set(names))
    text = render(TRAIN_FLAGS)
    assert max(map(len, text.splitlines())) <= 96
    assert all(f"  {name}" in text for name in names)


@given(st.lists(st.text(max_size=12) | st.from_regex(r"--[a-z][a-z_-]{0,8}(=.{0,4})?")))
def test_normalising_twice_changes_nothing_and_spares_what_follows_two_dashes(
    argv: list[str],
) -> None:
    once = normalise(argv)
    assert normalise([*argv, "--", "--a-b=1"])[-2:] == ["--", "--a-b=1"]
    # A value split off its flag may look like a flag itself; beyond that, once is enough.
    if not any("=--" in argument for argument in argv):
        assert normalise(once) == once


def test_a_bare_question_of_dashes_is_not_taken_for_a_flag() -> None:
    assert normalise(["-- 5 - 3 = ?", "-5", "--a b-c"]) == ["-- 5 - 3 = ?", "-5", "--a b-c"]


@given(st.text(max_size=500))
def test_nearest_takes_any_text(word: str) -> None:
    assert nearest(word, VERBS) in {*VERBS, None}


@pytest.mark.parametrize(
    ("argv", "recipe", "config_path", "flags"),
    [
        ([], None, None, []),
        (["tiny"], "tiny", None, []),
        (["--seed", "1"], None, None, ["--seed", "1"]),
        (["gist", "--use_peft", "--json"], "gist", None, ["--use_peft"]),
        (["--beta", "-1", "--config", "c.yaml"], None, "c.yaml", ["--beta", "-1"]),
    ],
)
def test_the_line_is_split_into_recipe_config_and_the_rest(
    argv: list[str], recipe: str | None, config_path: str | None, flags: list[str]
) -> None:
    request = train.read_request(argv)
    assert (request.recipe, request.config_path, request.flags) == (recipe, config_path, flags)
    assert request.as_json is ("--json" in argv)


@pytest.mark.parametrize(
    "argv", [["a", "b"], ["--config"], ["--config", "--seed"], ["--config", "a", "--config", "b"]]
)
def test_a_line_that_can_mean_two_things_is_refused(argv: list[str]) -> None:
    with pytest.raises(UsageError):
        train.read_request(argv)


@pytest.fixture
def a_training(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Stands in for the learning layer; collects what it was called with."""
    calls: list[Any] = []

    def stand_in(name: str, **members: Any) -> None:
        module = ModuleType(name)
        module.__dict__.update(members)
        monkeypatch.setitem(sys.modules, name, module)

    def load_config(recipe: Any, config_path: Any, flags: list[str]) -> list[str]:
        calls.append((recipe, config_path, flags))
        return flags

    def train_model(config: list[str], watcher: Any) -> SimpleNamespace:
        print("noise of a library")
        compared = None if "--num_heldout_problems" in config else "a comparison"
        return SimpleNamespace(
            path=Path("runs/a b"),
            before=None if compared is None else SimpleNamespace(problems=HELDOUT),
            comparison=compared,
            sampled_before=None,
            sampled_after=None,
            stopped="--max_hours after step 2 of 9" if "--max_hours" in config else None,
        )

    stand_in(
        "abacist.learning.config", load_config=load_config, full_help=lambda: "all two hundred"
    )
    stand_in("abacist.learning.train", train=train_model)
    stand_in("abacist.delivery.ending", write_page_and_card=lambda run: run / "report.html")
    stand_in(
        "abacist.view.verdict",
        verdict_text=lambda *judged, width: f"It learned: {judged}",
        verdict_json=lambda *judged: {"judgement": "learned"},
    )
    return calls


def test_train_hands_its_flags_on_and_ends_with_the_next_command(
    a_training: list[Any], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", "tiny", "--learning-rate=1e-3", "--config", "c.yaml"]) == 0
    assert a_training == [("tiny", "c.yaml", ["--learning_rate", "1e-3"])]
    out = capsys.readouterr().out
    assert "It learned: ('a comparison', None, None)" in out
    assert "abacist ask 'runs/a b' \"How many figs has Tom's aunt?\"\n" in out
    assert "runs/a b/report.html" in out and "abacist show 'runs/a b'\n" in out


@pytest.mark.parametrize(
    ("heldout", "asked"),
    [
        (["How many\n  eggs?", "How many?"], "How many eggs?"),
        (["It costs $3. What now?", 'Who\'s "Jo"?', "How many?"], "How many?"),
        (["Say `ls`: it's $3 \\ !"], "Say `ls`: it's $3 \\ !"),
        (["x" * 241, "\x1b[2J?", "-3 + 4?", " "], None),
        ([], None),
    ],
)
def test_the_next_command_asks_a_short_held_out_question_that_no_shell_changes(
    heldout: list[str], asked: str | None
) -> None:
    command = train.next_command("runs/a b", heldout)
    end = ["ask", "runs/a b"] + ([] if asked is None else [asked])
    assert shlex.split(command)[-len(end) :] == end and "\n" not in command
    if asked == "How many?":
        assert command.endswith('"How many?"')


def test_train_with_json_prints_one_object_and_nothing_else(
    a_training: list[Any], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", "--json"]) == 0
    captured = capsys.readouterr()
    document = json.loads(captured.out)
    assert document["run"] == "runs/a b"
    assert document["verdict"] == {"judgement": "learned"}
    assert "noise of a library" in captured.err


def test_train_that_stopped_in_time_says_how_to_go_on(
    a_training: list[Any], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", "--max_hours", "2"]) == 0
    said = capsys.readouterr().out
    assert "Stopped by --max_hours after step 2 of 9" in said
    assert "abacist train --resume 'runs/a b'" in said
    assert main(["train", "--max_hours", "2", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["verdict"] is None


@pytest.mark.parametrize("flags", [["--resume"], ["--resume", "--force"]])
def test_resume_without_a_run_is_a_usage_error(flags: list[str]) -> None:
    with pytest.raises(UsageError, match="a run or one of its checkpoints"):
        train.read_request(flags)


def test_train_without_held_out_problems_says_that_there_is_no_verdict(
    a_training: list[Any], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", "--num_heldout_problems", "0"]) == 0
    assert "There is no verdict" in capsys.readouterr().out
    assert main(["train", "--num_heldout_problems", "0", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["verdict"] is None


def test_help_all_is_trls(a_training: list[Any], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--help_all"]) == 0
    assert capsys.readouterr().out == "all two hundred\n"


def test_a_positional_may_stand_behind_the_flags() -> None:
    from abacist.cli import ask, compare, report

    read = ask._parser().read
    assert read(["tiny", "--json", "How many?"]).question == "How many?"
    assert read(["--seed", "3", "tiny", "--num_samples", "2", "-"]).question == "-"
    assert report._parser().read(["a", "--json", "b"]).runs == ["a", "b"]
    assert compare._parser().read(["a", "--json", "b"]).evaluations == ["a", "b"]
    with pytest.raises(UsageError, match="does not take 'c'"):
        read(["tiny", "--json", "How many?", "c"])


@pytest.mark.parametrize("text", ["10000000001", "9" * 30, "9" * 5_000])
def test_a_number_beyond_all_sense_is_refused_and_zeros_in_front_are_none(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match="is beyond"):
        positive(text)
    with pytest.raises(argparse.ArgumentTypeError, match=r"is beyond|not a number"):
        not_negative(text)
    assert positive("0" * 30 + "3") == 3 and positive("10000000000") == 10**10
