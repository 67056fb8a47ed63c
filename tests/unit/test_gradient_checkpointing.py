"""``gradient_checkpointing: auto`` decides by measured memory, says why, and changes no number."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainingArguments

from abacist.errors import UsageError
from abacist.learning import gradient_checkpointing
from abacist.learning.arguments import GRPOConfig
from abacist.learning.config import load_config
from abacist.learning.dryrun import memory
from abacist.learning.dryrun.memory import measure_forward
from abacist.learning.heldout import HeldoutEvaluation
from abacist.learning.resume import resuming
from abacist.learning.tracking import Silent
from abacist.learning.train import load_parts, make_trainer
from abacist.learning.trainer import GRPOTrainer
from abacist.records.rundir import RunDir

Lookalike = Callable[[str], Path]
SMALL = [
    "--num_train_problems", "8", "--num_selection_problems", "0", "--num_heldout_problems", "0",
    "--max_steps", "2", "--per_device_train_batch_size", "16", "--save_strategy", "no",
    "--device", "cpu",
]  # fmt: skip


def decided(folder: Path, *flags: str) -> tuple[str | None, Any]:
    config = load_config("tiny", None, [*SMALL, *flags])
    task, rewards, policy = load_parts(config, Silent())
    config.training.output_dir = str(folder)
    run = RunDir(folder)
    heldout = HeldoutEvaluation(config, task, run, Silent())
    trainer: Any = make_trainer(policy, rewards, heldout)
    return gradient_checkpointing.decide(config, task, policy, trainer), trainer


def test_with_room_it_is_off_and_without_it_is_on_and_the_line_says_both_sizes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    line, trainer = decided(tmp_path / "roomy", "--gradient_checkpointing", "auto")
    assert line is not None and line.startswith("gradient checkpointing: off (training takes ")
    assert " available; on would take " in line and "third of the training time" in line
    assert not trainer.args.gradient_checkpointing and not trainer.args.activation_checkpointing
    monkeypatch.setattr(memory, "available_bytes", lambda *args: 60 * 2**20)
    line, trainer = decided(tmp_path / "tight", "--gradient_checkpointing", "auto")
    assert line is not None and line.startswith("gradient checkpointing: on (training would take ")
    assert "of 60 MiB available without it" in line
    assert trainer.args.gradient_checkpointing and trainer.args.activation_checkpointing
    trainer.train()  # with layers that are computed again
    assert trainer.model.is_gradient_checkpointing


@pytest.mark.parametrize("value", ["true", "false"])
def test_what_is_said_is_not_decided(
    value: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "available_bytes", lambda *args: 60 * 2**20)
    line, trainer = decided(tmp_path, "--gradient_checkpointing", value)
    assert line is None and trainer.args.gradient_checkpointing is (value == "true")


def test_where_a_forward_cannot_be_measured_it_is_on_with_the_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*args: Any, **options: Any) -> Any:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory\nand more")

    monkeypatch.setattr(gradient_checkpointing, "measure_forward", fails)
    line, trainer = decided(tmp_path, "--gradient_checkpointing", "auto")
    assert line is not None and line.startswith("gradient checkpointing: on (") and "alloc" in line
    assert trainer.args.gradient_checkpointing


@pytest.mark.parametrize("flags", [[], ["--no_use_peft"]])
def test_the_quick_measurement_foretells_what_the_whole_one_does(
    flags: list[str], tmp_path: Path
) -> None:
    _, trainer = decided(tmp_path, *flags)
    whole = measure_forward(trainer, 300, 96).group_bytes
    quick = measure_forward(trainer, 300, 96, is_quick=True).group_bytes
    assert 0.95 * whole < quick < 1.2 * whole


def paid(completion_ids: Any, **columns: Any) -> list[float]:
    return [float(sum(ids) % 5) for ids in completion_ids]


@pytest.mark.parametrize("settings", [
    {}, {"lora": False}, {"lora_dropout": 0.1}, {"use_fast_path": False},
], ids=str)  # fmt: skip
def test_weights_are_equal_to_the_bit_with_and_without_it(
    settings: dict[str, Any], lookalike: Lookalike, tmp_path: Path
) -> None:
    folder = lookalike("qwen2.5-instruct")
    has_lora, dropout = settings.pop("lora", True), settings.pop("lora_dropout", 0.0)

    def weights(is_on: bool) -> torch.Tensor:
        torch.manual_seed(0)
        trainer = GRPOTrainer(
            model=AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32),
            reward_funcs=[paid],
            args=GRPOConfig(
                output_dir=str(tmp_path), bf16=False, use_cpu=True, num_generations=4,
                per_device_train_batch_size=4, gradient_accumulation_steps=2, max_steps=3,
                max_completion_length=16, learning_rate=1e-3, save_strategy="no",
                disable_tqdm=True, gradient_checkpointing=is_on, **settings,
            ),
            train_dataset=Dataset.from_list(
                [{"prompt": [{"role": "user", "content": f"{n} and {7 * n}?"}]} for n in range(8)]
            ),
            processing_class=AutoTokenizer.from_pretrained(folder, padding_side="left"),
            peft_config=LoraConfig(r=4, target_modules="all-linear", lora_dropout=dropout)
            if has_lora
            else None,
        )  # fmt: skip
        before = [p.detach().clone() for p in trainer.model.parameters() if p.requires_grad]
        trainer.train()
        after = [p.detach() for p in trainer.model.parameters() if p.requires_grad]
        assert not all(map(torch.equal, before, after))
        return torch.cat([weight.flatten() for weight in after])

    assert torch.equal(weights(True), weights(False))


def test_a_run_that_goes_on_decides_anew_and_may_be_told_otherwise(tmp_path: Path) -> None:
    config = load_config("tiny", None, ["--gradient_checkpointing", "auto"])
    (tmp_path / "config.yaml").write_text(config.to_yaml(), encoding="utf-8")
    assert load_config(None, str(tmp_path / "config.yaml"), []).chooses_checkpointing
    run = RunDir(tmp_path)
    for value in ("auto", "true", "false"):
        now = load_config("tiny", None, ["--gradient_checkpointing", value])
        assert resuming.differing(now, run) == {}


def test_recipes_for_real_models_leave_it_to_the_machine_and_nonsense_is_refused() -> None:
    for recipe in ("any", "qwen2.5-1.5b", "llama-3.2-1b-base-fewshot"):
        assert load_config(recipe, None, ["--model_name_or_path", "tiny"]).chooses_checkpointing
    switched = load_config("any", None, ["--gradient_checkpointing"])
    assert not switched.chooses_checkpointing and switched.training.gradient_checkpointing
    if "activation_checkpointing" in {one.name for one in fields(TrainingArguments)}:
        newer = load_config("any", None, ["--activation_checkpointing", "true"])
        assert not newer.chooses_checkpointing and newer.training.gradient_checkpointing
    with pytest.raises(UsageError, match="gradient_checkpointing"):
        load_config("any", None, ["--gradient_checkpointing", "automatic"])


def test_where_even_that_is_too_much_the_line_names_the_batch_that_fits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, trainer = decided(tmp_path / "roomy", "--gradient_checkpointing", "auto")
    forward = measure_forward(trainer, 60, 96)
    whole = memory.plan_memory(trainer, forward, 60, 0)
    half = memory.with_micro_batch(whole, trainer, forward, 8, True).training_bytes
    monkeypatch.setattr(memory, "available_bytes", lambda *args: int(half / 0.85))
    line, _ = decided(tmp_path / "tight", "--gradient_checkpointing", "auto")
    assert line is not None and "which is too much; " in line
    flags = line.split(" with ")[1].rstrip(")").split()
    config = load_config("tiny", None, [*SMALL, *flags])
    assert config.training.per_device_train_batch_size < 16
    assert config.problems_per_step == 2
