"""Models that look like Llama-3.2 and Qwen2.5 in everything but size, built without a Hub.

Whatever differs between the two families and has bitten somebody (special tokens and their
order, chat template, end-of-turn tokens, pad token, digit splitting, BOS, sampling defaults,
embedding rows beyond the tokenizer, tied embeddings, rotary scaling) is as in the published
files; only the vocabulary and the layers are small, and the weights are random.

The chat templates are the originals that ship inside TRL (``trl/chat_templates``).
"""

from __future__ import annotations

import functools
import importlib.util
import json
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from safetensors.torch import save_file
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import AutoConfig, AutoModelForCausalLM

Kind = Literal["llama-3.2-instruct", "llama-3.2-base", "qwen2.5-instruct", "qwen2.5-base"]
KINDS: tuple[Kind, ...] = get_args(Kind)

LLAMA_SPECIALS: tuple[str, ...] = (
    "<|begin_of_text|>",
    "<|end_of_text|>",
    "<|reserved_special_token_0|>",
    "<|reserved_special_token_1|>",
    "<|finetune_right_pad_id|>",
    "<|reserved_special_token_2|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eom_id|>",
    "<|eot_id|>",
    "<|python_tag|>",
    *(f"<|reserved_special_token_{number}|>" for number in range(3, 248)),
)
QWEN_SPECIALS: tuple[str, ...] = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|object_ref_start|>",
    "<|object_ref_end|>",
    "<|box_start|>",
    "<|box_end|>",
    "<|quad_start|>",
    "<|quad_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
# Added tokens of Qwen2.5 that are not marked special: they survive skip_special_tokens.
QWEN_ADDED: tuple[str, ...] = (
    "<tool_call>",
    "</tool_call>",
    "<|fim_prefix|>",
    "<|fim_middle|>",
    "<|fim_suffix|>",
    "<|fim_pad|>",
    "<|repo_name|>",
    "<|file_sep|>",
)
QWEN_ROWS_BEYOND_TOKENIZER = 271  # 151,936 embedding rows, 151,665 tokens

_BYTE_PAIR_TOKENS = 400
_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|DIGITS| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def build(kind: Kind, folder: Path | str, *, size: int = 64, seed: int = 0) -> Path:
    """Write a complete model folder of ``kind`` and return it.

    ``size`` is the hidden width (a multiple of 16). The folder holds config, generation config,
    tokenizer and bfloat16 safetensors, as ``from_pretrained`` and a Hub download would find them.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    is_llama, is_instruct = kind.startswith("llama"), kind.endswith("instruct")
    tokenizer = _tokenizer(is_llama)
    tokenizer.save(str(folder / "tokenizer.json"))
    write = _llama if is_llama else _qwen
    config, generation, tokenizer_config = write(tokenizer, size, is_instruct)
    added = {
        str(tokenizer.token_to_id(token)): {
            "content": token,
            "lstrip": False,
            "normalized": False,
            "rstrip": False,
            "single_word": False,
            "special": token not in QWEN_ADDED,
        }
        for token in (LLAMA_SPECIALS if is_llama else QWEN_SPECIALS + QWEN_ADDED)
    }
    for name, content in (
        ("config.json", config),
        ("generation_config.json", generation),
        ("tokenizer_config.json", {"added_tokens_decoder": added, **tokenizer_config}),
    ):
        (folder / name).write_text(json.dumps(content, indent=2), encoding="utf-8")
    _write_weights(folder, seed)
    return folder


def _write_weights(folder: Path, seed: int) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))
    weights = {
        name: tensor.to(torch.bfloat16).contiguous()
        for name, tensor in model.state_dict().items()
        if name != "lm_head.weight"  # tied to the embedding
    }
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def _llama(
    tokenizer: Tokenizer, size: int, is_instruct: bool
) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    token_id = tokenizer.token_to_id
    bos, end = token_id("<|begin_of_text|>"), token_id("<|end_of_text|>")
    stops = [end, token_id("<|eom_id|>"), token_id("<|eot_id|>")] if is_instruct else end
    config = {
        **_shared_config(size),
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": tokenizer.get_vocab_size(),
        "max_position_embeddings": 131072,
        "bos_token_id": bos,
        "eos_token_id": stops,
        "rms_norm_eps": 1e-5,
        "attention_bias": False,
        "mlp_bias": False,
        "head_dim": size // 4,
        "rope_theta": 500000.0,
        "rope_scaling": {
            "factor": 32.0,
            "high_freq_factor": 4.0,
            "low_freq_factor": 1.0,
            "original_max_position_embeddings": 8192,
            "rope_type": "llama3",
        },
    }
    generation = {
        "bos_token_id": bos,
        "do_sample": True,
        "eos_token_id": stops,
        "temperature": 0.6,
        "top_p": 0.9,
    }
    tokenizer_config = {
        "bos_token": "<|begin_of_text|>",
        "clean_up_tokenization_spaces": True,
        "eos_token": "<|eot_id|>" if is_instruct else "<|end_of_text|>",
        "model_input_names": ["input_ids", "attention_mask"],
        "model_max_length": 131072,
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    if is_instruct:
        tokenizer_config["chat_template"] = _template("llama3_2")
    return config, generation, tokenizer_config


def _qwen(
    tokenizer: Tokenizer, size: int, is_instruct: bool
) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    text_end, turn_end = (tokenizer.token_to_id(t) for t in ("<|endoftext|>", "<|im_end|>"))
    config = {
        **_shared_config(size),
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "vocab_size": tokenizer.get_vocab_size() + QWEN_ROWS_BEYOND_TOKENIZER,
        "max_position_embeddings": 32768,
        "bos_token_id": text_end,
        "eos_token_id": turn_end if is_instruct else text_end,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1000000.0,
        "max_window_layers": 2,
        "sliding_window": 32768,
        "use_sliding_window": False,
    }
    generation: dict[str, Any] = {"bos_token_id": text_end, "do_sample": False}
    generation |= {"eos_token_id": text_end, "max_new_tokens": 2048}
    template = _template("qwen2_5")
    if is_instruct:
        generation = {
            "bos_token_id": text_end,
            "do_sample": True,
            "eos_token_id": [turn_end, text_end],
            "pad_token_id": text_end,
            "repetition_penalty": 1.1,
            "temperature": 0.7,
            "top_k": 20,
            "top_p": 0.8,
        }
    else:  # the base models ship the same ChatML with a shorter default system text
        template = template.replace("You are Qwen, created by Alibaba Cloud. You", "You")
    tokenizer_config = {
        "add_bos_token": False,
        "add_prefix_space": False,
        "additional_special_tokens": list(QWEN_SPECIALS[1:]),
        "bos_token": None,
        "chat_template": template,
        "clean_up_tokenization_spaces": False,
        "eos_token": "<|im_end|>" if is_instruct else "<|endoftext|>",
        "errors": "replace",
        "model_max_length": 32768,
        "pad_token": "<|endoftext|>",
        "split_special_tokens": False,
        "tokenizer_class": "Qwen2Tokenizer",
        "unk_token": None,
    }
    return config, generation, tokenizer_config


def _shared_config(size: int) -> dict[str, Any]:
    return {
        "hidden_size": size,
        "intermediate_size": 2 * size,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "hidden_act": "silu",
        "attention_dropout": 0.0,
        # Ten times the usual spread: a random model whose next tokens differ clearly.
        "initializer_range": 0.2,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
        "use_cache": True,
    }


@functools.cache
def _template(name: str) -> str:
    spec = importlib.util.find_spec("trl")  # read the file without importing the package
    assert spec is not None and spec.origin is not None
    return (Path(spec.origin).parent / "chat_templates" / f"{name}.jinja").read_text("utf-8")


@functools.cache
def _tokenizer(is_llama: bool) -> Tokenizer:
    """Byte-level BPE with the family's own splitting: digits by threes (Llama) or singly (Qwen)."""
    tokenizer = Tokenizer(models.BPE(ignore_merges=is_llama))
    if not is_llama:
        tokenizer.normalizer = normalizers.NFC()
    pattern = _SPLIT.replace("DIGITS", r"\p{N}{1,3}" if is_llama else r"\p{N}")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=_BYTE_PAIR_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_arithmetic_text(), trainer)
    specials = LLAMA_SPECIALS if is_llama else QWEN_SPECIALS
    tokenizer.add_special_tokens([AddedToken(t, special=True) for t in specials])
    if is_llama:
        bos = LLAMA_SPECIALS[0]
        tokenizer.post_processor = processors.Sequence(
            [
                processors.ByteLevel(trim_offsets=False),
                processors.TemplateProcessing(
                    single=f"{bos} $A",
                    pair=f"{bos} $A {bos}:1 $B:1",
                    special_tokens=[(bos, tokenizer.token_to_id(bos))],
                ),
            ]
        )
    else:
        tokenizer.add_tokens([AddedToken(t, normalized=False) for t in QWEN_ADDED])
        tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    return tokenizer


def _arithmetic_text() -> list[str]:
    names, things = ("Ada", "Tom", "Mia"), ("apples", "coins", "stamps")
    lines = [
        f"{name} has {a} {thing} and gets {b} more. How many {thing} does {name} have?\n"
        f"<reasoning>\n{name} has {a} + {b} = {a + b} {thing}.\n</reasoning>\n"
        f"<answer>\n{a + b}\n</answer>\n"
        for name in names
        for thing in things
        for a, b in ((3, 4), (12, 30), (150, 25))
    ]
    return [*lines, "Question: what is the answer?\nAnswer:\n", "You are a helpful assistant."]
