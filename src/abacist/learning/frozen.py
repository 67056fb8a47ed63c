"""Refuses a training in which no weight can change: frozen weights, an inactive adapter.

TRL trains such a model without a warning, and saves the weights it was given.
"""

from __future__ import annotations

from typing import Any

from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer

from abacist.errors import ModelError


def refuse(model: Any, optimizer: Any = None) -> None:
    """Raises ModelError where training ``model`` could move no weight, or none of its adapter.

    ``optimizer`` is one that a caller brings along; it must hold some weight that is trained.
    """
    if isinstance(model, PeftModel):
        _refuse_idle_adapter(model)
    trained = {id(weight) for weight in model.parameters() if weight.requires_grad}
    if not trained:
        raise ModelError(
            "No weight of the model is trainable (requires_grad is False everywhere), so nothing "
            "would be learned.",
            "model.requires_grad_(True) trains all weights; a peft_config adds an adapter.",
        )
    if optimizer is not None:
        held = {id(weight) for group in optimizer.param_groups for weight in group["params"]}
        if held.isdisjoint(trained):
            raise ModelError(
                "The optimizer holds none of the model's trainable weights, so nothing would be "
                "learned.",
                "Make it from this model's parameters, after its adapter was added; or leave it "
                "out, and the trainer makes one.",
            )


def _refuse_idle_adapter(model: PeftModel) -> None:
    """Raises ModelError where no adapter of ``model`` is active, switched on and trainable."""
    active = list(model.active_adapters)
    trainable = {name for name in model.peft_config if _is_trainable(model, name)}
    names = ", ".join(map(repr, active)) or "none"
    layers = [layer for layer in model.modules() if isinstance(layer, BaseTunerLayer)]
    if layers and all(layer.disable_adapters for layer in layers):
        raise ModelError(
            f"The adapter is switched off ({names}), so it would learn nothing.",
            "Switch it on: model.base_model.enable_adapter_layers().",
        )
    if not trainable:
        raise ModelError(
            f"No weight of the adapter ({names}) is trainable, so nothing would be learned.",
            "An adapter is loaded frozen unless asked otherwise: "
            "PeftModel.from_pretrained(base, adapter, is_trainable=True).",
        )
    if trainable.isdisjoint(active):
        raise ModelError(
            f"The active adapter ({names}) is frozen, and the trainable one "
            f"({', '.join(map(repr, sorted(trainable)))}) is not active: nothing would be learned.",
            f"model.set_adapter({min(trainable)!r}) makes it active.",
        )
    if any(layer.merged for layer in layers):
        raise ModelError(
            "The adapter is merged into the weights, where it takes no part in training.",
            "Take it out again: model.unmerge_adapter().",
        )


def _is_trainable(model: PeftModel, adapter: str) -> bool:
    """Whether any weight of ``adapter`` is; its name is a part of the names of its weights."""
    return any(
        weight.requires_grad and adapter in name.split(".")
        for name, weight in model.named_parameters()
    )
