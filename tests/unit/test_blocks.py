"""A decoder layer by hand is transformers' layer: the same states and gradients, less kept."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from abacist.policy import blocks, products, scoring
from abacist.policy.kernels import build

SHAPE = {
    "hidden_size": 48,  # not a multiple of every processor's vector
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 72,
    "vocab_size": 96,
    "tie_word_embeddings": True,
}
ALL_LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@pytest.fixture(params=["kernels", "pytorch"])
def arithmetic(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Every test once by the compiled kernels and once by PyTorch alone."""
    if request.param == "pytorch":
        monkeypatch.setattr(build, "library", lambda: None)
    elif (missing := build.unsupported_reason()) is not None:
        pytest.skip(f"no kernels: {missing}")
    yield request.param


def model_of(
    family: str = "qwen2", dtype: torch.dtype = torch.float32, seed: int = 0, **lora: Any
) -> PeftModel:
    torch.manual_seed(seed)
    config = AutoConfig.for_model(family, **SHAPE)
    base = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa")
    for norm in (m for name, m in base.named_modules() if name.endswith("norm")):
        nn.init.uniform_(norm.weight, 0.5, 1.5)  # ones would hide a forgotten weight
    settings = {"target_modules": ALL_LINEAR, "r": 4, "lora_alpha": 12, **lora}
    model = get_peft_model(base, LoraConfig(**settings))
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(weight, std=0.2)
    model.train()
    return model


def batch() -> dict[str, Any]:
    """Two groups of three, their prompts beginning alike, padded on both sides."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, 96, (6, 30), generator=generator)
    ids[:3, :14], ids[3:, :14] = ids[0, :14].clone(), ids[3, :14].clone()
    mask = torch.ones_like(ids)
    mask[3:, :4] = 0
    for row, end in enumerate((30, 22, 27, 18, 30, 25)):
        mask[row, end:] = 0
    return {"input_ids": ids, "attention_mask": mask, "logits_to_keep": 16}


def learned(model: Any, **autocast: Any) -> dict[str, Tensor]:
    model.zero_grad()
    with torch.autocast("cpu", **(autocast or {"enabled": False})):
        logps, _ = scoring.score(model, **batch(), temperature=0.9)
    weights = torch.linspace(-1, 1, logps.numel()).view_as(logps)
    (logps * weights).sum().backward()
    grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return {"logps": logps.detach(), **grads}


def fused(model: Any) -> Any:
    twin = copy.deepcopy(model)
    products.fuse_linears(twin)
    blocks.fuse_layers(twin)
    return twin


def assert_same(ours: dict[str, Tensor], theirs: dict[str, Tensor], rtol: float = 1e-5) -> None:
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        difference = (ours[name].double() - value.double()).norm()
        assert difference <= rtol * value.double().norm() + 1e-7, name


def layers_by_hand(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What :func:`blocks._fused` will have been called with."""
    calls: list[Any] = []
    whole = blocks._fused

    def spy(*args: Any) -> Tensor:
        calls.append(args[0])
        return whole(*args)

    monkeypatch.setattr(blocks, "_fused", spy)
    return calls


@pytest.mark.parametrize("family", ["qwen2", "llama"])
def test_states_and_gradients_are_those_of_the_layer_itself(
    family: str, arithmetic: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = model_of(family)
    theirs = learned(model)
    twin, calls = fused(model), layers_by_hand(monkeypatch)
    assert_same(learned(twin), theirs)
    assert len(calls) == SHAPE["num_hidden_layers"]


def test_a_wrong_layer_would_be_seen(arithmetic: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of()
    theirs, twin = learned(model), fused(model)
    gate = blocks.pointwise.swiglu_gradients
    monkeypatch.setattr(
        blocks.pointwise, "swiglu_gradients", lambda *a: tuple(1.001 * g for g in gate(*a))
    )
    with pytest.raises(AssertionError):
        assert_same(learned(twin), theirs)


@pytest.mark.parametrize("tokens", [1, 7, 50])
def test_blocks_of_any_size_give_the_same_gradients(
    tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    if (missing := build.unsupported_reason()) is not None:
        pytest.skip(f"no kernels: {missing}")
    model = model_of(target_modules=["q_proj", "gate_proj", "down_proj"])
    theirs, sizes = learned(model), []
    monkeypatch.setattr(blocks, "_BLOCK_TOKENS", tokens)
    gate = blocks.pointwise.swiglu_gradients

    def spy(grad: Tensor, gates: Tensor, ups: Tensor) -> tuple[Tensor, Tensor]:
        sizes.append(len(grad))
        return gate(grad, gates, ups)

    monkeypatch.setattr(blocks.pointwise, "swiglu_gradients", spy)
    assert_same(learned(fused(model)), theirs)
    assert len(sizes) > SHAPE["num_hidden_layers"]
    assert max(sizes) <= tokens


@pytest.mark.parametrize("trained", [False, True])
def test_the_last_norm_is_ours_only_where_it_is_frozen(
    trained: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if (missing := build.unsupported_reason()) is not None:
        pytest.skip(f"no kernels: {missing}")
    model = model_of()
    model.get_submodule("base_model.model.model.norm").requires_grad_(trained)
    theirs, calls = learned(model), []
    ours = blocks._Normed.apply
    monkeypatch.setattr(blocks._Normed, "apply", lambda *a: calls.append(a) or ours(*a))
    assert_same(learned(fused(model)), theirs)
    assert len(calls) == (0 if trained else 1)


def test_some_adapted_and_some_frozen_linears_give_the_same(arithmetic: str) -> None:
    model = model_of(target_modules=["q_proj", "v_proj", "down_proj"])
    assert_same(learned(fused(model)), learned(model))


def test_a_first_layer_whose_input_needs_no_gradient_and_one_whose_input_does_learn_alike(
    arithmetic: str,
) -> None:
    model = model_of()
    without = learned(fused(model))
    model.enable_input_require_grads()
    assert_same(learned(fused(model)), without)


def test_checkpointing_recomputes_layers_and_changes_no_gradient(
    arithmetic: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = model_of()
    theirs, twin = learned(model), fused(model)
    twin.enable_input_require_grads()
    twin.gradient_checkpointing_enable({"use_reentrant": False})
    calls = layers_by_hand(monkeypatch)
    assert_same(learned(twin), theirs)
    assert len(calls) == 2 * SHAPE["num_hidden_layers"]


def test_with_the_adapter_switched_off_the_base_speaks(arithmetic: str) -> None:
    model = model_of()
    twin = fused(model)
    with torch.no_grad(), model.disable_adapter(), twin.disable_adapter():
        theirs, _ = scoring.score(model, **batch(), temperature=1.0)
        ours, _ = scoring.score(twin, **batch(), temperature=1.0)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16])
def test_under_autocast_the_error_is_not_above_the_layers_own(
    weights: torch.dtype, arithmetic: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = layers_by_hand(monkeypatch)
    errors = torch.zeros(2)
    for seed in range(6):  # for one model it is a matter of luck which of the two errs more
        model = model_of(dtype=weights, seed=seed)
        exact = learned(copy.deepcopy(model).float())
        for number, one in enumerate((fused(model), model)):
            found = learned(one, dtype=torch.bfloat16)
            errors[number] += sum(
                float((found[name].double() - value.double()).norm() / value.double().norm())
                for name, value in exact.items()
            )
    assert calls
    assert errors[0] <= 1.15 * errors[1]


def test_less_is_kept_for_the_backward(arithmetic: str) -> None:
    def kept_bytes(model: Any) -> int:
        kept: dict[int, Tensor] = {}

        def keep(tensor: Tensor) -> Tensor:
            if not isinstance(tensor, nn.Parameter):
                kept[tensor.untyped_storage().data_ptr()] = tensor
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            scoring.score(model, **batch(), temperature=1.0)
        weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
        return sum(one.untyped_storage().nbytes() for at, one in kept.items() if at not in weights)

    model = model_of()
    assert kept_bytes(fused(model)) < 0.75 * kept_bytes(model)


def hooked(model: Any) -> None:
    model.get_submodule("base_model.model.model.layers.1.mlp").register_forward_hook(
        lambda module, args, output: output * 1.5
    )


def with_trained_norm(model: Any) -> None:
    model.get_submodule("base_model.model.model.layers.1.input_layernorm").requires_grad_(True)


def with_trained_base(model: Any) -> None:
    name = "base_model.model.model.layers.1.mlp.up_proj.base_layer"
    model.get_submodule(name).requires_grad_(True)


def merged(model: Any) -> None:
    model.get_submodule("base_model.model.model.layers.1.self_attn.q_proj").merge()


@pytest.mark.parametrize("change", [hooked, with_trained_norm, with_trained_base, merged])
def test_a_layer_that_is_more_than_it_seems_computes_itself(
    change: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = model_of()
    change(model)
    theirs = learned(model)
    twin, calls = fused(model), layers_by_hand(monkeypatch)
    assert_same(learned(twin), theirs)
    assert len(calls) == SHAPE["num_hidden_layers"] - 1


def test_an_ordinary_call_takes_the_layers_own_forward(monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of()
    twin, calls = fused(model), layers_by_hand(monkeypatch)
    ids = batch()["input_ids"]
    torch.testing.assert_close(twin(ids).logits, model(ids).logits, rtol=1e-5, atol=1e-5)
    assert not calls
