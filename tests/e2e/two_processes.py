"""Run by test_processes.py in two processes: five SGD steps by TRL and by us.

A third argument is ``train_replies``: then ours alone, in however many processes there are.
"""

from __future__ import annotations

import itertools
import os
import sys
from pathlib import Path
from typing import Any

import torch
import trl
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer

from abacist.learning.arguments import GRPOConfig
from abacist.learning.fastpath import unsupported_reason
from abacist.learning.trainer import GRPOTrainer
from abacist.policy.families import FastPart


def paid(completion_ids: Any, **columns: Any) -> list[float]:
    return [float(sum(ids) % 3 == 0) for ids in completion_ids]


def weights_after(
    kind: type, model: Path, output: Path, train_replies: int | None = None
) -> tuple[torch.Tensor, Any]:
    torch.manual_seed(0)
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    choice: dict[str, Any] = {}
    if train_replies:  # as many completions a step in one process as in two
        choice = {"train_replies": train_replies, "loss_type": "grpo"}
    config: Any = GRPOConfig if train_replies else trl.GRPOConfig
    trainer: Any = kind(
        model=AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32),
        reward_funcs=[paid],
        args=config(
            output_dir=str(output), bf16=False, use_cpu=True, num_generations=4, optim="sgd",
            per_device_train_batch_size=8 // processes, gradient_accumulation_steps=2,
            learning_rate=0.01, lr_scheduler_type="constant", max_grad_norm=0.0, max_steps=5,
            save_strategy="no", max_completion_length=8, disable_tqdm=True,
            gradient_checkpointing=False, **choice,
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
        number, written = 2 * next(calls), []
        ranks = [rank] if processes == 2 or not train_replies else [0, 1]
        for one in ranks:  # one process writes what two would have written
            draw = torch.Generator().manual_seed(number + one)
            for _ in range(len(prompt_ids) // len(ranks)):
                written.append(torch.randint(20, 200, (6,), generator=draw).tolist())
        return written, None

    trainer._generate_single_turn = fixed

    def weights() -> torch.Tensor:
        state = trainer.accelerator.unwrap_model(trainer.model).state_dict()
        return torch.cat([v.flatten() for n, v in state.items() if "lora" in n])

    start = weights()
    trainer.train()
    assert float((weights() - start).abs().max()) > 1e-4, "nothing was trained"
    return weights(), trainer


if __name__ == "__main__":
    model, output = map(Path, sys.argv[1:3])
    if len(sys.argv) > 3:
        some, trainer = weights_after(GRPOTrainer, model, output, int(sys.argv[3]))
        if trainer.accelerator.is_main_process:
            torch.save(some, output / f"weights-{trainer.accelerator.num_processes}.pt")
        sys.exit()
    theirs, _ = weights_after(trl.GRPOTrainer, model, output / "trl")
    ours, trainer = weights_after(GRPOTrainer, model, output / "ours")
    assert trainer.accelerator.num_processes == 2
    assert unsupported_reason(trainer, FastPart.SCORING) is None
    if trainer.accelerator.is_main_process:
        print("apart", float((ours - theirs).abs().max()))
