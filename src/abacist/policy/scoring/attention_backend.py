"""Attention over a packed batch, and which backend computes it here.

A packed token attends to its own branch up to itself and to all branches above. Three backends
compute the same:

* a variable-length flash kernel (FlashAttention's or PyTorch's own), on a GPU in half precision:
  every branch is one sequence. Its queries are the branch's own tokens, its keys those of all
  branches above and then its own. Causal with the diagonal at the bottom right, so each token sees
  what stands before it in its own row. No padding and no mask;
* our kernel (:mod:`abacist.policy.kernels.tree_attention`), on a CPU in float32;
* PyTorch's scaled-dot-product attention anywhere else: one padded batch for each level, in which
  the keys of a branch are those of its parent, gathered, and then its own.

:func:`choose_backend` decides once and says why. A flash kernel is not trusted before it has run
here: in a trial on a small tree its values and gradients are compared with float32 on the CPU. One
that raises, or differs by more than rounding, is not used by this process; that is logged once.

Shape suffixes: 1 the batch dimension of transformers' modules, T packed tokens, S keys of all
branches together, A query heads, K key heads, D numbers of a head; of one level: N branches, L
tokens of the longest branch, M keys (those above + L).
"""

from __future__ import annotations

import functools
import inspect
import logging
import os
from collections.abc import Callable
from dataclasses import dataclass
from textwrap import shorten
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers.modeling_flash_attention_utils import lazy_import_flash_attention

from abacist.errors import ModelError, first_line
from abacist.policy.choices import Choice
from abacist.policy.kernels import build
from abacist.policy.kernels import tree_attention as cpu_kernel
from abacist.policy.scoring.packing import GatherRows, Level, Packing, pack

logger = logging.getLogger(__name__)

_WHAT = "scoring"
_PADDED = "PyTorch's attention (SDPA) over padded branches"
_HALF = (torch.bfloat16, torch.float16)
_LARGEST_HEAD = 256
# In the trial a token may be off by this many steps of its dtype, relative to the usual length of
# a token. Rounding stays below two; a diagonal that is off by one is off by a hundred.
_ALLOWED_STEPS = 8

Attend = Callable[[Tensor, Tensor, Tensor, float], Tensor]
"""Query [1, A, T, D], key and value [1, K, T, D], scale of the scores -> [1, T, A, D]."""


@dataclass(frozen=True)
class HeadShape:
    """Number and size of the heads a kernel is tried with."""

    query_heads: int
    key_heads: int
    size: int


QWEN_1_5B_HEADS = HeadShape(12, 2, 128)
"""Those of Qwen2.5-1.5B, to try a machine with before there is a model."""


@dataclass(frozen=True)
class AttentionBackend:
    """``varlen`` None: no variable-length kernel; our kernel or padded attention instead."""

    varlen: VarlenKernel | None
    choice: Choice

    def on(self, packing: Packing) -> Attend:
        """Attention over ``packing``, the same function for every layer and recomputation."""
        if self.varlen is None:
            return functools.partial(_attend, packing)
        sequences = Sequences.of(packing.branches, packing.token_ids.device)
        return VarlenAttention(self.varlen, sequences)


def _attend(packing: Packing, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    if cpu_kernel.supports(query, key, value):
        return cpu_kernel.attend(query, key, value, packing.branches, scale)
    return padded_attention(packing, query, key, value, scale)


# --- PyTorch's attention, level by level ---


def padded_attention(
    packing: Packing, query_1ATD: Tensor, key_1KTD: Tensor, value_1KTD: Tensor, scale: float
) -> Tensor:
    """Scaled-dot-product attention for any device and dtype: [1, T, A, D]."""
    device = query_1ATD.device.type
    autocast = torch.is_autocast_enabled(device)
    dtype = torch.get_autocast_dtype(device) if autocast else query_1ATD.dtype
    sizes = [level.tokens for level in packing.levels]
    queries, keys, values = (
        states[0].transpose(0, 1).to(dtype).split(sizes)
        for states in (query_1ATD, key_1KTD, value_1KTD)
    )
    outputs = []
    above: tuple[Tensor, Tensor] | None = None  # keys and values of the level above, [N, M, K, D]
    for level, q, k, v in zip(packing.levels, queries, keys, values, strict=True):
        query_NLAD, own_k, own_v = level.pad(q), level.pad(k), level.pad(v)
        if not level.is_last:  # their gradients are sums over branches
            own_k, own_v = _at_least_float32(own_k), _at_least_float32(own_v)
        if above is None or level.parents is None:
            key_NMKD, value_NMKD = own_k, own_v
        else:
            key_NMKD, value_NMKD = (
                torch.cat([GatherRows.apply(trunk, level.parents, own.dtype), own], dim=1)
                for trunk, own in zip(above, (own_k, own_v), strict=True)
            )
        above = key_NMKD, value_NMKD
        out_NLAD = _attend_level(level, query_NLAD, key_NMKD.to(dtype), value_NMKD.to(dtype), scale)
        outputs.append(level.unpad(out_NLAD))
    return torch.cat(outputs)[None]


def _attend_level(
    level: Level, query_NLAD: Tensor, key_NMKD: Tensor, value_NMKD: Tensor, scale: float
) -> Tensor:
    repeats = query_NLAD.shape[2] // key_NMKD.shape[2]
    if level.parents is None:
        key_NMAD, value_NMAD = (
            x.repeat_interleave(repeats, dim=2) if repeats > 1 else x
            for x in (key_NMKD, value_NMKD)
        )
        out_NALD = scaled_dot_product_attention(
            query_NLAD.transpose(1, 2),
            key_NMAD.transpose(1, 2),
            value_NMAD.transpose(1, 2),
            is_causal=True,
            scale=scale,
        )
        return out_NALD.transpose(1, 2)
    mask = level.bias(query_NLAD.dtype, repeats)
    key_NKMD, value_NKMD = key_NMKD.transpose(1, 2), value_NMKD.transpose(1, 2)
    return grouped_attention(query_NLAD, key_NKMD, value_NKMD, mask, scale)


def grouped_attention(
    query_NLAD: Tensor, key_NKMD: Tensor, value_NKMD: Tensor, mask: Tensor, scale: float
) -> Tensor:
    """Attention of A query heads to K key heads, [N, L, A, D], without repeating keys and values.

    The query heads that share a key head become further queries of it, [N, K, A / K * L, D], which
    ``mask`` is made for. If PyTorch is asked to share key heads itself (``enable_gqa``), then with
    a mask, or in float32, a GPU has only one kernel for it, and that one stores all scores.
    """
    rows, longest, heads, size = query_NLAD.shape
    grouped = (rows, key_NKMD.shape[1], heads // key_NKMD.shape[1], longest, size)
    query = query_NLAD.view(rows, longest, *grouped[1:3], size).permute(0, 2, 3, 1, 4)
    out = scaled_dot_product_attention(
        query.flatten(2, 3), key_NKMD, value_NKMD, attn_mask=mask, scale=scale
    )
    return out.view(grouped).permute(0, 3, 1, 2, 4).reshape(rows, longest, heads, size)


def _at_least_float32(states: Tensor) -> Tensor:
    return states.float() if states.dtype in _HALF else states


# --- Variable-length kernels ---


@dataclass(frozen=True)
class Sequences:
    """The branches of a packing as a variable-length kernel takes them.

    Attributes:
        keys: [S], the packed token of each key; keys of a shared branch are listed once for every
            branch below it.
        query_ends: [branches + 1] int32, cumulative lengths of the queries, from 0.
        key_ends: [branches + 1] int32, cumulative lengths of the keys.
        most_queries: the largest number of queries of a branch.
        most_keys: the largest number of keys of a branch.
    """

    keys: Tensor
    query_ends: Tensor
    key_ends: Tensor
    most_queries: int
    most_keys: int

    @classmethod
    def of(cls, branches: Tensor, device: torch.device) -> Sequences:
        """Of :attr:`abacist.policy.scoring.packing.Packing.branches`."""
        seen: list[Tensor] = []
        for start, length, parent in branches.tolist():
            own = torch.arange(start, start + length)
            seen.append(own if parent < 0 else torch.cat((seen[parent], own)))
        queries = branches[:, 1]
        keys = torch.tensor([len(branch) for branch in seen])
        return cls(
            torch.cat(seen).to(device),
            _ends(queries).to(device),
            _ends(keys).to(device),
            int(queries.max()),
            int(keys.max()),
        )


VarlenKernel = Callable[[Tensor, Tensor, Tensor, Sequences, float], Tensor]
"""[T, A, D] by [S, K, D] twice -> [T, A, D], with gradients; the last is the scores' scale."""


@dataclass(frozen=True)
class VarlenAttention:
    """A variable-length kernel on one batch: an :data:`Attend`.

    Computes in the dtype of autocast if that is on. The gradients of a key of several branches are
    added up in float32.
    """

    kernel: VarlenKernel
    sequences: Sequences

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        device = query.device.type
        autocast = torch.is_autocast_enabled(device)
        dtype = torch.get_autocast_dtype(device) if autocast else query.dtype
        query, key, value = (states[0].transpose(0, 1) for states in (query, key, value))
        key, value = (GatherRows.apply(x, self.sequences.keys, dtype) for x in (key, value))
        return self.kernel(query.to(dtype), key, value, self.sequences, scale)[None]


def flash_kernel(implementation: str) -> VarlenKernel:
    """FlashAttention's kernel, as transformers has it for this ``attn_implementation``.

    Raises whatever its import raises, or :class:`ModelError` when it has no such kernel.
    """
    (_, function, *_), _ = lazy_import_flash_attention(implementation)
    if function is None:
        raise ModelError(f"'{implementation}' has no variable-length kernel.", "Use sdpa.")
    has_deterministic = "deterministic" in inspect.signature(function).parameters

    def run(q: Tensor, k: Tensor, v: Tensor, sequences: Sequences, scale: float) -> Tensor:
        options: dict[str, Any] = {}
        if has_deterministic:
            options["deterministic"] = _wants_determinism()
        out = function(
            q=q,
            k=k,
            v=v,
            cu_seqlens_q=sequences.query_ends,
            cu_seqlens_k=sequences.key_ends,
            max_seqlen_q=sequences.most_queries,
            max_seqlen_k=sequences.most_keys,
            softmax_scale=scale,
            causal=True,
            **options,
        )
        attended: Tensor = out[0] if isinstance(out, tuple) else out  # some add the log-sum-exp
        return attended

    return run


def pytorch_kernel() -> VarlenKernel:
    """The flash kernel that is built into PyTorch.

    Raises :class:`ImportError`, or :class:`ModelError` when this version lacks an argument.
    """
    from torch.nn.attention.varlen import varlen_attn

    known = inspect.signature(varlen_attn).parameters
    if not {"scale", "window_size"} <= known.keys():
        raise ModelError(
            f"varlen_attn of PyTorch {torch.__version__} has no scale or no window.",
            "Update PyTorch.",
        )

    def run(q: Tensor, k: Tensor, v: Tensor, sequences: Sequences, scale: float) -> Tensor:
        options: dict[str, Any] = {}
        if (repeats := q.shape[1] // k.shape[1]) > 1:
            if "enable_gqa" in known:
                options["enable_gqa"] = True
            else:
                k, v = (x.repeat_interleave(repeats, dim=1) for x in (k, v))
        attended: Any = varlen_attn(
            q,
            k,
            v,
            sequences.query_ends,
            sequences.key_ends,
            sequences.most_queries,
            sequences.most_keys,
            scale=scale,
            window_size=(-1, 0),  # causal
            **options,
        )
        return attended  # type: ignore[no-any-return]

    return run


def _ends(lengths: Tensor) -> Tensor:
    return torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).to(torch.int32)


def _wants_determinism() -> bool:
    """Whether transformers' variable or PyTorch's setting asks for deterministic kernels."""
    asked = os.environ.get("FLASH_ATTENTION_DETERMINISTIC", "0") == "1"
    return asked or torch.are_deterministic_algorithms_enabled()


# --- The choice, and the trial of a kernel ---


@functools.cache
def choose_backend(
    implementation: str, device: torch.device, dtype: torch.dtype, heads: HeadShape
) -> AttentionBackend:
    """The backend for a model set to attention ``implementation``, computing in ``dtype``.

    A flash implementation gets FlashAttention's kernel, and PyTorch's where that fails; sdpa
    means kernels of PyTorch. Decided once for each combination; a kernel that fails is logged.
    """
    if (without := _without_varlen(device, dtype, heads)) is not None:
        return AttentionBackend(None, without)
    candidates: list[tuple[str, str, Callable[[], VarlenKernel]]] = []
    if "flash" in implementation:
        make = functools.partial(flash_kernel, implementation)
        asked = f"the model is set to {implementation}"
        candidates.append(("FlashAttention's kernel", asked, make))
    candidates.append(("PyTorch's flash kernel", "it is built in", pytorch_kernel))
    failures: list[str] = []
    for name, why, load in candidates:
        try:
            found = load()
            fault = _fault(found, device, dtype, heads)
        except Exception as error:  # an import, a launch: any of several libraries' errors
            said = shorten(first_line(error), 120, placeholder=" …")
            fault = f"it failed ({said.rstrip('.')})"
        if fault is None:
            why = "; ".join([*failures, f"{why}, without padding, and right in a trial here"])
            return AttentionBackend(found, Choice(_WHAT, f"{name} for variable lengths", why))
        failures.append(f"{name} is not used: {fault}")
        logger.warning("Abacist: scoring: %s.", failures[-1])
    return AttentionBackend(None, Choice(_WHAT, _PADDED, "; ".join(failures)))


def _without_varlen(device: torch.device, dtype: torch.dtype, heads: HeadShape) -> Choice | None:
    """The choice where no variable-length kernel can be used; None: one can."""
    name = str(dtype).removeprefix("torch.")
    if device.type == "cpu" and dtype == torch.float32:
        if (missing := build.unsupported_reason()) is None:
            return Choice(_WHAT, "a kernel of ours, without padding", "float32 on a CPU")
        why = f"no kernels of ours: {missing}"
    elif device.type != "cuda":
        why = f"on {device.type} nothing else computes in {name}"
    elif dtype not in _HALF:
        why = f"flash kernels compute in bfloat16 or float16, not {name}"
    elif torch.cuda.get_device_capability(device) < (8, 0):
        why = "this GPU is older than Ampere"
    elif heads.size % 8 or heads.size > _LARGEST_HEAD:
        why = f"flash kernels have no heads of size {heads.size}"
    else:
        return None
    return Choice(_WHAT, _PADDED, why)


def _fault(
    kernel: VarlenKernel, device: torch.device, dtype: torch.dtype, heads: HeadShape
) -> str | None:
    """What is wrong with ``kernel`` on a small tree; None: nothing."""
    packing = _small_tree()
    states = _random_states(len(packing.token_ids), dtype, heads)
    scale = heads.size**-0.5
    subject = VarlenAttention(kernel, Sequences.of(packing.branches, device))
    reference = functools.partial(padded_attention, packing)
    right = _values_and_gradients(reference, [x.float() for x in states], scale)
    found = _values_and_gradients(subject, [x.to(device) for x in states], scale)
    allowed = _ALLOWED_STEPS * torch.finfo(dtype).eps
    parts = ("values", "query gradients", "key gradients", "value gradients")
    for part, a, b in zip(parts, found, right, strict=True):
        if not (off := _furthest(a.float().cpu(), b)) <= allowed:
            return f"its {part} are off by {off:.2g} in a trial"
    return None


def _values_and_gradients(attend: Attend, states: list[Tensor], scale: float) -> list[Tensor]:
    """[T, …] each. The same in any context: ``no_grad``, autocast, a checkpointed forward."""
    *inputs, weights = states
    with (
        torch.inference_mode(False),
        torch.enable_grad(),
        torch.autocast(weights.device.type, enabled=False),
        torch.autograd.graph.saved_tensors_hooks(lambda x: x, lambda x: x),
    ):
        query, key, value = (x.clone().requires_grad_() for x in inputs)
        out = attend(query, key, value, scale)
        gradients = torch.autograd.grad(out, (query, key, value), weights)
    by_token = [gradient[0].transpose(0, 1) for gradient in gradients]
    return [x.detach().flatten(1) for x in (out[0], *by_token)]


def _furthest(found: Tensor, right: Tensor) -> float:
    """Distance of the worst token, relative to its own length or the root mean square one."""
    usual = right.square().sum(1).mean().sqrt()
    lengths = right.norm(dim=1).clamp(min=float(usual))
    return float(((found - right).norm(dim=1) / lengths).max())


def _random_states(tokens: int, dtype: torch.dtype, heads: HeadShape) -> list[Tensor]:
    """Query, key, value and the gradient of the output, from a generator of their own."""
    draw = torch.Generator().manual_seed(0)
    with torch.inference_mode(False):
        shapes = [(1, n, tokens, heads.size) for n in (heads.query_heads, *[heads.key_heads] * 2)]
        shapes.append((1, tokens, heads.query_heads, heads.size))
        return [torch.randn(shape, generator=draw).to(dtype) for shape in shapes]


@functools.cache
def _small_tree() -> Packing:
    """A shared prefix, two prompts, short and long completions; some exceed a kernel's blocks."""
    prefix, own, completions = 70, (5, 66), (2, 131, 4, 1, 20)
    width = max(completions)
    rows = len(completions)
    with torch.inference_mode(False):
        ids = torch.ones(rows, prefix + max(own) + width, dtype=torch.int64)
        mask = torch.zeros_like(ids)
        for row, length in enumerate(completions):
            prompt = own[row % 2]
            middle = ids.shape[1] - width
            ids[row, middle - prompt : middle] = 2 + row % 2
            mask[row, middle - prompt - prefix : middle + length] = 1
        packing = pack(ids, mask, width)
    assert packing is not None
    return packing
