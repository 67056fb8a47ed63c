"""What policy/scoring.py assumes of torch, transformers, peft and trl.

A failure here after an update names the assumption that no longer holds, and where we lean on it.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import Qwen2Config, Qwen2ForCausalLM
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from trl import GRPOTrainer

import lookalikes
from abacist.errors import ModelError
from abacist.policy import instances, scoring
from abacist.policy.loading import default_lora, load_policy
from abacist.policy.scoring import FAMILIES, obstacle, score

SIZES: dict[str, Any] = {
    "vocab_size": 50,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


@pytest.fixture
def model() -> Qwen2ForCausalLM:
    torch.manual_seed(0)
    return Qwen2ForCausalLM(Qwen2Config(**SIZES))


def batch() -> tuple[torch.Tensor, torch.Tensor, int]:
    ids = torch.randint(1, 50, (4, 9), generator=torch.Generator().manual_seed(0))
    ids[1, :5] = ids[0, :5]
    return ids, torch.ones_like(ids), 4


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_looks_its_attention_up_where_we_put_ours(family: type) -> None:
    assert vars(sys.modules[family.__module__])["ALL_ATTENTION_FUNCTIONS"] is (
        ALL_ATTENTION_FUNCTIONS
    )


@pytest.mark.parametrize("kind", lookalikes.KINDS)
def test_models_as_we_load_them_take_the_fast_path(
    kind: str, lookalike: Callable[[str], Path]
) -> None:
    for options in ({"lora": default_lora()}, {"trainable": True}):
        policy = load_policy(str(lookalike(kind)), device="cpu", **options)
        assert obstacle(policy.model) is None


def test_a_recomputed_layer_gets_the_layout_again(
    model: Qwen2ForCausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []
    attend = scoring.attend

    def counting(*args: Any) -> torch.Tensor:
        seen.append(args[3])
        return attend(*args)

    monkeypatch.setattr(scoring, "attend", counting)
    model.train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.enable_input_require_grads()
    logps, _ = score(model, *batch(), temperature=1.0)
    assert len(seen) == 2
    logps.sum().backward()
    assert len(seen) == 4
    assert len(set(map(id, seen))) == 1


def test_a_model_that_goes_around_our_attention_is_noticed(
    model: Qwen2ForCausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scoring, "_teach_sharing", lambda implementation: None)
    plain = ALL_ATTENTION_FUNCTIONS["sdpa"]
    plain = getattr(plain, "hands_on_to", plain)
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS, "sdpa", plain)
    with pytest.raises(ModelError, match="0 of 2 layers"):
        score(model, *batch(), temperature=1.0)


def test_a_model_set_to_flash_attention_is_scored_without_it(model: Qwen2ForCausalLM) -> None:
    expected, _ = score(model, *batch(), temperature=1.0)
    model.config._attn_implementation = "flash_attention_2"
    assert obstacle(model) is None
    assert torch.equal(score(model, *batch(), temperature=1.0)[0], expected)


def test_no_mask_of_all_tokens_by_all_tokens_is_made(
    model: Qwen2ForCausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import masking_utils

    def made(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("a mask was made")

    for name in masking_utils.ALL_MASK_ATTENTION_FUNCTIONS:
        monkeypatch.setitem(masking_utils.ALL_MASK_ATTENTION_FUNCTIONS, name, made)
    score(model, *batch(), temperature=1.0)


def test_trl_asks_for_nothing_that_we_do_not_know_of() -> None:
    parameters = list(inspect.signature(GRPOTrainer._get_per_token_logps_and_entropies).parameters)
    assert parameters == [
        "self",
        "model",
        "input_ids",
        "attention_mask",
        "logits_to_keep",
        "batch_size",
        "compute_entropy",
        "compute_aux_loss",
        "pixel_values",
        "image_grid_thw",
        "num_images",
        "pixel_attention_mask",
        "spatial_shapes",
        "num_tiles",
        "image_sizes",
        "token_type_ids",
        "mm_token_type_ids",
        "image_position_ids",
    ]


def test_variants_of_lora_are_told_by_the_attributes_we_read(model: Qwen2ForCausalLM) -> None:
    wrapped = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"]))
    layer = wrapped.get_base_model().model.layers[0].self_attn.q_proj
    assert type(layer) is instances.LoraLinear
    assert layer.use_dora == {"default": False}
    assert not any(layer.lora_variant.values())


def test_neftune_is_told_by_the_attribute_we_read(model: Qwen2ForCausalLM) -> None:
    from transformers.integrations import neftune

    assert "neftune_noise_alpha" in inspect.getsource(neftune)
    model.train()
    model.get_input_embeddings().neftune_noise_alpha = 5.0
    assert "NEFTune" in str(obstacle(model))
