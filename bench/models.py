"""What the benches run on: models by shape, and a tokenizer to go with them.

Nothing is fetched. Speed does not depend on what weights say, so every model but ``tiny`` is drawn
at random in the shape of a published one, and reads a byte-level BPE trained on the spot
with Qwen2.5's or Llama-3.2's special tokens and chat template. The shapes are those of the
published config.json files.
"""

from __future__ import annotations

import functools
import importlib.util
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedTokenizerFast,
)

from abacist.policy.source import find
from abacist.task.problems import load_problems
from abacist.task.prompts import SYSTEM_PROMPT

TINY = "tiny"
# A token that the built-in model never writes: as its end token, it lets every reply run on.
NEVER_WRITTEN = "Ā"
_TOKENS = 1500
_QWEN_SPECIALS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
_LLAMA_SPECIALS = (
    "<|begin_of_text|>", "<|end_of_text|>", "<|finetune_right_pad_id|>", "<|start_header_id|>",
    "<|end_header_id|>", "<|eom_id|>", "<|eot_id|>",
)  # fmt: skip


@dataclass(frozen=True)
class Shape:
    """A model to measure.

    ``lengths`` are the shortest and the longest reply in tokens; ``recipe`` is the one of ours that
    such a model would be trained with, and so decides whether we checkpoint gradients.
    """

    config: dict[str, Any]
    lengths: tuple[int, int]
    recipe: str = "any"

    @property
    def is_llama(self) -> bool:
        return self.config.get("model_type") == "llama"


def _qwen(hidden: int, layers: int, heads: int, shared: int, ffn: int, rows: int) -> dict[str, Any]:
    return {
        "model_type": "qwen2",
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": shared,
        "intermediate_size": ffn,
        "vocab_size": rows,
        "tie_word_embeddings": True,
        "max_position_embeddings": 32768,
        "rms_norm_eps": 1e-6,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
    }


def _llama(
    hidden: int, layers: int, heads: int, shared: int, ffn: int, rows: int
) -> dict[str, Any]:
    return {
        **_qwen(hidden, layers, heads, shared, ffn, rows),
        "model_type": "llama",
        "head_dim": hidden // heads,
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-5,
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 5e5,
            "factor": 32.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
    }


SHAPES: dict[str, Shape] = {
    TINY: Shape({}, (30, 70), recipe="tiny"),
    "8x512": Shape(_qwen(512, 8, 8, 2, 1536, 16384), (64, 128)),
    "qwen-slice": Shape(_qwen(1536, 4, 12, 2, 8960, 151936), (32, 64)),
    "qwen2.5-1.5b": Shape(_qwen(1536, 28, 12, 2, 8960, 151936), (128, 256)),
    "llama-3.2-1b": Shape(_llama(2048, 16, 32, 8, 8192, 128256), (128, 256)),
    # For the smoke tests only. Of two sizes, so that a limit of memory lets one through.
    "smoke-qwen": Shape(_qwen(64, 2, 4, 2, 128, 2048), (4, 8)),
    "smoke-llama": Shape(_llama(256, 2, 4, 2, 512, 2048), (4, 8)),
}


def build_model(name: str, *, dtype: torch.dtype, device: str = "cpu", seed: int = 0) -> Any:
    """The model of ``SHAPES[name]``: ``tiny`` with its weights, any other drawn from ``seed``."""
    if name == TINY:
        folder = find(TINY).folder
        model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
        model = model.to(device)
    else:
        config = AutoConfig.for_model(**SHAPES[name].config)
        torch.manual_seed(seed)
        with torch.device(device):
            model = AutoModelForCausalLM.from_config(
                config, dtype=dtype, attn_implementation="sdpa"
            )
    end_id = build_tokenizer(name).eos_token_id
    for holder in (model.config, model.generation_config):
        holder.eos_token_id = end_id
    return model


@functools.cache
def build_tokenizer(name: str) -> Any:
    """The tokenizer for ``SHAPES[name]``, its end token one that is (almost) never sampled."""
    if name == TINY:
        tokenizer = AutoTokenizer.from_pretrained(find(TINY).folder)
        tokenizer.eos_token = NEVER_WRITTEN
        return tokenizer
    is_llama = SHAPES[name].is_llama
    end, pad = ("<|eot_id|>", "<|finetune_right_pad_id|>") if is_llama else (
        "<|im_end|>", "<|endoftext|>",
    )  # fmt: skip
    return PreTrainedTokenizerFast(
        tokenizer_object=_byte_pairs(_LLAMA_SPECIALS if is_llama else _QWEN_SPECIALS),
        eos_token=end,
        pad_token=pad,
        bos_token="<|begin_of_text|>" if is_llama else None,
        chat_template=_template("llama3_2" if is_llama else "qwen2_5"),
        padding_side="left",
    )


def weight_bytes_per_token(model: Any) -> int:
    """Bytes of weights that writing one token must read: all but the rows of an untied embedding,
    and none of an adapter, which a decoder can merge."""
    head = model.get_output_embeddings().weight
    embedding = model.get_input_embeddings().weight
    untied = embedding if head.data_ptr() != embedding.data_ptr() else None
    return sum(
        weight.numel() * weight.element_size()
        for key, weight in model.named_parameters()
        if "lora_" not in key and weight is not untied
    )


def _byte_pairs(specials: tuple[str, ...]) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel()]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=list(specials),
        show_progress=False,
    )
    problems = load_problems("generated", split="train", limit=300, seed=1)
    texts = [f"{problem.question}\n{problem.solution}" for problem in problems]
    tokenizer.train_from_iterator([*texts, SYSTEM_PROMPT], trainer)
    return tokenizer


def _template(name: str) -> str:
    spec = importlib.util.find_spec("trl")
    assert spec is not None and spec.origin is not None
    return (Path(spec.origin).parent / "chat_templates" / f"{name}.jinja").read_text("utf-8")
