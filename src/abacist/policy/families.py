"""The one table of what each fast part supports, and the one form of a reason where it does not.

A fast part computes what TRL and transformers compute, but not by calling the model's forward. So
it supports what it has been proven on, and nothing else: :data:`FAMILIES` lists the models,
:data:`SUPPORT` the settings, part by part. :func:`unsupported_reason` compares a live model with
both. A model that is not supported is computed by TRL and transformers.

Adding a Llama-like family is one entry in :data:`FAMILIES` and its parity tests (CONTRIBUTING, "Add
a model family").
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from fnmatch import fnmatchcase
from typing import Any

import torch
from peft.tuners.lora.layer import Linear as LoraLinear
from torch import nn
from transformers import (
    LlamaForCausalLM,
    MistralForCausalLM,
    PreTrainedModel,
    Qwen2ForCausalLM,
    Qwen3ForCausalLM,
    SmolLM3ForCausalLM,
)
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from abacist.policy import integrity, mxint8, quantization
from abacist.policy.decoding import graphs
from abacist.policy.kernels import build
from abacist.policy.model_parts import base_of, linears_of


class FastPart(StrEnum):
    """What can be computed faster than by TRL and transformers."""

    DECODING = "decoding"
    """Completions by our engine (``policy.decoding.engine``)."""
    SCORING = "scoring"
    """Log-probabilities of a packed batch (``policy.scoring``)."""
    FUSED_LAYERS = "fused layers"
    """In scoring: decoder layers with a backward of our own (``policy.scoring.layers``)."""
    LORA_PRODUCTS = "fused LoRA products"
    """In scoring: linear layers under LoRA in fewer passes (``policy.scoring.linears``)."""
    MICRO_BATCH_FUSION = "micro-batch fusion"
    """Several micro-batches in one forward (``learning.micro_batch_fusion``)."""
    KERNELS = "CPU kernels"
    """The C++ kernels of ``policy.kernels``."""
    CUDA_GRAPHS = "CUDA graphs"
    """In decoding: the step that writes a token, recorded once (``policy.decoding.graphs``)."""


@dataclass(frozen=True)
class Family:
    """A model class whose layers are built and computed like Llama's.

    ``causal_lm.model`` has ``embed_tokens``, ``rotary_emb``, ``layers`` and ``norm``; a layer has
    ``input_layernorm``, ``self_attn`` (``q_proj``, ``k_proj``, ``v_proj``, ``o_proj``),
    ``post_attention_layernorm`` and ``mlp`` (``gate_proj``, ``up_proj``, ``down_proj``,
    ``act_fn``). Every part reads biases, head sizes and the scale of the scores from the modules.
    Norms on the heads (``q_norm``, ``k_norm``) are supported everywhere.

    ``lacks`` names the parts that do not support the family (decoding, scoring, fused layers), each
    with the reason.
    """

    causal_lm: type[PreTrainedModel]
    lacks: Mapping[FastPart, str] = field(default_factory=dict)


FAMILIES: tuple[Family, ...] = (
    Family(LlamaForCausalLM),
    Family(MistralForCausalLM),  # without its sliding window, as from version 0.2 of the 7B on
    Family(Qwen2ForCausalLM),
    Family(Qwen3ForCausalLM),
    Family(
        SmolLM3ForCausalLM,
        lacks={FastPart.DECODING: "our engine rotates positions in every layer, SmolLM3 in some"},
    ),
)

_FAMILY_OF = {family.causal_lm: family for family in FAMILIES}
_LIBRARY_CODE = integrity.LibraryCode(_FAMILY_OF)  # now, before a script can replace any of it

# Their frequencies do not change with the length of the text.
_FIXED_ROTARY = frozenset({"default", "linear", "llama3", "yarn"})
_HALF_OR_SINGLE = frozenset({torch.float32, torch.bfloat16, torch.float16})


@dataclass(frozen=True)
class Linears:
    """What the linear layers of a model may be, beside plain ones with or without a bias."""

    trained: bool = True
    several_adapters: bool = True
    merged: bool = True
    merged_but_off: bool = True
    lora_bias: bool = True
    lora_dropout: bool = True
    quantized: bool = True
    """4-bit layers, whose product with the dequantised weights is the layer's own."""
    mixed_dtypes: bool = True
    """Without autocast: weights of another dtype than the states."""


@dataclass(frozen=True)
class Support:
    """What one part computes. None stands for "anything": the model's own modules are called.

    Of a part with ``after``, only ``linears``, ``activations``, ``trained_norms``, ``dtypes`` and
    ``devices`` are looked at; the rest is what the part before it asks.
    """

    after: FastPart | None = None
    """The part it belongs to, which must support the model as well."""
    linears: Linears = Linears()
    attention: tuple[str, ...] | None = None
    """Patterns of ``attn_implementation``: the part computes what these compute."""
    rotary: frozenset[str] | None = None
    activations: frozenset[str] | None = None
    trained_norms: bool = True
    adapted_embedding: bool = False
    adapted_head: bool = False
    gradients: bool = True
    """It computes gradients, so hooks on gradients and dropout matter."""
    dtypes: frozenset[torch.dtype] | None = None
    devices: frozenset[str] | None = None


_ONE_FROZEN_LORA = Linears(
    trained=False, several_adapters=False, merged=False, merged_but_off=False, lora_bias=False,
    lora_dropout=False, quantized=False, mixed_dtypes=False,
)  # fmt: skip

SUPPORT: Mapping[FastPart, Support] = {
    FastPart.DECODING: Support(
        linears=Linears(merged_but_off=False, lora_bias=False),
        rotary=_FIXED_ROTARY,
        activations=frozenset({"silu"}),
        adapted_head=True,
        gradients=False,
        dtypes=_HALF_OR_SINGLE,
    ),
    FastPart.SCORING: Support(
        linears=Linears(lora_dropout=False),
        attention=("sdpa", "*flash*"),
        rotary=_FIXED_ROTARY,
    ),
    FastPart.FUSED_LAYERS: Support(
        after=FastPart.SCORING,
        linears=_ONE_FROZEN_LORA,
        activations=frozenset({"silu"}),
        trained_norms=False,
    ),
    FastPart.LORA_PRODUCTS: Support(after=FastPart.SCORING, linears=_ONE_FROZEN_LORA),
    FastPart.MICRO_BATCH_FUSION: Support(after=FastPart.SCORING),
    FastPart.KERNELS: Support(
        dtypes=frozenset({torch.float32, torch.bfloat16}),
        devices=frozenset({"cpu"}),
    ),
    FastPart.CUDA_GRAPHS: Support(after=FastPart.DECODING, devices=frozenset({"cuda"})),
}


def unsupported_reason(model: Any, part: FastPart) -> str | None:
    """Why ``part`` does not support ``model`` as it is now, as the end of a sentence.

    None: it does.

    Give it the model as the part gets it: wrapped by ``accelerate``, in training mode if it will be
    trained, within the same autocast. It looks at every module, at any time: a hook may be added
    between two steps. Milliseconds for 30 layers under LoRA.
    """
    base, support = base_of(model), SUPPORT[part]
    if support.after is not None:
        found = unsupported_reason(model, support.after)
        return found or lacks(base, part) or _unsupported_here(base, part)
    if part is FastPart.KERNELS:
        return _unsupported_here(base, part)
    family = _FAMILY_OF.get(type(base))
    if family is None:
        names = ", ".join(known.__name__ for known in _FAMILY_OF)
        return f"{type(base).__name__} is not one of {names}"
    return (
        lacks(base, part)
        or _unsupported_config(base, part)
        or integrity.difference(model, _LIBRARY_CODE, learns=support.gradients)
        or _unsupported_here(base, part)
    )


def lacks(base: Any, part: FastPart) -> str | None:
    """Why ``part`` does not support the family of ``base``, a transformers model; None: it does."""
    family = _FAMILY_OF.get(type(base))
    return None if family is None else family.lacks.get(part)


def unsupported_layer(layer: Any, dtype: torch.dtype) -> str | None:
    """Why ``layer``, a decoder layer of a supported model, is not fused; ``dtype``: it computes in.

    Looks for changes of its modules too, so that a fused layer is never another function.
    """
    support = SUPPORT[FastPart.FUSED_LAYERS]
    attention, mlp = layer.self_attn, layer.mlp
    if support.activations is not None and not _is_silu(mlp.act_fn):
        return f"its activation is {type(mlp.act_fn).__name__}"
    if any(integrity.is_changed(module) for module in layer.modules()):
        return "one of its modules has a hook or a replaced forward"
    for linear in (
        *(attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj),
        *(mlp.gate_proj, mlp.up_proj, mlp.down_proj),
    ):
        if (found := unsupported_linear(linear, FastPart.FUSED_LAYERS, dtype)) is not None:
            return found
    norms = [layer.input_layernorm, layer.post_attention_layernorm]
    norms += [norm for name in ("q_norm", "k_norm") if (norm := getattr(attention, name, None))]
    if not support.trained_norms and any(norm.weight.requires_grad for norm in norms):
        return "its norms are trained"
    return None


def unsupported_linear(linear: Any, part: FastPart, dtype: torch.dtype) -> str | None:
    """Why ``part``, computing in ``dtype``, does not support this linear layer, plain or LoRA."""
    support = SUPPORT[part].linears
    base = linear
    if type(linear) in (LoraLinear, quantization.lora_4bit()):
        if (found := _unsupported_lora(linear, support, dtype)) is not None:
            return found
        base = linear.base_layer
    if support.quantized and quantization.is_4bit(base):
        return quantization.not_dense_reason(base, dtype)
    in_8_bits = type(base) is mxint8.Linear
    if in_8_bits and not (dtype == torch.float32 and build.widens(base.blocks)):
        return f"its 8-bit layers compute in {_name(dtype)} here, and our kernels in float32"
    if type(base) is not nn.Linear and not in_8_bits:
        return f"a projection is {type(base).__module__}.{type(base).__name__}, not a plain one"
    weight, bias = base.weight, base.bias
    if not weight.is_floating_point() and not in_8_bits:
        return "its weights are quantised"
    if not support.trained and (weight.requires_grad or (bias is not None and bias.requires_grad)):
        return "its base weights are trained"
    # Without autocast PEFT casts between the dtypes of base and adapter; that is left to PEFT.
    if (
        not support.mixed_dtypes
        and not in_8_bits
        and weight.dtype != dtype
        and not _autocasts(weight)
        and not (dtype == torch.float32 and build.widens(weight))
    ):
        return f"a projection is {_name(weight.dtype)} where the states are {_name(dtype)}"
    return None


def compute_dtype(states: torch.Tensor) -> torch.dtype:
    """The dtype of a matrix product with ``states``: autocast's where that is on."""
    device = states.device.type
    return torch.get_autocast_dtype(device) if _autocasts(states) else states.dtype


def compute_dtype_of(base: Any) -> torch.dtype:
    """The dtype that the layers of ``base`` compute in, while scored.

    Weights in bfloat16 on a CPU are widened by our kernels, where every layer is fused.
    """
    weight = base.get_input_embeddings().weight
    is_widened = (
        _widens(weight)
        and lacks(base, FastPart.FUSED_LAYERS) is None
        and all(unsupported_layer(layer, torch.float32) is None for layer in base.model.layers)
    )
    return torch.float32 if is_widened else compute_dtype(weight)


def may_be_widened(kind: type | None) -> bool:
    """Whether models of class ``kind`` can be held in bfloat16 and computed in float32 on a CPU."""
    family = None if kind is None else _FAMILY_OF.get(kind)
    needed = {FastPart.DECODING, FastPart.SCORING, FastPart.FUSED_LAYERS}
    return (
        family is not None
        and needed.isdisjoint(family.lacks)
        and build.unsupported_reason() is None
    )


def not_widened_reason(model: Any, *, trains: bool) -> str | None:
    """Why ``model``, held in bfloat16 on a CPU, is not computed in float32; None: it is."""
    for part in (FastPart.KERNELS, FastPart.DECODING, *((FastPart.FUSED_LAYERS,) * trains)):
        if (found := unsupported_reason(model, part)) is not None:
            return found
    return None


def _widens(weight: torch.Tensor) -> bool:
    return build.widens(weight) and not _autocasts(weight)


# --- What is compared with the table ---


def _unsupported_config(base: Any, part: FastPart) -> str | None:
    """What the settings of ``base`` ask for that ``part`` does not compute."""
    config, support = base.config, SUPPORT[part]
    if getattr(base, "is_loaded_in_8bit", False):
        return "the base model is quantised to 8 bits, and its layers round what they read too"
    is_quantized = getattr(base, "is_quantized", False) or bool(
        getattr(config, "quantization_config", None)
    )
    if is_quantized and not getattr(base, "is_loaded_in_4bit", False):
        return "the base model is quantised"
    for adapter in getattr(base, "peft_config", {}).values():
        if getattr(adapter, "alora_invocation_tokens", None):
            return "the adapter is an activated LoRA, which depends on token positions"
    implementation = config._attn_implementation
    if support.attention is not None:
        if not any(fnmatchcase(implementation, known) for known in support.attention):
            return f"its attention is '{implementation}', not sdpa or FlashAttention"
        if implementation not in ALL_ATTENTION_FUNCTIONS:
            return f"its attention, '{implementation}', is not registered with transformers"
    if not getattr(config, "is_causal", True):
        return "its attention is not causal"
    if _has_sliding_window(base):
        return "it has layers with sliding-window attention"
    if getattr(config, "final_logit_softcapping", None):
        return "its logits are soft-capped"
    rotary = getattr(base.model.rotary_emb, "rope_type", None)
    if support.rotary is not None and rotary not in support.rotary:
        return f"its rotary embedding ({rotary}) depends on the length of the batch"
    if support.activations is not None and config.hidden_act not in support.activations:
        return f"its activation is {config.hidden_act}"
    if support.gradients and base.training:
        if hasattr(base.model.embed_tokens, "neftune_noise_alpha"):
            return "it trains with noise on embeddings (NEFTune)"
        if config.attention_dropout > 0:
            return "it trains with dropout on attention"
    if not support.adapted_embedding and type(base.model.embed_tokens) is not nn.Embedding:
        kind = type(base.model.embed_tokens).__name__
        return f"its token embedding is {kind}, not a plain nn.Embedding"
    head = base.lm_head
    if not support.adapted_head and (type(head) is not nn.Linear or head.bias is not None):
        return "its head is not a plain linear layer without bias"
    return None


def _has_sliding_window(base: Any) -> bool:
    kinds = set(getattr(base.config, "layer_types", None) or ["full_attention"])
    # Mistral's attention reads the config's window, that of other families has its own.
    window = getattr(base.config, "sliding_window", None)
    own = (getattr(layer.self_attn, "sliding_window", window) for layer in base.model.layers)
    return kinds != {"full_attention"} or any(one is not None for one in own)


def _unsupported_here(base: Any, part: FastPart) -> str | None:
    """What ``part`` asks of the weights, the linear layers and the machine."""
    support = SUPPORT[part]
    weight = base.get_input_embeddings().weight
    if support.devices is not None and weight.device.type not in support.devices:
        return f"the model is on {weight.device.type}"
    if support.dtypes is not None and weight.dtype not in support.dtypes:
        return f"its weights are {_name(weight.dtype)}"
    if part is FastPart.KERNELS:
        return build.unsupported_reason()
    if part is FastPart.CUDA_GRAPHS:
        return graphs.unsupported_reason()
    if part is FastPart.MICRO_BATCH_FUSION:
        return None
    if part is FastPart.FUSED_LAYERS:
        dtype = torch.float32 if _widens(weight) else compute_dtype(weight)
        for number, layer in enumerate(base.model.layers):
            if (found := unsupported_layer(layer, dtype)) is not None:
                return f"of layer {number}, {found}"
        return None
    dtype, linears = compute_dtype_of(base), list(linears_of(base))
    if not support.linears.quantized and getattr(base, "is_loaded_in_4bit", False):
        return "the base model is quantised"
    if part is FastPart.LORA_PRODUCTS and not any(type(one) is LoraLinear for one in linears):
        return "the model has no LoRA adapter"
    if part is FastPart.DECODING:
        linears.append(base.lm_head)
        if any(type(x.data) is not torch.Tensor or x.numel() == 0 for x in base.parameters()):
            return "its weights are sharded over processes"
        if (found := _mixed_dtypes(base, linears) or _odd_sizes(base)) is not None:
            return found
    for linear in linears:
        if (found := unsupported_linear(linear, part, dtype)) is not None:
            return found
    return None


def _mixed_dtypes(base: Any, linears: Iterable[Any]) -> str | None:
    """What of ``base`` is held in a dtype that our engine does not multiply its states with."""
    embedding = base.get_input_embeddings().weight
    # The kernels compute in float32 with weights in either.
    widened = {torch.float32, torch.bfloat16} if build.supports_weight(embedding) else set()
    of_layers = (norm for layer in base.model.layers for norm in layer.children())
    norms = [part for part in of_layers if isinstance(getattr(part, "weight", None), nn.Parameter)]
    for layer in base.model.layers:
        attention, mlp = layer.self_attn, layer.mlp
        together = (
            (attention.q_proj, attention.k_proj, attention.v_proj),
            (mlp.gate_proj, mlp.up_proj),
        )
        for projections in together:  # each a single product
            kinds = {type(getattr(linear, "base_layer", linear)) for linear in projections}
            if mxint8.Linear in kinds and len(kinds) > 1:
                return "it holds some projections in 8 bits and others of the same input not"
    bases = (getattr(linear, "base_layer", linear) for linear in linears)
    for part in (base.model.norm, *norms, *bases):
        weight = part.weight
        if weight.is_floating_point() and weight.dtype not in {embedding.dtype, *widened}:
            return f"it holds {_name(weight.dtype)} beside {_name(embedding.dtype)}"
    return None


def _odd_sizes(base: Any) -> str | None:
    """What of ``base`` is of another size than our engine takes it to be; MLPs may be of any."""
    # A token that the embedding does not hold may not be written: it would be read next.
    if base.lm_head.weight.shape[0] > base.get_input_embeddings().weight.shape[0]:
        return "its head has more tokens than its embedding"
    first, *others = (layer.self_attn for layer in base.model.layers)
    for number, attention in enumerate(others, start=1):
        for name in ("q_proj", "k_proj", "v_proj"):
            if getattr(attention, name).out_features != getattr(first, name).out_features:
                return f"layer {number} has other attention heads than layer 0"
    return None


def _unsupported_lora(layer: Any, support: Linears, dtype: torch.dtype) -> str | None:
    names = [name for name in layer.active_adapters if name in layer.lora_A]
    is_off = not names or layer.disable_adapters
    if layer.merged and not support.merged:
        return "its adapter is merged"
    if layer.merged and layer.disable_adapters and not support.merged_but_off:
        return "its adapter is merged and switched off at once"
    if layer.fan_in_fan_out:
        return "its adapter sits on transposed weights"
    if not support.lora_bias and any(layer.lora_bias.values()):
        return "its LoRA has a bias"
    if not support.lora_dropout:
        for drop in layer.lora_dropout.values():
            if type(drop) is not nn.Identity and drop.training and getattr(drop, "p", 1.0) > 0:
                rate = getattr(drop, "p", "?")
                return f"LoRA has dropout {rate}: rows that share a prompt would share its mask"
    if is_off:
        return None
    if not support.several_adapters and len(names) > 1:
        return "it has several active adapters"
    for name in names if not support.mixed_dtypes else ():
        inner, outer = layer.lora_A[name], layer.lora_B[name]
        if any(type(x) is not nn.Linear or integrity.is_changed(x) for x in (inner, outer)):
            return "its adapter is not plain LoRA"
        if name in layer.lora_variant:
            return "it has a variant of LoRA (DoRA or another)"
        if inner.weight.dtype != dtype and not _autocasts(inner.weight):
            return f"its adapter is {_name(inner.weight.dtype)} where the states are {_name(dtype)}"
    return None


def _is_silu(activation: nn.Module) -> bool:
    return type(activation).__name__ in ("SiLU", "SiLUActivation")


def _autocasts(states: torch.Tensor) -> bool:
    return torch.is_autocast_enabled(states.device.type)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
