"""One count that is given takes the recipe's others with it; what was given stays."""

from __future__ import annotations

from pathlib import Path

import pytest

from abacist.learning.config import Config, load_config, recipe_names
from abacist.learning.following import followers


def replies(config: Config) -> tuple[int, int]:
    """Problems and replies of a step."""
    size = int(config.training.num_generations or 0)
    return config.problems_per_step, config.problems_per_step * size


@pytest.mark.parametrize(
    ("recipe", "size", "step"),
    [("any", 4, (16, 64)), ("any", 16, (16, 256)), ("any", 7, (16, 112)), ("tiny", 4, (8, 32)),
     ("tiny", 3, (8, 24)), ("tiny", 16, (8, 128)), ("gist", 8, (1, 8)), ("any", 8, (16, 128))],
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
