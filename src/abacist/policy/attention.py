"""Attention over a packed batch: each token sees its own branch and what that grew from.

On a GPU in half precision a variable-length flash kernel does it (:mod:`abacist.policy.varlen`).
On a CPU in float32 a kernel of our own does (:mod:`abacist.policy.kernels.tree_attention`):
PyTorch's, above all its backward, uses a small part of such a machine.

Everywhere else, PyTorch's scaled-dot-product attention: the levels of a
:class:`~abacist.policy.layout.Layout` are attended one after another, each as one padded batch, in
which keys and values of a branch are those of its parent, repeated, and its own.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from abacist.policy.kernels import tree_attention as kernel
from abacist.policy.layout import Layout, Level, Pick


def attend(query: Tensor, key: Tensor, value: Tensor, layout: Layout, scale: float) -> Tensor:
    """Attention over a packed batch: [1, heads, T, D] each (fewer key heads allowed).

    Returns [1, T, heads, D], as transformers' attention functions do.
    """
    layout.layers_attended += 1
    if layout.varlen is not None:
        return layout.varlen.attend(query, key, value, scale)
    if kernel.supports(query, key, value):
        return kernel.attend(query, key, value, layout.branches, scale)
    return padded(query, key, value, layout, scale)


def padded(query: Tensor, key: Tensor, value: Tensor, layout: Layout, scale: float) -> Tensor:
    """The same by PyTorch's scaled-dot-product attention, for any device and dtype."""
    device = query.device.type
    autocast = torch.is_autocast_enabled(device)
    dtype = torch.get_autocast_dtype(device) if autocast else query.dtype
    sizes = [level.tokens for level in layout.levels]
    queries, keys, values = (
        states[0].transpose(0, 1).to(dtype).split(sizes) for states in (query, key, value)
    )
    outputs = []
    above: tuple[Tensor, Tensor] | None = None
    for level, q, k, v in zip(layout.levels, queries, keys, values, strict=True):
        own_q, own_k, own_v = level.unpack(q), level.unpack(k), level.unpack(v)
        if not level.is_last:  # many branches will add to these gradients
            own_k, own_v = _widened(own_k), _widened(own_v)
        if above is None or level.parents is None:
            all_k, all_v = own_k, own_v
        else:
            all_k, all_v = (
                torch.cat([Pick.apply(trunk, level.parents, own.dtype), own], dim=1)
                for trunk, own in zip(above, (own_k, own_v), strict=True)
            )
        above = all_k, all_v
        outputs.append(
            level.pack(_attend_level(level, own_q, all_k.to(dtype), all_v.to(dtype), scale))
        )
    return torch.cat(outputs)[None]


def _attend_level(level: Level, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """[branches, longest, heads, D] by [branches, above + longest, key heads, D]."""
    branches, longest, heads, size = q.shape
    key_heads = k.shape[2]
    repeats = heads // key_heads
    if level.parents is None:
        k, v = (x.repeat_interleave(repeats, dim=2) if repeats > 1 else x for x in (k, v))
        out = scaled_dot_product_attention(
            q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), is_causal=True, scale=scale
        )
        return out.transpose(1, 2)
    # The query heads that share a key head are put behind each other as further queries, so
    # that keys and values, of which there are many more here, need not be repeated.
    q = q.view(branches, longest, key_heads, repeats, size).permute(0, 2, 3, 1, 4)
    out = scaled_dot_product_attention(
        q.reshape(branches, key_heads, repeats * longest, size),
        k.transpose(1, 2),
        v.transpose(1, 2),
        attn_mask=level.bias(q.dtype, repeats),
        scale=scale,
    )
    out = out.view(branches, key_heads, repeats, longest, size).permute(0, 3, 1, 2, 4)
    return out.reshape(branches, longest, heads, size)


def _widened(states: Tensor) -> Tensor:
    return states.float() if states.dtype in (torch.bfloat16, torch.float16) else states
