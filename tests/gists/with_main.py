"""argparse, a main(), rewards under names of their own, settings by arithmetic and by a dict."""
import argparse
import os
import re

import trl
from datasets import load_dataset
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

LAYOUT = "<reasoning>\n{think}\n</reasoning>\n<answer>\n{result}\n</answer>"
INSTRUCTION = "Think first, then answer, like this:\n" + LAYOUT.format(think="...", result="...")
LAYOUT_RE = re.compile(r"^<reasoning>\n.+?\n</reasoning>\n<answer>\n.+?\n</answer>$", re.DOTALL)


def read(reply):
    return reply.rpartition("<answer>")[2].partition("</answer>")[0].strip()


def right(completions, ground_truth, **_):
    """One point for the right number, minus one for another."""
    rewards = []
    for completion, gold in zip(completions, ground_truth):
        if read(completion[-1]["content"]) == gold:
            rewards.append(1.0)
        else:
            rewards.append(-1.0)
    return rewards


def laid_out(completions, **_):
    return [0.25 if LAYOUT_RE.match(one[-1]["content"]) else 0.0 for one in completions]


def parse():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="unsloth/Qwen2.5-0.5B-Instruct")
    parser.add_argument("--lr", type=float, default=1e-5)
    parser.add_argument("--groups", type=int, default=2)
    parser.add_argument("--steps", type=int, default=50 * 5)
    parser.add_argument("--quick", action="store_true")
    return parser.parse_args()


def main():
    args = parse()
    group_size = 8
    batch = args.groups * group_size
    shared = {
        "learning_rate": args.lr,
        "lr_scheduler_type": "constant_with_warmup",
        "warmup_steps": 10,
        "max_steps": 20 if args.quick else args.steps,
    }
    config = trl.GRPOConfig(
        f"out/{args.model.split('/')[-1]}",
        per_device_train_batch_size=batch,
        gradient_accumulation_steps=64 // batch,
        num_generations=group_size,
        max_completion_length=1024 - 512,
        beta=0.0,
        temperature=0.9,
        fp16=True,
        report_to=os.environ.get("TRACKER", "none"),
        seed=3407,
        **shared,
    )
    config.logging_steps = 5
    rows = load_dataset("openai/gsm8k", name="main", split="train")
    rows = rows.shuffle(seed=1).map(to_row, remove_columns=["question"])
    model = AutoModelForCausalLM.from_pretrained(args.model)
    model = get_peft_model(model, LoraConfig(r=32, lora_alpha=32, target_modules="all-linear"))
    tokenizer = AutoTokenizer.from_pretrained(args.model, padding_side="left")
    trainer = trl.GRPOTrainer(
        model, [right, laid_out], config, rows, processing_class=tokenizer
    )
    trainer.train()
    trainer.save_model(config.output_dir)


def to_row(example):
    solution = example["answer"]
    return {
        "prompt": [
            {"role": "system", "content": INSTRUCTION},
            {"role": "user", "content": f"Problem: {example['question']}"},
        ],
        "ground_truth": solution.split("####")[-1].strip(),
    }


if __name__ == "__main__":
    main()
