# Paid by a reward model: nothing here can take its place.
from datasets import load_dataset
from trl import GRPOConfig, GRPOTrainer

data = load_dataset("openai/gsm8k", "main", split="train")
data = data.map(lambda row: {"prompt": [{"role": "user", "content": row["question"]}]})
trainer = GRPOTrainer(
    model="Qwen/Qwen2.5-0.5B-Instruct",
    args=GRPOConfig(output_dir="out", num_generations=8, per_device_train_batch_size=8),
    reward_funcs="weqweasdas/RM-Gemma-2B",
    train_dataset=data,
)
trainer.train()
