"""The skill file says what is so: its commands exist, and the JSON it shows is what is printed."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from abacist.cli.main import VERBS, main
from abacist.proof.comparison.compare import compare
from abacist.view.evaltext import evaluation_json
from abacist.view.verdict import verdict_json
from made_runs import made_evaluations, made_run

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "skills" / "abacist" / "SKILL.md").read_text(encoding="utf-8")
SHOWN = {
    verb: json.loads(block)
    for verb, block in re.findall(r"^```json ([\w-]+)\n(.*?)^```", TEXT, re.M | re.S)
}
COMMAND = re.compile(r"`abacist ([a-z][\w-]*)")
FLAG = re.compile(r"`(--\w+)")


def missing(shown: Any, real: Any, where: str = "") -> list[str]:
    """Where ``real`` lacks a key that ``shown`` has, or holds another kind of value.

    >>> missing({"a": [{"b": 1.5}], "c": None}, {"a": [{"b": 2, "d": 0}], "c": "text"})
    []
    >>> missing({"a": {"b": 1}, "c": True}, {"a": {"e": 1}, "c": "yes"})
    ['.a.b', '.c']
    """
    if shown is None or real is None:
        return []
    if isinstance(shown, dict) and isinstance(real, dict):
        lost = [f"{where}.{key}" for key in shown if key not in real]
        for key in set(shown) & set(real):
            lost += missing(shown[key], real[key], f"{where}.{key}")
        return sorted(lost)
    if isinstance(shown, list) and isinstance(real, list):
        return missing(shown[0], real[0], f"{where}[0]") if shown and real else []
    numbers = isinstance(shown, int | float) and isinstance(real, int | float)
    same = isinstance(shown, bool) is isinstance(real, bool) if numbers else False
    return [] if same or type(shown) is type(real) else [where]


@pytest.fixture(scope="module")
def a_run(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(made_run(tmp_path_factory.mktemp("runs") / "made"))


def test_the_front_matter_names_it_and_says_when_to_use_it() -> None:
    matter = yaml.safe_load(TEXT.split("---\n")[1])
    assert set(matter) == {"name", "description"} and matter["name"] == "abacist"
    assert 50 < len(matter["description"]) < 1024


def test_it_names_only_commands_that_there_are() -> None:
    assert set(COMMAND.findall(TEXT)) <= {*VERBS, "VERB"}


def test_it_shows_the_json_of_every_verb_it_tells_of() -> None:
    assert set(COMMAND.findall(TEXT)) - {"VERB"} == set(SHOWN)


@pytest.mark.parametrize(
    ("verb", "flags", "code"),
    [
        ("audit", ["--limit", "3", "--max_seconds", "20"], 0),
        ("show", ["RUN", "--num", "1"], 0),
        ("report", ["RUN"], 0),
        ("compare", ["RUN"], None),
        ("doctor", ["RUN"], None),
        ("ask", ["tiny", "2 + 3 = ?", "--max_completion_length", "8"], 0),
    ],
)
def test_the_json_it_shows_is_what_the_verb_prints(
    verb: str, flags: list[str], code: int | None, a_run: str, capsys: pytest.CaptureFixture[str]
) -> None:
    ended = main([verb, *(a_run if flag == "RUN" else flag for flag in flags), "--json"])
    assert code is None or ended == code
    assert missing(SHOWN[verb], json.loads(capsys.readouterr().out)) == []


def test_the_json_of_what_leaves_a_run_is_what_is_printed(
    short_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # A copy: who asks a run's held-out problems leaves a line in it.
    run = str(shutil.copytree(short_run, tmp_path / short_run.name))
    file = str(tmp_path / "a.bundle.zip")
    script = str(ROOT / "tests" / "gists" / "one_file.py")
    for verb, *flags in (
        ["export", run, "--to", "adapter", "-o", str(tmp_path / "out"), "--num_problems", "2"],
        ["bundle", run, "-o", file],
        ["verify", file, "--replies", "2"],
        ["import-gist", script, "-o", str(tmp_path / "gist.yaml")],
    ):
        assert main([verb, *flags, "--json"]) == 0, verb
        assert missing(SHOWN[verb], json.loads(capsys.readouterr().out)) == [], verb


def test_the_verdict_it_shows_is_what_a_training_ends_with() -> None:
    printed = verdict_json(compare(*made_evaluations()))
    assert missing(SHOWN["train"]["verdict"], json.loads(json.dumps(printed, default=str))) == []


def test_the_evaluation_it_shows_is_what_eval_prints() -> None:
    printed = evaluation_json(made_evaluations()[0])
    assert missing(SHOWN["eval"], json.loads(json.dumps(printed, default=str))) == []


def test_the_flags_it_names_are_in_the_command_reference() -> None:
    reference = (ROOT / "docs" / "commands.md").read_text(encoding="utf-8")
    assert [flag for flag in FLAG.findall(TEXT) if f"{flag}" not in reference] == []
