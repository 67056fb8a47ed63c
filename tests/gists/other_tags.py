# Another reply format, rewards by degrees, a quantised model of Unsloth's, vLLM.
from unsloth import FastLanguageModel
import re
from datasets import load_dataset
from trl import GRPOConfig, GRPOTrainer

max_seq_length = 2048
lora_rank = 32
model, tokenizer = FastLanguageModel.from_pretrained(
    model_name="unsloth/Llama-3.2-1B-Instruct-bnb-4bit",
    max_seq_length=max_seq_length,
    load_in_4bit=True,
    fast_inference=True,
    max_lora_rank=lora_rank,
    gpu_memory_utilization=0.6,
)
model = FastLanguageModel.get_peft_model(
    model,
    r=lora_rank,
    target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
    lora_alpha=lora_rank,
    use_gradient_checkpointing="unsloth",
    random_state=3407,
)

think_open, think_close = "<think>", "</think>"
solution_open, solution_close = "<SOLUTION>", "</SOLUTION>"
system_prompt = f"""You are given a problem.
Put your work between {think_open} and {think_close}.
Then put the result between {solution_open} and {solution_close}."""

whole = re.compile(
    rf"^[\s]*{think_open}.+?{think_close}.*?{solution_open}(.+?){solution_close}[\s]*$",
    flags=re.MULTILINE | re.DOTALL,
)
number = re.compile(rf"{solution_open}.*?([\d\.\,]+)", flags=re.DOTALL)


def exact_layout(completions, **kwargs):
    scores = []
    for completion in completions:
        score = 0
        if whole.search(completion[0]["content"]) is not None:
            score += 3.0
        scores.append(score)
    return scores


def near_answer(prompts, completions, answer, **kwargs):
    scores = []
    for completion, gold in zip(completions, answer):
        found = number.search(completion[0]["content"])
        if found is None:
            scores.append(-2.0)
            continue
        try:
            share = float(found.group(1)) / float(gold)
            scores.append(2.0 if 0.9 <= share <= 1.1 else -1.0)
        except ValueError:
            scores.append(0)
    return scores


def no_apologies(completions, **kwargs):
    return [-0.5 if "sorry" in completion[0]["content"].lower() else 0.0 for completion in completions]


rows = load_dataset("openai/gsm8k", "main", split="train[:2000]")
rows = rows.map(lambda x: {
    "prompt": [
        {"role": "system", "content": system_prompt},
        {"role": "user", "content": x["question"]},
    ],
    "answer": x["answer"].split("####")[1].strip(),
})

max_prompt_length = 287
trainer = GRPOTrainer(
    model=model,
    processing_class=tokenizer,
    reward_funcs=[exact_layout, near_answer, no_apologies],
    args=GRPOConfig(
        learning_rate=5e-5,
        weight_decay=0.001,
        warmup_ratio=0.1,
        lr_scheduler_type="linear",
        optim="paged_adamw_8bit",
        logging_steps=1,
        per_device_train_batch_size=1,
        gradient_accumulation_steps=4,
        num_generations=4,
        max_prompt_length=max_prompt_length,
        max_completion_length=max_seq_length - max_prompt_length,
        max_steps=500,
        save_steps=250,
        max_grad_norm=1.0,
        report_to="none",
        output_dir="outputs",
        use_vllm=True,
        vllm_mode="colocate",
    ),
    train_dataset=rows,
)
trainer.train()
