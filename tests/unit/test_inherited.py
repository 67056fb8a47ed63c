"""Settings that follow a given one, and those that a run brings along as the model to train."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from abacist.errors import UsageError
from abacist.learning.config import Config, load_config
from abacist.learning.helptext import recipe_names
from abacist.learning.inherited import followers, prompt_of, run_to_continue
from abacist.learning.task import load_task
from abacist.proof.ask import Prompting
from abacist.records.provenance import MANIFEST_FORMAT, MANIFEST_VERSION
from abacist.records.rundir import write_json
from abacist.task.problems import load_problems
from abacist.task.prompts import choose_shots, save_shots


def replies(config: Config) -> tuple[int, int]:
    """Problems and replies of a step."""
    size = int(config.training.num_generations or 0)
    return config.problems_per_step, config.problems_per_step * size


@pytest.mark.parametrize(
    ("recipe", "size", "step"),
    [("any", 4, (16, 64)), ("any", 16, (16, 256)), ("any", 7, (16, 112)), ("tiny", 4, (8, 32)),
     ("tiny", 3, (8, 24)), ("tiny", 16, (8, 128)), ("gist", 8, (4, 32)), ("any", 8, (16, 128))],
)  # fmt: skip
def test_groups_of_another_size_leave_the_problems_of_a_step(
    recipe: str, size: int, step: tuple[int, int]
) -> None:
    config = load_config(recipe, None, ["--num_generations", str(size)])
    assert replies(config) == step
    assert f"{step[0]} problems × {size} replies = {step[1]} replies" in config.notes[-1]


def test_more_replies_to_a_problem_take_no_more_memory_where_steps_can_grow() -> None:
    config = load_config("any", None, ["--num_generations", "16"])
    assert config.training.per_device_train_batch_size == 8
    assert config.sources["gradient_accumulation_steps"] == "follows num_generations"
    assert any("(follows num_generations)" in line for line in config.lines())


@pytest.mark.parametrize(
    "flag",
    [["--per_device_train_batch_size", "8"], ["--gradient_accumulation_steps", "16"],
     ["--generation_batch_size", "128"]],
)  # fmt: skip
def test_a_batch_that_was_given_stays(flag: list[str]) -> None:
    config = load_config("any", None, ["--num_generations", "4", *flag])
    assert config.training.gradient_accumulation_steps == 16
    assert replies(config) == (32, 128)


def test_a_short_run_measures_and_warms_up_in_proportion_and_says_so() -> None:
    config = load_config("any", None, ["--max_steps", "5"])
    assert config.script.num_heldout_problems == 50 and config.training.warmup_steps == 1
    assert config.script.num_consistency_problems == 20
    for name in ("num_heldout_problems", "num_consistency_problems", "warmup_steps"):
        assert config.sources[name] == "follows max_steps"
    half = load_config("any", None, ["--max_steps", "125"])
    assert half.script.num_heldout_problems == 300 and half.training.warmup_steps == 10


def test_counts_that_were_given_stay_whatever_the_length(tmp_path: Path) -> None:
    flags = ["--max_steps", "4", "--num_heldout_problems", "600", "--warmup_steps", "10"]
    config = load_config("any", None, flags)
    assert config.script.num_heldout_problems == 600 and config.training.warmup_steps == 10
    assert "the run ends after 4" in config.notes[-1]
    mine = tmp_path / "mine.yaml"
    mine.write_text("num_heldout_problems: 400\n", encoding="utf-8")
    assert load_config("any", str(mine), ["--max_steps", "5"]).script.num_heldout_problems == 400


@pytest.mark.parametrize("name", recipe_names())
def test_a_recipe_as_it_stands_and_a_longer_run_follow_nothing(name: str) -> None:
    for flags in ([], ["--max_steps", "5000"]):
        config = load_config(name, None, flags)
        assert not [source for source in config.sources.values() if source.startswith("follows")]


def test_what_followed_is_saved_and_runs_again_as_it_was(tmp_path: Path) -> None:
    config = load_config("any", None, ["--num_generations", "4", "--max_steps", "5"])
    saved = tmp_path / "config.yaml"
    saved.write_text(config.to_yaml(), encoding="utf-8")
    again = load_config(None, str(saved), [])
    assert replies(again) == replies(config) and again.script == config.script
    assert again.training.warmup_steps == config.training.warmup_steps


def test_a_group_that_fits_no_batch_follows_nothing() -> None:
    recipe = {"num_generations": 8, "per_device_train_batch_size": 4}
    assert followers(recipe, {"num_generations": 3}) == {}


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
    # As long as before, and not for the three epochs that are TRL's default.
    assert config.training.max_steps == 7


def test_flags_win_over_the_settings_of_the_run(tmp_path: Path) -> None:
    run = run_with(tmp_path / "run", OWN)
    flags = ["--model_name_or_path", str(run), "--learning_rate", "0.1", "--system_prompt", "none"]
    config = load_config(None, None, flags)
    assert config.training.learning_rate == 0.1 and config.script.system_prompt == "none"


@pytest.mark.parametrize(
    ("flags", "left_out"),
    [(["--beta", "0.04"], {"train_replies": None}),
     (["--control", "format"], {"step_reward_weight": 0.0}),
     (["--control", "random", "--beta", "0.1"], {"train_replies": None, "step_reward_weight": 0.0}),
     (["--learning_rate", "0.1"], {})],
)  # fmt: skip
def test_what_the_run_brings_gives_way_to_a_flag_that_it_does_not_go_with(
    flags: list[str], left_out: dict[str, Any], tmp_path: Path
) -> None:
    kept = {"train_replies": 4, "step_reward_weight": 1.0}
    settings = "".join(f"{key}: {value}\n" for key, value in kept.items())
    run = run_with(tmp_path / "run", OWN + settings + "num_generations: 8\n")
    config = load_config(None, None, ["--model_name_or_path", str(run), *flags])
    for name, value in (kept | left_out).items():
        assert getattr(config.training, name) == value
        told = [note for note in config.notes if note.startswith(f"without that run's {name}: ")]
        assert len(told) == (name in left_out)
    # The same two asked for by a person are refused.
    if left_out == {"train_replies": None}:
        with pytest.raises(UsageError, match="--train_replies"):
            load_config(
                None, None, ["--model_name_or_path", str(run), *flags, "--train_replies", "4"]
            )


def test_the_numbers_of_a_run_follow_as_those_of_a_recipe_do(tmp_path: Path) -> None:
    of_run = "num_generations: 8\nper_device_train_batch_size: 16\ngradient_accumulation_steps: 3\n"
    of_run += "train_replies: 4\nreward_funcs: [default]\nreward_weights: [1, 0.2, 0.2, 0.2, 0.2]\n"
    run = run_with(tmp_path / "run", "dataset_name: generated\n" + of_run)
    flags = ["--model_name_or_path", str(run)]
    config = load_config(None, None, [*flags, "--num_generations", "4"])
    assert replies(config) == (6, 24) and config.training.train_replies == 2
    config = load_config(None, None, [*flags, "--reward_funcs", "correctness", "integer"])
    assert config.training.reward_weights == [1.0, 0.2]


def test_a_run_with_fewer_weights_than_rewards_lends_those_that_it_has(
    tmp_path: Path,
) -> None:
    run = run_with(tmp_path / "run", OWN + "reward_funcs: [default]\nreward_weights: [1, 0.2]\n")
    flags = ["--model_name_or_path", str(run), "--reward_funcs", "correctness", "integer"]
    assert load_config(None, None, flags).training.reward_weights == [1.0, 0.2]


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


def test_an_export_that_is_trained_further_brings_its_prompt(tmp_path: Path) -> None:
    settings = {"system_prompt": "Think.", "num_shots": "0", "max_completion_length": 40}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(settings), encoding="utf-8")
    assert run_to_continue(str(tmp_path)) is None  # any folder with a config.yaml is no export
    (tmp_path / "abacist.json").write_text('{"format": "abacist-export"}', encoding="utf-8")
    run = run_to_continue(str(tmp_path))
    assert run is not None and prompt_of(run, settings)["system_prompt"] == "Think."
