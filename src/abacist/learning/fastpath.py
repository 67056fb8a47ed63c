"""When our rollout and our scoring compute exactly what TRL computes, and why not where not.

The fast path is an allow-list: models that ``abacist.policy`` has been proven on, and settings
under which it is the same mathematics. Anything else takes TRL's own path, and each part that does
is said once, with its reason.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from peft import PeftModel, PeftModelForCausalLM
from transformers import GenerationMixin, PreTrainedModel

from abacist.policy import scoring
from abacist.policy.decoding import engine

# In these losses every term of a completion is multiplied by its advantage.
_LOSSES_LINEAR_IN_ADVANTAGE = {"grpo", "bnpo", "dr_grpo", "dapo", "cispo", "luspo", "sapo"}
_OWN_GENERATE_MODULES = {"transformers.generation.utils", "peft.peft_model"}


def wanted(args: Any) -> bool:
    """``--use_fast_path``; on for a plain ``trl.GRPOConfig``, which has no such field."""
    return bool(getattr(args, "use_fast_path", True))


def rollout_obstacle(trainer: Any) -> str | None:
    """Why completions are sampled by TRL and not by our engine, as the end of a sentence."""
    args = trainer.args
    settings = {
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
        "the model is sharded over processes": _is_sharded(trainer),
    }
    model = trainer.accelerator.unwrap_model(trainer.model)
    if _is_generate_replaced(model):
        settings["generate() has been replaced, and is to be called"] = True
    return _first(settings) or engine.obstacle(model)


def scoring_obstacle(trainer: Any) -> str | None:
    """Why log-probabilities are computed by TRL and not by our shared-prompt forward."""
    args, model = trainer.args, trainer.model
    settings = {
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
    return _first(settings) or scoring.obstacle(model)


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


def silent_rows(trainer: Any, inputs: Mapping[str, Any]) -> torch.Tensor | None:
    """Rows [B] whose completions add nothing to loss or gradient, or None if that is not certain.

    An advantage of exactly 0 silences a completion when the loss has no term beside it. One row,
    the shortest, is always kept, so that there is a graph to go backward through.
    """
    args, advantages = trainer.args, inputs["advantages"]
    certain = (
        trainer.beta == 0.0
        and trainer.loss_type in _LOSSES_LINEAR_IN_ADVANTAGE
        and not trainer._entropy_bonus_enabled
        and trainer.top_entropy_quantile == 1.0
        and args.off_policy_mask_threshold is None
        and "old_per_token_logps" not in inputs
        and advantages.dim() == 1
    )
    if not certain:
        return None
    silent: torch.Tensor = advantages == 0
    if bool(silent.all()):
        silent[inputs["completion_mask"].sum(dim=1).argmin()] = False
    return silent if bool(silent.any()) else None


def whole_groups(batch: dict[str, Any], num_generations: int) -> dict[str, Any]:
    """The generation batch with its groups in a random order, and each group still together.

    TRL shuffles completions; then the parts of a group meet different micro-batches and each
    would have to read the prompt again. Which completions share a micro-batch changes no gradient
    of a loss that is a sum over completions, and is as random as before for the others.
    """
    rows = batch["completion_ids"].shape[0]
    if rows % num_generations:
        return batch
    order = torch.randperm(rows // num_generations)
    index = (order[:, None] * num_generations + torch.arange(num_generations)).flatten()
    return {
        key: value[index.to(value.device)]
        if isinstance(value, torch.Tensor) and value.dim() and value.shape[0] == rows
        else value
        for key, value in batch.items()
    }
