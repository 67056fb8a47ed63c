# One file, everything at module level, five rewards: the shape in which GRPO on GSM8K went around.
import re

import torch
from datasets import Dataset, load_dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from peft import LoraConfig
from trl import GRPOConfig, GRPOTrainer

SYSTEM = """
Answer in this form:
<reasoning>
...
</reasoning>
<answer>
...
</answer>
"""


def from_tags(text: str) -> str:
    tail = text.split("<answer>")[-1]
    return tail.split("</answer>")[0].strip()


def after_hashes(text: str) -> str | None:
    if "####" not in text:
        return None
    return text.split("####")[1].strip().replace(",", "").replace("$", "")


def questions(split="train") -> Dataset:
    rows = load_dataset("openai/gsm8k", "main")[split]
    rows = rows.map(
        lambda row: {
            "prompt": [
                {"role": "system", "content": SYSTEM},
                {"role": "user", "content": row["question"]},
            ],
            "answer": after_hashes(row["answer"]),
        }
    )
    return rows


dataset = questions()


def correctness_reward_func(prompts, completions, answer, **kwargs) -> list[float]:
    replies = [completion[0]["content"] for completion in completions]
    found = [from_tags(reply) for reply in replies]
    print(f"Q: {prompts[0][-1]['content']}\nGold: {answer[0]}\nReply: {replies[0]}")
    return [2.0 if one == gold else 0.0 for one, gold in zip(found, answer)]


def int_reward_func(completions, **kwargs) -> list[float]:
    found = [from_tags(completion[0]["content"]) for completion in completions]
    return [0.5 if one.isdigit() else 0.0 for one in found]


def strict_format_reward_func(completions, **kwargs) -> list[float]:
    pattern = r"^<reasoning>\n.*?\n</reasoning>\n<answer>\n.*?\n</answer>\n$"
    hits = [re.match(pattern, completion[0]["content"]) for completion in completions]
    return [0.5 if hit else 0.0 for hit in hits]


def soft_format_reward_func(completions, **kwargs) -> list[float]:
    pattern = r"<reasoning>.*?</reasoning>\s*<answer>.*?</answer>"
    hits = [re.match(pattern, completion[0]["content"]) for completion in completions]
    return [0.5 if hit else 0.0 for hit in hits]


def tally(text) -> float:
    total = 0.0
    if text.count("<reasoning>\n") == 1:
        total += 0.125
    if text.count("\n</reasoning>\n") == 1:
        total += 0.125
    if text.count("\n<answer>\n") == 1:
        total += 0.125
        total -= len(text.split("\n</answer>\n")[-1]) * 0.001
    if text.count("\n</answer>") == 1:
        total += 0.125
        total -= (len(text.split("\n</answer>")[-1]) - 1) * 0.001
    return total


def xmlcount_reward_func(completions, **kwargs) -> list[float]:
    return [tally(completion[0]["content"]) for completion in completions]


model_name = "Qwen/Qwen2.5-1.5B-Instruct"
if "Llama" in model_name:
    output_dir = "outputs/llama-grpo"
    run_name = "llama-grpo"
else:
    output_dir = "outputs/qwen-grpo"
    run_name = "qwen-grpo"

training_args = GRPOConfig(
    output_dir=output_dir,
    run_name=run_name,
    learning_rate=5e-6,
    adam_beta1=0.9,
    adam_beta2=0.99,
    weight_decay=0.1,
    warmup_ratio=0.1,
    lr_scheduler_type="cosine",
    logging_steps=1,
    bf16=True,
    per_device_train_batch_size=1,
    gradient_accumulation_steps=4,
    num_generations=16,
    max_prompt_length=256,
    max_completion_length=786,
    num_train_epochs=1,
    save_steps=100,
    max_grad_norm=0.1,
    report_to="wandb",
    log_on_each_node=False,
)
peft_config = LoraConfig(
    r=16,
    lora_alpha=64,
    target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "down_proj", "gate_proj"],
    task_type="CAUSAL_LM",
    lora_dropout=0.05,
)
model = AutoModelForCausalLM.from_pretrained(
    model_name, torch_dtype=torch.bfloat16, attn_implementation="flash_attention_2", device_map=None
).to("cuda")
tokenizer = AutoTokenizer.from_pretrained(model_name)
tokenizer.pad_token = tokenizer.eos_token

trainer = GRPOTrainer(
    model=model,
    processing_class=tokenizer,
    reward_funcs=[
        xmlcount_reward_func,
        soft_format_reward_func,
        strict_format_reward_func,
        int_reward_func,
        correctness_reward_func,
    ],
    args=training_args,
    train_dataset=dataset,
    # peft_config=peft_config
)
trainer.train()
