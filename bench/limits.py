"""How near a step is to what the machine can do: matrix products and memory bandwidth.

Training is bound by matrix products. Every product of a real step is recorded with its shape, be
it PyTorch's, oneDNN's or our own kernels'; the same shapes are run alone by whichever of these
is fastest, and the share is the time these would take by themselves over the time that training
really took. Products inside a fused attention kernel are not recorded; recomputation by gradient
checkpointing is, because it is done. :func:`least_operations` is a check that none went unseen.

Decoding is bound by memory: to write one token for every row of the batch, all weights are read
once. The share is the time that takes, at the bandwidth of the better of a plain copy and a plain
sum, over the time of the rollout, prefill included. It asks nothing about who multiplies.
Weights that fit a cache are read faster than memory, so a small model can come out above 100 %.
"""

from __future__ import annotations

import contextlib
import time
from collections import Counter
from collections.abc import Callable
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from abacist.policy.kernels.build import supports
from abacist.policy.kernels.decode import Packed
from abacist.policy.scoring import linears as own

Product = tuple[int, int, int, int]  # batch, rows, inner, columns
_OPERANDS = {"mm": 0, "bmm": 0, "addmm": 1, "baddbmm": 1}  # where the first factor stands
_COPIED_BYTES = 2**28


class MatrixProducts(TorchDispatchMode):
    """Counts matrix products by shape while ``is_counted()`` holds.

    Those of PyTorch and oneDNN come by the dispatcher; our kernels are called past it, and are
    watched where Python calls them.
    """

    def __init__(self, is_counted: Callable[[], bool]) -> None:
        super().__init__()
        self.is_counted = is_counted
        self.counts: Counter[Product] = Counter()

    def __enter__(self) -> MatrixProducts:
        multiply, multiply_packed, count = own.multiply, Packed.__call__, self._count

        def watched(x: Tensor, weight: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            count(1, *x.shape, len(weight))
            return multiply(x, weight, *args, **kwargs)

        def watched_packed(packed: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            count(1, *x.shape, packed.outputs * (2 if packed.structure.gated else 1))
            return multiply_packed(packed, x, *args, **kwargs)

        with contextlib.ExitStack() as patches:
            patches.enter_context(mock.patch.object(own, "multiply", watched))
            patches.enter_context(mock.patch.object(Packed, "__call__", watched_packed))
            self._patches = patches.pop_all()
        super().__enter__()
        return self

    def __exit__(self, *args: Any) -> None:
        super().__exit__(*args)
        self._patches.close()

    def _count(self, batch: int, rows: int, inner: int, columns: int) -> None:
        if self.is_counted():
            self.counts[batch, rows, inner, columns] += 1

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name = func.overloadpacket.__name__.rstrip("_")  # in place or not
        if name in _OPERANDS:
            left, right = args[_OPERANDS[name] : _OPERANDS[name] + 2]
            batch = left.shape[0] if left.dim() == 3 else 1
            self._count(batch, left.shape[-2], left.shape[-1], right.shape[-1])
        elif name == "_linear_pointwise":  # oneDNN's
            inner = args[0].shape[-1]
            weight = args[2 if func._overloadname == "binary" else 1]
            self._count(1, args[0].numel() // inner, inner, weight.shape[0])
        return func(*args, **(kwargs or {}))


def alone_seconds(counts: Counter[Product], dtype: torch.dtype, device: str) -> float:
    """What the recorded products take one after another with nothing between them."""
    return sum(count * _product_seconds(one, dtype, device) for one, count in counts.items())


def operations(counts: Counter[Product]) -> int:
    """Floating-point operations of the recorded products."""
    return sum(count * 2 * b * m * k * n for (b, m, k, n), count in counts.items())


def least_operations(
    model: Any, prompt_tokens: float, reply_tokens: float, prompts: int, generations: int
) -> float:
    """What a training step with LoRA cannot do without, attention and the adapters left out: every
    distinct token through the layers forward and back, every reply token through the head."""
    head = model.get_output_embeddings().weight.numel()
    layers = sum(
        weight.numel()
        for key, weight in model.named_parameters()
        if weight.dim() == 2 and ".layers." in key and "lora_" not in key
    )
    replies = prompts * generations * reply_tokens
    # 0.7: the way back ends in the first layer, and of a prompt's last one only keys and values
    # are needed.
    return 0.7 * 4 * layers * (prompts * prompt_tokens + replies) + 4 * head * replies


def read_bytes_per_second(device: str = "cpu") -> float:
    """Memory bandwidth as the better of a copy and a sum of 256 MiB reaches it, best of ten."""
    source = torch.ones(_COPIED_BYTES // 4, device=device)
    best = min(_seconds(lambda: source.sum(), device) for _ in range(10))
    return max(_COPIED_BYTES / best, copy_bytes_per_second(device))


def copy_bytes_per_second(device: str = "cpu") -> float:
    """Memory bandwidth as a copy of 256 MiB reaches it, best of ten."""
    source = torch.ones(_COPIED_BYTES // 4, device=device)
    target = torch.empty_like(source)
    best = min(_seconds(lambda: target.copy_(source), device) for _ in range(10))
    return 2 * _COPIED_BYTES / best


def _product_seconds(product: Product, dtype: torch.dtype, device: str) -> float:
    batch, rows, inner, columns = product
    if not batch * rows * inner * columns:
        return 0.0
    left = torch.rand(batch, rows, inner, dtype=dtype, device=device)
    right = torch.rand(batch, inner, columns, dtype=dtype, device=device)
    if batch == 1:
        left, right = left[0], right[0]
    ways: list[Callable[[], Any]] = [lambda: left @ right]
    if batch == 1:
        weight = right.t().contiguous()
        if supports(left):
            packed = Packed([weight], [None])
            ways += [lambda: own.multiply(left, weight), lambda: packed(left)]
        if left.device.type == "cpu" and hasattr(torch.ops.mkldnn, "_linear_pointwise"):
            of = torch.ops.mkldnn._linear_pointwise  # not public API
            ways.append(lambda: of(left, weight, None, "none", [], ""))
    return min(_best_seconds(way, device) for way in ways)


def _best_seconds(work: Callable[[], Any], device: str) -> float:
    times: list[float] = []
    while len(times) < 3 or (sum(times) < 0.02 and len(times) < 50):
        times.append(_seconds(work, device))
    return min(times)


def _seconds(work: Callable[[], Any], device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    started = time.perf_counter()
    work()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started
