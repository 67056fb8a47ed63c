"""A kernel with variable lengths serves where it can and is right; otherwise it is said why not,
and scoring goes on without it."""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import pytest
import torch
from torch import Tensor

import flashkernels
from abacist.errors import ModelError
from abacist.policy.choices import choose_attention
from abacist.policy.kernels import build
from abacist.policy.scoring import attention_backend
from abacist.policy.scoring.attention_backend import AttentionBackend, HeadShape

CPU = torch.device("cpu")
GPU = torch.device("cuda", 0)
HEADS = HeadShape(4, 2, 16)
BFLOAT16 = torch.bfloat16


def choose(implementation: str = "sdpa", dtype: torch.dtype = BFLOAT16) -> AttentionBackend:
    return attention_backend.choose_backend(implementation, CPU, dtype, HEADS)


def top_left(*args: Any) -> Tensor:
    """As FlashAttention before 2.1, and as scaled_dot_product_attention means causal."""
    return flashkernels.by_sequence(*args, diagonal="top left")


def without_gradient(*args: Any) -> Tensor:
    return flashkernels.by_sequence(*args).detach()


def not_a_number(*args: Any) -> Tensor:
    return flashkernels.by_sequence(*args) * torch.nan


def unscaled(*args: Any) -> Tensor:
    return flashkernels.by_sequence(*args[:-1], 1.0)


def raising(*args: Any) -> Tensor:
    raise RuntimeError("no kernel image is available for execution on the device\nCompile with")


class _Tripled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor) -> Tensor:
        return value.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return 3 * grad


def wrong_gradient(query: Tensor, key: Tensor, value: Tensor, *args: Any) -> Tensor:
    return flashkernels.by_sequence(query, key, _Tripled.apply(value), *args)


FAULTS = {
    "values are off by": (top_left, not_a_number, unscaled),
    "value gradients are off by": (wrong_gradient,),
    "does not require grad": (without_gradient,),
    "no kernel image is available for execution on the device)": (raising,),
}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["flash", "pytorch"])
def test_a_kernel_that_is_right_serves(
    kind: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    make = flashkernels.flash_attn_2 if kind == "flash" else flashkernels.varlen_attn
    flashkernels.install(monkeypatch, **{kind: make(flashkernels.Calls())})
    found = choose("flash_attention_2" if kind == "flash" else "sdpa", dtype)
    assert found.varlen is not None
    name = {"flash": "FlashAttention's kernel", "pytorch": "PyTorch's flash kernel"}[kind]
    assert found.choice.value == f"{name} for variable lengths"
    assert "right in a trial here" in found.choice.why
    assert not caplog.records


@pytest.mark.parametrize(
    ("said", "attend"), [(said, attend) for said, faults in FAULTS.items() for attend in faults]
)
def test_a_kernel_that_is_wrong_does_not_serve_and_it_is_said_why(
    said: str, attend: flashkernels.Attention, monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    wrong = flashkernels.varlen_attn(flashkernels.Calls(), attend)
    flashkernels.install(monkeypatch, pytorch=wrong)
    with caplog.at_level(logging.WARNING):
        found = choose()
    assert found.varlen is None
    assert "over padded branches" in found.choice.value
    assert said in found.choice.why
    assert [said in record.getMessage() for record in caplog.records] == [True]


def test_a_wrong_flash_attention_leaves_it_to_pytorchs(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = flashkernels.Calls()
    flashkernels.install(
        monkeypatch,
        flash=flashkernels.flash_attn_2(flashkernels.Calls(), top_left),
        pytorch=flashkernels.varlen_attn(calls),
    )
    found = choose("kernels-community/flash-attn2")
    assert found.varlen is not None and len(calls) == 1
    assert found.choice.value.startswith("PyTorch's flash kernel")
    assert found.choice.why.startswith("FlashAttention's kernel is not used: its values are off")


def test_flash_attention_that_cannot_be_had_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    flashkernels.install(monkeypatch)
    found = choose("flash_attention_3")
    assert found.varlen is None
    assert "it failed (No module named 'flash_attn')" in found.choice.why
    assert "it failed (Torch not compiled with CUDA enabled)" in found.choice.why


def test_sdpa_means_pytorchs_even_where_flash_attention_is(monkeypatch: pytest.MonkeyPatch) -> None:
    flash, pytorch = flashkernels.Calls(), flashkernels.Calls()
    flashkernels.install(
        monkeypatch,
        flash=flashkernels.flash_attn_2(flash),
        pytorch=flashkernels.varlen_attn(pytorch),
    )
    choose("sdpa")
    assert (len(flash), len(pytorch)) == (0, 1)
    choose("flash_attention_2")
    assert (len(flash), len(pytorch)) == (1, 1)


def test_a_varlen_attn_that_takes_no_scale_is_not_called(monkeypatch: pytest.MonkeyPatch) -> None:
    def of_2_10(query: Any, key: Any, value: Any, *args: Any, is_causal: bool = False) -> Tensor:
        raise AssertionError

    flashkernels.install(monkeypatch, pytorch=of_2_10)
    assert "has no scale or no window" in choose().choice.why


@pytest.mark.parametrize(
    ("device", "dtype", "heads", "capability", "said"),
    [
        (GPU, torch.float32, HEADS, (9, 0), "bfloat16 or float16, not float32"),
        (GPU, BFLOAT16, HEADS, (7, 5), "older than Ampere"),
        (GPU, BFLOAT16, HeadShape(4, 2, 12), (8, 0), "heads of size 12"),
        (GPU, BFLOAT16, HeadShape(4, 2, 512), (8, 0), "heads of size 512"),
        (torch.device("mps"), torch.float32, HEADS, None, "on mps"),
        (CPU, BFLOAT16, HEADS, None, "on cpu nothing else computes in bfloat16"),
    ],
)
def test_where_no_such_kernel_can_run_none_is_tried(
    device: torch.device,
    dtype: torch.dtype,
    heads: HeadShape,
    capability: tuple[int, int] | None,
    said: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    monkeypatch.setattr(attention_backend, "_fault", lambda *_: pytest.fail("tried"))
    found = attention_backend.choose_backend.__wrapped__("flash_attention_2", device, dtype, heads)
    assert found.varlen is None
    assert said in found.choice.why


@pytest.mark.parametrize("capability", [(8, 0), (9, 0), (12, 0)])
@pytest.mark.parametrize(
    "heads", [HeadShape(12, 2, 128), HeadShape(32, 8, 64), HeadShape(8, 1, 256)]
)
def test_ampere_and_newer_gpus_try_one(
    heads: HeadShape, capability: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    tried: list[Any] = []
    monkeypatch.setattr(attention_backend, "_fault", lambda *args: tried.append(args))
    found = attention_backend.choose_backend.__wrapped__("sdpa", GPU, BFLOAT16, heads)
    assert found.varlen is not None
    assert [(device, dtype, asked) for _, device, dtype, asked in tried] == [(GPU, BFLOAT16, heads)]


@pytest.mark.parametrize("missing", [None, "there is no compiler"])
def test_float32_on_a_cpu_has_a_kernel_of_ours_or_a_reason(
    missing: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(build, "unsupported_reason", lambda: missing)
    choice = attention_backend.choose_backend.__wrapped__("sdpa", CPU, torch.float32, HEADS).choice
    if missing is None:
        assert choice.value == "a kernel of ours, without padding"
    else:
        assert "over padded branches" in choice.value and missing in choice.why


def test_the_choice_is_made_once_in_a_process(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Any] = []
    monkeypatch.setattr(attention_backend, "_without_varlen", lambda *args: made.append(args))
    monkeypatch.setattr(attention_backend, "_fault", lambda *_: None)
    heads = HeadShape(3, 3, 24)  # of no other test
    assert attention_backend.choose_backend("sdpa", GPU, BFLOAT16, heads) is (
        attention_backend.choose_backend("sdpa", GPU, BFLOAT16, heads)
    )
    assert len(made) == 1


def test_flex_attention_is_refused_where_it_cannot_train() -> None:
    with pytest.raises(ModelError, match="flex_attention was asked for, but on a CPU"):
        choose_attention("flex_attention", CPU, torch.float32)


SURROUNDINGS: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "no gradients": torch.no_grad,
    "inference": torch.inference_mode,
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "tensors saved elsewhere": lambda: torch.autograd.graph.saved_tensors_hooks(
        lambda _: pytest.fail("packed"), lambda _: pytest.fail("unpacked")
    ),
}


@pytest.mark.parametrize("name", SURROUNDINGS)
def test_the_trial_is_the_same_whatever_goes_on_around_it(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    flashkernels.install(
        monkeypatch, pytorch=flashkernels.varlen_attn(flashkernels.Calls(), wrong_gradient)
    )
    expected = choose().choice
    attention_backend._small_tree.cache_clear()
    torch.manual_seed(7)
    generator_state = torch.get_rng_state()
    with SURROUNDINGS[name]():
        enabled = torch.is_grad_enabled()
        assert choose().choice == expected
        assert torch.is_grad_enabled() is enabled
    assert torch.equal(torch.get_rng_state(), generator_state)
    assert choose().choice == expected  # what inference mode made can be used outside of it
