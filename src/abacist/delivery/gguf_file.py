"""A GGUF file of a model: llama.cpp's format, written by our own mapping onto the ``gguf`` package.

Only families whose every tensor and setting has a place in llama.cpp are mapped: Llama (SmolLM2 is
one) and Qwen2. Whatever this file does not know how to say is refused by its name, because a
runtime would compute another model without a word.

Matrices are rounded to the number format that was asked for, each number to the nearest (ties to
even); in Q8_0 32 neighbours share a scale, their largest absolute value divided by 127. Vectors
(norms, biases) stay in float32, as llama.cpp wants them.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import (
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Qwen2ForCausalLM,
)

from abacist.errors import ModelError, UsageError
from abacist.policy.chat import Chat

ARCHITECTURES: dict[type[PreTrainedModel], str] = {
    LlamaForCausalLM: "llama",
    Qwen2ForCausalLM: "qwen2",
}
NUMBERS = {"float32": "F32", "float16": "F16", "bfloat16": "BF16", "q8_0": "Q8_0"}
"""Number formats by the name that ``--dtype`` takes, as the ``gguf`` package calls them."""

# Names of llama.cpp's tensors for ours, of the whole model and of a layer.
_OF_MODEL = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
}
_OF_LAYER = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
_LAYER = "model.layers."
_Q8_0_BLOCK = 32

# How llama.cpp calls the ways in which byte-level BPE splits text before merging.
_QWEN_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_LLAMA_SPLIT = _QWEN_SPLIT.replace(r"\p{N}|", r"\p{N}{1,3}|")
_SPLITS = {_QWEN_SPLIT: "qwen2", _LLAMA_SPLIT: "llama-bpe"}
_NORMAL, _CONTROL, _USER_DEFINED, _UNUSED = 1, 3, 4, 5


def refuse_unmapped(model: Any, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise ModelError if llama.cpp would not compute this model from our file, UsageError if the
    ``gguf`` package is not installed. The model may have an adapter in it."""
    if find_spec("gguf") is None:
        raise UsageError(
            "a GGUF file is written by the package gguf, which is not installed",
            "pip install 'abacist[export]'",
        )
    reason = _unmapped(model) or _unmapped_rotary(model) or _unmapped_tokenizer(tokenizer)
    if reason is not None:
        raise _refused(reason)


def _refused(reason: str) -> ModelError:
    return ModelError(
        f"No GGUF file can be written of this model: {reason}.",
        "Llama-like and Qwen2 models are mapped. Export it with --to merged and convert that with "
        "llama.cpp's own convert_hf_to_gguf.py.",
    )


def _unmapped(model: Any) -> str | None:
    if type(model) not in ARCHITECTURES:
        return f"{type(model).__name__} has no mapping here"
    config = model.config
    if config.hidden_act != "silu":
        return f"its activation is {config.hidden_act}, not silu"
    if getattr(config, "use_sliding_window", False):
        return "it attends in a sliding window"
    return None


def _unmapped_tensor(model: Any, dtype: str) -> str | None:
    largest_number = float(torch.finfo(torch.float16).max)
    for name, tensor in model.state_dict().items():
        if _mapped_name(name) is None:
            return f"its tensor {name} has no place there"
        if name.endswith(".bias") and ARCHITECTURES[type(model)] == "llama":
            return f"it has a bias, {name}"
        largest = float(tensor.abs().max())
        if dtype == "float16" and largest > largest_number:
            return f"{name} holds {largest:.3g}, beyond float16 (take --dtype bfloat16)"
    return None


def _unmapped_rotary(model: Any) -> str | None:
    factors, scaling = _rotary_factors(model)
    if scaling != 1.0:
        return "its rotary embedding scales the scores"
    if ARCHITECTURES[type(model)] != "llama" and not np.allclose(factors, 1.0):
        return "its rotary embedding is scaled"
    return None


def _rotary_factors(model: Any) -> tuple[np.ndarray, float]:
    """By how much the model's rotary frequencies are lower than the plain ones, [head_dim / 2];
    and its factor on the scores."""
    rotary = model.model.rotary_emb
    used = rotary.inv_freq.double().cpu().numpy()
    theta = float(model.config.rope_parameters["rope_theta"])
    plain = theta ** -(np.arange(len(used)) / len(used))
    return plain / used, float(rotary.attention_scaling)


def _unmapped_tokenizer(tokenizer: PreTrainedTokenizerBase) -> str | None:
    if _tokenizer_json(tokenizer)["model"].get("type") != "BPE":
        return "its tokenizer is not byte-level BPE"
    if pre_tokenizer(tokenizer) is None:
        return "its tokenizer splits text in a way that has no name in llama.cpp"
    return None


def pre_tokenizer(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """llama.cpp's name for how this tokenizer splits text before merging; None if it has none."""
    found = _tokenizer_json(tokenizer)["pre_tokenizer"] or {}
    steps = found["pretokenizers"] if found.get("type") == "Sequence" else [found]
    if any(step.get("add_prefix_space") for step in steps):
        return None
    kinds = [step.get("type") for step in steps]
    if kinds == ["Split", "ByteLevel"] and not steps[1]["use_regex"]:
        return _SPLITS.get(steps[0]["pattern"].get("Regex", ""))
    if kinds == ["ByteLevel"] and steps[0]["use_regex"]:
        return "gpt-2"
    if kinds == ["Digits", "ByteLevel"] and steps[0]["individual_digits"] and steps[1]["use_regex"]:
        return "smollm"
    return None


def _tokenizer_json(tokenizer: Any) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(tokenizer.backend_tokenizer.to_str())
    return found


def write_gguf(
    model: Any,
    chat: Chat,
    path: Path,
    *,
    dtype: str,
    name: str,
    tell: Callable[[int, int], None],
) -> None:
    """Write ``model``, without an adapter, and its tokenizer into the file ``path``.

    ``dtype`` is a key of :data:`NUMBERS`; ``tell`` hears how many tensors of how many are written.
    Call :func:`refuse_unmapped` first. Raises ModelError for a tensor that has no place in such a
    file. One tensor is held in memory at a time, beside the model.
    """
    import gguf

    if (reason := _unmapped_tensor(model, dtype)) is not None:
        raise _refused(reason)

    writer = gguf.GGUFWriter(path, ARCHITECTURES[type(model)])
    try:
        _add_settings(writer, model, dtype, name)
        _add_tokenizer(writer, chat, rows=model.get_input_embeddings().weight.shape[0])
        written = list(_tensors(model, dtype))
        for label, tensor, number in written:
            of_bytes = gguf.quants.quant_shape_to_byte_shape(tensor.shape, number)
            writer.add_tensor_info(
                label, of_bytes, np.dtype(np.uint8), int(np.prod(of_bytes)), raw_dtype=number
            )
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for count, (_, tensor, number) in enumerate(written, start=1):
            values = np.ascontiguousarray(tensor.float().cpu().numpy())
            writer.write_tensor_data(gguf.quants.quantize(values, number).view(np.uint8))
            tell(count, len(written))
        writer.flush()
    finally:
        writer.close()


def _tensors(model: Any, dtype: str) -> Iterator[tuple[str, torch.Tensor, Any]]:
    """Every tensor of the file: its name there, its values, and the format they are rounded to."""
    import gguf

    asked, full = gguf.GGMLQuantizationType[NUMBERS[dtype]], gguf.GGMLQuantizationType.F32
    config = model.config
    is_llama = ARCHITECTURES[type(model)] == "llama"
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue  # llama.cpp takes the embedding where there is none
        label = _mapped_name(name)
        assert label is not None  # refused before
        if is_llama and ".attn_q." in label:
            tensor = _interleaved(tensor, config.num_attention_heads)
        elif is_llama and ".attn_k." in label:
            tensor = _interleaved(tensor, config.num_key_value_heads)
        number = asked if tensor.dim() > 1 else full
        if number == gguf.GGMLQuantizationType.Q8_0 and tensor.shape[-1] % _Q8_0_BLOCK:
            number = gguf.GGMLQuantizationType.F16  # such rows cannot be cut into blocks
        yield label, tensor, number
    factors, _ = _rotary_factors(model)
    if not np.allclose(factors, 1.0):
        yield "rope_freqs.weight", torch.from_numpy(factors.astype(np.float32)), full


def _mapped_name(name: str) -> str | None:
    stem, dot, kind = name.rpartition(".")
    if stem.startswith(_LAYER):
        number, _, inner = stem.removeprefix(_LAYER).partition(".")
        return f"blk.{number}.{_OF_LAYER[inner]}.{kind}" if inner in _OF_LAYER else None
    return f"{_OF_MODEL[stem]}{dot}{kind}" if stem in _OF_MODEL else None


def _interleaved(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Rows of a Llama query or key matrix in llama.cpp's order.

    Rotary embedding turns pairs of numbers. transformers pairs number i of a head with number
    i + half, llama.cpp's Llama pairs neighbours.
    """
    by_half = weight.view(heads, 2, weight.shape[0] // heads // 2, weight.shape[1])
    return by_half.transpose(1, 2).reshape(weight.shape)


def _add_settings(writer: Any, model: Any, dtype: str, name: str) -> None:
    import gguf

    config = model.config
    writer.add_type("model")
    writer.add_name(name)
    file_types = {
        "float32": gguf.LlamaFileType.ALL_F32,
        "float16": gguf.LlamaFileType.MOSTLY_F16,
        "bfloat16": gguf.LlamaFileType.MOSTLY_BF16,
        "q8_0": gguf.LlamaFileType.MOSTLY_Q8_0,
    }
    writer.add_file_type(int(file_types[dtype]))
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_vocab_size(model.get_input_embeddings().weight.shape[0])
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(float(config.rope_parameters["rope_theta"]))
    head_size = model.model.layers[0].self_attn.head_dim
    writer.add_rope_dimension_count(head_size)
    if head_size * config.num_attention_heads != config.hidden_size:
        writer.add_key_length(head_size)
        writer.add_value_length(head_size)


def _add_tokenizer(writer: Any, chat: Chat, *, rows: int) -> None:
    tokenizer: Any = chat.tokenizer
    texts = [f"[PAD{number}]" for number in range(rows)]
    types = [_UNUSED] * rows
    for text, number in tokenizer.get_vocab().items():
        if number < rows:
            texts[number], types[number] = text, _NORMAL
    for number, token in tokenizer.added_tokens_decoder.items():
        if number < rows:
            texts[number] = token.content
            types[number] = _CONTROL if token.special else _USER_DEFINED
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre_tokenizer(tokenizer))
    writer.add_token_list(texts)
    writer.add_token_types(types)
    merges = _tokenizer_json(tokenizer)["model"]["merges"]
    writer.add_token_merges([m if isinstance(m, str) else " ".join(m) for m in merges])
    # llama.cpp stops at each of these three, whatever they are called.
    add_stops = (writer.add_eos_token_id, writer.add_eot_token_id, writer.add_eom_token_id)
    for add, number in zip(add_stops, chat.stop_ids, strict=False):
        add(number)
    writer.add_pad_token_id(chat.pad_id)
    if tokenizer.bos_token_id is not None:
        writer.add_bos_token_id(tokenizer.bos_token_id)
    writer.add_add_bos_token(starts_with_bos(tokenizer))
    writer.add_chat_template(tokenizer.get_chat_template())


def starts_with_bos(tokenizer: Any) -> bool:
    """Whether the tokenizer puts its begin-of-text token before a text by itself."""
    bos = tokenizer.bos_token_id
    return bos is not None and list(tokenizer("a")["input_ids"])[:1] == [bos]
