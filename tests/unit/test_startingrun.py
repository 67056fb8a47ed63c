"""A run as the model to train brings its settings, and its prompt exactly."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from abacist.delivery.ask import Prompting
from abacist.errors import UsageError
from abacist.learning.config import load_config
from abacist.learning.task import load_task
from abacist.records.provenance import MANIFEST_FORMAT, MANIFEST_VERSION
from abacist.records.rundir import write_json
from abacist.task.problems import load_problems
from abacist.task.prompts import choose_shots, save_shots


def run_with(folder: Path, config: str, num_shots: int = 0) -> Path:
    """What a run leaves of its settings and its prompt."""
    folder.mkdir()
    write_json(
        folder / "manifest.json",
        {"format": MANIFEST_FORMAT, "format_version": MANIFEST_VERSION},
    )
    (folder / "config.yaml").write_text(config, encoding="utf-8")
    if num_shots:
        problems = load_problems("generated", limit=40, seed=3)
        save_shots(folder / "shots.jsonl", choose_shots(problems, num_shots, seed=3))
    return folder


OWN = "dataset_name: generated\nsystem_prompt: Reckon aloud.\nlearning_rate: 0.002\n"
OWN += "run_name: first\nmax_steps: 7\nmodel_revision: v1\nmodel_name_or_path: some/base\n"


@pytest.mark.parametrize("model", ["run", "run/checkpoint-30"])
def test_a_run_that_is_trained_further_keeps_its_settings(model: str, tmp_path: Path) -> None:
    run = run_with(tmp_path / "run", OWN)
    (run / "checkpoint-30").mkdir()
    config = load_config(None, None, ["--model_name_or_path", str(tmp_path / model)])
    assert config.recipe is None and config.script.dataset_name == "generated"
    assert config.script.system_prompt == "Reckon aloud."
    assert config.training.learning_rate == 0.002
    assert config.sources["learning_rate"] == str(run / "config.yaml")
    assert any(f"as {run} was trained" in note for note in config.notes)
    # What belongs to one run, or to the model that it began with, does not go on.
    assert config.model.model_name_or_path == str(tmp_path / model)
    assert config.model.model_revision is None and config.name == "run"
    assert config.training.max_steps == -1 or "max_steps" not in config.settings


def test_flags_win_over_the_settings_of_the_run(tmp_path: Path) -> None:
    run = run_with(tmp_path / "run", OWN)
    flags = ["--model_name_or_path", str(run), "--learning_rate", "0.1", "--system_prompt", "none"]
    config = load_config(None, None, flags)
    assert config.training.learning_rate == 0.1 and config.script.system_prompt == "none"


def test_a_recipe_that_is_named_wins_but_for_the_prompt(tmp_path: Path) -> None:
    run = run_with(tmp_path / "run", OWN)
    config = load_config("any", None, ["--model_name_or_path", str(run)])
    assert config.script.dataset_name == "openai/gsm8k" and config.training.learning_rate == 4e-5
    assert config.script.system_prompt == "Reckon aloud."
    # A recipe that has a prompt of its own says so.
    assert load_config("tiny", None, ["--model_name_or_path", str(run)]).script.system_prompt == (
        "none"
    )


def test_the_worked_examples_of_a_run_are_the_same_ones_in_the_same_order(tmp_path: Path) -> None:
    run = run_with(tmp_path / "run", OWN + "num_shots: 3\nseed: 3\n", num_shots=3)
    flags = ["--model_name_or_path", str(run), "--seed", "9", "--num_train_problems", "20"]
    task = load_task(load_config(None, None, flags))
    assert task.shots == Prompting.of(str(run)).shots and len(task.shots) == 3


def test_a_run_trained_further_is_asked_with_those_examples_too(tmp_path: Path) -> None:
    first = run_with(tmp_path / "run", OWN + "num_shots: 2\n", num_shots=2)
    config = load_config(None, None, ["--model_name_or_path", str(first)])
    second = run_with(tmp_path / "second", config.to_yaml())
    save_shots(second / "shots.jsonl", load_task(config).shots)
    assert Prompting.of(str(second)).shots == Prompting.of(str(first)).shots


def test_a_file_of_examples_without_a_number_is_shown_whole_in_its_order(tmp_path: Path) -> None:
    rows = load_problems("generated", limit=3, seed=5)
    path = tmp_path / "mine.jsonl"
    path.write_text(
        "".join(
            json.dumps({"question": one.question, "answer": f"{one.solution}\n#### {one.answer}"})
            + "\n"
            for one in rows
        ),
        encoding="utf-8",
    )
    flags = ["--shots_file", str(path), "--num_train_problems", "20"]
    task = load_task(load_config("tiny", None, flags))
    assert [shot.question for shot in task.shots.chosen] == [one.question for one in rows]
    fewer = load_task(load_config("tiny", None, [*flags, "--num_shots", "2"]))
    assert len(fewer.shots) == 2


def test_a_folder_that_is_no_run_is_a_model_like_any_other(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("system_prompt: none\n", encoding="utf-8")
    config = load_config(None, None, ["--model_name_or_path", str(tmp_path)])
    assert config.recipe == "any" and config.script.system_prompt == "default"


def test_a_run_whose_settings_are_damaged_is_named(tmp_path: Path) -> None:
    run = run_with(tmp_path / "run", "a: [\n")
    with pytest.raises(UsageError, match=r"config\.yaml"):
        load_config(None, None, ["--model_name_or_path", str(run)])
