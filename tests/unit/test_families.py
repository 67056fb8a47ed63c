"""One table says what each fast part supports: every part and family is in it, every reason is a
phrase, and what stands beside a supported family is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model

from abacist.policy import families
from abacist.policy.families import FAMILIES, SUPPORT, FastPart, unsupported_reason
from abacist.policy.scoring.layers import FusedLayer
from abacist.policy.scoring.score import score
from unit.test_scoring import FAMILIES as SCORED
from unit.test_scoring import SIZES

DECODED = [family for family in FAMILIES if FastPart.DECODING not in family.lacks]


def made(family: Any, **config: Any) -> Any:
    settings = {**SIZES, "pad_token_id": 3, "sliding_window": None, **config}
    return family.causal_lm(family.causal_lm.config_class(**settings)).train()


def test_the_table_has_a_row_for_every_part() -> None:
    assert set(SUPPORT) == set(FastPart)


def test_every_family_has_a_parity_test_of_its_log_probabilities_and_gradients() -> None:
    scored = {type(make()) for name, make in SCORED.items() if name != "tiny"}
    assert scored == {family.causal_lm for family in FAMILIES}


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.causal_lm.__name__)
def test_a_plain_model_of_a_family_is_supported_but_for_what_it_lacks(family: Any) -> None:
    model = made(family)
    for part in (FastPart.SCORING, FastPart.DECODING, FastPart.MICRO_BATCH_FUSION):
        assert unsupported_reason(model, part) == family.lacks.get(part)
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules="all-linear"))
    for part in (FastPart.FUSED_LAYERS, FastPart.LORA_PRODUCTS):
        assert unsupported_reason(adapted, part) is None


@pytest.mark.parametrize("family", DECODED, ids=lambda family: family.causal_lm.__name__)
def test_a_sliding_window_is_refused_by_decoding_and_scoring(family: Any) -> None:
    kinds = {"layer_types": ["full_attention", "sliding_attention"], "use_sliding_window": True}
    if family.causal_lm.__name__.startswith("Llama"):
        pytest.skip("Llama has none")
    if family.causal_lm.__name__.startswith("Mistral"):
        kinds = {}
    model = made(family, sliding_window=8, **kinds)
    for part in (FastPart.DECODING, FastPart.SCORING):
        assert "sliding-window" in str(unsupported_reason(model, part))


REFUSED: dict[FastPart, tuple[dict[str, Any], str]] = {
    FastPart.DECODING: ({"hidden_act": "gelu"}, "its activation is gelu"),
    FastPart.SCORING: ({"attention_dropout": 0.1}, "dropout on attention"),
    FastPart.FUSED_LAYERS: ({}, "its base weights are trained"),
    FastPart.LORA_PRODUCTS: ({}, "no LoRA adapter"),
    FastPart.MICRO_BATCH_FUSION: ({"attention_dropout": 0.1}, "dropout on attention"),
    FastPart.CUDA_GRAPHS: ({}, "the model is on cpu"),
}


@pytest.mark.parametrize("part", REFUSED)
def test_a_part_says_why_it_does_not_support_a_model(part: FastPart) -> None:
    config, reason = REFUSED[part]
    assert reason in str(unsupported_reason(made(FAMILIES[0], **config), part))


def test_kernels_are_for_weights_that_they_can_compute_with_in_float32() -> None:
    for dtype, reason in (
        (torch.float32, None),
        (torch.bfloat16, None),
        (torch.float16, "its weights are float16"),
    ):
        assert unsupported_reason(made(FAMILIES[0]).to(dtype), FastPart.KERNELS) == reason


def test_a_part_that_a_family_lacks_is_named_and_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    model = get_peft_model(made(FAMILIES[0]), LoraConfig(r=2, target_modules="all-linear"))
    kind = FAMILIES[0].causal_lm
    assert unsupported_reason(model, FastPart.FUSED_LAYERS) is None
    lacking = families.Family(kind, lacks={FastPart.FUSED_LAYERS: "its layers are odd"})
    monkeypatch.setitem(families._FAMILY_OF, kind, lacking)
    assert unsupported_reason(model, FastPart.FUSED_LAYERS) == "its layers are odd"
    assert unsupported_reason(model, FastPart.SCORING) is None

    def refused(*_: Any) -> Any:
        raise AssertionError("a layer was fused")

    monkeypatch.setattr(FusedLayer, "of", refused)
    ids = torch.randint(4, 60, (2, 8))
    logps, _ = score(model, ids, torch.ones_like(ids), 3, temperature=1.0)
    assert logps.isfinite().all()


def test_attention_that_looks_ahead_is_refused() -> None:
    model = made(FAMILIES[0])
    assert unsupported_reason(model, FastPart.SCORING) is None
    model.config.is_causal = False
    for part in (FastPart.DECODING, FastPart.SCORING):
        assert "not causal" in str(unsupported_reason(model, part))


@pytest.mark.parametrize("what", ["lm_head", "model.norm", "model.layers.1.mlp.up_proj"])
def test_dtypes_that_our_engine_does_not_multiply_together_are_refused(
    what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = made(FAMILIES[0]).to(torch.bfloat16)
    model.get_submodule(what).float()
    with monkeypatch.context() as patch:
        patch.setattr(families.build, "library", lambda: None)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found = unsupported_reason(model, FastPart.DECODING)
        assert found == "it holds float32 beside bfloat16"
    model.get_submodule(what).half()
    assert unsupported_reason(model, FastPart.DECODING) == "it holds float16 beside bfloat16"
