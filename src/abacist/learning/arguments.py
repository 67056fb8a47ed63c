"""What can be set, in TRL's words.

Three dataclasses, as in TRL's own scripts, make up a configuration: :class:`GRPOConfig` (training),
:class:`ModelConfig` (the policy and its LoRA) and :class:`ScriptArguments` (the task: data,
prompt, rewards, verdict). A name that TRL has means here what it means there.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import trl

from abacist.task.golds import DecimalMark


@dataclass
class GRPOConfig(trl.GRPOConfig):
    """TRL's configuration plus what only Abacist does; every addition is off by default."""

    # A field's metadata is its help text, shown by `abacist train --help_all`.
    # transformers declares a list that its own parser reads as one name.
    report_to: list[str] = field(  # type: ignore[assignment]
        default_factory=lambda: ["none"],
        metadata={"help": "wandb, trackio and tensorboard, as many as you like; all, or none."},
    )
    use_fast_path: bool = field(
        default=True,
        metadata={
            "help": "Our rollout and scoring where they compute what TRL's do (--no_use_fast_path)."
        },
    )
    vllm_canary_steps: int = field(
        default=0,
        metadata={"help": "With --use_vllm, compare both engines every so many steps; 0: never."},
    )
    keep_rollouts: bool = field(
        default=False,
        metadata={
            "help": "Write every completion with its rewards to output_dir/rollouts/*.parquet."
        },
    )
    problem_sampling: Literal["uniform", "solve_rate"] = field(
        default="uniform",
        metadata={
            "help": "Which problems next: shuffled epochs, or those that are sometimes solved."
        },
    )
    outcome_gating: bool = field(
        default=False,
        metadata={
            "help": "Once the format is learned, groups all right or all wrong teach nothing."
        },
    )


@dataclass
class ModelConfig:
    """Which policy is trained and how. Differences from TRL's class: LoRA is on, on all linear
    layers, without dropout; dtype and attention are chosen for the machine and printed."""

    model_name_or_path: str = field(
        default="tiny",
        metadata={"help": "'tiny' (built in), a Hub id, a folder, or a PEFT adapter."},
    )
    model_revision: str | None = field(
        default=None, metadata={"help": "Branch, tag or commit of a model on the Hub."}
    )
    dtype: str = field(
        default="auto",
        metadata={"help": "auto, float32, bfloat16 or float16: how the weights are held."},
    )
    device: str = field(default="auto", metadata={"help": "auto, cuda, mps or cpu."})
    attn_implementation: str = field(
        default="auto",
        metadata={"help": "auto, flash_attention_2, sdpa or eager."},
    )
    use_peft: bool = field(
        default=True, metadata={"help": "Train a LoRA adapter (--no_use_peft: all weights)."}
    )
    lora_r: int = field(default=16, metadata={"help": "LoRA rank."})
    lora_alpha: int = field(
        default=32, metadata={"help": "LoRA alpha; the adapter is scaled by alpha / r."}
    )
    lora_dropout: float = field(default=0.0, metadata={"help": "LoRA dropout."})
    lora_target_modules: list[str] | None = field(
        default_factory=lambda: ["all-linear"],
        metadata={"help": "Modules that get an adapter, or all-linear."},
    )
    use_rslora: bool = field(
        default=False, metadata={"help": "Scale the adapter by alpha / sqrt(r)."}
    )
    use_dora: bool = field(default=False, metadata={"help": "Weight-decomposed LoRA."})


@dataclass
class ScriptArguments:
    """The task: where problems come from, how they are put, what is paid, how it is judged."""

    dataset_name: str = field(
        default="generated",
        metadata={
            "help": "'generated', a Hub id (openai/gsm8k), a folder, or a JSONL/CSV/Parquet file."
        },
    )
    dataset_config: str | None = field(
        default=None, metadata={"help": "Configuration of a Hub data set (main)."}
    )
    dataset_train_split: str = field(
        default="train", metadata={"help": "Name of its training split."}
    )
    dataset_test_split: str = field(default="test", metadata={"help": "Name of its test split."})
    question_column: str = field(
        default="question", metadata={"help": "Column that holds the question."}
    )
    answer_column: str = field(
        default="answer",
        metadata={"help": "Column with the solution ending in '#### gold', or the bare gold."},
    )
    decimal_mark: DecimalMark = field(
        default="auto",
        metadata={"help": "How bare golds in a text column are written: 3.5 or 3,5."},
    )
    skip_bad_rows: bool = field(
        default=False, metadata={"help": "Leave out unusable rows and count them."}
    )
    num_train_problems: int | None = field(
        default=None,
        metadata={"help": "At most so many training problems, chosen by seed (generated: 4000)."},
    )
    num_selection_problems: int = field(
        default=100,
        metadata={"help": "Problems measured every --eval_steps; none of them is in the verdict."},
    )
    num_heldout_problems: int = field(
        default=300,
        metadata={"help": "Problems of the verdict, measured before and after; 0: no verdict."},
    )
    num_consistency_problems: int = field(
        default=100,
        metadata={
            "help": "Held-out problems that also get 4 sampled replies, before and after; 0: none."
        },
    )
    system_prompt: str = field(
        default="default", metadata={"help": "'default', 'none', or your own text."}
    )
    num_shots: str = field(
        default="0",
        metadata={"help": "Worked examples in the prompt: a number, or 'gist' for its one-shot."},
    )
    shots_file: str | None = field(
        default=None, metadata={"help": "Take the examples from this file."}
    )
    reward_funcs: list[str] = field(
        default_factory=lambda: ["default"],
        metadata={"help": "Built-in rewards, sets (default, gist) or your own module.function."},
    )
    allow_hackable_rewards: bool = field(
        default=False,
        metadata={"help": "Train although a hack earns what an honest solution does."},
    )
    control: Literal["none", "random", "format"] = field(
        default="none",
        metadata={"help": "A placebo in their place: random coins, or only those for the format."},
    )
    reward_timeout_seconds: float = field(
        default=120.0,
        metadata={"help": "Time a reward of your own may take for one batch; 0: no limit."},
    )
    nan_policy: Literal["stop", "skip"] = field(
        default="stop",
        metadata={"help": "After a gradient that is NaN or infinite, whose step is refused."},
    )
    max_silent_steps: int = field(
        default=100,
        metadata={"help": "Stop after so many steps without any signal; 0: never."},
    )
    eval_batch_size: int = field(
        default=100, metadata={"help": "Replies written at once while measuring."}
    )
    max_hours: float | None = field(
        default=None,
        metadata={"help": "Save and stop before the step that would pass so many hours."},
    )
    force: bool = field(
        default=False, metadata={"help": "Resume although settings, data or rewards changed."}
    )
    overwrite: bool = field(
        default=False, metadata={"help": "Replace an existing run in --output_dir."}
    )
