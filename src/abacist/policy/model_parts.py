"""The parts of a model that our fast parts read: what is within its wrappers, its linear layers."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from peft import PeftModel
from torch.nn.parallel import DistributedDataParallel


def base_of(model: Any) -> Any:
    """The transformers model within DDP's and PEFT's wrappers."""
    model = model.module if isinstance(model, DistributedDataParallel) else model
    return model.get_base_model() if isinstance(model, PeftModel) else model


def linears_of(base: Any) -> Iterator[Any]:
    """The linear layers of all decoder layers, with or without LoRA."""
    for layer in base.model.layers:
        attention, mlp = layer.self_attn, layer.mlp
        yield from (attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj)
        yield from (mlp.gate_proj, mlp.up_proj, mlp.down_proj)
