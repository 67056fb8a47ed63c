"""Settings that other scripts and older ones carry, and what to write instead. Data only."""

from __future__ import annotations

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
    "load_in_4bit": "Quantised bases are not supported yet; a 1.5B base in bfloat16 takes 3 GB.",
    "load_in_8bit": "Quantised bases are not supported yet; a 1.5B base in bfloat16 takes 3 GB.",
    "fast_inference": "It is --use_vllm.",
    "gpu_memory_utilization": "It is --vllm_gpu_memory_utilization.",
    "use_transformers_paged": "TRL renamed it --use_transformers_continuous_batching.",
    "dataset_prompt_column": "It is --question_column.",
    "dataset_streaming": "Problems are held in memory: GSM8K is 4 MB.",
    "reward_model_name_or_path": "Rewards here are functions: --reward_funcs module.function.",
    "push_to_hub": "Not part of this version: upload the run directory with `hf upload`.",
    "model_init_kwargs": "Set --dtype, --attn_implementation and --model_revision.",
    "hub_token": "Tokens stay off command lines: set HF_TOKEN, or run `hf auth login`.",
    "use_auth_token": "Tokens stay off command lines: set HF_TOKEN, or run `hf auth login`.",
    "log_completions": "Every completion is kept in rollouts/*.parquet as it is.",
    "auto_find_batch_size": "GRPO needs whole groups: lower --per_device_train_batch_size instead.",
    "deepspeed": "Not offered: Abacist trains on one machine, with accelerate.",
    "fsdp": "Not offered: Abacist trains on one machine, with accelerate.",
}

# Those that can be switched off, which asks for nothing: `push_to_hub: false` is no fault.
SWITCHES = frozenset(
    {
        "push_to_hub",
        "load_in_4bit",
        "load_in_8bit",
        "fast_inference",
        "use_flash_attention_2",
        "use_transformers_paged",
        "use_auth_token",
        "dataset_streaming",
        "log_completions",
        "auto_find_batch_size",
        "overwrite_output_dir",
        "fsdp",
        "deepspeed",
    }
)
