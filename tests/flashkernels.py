"""Stand-ins for the variable-length kernels of FlashAttention and PyTorch, which need a GPU.

They have the signatures of the real ones and keep their contracts (packed tokens, int32 ends, a
diagonal at the bottom right), computing one sequence after another on any device.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from abacist.policy.scoring import attention_backend, score

Attention = Callable[..., Tensor]


def by_sequence(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    query_ends: Tensor,
    key_ends: Tensor,
    scale: float,
    *,
    diagonal: str = "bottom right",
) -> Tensor:
    """[T, H, D] by [S, K, D] twice; only what goes in and out is in the dtype of the inputs."""
    for ends, states in ((query_ends, query), (key_ends, key)):
        assert ends.dtype == torch.int32
        assert int(ends[0]) == 0 and int(ends[-1]) == len(states)
        assert states.stride(-1) == 1
    repeats = query.shape[1] // key.shape[1]
    outputs = []
    for number in range(len(query_ends) - 1):
        q = query[query_ends[number] : query_ends[number + 1]].float().transpose(0, 1)
        own = slice(int(key_ends[number]), int(key_ends[number + 1]))
        k, v = (x[own].float().repeat_interleave(repeats, 1).transpose(0, 1) for x in (key, value))
        moved = k.shape[1] - q.shape[1] if diagonal == "bottom right" else 0
        hidden = torch.ones(q.shape[1], k.shape[1], dtype=torch.bool, device=q.device)
        hidden = hidden.triu(moved + 1)
        scores = (q @ k.mT * scale).masked_fill(hidden, -torch.inf)
        outputs.append((scores.softmax(-1) @ v).transpose(0, 1))
    return torch.cat(outputs).to(query.dtype)


class Calls(list[dict[str, Any]]):
    """What a stand-in was called with, call by call."""


def flash_attn_2(calls: Calls, attend: Attention = by_sequence) -> Callable[..., Any]:
    """``flash_attn.flash_attn_varlen_func`` of version 2.8."""

    def flash_attn_varlen_func(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        cu_seqlens_q: Tensor,
        cu_seqlens_k: Tensor,
        max_seqlen_q: int,
        max_seqlen_k: int,
        dropout_p: float = 0.0,
        softmax_scale: float | None = None,
        causal: bool = False,
        window_size: tuple[int, int] = (-1, -1),
        softcap: float = 0.0,
        alibi_slopes: Any = None,
        deterministic: bool = False,
        return_attn_probs: bool = False,
        block_table: Any = None,
    ) -> Tensor:
        assert causal and softmax_scale is not None
        assert max_seqlen_q == int(cu_seqlens_q.diff().max())
        assert max_seqlen_k == int(cu_seqlens_k.diff().max())
        calls.append({"tokens": len(q), "keys": len(k), "deterministic": deterministic})
        return attend(q, k, v, cu_seqlens_q, cu_seqlens_k, softmax_scale)

    return flash_attn_varlen_func


def flash_attn_3(calls: Calls) -> Callable[..., Any]:
    """``flash_attn_interface.flash_attn_varlen_func``, as a version that returns the sums too."""

    def flash_attn_varlen_func(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        cu_seqlens_q: Tensor,
        cu_seqlens_k: Tensor,
        max_seqlen_q: int,
        max_seqlen_k: int,
        seqused_q: Any = None,
        seqused_k: Any = None,
        softmax_scale: float | None = None,
        causal: bool = False,
    ) -> tuple[Tensor, Tensor]:
        assert causal and softmax_scale is not None
        calls.append({"tokens": len(q), "keys": len(k)})
        return by_sequence(q, k, v, cu_seqlens_q, cu_seqlens_k, softmax_scale), q.new_zeros(1)

    return flash_attn_varlen_func


def varlen_attn(calls: Calls, attend: Attention = by_sequence) -> Callable[..., Any]:
    """``torch.nn.attention.varlen.varlen_attn`` of PyTorch 2.13."""

    def varlen_attn(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        cu_seq_q: Tensor,
        cu_seq_k: Tensor | None,
        max_q: int,
        max_k: int,
        *,
        return_aux: Any = None,
        scale: float | None = None,
        window_size: tuple[int, int] = (-1, -1),
        enable_gqa: bool = False,
        seqused_k: Any = None,
        block_table: Any = None,
        num_splits: int | None = None,
    ) -> Tensor:
        assert window_size == (-1, 0) and scale is not None and cu_seq_k is not None
        assert enable_gqa or query.shape[1] == key.shape[1]
        assert (max_q, max_k) == (int(cu_seq_q.diff().max()), int(cu_seq_k.diff().max()))
        calls.append({"tokens": len(query), "keys": len(key)})
        return attend(query, key, value, cu_seq_q, cu_seq_k, scale)

    return varlen_attn


def varlen_attn_without_gqa(calls: Calls) -> Callable[..., Any]:
    """The same before it could group query heads."""
    newer = varlen_attn(calls)

    def older(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        cu_seq_q: Tensor,
        cu_seq_k: Tensor,
        max_q: int,
        max_k: int,
        *,
        return_aux: Any = None,
        scale: float | None = None,
        window_size: tuple[int, int] = (-1, -1),
    ) -> Tensor:
        assert query.shape[1] == key.shape[1]
        read: Tensor = newer(
            *(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k),
            scale=scale,
            window_size=window_size,
        )
        return read

    return older


def install(
    monkeypatch: pytest.MonkeyPatch,
    *,
    flash: Callable[..., Any] | None = None,
    pytorch: Callable[..., Any] | None = None,
) -> None:
    """Let these be all the kernels there are, and this machine one that can run them."""

    def lazy_import(implementation: str) -> Any:
        if flash is None:
            raise ImportError("No module named 'flash_attn'")
        return (None, flash, None, None, None), (None, None)

    def missing(*args: Any, **kwargs: Any) -> Any:
        raise RuntimeError("Torch not compiled with CUDA enabled\nand more")

    monkeypatch.setattr(attention_backend, "lazy_import_flash_attention", lazy_import)
    monkeypatch.setattr(
        "torch.nn.attention.varlen.varlen_attn", pytorch or varlen_attn(Calls(), missing)
    )
    monkeypatch.setattr(attention_backend, "_without_varlen", lambda *_: None)
    # Not kept beyond the test, nor met with from before it.
    unkept = attention_backend.choose_backend.__wrapped__
    for module in (attention_backend, score):
        monkeypatch.setattr(module, "choose_backend", unkept)
