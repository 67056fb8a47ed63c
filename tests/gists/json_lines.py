# Data from a file, columns of other names, settings made in a class, weights, a tracker.
from datasets import load_dataset
from trl import GRPOConfig, GRPOTrainer
from peft import LoraConfig, TaskType


class Hyper:
    base = "Qwen/Qwen2.5-0.5B-Instruct"
    data = "problems.jsonl"
    lr = 4e-5
    generations = 6
    prompts_per_step = 8
    length = 384


PROMPT = (
    "You solve word problems.\n"
    "<reasoning>\nshow every step\n</reasoning>\n"
    "<answer>\nonly the number\n</answer>"
)


def extract(text):
    start, end = text.find("<answer>"), text.find("</answer>")
    return text[start + len("<answer>"):end].strip() if -1 < start < end else ""


def accuracy(completions, target, **kwargs):
    contents = [c[0]["content"] for c in completions]
    return [1.0 if extract(text) == str(gold) else 0.0 for text, gold in zip(contents, target)]


def shows_equation(completions):
    """A little for an equation in the reasoning."""
    return [0.1 if "=" in c[0]["content"].split("</reasoning>")[0] else 0.0 for c in completions]


dataset = load_dataset("json", data_files=Hyper.data, split="train")
dataset = dataset.map(
    lambda r: {
        "prompt": [{"role": "system", "content": PROMPT}, {"role": "user", "content": r["problem"]}],
        "target": r["result"],
    }
)
config = GRPOConfig(
    output_dir="runs/words", run_name="word problems!", learning_rate=Hyper.lr,
    num_generations=Hyper.generations, reward_weights=[2.0, 0.5],
    per_device_train_batch_size=Hyper.generations * Hyper.prompts_per_step,
    max_completion_length=Hyper.length, max_prompt_length=None, top_p=0.95, num_iterations=2,
    epsilon=0.2, mask_truncated_completions=True, report_to=["tensorboard"],
    logging_dir="logs", save_strategy="steps", save_steps=50, save_total_limit=2,
    overwrite_output_dir=True, vllm_gpu_memory_utilization=0.3, max_steps=120,
    model_init_kwargs={"torch_dtype": "bfloat16", "attn_implementation": "sdpa"},
)
lora = LoraConfig(task_type=TaskType.CAUSAL_LM, r=64, lora_alpha=128, lora_dropout=0.0,
                  use_rslora=True, bias="none", target_modules=["q_proj", "v_proj"],
                  modules_to_save=["lm_head"])
GRPOTrainer(Hyper.base, [accuracy, shows_equation], config, dataset, peft_config=lora).train()
