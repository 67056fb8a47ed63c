"""`abacist audit` as typed, and what `abacist train` does with rewards that would teach a hack."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from abacist.cli.main import main
from abacist.learning.config import load_config
from abacist.learning.rewards import control_rewards, refuse_hackable
from abacist.learning.task import load_task
from abacist.learning.tracking import Silent
from abacist.task.rewards import load_reward_funcs

pytestmark = pytest.mark.e2e
Captured = pytest.CaptureFixture[str]

MINE = """
def anywhere(completions, answer, **columns):
    return [float(gold in each[0]["content"]) for each, gold in zip(completions, answer)]

def concise(completions, **columns):
    return [max(0.0, 0.5 - len(each[0]["content"]) / 5000) for each in completions]

def judged(completions, solution, **columns):
    return [0.0 for each in completions]
"""


@pytest.fixture
def mine(tmp_path: Path) -> str:
    file = tmp_path / "mine.py"
    file.write_text(MINE, encoding="utf-8")
    return str(file)


def test_the_default_rewards_pass_the_gate(capsys: Captured) -> None:
    assert main(["audit", "--limit", "8"]) == 0
    out = capsys.readouterr().out
    assert "Sound: nothing was found." in out
    assert "8 generated problems" in out


def test_the_gists_do_not(capsys: Captured) -> None:
    assert main(["audit", "--reward-funcs", "gist", "--limit", "8"]) == 3
    assert "Not sound: a reply that solves nothing" in capsys.readouterr().out


def test_json_is_one_object_with_every_finding(mine: str, capsys: Captured) -> None:
    argv = ["audit", "--json", "--limit", "8", "--reward_funcs", "default", f"{mine}:concise"]
    assert main([*argv, "--reward_weights", *["1"] * 5, "0.1"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["sound"] is True and document["weights"][-1] == 0.1
    assert {finding["kind"] for finding in document["findings"]} >= {"length_leak"}


@pytest.mark.parametrize(
    ("argv", "code", "says"),
    [
        (["--reward_funcs", "correctnes"], 1, "Did you mean 'correctness'?"),
        (["--reward_funcs", "nowhere.py:f"], 1, "no reward file"),
        (["--reward_weights", "1", "2"], 2, "--reward_weights: 2 given, 5 needed"),
        (["--dataset_name", "missing.jsonl"], 1, "no such file"),
        (["--limit", "0"], 2, "at least 1"),
        (["--rewards", "gist"], 2, "Did you mean --reward"),
    ],
)
def test_what_is_wrong_is_said(
    argv: list[str], code: int, says: str, capsys: Captured, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    assert main(["audit", *argv]) == code
    assert says in capsys.readouterr().err


def test_train_refuses_rewards_that_teach_a_hack_and_leaves_nothing(
    mine: str, tmp_path: Path, capsys: Captured
) -> None:
    run = tmp_path / "run"
    argv = ["train", "--reward_funcs", f"{mine}:anywhere", "--output_dir", str(run)]
    assert main(argv) == 1
    err = capsys.readouterr().err
    assert "These rewards would teach a hack" in err and "--allow_hackable_rewards" in err
    assert not run.exists()


def test_train_refuses_a_reward_that_wants_a_column_there_is_not(
    mine: str, tmp_path: Path, capsys: Captured
) -> None:
    argv = ["train", "--reward_funcs", "correctness", f"{mine}:judged"]
    assert main([*argv, "--output_dir", str(tmp_path / "run")]) == 1
    assert "`solution`" in capsys.readouterr().err


class _Noting(Silent):
    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)


@pytest.mark.parametrize(
    ("recipe", "flags", "says"),
    [
        ("tiny", [], "rewards: sound: nothing was found"),
        ("gist", ["--dataset_name", "generated"], "allow_hackable_rewards"),
        ("tiny", ["--reward_funcs", "gist", "--allow_hackable_rewards"], "rewards: not sound"),
        ("tiny", ["--reward_funcs", "strict_format"], "with a warning: right solutions earn 0.50"),
        ("tiny", ["--control", "random"], ""),
        ("tiny", ["--control", "format"], ""),
    ],
)
def test_train_notes_what_the_audit_says_in_a_line(
    recipe: str, flags: list[str], says: str
) -> None:
    config = load_config(recipe, None, [*flags, "--num_train_problems", "40"])
    rewards = load_reward_funcs(config.script.reward_funcs)
    rewards, _ = control_rewards(config.script.control, rewards, None, seed=0)
    watcher = _Noting()
    refuse_hackable(config, load_task(config).train, rewards, watcher)
    assert says in "\n".join(watcher.notes)
    assert bool(watcher.notes) is bool(says)
