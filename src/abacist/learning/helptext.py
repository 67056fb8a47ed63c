"""The help texts of ``abacist train``, each written once, in a module that loads nothing.

``abacist train`` takes every flag of TRL's ``GRPOConfig``, ``ModelConfig`` and script arguments by
its own name, about two hundred. Asking TRL for their help takes seconds and buries the fifty that
matter, so ``--help`` prints :data:`TRAIN_FLAGS`. ``--help_all`` asks TRL for the rest, and reads
the texts of Abacist's own settings from here too (``learning.arguments``).
"""

from __future__ import annotations

from importlib import resources
from typing import NamedTuple


class Flag(NamedTuple):
    """One flag of ``abacist train``: its name as typed, what follows it, and what it does."""

    name: str
    value: str
    help: str


class Group(NamedTuple):
    """Flags that belong together, under a heading."""

    title: str
    flags: tuple[Flag, ...]


TRAIN_FLAGS = (
    Group(
        "model",
        (
            Flag("--model_name_or_path", "MODEL", "`tiny` (built in), a Hub id, a folder or a PEFT "
                 "adapter; a run brings its settings and its prompt"),
            Flag("--dtype", "TYPE", "auto, float32, bfloat16 or float16: how the weights are held"),
            Flag("--float32_matmul_precision", "NAME", "highest, or medium: PyTorch's setting; "
                 "two to ten times as fast on processors made for bfloat16"),
            Flag("--attn_implementation", "NAME", "auto, flash_attention_2, sdpa or eager"),
            Flag("--device", "NAME", "auto, cuda, mps or cpu"),
            Flag("--use_peft", "", "train a LoRA adapter: the default; --no_use_peft trains all"),
            Flag("--load_in_4bit", "", "hold the base's linear layers in 4 bits under the adapter: "
                 "QLoRA, by bitsandbytes"),
            Flag("--trust_remote_code", "", "run code that comes with the model: never by default"),
            Flag("--lora_r", "N", "rank of the adapter"),
            Flag("--lora_alpha", "N", "scale of the adapter, which is multiplied by alpha / r"),
            Flag("--lora_dropout", "P", "dropout before the adapter"),
            Flag("--lora_target_modules", "NAME …", "the layers that get an adapter, or "
                 "all-linear"),
        ),
    ),
    Group(
        "problems and prompt",
        (
            Flag("--dataset_name", "DATA", "`generated`, a Hub id (openai/gsm8k), a folder, or a "
                 "JSONL, CSV or Parquet file"),
            Flag("--dataset_config", "NAME", "configuration of a Hub data set (GSM8K: main)"),
            Flag("--dataset_train_split", "NAME", "the split to learn from"),
            Flag("--dataset_test_split", "NAME", "the test split, which no training reads"),
            Flag("--question_column", "NAME", "the column of questions; the usual ones are found"),
            Flag("--answer_column", "NAME", "the column of solutions or reference answers"),
            Flag("--decimal_mark", "MARK", "of reference answers such as 3,5: point or comma"),
            Flag("--num_heldout_problems", "N", "problems of the verdict, measured before and "
                 "after; 0: no verdict"),
            Flag("--num_consistency_problems", "N", "how many of these also get 4 sampled replies "
                 "each, before and after (100); 0: none"),
            Flag("--num_shots", "N", "few-shot examples in every prompt, or `gist` for its "
                 "one-shot (0, or all of --shots_file)"),
            Flag("--system_prompt", "TEXT", "default, none, or your own text asking for a format"),
        ),
    ),
    Group(
        "rewards",
        (
            Flag("--reward_funcs", "NAME …", "rewards by name, the sets `default` and `gist`, or "
                 "your own module.function or file.py:function"),
            Flag("--reward_weights", "W …", "one weight for each reward, five for `default` (if "
                 "not given: the recipe's weights for its own rewards, 1 for others)"),
            Flag("--allow_hackable_rewards", "", "train on them although a hack earns what an "
                 "honest solution does"),
            Flag("--control", "KIND", "random or format: a placebo under the same budget, random "
                 "coins or only the form rewards"),
        ),
    ),
    Group(
        "learning",
        (
            Flag("--num_generations", "N", "replies to each problem: the size of a group; the "
                 "batch follows, unless it is given too"),
            Flag("--train_replies", "K", "learn from the K replies of each group with the largest "
                 "advantages only; the others take no training time"),
            Flag("--step_reward_weight", "W", "pay each step of the reasoning too, as right where "
                 "it reaches a result of the worked solution (0: no)"),
            Flag("--max_completion_length", "N", "tokens a reply may have"),
            Flag("--temperature", "T", "sampling temperature while learning"),
            Flag("--learning_rate", "LR", "with LoRA about ten times that of full training"),
            Flag("--beta", "B", "weight of the KL term; 0 needs no reference model"),
            Flag("--loss_type", "NAME", "dapo, dr_grpo, grpo, bnpo, …"),
            Flag("--max_steps", "N", "optimizer steps; overrides --num_train_epochs. With fewer "
                 "than the recipe's, warm-up and measured problems are reduced too"),
            Flag("--num_train_epochs", "N", "times through the problems"),
            Flag("--per_device_train_batch_size", "N", "replies in one forward pass"),
            Flag("--gradient_accumulation_steps", "N", "forward passes in one step"),
            Flag("--use_vllm", "", "sample with vLLM"),
            Flag("--nan_policy", "NAME", "after a NaN or infinite gradient, which is never "
                 "applied: stop the run, or skip the step"),
            Flag("--seed", "N", "random seed of the data's order, sampling and new weights"),
        ),
    ),
    Group(
        "the run",
        (
            Flag("--output_dir", "DIR", "the run's folder; a new one in runs/ unless given"),
            Flag("--overwrite", "", "replace a run that is in --output_dir already"),
            Flag("--run_name", "NAME", "what trackers call it, and its folder in runs/"),
            Flag("--report_to", "NAME …", "wandb, trackio, tensorboard; metrics.jsonl is always "
                 "written"),
            Flag("--project", "NAME", "the project in W&B and Trackio (abacist)"),
            Flag("--log_completions", "", "print completions as it learns, and keep them in the "
                 "trackers; --num_completions_to_print N of each batch"),
            Flag("--logging_steps", "N", "steps between two lines of metrics"),
            Flag("--eval_steps", "N", "steps between two measurements on the "
                 "selection problems, none of which is in the verdict"),
            Flag("--save_steps", "N", "steps between two checkpoints"),
            Flag("--resume", "RUN", "go on with a run, or from one of its checkpoints, exactly; "
                 "with more --max_steps a finished one too"),
            Flag("--resume_from_checkpoint", "PATH", "TRL's name for it; `latest` is that of "
                 "--output_dir"),
            Flag("--force", "", "resume although settings, data or rewards are not the run's"),
            Flag("--accelerate_config", "NAME", "start several processes: single_gpu, multi_gpu, "
                 "fsdp1, fsdp2, zero1, zero2, zero3 (TRL's), multi_cpu, or a file"),
            Flag("--num_processes", "N", "how many; each has --per_device_train_batch_size"),
            Flag("--max_hours", "H", "save and stop before the step that would take it past H "
                 "hours"),
            Flag("--config", "FILE", "flags from a YAML file; what is typed wins over it"),
            Flag("--dry_run", "", "plan only, keep nothing: memory, time, what there is to learn "
                 "from --dry_run_problems N (32)"),
            Flag("--json", "", "the result as one JSON object on stdout, the rest on stderr"),
        ),
    ),
)  # fmt: skip

# Settings of Abacist's own that only --help_all shows.
_OTHERS = {
    "use_fast_path": "our rollout and scoring where they compute what TRL's do "
    "(--no_use_fast_path)",
    "vllm_canary_steps": "with --use_vllm, compare both engines every so many steps; 0: never",
    "keep_rollouts": "write every completion with its rewards to output_dir/rollouts/*.parquet",
    "problem_sampling": "which problems next: uniform (shuffled epochs), or solve_rate (those "
    "that are sometimes solved)",
    "outcome_gating": "once the format is learned, groups all right or all wrong teach nothing",
    "model_revision": "branch, tag or commit of a model on the Hub",
    "use_rslora": "scale the adapter by alpha / sqrt(r)",
    "use_dora": "weight-decomposed LoRA",
    "load_in_8bit": "hold the base's linear layers in 8 bits, under an adapter (on a CPU by our "
    "kernels, else by bitsandbytes)",
    "bnb_4bit_quant_type": "how 4 bits stand for a weight: nf4 or fp4",
    "use_bnb_nested_quant": "hold the scales of the 4-bit blocks in 8 bits",
    "skip_bad_rows": "leave out unusable rows and count them",
    "num_train_problems": "at most so many training problems, chosen by seed (generated: 4000)",
    "num_selection_problems": "problems measured every --eval_steps; none of them is in the "
    "verdict",
    "shots_file": "take the examples from this file; steps: those that come with Abacist",
    "reward_timeout_seconds": "time a reward of your own may take for one batch; 0: no limit",
    "max_silent_steps": "stop after so many steps in a row in which no group has signal; 0: never",
    "eval_batch_size": "replies written at once while measuring",
}
_TEXTS = _OTHERS | {
    flag.name.removeprefix("--"): flag.help for group in TRAIN_FLAGS for flag in group.flags
}


def text_of(setting: str) -> dict[str, str]:
    """The help text of a setting, as the metadata of a dataclass field."""
    return {"help": _TEXTS[setting]}


def own_texts() -> dict[str, str]:
    """Every help text of ours by setting, without dashes."""
    return dict(_TEXTS)


def recipe_names() -> list[str]:
    """The built-in recipes."""
    folder = resources.files("abacist") / "recipes"
    return sorted(
        item.name.removesuffix(".yaml") for item in folder.iterdir() if item.name.endswith(".yaml")
    )
