"""How near a step is to what the machine can do: matrix products and memory bandwidth.

Training is bound by matrix products. Every product of a real step is recorded with its shape, the
same shapes are run alone by whichever of ``torch.mm`` and oneDNN is faster, and the share is the
time these would take by themselves over the time that training really took. Products inside a
fused attention kernel are not recorded; recomputation by gradient checkpointing is, because it is
done.

Decoding is bound by memory: to write one token for every row of the batch, all weights are read
once. The share is the time that takes at the bandwidth of a plain copy (bytes read plus
bytes written) over the time of the rollout, prefill included. Weights that fit a cache are
read faster than a copy, so a small model can come out above 100 %.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from abacist.policy.products import has_onednn
from abacist.policy.products import product as fast_product

Product = tuple[int, int, int, int]  # batch, rows, inner, columns
_OPERANDS = {"mm": 0, "bmm": 0, "addmm": 1, "baddbmm": 1}  # where the first factor stands
_COPIED_BYTES = 2**28


class MatrixProducts(TorchDispatchMode):
    """Counts matrix products by shape while ``is_counted()`` holds."""

    def __init__(self, is_counted: Callable[[], bool]) -> None:
        super().__init__()
        self.is_counted = is_counted
        self.counts: Counter[Product] = Counter()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name = func.overloadpacket.__name__
        if self.is_counted():
            if name in _OPERANDS:
                left, right = args[_OPERANDS[name] : _OPERANDS[name] + 2]
                batch = left.shape[0] if left.dim() == 3 else 1
                self.counts[batch, left.shape[-2], left.shape[-1], right.shape[-1]] += 1
            elif name == "_linear_pointwise":  # oneDNN's linear on packed weights
                inner = args[0].shape[-1]
                weight = args[2 if func._overloadname == "binary" else 1]
                self.counts[1, args[0].numel() // inner, inner, weight.shape[0]] += 1
        return func(*args, **(kwargs or {}))


def alone_seconds(counts: Counter[Product], dtype: torch.dtype, device: str) -> float:
    """What the recorded products take one after another with nothing between them."""
    return sum(count * _product_seconds(one, dtype, device) for one, count in counts.items())


def operations(counts: Counter[Product]) -> int:
    """Floating-point operations of the recorded products."""
    return sum(count * 2 * b * m * k * n for (b, m, k, n), count in counts.items())


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
    if batch == 1 and has_onednn(left):
        weight = right.t().contiguous()
        ways.append(lambda: fast_product(left, weight))
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
