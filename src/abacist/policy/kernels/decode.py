"""The kernels of ``decode.cpp`` and ``sample.cpp``: decoding on a CPU in float32.

:class:`Packed` is a matrix product with weights packed beforehand, :class:`Decoder` runs one token
per row through all layers in one call, and :func:`sample` chooses the next tokens.

Shapes: N rows, L layers, C hidden size, K key heads, D head dim, T tokens, V vocabulary entries,
I inputs and O outputs of a product.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from abacist.policy.kernels import build
from abacist.policy.kernels.blocks import BLOCK, Blocks, Weight, format_of, memory_of
from abacist.policy.kernels.build import library, threads

_Address, _Count = ctypes.c_void_p, ctypes.c_int64

_NORMS = ("attention_norm", "query_norm", "key_norm", "mlp_norm")
_PRODUCTS = ("query_key_value", "attention_out", "swiglu", "down")


@dataclass(frozen=True)
class DecoderLayer:
    """The weights of one decoder layer. The kernel takes it if every product is :class:`Packed`."""

    attention_norm: torch.Tensor
    query_key_value: Callable[..., torch.Tensor]
    query_norm: torch.Tensor | None  # Qwen3
    key_norm: torch.Tensor | None
    attention_out: Callable[..., torch.Tensor]
    mlp_norm: torch.Tensor
    swiglu: Callable[..., torch.Tensor]
    down: Callable[..., torch.Tensor]


@dataclass(frozen=True)
class DecoderWeights:
    """All that a :class:`Decoder` computes with."""

    layers: Sequence[DecoderLayer]
    embedding: torch.Tensor  # [V, C]
    final_norm: torch.Tensor  # [C]
    cos: torch.Tensor  # [positions, 1, D], as ``sin``
    sin: torch.Tensor
    query_heads: int
    key_heads: int
    head_dim: int
    epsilon: float  # of the norms
    scale: float  # of the queries


# The structures below must match those in panels.h and decoder.h field by field.


class _Product(ctypes.Structure):
    _fields_ = [
        ("packed", _Address),
        ("bias", _Address),
        ("inputs", _Count),
        ("outputs", _Count),
        ("gated", ctypes.c_bool),
        ("bfloat16", ctypes.c_bool),
        ("in_blocks", ctypes.c_bool),
        ("in_pairs", ctypes.c_bool),
        ("inner", _Address),
        ("outer", _Address),
        ("of_vectors", _Address),
        ("ranks", _Count),
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
        ("bfloat16", ctypes.c_bool),
    ]


class _KeysValues(ctypes.Structure):
    _fields_ = [("start", _Address), ("places", _Count), ("tokens", _Count)]


class _Batch(ctypes.Structure):
    _fields_ = [
        ("prompts", _KeysValues),
        ("rows", _KeysValues),
        ("prefix_tokens", _Count),
        ("count", _Count),
        *((n, _Address) for n in ("tokens", "prompts_of_rows", "prompt_tokens", "written")),
    ]


def supports(*tensors: torch.Tensor | None) -> bool:
    """Whether the kernels are available and support ``tensors``. None stands for no tensor."""
    return build.supports(*(tensor for tensor in tensors if tensor is not None))


@dataclass(frozen=True, slots=True)
class Adapter:
    """A LoRA adapter of one weight [O, I]: what is added is ``B A``."""

    inner: torch.Tensor  # A [R, I]
    outer: torch.Tensor  # B [O, R], scaled


class Packed:
    """The product with ``weights`` [O, I] that read the same input; outputs are side by side.

    ``weights`` are float32, or bfloat16 or 8 bits, which are widened as they are read; everything
    else is float32.
    ``gated``: ``weights`` are a gate and an up projection; the output is silu(gate) · up (SwiGLU).
    ``adapters``: those of each weight, computed beside it.
    """

    def __init__(
        self,
        weights: Sequence[Weight],
        biases: Sequence[torch.Tensor | None],
        *,
        gated: bool = False,
        adapters: Sequence[Sequence[Adapter]] = (),
    ) -> None:
        kernels: Any = library()
        panel = int(kernels.panel_outputs())
        self.outputs = len(weights[0]) if gated else sum(map(len, weights))
        inputs, held = weights[0].shape[1], format_of(weights[0])
        assert all(format_of(weight) == held for weight in weights)
        in_blocks = isinstance(weights[0], Blocks)
        # A panel holds `panel` outputs of one weight, or half as many of gate and up each.
        width = panel // 2 if gated else panel
        panels = -(-self.outputs // width)
        ranks = sum(len(adapter.inner) for of_weight in adapters for adapter in of_weight)
        in_pairs = held > 0 and build.multiplies_pairs()
        # A pair is two numbers wide; behind an odd number of inputs it is half empty. In 8 bits a
        # block has its exponents beside the codes.
        depth = -(-inputs // 2) * 2 if in_pairs else inputs
        depth += inputs // BLOCK if in_blocks else 0
        self._packed = torch.zeros(panels, depth, panel, dtype=memory_of(weights[0]).dtype)
        self._bias: torch.Tensor | None = None
        if any(bias is not None for bias in biases):
            self._bias = torch.zeros(panels, 1, panel)
        self.structure: _Product
        self._inner: Packed | None = None
        self._outer: torch.Tensor | None = None
        lanes = int(kernels.kernels_lanes())
        # The first and the end of the ranks that each vector of outputs needs; none at first.
        self._of_vectors = torch.tensor([ranks, 0]).repeat(panels * panel // lanes, 1)
        if ranks:
            inner = torch.cat([adapter.inner for of_weight in adapters for adapter in of_weight])
            self._inner = Packed([inner], [None])
            self._outer = torch.zeros(panels, ranks, panel)
        before = rank = 0
        for number, (weight, bias) in enumerate(zip(weights, biases, strict=True)):
            lane = number * width if gated else 0
            _pack(weight, before, width, lane, self._packed, in_pairs)
            if bias is not None and self._bias is not None:
                _pack(bias[:, None].float(), before, width, lane, self._bias)
            if self._outer is not None:
                # All ranks for every output; those of other weights' adapters are zero.
                outer, first = self._outer.new_zeros(len(weight), ranks), rank
                for adapter in adapters[number]:
                    outer[:, rank : rank + len(adapter.inner)] = adapter.outer
                    rank += len(adapter.inner)
                _pack(outer, before, width, lane, self._outer)
                vectors = slice(before // lanes, -(-(before + len(weight)) // lanes))
                own = self._of_vectors[number::2] if gated else self._of_vectors[vectors]
                if rank > first:
                    own[:, 0].clamp_(max=first)
                    own[:, 1].clamp_(min=rank)
            before += 0 if gated else len(weight)
        self.structure = _Product(
            self._packed.data_ptr(),
            None if self._bias is None else self._bias.data_ptr(),
            inputs,
            self.outputs,
            gated,
            memory_of(weights[0]).dtype == torch.bfloat16,
            in_blocks,
            in_pairs,
            None if self._inner is None else self._inner.structure.packed,
            None if self._outer is None else self._outer.data_ptr(),
            self._of_vectors.data_ptr(),
            ranks,
        )

    def __call__(
        self,
        x: torch.Tensor,
        residual: torch.Tensor | None = None,
        out: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """``x`` [N, I] times the weights, plus the bias, plus ``residual`` [N, O].

        ``out`` [N, O], contiguous, is where the result is written, if given.
        """
        x = x.contiguous()
        residual = None if residual is None else residual.contiguous()
        y = x.new_empty(len(x), self.outputs) if out is None else out
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


def decoder(weights: DecoderWeights) -> Decoder | None:
    """The decoder of these weights; None if there are no kernels or they do not support them."""
    kernels: Any = library()
    if kernels is None or weights.head_dim % kernels.kernels_lanes():
        return None
    tensors = [weights.final_norm, weights.cos, weights.sin]
    if not build.supports_weight(weights.embedding):
        return None
    for layer in weights.layers:
        tensors += [norm for name in _NORMS if (norm := getattr(layer, name)) is not None]
        if not all(isinstance(getattr(layer, name), Packed) for name in _PRODUCTS):
            return None
    return Decoder(weights) if supports(*tensors) else None


class Decoder:
    """Runs one token per row through all layers. Get one from :func:`decoder`."""

    def __init__(self, weights: DecoderWeights) -> None:
        # Keeps alive what the addresses below point to. It holds weights only, never the network,
        # which holds this decoder: in a reference cycle the weights would stay until the garbage
        # collector runs, through the training step that follows.
        self._held: list[torch.Tensor | Packed] = []
        self._like = weights.final_norm
        self._num_weights = 0
        self._layers = (_Layer * len(weights.layers))()
        for structure, layer in zip(self._layers, weights.layers, strict=True):
            for name in _NORMS:
                setattr(structure, name, self._address(getattr(layer, name)))
            for name in _PRODUCTS:
                self._held.append(getattr(layer, name))
                product = getattr(layer, name).structure
                setattr(structure, name, product)
                size = product.inputs * product.outputs
                self._num_weights += 2 * size if product.gated else size
        self._structure = _Network(
            ctypes.addressof(self._layers),
            self._address(weights.embedding),
            self._address(weights.final_norm),
            self._address(weights.cos),
            self._address(weights.sin),
            len(weights.layers),
            weights.embedding.shape[1],
            weights.query_heads,
            weights.key_heads,
            weights.head_dim,
            max(layer.swiglu.outputs for layer in self._layers),
            weights.epsilon,
            weights.scale,
            weights.embedding.dtype == torch.bfloat16,
        )

    def _address(self, tensor: torch.Tensor | None) -> int | None:
        """The address of ``tensor``, made contiguous and kept alive."""
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
        prefix_tokens: int,
    ) -> torch.Tensor:
        """The final hidden states [N, C] after each row has read its token.

        ``prompts`` and ``rows`` hold keys and values, [2, L, places, K, T, D]. Row n has place n
        in ``rows``, where its new key and value are written. The other arguments are int64 [N]:
        the tokens, the place of each row's prompt, the length of that prompt, and how many tokens
        the row has read before this one. All prompts begin with the same ``prefix_tokens`` tokens
        and are longer, and every place in ``prompts`` holds their keys and values.
        """
        integers = [x.contiguous() for x in (tokens, prompts_of_rows, prompt_tokens, written)]
        batch = _Batch(
            _KeysValues(prompts.data_ptr(), prompts.shape[2], prompts.shape[4]),
            _KeysValues(rows.data_ptr(), rows.shape[2], rows.shape[4]),
            prefix_tokens,
            len(tokens),
            *(x.data_ptr() for x in integers),
        )
        states = self._like.new_empty(len(tokens), self._structure.hidden)
        kernels: Any = library()
        kernels.decode(
            ctypes.byref(self._structure),
            ctypes.byref(batch),
            _address(states),
            threads(2.0 * len(tokens) * self._num_weights),
        )
        return states


def sample(logits: torch.Tensor, uniforms: torch.Tensor, temperature: float) -> torch.Tensor:
    """One token per row of ``logits`` [N, V], by inverse CDF at ``uniforms`` [N]."""
    logits, uniforms = logits.contiguous(), uniforms.double().contiguous()
    chosen = torch.empty(len(logits), dtype=torch.int64)
    kernels: Any = library()
    kernels.sample(
        _address(logits),
        _address(uniforms),
        _Count(logits.shape[0]),
        _Count(logits.shape[1]),
        ctypes.c_float(1 / temperature),
        _address(chosen),
        threads(100.0 * logits.numel()),  # an exponential each
    )
    return chosen


def _pack(
    weight: Weight,
    before: int,
    width: int,
    lane: int,
    into: torch.Tensor,
    in_pairs: bool = False,
) -> None:
    """Copy ``weight`` [O, I] into the panels ``into``, behind ``before`` outputs of others."""
    if not isinstance(weight, Blocks):
        weight = weight.contiguous()
    kernels: Any = library()
    kernels.pack(
        _address(memory_of(weight)),
        _Count(weight.shape[0]),
        _Count(weight.shape[1]),
        _Count(before),
        _Count(width),
        _Count(lane),
        _address(into),
        _Count(format_of(weight)),
        _Count(in_pairs),
        threads(20.0 * weight.shape.numel()),  # bound by memory
    )


def _address(tensor: torch.Tensor) -> Any:
    return ctypes.c_void_p(tensor.data_ptr())
