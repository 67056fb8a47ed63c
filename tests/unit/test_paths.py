"""A run's settings mean the same in every working directory."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from abacist.errors import RewardError
from abacist.learning.config import load_config
from abacist.learning.paths import with_absolute_paths
from abacist.task.custom_rewards import absolute_reward
from abacist.task.rewards import load_reward_funcs

REWARD = "def brevity(completions, **columns):\n    return [0.1] * len(completions)\n"
SIBLING = (
    "import beside\n\ndef brevity(completions, **columns):\n    return beside.pay(completions)\n"
)


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A working directory with data, a model's folder and rewards; another one beside it."""
    here = tmp_path / "here"
    for folder in ("model", "package", "loose", "data.d"):
        (here / folder).mkdir(parents=True)
    (tmp_path / "elsewhere").mkdir()
    (here / "data.jsonl").write_text("{}\n", encoding="utf-8")
    (here / "paths_mine.py").write_text(REWARD, encoding="utf-8")
    (here / "beside.py").write_text(
        "def pay(completions):\n    return [0.2] * len(completions)\n", encoding="utf-8"
    )
    (here / "paths_sibling.py").write_text(SIBLING, encoding="utf-8")
    (here / "package" / "__init__.py").write_text("", encoding="utf-8")
    (here / "package" / "deep.py").write_text("from . import other\n" + REWARD, encoding="utf-8")
    (here / "package" / "other.py").write_text("", encoding="utf-8")
    (here / "loose" / "inner.py").write_text(REWARD, encoding="utf-8")
    monkeypatch.chdir(here)
    path, modules = list(sys.path), set(sys.modules)
    yield here
    sys.path[:] = path
    for name in set(sys.modules) - modules:
        if name.split(".")[0] in ("paths_mine", "paths_sibling", "beside", "package", "loose"):
            del sys.modules[name]


def saved(*flags: str) -> dict[str, object]:
    found: dict[str, object] = yaml.safe_load(load_config("tiny", None, list(flags)).to_yaml())
    return found


def test_files_and_folders_are_kept_with_their_whole_path(here: Path) -> None:
    kept = saved("--dataset_name", "data.jsonl", "--shots_file", "./data.jsonl",
                 "--model_name_or_path", "model")  # fmt: skip
    assert kept["dataset_name"] == kept["shots_file"] == str(here / "data.jsonl")
    assert kept["model_name_or_path"] == str(here / "model")
    assert saved("--dataset_name", "../here/data.d")["dataset_name"] == str(here / "data.d")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("dataset_name", "openai/gsm8k"),
        ("dataset_name", "generated"),
        ("dataset_name", "missing.jsonl"),
        ("dataset_name", "\0"),
        ("dataset_name", "x" * 5000),
        ("model_name_or_path", "Qwen/Qwen2.5-0.5B"),
        ("model_name_or_path", "tiny"),
        ("deepspeed", '{"zero_optimization": {}}'),
        ("shots_file", "steps"),
        ("shots_file", ""),
    ],
)
def test_what_is_no_path_here_stays_as_it_was_typed(name: str, value: str, here: Path) -> None:
    assert with_absolute_paths({name: value}) == {name: value}


def test_a_built_in_name_wins_over_a_folder_of_that_name(here: Path) -> None:
    (here / "tiny").mkdir()
    (here / "generated").mkdir()
    settings = {"model_name_or_path": "tiny", "dataset_name": "generated"}
    assert with_absolute_paths(settings) == settings
    assert with_absolute_paths({"model_name_or_path": "./tiny"}) == {
        "model_name_or_path": str(here / "tiny")
    }


def test_the_home_folder_is_written_out(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(here))
    assert with_absolute_paths({"dataset_name": "~/data.jsonl"}) == {
        "dataset_name": str(here / "data.jsonl")
    }


def test_a_symbolic_link_is_kept_as_the_name_it_is(here: Path) -> None:
    (here / "current").symlink_to(here / "data.d")
    assert with_absolute_paths({"dataset_name": "current"}) == {
        "dataset_name": str(here / "current")
    }


OWN = {
    "paths_mine.brevity": "/paths_mine.brevity",
    "paths_mine:brevity": "/paths_mine:brevity",
    "paths_mine.py:brevity": "/paths_mine.py:brevity",
    "./paths_sibling.py:brevity": "/paths_sibling.py:brevity",
    "paths_sibling.brevity": "/paths_sibling.brevity",
    "package.deep.brevity": "/package.deep.brevity",
    "loose.inner.brevity": "/loose.inner.brevity",
    "loose/inner.brevity": "/loose/inner.brevity",
}


@pytest.mark.parametrize("name", OWN)
def test_a_reward_of_ones_own_is_found_from_elsewhere(
    name: str, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (kept,) = with_absolute_paths({"reward_funcs": [name]})["reward_funcs"]
    assert kept == str(here) + OWN[name]
    assert with_absolute_paths({"reward_funcs": [kept]}) == {"reward_funcs": [kept]}
    monkeypatch.chdir(here.parent / "elsewhere")
    assert with_absolute_paths({"reward_funcs": [kept]}) == {"reward_funcs": [kept]}
    (func,) = load_reward_funcs([kept])
    assert func.__name__ == "brevity"
    assert func(prompts=[], completions=["x"])[0] in (0.1, 0.2)


@pytest.mark.parametrize(
    "name",
    ["default", "gist", "gist.int_reward_func", "correctness", "json.loads", "trl.rewards.f",
     "missing.f", "missing.py:f", "gone/missing.f", "f", ".f", "a:", ":", ""],
)  # fmt: skip
def test_other_reward_names_stay_as_they_were_typed(name: str, here: Path) -> None:
    assert with_absolute_paths({"reward_funcs": [name]}) == {"reward_funcs": [name]}


def test_an_installed_package_is_not_taken_for_a_folder_of_its_name(here: Path) -> None:
    (here / "yaml").mkdir()
    assert absolute_reward("yaml.safe_load") == "yaml.safe_load"


def test_two_modules_of_one_name_are_never_confused(here: Path) -> None:
    load_reward_funcs([str(here / "paths_mine.brevity")])
    other = here.parent / "elsewhere" / "paths_mine.py"
    other.write_text(REWARD, encoding="utf-8")
    with pytest.raises(RewardError, match="another module is called 'paths_mine'"):
        load_reward_funcs([str(other.parent / "paths_mine.brevity")])
    with pytest.raises(RewardError, match="no folder"):
        load_reward_funcs([str(here / "gone" / "paths_mine.brevity")])


def test_settings_are_the_same_when_the_saved_file_is_read_elsewhere(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = ["--dataset_name", "data.jsonl", "--model_name_or_path", "model"]
    flags += ["--reward_funcs", "default", "paths_mine.brevity"]
    begun = load_config("tiny", None, flags)
    (here / "config.yaml").write_text(begun.to_yaml(), encoding="utf-8")
    monkeypatch.chdir(here.parent / "elsewhere")
    again = load_config(None, str(here / "config.yaml"), [])
    assert again.model == begun.model and again.script == begun.script
    assert again.script.reward_funcs == ["default", str(here / "paths_mine.brevity")]
