"""Run by test_processes.py, in one process and in several: the gradients of one optimizer step.

The global batch, completions included, is the same in however many processes there are.
"""

from __future__ import annotations

import itertools
import os
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback

from abacist.learning.arguments import GRPOConfig
from abacist.learning.fastpath import unsupported_reason
from abacist.learning.trainer import GRPOTrainer
from abacist.policy.families import FastPart

REPLIES, ACCUMULATION = 16, 2


class Gradients(TrainerCallback):
    """Takes the gradients from between the last backward of a step and the optimizer."""

    found: dict[str, torch.Tensor]

    def on_pre_optimizer_step(self, *args: Any, model: Any = None, **kwargs: Any) -> None:
        self.found = {
            name.removeprefix("module."): weight.grad.clone()
            for name, weight in model.named_parameters()
            if weight.grad is not None
        }


def paid(completion_ids: Any, **columns: Any) -> list[float]:
    return [float(sum(ids) % 3 == 0) for ids in completion_ids]


def gradients(model: Path, output: Path, lora: bool, processes: int) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    taken = Gradients()
    trainer: Any = GRPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32),
        reward_funcs=[paid],
        args=GRPOConfig(
            output_dir=str(output), bf16=False, use_cpu=True, num_generations=4, optim="sgd",
            per_device_train_batch_size=REPLIES // processes // ACCUMULATION,
            gradient_accumulation_steps=ACCUMULATION, learning_rate=0.01, max_steps=1,
            max_grad_norm=0.0, save_strategy="no", max_completion_length=8, disable_tqdm=True,
            gradient_checkpointing=False, keep_rollouts=True,
        ),
        train_dataset=Dataset.from_list(
            [{"prompt": [{"role": "user", "content": f"{n} + {n}?"}]} for n in range(16)]
        ),
        processing_class=AutoTokenizer.from_pretrained(model, padding_side="left"),
        peft_config=LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
        if lora
        else None,
        callbacks=[taken],
    )  # fmt: skip
    first = REPLIES // processes * trainer.accelerator.process_index
    numbers = itertools.count(first)

    def fixed(prompt_ids: Any, *args: Any, **kwargs: Any) -> Any:
        draws = (torch.Generator().manual_seed(next(numbers)) for _ in prompt_ids)
        return [torch.randint(20, 200, (6,), generator=draw).tolist() for draw in draws], None

    trainer._generate_single_turn = fixed
    trainer.train()
    assert unsupported_reason(trainer, FastPart.SCORING) is None
    return taken.found


if __name__ == "__main__":
    output, *models = map(Path, sys.argv[1:])
    for model, lora in itertools.product(models, (True, False)):
        processes = int(os.environ.get("WORLD_SIZE", "1"))
        name = f"{model.name}-{'lora' if lora else 'full'}"
        found = gradients(model, output / f"{name}-{processes}", lora, processes)
        if not dist.is_initialized() or dist.get_rank() == 0:
            torch.save(found, output / f"{name}-{processes}.pt")
