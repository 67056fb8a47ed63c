"""A base in 8 bits on a CPU: what is rounded once, and that nothing is rounded after that."""

from __future__ import annotations

import copy
import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors import safe_open
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

from abacist.delivery.bundle import bundle
from abacist.delivery.export import ExportRequest, export
from abacist.delivery.verify import Request, verify
from abacist.errors import ModelError, UsageError
from abacist.learning.config import load_config
from abacist.policy import mxint8, quantization
from abacist.policy.decoding import network
from abacist.policy.decoding.engine import Engine
from abacist.policy.families import FastPart, unsupported_linear, unsupported_reason
from abacist.policy.kernels import build
from abacist.policy.kernels.blocks import BLOCK, Blocks
from abacist.policy.kernels.decode import Adapter, Packed
from abacist.policy.kernels.multiply import multiply, multiply_row
from abacist.policy.loading import Policy, default_lora, load_policy
from abacist.policy.quantization import Quantization
from abacist.policy.scoring.score import score
from adapters import stir
from bundles import short_run, tampered

needs_kernels = pytest.mark.skipif(build.library() is None, reason=str(build.unsupported_reason()))
ASKED = Quantization(8)
ON_CPU = ("--device", "cpu")


def in_8_bits(**how: Any) -> Policy:
    """The built-in model held so, under an adapter that does something."""
    options = {"quantization": ASKED, "dtype": "bfloat16", "device": "cpu", **how}
    policy = load_policy("tiny", lora=default_lora(), **options)
    stir(policy.model)
    return policy


def held_layers(model: nn.Module) -> list[mxint8.Linear]:
    return [module for module in model.modules() if type(module) is mxint8.Linear]


# --- What is rounded ---


@given(
    st.lists(
        st.floats(allow_nan=False, allow_infinity=False, width=32), min_size=BLOCK, max_size=BLOCK
    )
)
def test_a_block_keeps_seven_bits_of_its_largest_number(numbers: list[float]) -> None:
    weight = torch.tensor([numbers])
    dense = Blocks.of(weight).dense(torch.float32)
    assert dense.isfinite().all()
    # Half a unit of the codes and, where the largest would need an eighth bit, all of one.
    tolerance = max(float(weight.abs().max()) / 64, 2.0**-126)
    assert (dense - weight).abs().max() <= tolerance
    assert not ((dense * weight.sign()) < 0).any()
    assert torch.equal(dense.bfloat16().float(), dense), "exact in bfloat16"
    assert torch.equal(Blocks.of(dense).dense(torch.float32), dense), "rounding again changes none"


def test_a_block_is_what_the_specification_says() -> None:
    """OCP MX 1.0: a byte of exponent with a bias of 127, and integers in 64ths."""
    weight = torch.zeros(1, 2 * BLOCK)
    weight[0, 0], weight[0, 1], weight[0, BLOCK] = 1.5, -0.25, -0.0625
    rows = Blocks.of(weight).rows
    assert rows.shape == (1, 2 * BLOCK + 2)
    codes, exponents = rows[0, : 2 * BLOCK].view(torch.int8), rows[0, 2 * BLOCK :]
    assert (codes[0], codes[1], exponents[0]) == (96, -16, 127)
    assert (codes[BLOCK], exponents[1]) == (-64, 127 - 4)
    assert codes.count_nonzero() == 3


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused_by_name(bad: float) -> None:
    model = load_policy("tiny", device="cpu").model
    model.model.layers[1].mlp.up_proj.weight.data[3, 5] = bad
    with pytest.raises(ModelError, match=r"not finite.*layers\.1\.mlp\.up_proj"):
        mxint8.hold_in_blocks(model, torch.float32)


def test_a_model_of_which_nothing_would_be_held_so_is_refused() -> None:
    config = GPT2Config(n_layer=1, n_embd=32, n_head=2, vocab_size=40, n_positions=16)
    with pytest.raises(ModelError, match="GPT2LMHeadModel can be held in 8 bits"):
        mxint8.hold_in_blocks(GPT2LMHeadModel(config), torch.float32)


def test_dora_which_reads_the_weights_is_refused_by_its_flags() -> None:
    with pytest.raises(UsageError, match="--load_in_8bit with --use_dora on a CPU"):
        load_config("tiny", None, [*ON_CPU, "--load_in_8bit", "--use_dora"])


# --- The kernels ---


@needs_kernels
@pytest.mark.parametrize("precision", ["highest", "medium"])
def test_products_are_those_of_the_same_numbers_in_bfloat16_to_the_bit(
    precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: precision)
    torch.manual_seed(0)
    for rows, outputs, inputs in itertools.product((1, 5, 33, 130), (5, 32, 97), (32, 96, 544)):
        blocks = Blocks.of(torch.randn(outputs, inputs) * 0.02)
        dense = blocks.dense(torch.bfloat16)
        x, bias, grad = torch.randn(rows, inputs), torch.randn(outputs), torch.randn(rows, outputs)
        low_rank = torch.randn(rows, 4), torch.randn(outputs, 4)
        for held in (None, low_rank):
            expected = multiply(x, dense, bias, low_rank=held)
            assert torch.equal(multiply(x, blocks, bias, low_rank=held), expected)
        assert torch.equal(multiply(grad, blocks.t()), multiply(grad, dense.t()))
        for gated in (False, True):
            other = Blocks.of(torch.randn(outputs, inputs))
            adapters = [[Adapter(torch.randn(4, inputs), torch.randn(outputs, 4))], []]
            packed, expected_by = (
                Packed(weights, [bias, None], gated=gated, adapters=adapters)
                for weights in ([blocks, other], [dense, other.dense(torch.bfloat16)])
            )
            assert torch.equal(packed(x), expected_by(x))


@needs_kernels
def test_more_inputs_than_a_sum_is_taken_over_at_once() -> None:
    torch.manual_seed(0)
    blocks = Blocks.of(torch.randn(40, 4096 + 64))
    x = torch.randn(3, 4096 + 64)
    assert torch.equal(multiply(x, blocks), multiply(x, blocks.dense(torch.bfloat16)))


@needs_kernels
def test_a_single_row_is_multiplied_in_place() -> None:
    torch.manual_seed(0)
    blocks, bias = Blocks.of(torch.randn(70, 160)), torch.randn(70)
    x = torch.randn(1, 160)
    expected = x.double() @ blocks.dense(torch.float64).t() + bias
    assert torch.allclose(multiply_row(x, blocks, bias).double(), expected, atol=1e-5)


# --- A model ---


@needs_kernels
def test_every_linear_layer_but_the_head_is_held_in_8_bits_and_counted_whole() -> None:
    under_an_adapter = load_policy("tiny", lora=default_lora(), device="cpu")
    plain, held = load_policy("tiny", device="cpu").model, in_8_bits().model.get_base_model()
    layers = held_layers(held)
    assert len(layers) == 7 * plain.config.num_hidden_layers
    assert type(held.lm_head) is nn.Linear
    numbers = sum(layer.in_features * layer.out_features for layer in layers)
    assert sum(layer.weight.nbytes for layer in layers) == numbers * 33 // 32
    frozen = [p for p in held.parameters() if not p.requires_grad]
    counted = quantization.num_weights(frozen) - mxint8.num_exponents(held)
    assert counted == sum(p.numel() for p in plain.parameters())
    counts = [choice for choice in in_8_bits().choices if choice.what == "weights"]
    assert counts == [choice for choice in under_an_adapter.choices if choice.what == "weights"]


@needs_kernels
def test_it_computes_what_the_rounded_weights_in_bfloat16_do_to_the_bit() -> None:
    """Decoding, log-probabilities and gradients, by our parts."""
    found = []
    held, rounded = in_8_bits(), in_8_bits(dequantized=True)
    # PEFT rounds a new adapter to the dtype of the weights it is put around.
    adapter = get_peft_model_state_dict(held.model)
    set_peft_model_state_dict(rounded.model, adapter)
    for policy in (held, rounded):
        model = policy.model
        for part in (FastPart.DECODING, FastPart.SCORING, FastPart.FUSED_LAYERS):
            assert unsupported_reason(model, part) is None
        engine = Engine(model, stop_ids=policy.chat.stop_ids, pad_id=0, max_rows=8)
        written = engine.complete([[5, 9, 23, 40, 7], [11, 12, 13]], 2, 12, None)
        ids = torch.randint(5, 300, (4, 14), generator=torch.Generator().manual_seed(2))
        ids[:, :8] = ids[0, :8]
        logps, _ = score(model, ids, torch.ones_like(ids), 6, temperature=1.0, compute_entropy=True)
        (logps * torch.linspace(-1, 1, 24).view(4, 6)).sum().backward()
        gradient = torch.cat([w.grad.flatten() for w in model.parameters() if w.grad is not None])
        found.append((written, logps, gradient))
    (written, logps, gradient), (written_2, logps_2, gradient_2) = found
    assert written == written_2
    assert torch.equal(logps, logps_2)
    assert float(gradient.norm()) > 0
    assert torch.equal(gradient, gradient_2)


@needs_kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_modules_own_forward_and_gradient_are_those_of_the_dense_layer(
    dtype: torch.dtype,
) -> None:
    """For whatever our parts do not support."""
    torch.manual_seed(0)
    dense = nn.Linear(64, 24, dtype=dtype)
    held = mxint8.Linear(Blocks.of(dense.weight), copy.deepcopy(dense.bias))
    dense.weight.data = held.blocks.dense(dtype)
    x = torch.randn(2, 3, 64, dtype=dtype, requires_grad=True)
    tolerance = 1e-5 if dtype == torch.float32 else 0.05
    y, expected = held(x), dense(x)
    assert y.dtype == dtype
    assert torch.allclose(y, expected, atol=tolerance)
    (grad,) = torch.autograd.grad(y.float().pow(2).sum(), x)
    (expected_grad,) = torch.autograd.grad(expected.float().pow(2).sum(), x)
    assert torch.allclose(grad, expected_grad, atol=10 * tolerance)


def test_without_kernels_the_base_is_rounded_and_held_in_its_dtype(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(build, "library", lambda: None)
    policy = load_policy("tiny", quantization=ASKED, device="cpu")
    assert not held_layers(policy.model)
    weight = policy.model.model.layers[0].mlp.up_proj.weight
    assert torch.equal(Blocks.of(weight).dense(weight.dtype), weight)
    (choice,) = [choice for choice in policy.choices if choice.what == "base"]
    assert choice.value == "8 bits (MXINT8)"
    assert "held in float32" in choice.why


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole run on 8 bits, without bitsandbytes."""
    return short_run(tmp_path_factory.mktemp("in 8 bits") / "run", "--load_in_8bit", *ON_CPU)


@needs_kernels
def test_the_adapter_says_how_its_base_was_held_which_comes_back_so(run: Path) -> None:
    recorded = json.loads((run / "adapter_config.json").read_text(encoding="utf-8"))[
        "quantization_config"
    ]
    assert recorded == {"quant_method": "mxint8"}
    with safe_open(run / "adapter_model.safetensors", "pt") as stored:
        dtypes = {str(stored.get_tensor(name).dtype) for name in stored.keys()}  # noqa: SIM118
    assert dtypes == {"torch.float32"}
    again = load_policy(str(run), device="cpu")
    assert held_layers(again.model)
    choices = {choice.what: choice for choice in again.choices}
    assert choices["base"].value == "8 bits (MXINT8)"
    assert "adapter learned on it" in choices["base"].why


@needs_kernels
def test_merged_it_computes_what_the_base_in_8_bits_and_the_adapter_did(run: Path) -> None:
    held = load_policy(str(run), device="cpu", dtype="float32").model
    dense = load_policy(str(run), device="cpu", dtype="float32", dequantized=True).model
    ids = torch.tensor([[5, 9, 23, 40, 7]])
    with torch.no_grad():
        expected = held(input_ids=ids).logits
        assert torch.allclose(dense.merge_and_unload()(input_ids=ids).logits, expected, atol=1e-4)
        full = PeftModel.from_pretrained(load_policy("tiny", device="cpu").model, str(run))
        assert not torch.allclose(full(input_ids=ids).logits, expected, atol=1e-3)


@needs_kernels
def test_its_bundle_is_replayed_with_the_base_rounded_as_it_was(run: Path, tmp_path: Path) -> None:
    made = bundle(run, tmp_path / "run.bundle.zip")
    found = verify(Request(made.path, replies=8, device="cpu"))
    replay = {check.name: check for check in found.checks}["replay"]
    assert replay.holds and not replay.is_incomplete, replay

    def forget(index: Any, members: dict[str, bytes]) -> None:
        lines = members["run/config.yaml"].decode().splitlines(keepends=True)
        kept = [line for line in lines if "load_in_8bit" not in line]
        assert len(kept) == len(lines) - 1
        members["run/config.yaml"] = "".join(kept).encode()
        adapter = json.loads(members["run/adapter_config.json"])
        del adapter["quantization_config"]
        members["run/adapter_config.json"] = json.dumps(adapter).encode()

    other = tampered(made.path, tmp_path / "other.bundle.zip", forget, anew=True)
    replay = {check.name: check for check in verify(Request(other, replies=500)).checks}["replay"]
    assert not replay.holds, "other weights write other replies"


@needs_kernels
def test_a_single_reply_is_written_without_a_copy_and_is_the_same(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    policy = in_8_bits()

    def written() -> list[int]:
        engine = Engine(policy.model, stop_ids=policy.chat.stop_ids, pad_id=0, max_rows=1)
        ((tokens,),) = engine.complete([[5, 9, 23, 40, 7]], 1, 16, None)
        return tokens

    copied = written()
    monkeypatch.setattr(network, "NO_COPY_WEIGHTS", 1)
    monkeypatch.setattr(network, "_unmerged", None)  # what copies
    assert written() == copied


@needs_kernels
def test_a_base_stored_in_float32_is_rounded_once_whatever_dtype_the_rest_is_held_in() -> None:
    """The built-in model is stored so: by way of bfloat16 it would be another base."""
    found = [
        load_policy("tiny", quantization=ASKED, device="cpu", dtype=dtype).model
        for dtype in ("float32", "bfloat16")
    ]
    for one, other in zip(*map(held_layers, found), strict=True):
        assert torch.equal(one.weight, other.weight)
    assert [model.model.norm.weight.dtype for model in found] == [torch.float32, torch.bfloat16]


@needs_kernels
def test_layers_whose_biases_are_trained_are_not_fused() -> None:
    policy = load_policy("tiny", quantization=ASKED, device="cpu", lora=default_lora())
    layer = policy.model.get_base_model().model.layers[0].self_attn.q_proj.base_layer
    layer.bias = nn.Parameter(torch.zeros(layer.out_features))
    reason = unsupported_reason(policy.model, FastPart.FUSED_LAYERS)
    assert reason is not None
    layer.bias.requires_grad_(False)
    assert unsupported_linear(layer, FastPart.FUSED_LAYERS, torch.float32) is None
    layer.bias.requires_grad_(True)
    found = unsupported_linear(layer, FastPart.FUSED_LAYERS, torch.float32)
    assert found == "its base weights are trained"


@needs_kernels
def test_weights_held_differently_are_not_packed_into_one_product() -> None:
    policy = load_policy("tiny", quantization=ASKED, device="cpu", dtype="bfloat16")
    attention = policy.model.model.layers[0].self_attn
    held = attention.k_proj
    dense = nn.Linear(held.in_features, held.out_features, dtype=torch.bfloat16)
    dense.weight.data = held.blocks.dense(torch.bfloat16)
    dense.requires_grad_(False)
    assert unsupported_reason(policy.model, FastPart.DECODING) is None
    attention.k_proj = dense
    reason = str(unsupported_reason(policy.model, FastPart.DECODING))
    assert "in 8 bits and others of the same input not" in reason
    with pytest.raises(AssertionError):
        Packed([attention.q_proj.blocks, dense.weight], [None, None])


@needs_kernels
def test_an_exported_adapter_says_which_base_it_is_for_and_is_verified_on_it(
    run: Path, tmp_path: Path
) -> None:
    exported = export(ExportRequest(str(run), "adapter", tmp_path / "adapter", device="cpu"))
    assert any("8 bits (MXINT8)" in note and "--to merged" in note for note in exported.notes)
    further = short_run(
        tmp_path / "further", "--model_name_or_path", str(tmp_path / "adapter"), *ON_CPU
    )
    made = bundle(further, tmp_path / "further.bundle.zip")
    asked = Request(made.path, replies=8, device="cpu", model=str(tmp_path / "adapter"))
    replay = {check.name: check for check in verify(asked).checks}["replay"]
    assert replay.holds, replay
