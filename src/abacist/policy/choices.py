"""Device, dtype and attention implementation, each with the reason for the choice.

``auto`` chooses the best that works on this machine and says why. A choice by name is used or
refused with a :class:`ModelError`, never silently replaced.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from transformers.modeling_flash_attention_utils import (
    FLASH_ATTN_KERNEL_FALLBACK,
    lazy_import_flash_attention,
)
from transformers.utils import is_flash_attn_2_available, is_kernels_available

from abacist.errors import ModelError, first_line
from abacist.policy.kernels import build

_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
_HALF = (torch.bfloat16, torch.float16)
MATMUL_PRECISIONS = ("highest", "high", "medium")


@dataclass(frozen=True)
class Choice:
    """One choice, ready to print: ``device  cuda:0  (NVIDIA H200 is available)``."""

    what: str
    value: str
    why: str


def choose_device(asked: str) -> tuple[torch.device, Choice]:
    """The device for ``asked``: ``auto``, or anything ``torch.device`` understands."""
    if asked == "auto":
        if torch.cuda.is_available():
            rank = int(os.environ.get("LOCAL_RANK", torch.cuda.current_device()))
            device = torch.device("cuda", rank)
            why = f"{torch.cuda.get_device_name(device)} is available"
        elif torch.backends.mps.is_available():
            device, why = torch.device("mps"), "an Apple GPU is available"
        else:
            device, why = torch.device("cpu"), "PyTorch sees no GPU (CUDA or MPS)"
        return device, Choice("device", str(device), why)
    try:
        device = torch.device(asked)
    except RuntimeError as error:
        raise ModelError(f"There is no device '{asked}'.", "Use cpu, cuda or mps.") from error
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ModelError(
            f"Device '{asked}' was asked for, but PyTorch {torch.__version__} sees "
            f"{torch.cuda.device_count()} CUDA devices.",
            "Use --device auto, or install a CUDA build of PyTorch and check nvidia-smi.",
        )
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise ModelError("Device 'mps' was asked for, but no Apple GPU is available.", "Use auto.")
    return device, Choice("device", str(device), "asked for")


def choose_dtype(
    asked: str, device: torch.device, *, trains_all_weights: bool, widened: bool = False
) -> tuple[torch.dtype, Choice]:
    """The dtype of the weights for ``asked``: ``auto``, ``bfloat16``, ``float16``, ``float32``.

    ``widened``: the weights are stored in bfloat16, and on a CPU our kernels compute with them in
    float32 (``families.compute_dtype_of``).
    """
    if asked != "auto":
        if asked not in _DTYPES:
            raise ModelError(f"There is no dtype '{asked}'.", f"Use auto, {', '.join(_DTYPES)}.")
        return _DTYPES[asked], Choice("dtype", asked, "asked for")
    dtype = torch.float32
    if trains_all_weights:
        why = "full fine-tuning: in bfloat16 small updates would be rounded away"
    elif device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False):
        dtype, why = torch.bfloat16, "this GPU computes in bfloat16; adapters stay in float32"
    elif device.type == "cuda":
        why = "this GPU has no bfloat16, and float16 overflows in some models (Qwen2.5)"
    elif device.type == "mps":
        why = "exact on every Apple GPU; float16 overflows in some models (Qwen2.5)"
    elif widened:
        dtype, why = torch.bfloat16, "as stored; our kernels compute in float32, so nothing is lost"
    else:
        why = "exact on a CPU"
    return dtype, Choice("dtype", str(dtype).removeprefix("torch."), why)


@contextlib.contextmanager
def float32_matmul_precision(asked: str) -> Iterator[None]:
    """PyTorch's setting of this name within the block: ``high`` or ``medium``.

    ``highest`` is PyTorch's default, and leaves what a script may have set. Raises
    :class:`ModelError` for another name, and where the same was set by PyTorch's newer
    ``fp32_precision`` (``--tf32``).
    """
    if asked not in MATMUL_PRECISIONS:
        raise ModelError(
            f"float32_matmul_precision {asked!r} is not a precision that PyTorch knows.",
            f"Choose one of {', '.join(MATMUL_PRECISIONS)}.",
        )
    if asked == "highest":
        yield
        return
    try:
        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision(asked)
    except RuntimeError as error:
        raise ModelError(
            f"float32_matmul_precision {asked} does not go with PyTorch's fp32_precision, which is "
            "set already, by --tf32 or by a script.",
            "Leave out one of the two.",
        ) from error
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def explain_matmul_precision(asked: str, model: torch.nn.Module) -> Choice | None:
    """What ``float32_matmul_precision`` means for ``model``; None: it was not asked for."""
    if asked == "highest":
        return None
    weight = next(model.parameters())
    if weight.device.type == "cuda":
        why = "products in float32 may be computed in TF32"
    elif weight.device.type != "cpu":
        why = f"up to PyTorch on {weight.device.type}"
    elif asked == "high":
        why = "on a CPU the same as highest"
    elif weight.dtype != torch.bfloat16:
        why = "our kernels compute as with highest, because the weights are not held in bfloat16"
    elif (missing := build.unsupported_reason()) is not None:
        why = f"up to PyTorch, because there are no kernels: {missing}"
    elif build.refuses_amx():
        why = "the same as highest here: Linux does not let this process use AMX"
    elif not build.can_multiply_pairs():
        why = "the same as highest here: this processor is not faster in bfloat16 than in float32"
    else:
        why = (
            f"products with the frozen weights, by {build.pairs_by()}, round their input to "
            "bfloat16; sums are float32"
        )
    return Choice("float32_matmul_precision", asked, why)


def choose_attention(
    asked: str, device: torch.device, dtype: torch.dtype, kind: type | None = None
) -> tuple[str, Choice]:
    """The ``attn_implementation`` for ``asked``: ``auto``, or one of transformers' names.

    ``auto`` chooses among those that ``kind``, the model's class, supports, if it is known. A model
    with soft-capped scores (Gemma 2), for example, does not support all of them.

    FlashAttention 2 comes from the ``flash_attn`` package or, if that is missing, from the
    ``kernels`` package, through which transformers downloads a build from the Hub.
    """
    reason = _flash_unsupported_reason(device, dtype)
    if asked == "auto":
        name = "this model" if kind is None else kind.__name__
        if reason is None and not getattr(kind, "_supports_flash_attn", True):
            reason = f"{name} does not support it"
        reason = reason or _hub_build_unsupported_reason()
        if reason is None:
            value, why = "flash_attention_2", f"from the {_flash_source()}"
        elif not getattr(kind, "_supports_sdpa", True):
            value, why = "eager", f"{name} does not support sdpa; no FlashAttention: {reason}"
        else:
            value, why = "sdpa", f"PyTorch's own; no FlashAttention, because {reason}"
        return value, Choice("attention", value, why)
    if asked == "flash_attention_2" and reason is not None:
        raise ModelError(
            f"flash_attention_2 was asked for, but {reason}.",
            "Use --attn_implementation auto or sdpa.",
        )
    if asked == "flex_attention" and device.type == "cpu":
        raise ModelError(
            "flex_attention was asked for, but on a CPU PyTorch has it without gradients only.",
            "Use --attn_implementation auto or sdpa.",
        )
    return asked, Choice("attention", asked, "asked for")


def _flash_unsupported_reason(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why FlashAttention 2 cannot be used, or None."""
    if device.type != "cuda":
        return "it needs a CUDA device"
    if torch.cuda.get_device_capability(device) < (8, 0):
        return "this GPU is older than Ampere"
    if dtype not in _HALF:
        return f"it needs bfloat16 or float16, not {str(dtype).removeprefix('torch.')}"
    if _flash_source() is None:
        return "neither 'flash_attn' nor 'kernels' is installed (pip install kernels)"
    return None


def _hub_build_unsupported_reason() -> str | None:
    """Why FlashAttention 2 cannot be downloaded from the Hub, or None; None too if installed."""
    if is_flash_attn_2_available():
        return None
    try:
        lazy_import_flash_attention(FLASH_ATTN_KERNEL_FALLBACK["flash_attention_2"])
    except Exception as error:  # no network, no build for this machine, a broken build
        return f"its build could not be downloaded from the Hub ({first_line(error)})"
    return None


def _flash_source() -> str | None:
    if is_flash_attn_2_available():
        return f"installed flash_attn {importlib.metadata.version('flash_attn')}"
    if is_kernels_available():
        return "Hub, by the kernels package (kernels-community/flash-attn2)"
    return None
