"""What can be wrong with one setting, whatever else is set: its value, or its name.

argparse checks types, and TRL and transformers check some values when they are used, which may be
hours later and without the flag's name. :data:`LIMITS` is checked when a configuration is read.
:data:`RETIRED` holds names that other scripts and older ones carry, with what to write instead.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from abacist.errors import UsageError
from abacist.task.rewards import refuse_unusable_weights


@dataclass(frozen=True, slots=True)
class Limit:
    """A range of numbers; ``also`` holds single values outside it that have a meaning."""

    at_least: float | None = None
    above: float | None = None
    at_most: float | None = None
    below: float | None = None
    also: tuple[float, ...] = ()

    def holds(self, value: float) -> bool:
        """Whether ``value`` is in the range, and not beyond :data:`LARGEST`.

        >>> [Limit(above=0, at_most=1).holds(value) for value in (0, 0.5, 1, float("nan"))]
        [False, True, True, False]
        """
        return value in self.also or (
            abs(value) <= LARGEST
            and (self.at_least is None or value >= self.at_least)
            and (self.above is None or value > self.above)
            and (self.at_most is None or value <= self.at_most)
            and (self.below is None or value < self.below)
        )

    def __str__(self) -> str:
        bounds = {
            "at least": self.at_least,
            "above": self.above,
            "at most": self.at_most,
            "below": self.below,
        }
        told = " and ".join(f"{word} {edge:g}" for word, edge in bounds.items() if edge is not None)
        return told + "".join(f", or {value:g}" for value in self.also)


LARGEST = 1e10  # beyond it sums of seconds, tokens and bytes overflow, and nobody means it

_ANY = Limit()
_COUNT, _COUNT_OR_NONE = Limit(at_least=1), Limit(at_least=0)
_POSITIVE, _NOT_NEGATIVE = Limit(above=0), Limit(at_least=0)
_SHARE, _DECAY = Limit(at_least=0, at_most=1), Limit(at_least=0, below=1)
_SEED = Limit(at_least=0, below=2**32)  # numpy's

LIMITS: dict[str, Limit] = {
    # training
    "num_generations": Limit(at_least=2),
    "num_generations_eval": _COUNT,
    "train_replies": _COUNT,
    "step_reward_weight": _NOT_NEGATIVE,
    "per_device_train_batch_size": _COUNT,
    "per_device_eval_batch_size": _COUNT,
    "gradient_accumulation_steps": _COUNT,
    "generation_batch_size": _COUNT,
    "steps_per_generation": _COUNT,
    "num_iterations": _COUNT,
    "max_completion_length": _COUNT,
    "max_steps": Limit(at_least=1, also=(-1,)),
    "num_train_epochs": _POSITIVE,
    "learning_rate": _NOT_NEGATIVE,
    "warmup_steps": _NOT_NEGATIVE,
    "weight_decay": _NOT_NEGATIVE,
    "adam_beta1": _DECAY,
    "adam_beta2": _DECAY,
    "adam_epsilon": _NOT_NEGATIVE,
    "max_grad_norm": _NOT_NEGATIVE,
    "beta": _NOT_NEGATIVE,
    "epsilon": _NOT_NEGATIVE,
    "epsilon_high": _NOT_NEGATIVE,
    "delta": _POSITIVE,
    "top_entropy_quantile": _SHARE,
    "ref_model_mixup_alpha": _SHARE,
    "ref_model_sync_steps": _COUNT,
    "temperature": _POSITIVE,
    "top_p": Limit(above=0, at_most=1),
    "top_k": _COUNT_OR_NONE,
    "min_p": _SHARE,
    "repetition_penalty": _POSITIVE,
    "vllm_gpu_memory_utilization": Limit(above=0, at_most=1),
    "vllm_canary_steps": _COUNT_OR_NONE,
    "logging_steps": _POSITIVE,
    "eval_steps": _POSITIVE,
    "save_steps": _POSITIVE,
    "save_total_limit": _COUNT_OR_NONE,
    "dataloader_num_workers": _COUNT_OR_NONE,
    "seed": _SEED,
    "data_seed": _SEED,
    # model
    "lora_r": Limit(at_least=1, at_most=8192),  # no layer of a small model has more to adapt
    "lora_alpha": _POSITIVE,
    "lora_dropout": _DECAY,
    # task
    "num_train_problems": _COUNT,
    "num_selection_problems": _COUNT_OR_NONE,
    "num_heldout_problems": _COUNT_OR_NONE,
    "num_consistency_problems": _COUNT_OR_NONE,
    "reward_timeout_seconds": _NOT_NEGATIVE,
    "max_silent_steps": _COUNT_OR_NONE,
    "eval_batch_size": _COUNT,
    "max_hours": _POSITIVE,
}

# What TRL compares only once it computes with it; a contract test holds that it knows these.
CHOICES: dict[str, tuple[str, ...]] = {
    "loss_type": ("dapo", "dr_grpo", "grpo", "bnpo", "cispo", "sapo", "luspo", "vespo"),
    "importance_sampling_level": ("token", "sequence"),
    "multi_objective_aggregation": ("sum_then_normalize", "normalize_then_sum"),
    "scale_rewards": ("group", "batch", "none", "True", "False", "true", "false"),
    "vllm_importance_sampling_mode": (
        "token_truncate",
        "token_mask",
        "sequence_truncate",
        "sequence_mask",
    ),
}
# Written as a JSON object.
OBJECTS = (
    "activation_checkpointing_kwargs",
    "chat_template_kwargs",
    "generation_kwargs",
    "gradient_checkpointing_kwargs",
    "lr_scheduler_kwargs",
)
OBJECTS_OR_FILES = ("accelerator_config", "fsdp_config")  # or as the name of a file with one
TRACKERS = ("wandb", "trackio", "tensorboard")
_INSTEAD = {
    "eval_steps": "--eval_strategy no measures nothing while training.",
    "save_steps": "--save_strategy no saves nothing while training.",
    "logging_steps": "--logging_strategy no logs nothing.",
    "max_steps": "-1 leaves the length to --num_train_epochs.",
    "num_generations": "GRPO compares the replies to one problem with each other.",
    "train_replies": "Leave it out to train on all replies.",
    "temperature": "Learning needs replies that differ.",
}


def refuse_out_of_range(settings: Mapping[str, Any], sources: Mapping[str, str]) -> None:
    """Raises UsageError, naming the setting and where it was set, for the first bad value."""
    for name, value in settings.items():
        where = named(name, sources)
        if isinstance(value, int | float):
            limit, told = LIMITS.get(name, _ANY), str(value)[:20]
            if abs(value) > LARGEST and limit.at_most is limit.below is None:
                raise UsageError(f"{where} {told} is beyond {LARGEST:g}")
            if limit is not _ANY and not limit.holds(value):
                raise UsageError(f"{where} {told} is not {limit}", _INSTEAD.get(name, ""))
        choices = CHOICES.get(name)
        if choices and str(value) not in choices:
            known = ", ".join(one for one in choices if one.lower() not in ("true", "false"))
            raise UsageError(f"{where} {value} is none of {known}", _did_you_mean(value, choices))
        if isinstance(value, str) and (name in OBJECTS or _is_written_out(name, value)):
            _refuse_unless_object(value, where)
    refuse_unusable_weights(
        settings.get("reward_weights") or [],
        named("reward_weights", sources),
        may_be_zero=bool(settings.get("step_reward_weight")),
    )
    kwargs = settings.get("generation_kwargs") or {}
    if isinstance(kwargs, dict) and "stop_strings" in kwargs and not settings.get("use_vllm"):
        raise UsageError(
            f"{named('generation_kwargs', sources)} holds stop_strings, and TRL does not give "
            "generate() the tokenizer that they need",
            "A reply ends at the model's own end tokens; eos_token_id takes the ids of others.",
        )


def _is_written_out(name: str, text: str) -> bool:
    return name in OBJECTS_OR_FILES and text.lstrip().startswith("{")


def _refuse_unless_object(text: str, where: str) -> None:
    try:
        is_object, why = isinstance(json.loads(text), dict), ""
    except (ValueError, RecursionError) as error:
        is_object, why = False, f" ({error})"
    if not is_object:
        raise UsageError(
            f"{where} {text[:60]} is no JSON object{why}", """For example '{"name": 0.5}'."""
        )


def trackers(value: Any, sources: Mapping[str, str]) -> list[str]:
    """The trackers that ``--report_to`` names, with spaces or commas between them.

    ``all`` is every one there is, ``none`` is none. Raises UsageError for an unknown name.

    >>> trackers("wandb,tensorboard", {}), trackers(["none"], {})
    (['wandb', 'tensorboard'], [])
    """
    names = list(dict.fromkeys(split_at_commas([value] if isinstance(value, str) else value or [])))
    where = named("report_to", sources)
    for name in names:
        if name not in (*TRACKERS, "all", "none"):
            known = f"{', '.join(TRACKERS)}, all or none"
            raise UsageError(f"{where} {name} is none of {known}", _did_you_mean(name, TRACKERS))
    if len(names) > 1 and {"all", "none"} & set(names):
        raise UsageError(
            f"{where} {' '.join(names)} contradicts itself", "all and none stand alone."
        )
    if names == ["all"]:
        return list(TRACKERS)
    return [name for name in names if name != "none"]


def split_at_commas(values: list[str]) -> list[str]:
    """``["a,b", "c"]`` as ``["a", "b", "c"]``: both ways to write a list mean the same."""
    return [part.strip() for value in values for part in str(value).split(",") if part.strip()]


def named(name: str, sources: Mapping[str, str]) -> str:
    """How a person set ``name``: as a flag, or in a file, whose name is told.

    >>> named("beta", {"beta": "flag"}), named("beta", {"beta": "my.yaml"})
    ('--beta', 'beta (my.yaml)')
    """
    source = sources.get(name, "flag")
    return f"--{name}" if source in ("flag", "") else f"{name} ({source})"


def _did_you_mean(value: object, choices: tuple[str, ...]) -> str:
    close = difflib.get_close_matches(str(value), choices, n=1)
    return f"Did you mean {close[0]}?" if close else ""


RETIRED: dict[str, str] = {
    "max_prompt_length": "Prompts are never cut: one that does not fit is an error. Remove it.",
    "overwrite_output_dir": "It is now --overwrite.",
    "logging_dir": "Remove it: trackers keep their own folders.",
    "warmup_ratio": "--warmup_steps takes a fraction below 1, such as 0.1.",
    "evaluation_strategy": "It is now --eval_strategy; --eval_steps alone is enough.",
    "tokenizer": "The tokenizer comes with the model.",
    "max_new_tokens": "It is --max_completion_length.",
    "max_length": "It is --max_completion_length: the prompt is not counted.",
    "max_seq_length": "It is --max_completion_length: the prompt is not counted.",
    "torch_dtype": "It is --dtype.",
    "model_name": "It is --model_name_or_path.",
    "model": "It is --model_name_or_path.",
    "lora_rank": "It is --lora_r.",
    "num_samples": "It is --num_generations.",
    "group_size": "It is --num_generations.",
    "kl_coef": "It is --beta.",
    "batch_size": "It is --per_device_train_batch_size, counted in completions.",
    "lr": "It is --learning_rate.",
    "few_shot": "It is --num_shots.",
    "use_flash_attention_2": "It is --attn_implementation flash_attention_2.",
    "fast_inference": "It is --use_vllm.",
    "gpu_memory_utilization": "It is --vllm_gpu_memory_utilization.",
    "use_transformers_paged": "TRL renamed it --use_transformers_continuous_batching.",
    "dataset_prompt_column": "It is --question_column.",
    "dataset_streaming": "Problems are held in memory: GSM8K is 4 MB.",
    "reward_model_name_or_path": "Rewards here are functions: --reward_funcs module.function.",
    "push_to_hub": "When the run is done: `abacist export RUN --to adapter --push_to_hub NAME`.",
    "model_init_kwargs": "Set --dtype, --attn_implementation and --model_revision.",
    "hub_token": "Tokens stay off command lines: set HF_TOKEN, or run `hf auth login`.",
    "use_auth_token": "Tokens stay off command lines: set HF_TOKEN, or run `hf auth login`.",
    "log_completions_hub_repo": "Not part of this version: upload completions/ with `hf upload`.",
    "auto_find_batch_size": "GRPO needs whole groups: lower --per_device_train_batch_size instead.",
    "deepspeed": "It is --accelerate_config zero2, or a file of accelerate that names DeepSpeed.",
    "fsdp": "It is --accelerate_config fsdp2, or a file of accelerate that names FSDP.",
}

# Those that can be switched off, which asks for nothing: `push_to_hub: false` is no fault.
SWITCHES = frozenset(
    {
        "push_to_hub",
        "fast_inference",
        "use_flash_attention_2",
        "use_transformers_paged",
        "use_auth_token",
        "dataset_streaming",
        "auto_find_batch_size",
        "overwrite_output_dir",
        "fsdp",
        "deepspeed",
    }
)
