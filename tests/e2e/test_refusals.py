"""Whatever can be refused is refused before anything is measured, and leaves nothing behind."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import abacist.learning.train as learning_train
from abacist.cli.main import main
from abacist.errors import ModelError, UsageError
from abacist.learning.config import load_config
from abacist.learning.heldout import HeldoutEvaluation
from abacist.learning.setup_checks import setting_up
from abacist.records.provenance import MANIFEST_FORMAT, MANIFEST_VERSION
from abacist.task.prompts import choose_shots
from faults import fault

pytestmark = pytest.mark.e2e

FEW = ["--num_train_problems", "16", "--num_heldout_problems", "4", "--num_selection_problems", "2"]
FEW += ["--per_device_train_batch_size", "8", "--num_generations", "4"]
Captured = pytest.CaptureFixture[str]


@pytest.fixture(autouse=True)
def nothing_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    def measured(*args: Any, **how: Any) -> None:
        raise AssertionError("the base was measured before the run was refused")

    monkeypatch.setattr(HeldoutEvaluation, "measure", measured)


@pytest.fixture
def nothing_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    def loaded(*args: Any, **how: Any) -> None:
        raise ModelError("the model was loaded")

    monkeypatch.setattr(learning_train, "load_policy", loaded)


# What libraries would say late, or say nothing of: the flags, and what the one line holds.
LATE: list[tuple[str, list[str], str]] = [
    ("vLLM that is not there", ["--use_vllm"], "--use_vllm cannot be used: vLLM is not available"),
    ("an optimizer whose package is missing", ["--optim", "adamw_8bit"],
     "--optim adamw_8bit cannot be used: You need to install `bitsandbytes`"),
    ("another such optimizer", ["--optim", "galore_adamw"], "--optim galore_adamw cannot be used"),
    ("a reference that nothing needs", ["--sync_ref_model"],
     "--sync_ref_model and --beta 0.0 cannot be used"),
    ("a LoRA target that is nowhere", ["--lora_target_modules", "query"],
     "--lora_target_modules query cannot be used: Target modules"),
    ("a LoRA target that is misspelt beside a right one",
     ["--lora_target_modules", "q_proj,vv_proj"],
     "--lora_target_modules vv_proj: the model has no such module"),
    ("a LoRA on the head", ["--lora_target_modules", "lm_head"],
     "--lora_target_modules lm_head cannot be used"),
    ("a schedule's argument that it does not know",
     ["--lr_scheduler_type", "cosine", "--lr_scheduler_kwargs", '{"cycles": 2}'],
     "--lr_scheduler_type cosine and --lr_scheduler_kwargs"),
    ("a schedule without the argument that it needs",
     ["--lr_scheduler_type", "warmup_stable_decay"], "--lr_scheduler_type warmup_stable_decay"),
    ("a cache that there is not", ["--cache_implementation", "fast"],
     "--cache_implementation fast cannot be used"),
    ("an argument that generate() does not know", ["--generation_kwargs", '{"nonsense": 1}'],
     ": unknown argument nonsense"),
    ("an argument that checkpointing does not know",
     ["--gradient_checkpointing_kwargs", '{"reentrant": true}'], "unknown argument reentrant"),
    ("a compiler that there is not", ["--torch_compile_backend", "fastest"],
     "--torch_compile_backend fastest cannot be used"),
    ("a best model by a metric that is not measured",
     ["--metric_for_best_model", "loss"], "--metric_for_best_model loss is not measured"),
    ("a schedule that follows a metric that is not measured",
     ["--lr_scheduler_type", "reduce_lr_on_plateau"], "is not measured"),
    ("a loss for a kind of model that it is not", ["--router_aux_loss_coef", "0.1"],
     "--router_aux_loss_coef 0.1 cannot be used"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("flags", "said"),
    [pytest.param(flags, said, id=what, marks=fault("settings", what, "the flag and why", 2))
     for what, flags, said in LATE],
)  # fmt: skip
def test_what_a_library_would_refuse_later_is_one_line_that_names_the_flag(
    flags: list[str], said: str, tmp_path: Path, capsys: Captured
) -> None:
    run = tmp_path / "run"
    assert main(["train", *FEW, "--output_dir", str(run), *flags]) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("error:") == 1
    assert "bug in Abacist" not in error and "Traceback" not in error
    assert not run.exists()


@pytest.mark.parametrize(
    ("recipe", "file"), [("any", ""), ("any-cpu", "seed: 3\n"), (None, "extends: any\n")]
)
@fault("settings", "a recipe for any model, and no model", "that one has to be named", 2)
def test_a_recipe_for_any_model_wants_one_named(
    recipe: str | None, file: str, tmp_path: Path, capsys: Captured
) -> None:
    mine = tmp_path / "mine.yaml"
    mine.write_text(f"dataset_name: generated\n{file}", encoding="utf-8")
    where = ["--config", str(mine), "--output_dir", str(tmp_path / "run")]
    assert main(["train", *([recipe] if recipe else []), *where]) == 2
    error = capsys.readouterr().err
    assert "is for any model, and none is named" in error and "--model_name_or_path" in error
    assert not (tmp_path / "run").exists()


def mine(folder: Path, body: str) -> str:
    path = folder / "mine.py"
    path.write_text(f"def mine(completions, **columns):\n    return {body}\n", encoding="utf-8")
    return f"{path}:mine"


@fault(
    "rewards", "a reward fails on every reply", "its name and a sample, before anything is loaded"
)
@pytest.mark.parametrize("body", ["[columns['golden']]", "[1.0]", "'all good'"])
def test_a_reward_that_fails_on_every_reply_is_refused_before_the_model_is_loaded(
    body: str, nothing_is_loaded: None, tmp_path: Path, capsys: Captured
) -> None:
    flags = ["--reward_funcs", "default", mine(tmp_path, body)]
    assert main(["train", *FEW, "--output_dir", str(tmp_path / "run"), *flags]) == 1
    error = capsys.readouterr().err
    assert "'mine'" in error and "fails on every reply" in error
    assert not (tmp_path / "run").exists()


def test_a_reward_that_fails_on_some_replies_only_is_trained_on(
    nothing_is_loaded: None, tmp_path: Path, capsys: Captured
) -> None:
    body = "[1 / (len(c[0]['content']) % 7 > 0) for c in completions]"
    flags = ["--reward_funcs", "default", mine(tmp_path, body)]
    assert main(["train", *FEW, "--output_dir", str(tmp_path / "run"), *flags]) == 1
    assert "the model was loaded" in capsys.readouterr().err  # not refused before


@fault("run directory", "a run name with a slash or letters beyond ASCII",
       "the name, before anything is loaded")  # fmt: skip
@pytest.mark.parametrize("name", ["qwen/first", "Größe", "ラン", "a b"])
def test_a_name_that_no_folder_can_have_is_refused_before_the_model_is_loaded(
    name: str, nothing_is_loaded: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: Captured,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    assert main(["train", *FEW, "--run_name", name]) == 1
    assert "cannot be named" in capsys.readouterr().err and not list(tmp_path.iterdir())
    # Trackers take any name, so with a place of its own a run may have one.
    assert main(["train", *FEW, "--run_name", name, "--output_dir", "run"]) == 1
    assert "the model was loaded" in capsys.readouterr().err


@pytest.mark.parametrize("flag", [[], ["--dry_run"]])
def test_a_directory_that_holds_something_is_told_before_the_model_is_loaded(
    flag: list[str], nothing_is_loaded: None, tmp_path: Path, capsys: Captured
) -> None:
    (tmp_path / "notes.txt").write_text("mine", encoding="utf-8")
    assert main(["train", *FEW, "--output_dir", str(tmp_path), *flag]) == 1
    assert "not empty" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


@fault("run directory", "--overwrite with settings that are refused", "that; the old run stays", 2)
def test_a_run_to_be_overwritten_stays_whole_until_the_new_one_is_known_to_start(
    tmp_path: Path, capsys: Captured
) -> None:
    run = tmp_path / "run"
    run.mkdir()
    manifest = {"format": MANIFEST_FORMAT, "format_version": MANIFEST_VERSION}
    (run / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
    (run / "adapter_model.safetensors").write_bytes(b"learned")
    before = {path.name: path.read_bytes() for path in run.iterdir()}
    flags = ["--overwrite", "--optim", "adamw_8bit"]
    assert main(["train", *FEW, "--output_dir", str(run), *flags]) == 2
    assert {path.name: path.read_bytes() for path in run.iterdir()} == before
    capsys.readouterr()


not_a_list: Any = 3
RAISED: list[tuple[Callable[[], Any], type[BaseException]]] = [
    (lambda: exec("raise MemoryError()"), MemoryError),
    (lambda: Path("/nowhere/at/all").read_text(encoding="utf-8"), FileNotFoundError),
    (lambda: load_config("tiny", None, ["--sed", "1"]), UsageError),
    (lambda: choose_shots(not_a_list, 1), TypeError),  # a bug of ours stays one
]


@pytest.mark.parametrize(("act", "kind"), RAISED)
def test_faults_of_the_system_and_our_own_errors_pass_through_as_they_are(
    act: Callable[[], Any], kind: type[BaseException]
) -> None:
    config = load_config("tiny", None, [])
    with pytest.raises(kind) as raised, setting_up(config, "optim"):
        act()
    assert "cannot be used" not in str(raised.value)
