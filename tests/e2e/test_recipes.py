"""Every recipe takes an optimizer step, through the real command line, on a look-alike of its
own model family with LoRA; sizes are shrunk, by flags a user could type, and a reward is added."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from abacist.cli.main import main
from abacist.learning.config import load_config
from abacist.learning.helptext import recipe_names
from abacist.records.rollout import read_rollouts
from abacist.task.rewards import load_reward_funcs
from abacist.task.wordproblems import generate
from adapters import paid_apart, untrained

pytestmark = pytest.mark.e2e
Lookalike = Callable[[str], Path]

SMALL = [
    *("--max_steps", "1", "--num_generations", "2", "--per_device_train_batch_size", "2"),
    *("--gradient_accumulation_steps", "2", "--max_completion_length", "12"),
    *("--num_train_problems", "8", "--num_heldout_problems", "4", "--save_strategy", "no"),
    *("--num_selection_problems", "0", "--num_consistency_problems", "0", "--device", "cpu"),
]


def family_of(recipe: str) -> str:
    if recipe in ("any", "gist"):
        return "qwen2.5-instruct"
    kind = "base" if "-base" in recipe else "instruct"
    return f"{'llama-3.2' if recipe.startswith('llama') else 'qwen2.5'}-{kind}"


@pytest.fixture(scope="module")
def problems(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "problems.jsonl"
    with path.open("w", encoding="utf-8") as file:
        for record in generate(120, seed=1):
            file.write(json.dumps({k: record[k] for k in ("question", "answer")}) + "\n")
    return path


@pytest.mark.parametrize("recipe", [name for name in recipe_names() if name != "tiny"])
def test_every_recipe_takes_a_step_on_a_look_alike_of_its_family(
    recipe: str, problems: Path, lookalike: Lookalike, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    model = lookalike(family_of(recipe))
    run = tmp_path / "run"
    flags = ["--model_name_or_path", str(model), "--dataset_name", str(problems)]
    flags += ["--output_dir", str(run), "--learning_rate", "0.1", "--warmup_steps", "0", *SMALL]
    wanted = load_config(recipe, None, [])
    reward_funcs = [*wanted.script.reward_funcs, paid_apart(tmp_path)]
    flags += ["--reward_funcs", *reward_funcs, "--allow_hackable_rewards"]
    # No reply of a look-alike ends by itself, and some recipes learn nothing from those cut off.
    flags += ["--mask_truncated_completions", "false"]
    if weights := wanted.training.reward_weights:
        flags += ["--reward_weights", *map(str, weights), "1.0"]
    assert main(["train", recipe, *flags]) == 0, capsys.readouterr().err

    # What the recipe promises beyond sizes reached the trainer, and the adapter learned.
    saved = yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8"))
    assert saved["num_shots"] == wanted.script.num_shots
    rollouts = read_rollouts(run / "rollouts")
    assert len(rollouts) == 4
    names = [reward.__name__ for reward in load_reward_funcs(wanted.script.reward_funcs)]
    assert list(rollouts[0].rewards) == [*names, "every_other"]
    shots = int(wanted.script.num_shots or 0)
    assert all(len(r.messages) == 2 + 2 * shots for r in rollouts), "system, examples, question"
    assert all(r.advantage for r in rollouts) and untrained(run) == []
    shown = capsys.readouterr().out
    assert str(run) in shown and "abacist ask" in shown


def test_the_saved_config_of_a_run_runs_again_as_it_stands(
    problems: Path, lookalike: Lookalike, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = lookalike("qwen2.5-instruct")
    first, again = tmp_path / "first", tmp_path / "again"
    flags = ["--model_name_or_path", str(model), "--dataset_name", str(problems), *SMALL]
    assert main(["train", "any", *flags, "--output_dir", str(first)]) == 0
    config = str(first / "config.yaml")
    assert main(["train", "--config", config, "--output_dir", str(again)]) == 0
    assert (first / "config.yaml").read_text(encoding="utf-8") == (again / "config.yaml").read_text(
        encoding="utf-8"
    )
    for name in ("metrics.jsonl", "adapter_model.safetensors"):
        assert (first / name).read_bytes() == (again / name).read_bytes(), name
    ids = [[r.completion_ids for r in read_rollouts(d / "rollouts")] for d in (first, again)]
    assert ids[0] == ids[1]
    capsys.readouterr()
