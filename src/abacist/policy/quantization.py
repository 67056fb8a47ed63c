"""Bases whose linear layers are held in 4 or 8 bits, as QLoRA trains adapters on.

On a CPU, 8 bits are our own (``policy.mxint8``); all else is by bitsandbytes. The embedding, the
norms and the head stay as they are. A 4-bit layer multiplies by the weights that its codes stand
for, in ``compute_dtype``: a part of ours that reads :func:`dense_weight` computes the same. An
8-bit layer of bitsandbytes rounds what it reads as well, by all rows of the batch, so that no part
of ours computes the same.

bitsandbytes is optional and loads with the first model that needs it; nothing here imports it
before.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import torch
from torch import nn
from transformers import BitsAndBytesConfig

from abacist.errors import ModelError
from abacist.policy.kernels.blocks import BLOCK

RECORD = "quantization_config"
"""Where ``adapter_config.json`` says how the base was held that the adapter learned on."""

QUANT_TYPES = ("nf4", "fp4")
MXINT8 = "mxint8"
# One float32 scale for each block of this many weights; nested, these are 8-bit codes themselves.
_BLOCK_WEIGHTS = 64


@dataclass(frozen=True)
class Quantization:
    """How the linear layers of a base are held."""

    bits: int
    quant_type: str = "nf4"
    """``nf4`` or ``fp4`` of 4 bits. Of 8 bits ``mxint8``, or not looked at: bitsandbytes' own."""
    is_nested: bool = False

    def __str__(self) -> str:
        """
        >>> str(Quantization(4, is_nested=True)), str(Quantization(8)), str(Quantization(8, MXINT8))
        ('4 bits (nf4, nested)', '8 bits', '8 bits (MXINT8)')
        """
        if self.bits == 8:
            return f"8 bits{' (MXINT8)' if self.is_ours else ''}"
        return f"4 bits ({self.quant_type}{', nested' if self.is_nested else ''})"

    @property
    def is_ours(self) -> bool:
        """Whether ``policy.mxint8`` does it, not bitsandbytes."""
        return self.quant_type == MXINT8

    def on(self, device: torch.device) -> Quantization:
        """What is meant by it on ``device``: on a CPU, 8 bits are ours."""
        is_ours = self.bits == 8 and device.type == "cpu"
        return Quantization(8, MXINT8) if is_ours else self

    @property
    def bytes_per_weight(self) -> float:
        """Of a linear layer, with the scales of its blocks."""
        if self.is_ours:
            return 1 + 1 / BLOCK
        if self.bits == 8:
            return 1.0
        return 0.5 + (1 if self.is_nested else 4) / _BLOCK_WEIGHTS

    def config(self, dtype: torch.dtype) -> BitsAndBytesConfig:
        """transformers' own form of it; 4-bit layers compute in ``dtype``."""
        if self.bits == 8:
            return BitsAndBytesConfig(load_in_8bit=True)
        return BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_compute_dtype=dtype,
            bnb_4bit_quant_type=self.quant_type,
            bnb_4bit_use_double_quant=self.is_nested,
        )

    def record(self) -> dict[str, Any]:
        """What an adapter's file keeps, in transformers' words."""
        if self.is_ours:
            return {"quant_method": MXINT8}
        if self.bits == 8:
            return {"quant_method": "bitsandbytes", "load_in_8bit": True}
        return {
            "quant_method": "bitsandbytes",
            "load_in_4bit": True,
            "bnb_4bit_quant_type": self.quant_type,
            "bnb_4bit_use_double_quant": self.is_nested,
        }


def recorded(adapter_config: Mapping[str, Any]) -> Quantization | None:
    """How the base of an adapter was held; None: as its files have it.

    >>> recorded({"quantization_config": Quantization(4).record()})
    Quantization(bits=4, quant_type='nf4', is_nested=False)
    """
    found = adapter_config.get(RECORD)
    if not isinstance(found, dict):
        return None
    if found.get("quant_method") == MXINT8:
        return Quantization(8, MXINT8)
    if found.get("load_in_8bit") is True:
        return Quantization(8)
    quant_type = found.get("bnb_4bit_quant_type", "nf4")
    if found.get("load_in_4bit") is not True or quant_type not in QUANT_TYPES:
        raise ModelError(
            f"The adapter's {RECORD} names no way to hold its base.",
            "The copy is damaged, or of another program.",
        )
    return Quantization(4, quant_type, found.get("bnb_4bit_use_double_quant") is True)


def refuse_missing(quantization: Quantization, why: str) -> None:
    """Raise ModelError if it needs bitsandbytes, which is not there; ``why`` opens the message."""
    if not quantization.is_ours and find_spec("bitsandbytes") is None:
        raise ModelError(
            f"{why} holds the base in {quantization}, and bitsandbytes, which does that, is not "
            "installed.",
            "pip install 'abacist[quant]', or hold the base as it is stored.",
        )


def linear_4bit() -> type | None:
    """The class of bitsandbytes' 4-bit layers; None while it is not loaded."""
    return getattr(sys.modules.get("bitsandbytes.nn.modules"), "Linear4bit", None)


def linear_8bit() -> type | None:
    """The class of its 8-bit layers."""
    return getattr(sys.modules.get("bitsandbytes.nn.modules"), "Linear8bitLt", None)


def lora_4bit() -> type | None:
    """The class of PEFT's LoRA around a 4-bit layer."""
    return getattr(sys.modules.get("peft.tuners.lora.bnb"), "Linear4bit", None)


def hold_as_loaded(network: nn.Module) -> None:
    """Keep the 4-bit codes of ``network`` as they are.

    On a CPU with bfloat16 instructions bitsandbytes repacks them for good at the first forward in
    evaluation mode: scales are rounded, products computed in bfloat16, and gradients lost.
    """
    layer: Any
    for layer in network.modules():
        if is_4bit(layer):
            layer.support_avx512bf16_for_cpu = False


def not_dense_reason(linear: nn.Module, dtype: torch.dtype) -> str | None:
    """Why a product with :func:`dense_weight`, in ``dtype``, is not what ``linear`` computes.

    None: it is. ``linear`` is a base layer, without its adapter; None too if it is a plain one.
    """
    if type(linear) is linear_8bit():
        return "its 8-bit layers round what they read too"
    if type(linear) is not linear_4bit():
        return None
    layer: Any = linear
    state = getattr(layer.weight, "quant_state", None)
    if state is None or getattr(state, "packing_format_for_cpu", False):
        return "its 4-bit weights are packed for one processor"
    computed = layer.compute_dtype or dtype
    if computed != dtype or (layer.weight.device.type == "cpu" and dtype != torch.float32):
        return f"its 4-bit layers compute in {str(computed).removeprefix('torch.')}"
    return None


def is_4bit(linear: nn.Module) -> bool:
    """Whether ``linear``, a base layer, is one of bitsandbytes' 4-bit layers."""
    return type(linear) is linear_4bit()


def dense_weight(linear: Any) -> torch.Tensor:
    """The weights [O, I] that ``linear`` multiplies by: its own, or what its 4-bit codes mean."""
    if not is_4bit(linear):
        weight: torch.Tensor = linear.weight.detach()
        return weight
    from bitsandbytes.functional import dequantize_4bit

    state = linear.weight.quant_state
    dense: torch.Tensor = dequantize_4bit(linear.weight.data, state)
    return dense.to(linear.compute_dtype or state.dtype)


def num_weights(parameters: Iterable[torch.Tensor]) -> int:
    """How many numbers they stand for: a byte of 4-bit codes is two."""
    total = 0
    for weight in parameters:
        shape = getattr(getattr(weight, "quant_state", None), "shape", None)
        total += weight.numel() if shape is None else torch.Size(shape).numel()
    return total


def dense_bytes(linear: nn.Module) -> int:
    """What a copy of the weights of ``linear`` takes, as :func:`dense_weight` makes it."""
    weight: Any = linear.weight
    if not is_4bit(linear):
        return int(weight.numel() * weight.element_size())
    dtype = getattr(linear, "compute_dtype", None) or weight.quant_state.dtype
    return num_weights([weight]) * int(dtype.itemsize)


def scales_of(weight: torch.Tensor) -> Iterator[torch.Tensor]:
    """The tensors that a quantised weight has beside its codes, which are no parameters."""
    state: Any = getattr(weight, "quant_state", None)
    found = [getattr(weight, "SCB", None), getattr(state, "offset", None)]
    for part in (state, getattr(state, "state2", None)):
        found += [getattr(part, "absmax", None), getattr(part, "code", None)]
    return (one for one in found if isinstance(one, torch.Tensor))


def scales(model: nn.Module) -> Iterator[torch.Tensor]:
    """The same of all weights of ``model``."""
    return (one for weight in model.parameters() for one in scales_of(weight))


def scale_bytes(model: nn.Module) -> int:
    """What they take."""
    return sum(one.numel() * one.element_size() for one in scales(model))
