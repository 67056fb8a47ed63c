"""A subclass of the trainer, a helper that builds it, plain-text prompts, a reward by degrees."""
from __future__ import annotations

import math
import re
from functools import partial
from typing import Any

from datasets import load_dataset
from trl import GRPOConfig as Config
from trl import GRPOTrainer as Base

INTRO = (
    "Solve the problem. Write <reasoning> your steps </reasoning> and then "
    "<answer> the number </answer>.\n\n"
)
NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")
SHARPNESS = 4.0


class Trainer(Base):
    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        logs["note"] = 1.0
        super().log(logs, *args, **kwargs)


def _value(text: str) -> float | None:
    found = NUMBER.findall(text.split("<answer>")[-1])
    return float(found[0].replace(",", "")) if found else None


def closeness(completions: list[str], answer: list[str], **columns: Any) -> list[float]:
    """Full pay for the right number, less the further away it is."""
    paid = []
    for text, gold in zip(completions, answer):
        text = text if isinstance(text, str) else text[0]["content"]
        value = _value(text)
        if value is None:
            paid.append(0.0)
            continue
        distance = abs(value - float(gold)) / max(1.0, abs(float(gold)))
        paid.append(2.0 * math.exp(-SHARPNESS * distance) if distance > 0 else 3.0)
    return paid


def tags(completions, **columns):
    score = lambda text: sum(0.25 for tag in ("<reasoning>", "</reasoning>", "<answer>", "</answer>") if text.count(tag) == 1)
    return [score(c if isinstance(c, str) else c[0]["content"]) for c in completions]


def build(name: str, steps: int = 300, **settings: Any) -> Trainer:
    data = load_dataset("openai/gsm8k", "main", split="train")
    data = data.map(lambda x: {
        "prompt": INTRO + x["question"] + "\n",
        "answer": x["answer"].split("#### ")[-1].replace(",", ""),
    })
    args = Config(output_dir=name, max_steps=steps, **settings)
    return Trainer(model=name, args=args, reward_funcs=[closeness, tags], train_dataset=data)


if __name__ == "__main__":
    trainer = build(
        "HuggingFaceTB/SmolLM2-135M-Instruct",
        num_generations=8, per_device_train_batch_size=32, learning_rate=1e-6,
        scale_rewards=False, loss_type="dr_grpo", warmup_ratio=0.05,
    )
    trainer.train()
