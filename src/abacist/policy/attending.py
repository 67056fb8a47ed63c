"""Which attention reads a packed batch here, and why: decided once, proven, and printed.

A kernel that has never run on this machine is not trusted. Before the first batch it reads a small
tree, and its values and gradients are compared with float32 on the CPU; one that raises or differs
by more than rounding is left alone for the rest of the process, which is said once, and attention
goes on by PyTorch over padded branches.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from dataclasses import dataclass
from textwrap import shorten

import torch
from torch import Tensor

from abacist.errors import AbacistError
from abacist.policy import varlen
from abacist.policy.attention import padded
from abacist.policy.choices import Choice
from abacist.policy.kernels import build
from abacist.policy.layout import Layout, lay_out
from abacist.policy.varlen import Kernel, Sequences, Varlen

logger = logging.getLogger(__name__)

_WHAT = "scoring"
_PADDED = "PyTorch's attention (SDPA) over padded branches"
_HALF = (torch.bfloat16, torch.float16)
_LARGEST_HEAD = 256
# A token may be off by this many steps of its dtype, relative to what a token usually is. Random
# rounding stays below two; a diagonal that is off by one is off by a hundred.
_ALLOWED_STEPS = 8


@dataclass(frozen=True)
class Heads:
    """What a kernel is to be made for."""

    query_heads: int
    key_heads: int
    size: int


QWEN_HEADS = Heads(12, 2, 128)
"""Those of Qwen2.5-1.5B, to try a machine with before there is a model."""


@dataclass(frozen=True)
class Attending:
    """``kernel`` None: none with variable lengths; :mod:`abacist.policy.attention` does without."""

    kernel: Kernel | None
    choice: Choice

    def prepare(self, layout: Layout) -> None:
        """Tell ``layout`` who will read it; the same one reads again when layers are recomputed."""
        if self.kernel is not None:
            sequences = Sequences.of(layout.branches, layout.token_ids.device)
            layout.varlen = Varlen(self.kernel, sequences)


@functools.cache
def choose(
    implementation: str, device: torch.device, dtype: torch.dtype, heads: Heads
) -> Attending:
    """Who attends for a model set to ``implementation``, computing in ``dtype``.

    A flash implementation gets FlashAttention's kernel, and PyTorch's where that fails; sdpa
    means kernels of PyTorch. Asked once for each combination; what is tried in vain is logged.
    """
    if (without := _without_varlen(device, dtype, heads)) is not None:
        return Attending(None, without)
    candidates: list[tuple[str, str, Callable[[], Kernel]]] = []
    if "flash" in implementation:
        make = functools.partial(varlen.flash_kernel, implementation)
        asked = f"the model is set to {implementation}"
        candidates.append(("FlashAttention's kernel", asked, make))
    candidates.append(("PyTorch's flash kernel", "it is built in", varlen.pytorch_kernel))
    in_vain: list[str] = []
    for name, why, find in candidates:
        try:
            kernel = find()
            fault = _fault(kernel, device, dtype, heads)
        except Exception as error:  # an import, a launch: any of several libraries' errors
            text = error.message if isinstance(error, AbacistError) else str(error)
            said = (text.strip() or type(error).__name__).splitlines()[0]
            fault = f"it failed ({shorten(said, 120, placeholder=' …').rstrip('.')})"
        if fault is None:
            why = "; ".join([*in_vain, f"{why}, without padding, and right in a trial here"])
            return Attending(kernel, Choice(_WHAT, f"{name} for variable lengths", why))
        in_vain.append(f"{name} is not used: {fault}")
        logger.warning("Abacist: scoring: %s.", in_vain[-1])
    return Attending(None, Choice(_WHAT, _PADDED, "; ".join(in_vain)))


def _without_varlen(device: torch.device, dtype: torch.dtype, heads: Heads) -> Choice | None:
    """Who attends where no kernel with variable lengths can be used, or None."""
    name = str(dtype).removeprefix("torch.")
    if device.type == "cpu" and dtype == torch.float32:
        if (obstacle := build.unsupported_reason()) is None:
            return Choice(_WHAT, "a kernel of ours, without padding", "float32 on a CPU")
        why = f"no kernels of ours: {obstacle}"
    elif device.type != "cuda":
        why = f"on {device.type} nothing else computes in {name}"
    elif dtype not in _HALF:
        why = f"flash kernels compute in bfloat16 or float16, not {name}"
    elif torch.cuda.get_device_capability(device) < (8, 0):
        why = "this GPU is older than Ampere"
    elif heads.size % 8 or heads.size > _LARGEST_HEAD:
        why = f"flash kernels take no heads of {heads.size}"
    else:
        return None
    return Choice(_WHAT, _PADDED, why)


def _fault(kernel: Kernel, device: torch.device, dtype: torch.dtype, heads: Heads) -> str | None:
    """What is wrong with ``kernel``, as it reads a small tree; None: nothing."""
    layout = _small_tree()
    states = _drawn(len(layout.token_ids), dtype, heads)
    scale = heads.size**-0.5
    sequences = Sequences.of(layout.branches, device)

    def reference(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return padded(q, k, v, layout, scale)

    def subject(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return Varlen(kernel, sequences).attend(q, k, v, scale)

    right = _values_and_gradients(reference, [x.float() for x in states])
    found = _values_and_gradients(subject, [x.to(device) for x in states])
    allowed = _ALLOWED_STEPS * torch.finfo(dtype).eps
    parts = ("values", "query gradients", "key gradients", "value gradients")
    for part, a, b in zip(parts, found, right, strict=True):
        if not (off := _furthest(a.float().cpu(), b)) <= allowed:
            return f"its {part} are off by {off:.2g} in a trial"
    return None


def _values_and_gradients(
    attend: Callable[[Tensor, Tensor, Tensor], Tensor], states: list[Tensor]
) -> list[Tensor]:
    """Whatever is going on around: no gradients wanted, autocast, tensors saved elsewhere."""
    *inputs, weights = states
    with (
        torch.inference_mode(False),
        torch.enable_grad(),
        torch.autocast(weights.device.type, enabled=False),
        torch.autograd.graph.saved_tensors_hooks(lambda x: x, lambda x: x),
    ):
        leaves = [x.clone().requires_grad_() for x in inputs]
        out = attend(*leaves)
        gradients = torch.autograd.grad(out, leaves, weights)
    # Tokens first, all that is of one token in a row.
    by_token = [gradient[0].transpose(0, 1) for gradient in gradients]
    return [x.detach().flatten(1) for x in (out[0], *by_token)]


def _furthest(found: Tensor, right: Tensor) -> float:
    """How far the worst token is off, relative to its own length or, if longer, the usual one."""
    usual = right.square().sum(1).mean().sqrt()
    lengths = right.norm(dim=1).clamp(min=float(usual))
    return float(((found - right).norm(dim=1) / lengths).max())


def _drawn(tokens: int, dtype: torch.dtype, heads: Heads) -> list[Tensor]:
    """Query, key, value and what the result is weighed with, from a generator of their own."""
    draw = torch.Generator().manual_seed(0)
    with torch.inference_mode(False):
        shapes = [(1, n, tokens, heads.size) for n in (heads.query_heads, *[heads.key_heads] * 2)]
        shapes.append((1, tokens, heads.query_heads, heads.size))
        return [torch.randn(shape, generator=draw).to(dtype) for shape in shapes]


@functools.cache
def _small_tree() -> Layout:
    """A shared opening, two prompts, completions short and long; some beyond a kernel's blocks."""
    opening, own, completions = 70, (5, 66), (2, 131, 4, 1, 20)
    width = max(completions)
    rows = len(completions)
    with torch.inference_mode(False):
        ids = torch.ones(rows, opening + max(own) + width, dtype=torch.int64)
        mask = torch.zeros_like(ids)
        for row, length in enumerate(completions):
            prompt = own[row % 2]
            middle = ids.shape[1] - width
            ids[row, middle - prompt : middle] = 2 + row % 2
            mask[row, middle - prompt - opening : middle + length] = 1
        layout = lay_out(ids, mask, width)
    assert layout is not None
    return layout
