"""Run by test_processes.py under torchrun: ten SGD steps by TRL and by us, in two processes."""

from __future__ import annotations

import itertools
import sys
from pathlib import Path
from typing import Any

import torch
import trl
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer

from abacist.learning.fastpath import unsupported_reason
from abacist.learning.trainer import GRPOTrainer
from abacist.policy.families import FastPart


def paid(completion_ids: Any, **columns: Any) -> list[float]:
    return [float(sum(ids) % 3 == 0) for ids in completion_ids]


def weights_after(kind: type, model: Path, output: Path) -> tuple[torch.Tensor, Any]:
    torch.manual_seed(0)
    trainer: Any = kind(
        model=AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32),
        reward_funcs=[paid],
        args=trl.GRPOConfig(
            output_dir=str(output), bf16=False, use_cpu=True, num_generations=4, optim="sgd",
            per_device_train_batch_size=4, gradient_accumulation_steps=2, learning_rate=0.01,
            lr_scheduler_type="constant", max_grad_norm=0.0, max_steps=5, save_strategy="no",
            max_completion_length=8, disable_tqdm=True, gradient_checkpointing=False,
        ),
        train_dataset=Dataset.from_list(
            [{"prompt": [{"role": "user", "content": f"{n} + {n}?"}]} for n in range(16)]
        ),
        processing_class=AutoTokenizer.from_pretrained(model, padding_side="left"),
        peft_config=LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False),
    )  # fmt: skip
    calls = itertools.count()
    rank = trainer.accelerator.process_index

    def fixed(prompt_ids: Any, *args: Any, **kwargs: Any) -> Any:
        draw = torch.Generator().manual_seed(2 * next(calls) + rank)
        return [torch.randint(20, 200, (6,), generator=draw).tolist() for _ in prompt_ids], None

    trainer._generate_single_turn = fixed
    trainer.train()
    state = trainer.accelerator.unwrap_model(trainer.model).state_dict()
    return torch.cat([v.flatten() for n, v in state.items() if "lora" in n]), trainer


if __name__ == "__main__":
    model, output = map(Path, sys.argv[1:])
    theirs, _ = weights_after(trl.GRPOTrainer, model, output / "trl")
    ours, trainer = weights_after(GRPOTrainer, model, output / "ours")
    assert trainer.accelerator.num_processes == 2
    assert unsupported_reason(trainer, FastPart.SCORING) is None
    if trainer.accelerator.is_main_process:
        print("apart", float((ours - theirs).abs().max()))
