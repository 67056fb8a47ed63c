"""With a variable-length kernel scoring computes what it computes without: its own stand-ins here
take the place of kernels that need a GPU."""

from __future__ import annotations

import copy
import functools
import sys
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import modeling_flash_attention_utils

import flashkernels
from abacist.policy.families import FastPart, unsupported_reason
from abacist.policy.kernels import tree_attention
from abacist.policy.model_parts import base_of
from abacist.policy.scoring import attention_backend
from abacist.policy.scoring.attention_backend import (
    AttentionBackend,
    Sequences,
    VarlenAttention,
    flash_kernel,
    pytorch_kernel,
)
from abacist.policy.scoring.packing import GatherRows, pack
from abacist.policy.scoring.score import attention_choice
from unit.test_scoring import BATCHES, batch_of, compare, distance, gradients, make, ours

KERNELS = {
    "flash_attn 2": ("flash_attention_2", flashkernels.flash_attn_2),
    "flash_attn 3": ("flash_attention_3", flashkernels.flash_attn_3),
    "PyTorch": ("sdpa", flashkernels.varlen_attn),
    "an older PyTorch": ("sdpa", flashkernels.varlen_attn_without_gqa),
}


class Serving:
    """A kernel that serves, what it has been called with, and models that are set to it."""

    def __init__(
        self, name: str, monkeypatch: pytest.MonkeyPatch, *, on_trial: bool = False
    ) -> None:
        self.implementation, make_kernel = KERNELS[name]
        self.calls = flashkernels.Calls()
        kernel = make_kernel(self.calls)
        which = "pytorch" if self.implementation == "sdpa" else "flash"
        flashkernels.install(monkeypatch, **{which: kernel})
        if on_trial:  # made for half precision: sums in another order are off by more steps
            monkeypatch.setattr(attention_backend, "_ALLOWED_STEPS", 100)
        else:  # test_attention_backend.py is about that
            monkeypatch.setattr(attention_backend, "_fault", lambda *_: None)

    def model(self, *args: Any, **kwargs: Any) -> Any:
        model = make(*args, **kwargs)
        # Past transformers' own check for the package.
        base_of(model).config._attn_implementation_internal = self.implementation
        return model


def padded(backend: AttentionBackend, packing: Any) -> Any:
    """In the place of :meth:`AttentionBackend.on`: no variable-length kernel."""
    return functools.partial(attention_backend._attend, packing)


@pytest.fixture
def by_pytorch(monkeypatch: pytest.MonkeyPatch) -> Serving:
    return Serving("PyTorch", monkeypatch)


CASES = [
    *(("PyTorch", family, batch) for family in ("llama", "qwen2") for batch in BATCHES),
    *((kernel, "qwen2", "few-shot") for kernel in KERNELS if kernel != "PyTorch"),
]


@pytest.mark.parametrize(("kernel", "family", "name"), CASES)
def test_values_and_gradients_are_those_of_stock_trl(
    kernel: str, family: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    serving = Serving(kernel, monkeypatch)
    model = serving.model(family)
    assert unsupported_reason(model, FastPart.SCORING) is None
    assert "for variable lengths" in attention_choice(model).value
    logps, entropies, gradient = compare(_with_stock_forward(model), batch_of(name))
    assert max(logps, entropies) < 1e-5
    assert gradient < 1e-5
    assert len(serving.calls) == 2  # one for each layer, whatever the number of levels


def _with_stock_forward(model: Any) -> Any:
    """Ours attends by the stand-in; TRL's own forward, which is compared with, by PyTorch."""
    config = base_of(model).config
    implementation = config._attn_implementation
    plain: Callable[..., Any] = model.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        config._attn_implementation_internal = "sdpa"
        try:
            return plain(*args, **kwargs)
        finally:
            config._attn_implementation_internal = implementation

    model.forward = forward
    return model


@pytest.mark.parametrize("reentrant", [False, True])
def test_layers_that_are_recomputed_attend_by_the_same_kernel(
    reentrant: bool, by_pytorch: Serving
) -> None:
    model = by_pytorch.model("qwen2")
    plain = gradients(model, ours(model, *batch_of("few-shot"))[0])
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    by_pytorch.calls.clear()
    assert distance(gradients(model, ours(model, *batch_of("few-shot"))[0]), plain) < 1e-6
    assert len(by_pytorch.calls) == 4


def test_the_trial_may_fall_into_a_checkpointed_forward(monkeypatch: pytest.MonkeyPatch) -> None:
    serving = Serving("PyTorch", monkeypatch, on_trial=True)
    model = serving.model("qwen2", checkpointing=True)
    first = gradients(model, ours(model, *batch_of("few-shot"))[0])
    assert len(serving.calls) == 1 + 4
    with torch.no_grad():
        ours(model, *batch_of("few-shot"))
    assert torch.equal(first, gradients(model, ours(model, *batch_of("few-shot"))[0]))


def test_rows_left_out_are_not_read(by_pytorch: Serving) -> None:
    model, (ids, mask, width) = by_pytorch.model("qwen2"), batch_of("groups and singletons")
    skip = torch.tensor([True, False, False, True, False, False, True])
    whole, _ = ours(model, ids, mask, width)
    by_pytorch.calls.clear()
    part, _ = ours(model, ids, mask, width, skip_rows=skip)
    assert torch.equal(part[skip], torch.zeros_like(part[skip]))
    assert torch.allclose(part[~skip], whole[~skip], atol=1e-5)
    packing = pack(ids, mask, width, skip)
    assert packing is not None
    assert [call["tokens"] for call in by_pytorch.calls] == [len(packing.token_ids)] * 2


def test_a_branch_has_the_keys_of_all_it_grew_from_and_then_its_own() -> None:
    branches = torch.tensor([(0, 2, -1), (2, 1, 0), (3, 2, 0), (5, 1, 2), (6, 2, 1)])
    sequences = Sequences.of(branches, torch.device("cpu"))
    keys = sequences.keys.split(sequences.key_ends.diff().tolist())
    assert [own.tolist() for own in keys] == [
        [0, 1],
        [0, 1, 2],
        [0, 1, 3, 4],
        [0, 1, 3, 4, 5],
        [0, 1, 2, 6, 7],
    ]
    assert sequences.query_ends.tolist() == [0, 2, 3, 5, 6, 8]
    assert (sequences.most_queries, sequences.most_keys) == (2, 5)


@pytest.mark.parametrize("weights", ["bfloat16", "autocast"])
@pytest.mark.parametrize("name", ["groups", "few-shot"])
def test_bfloat16_gradients_are_as_near_to_float32_as_without_it(
    weights: str, name: str, by_pytorch: Serving, monkeypatch: pytest.MonkeyPatch
) -> None:
    serving = by_pytorch
    errors = {"kernel": 0.0, "padded": 0.0}
    for seed in range(3):
        model, batch = serving.model("qwen2", "full"), batch_of(name, seed)
        if weights == "bfloat16":  # the same numbers in both dtypes
            for weight in model.parameters():
                weight.data = weight.data.bfloat16().float()
        with monkeypatch.context() as without:
            without.setattr(AttentionBackend, "on", padded)
            exact = gradients(model, ours(model, *batch)[0])
        low = copy.deepcopy(model)
        if weights == "bfloat16":
            low = low.to(torch.bfloat16)
        for who in errors:
            with monkeypatch.context() as without:
                if who == "padded":
                    without.setattr(AttentionBackend, "on", padded)
                else:
                    serving.calls.clear()
                with torch.autocast("cpu", torch.bfloat16, enabled=weights == "autocast"):
                    logps, _ = ours(low, *batch)
            errors[who] += distance(gradients(low, logps), exact)
            assert len(serving.calls) >= 2
    assert errors["kernel"] <= 1.05 * errors["padded"], errors


def test_many_small_gradients_of_one_key_are_not_lost_in_bfloat16(by_pytorch: Serving) -> None:
    tokens = torch.ones(1, 2, 4, dtype=torch.bfloat16, requires_grad=True)
    repeated = GatherRows.apply(tokens, torch.zeros(1000, dtype=torch.int64), torch.bfloat16)
    repeated.backward(torch.full_like(repeated, 0.1))
    expected = 1000 * float(torch.tensor(0.1).bfloat16())
    assert tokens.grad is not None
    assert torch.allclose(tokens.grad.float(), torch.tensor(expected), rtol=2**-8)


@pytest.mark.parametrize("fault", ["neighbour", "forerunner"])
def test_a_wrong_key_would_be_noticed(
    fault: str, by_pytorch: Serving, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = by_pytorch.model("qwen2")
    right = Sequences.of

    def wrong(branches: torch.Tensor, device: torch.device) -> Sequences:
        branches = branches.clone()
        if fault == "neighbour":
            branches[4:, 2] = branches[4:, 2].roll(1)
            return right(branches, device)
        sequences = right(branches, device)
        sequences.keys[sequences.key_ends[5]] += 1
        return sequences

    monkeypatch.setattr(Sequences, "of", wrong)
    logps, _, gradient = compare(model, batch_of("few-shot"))
    assert min(logps, gradient) > 1e-4


@pytest.mark.parametrize("how", ["PyTorch", "transformers"])
def test_a_wish_for_determinism_reaches_flash_attention(
    how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    serving = Serving("flash_attn 2", monkeypatch)
    model = serving.model("qwen2")
    ours(model, *batch_of("one group"))
    assert not any(call["deterministic"] for call in serving.calls)
    serving.calls.clear()
    if how == "transformers":
        monkeypatch.setenv("FLASH_ATTENTION_DETERMINISTIC", "1")
    else:
        monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)
    ours(model, *batch_of("one group"))
    assert [call["deterministic"] for call in serving.calls] == [True, True]


def test_a_batch_without_a_kernel_is_read_as_before(monkeypatch: pytest.MonkeyPatch) -> None:
    flashkernels.install(monkeypatch)
    monkeypatch.setattr(tree_attention, "supports", lambda *_: False)
    assert max(compare(make("llama"), batch_of("few-shot"))) < 1e-5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_pytorchs_own_operator_takes_what_it_is_given(dtype: torch.dtype) -> None:
    """The real one, forward and backward, on tensors that have shapes and no numbers."""
    with FakeTensorMode():
        query, key, value = (
            torch.empty(1, heads, 8, 16, dtype=dtype, requires_grad=True) for heads in (4, 2, 2)
        )
        sequences = Sequences(
            torch.empty(12, dtype=torch.int64),
            *(torch.empty(4, dtype=torch.int32) for _ in range(2)),
            most_queries=5,
            most_keys=7,
        )
        out = VarlenAttention(pytorch_kernel(), sequences)(query, key, value, 0.25)
        assert (out.shape, out.dtype) == ((1, 8, 4, 16), dtype)
        out.sum().backward()
        assert query.grad is not None and query.grad.shape == query.shape
        assert key.grad is not None and key.grad.shape == key.shape


def test_flash_attention_is_found_where_transformers_keeps_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    calls = flashkernels.Calls()
    package = SimpleNamespace(
        flash_attn_func=pytest.fail,
        flash_attn_varlen_func=flashkernels.flash_attn_2(calls),
        flash_attn_with_kvcache=None,
    )
    padding = SimpleNamespace(pad_input=pytest.fail, unpad_input=pytest.fail)
    monkeypatch.setitem(sys.modules, "flash_attn", package)
    monkeypatch.setitem(sys.modules, "flash_attn.bert_padding", padding)
    monkeypatch.setattr(modeling_flash_attention_utils, "is_flash_attn_2_available", lambda: True)
    for name in [name for name in vars(modeling_flash_attention_utils) if name.endswith("_fn")]:
        monkeypatch.setattr(modeling_flash_attention_utils, name, None)  # put back afterwards
    monkeypatch.setattr(modeling_flash_attention_utils, "_loaded_implementation", None)
    sequences = Sequences.of(torch.tensor([(0, 3, -1), (3, 2, 0)]), torch.device("cpu"))
    query, key, value = (torch.randn(1, heads, 5, 8) for heads in (4, 2, 2))
    out = VarlenAttention(flash_kernel("flash_attention_2"), sequences)(query, key, value, 1.0)
    assert out.shape == (1, 5, 4, 8)
    assert calls == [{"tokens": 5, "keys": 8, "deterministic": False}]
