"""A dataclass of settings, lambdas as rewards, few-shot turns written out, a base model."""
from dataclasses import dataclass, field

from datasets import load_dataset
from transformers import AutoTokenizer
from trl import GRPOConfig, GRPOTrainer


@dataclass
class Settings:
    model: str = "Qwen/Qwen2.5-0.5B"
    lr: float = 3e-6
    group: int = 8
    betas: tuple = (0.9, 0.95)
    tags: list = field(default_factory=lambda: ["reasoning", "answer"])
    limit: int = 1_000


cfg = Settings(lr=2e-6)
cfg.group = 4
ASK = "\n".join(["Write", "<reasoning>", "your steps", "</reasoning>", "<answer>", "a number", "</answer>"])
EXAMPLE = [
    {"role": "user", "content": "Mia has 4 boxes of 6 pencils and loses 5. How many are left?"},
    {
        "role": "assistant",
        "content": "<reasoning>\n4 * 6 = 24\n24 - 5 = 19\n</reasoning>\n<answer>\n19\n</answer>",
    },
]


def gold(solution):
    return solution.rpartition("####")[2].strip().replace(",", "")


def row(example):
    turns = [{"role": "system", "content": ASK}] + EXAMPLE
    turns = turns + [{"role": "user", "content": example["question"]}]
    return {"prompt": turns, "answer": gold(example["answer"])}


def tail(text):
    return text.split("<answer>")[-1].split("</answer>")[0].strip()


data = load_dataset("gsm8k", "main", split="train").select(range(cfg.limit)).map(row)
tok = AutoTokenizer.from_pretrained(cfg.model)
trainer = GRPOTrainer(
    model=cfg.model,
    reward_funcs=[
        lambda completions, answer, **kw: [
            2.0 * (tail(c[0]["content"]) == a) for c, a in zip(completions, answer)
        ],
        lambda completions, **kw: [min(len(c[0]["content"]), 400) / 4000 for c in completions],
    ],
    args=GRPOConfig(
        output_dir="base",
        learning_rate=cfg.lr,
        adam_beta1=cfg.betas[0],
        adam_beta2=cfg.betas[1],
        num_generations=cfg.group,
        per_device_train_batch_size=cfg.group * 2,
        gradient_accumulation_steps=8,
        max_completion_length=128,
        bf16=False,
        gradient_checkpointing=True,
    ),
    train_dataset=data,
    processing_class=tok,
)
trainer.train()
