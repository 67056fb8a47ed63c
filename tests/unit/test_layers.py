"""A decoder layer of the packed forward is transformers' layer: to the bit where its own modules
are called, and with the same states and gradients, and less kept, where it is fused."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from abacist.policy.families import FastPart, unsupported_reason
from abacist.policy.kernels import build
from abacist.policy.scoring import forward, layers
from abacist.policy.scoring.layers import FusedLayer
from abacist.policy.scoring.score import score

SHAPE = {
    "hidden_size": 48,  # not a multiple of every processor's vector
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 72,
    "vocab_size": 96,
    "tie_word_embeddings": True,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"sliding_window": None},
    "qwen2": {},
    "qwen3": {"head_dim": 12},
    "smollm3": {"pad_token_id": 3, "no_rope_layer_interval": 2},
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
    family: str = "qwen2",
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    hidden_act: str = "silu",
    **lora: Any,
) -> PeftModel:
    torch.manual_seed(seed)
    config = AutoConfig.for_model(family, **SHAPE, **FAMILIES[family], hidden_act=hidden_act)
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


@contextmanager
def plain_layers() -> Iterator[None]:
    """Nothing is fused: every layer is computed by the model's own modules."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FusedLayer, "of", lambda *_: None)
        for name in ("call_linear", "final_norm"):
            patch.setattr(forward, name, lambda module, x: module(x))
        yield


def learned(model: Any, *, plain: bool = False, **autocast: Any) -> dict[str, Tensor]:
    """Log-probabilities and gradients; ``plain`` by the model's own modules."""
    model.zero_grad()
    with (
        plain_layers() if plain else nullcontext(),
        torch.autocast("cpu", **(autocast or {"enabled": False})),
    ):
        logps, _ = score(model, **batch(), temperature=0.9)
        weights = torch.linspace(-1, 1, logps.numel()).view_as(logps)
        with torch.autocast("cpu", enabled=False):
            (logps * weights).sum().backward()
    grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return {"logps": logps.detach(), **grads}


def assert_same(ours: dict[str, Tensor], theirs: dict[str, Tensor], rtol: float = 1e-5) -> None:
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        difference = (ours[name].double() - value.double()).norm()
        assert difference <= rtol * value.double().norm() + 1e-7, name


@pytest.fixture
def fused(monkeypatch: pytest.MonkeyPatch) -> list[FusedLayer]:
    """The layers that were computed in two fused halves, one entry for each time."""
    calls: list[FusedLayer] = []
    compute = FusedLayer.__call__

    def spy(self: FusedLayer, *args: Any, **kwargs: Any) -> Tensor:
        calls.append(self)
        return compute(self, *args, **kwargs)

    monkeypatch.setattr(FusedLayer, "__call__", spy)
    return calls


@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_layer_by_its_own_modules_is_transformers_layer_to_the_bit(
    family: str, autocast: bool, weights: torch.dtype
) -> None:
    base = model_of(family, weights).get_base_model()
    hidden = torch.randn(1, 20, SHAPE["hidden_size"], dtype=weights)
    rotary = base.model.rotary_emb(hidden, torch.arange(20)[None])

    attention = base.model.layers[0].self_attn

    def attend(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        return sdpa_attention_forward(attention, query, key, value, None, scaling=scale)[0]

    found = []
    for layer in base.model.layers:
        for compute in (
            lambda x, own=layer: own(x, position_embeddings=rotary, attention_mask=None),
            lambda x, own=layer: forward._plain_layer(own, x, rotary, attend),
        ):
            x = hidden.clone().requires_grad_()
            base.zero_grad()
            with plain_layers(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                out = compute(x)
            out.float().square().sum().backward()
            grads = [p.grad for p in layer.parameters() if p.grad is not None]
            found.append([out, x.grad, *grads])
    for theirs, ours in zip(found[::2], found[1::2], strict=True):
        assert len(theirs) == len(ours) > 2
        assert all(torch.equal(a, b) for a, b in zip(theirs, ours, strict=True))


@pytest.mark.parametrize("family", FAMILIES)
def test_states_and_gradients_are_those_of_the_layers_own_modules(
    family: str, arithmetic: str, fused: list[FusedLayer]
) -> None:
    model = model_of(family)
    assert_same(learned(model), learned(model, plain=True))
    assert len(fused) == SHAPE["num_hidden_layers"]
    assert unsupported_reason(model, FastPart.FUSED_LAYERS) is None


@pytest.mark.parametrize("norm", ["q_norm", "k_norm"])
def test_a_forgotten_head_norm_would_be_seen(
    norm: str, arithmetic: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = model_of("qwen3")
    theirs = learned(model, plain=True)
    weight = model.get_base_model().model.layers[1].self_attn.get_submodule(norm).weight
    gradient = layers.pointwise.add_norm_gradient

    def without(total: Tensor, grad: Tensor, x: Tensor, used: Tensor, epsilon: float) -> None:
        ones = torch.ones_like(used) if used.data_ptr() == weight.data_ptr() else used
        gradient(total, grad, x, ones, epsilon)

    monkeypatch.setattr(layers.pointwise, "add_norm_gradient", without)
    with pytest.raises(AssertionError):
        assert_same(learned(model), theirs)


def test_a_wrong_layer_would_be_seen(arithmetic: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of()
    theirs = learned(model, plain=True)
    gate = layers.pointwise.swiglu_gradients
    monkeypatch.setattr(
        layers.pointwise, "swiglu_gradients", lambda *a: tuple(1.001 * g for g in gate(*a))
    )
    with pytest.raises(AssertionError):
        assert_same(learned(model), theirs)


@pytest.mark.parametrize("tokens", [1, 7, 50])
def test_blocks_of_any_size_give_the_same_gradients(
    tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    if (missing := build.unsupported_reason()) is not None:
        pytest.skip(f"no kernels: {missing}")
    model = model_of(target_modules=["q_proj", "gate_proj", "down_proj"])
    theirs, sizes = learned(model, plain=True), []
    monkeypatch.setattr(layers, "_BLOCK_TOKENS", tokens)
    gate = layers.pointwise.swiglu_gradients

    def spy(grad: Tensor, gates: Tensor, ups: Tensor) -> tuple[Tensor, Tensor]:
        sizes.append(len(grad))
        return gate(grad, gates, ups)

    monkeypatch.setattr(layers.pointwise, "swiglu_gradients", spy)
    assert_same(learned(model), theirs)
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
    theirs, calls = learned(model, plain=True), []
    ours = layers._FrozenNorm.apply
    monkeypatch.setattr(layers._FrozenNorm, "apply", lambda *a: calls.append(a) or ours(*a))
    assert_same(learned(model), theirs)
    assert len(calls) == (0 if trained else 1)


def test_some_adapted_and_some_frozen_linears_give_the_same(arithmetic: str) -> None:
    model = model_of(target_modules=["q_proj", "v_proj", "down_proj"])
    assert_same(learned(model), learned(model, plain=True))


@pytest.mark.parametrize("missing", ["q_proj", "gate_proj", "down_proj"])
def test_linears_of_one_input_keep_their_own_ranks_and_scales(
    missing: str, arithmetic: str, fused: list[FusedLayer]
) -> None:
    model = model_of(
        target_modules=[name for name in ALL_LINEAR if name != missing],
        rank_pattern={"q_proj": 3, "v_proj": 5, "gate_proj": 2},
        alpha_pattern={"k_proj": 5, "up_proj": 20},
    )
    assert_same(learned(model), learned(model, plain=True))
    assert fused


def test_a_first_layer_whose_input_needs_no_gradient_and_one_whose_input_does_learn_alike(
    arithmetic: str,
) -> None:
    model = model_of()
    without = learned(model)
    model.enable_input_require_grads()
    assert_same(learned(model), without)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_recomputes_layers_and_changes_no_gradient(
    reentrant: bool, arithmetic: str, fused: list[FusedLayer]
) -> None:
    model = model_of()
    theirs = learned(model, plain=True)
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    assert_same(learned(model), theirs)
    assert len(fused) == 2 * SHAPE["num_hidden_layers"]


def test_with_the_adapter_switched_off_the_base_speaks(arithmetic: str) -> None:
    model = model_of()
    with torch.no_grad(), model.disable_adapter():
        ours, _ = score(model, **batch(), temperature=1.0)
        with plain_layers():
            theirs, _ = score(model, **batch(), temperature=1.0)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", ["qwen2", "qwen3"])
@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16])
def test_under_autocast_the_error_is_not_above_the_layers_own(
    weights: torch.dtype, family: str, arithmetic: str, fused: list[FusedLayer]
) -> None:
    errors = torch.zeros(2)
    for seed in range(6):  # for one model it is chance which of the two errs more
        model = model_of(family, dtype=weights, seed=seed)
        exact = learned(copy.deepcopy(model).float(), plain=True)
        fused.clear()
        for number, plain in enumerate((False, True)):
            found = learned(model, plain=plain, dtype=torch.bfloat16)
            errors[number] += sum(
                float((found[name].double() - value.double()).norm() / value.double().norm())
                for name, value in exact.items()
            )
        assert len(fused) == SHAPE["num_hidden_layers"]
    assert errors[0] <= 1.15 * errors[1]


def test_less_is_kept_for_the_backward(arithmetic: str) -> None:
    def kept_bytes() -> int:
        kept: dict[int, Tensor] = {}

        def keep(tensor: Tensor) -> Tensor:
            if not isinstance(tensor, nn.Parameter):
                kept[tensor.untyped_storage().data_ptr()] = tensor
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            score(model, **batch(), temperature=1.0)
        weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
        return sum(one.untyped_storage().nbytes() for at, one in kept.items() if at not in weights)

    model = model_of()
    ours = kept_bytes()
    with plain_layers():
        assert ours < 0.75 * kept_bytes()


def with_hooked_linear(model: Any) -> None:
    model.get_submodule("base_model.model.model.layers.1.mlp.up_proj").register_forward_hook(
        lambda module, args, output: output * 1.5
    )


def with_hook_inside_lora(model: Any) -> None:
    name = "base_model.model.model.layers.1.mlp.up_proj.lora_A.default"
    model.get_submodule(name).register_forward_hook(lambda module, args, output: output * 1.5)


def with_trained_norm(model: Any) -> None:
    model.get_submodule("base_model.model.model.layers.1.input_layernorm").requires_grad_(True)


def with_trained_base(model: Any) -> None:
    name = "base_model.model.model.layers.1.mlp.up_proj.base_layer"
    model.get_submodule(name).requires_grad_(True)


def merged(model: Any) -> None:
    model.get_submodule("base_model.model.model.layers.1.self_attn.q_proj").merge()


def with_another_activation(model: Any) -> None:
    model.get_submodule("base_model.model.model.layers.1.mlp").act_fn = nn.GELU()


CHANGES = {
    with_hooked_linear: "hook",
    with_hook_inside_lora: "hook",
    with_trained_norm: "norms are trained",
    with_trained_base: "base weights are trained",
    merged: "merged",
    with_another_activation: "act_fn is torch.nn.modules.activation.GELU",
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_layer_that_is_more_than_it_seems_is_computed_by_its_modules_and_the_reason_said(
    change: Any, fused: list[FusedLayer]
) -> None:
    model = model_of()
    change(model)
    assert_same(learned(model), learned(model, plain=True))
    assert len(fused) == SHAPE["num_hidden_layers"] - 1
    assert CHANGES[change] in str(unsupported_reason(model, FastPart.FUSED_LAYERS))


def test_a_model_of_another_activation_is_scored_and_not_fused(fused: list[FusedLayer]) -> None:
    model = model_of("llama", hidden_act="gelu")
    assert unsupported_reason(model, FastPart.SCORING) is None
    assert "activation is GELU" in str(unsupported_reason(model, FastPart.FUSED_LAYERS))
    assert unsupported_reason(model, FastPart.LORA_PRODUCTS) is None
    assert_same(learned(model), learned(model, plain=True))
    assert not fused


def test_scoring_leaves_nothing_on_the_model() -> None:
    model = model_of()
    before = {name: set(vars(module)) for name, module in model.named_modules()}
    learned(model)
    assert {name: set(vars(module)) for name, module in model.named_modules()} == before
