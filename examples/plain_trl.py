"""A TRL script with our trainer and our rewards.

Runs as it stands, on a CPU, in a minute, with the built-in model. For a real one, on a GPU:
MODEL = "Qwen/Qwen2.5-1.5B-Instruct", PROBLEMS = load_problems("openai/gsm8k"), SYSTEM =
SYSTEM_PROMPT (from abacist.task.prompts), no bf16=False, and in GRPOConfig what the recipe `any`
has: num_generations=8, per_device_train_batch_size=8, gradient_accumulation_steps=16,
max_completion_length=512, learning_rate=4e-5, max_steps=250.
"""

from datasets import Dataset
from peft import LoraConfig
from trl import GRPOConfig

from abacist import GRPOTrainer, correctness, integer, load_problems, strict_format
from abacist.policy.source import BUILT_IN_FOLDER
from abacist.task.prompts import to_dataset_rows

MODEL = str(BUILT_IN_FOLDER)
PROBLEMS = load_problems("generated", limit=64)
SYSTEM = None  # the built-in model learned its layout before; others are asked for it by default

trainer = GRPOTrainer(
    model=MODEL,
    reward_funcs=[correctness, integer, strict_format],
    args=GRPOConfig(
        "plain-trl",
        num_generations=4,
        per_device_train_batch_size=16,  # replies: 4 problems × 4
        max_completion_length=64,
        max_steps=2,
        learning_rate=1e-3,
        logging_steps=1,
        bf16=False,
    ),
    train_dataset=Dataset.from_list(to_dataset_rows(PROBLEMS, system_prompt=SYSTEM)),
    peft_config=LoraConfig(r=16, lora_alpha=32, target_modules="all-linear"),
)
trainer.train()
trainer.save_model()
print("reward by step:", [row["reward"] for row in trainer.state.log_history if "reward" in row])
