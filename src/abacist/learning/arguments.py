"""What can be set, in TRL's words.

Three dataclasses, as in TRL's own scripts, make up a configuration: :class:`GRPOConfig` (training),
:class:`ModelConfig` (the policy and its LoRA) and :class:`ScriptArguments` (the task: data,
prompt, rewards, verdict). A name that TRL has means here what it means there.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import trl

from abacist.learning.helptext import text_of
from abacist.policy.quantization import Quantization
from abacist.task.golds import DecimalMark


@dataclass
class GRPOConfig(trl.GRPOConfig):
    """TRL's configuration plus what only Abacist does, off by default but for ``use_fast_path``."""

    # The help texts, shown by `abacist train --help_all`, are in learning.helptext.
    # transformers declares a list that its own parser reads as one name.
    report_to: list[str] = field(  # type: ignore[assignment]
        default_factory=lambda: ["none"],
        metadata=text_of("report_to"),
    )
    use_fast_path: bool = field(default=True, metadata=text_of("use_fast_path"))
    vllm_canary_steps: int = field(default=0, metadata=text_of("vllm_canary_steps"))
    keep_rollouts: bool = field(default=False, metadata=text_of("keep_rollouts"))
    problem_sampling: Literal["uniform", "solve_rate"] = field(
        default="uniform", metadata=text_of("problem_sampling")
    )
    outcome_gating: bool = field(default=False, metadata=text_of("outcome_gating"))
    train_replies: int | None = field(default=None, metadata=text_of("train_replies"))
    step_reward_weight: float = field(default=0.0, metadata=text_of("step_reward_weight"))


@dataclass
class ModelConfig:
    """Which policy is trained and how. Differences from TRL's class: LoRA is on, on all linear
    layers, without dropout; dtype and attention are chosen for the machine and printed."""

    model_name_or_path: str = field(default="tiny", metadata=text_of("model_name_or_path"))
    model_revision: str | None = field(default=None, metadata=text_of("model_revision"))
    dtype: str = field(default="auto", metadata=text_of("dtype"))
    float32_matmul_precision: Literal["highest", "high", "medium"] = field(
        default="highest", metadata=text_of("float32_matmul_precision")
    )
    device: str = field(default="auto", metadata=text_of("device"))
    attn_implementation: str = field(default="auto", metadata=text_of("attn_implementation"))
    use_peft: bool = field(default=True, metadata=text_of("use_peft"))
    lora_r: int = field(default=16, metadata=text_of("lora_r"))
    lora_alpha: int = field(default=32, metadata=text_of("lora_alpha"))
    lora_dropout: float = field(default=0.0, metadata=text_of("lora_dropout"))
    lora_target_modules: list[str] | None = field(
        default_factory=lambda: ["all-linear"], metadata=text_of("lora_target_modules")
    )
    use_rslora: bool = field(default=False, metadata=text_of("use_rslora"))
    use_dora: bool = field(default=False, metadata=text_of("use_dora"))
    load_in_4bit: bool = field(default=False, metadata=text_of("load_in_4bit"))
    load_in_8bit: bool = field(default=False, metadata=text_of("load_in_8bit"))
    bnb_4bit_quant_type: Literal["nf4", "fp4"] = field(
        default="nf4", metadata=text_of("bnb_4bit_quant_type")
    )
    use_bnb_nested_quant: bool = field(default=False, metadata=text_of("use_bnb_nested_quant"))

    @property
    def quantization(self) -> Quantization | None:
        """How the base is to be held; None: as its files have it, or as an adapter recorded."""
        if self.load_in_8bit:
            return Quantization(8)
        if self.load_in_4bit:
            return Quantization(4, self.bnb_4bit_quant_type, self.use_bnb_nested_quant)
        return None


@dataclass
class ScriptArguments:
    """The task: where problems come from, how they are put, what is paid, how it is judged."""

    dataset_name: str = field(default="generated", metadata=text_of("dataset_name"))
    dataset_config: str | None = field(default=None, metadata=text_of("dataset_config"))
    dataset_train_split: str = field(default="train", metadata=text_of("dataset_train_split"))
    dataset_test_split: str = field(default="test", metadata=text_of("dataset_test_split"))
    question_column: str = field(default="question", metadata=text_of("question_column"))
    answer_column: str = field(default="answer", metadata=text_of("answer_column"))
    decimal_mark: DecimalMark = field(default="auto", metadata=text_of("decimal_mark"))
    skip_bad_rows: bool = field(default=False, metadata=text_of("skip_bad_rows"))
    num_train_problems: int | None = field(default=None, metadata=text_of("num_train_problems"))
    num_selection_problems: int = field(default=100, metadata=text_of("num_selection_problems"))
    num_heldout_problems: int = field(default=300, metadata=text_of("num_heldout_problems"))
    num_consistency_problems: int = field(default=100, metadata=text_of("num_consistency_problems"))
    system_prompt: str = field(default="default", metadata=text_of("system_prompt"))
    num_shots: str | None = field(default=None, metadata=text_of("num_shots"))
    shots_file: str | None = field(default=None, metadata=text_of("shots_file"))
    reward_funcs: list[str] = field(
        default_factory=lambda: ["default"], metadata=text_of("reward_funcs")
    )
    allow_hackable_rewards: bool = field(default=False, metadata=text_of("allow_hackable_rewards"))
    control: Literal["none", "random", "format"] = field(
        default="none", metadata=text_of("control")
    )
    reward_timeout_seconds: float = field(default=120.0, metadata=text_of("reward_timeout_seconds"))
    nan_policy: Literal["stop", "skip"] = field(default="stop", metadata=text_of("nan_policy"))
    max_silent_steps: int = field(default=100, metadata=text_of("max_silent_steps"))
    eval_batch_size: int = field(default=100, metadata=text_of("eval_batch_size"))
    max_hours: float | None = field(default=None, metadata=text_of("max_hours"))
    force: bool = field(default=False, metadata=text_of("force"))
    overwrite: bool = field(default=False, metadata=text_of("overwrite"))
