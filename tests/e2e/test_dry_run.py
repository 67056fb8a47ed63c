"""``abacist train --dry_run``: it measures, says what it found, and leaves nothing behind."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import pytest

from abacist.cli.main import main
from abacist.learning.dryrun import memory
from abacist.policy.source import find

SMALL = ["--dry_run", "--dry_run_problems", "6", "--per_device_train_batch_size", "16",
         "--num_train_problems", "40", "--num_heldout_problems", "8", "--max_completion_length",
         "64"]  # fmt: skip
Captured = pytest.CaptureFixture[str]


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working directory that holds the folder for temporary files, too."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    return tmp_path


def left_in(home: Path) -> list[Path]:
    # wandb makes two empty folders for its own when TRL first imports it, and removes them at exit.
    wandbs = list((home / "tmp").glob("*wandb-*"))
    return [path for path in home.rglob("*") if path not in {home / "tmp", *wandbs}]


def test_a_dry_run_says_what_it_found_and_writes_nothing(home: Path, capsys: Captured) -> None:
    model = find("tiny").folder
    before = {path: path.stat().st_mtime_ns for path in model.rglob("*")}
    assert main(["train", *SMALL, "--output_dir", str(home / "run"), "--json"]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    assert left_in(home) == []
    assert {path: path.stat().st_mtime_ns for path in model.rglob("*")} == before

    assert found["fits"] and found["steps"] == 60 and found["problems_per_step"] == 2
    assert found["burst"]["steps"] >= 1
    assert found["seconds"]["total"] > 0
    names = {part["name"] for part in found["memory"]["parts"]}
    assert {"weights", "adapter", "optimizer state", "gradients", "KV cache"} <= names
    assert {"copy of the weights to decode with", "activations", "logits of a chunk"} <= names
    probe = found["probe"]
    assert sum(probe["solved_histogram"]) == probe["problems"] == 6
    assert set(probe["mixed_predicted"]) == {"4", "8", "16", "32"}
    assert "correctness" in probe["rewards"]
    settings = {one["setting"] for one in found["recommendations"]}
    assert settings == {
        "num_generations", "max_completion_length", "learning_rate",
        "per_device_train_batch_size", "gradient_checkpointing",
    }  # fmt: skip


def test_a_run_that_does_not_fit_is_not_tried_and_ends_with_one(
    home: Path, capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "available_bytes", lambda device, held_bytes=0: 2**24)
    assert main(["train", *SMALL]) == 1
    shown = capsys.readouterr().out
    assert "does not fit" in shown and "Memory is predicted to run out" in shown
    assert "steps: " not in shown and left_in(home) == []


def test_a_screen_shows_the_users_own_reward_and_what_it_cannot_teach(
    home: Path, capsys: Captured, tmp_path_factory: pytest.TempPathFactory
) -> None:
    own = tmp_path_factory.mktemp("mine") / "mine.py"
    own.write_text(
        "def flat(completions, **columns):\n    return [1.0 for _ in completions]\n",
        encoding="utf-8",
    )
    flags = ["--reward_funcs", f"{own}:flat", "--allow_hackable_rewards", "--max_steps", "3"]
    assert main(["train", *SMALL, *flags]) == 0
    shown = capsys.readouterr().out
    assert "flat 1.00" in shown and "the gradient is 0" in shown and "3 steps" in shown
    assert left_in(home) == []


@pytest.mark.parametrize("value", [[], ["none"], ["0"], ["-1"], ["²"]])
def test_a_number_of_problems_that_is_none_is_a_usage_error(
    value: list[str], home: Path, capsys: Captured
) -> None:
    assert main(["train", "--dry_run_problems", *value]) == 2
    assert "--dry_run_problems" in capsys.readouterr().err and left_in(home) == []


def test_a_model_that_is_not_there_is_the_usual_error(home: Path, capsys: Captured) -> None:
    flags = ["--model_name_or_path", "./nowhere", "--dataset_name", "generated"]
    assert main(["train", "--dry_run", *flags, "--num_train_problems", "200"]) == 1
    error = capsys.readouterr().err
    assert "nowhere" in error and "Traceback" not in error and left_in(home) == []
