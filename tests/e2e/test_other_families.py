"""A model of a family that the fast path does not know is trained by TRL's path, and told why."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    GPT2Config,
    GPTNeoXConfig,
    PretrainedConfig,
)

import lookalikes
from abacist.cli.main import main
from adapters import paid_apart, untrained

pytestmark = pytest.mark.e2e

SMALL = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
HEADS = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16}


def gemma_2(vocabulary: int) -> PretrainedConfig:
    """Scores and logits are soft-capped, and every other layer sees a window only."""
    return Gemma2Config(vocab_size=vocabulary, sliding_window=64, **SMALL, **HEADS)


def gpt_neox(vocabulary: int) -> PretrainedConfig:
    """Layers in parallel, and a rotation of a part of each head."""
    return GPTNeoXConfig(vocab_size=vocabulary, num_attention_heads=2, **SMALL)


def gpt2(vocabulary: int) -> PretrainedConfig:
    """No groups of heads, and a config that does not name the width of the MLP."""
    sizes = {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 512}
    return GPT2Config(vocab_size=vocabulary, bos_token_id=None, eos_token_id=None, **sizes)


def folder_of(config: PretrainedConfig, folder: Path) -> Path:
    """A model folder with the tokenizer and the template of a look-alike, and other weights."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    for old in ("model.safetensors", "config.json", "generation_config.json"):
        (folder / old).unlink()
    model.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("family", [gemma_2, gpt_neox, gpt2])
def test_a_model_beyond_the_table_is_trained_by_trls_path_which_is_said_with_the_reason(
    family: Callable[[int], PretrainedConfig], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = lookalikes.build("qwen2.5-instruct", tmp_path / "model")
    vocabulary = json.loads((folder / "config.json").read_text(encoding="utf-8"))["vocab_size"]
    model = folder_of(family(vocabulary), folder)
    what = [
        *("--model_name_or_path", str(model), "--dataset_name", "generated"),
        *("--num_train_problems", "20", "--num_heldout_problems", "2", "--num_generations", "2"),
        *("--num_selection_problems", "0", "--num_consistency_problems", "0"),
        *("--per_device_train_batch_size", "4", "--gradient_accumulation_steps", "1"),
        *("--max_steps", "1", "--warmup_steps", "0", "--max_completion_length", "8"),
        *("--lora_target_modules", "all-linear", "--learning_rate", "0.01"),
        *("--reward_funcs", paid_apart(tmp_path), "--allow_hackable_rewards"),
    ]
    assert main(["train", "any", *what, "--dry_run", "--dry_run_problems", "2"]) == 0
    capsys.readouterr()
    code = main(["train", "any", *what, "--output_dir", str(tmp_path / "run")])
    captured = capsys.readouterr()
    assert code == 0, captured.err
    name = type(AutoModelForCausalLM.from_config(family(vocabulary))).__name__
    said = [line for line in captured.out.splitlines() if "TRL's path" in line]
    assert len(said) == 2 and all(name in line for line in said)
    assert (tmp_path / "run" / "evals" / "verdict.json").is_file()
    assert untrained(tmp_path / "run") == []
