"""A training in which nothing could move is refused before it begins, with the mend."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import trl
from datasets import Dataset
from peft import LoraConfig, PeftModel, PromptTuningConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from abacist.errors import ModelError
from abacist.learning import frozen
from abacist.learning.trainer import GRPOTrainer
from abacist.policy.loading import load_policy
from faults import fault

Lookalike = Callable[[str], Path]
LORA = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    import lookalikes

    return lookalikes.build("qwen2.5-instruct", tmp_path_factory.mktemp("q") / "model", size=32)


def base(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder)


@pytest.fixture(scope="module")
def adapter(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One that somebody has trained before, saved."""
    path = tmp_path_factory.mktemp("adapter")
    get_peft_model(base(folder), LORA).save_pretrained(path)
    return path


def train(model: Any, folder: Path, output: Path, **more: Any) -> Any:
    trainer = GRPOTrainer(
        model=model,
        reward_funcs=[lambda completion_ids, **_: [float(sum(ids) % 5) for ids in completion_ids]],
        args=trl.GRPOConfig(
            output_dir=str(output), use_cpu=True, bf16=False, num_generations=4,
            per_device_train_batch_size=4, max_completion_length=4, max_steps=1, report_to="none",
            save_strategy="no", disable_tqdm=True, learning_rate=0.1,
        ),
        train_dataset=Dataset.from_list([{"prompt": f"{n} + 1 = "} for n in range(4)]),
        processing_class=AutoTokenizer.from_pretrained(folder, padding_side="left"),
        **more,
    )  # fmt: skip
    return trainer


def test_an_adapter_that_arrives_frozen_is_refused_and_a_trainable_one_is_trained(
    folder: Path, adapter: Path, tmp_path: Path
) -> None:
    with pytest.raises(ModelError, match=r"adapter \('default'\) is trainable") as found:
        train(PeftModel.from_pretrained(base(folder), adapter), folder, tmp_path)
    assert "is_trainable=True" in found.value.hint
    model = PeftModel.from_pretrained(base(folder), adapter, is_trainable=True)
    before = {n: w.detach().clone() for n, w in model.named_parameters() if w.requires_grad}
    train(model, folder, tmp_path).train()
    moved = [
        n for n, w in model.named_parameters() if n in before and not torch.equal(w, before[n])
    ]
    assert moved


def test_an_adapter_folder_is_loaded_to_be_trained(folder: Path, adapter: Path) -> None:
    policy = load_policy(str(adapter), device="cpu", trainable=True)
    frozen.refuse(policy.model)
    with pytest.raises(ModelError, match="is trainable"):
        frozen.refuse(load_policy(str(adapter), device="cpu").model)


def all_frozen(folder: Path) -> Any:
    return base(folder).requires_grad_(False)


def base_trained_beside_a_frozen_adapter(folder: Path) -> Any:
    model = get_peft_model(base(folder), LORA)
    for name, weight in model.named_parameters():
        weight.requires_grad_("lora" not in name)
    return model


def switched_off(folder: Path) -> Any:
    model = get_peft_model(base(folder), LORA)
    model.base_model.disable_adapter_layers()
    return model


def another_one_active(folder: Path) -> Any:
    model = get_peft_model(base(folder), LORA)
    model.add_adapter("other", LORA)
    for name, weight in model.named_parameters():
        weight.requires_grad_(".other." in name)
    return model


def merged(folder: Path) -> Any:
    model = get_peft_model(base(folder), LORA)
    model.merge_adapter()
    return model


def frozen_prompt(folder: Path) -> Any:
    config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    return get_peft_model(base(folder), config).requires_grad_(False)


@fault("model", "nothing of it could learn: all frozen, or the adapter frozen, off or merged",
       "what stands still, and the call that mends it, before anything is measured")  # fmt: skip
@pytest.mark.parametrize(
    ("make", "says", "mend"),
    [
        (all_frozen, "No weight of the model", "requires_grad_"),
        (base_trained_beside_a_frozen_adapter, "No weight of the adapter", "is_trainable"),
        (switched_off, "switched off", "enable_adapter_layers"),
        (another_one_active, "is not active", "set_adapter('other')"),
        (merged, "merged", "unmerge_adapter"),
        (frozen_prompt, "No weight of the adapter", "is_trainable"),
    ],
)
def test_what_could_not_move_is_refused_when_the_trainer_is_made(
    make: Callable[[Path], Any], says: str, mend: str, folder: Path, tmp_path: Path
) -> None:
    with pytest.raises(ModelError, match=says) as found:
        train(make(folder), folder, tmp_path)
    assert mend in found.value.hint


def test_an_optimizer_of_other_weights_is_refused_and_one_of_some_of_them_is_not(
    folder: Path, tmp_path: Path
) -> None:
    model, other = base(folder), base(folder)
    with pytest.raises(ModelError, match="optimizer holds none"):
        train(model, folder, tmp_path, optimizers=(torch.optim.SGD(other.parameters(), 0.1), None))
    some = torch.optim.SGD([model.model.norm.weight], 0.1)
    frozen.refuse(model, some)


def test_weights_frozen_after_the_trainer_was_made_are_seen_before_the_first_step(
    folder: Path, tmp_path: Path
) -> None:
    trainer = train(base(folder), folder, tmp_path)
    trainer.model.requires_grad_(False)
    with pytest.raises(ModelError, match="No weight of the model"):
        trainer.train()


@pytest.mark.parametrize("half", [False, True])
def test_an_adapter_of_which_a_part_is_trainable_is_trained(half: bool, folder: Path) -> None:
    model = get_peft_model(base(folder), LORA)
    if half:
        for name, weight in model.named_parameters():
            if "lora_A" in name:
                weight.requires_grad_(False)
    frozen.refuse(model)
