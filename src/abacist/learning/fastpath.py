"""Whether a part of the step computes exactly what TRL computes under these settings, or why not.

The fast path is an allow-list: models and adapters by the table of ``policy.families``, the
trainer's settings here. What is not supported is left to TRL, part by part, each with its reason.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from peft import PeftModel, PeftModelForCausalLM
from transformers import GenerationConfig, GenerationMixin, PreTrainedModel

from abacist.learning import reply_selection
from abacist.policy import families
from abacist.policy.families import FastPart

# In these losses every term of a completion is multiplied by its advantage.
_LOSSES_LINEAR_IN_ADVANTAGE = {"grpo", "bnpo", "dr_grpo", "dapo", "cispo", "luspo", "sapo"}
_OWN_GENERATE_MODULES = {"transformers.generation.utils", "peft.peft_model"}


def wanted(args: Any) -> bool:
    """``--use_fast_path``; on for a plain ``trl.GRPOConfig``, which has no such field."""
    return bool(getattr(args, "use_fast_path", True))


def unsupported_reason(trainer: Any, part: FastPart) -> str | None:
    """Why ``part`` is not used by ``trainer``, as the end of a sentence; None: it is.

    Looks at the settings and at every module of the model, which may change between two steps. For
    fused layers and LoRA products, whose dtype matters, call it within the trainer's autocast.
    """
    if (found := unsupported_setting(trainer, part)) is not None:
        return found
    model = _decoded(trainer) if part is FastPart.DECODING else trainer.model
    return families.unsupported_reason(model, part)


def unsupported_setting(trainer: Any, part: FastPart) -> str | None:
    """As :func:`unsupported_reason`, of the trainer's settings alone: cheap."""
    if part is FastPart.DECODING:
        return _first(_rollout_settings(trainer))
    found = _first(_training_settings(trainer))
    if found is None and part is FastPart.MICRO_BATCH_FUSION:
        found = _first(_fusion_settings(trainer))
    return found


def hold_in_float32(trainer: Any) -> str | None:
    """Hold the weights in float32 where a bfloat16 that nobody asked for would be computed in.

    On a CPU weights stored in bfloat16 stay so because our kernels compute with them in float32
    (``families.compute_dtype_of``). TRL's path, and autocast, would compute in bfloat16. Returns
    what has been done, as a line; None: nothing. Call it before the optimizer is made.
    """
    model, args = trainer.model, trainer.args
    if model.device.type != "cpu" or model.dtype != torch.bfloat16:
        return None
    why = "autocast is on" if args.bf16 or args.fp16 else None
    for part in (FastPart.DECODING, FastPart.FUSED_LAYERS):
        why = why or unsupported_reason(trainer, part)
    if why is None:
        return None
    model.float()
    return f"dtype: float32 after all ({why})"


def _rollout_settings(trainer: Any) -> dict[str, Any]:
    """What is wrong for our engine, and whether it applies."""
    args = trainer.args
    return {
        "use_fast_path is off": not wanted(args),
        "use_vllm samples with vLLM": args.use_vllm,
        "use_transformers_continuous_batching asks for that engine": (
            args.use_transformers_continuous_batching
        ),
        "rollout_func samples itself": trainer.rollout_func is not None,
        "tools are called between turns": trainer.tools,
        "environments take part in the rollout": trainer.environment_factories is not None,
        "the model is multimodal": trainer._is_vlm,
        "generation_kwargs may mean anything to generate()": args.generation_kwargs,
        "cache_implementation asks for generate()'s caches": args.cache_implementation is not None,
        f"generate() would read {(setting := _other_setting(trainer))}": setting is not None,
        "the model is sharded over processes": (
            _is_sharded(trainer) and getattr(trainer, "whole", None) is None
        ),
        "generate() has been replaced, and is to be called": (
            _is_generate_replaced(_decoded(trainer))
        ),
    }


def _training_settings(trainer: Any) -> dict[str, Any]:
    """What is wrong for scoring by a packed forward, and whether it applies."""
    args, model = trainer.args, trainer.model
    return {
        "use_fast_path is off": not wanted(args),
        "the model is multimodal": trainer._is_vlm,
        "an auxiliary loss needs the whole forward": trainer.aux_loss_enabled,
        "the entropy bonus needs the entropy's gradient": trainer._entropy_bonus_enabled,
        "the head is cast to float32": args.cast_lm_head_to_fp32,
        "the model is sharded over processes": _is_sharded(trainer),
        "torch_compile compiles the model's own forward": args.torch_compile,
        "Liger kernels replace parts of the model": args.use_liger_kernel,
        f"the model is wrapped in {type(model).__name__}": (
            not isinstance(model, PreTrainedModel | PeftModel)
        ),
    }


def _fusion_settings(trainer: Any) -> dict[str, Any]:
    """What is wrong for several micro-batches in one forward, and whether it applies."""
    args = trainer.args
    optimizer = str(getattr(args.optim, "value", args.optim))
    return {
        "an optimizer step has one micro-batch": args.gradient_accumulation_steps == 1,
        "every micro-batch is a generation of its own": args.steps_per_generation == 1,
        # DDP must see a forward and a backward in turn.
        "there are several processes": trainer.accelerator.num_processes > 1,
        f"{optimizer} updates weights in every backward": "lomo" in optimizer,
    }


# What our engine is told by the trainer's own attributes.
_SAMPLING = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
# What it takes from elsewhere, or what changes no completion.
_TAKEN = {
    *_SAMPLING,
    *("max_new_tokens", "max_length", "do_sample", "cache_implementation", "disable_compile"),
    *("pad_token_id", "bos_token_id", "eos_token_id", "transformers_version", "use_cache"),
    *("output_scores", "output_logits", "output_attentions", "output_hidden_states"),
    *("return_dict_in_generate", "renormalize_logits"),
}


def _other_setting(trainer: Any) -> str | None:
    """A setting that ``generate`` would obey and our engine does not know; None: there is none.

    It obeys the trainer's generation config and, where that leaves a field open, the model's.
    """
    given = getattr(trainer, "generation_config", None)
    if given is None:  # vLLM samples
        return None
    for name in _SAMPLING:
        value = getattr(given, name, None)
        if value != getattr(trainer, name) or (value is None and name != "min_p"):
            return f"{name} {value}"
    layer = _decoded(trainer)
    base: Any = layer.get_base_model() if isinstance(layer, PeftModel) else layer
    own = base.generation_config
    set_here = {name: value for name, value in vars(given).items() if value is not None}
    neutral = GenerationConfig._get_default_generation_params()
    if set_here.get("min_p") is None and getattr(own, "min_p", None):
        return f"min_p {own.min_p}"
    for name, value in {**vars(own), **set_here}.items():
        if value and value != neutral.get(name) and name not in _TAKEN and name[0] != "_":
            return f"{name} of a generation config"
    return None


def _decoded(trainer: Any) -> Any:
    """The model that our engine reads; of one in shards the plain copy, filled or not."""
    whole = getattr(trainer, "whole", None)
    return trainer.accelerator.unwrap_model(trainer.model) if whole is None else whole.plain


def _first(reasons: Mapping[str, Any]) -> str | None:
    """The first reason that applies."""
    return next((reason for reason, applies in reasons.items() if applies), None)


def _is_sharded(trainer: Any) -> bool:
    return bool(trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled)


def _is_generate_replaced(model: Any) -> bool:
    """Whether ``generate``, which TRL calls, is another than transformers' (or PEFT's) own."""
    layers = (model, model.get_base_model()) if isinstance(model, PeftModel) else (model,)
    functions = [getattr(layer.generate, "__func__", None) for layer in layers]
    own = (GenerationMixin.generate, PeftModel.generate, PeftModelForCausalLM.generate)
    return not all(
        function in own and function.__module__ in _OWN_GENERATE_MODULES for function in functions
    )


def zero_advantage_rows(trainer: Any, inputs: Mapping[str, Any]) -> torch.Tensor | None:
    """Rows [B] whose completions add nothing to loss or gradient, or None if that is not certain.

    That is an advantage of exactly 0 where every term of the loss is multiplied by it; of a row
    whose tokens have advantages of their own, all of them. One row, the shortest, is then kept,
    whose entropy can be logged. Rows that ``train_replies`` has left out have no token in the loss,
    whatever its terms are.
    """
    if reply_selection.TRAINED_FRACTION in inputs:
        left_out = ~inputs["completion_mask"].any(dim=1)
        if bool(left_out.any()):
            return left_out
    args, advantages = trainer.args, inputs["advantages"]
    certain = (
        trainer.beta == 0.0
        and trainer.loss_type in _LOSSES_LINEAR_IN_ADVANTAGE
        and not trainer._entropy_bonus_enabled
        and trainer.top_entropy_quantile == 1.0
        and args.off_policy_mask_threshold is None
        and "old_per_token_logps" not in inputs
    )
    if not certain:
        return None
    lengths = inputs["completion_mask"].sum(dim=1)
    # A row that is masked whole, because it was cut off, has neither a gradient nor an entropy.
    skip: torch.Tensor = (reply_selection.sizes_of(advantages) == 0) | (lengths == 0)
    if bool(skip.all()):
        skip[lengths.masked_fill(lengths == 0, lengths.max() + 1).argmin()] = False
    return skip if bool(skip.any()) else None


def depends_on_company(trainer: Any) -> bool:
    """Whether the loss of a completion depends on which others share its micro-batch.

    So it is where TRL divides by the tokens of a micro-batch, or takes a quantile of its entropies.
    Then completions are shuffled one by one, as TRL does.
    """
    return bool(trainer.loss_type == "bnpo" or trainer.top_entropy_quantile < 1.0)


def whole_groups(batch: dict[str, Any], num_generations: int) -> dict[str, Any]:
    """The generation batch with its groups in a random order, and each group still together.

    TRL shuffles completions; then a group is split over micro-batches, each of which would have to
    forward the prompt again. Which completions share a micro-batch changes no gradient
    of a loss that is a sum over completions, and is as random as before for the others.
    """
    rows = batch["completion_ids"].shape[0]
    if rows % num_generations:
        return batch
    order = torch.randperm(rows // num_generations)
    index = (order[:, None] * num_generations + torch.arange(num_generations)).flatten()
    return reply_selection.reordered(batch, index)
