"""Weights packed for the kernels of ``products.h``, and one token a row by ``decode.cpp``.

Shapes: N rows, H hidden numbers, D numbers of a head, I inputs and O outputs of a product.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from abacist.policy.kernels import build
from abacist.policy.kernels.build import library, threads

if TYPE_CHECKING:
    from abacist.policy.decoding.network import LeanNetwork

_Address, _Count = ctypes.c_void_p, ctypes.c_int64


_NORMS = ("attention_norm", "query_norm", "key_norm", "mlp_norm")
_PRODUCTS = ("query_key_value", "attention_out", "gated", "down")


class _Product(ctypes.Structure):
    _fields_ = [
        ("packed", _Address),
        ("bias", _Address),
        ("inputs", _Count),
        ("outputs", _Count),
        ("gated", ctypes.c_bool),
    ]


class _Layer(ctypes.Structure):
    _fields_ = [
        *((name, _Address) for name in _NORMS),
        *((name, _Product) for name in _PRODUCTS),
    ]


class _Network(ctypes.Structure):
    _fields_ = [
        *((n, _Address) for n in ("layers", "embedding", "final_norm", "cosines", "sines")),
        *(
            (name, _Count)
            for name in ("num_layers", "hidden", "query_heads", "key_heads", "head_dim", "inner")
        ),
        ("epsilon", ctypes.c_float),
        ("scale", ctypes.c_float),
    ]


class _Store(ctypes.Structure):
    _fields_ = [("start", _Address), ("places", _Count), ("tokens", _Count)]


class _Batch(ctypes.Structure):
    _fields_ = [
        ("prompts", _Store),
        ("rows", _Store),
        ("count", _Count),
        *((n, _Address) for n in ("tokens", "prompts_of_rows", "prompt_tokens", "written")),
    ]


def takes(*tensors: torch.Tensor | None) -> bool:
    """Whether there are kernels, and they take ``tensors``, of which some may be missing."""
    return build.takes(*(tensor for tensor in tensors if tensor is not None))


class Packed:
    """``weights`` [O, I] that read the same input, packed as one product of outputs side by side.

    ``gated`` (of two): silu of the first product times the second.
    """

    def __init__(
        self,
        weights: Sequence[torch.Tensor],
        biases: Sequence[torch.Tensor | None],
        *,
        gated: bool = False,
    ) -> None:
        kernels: Any = library()
        panel = int(kernels.panel_outputs())
        self.outputs = len(weights[0]) if gated else sum(map(len, weights))
        inputs = weights[0].shape[1]
        width = panel // 2 if gated else panel
        panels = -(-self.outputs // width)
        self._packed = torch.zeros(panels, inputs, panel)
        self._bias: torch.Tensor | None = None
        if any(bias is not None for bias in biases):
            self._bias = torch.zeros(panels, 1, panel)
        before = 0
        for number, (weight, bias) in enumerate(zip(weights, biases, strict=True)):
            lane = number * width if gated else 0
            _pack(weight, before, width, lane, self._packed)
            if bias is not None and self._bias is not None:
                _pack(bias[:, None], before, width, lane, self._bias)
            before += 0 if gated else len(weight)
        self.structure = _Product(
            self._packed.data_ptr(),
            None if self._bias is None else self._bias.data_ptr(),
            inputs,
            self.outputs,
            gated,
        )

    def __call__(self, x: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor:
        """``x`` [N, I] times the weights, plus the bias, plus ``residual`` [N, O]."""
        x = x.contiguous()
        residual = None if residual is None else residual.contiguous()
        y = x.new_empty(len(x), self.outputs)
        kernels: Any = library()
        kernels.multiply(
            ctypes.byref(self.structure),
            _address(x),
            _Count(len(x)),
            None if residual is None else _address(residual),
            _address(y),
            threads(2.0 * x.numel() * self.outputs),
        )
        return y


def decoder(network: LeanNetwork) -> Decoder | None:
    """What takes ``network`` a token further; None: there are no kernels, or not for this one."""
    kernels: Any = library()
    if kernels is None or network.head_dim % kernels.kernels_lanes():
        return None
    tensors = [network.embedding, network.final_norm, network.cos, network.sin]
    for layer in network.layers:
        tensors += [weight for name in _NORMS if (weight := getattr(layer, name)) is not None]
        if not all(isinstance(getattr(layer, name), Packed) for name in _PRODUCTS):
            return None
    return Decoder(network) if takes(*tensors) else None


class Decoder:
    """One token a row through the whole of ``network``: see :func:`decoder`."""

    def __init__(self, network: LeanNetwork) -> None:
        # What the addresses below belong to. Not the network, which holds this: in a circle, its
        # weights would wait for the garbage collector through the training that follows.
        self._held: list[torch.Tensor | Packed] = []
        self._like = network.embedding
        self._weights = 0
        self._layers = (_Layer * network.num_layers)()
        for layer, bare in zip(self._layers, network.layers, strict=True):
            for name in _NORMS:
                setattr(layer, name, self._address(getattr(bare, name)))
            for name in _PRODUCTS:
                self._held.append(getattr(bare, name))
                product = getattr(bare, name).structure
                setattr(layer, name, product)
                self._weights += product.inputs * product.outputs * (2 if product.gated else 1)
        self._structure = _Network(
            ctypes.addressof(self._layers),
            *map(self._address, (network.embedding, network.final_norm, network.cos, network.sin)),
            network.num_layers,
            network.embedding.shape[1],
            network.query_heads,
            network.key_heads,
            network.head_dim,
            max(layer.gated.outputs for layer in self._layers),
            network.epsilon,
            network.scale,
        )

    def _address(self, tensor: torch.Tensor | None) -> int | None:
        """Of its numbers, which from now on lie in order and stay."""
        if tensor is None:
            return None
        tensor = tensor.contiguous()
        self._held.append(tensor)
        return tensor.data_ptr()

    def step(
        self,
        prompts: torch.Tensor,
        rows: torch.Tensor,
        tokens: torch.Tensor,
        prompts_of_rows: torch.Tensor,
        prompt_tokens: torch.Tensor,
        written: torch.Tensor,
    ) -> torch.Tensor:
        """The states [N, H] behind the last norm after each row has read its token.

        ``prompts`` and ``rows`` are keys and values, [2, layers, places, key heads, tokens, D];
        row n stands in place n of ``rows``, where its new key and value are written. The others
        are [N] of int64: tokens, the place of each row's prompt, its length, and how many tokens
        the row has read before this one.
        """
        integers = [x.contiguous() for x in (tokens, prompts_of_rows, prompt_tokens, written)]
        batch = _Batch(
            _Store(prompts.data_ptr(), prompts.shape[2], prompts.shape[4]),
            _Store(rows.data_ptr(), rows.shape[2], rows.shape[4]),
            len(tokens),
            *(x.data_ptr() for x in integers),
        )
        states = self._like.new_empty(len(tokens), self._structure.hidden)
        kernels: Any = library()
        kernels.decode(
            ctypes.byref(self._structure),
            ctypes.byref(batch),
            _address(states),
            threads(2.0 * len(tokens) * self._weights),
        )
        return states


def sample(logits: torch.Tensor, luck: torch.Tensor, temperature: float) -> torch.Tensor:
    """One token for each row of ``logits`` [N, V] by its number in ``luck`` [N]: inverse CDF."""
    logits, luck = logits.contiguous(), luck.double().contiguous()
    chosen = torch.empty(len(logits), dtype=torch.int64)
    kernels: Any = library()
    kernels.sample(
        _address(logits),
        _address(luck),
        _Count(logits.shape[0]),
        _Count(logits.shape[1]),
        ctypes.c_float(1 / temperature),
        _address(chosen),
        threads(100.0 * logits.numel()),  # an exponential each
    )
    return chosen


def _pack(weight: torch.Tensor, before: int, width: int, lane: int, into: torch.Tensor) -> None:
    weight = weight.contiguous()
    kernels: Any = library()
    kernels.pack(
        _address(weight),
        _Count(weight.shape[0]),
        _Count(weight.shape[1]),
        _Count(before),
        _Count(width),
        _Count(lane),
        _address(into),
        threads(20.0 * weight.numel()),  # which only memory holds up
    )


def _address(tensor: torch.Tensor) -> Any:
    return ctypes.c_void_p(tensor.data_ptr())
