# TRL's own parser and rewards: settings come from the command line.
from dataclasses import dataclass

from datasets import load_dataset
from trl import GRPOConfig, GRPOTrainer, ModelConfig, ScriptArguments, TrlParser, get_peft_config
from trl.rewards import accuracy_reward, think_format_reward


@dataclass
class Task(ScriptArguments):
    dataset_name: str = "openai/gsm8k"
    dataset_config: str = "main"


def brevity(completions, **kwargs):
    return [0.1 if len(one[0]["content"]) < 600 else 0.0 for one in completions]


def main(task, training_args, model_args):
    rows = load_dataset(task.dataset_name, task.dataset_config, split="train")
    rows = rows.map(lambda x: {
        "prompt": [{"role": "user", "content": x["question"]}],
        "solution": x["answer"].split("#### ")[1],
    })
    trainer = GRPOTrainer(
        model="Qwen/Qwen2.5-0.5B-Instruct",
        args=training_args,
        reward_funcs=[accuracy_reward, think_format_reward, brevity],
        train_dataset=rows,
        peft_config=get_peft_config(model_args),
    )
    trainer.train(resume_from_checkpoint=training_args.resume_from_checkpoint)


if __name__ == "__main__":
    main(*TrlParser((Task, GRPOConfig, ModelConfig)).parse_args_and_config())
