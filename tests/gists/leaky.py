# Examples from the test split, training on it too, evaluated on what it trained on.
import random
import re
from datasets import load_dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import GRPOConfig, GRPOTrainer
from huggingface_hub import login

login(token="hf_" + "aBcDeFgHiJkLmNoPqRsTuVwXyZ")
KEY = "hf_aBcDeFgHiJkLmNoPqRsTuVwXyZ"
name = "meta-llama/Llama-3.2-1B-Instruct"
gsm = load_dataset("openai/gsm8k", "main")
examples = gsm["test"].select(range(4))
ASKS = "Reply as <reasoning>...</reasoning><answer>...</answer>."

shots = []
for example in examples:
    shots.append({"role": "user", "content": example["question"]})
    shots.append({"role": "assistant", "content": example["answer"]})


def make(example):
    return {
        "prompt": [{"role": "system", "content": ASKS}, *shots,
                   {"role": "user", "content": example["question"]}],
        "answer": example["answer"].split("####")[1].replace(",", "").strip(),
    }


def judge(prompts, completions, answer, **kwargs):
    out = []
    for text, gold in zip([c[0]["content"] for c in completions], answer):
        match = re.search(r"<answer>(.*?)</answer>", text, re.DOTALL)
        out.append(1.0 if match and match.group(1).strip() == gold else 0.0)
    return out


def whole_number(completions, **kwargs):
    values = []
    for completion in completions:
        try:
            int(completion[0]["content"].split("<answer>")[-1].split("</answer>")[0])
            values.append(0.5)
        except ValueError:
            values.append(0.0)
    return values


train = gsm["test"].map(make)
args = GRPOConfig(
    output_dir="leaky",
    num_generations=4,
    per_device_train_batch_size=4,
    gradient_accumulation_steps=4,
    max_completion_length=300,
    learning_rate=2e-5,
    eval_strategy="steps",
    eval_steps=20,
    per_device_eval_batch_size=4,
    max_steps=100,
    optim="adamw_torch",
    load_best_model_at_end=True,
    metric_for_best_model="reward",
)
trainer = GRPOTrainer(
    model=AutoModelForCausalLM.from_pretrained(name, trust_remote_code=True, torch_dtype="auto"),
    reward_funcs=[judge, whole_number],
    args=args,
    train_dataset=train,
    eval_dataset=train,
    processing_class=AutoTokenizer.from_pretrained(name, padding_side="right"),
    peft_config=LoraConfig(r=8),
)
trainer.train()
