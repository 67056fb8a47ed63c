"""What policy/scoring assumes of torch, transformers, peft and trl.

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
from transformers.modeling_layers import GradientCheckpointingLayer
from trl import GRPOTrainer

import lookalikes
from abacist.policy import integrity
from abacist.policy.families import FAMILIES, Family, FastPart, unsupported_reason
from abacist.policy.loading import default_lora, load_policy
from abacist.policy.scoring.attention_backend import AttentionBackend
from abacist.policy.scoring.score import score

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


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.causal_lm.__name__)
def test_every_family_has_the_modules_and_the_functions_that_the_forward_calls(
    family: Family,
) -> None:
    home = sys.modules[family.causal_lm.__module__]
    assert inspect.signature(home.apply_rotary_pos_emb).parameters.keys() == {
        *("q", "k", "cos", "sin", "unsqueeze_dim")
    }
    config: Any = family.causal_lm.config_class
    with torch.device("meta"):
        model = family.causal_lm(config(**SIZES, pad_token_id=0)).model
    for layer in model.layers:
        assert isinstance(layer, GradientCheckpointingLayer)
        parts = {name for name, _ in layer.named_children()}
        assert parts == {"input_layernorm", "self_attn", "post_attention_layernorm", "mlp"}
        heads = {name for name, _ in layer.self_attn.named_children()}
        assert heads - {"q_norm", "k_norm"} == {"q_proj", "k_proj", "v_proj", "o_proj"}
        gated = {name for name, _ in layer.mlp.named_children()}
        assert gated == {"gate_proj", "up_proj", "down_proj", "act_fn"}
    assert {name for name, _ in model.named_children()} == {
        *("embed_tokens", "layers", "norm", "rotary_emb")
    }


@pytest.mark.parametrize("kind", lookalikes.KINDS)
def test_models_as_we_load_them_take_the_fast_path(
    kind: str, lookalike: Callable[[str], Path]
) -> None:
    for options in ({"lora": default_lora()}, {"trainable": True}):
        policy = load_policy(str(lookalike(kind)), device="cpu", **options)
        assert unsupported_reason(policy.model, FastPart.SCORING) is None


def test_a_recomputed_layer_gets_the_packing_again(
    model: Qwen2ForCausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []
    on = AttentionBackend.on

    def watched(self: AttentionBackend, packing: Any) -> Any:
        attend = on(self, packing)

        def counting(*args: Any) -> torch.Tensor:
            seen.append(packing)
            return attend(*args)

        return counting

    monkeypatch.setattr(AttentionBackend, "on", watched)
    model.train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.enable_input_require_grads()
    logps, _ = score(model, *batch(), temperature=1.0)
    assert len(seen) == 2
    logps.sum().backward()
    assert len(seen) == 4
    assert len(set(map(id, seen))) == 1


def test_a_model_set_to_flash_attention_is_scored_without_it(model: Qwen2ForCausalLM) -> None:
    expected, _ = score(model, *batch(), temperature=1.0)
    model.config._attn_implementation = "flash_attention_2"
    assert unsupported_reason(model, FastPart.SCORING) is None
    assert torch.equal(score(model, *batch(), temperature=1.0)[0], expected)


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
    assert type(layer) is integrity.LoraLinear
    assert layer.use_dora == {"default": False}
    assert not any(layer.lora_variant.values())


def test_neftune_is_told_by_the_attribute_we_read(model: Qwen2ForCausalLM) -> None:
    from transformers.integrations import neftune

    assert "neftune_noise_alpha" in inspect.getsource(neftune)
    model.train()
    model.get_input_embeddings().neftune_noise_alpha = 5.0
    assert "NEFTune" in str(unsupported_reason(model, FastPart.SCORING))
