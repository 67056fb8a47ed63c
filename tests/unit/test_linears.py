"""The linear layers' shorter forward is PEFT's and PyTorch's function, forward and backward."""

from __future__ import annotations

import copy
from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.utils.checkpoint import checkpoint

from abacist.policy.kernels import build
from abacist.policy.scoring.linears import call_linear, product, product_added


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(24, 40)
        self.second = nn.Linear(40, 8, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(torch.tanh(self.first(x)))


def adapted(dropout: float = 0.0, **lora: Any) -> Any:
    torch.manual_seed(0)
    config = LoraConfig(
        target_modules=["first", "second"], r=4, lora_alpha=12, lora_dropout=dropout, **lora
    )
    model = get_peft_model(Two(), config)
    for name, weight in model.named_parameters():
        if "lora_B" in name:  # zero at first, and then nothing could be told apart
            nn.init.normal_(weight, std=0.2)
    return model


def learned(model: Any, x: torch.Tensor, through: Any = None) -> dict[str, torch.Tensor]:
    """What a forward and a backward give: the output and every gradient."""
    x = x.clone().requires_grad_()
    y = model(x) if through is None else through(model, x)
    model.zero_grad()
    y.float().pow(2).sum().backward()
    grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return {"y": y.detach(), "x": x.grad, **grads}


def assert_same(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        torch.testing.assert_close(ours[name], value, rtol=1e-5, atol=1e-5, msg=name)


def through_ours(model: Any, x: torch.Tensor) -> torch.Tensor:
    """What ``model`` computes, its linear layers called as the packed forward calls them."""
    two = model.base_model.model if hasattr(model, "base_model") else model
    return call_linear(two.second, torch.tanh(call_linear(two.first, x)))


@pytest.mark.parametrize("shape", [(7, 24), (2, 5, 24), (1, 1, 24), (0, 24)])
def test_a_fused_adapter_gives_pefts_output_and_gradients(shape: tuple[int, ...]) -> None:
    model, x = adapted(), torch.randn(shape)
    assert_same(learned(model, x, through_ours), learned(model, x))


def test_the_fused_forward_really_runs_and_a_wrong_one_would_be_seen() -> None:
    model, x = adapted(), torch.randn(7, 24)
    theirs = learned(model, x)
    made_by = call_linear(model.base_model.model.first, x).grad_fn
    assert "_LoraBackward" in {type(made_by).__name__, type(made_by.next_functions[0][0]).__name__}
    model.base_model.model.first.scaling["default"] *= 1.001
    with pytest.raises(AssertionError):
        assert_same(learned(model, x, through_ours), theirs)


def test_full_fine_tuning_gives_pytorchs_output_and_gradients() -> None:
    torch.manual_seed(0)
    model, x = Two(), torch.randn(3, 5, 24)
    assert_same(learned(model, x, through_ours), learned(model, x))


def test_a_checkpointed_layer_is_recomputed_alike() -> None:
    def through(model: Any, x: torch.Tensor) -> torch.Tensor:
        return checkpoint(through_ours, model, x, use_reentrant=False)

    model, x = adapted(), torch.randn(7, 24)
    assert_same(learned(model, x, through), learned(model, x))


@pytest.mark.parametrize("state", ["disabled", "merged", "dropout", "two adapters", "dora"])
def test_what_the_short_forward_does_not_know_stays_pefts(state: str) -> None:
    model = adapted(dropout=0.3 if state == "dropout" else 0.0, use_dora=state == "dora")
    if state == "two adapters":
        model.add_adapter("other", LoraConfig(target_modules=["first"], r=2))
        model.base_model.set_adapter(["default", "other"])
    x = torch.randn(7, 24)
    if state == "disabled":
        with model.disable_adapter(), torch.no_grad():
            torch.testing.assert_close(through_ours(model, x), model(x))
        return
    if state == "merged":
        model.merge_adapter()
        with torch.no_grad():
            torch.testing.assert_close(through_ours(model, x), model(x))
        model.unmerge_adapter()
    results = []
    for through in (through_ours, None):
        torch.manual_seed(1)  # the same dropout
        results.append(learned(model, x, through))
    assert_same(*results)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_bfloat16_is_no_further_from_float32_than_pefts(dtype: torch.dtype) -> None:
    # float32 weights under autocast, as TRL trains a LoRA; and everything in bfloat16.
    model, x = adapted(), torch.randn(64, 24)
    exact = learned(model, x)

    def error(through: Any) -> dict[str, float]:
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.float32):
            found = learned(copy.deepcopy(model).to(dtype), x.to(dtype), through)
        return {name: float((value.float() - exact[name]).norm()) for name, value in found.items()}

    ours, theirs = error(through_ours), error(None)
    for name in theirs:
        assert ours[name] <= 1.3 * theirs[name] + 1e-6, name


@settings(deadline=None)
@given(
    sizes=st.tuples(*(st.integers(0, 80),) * 3),
    transposed=st.tuples(*(st.booleans(),) * 4),
    biased=st.booleans(),
    threads=st.sampled_from([1, 2]),
    rank=st.none() | st.integers(0, 40),
)
def test_products_are_exact_in_every_shape_however_the_matrices_lie_in_memory(
    sizes: tuple[int, int, int],
    transposed: tuple[bool, ...],
    biased: bool,
    threads: int,
    rank: int | None,
) -> None:
    rows, inputs, outputs = sizes
    generator = torch.Generator().manual_seed(rows + 81 * inputs + 6561 * outputs)
    ranks = rank or 0
    x, weight, to, low_x, low_weight = (
        torch.randn(shape, generator=generator)
        for shape in (
            (rows, inputs), (outputs, inputs), (rows, outputs), (rows, ranks), (outputs, ranks)
        )
    )  # fmt: skip
    bias = torch.randn(outputs, generator=generator) if biased else None
    exact = x.double() @ weight.double().t() + low_x.double() @ low_weight.double().t()
    x, weight, low_x, low_weight = (
        one.t().contiguous().t() if turned else one
        for one, turned in zip((x, weight, low_x, low_weight), transposed, strict=True)
    )
    low_rank = None if rank is None else (low_x, low_weight)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with mock.patch.object(build, "_WORTH_A_THREAD", 1.0):
            found = product(x, weight, bias, low_rank)
            added = product_added(x, weight, to.clone(), low_rank)
    finally:
        torch.set_num_threads(before)
    shifted = exact if bias is None else exact + bias.double()
    torch.testing.assert_close(found.double(), shifted, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(added.double(), exact + to.double(), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("shape", [(3, 9000, 33, 600), (130, 4100, 16, 5), (97, 64, 300, 32)])
def test_a_product_of_low_rank_is_added_once_whatever_the_pieces_of_the_others(
    shape: tuple[int, int, int, int],
) -> None:
    rows, inputs, outputs, rank = shape
    x, weight = torch.randn(rows, inputs), torch.randn(outputs, inputs) / inputs**0.5
    low_x, low_weight = torch.randn(rows, rank), torch.randn(outputs, rank)
    exact = x.double() @ weight.double().t() + low_x.double() @ low_weight.double().t()
    found = product(x, weight, low_rank=(low_x, low_weight))
    torch.testing.assert_close(found.double(), exact, rtol=1e-5, atol=1e-4)
    alone = product(x[2:3], weight, low_rank=(low_x[2:3], low_weight))
    assert torch.equal(alone, found[2:3])


def test_other_dtypes_are_multiplied_by_pytorch() -> None:
    x, weight = torch.randn(9, 6).double(), torch.randn(5, 6).double()
    assert torch.equal(product(x, weight), torch.nn.functional.linear(x, weight))
    low_rank = torch.randn(9, 2).double(), torch.randn(5, 2).double()
    exact = x @ weight.t() + low_rank[0] @ low_rank[1].t()
    torch.testing.assert_close(product(x, weight, low_rank=low_rank), exact)
    added = product_added(x, weight, torch.ones(9, 5).double(), low_rank)
    torch.testing.assert_close(added, exact + 1)
