"""``float32_matmul_precision=medium``: inputs are rounded to bfloat16 once, and nothing else is."""

from __future__ import annotations

import contextlib
import copy
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

from abacist.errors import ModelError
from abacist.policy import choices
from abacist.policy.choices import explain_matmul_precision, float32_matmul_precision
from abacist.policy.decoding.engine import Engine, Sampling
from abacist.policy.kernels import build
from abacist.policy.kernels.decode import Adapter, Packed
from abacist.policy.kernels.multiply import multiply
from abacist.policy.scoring.score import score
from imported import Imported

pytestmark = pytest.mark.skipif(
    build.library() is None, reason=f"there are no kernels: {build.unsupported_reason()}"
)
LANES = build.library().kernels_lanes() if build.library() else 4
sizes = st.integers(1, 5 * LANES)


@pytest.fixture(autouse=True, scope="module")
def pairs() -> Iterator[None]:
    """Products in pairs: by this processor's instruction, or where it has none by the plain code
    that stands in for it."""
    with pytest.MonkeyPatch.context() as patch, float32_matmul_precision("medium"):
        patch.setattr(build, "can_multiply_pairs", lambda: True)
        yield


@contextlib.contextmanager
def exactly_in_float32() -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    yield
    torch.set_float32_matmul_precision(before)


def rounded(x: torch.Tensor) -> torch.Tensor:
    return x.bfloat16().double()


def assert_same(found: torch.Tensor, exact: torch.Tensor, inputs: int) -> None:
    """Within what float32 sums of ``inputs`` products may be off."""
    assert float((found.double() - exact).abs().max()) < 1e-5 * (inputs + 1)


@given(
    rows=st.integers(1, 120),
    inputs=sizes,
    outputs=sizes,
    turned=st.booleans(),
    strided=st.booleans(),
    biased=st.booleans(),
)
def test_a_product_is_that_of_the_rounded_input(
    rows: int, inputs: int, outputs: int, turned: bool, strided: bool, biased: bool
) -> None:
    x, weight = torch.randn(rows, inputs), torch.randn(outputs, inputs).bfloat16()
    bias = torch.randn(outputs) if biased else None
    x = x.t().contiguous().t() if strided else x
    weight = weight.t().contiguous().t() if turned else weight
    exact_without_bias = rounded(x) @ weight.double().t()
    exact = exact_without_bias + (0 if bias is None else bias.double())
    assert_same(multiply(x, weight, bias), exact, inputs)
    total = torch.randn(rows, outputs)
    assert_same(multiply(x, weight, to=total.clone()), exact_without_bias + total, inputs)
    low_x, low_weight = torch.randn(rows, 7), torch.randn(outputs, 7)  # these stay in float32
    exact_low = low_x.double() @ low_weight.double().t()
    found = multiply(x, weight, bias, low_rank=(low_x, low_weight))
    assert_same(found, exact + exact_low, inputs + 7)
    found = multiply(x, weight, to=total.clone(), low_rank=(low_x, low_weight))
    assert_same(found, exact_without_bias + total + exact_low, inputs + 7)
    assert_same(Packed([weight.contiguous()], [bias])(x), exact, inputs)


@pytest.mark.parametrize("inputs", [511, 512, 513, 1025, 4097, 8200])
@pytest.mark.parametrize("rows", [3, 40, 130])
def test_sums_go_on_over_all_pieces_of_the_inputs(rows: int, inputs: int) -> None:
    x, weight = torch.randn(rows, inputs), torch.randn(2 * LANES + 3, inputs).bfloat16()
    exact = rounded(x) @ weight.double().t()
    assert_same(multiply(x, weight), exact, inputs)
    assert_same(multiply(x, weight.t().contiguous().t()), exact, inputs)
    assert_same(Packed([weight], [None])(x), exact, inputs)


def test_rounding_is_to_the_nearest_and_of_ties_to_even() -> None:
    draw = torch.Generator().manual_seed(0)
    bits = torch.randint(2**30, 2**30 + 2**29, (4096,), generator=draw, dtype=torch.int32)
    bits[::3] = bits[::3] & ~0xFFFF | 0x8000  # ties
    x = bits.view(torch.float32)
    weight = torch.eye(2).bfloat16()
    found = multiply(x.view(-1, 2), weight).flatten()
    assert torch.equal(found, x.bfloat16().float())


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_shows_in_every_output(value: float) -> None:
    x, weight = torch.ones(3, 70), torch.ones(5, 70).bfloat16()
    x[1, 33] = value
    for found in (multiply(x, weight), Packed([weight], [None])(x)):
        assert not found[1].isfinite().any()
        assert found[0].isfinite().all() and found[2].isfinite().all()


def test_a_row_has_the_same_product_in_any_company_and_number_of_threads() -> None:
    # So much work that two threads are used, in two pieces of the inputs; and few outputs.
    x, weight = torch.randn(130, 4230), torch.randn(300, 4230).bfloat16()
    packed, threads = Packed([weight], [None]), torch.get_num_threads()
    for product in (
        packed,
        lambda x: multiply(x, weight),
        lambda x: multiply(x, weight[:9]),
        lambda x: multiply(x, weight.t().contiguous().t()),
    ):
        whole = product(x)
        try:
            torch.set_num_threads(2)
            assert build.threads(2.0 * x.numel() * len(weight)) == 2
            assert torch.equal(product(x), whole)
        finally:
            torch.set_num_threads(threads)
        for rows in (slice(0, 1), slice(5, 18), slice(20, 129)):
            assert torch.equal(product(x[rows].contiguous()), whole[rows])


@pytest.mark.skipif(build.pairs_by() != "AMX", reason="this processor has no AMX")
def test_amx_and_the_kernels_without_it_differ_by_no_more_than_the_order_of_a_sum(
    tmp_path: Path, imported: Imported
) -> None:
    # Kernels that are compiled for this test alone are hardly optimized: that takes a third.
    code = """
import sys, torch
from abacist.policy.choices import float32_matmul_precision
from abacist.policy.kernels import build
from abacist.policy.kernels.decode import Packed
from abacist.policy.kernels.multiply import multiply
if sys.argv[2] == "anew":
    build.FLAGS = ("-O1", *build.FLAGS[1:])
print(build.pairs_by())
build.can_multiply_pairs = lambda: True
found = []
with float32_matmul_precision("medium"):
    for rows, inputs, outputs in [(1, 64, 8), (15, 95, 40), (47, 900, 70), (130, 4200, 33)]:
        draw = torch.Generator().manual_seed(rows)
        x = torch.randn(rows, inputs, generator=draw)
        weight = torch.randn(outputs, inputs, generator=draw).bfloat16()
        found += [multiply(x, weight), Packed([weight], [None])(x)]
torch.save(found, sys.argv[1])
"""

    def products(name: str, **environment: str) -> tuple[str, list[torch.Tensor]]:
        kept, kind = tmp_path / name, "anew" if environment else "kept"
        said = imported.run("-c", code, str(kept), kind, env=imported.env | environment)
        assert said.returncode == 0, said.stderr
        return said.stdout.strip(), torch.load(kept, weights_only=True)

    (compiler, *flags) = next(build.compilers())
    without = shlex.join([compiler, *flags, "-mno-amx-bf16"])
    by, found = products("with")
    plain_by, plain = products("without", CXX=without, XDG_CACHE_HOME=str(tmp_path))
    assert by == "AMX" and plain_by != "AMX"
    for one, other in zip(found, plain, strict=True):
        assert_same(one, other.double(), 4200)


@given(rows=st.integers(1, 40), inputs=sizes, outputs=sizes, rank=st.integers(1, LANES + 3))
def test_adapters_and_gates_stay_in_float32(
    rows: int, inputs: int, outputs: int, rank: int
) -> None:
    x = torch.randn(rows, inputs)
    gate, up = (torch.randn(outputs, inputs).bfloat16() for _ in range(2))
    adapter = Adapter(torch.randn(rank, inputs), torch.randn(outputs, rank) * 0.1)
    plain = Packed([gate, up], [None, None], adapters=[[adapter], []])(x)
    lora = x.double() @ (adapter.outer.double() @ adapter.inner.double()).t()
    gates, ups = rounded(x) @ gate.double().t() + lora, rounded(x) @ up.double().t()
    assert_same(plain, torch.cat([gates, ups], 1), inputs + rank)
    gated = Packed([gate, up], [None, None], gated=True, adapters=[[adapter], []])(x)
    torch.testing.assert_close(
        gated.double(), torch.nn.functional.silu(gates) * ups, rtol=1e-3, atol=1e-3
    )


def test_weights_in_float32_are_multiplied_as_ever() -> None:
    x, weight = torch.randn(40, 300), torch.randn(70, 300)
    with exactly_in_float32():
        before = multiply(x, weight), Packed([weight], [None])(x)
    assert all(map(torch.equal, before, (multiply(x, weight), Packed([weight], [None])(x))))


def test_packed_pairs_take_no_more_memory_than_bfloat16() -> None:
    weight = torch.randn(64, 300).bfloat16()
    pairs = Packed([weight], [None])._packed.nbytes
    with exactly_in_float32():
        assert pairs == Packed([weight], [None])._packed.nbytes


# A whole model

SIZES: dict[str, Any] = {
    "vocab_size": 150,
    "hidden_size": 128,
    "intermediate_size": 208,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.15,
}
MODELS = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SIZES)),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**SIZES, tie_word_embeddings=True)),
}


def model_of(kind: str) -> Any:
    torch.manual_seed(3)
    model = MODELS[kind]()
    for weight in model.parameters():
        weight.data = weight.data.bfloat16()
    model = get_peft_model(model, LoraConfig(r=5, lora_alpha=8, target_modules="all-linear"))
    for name, weight in model.named_parameters():
        if "lora_" in name:
            weight.data.normal_(std=0.1)
    return model.train()


def scored(model: Any, *, autocast: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probabilities and the gradient of a sum of them, as one vector each."""
    draw = torch.Generator().manual_seed(1)
    prompts = torch.randint(5, 150, (2, 9), generator=draw).repeat_interleave(3, 0)
    ids = torch.cat([prompts, torch.randint(5, 150, (6, 40), generator=draw)], dim=1)
    model.zero_grad()
    if autocast:  # transformers' own forward, as stock TRL trains with bf16
        with torch.autocast("cpu", dtype=torch.bfloat16):
            logits = model(input_ids=ids).logits[:, 8:-1].float()
        logps = logits.log_softmax(-1).gather(2, ids[:, 9:, None])[..., 0]
    else:
        logps, _ = score(model, ids, torch.ones_like(ids), 40, temperature=1.0)
    (logps * torch.linspace(-1, 1, 6)[:, None]).sum().backward()
    grads = [w.grad.flatten() for w in model.parameters() if w.requires_grad]
    return logps.detach().flatten(), torch.cat(grads)


@pytest.mark.parametrize("kind", MODELS)
def test_scores_and_gradients_are_nearer_to_float32_than_those_of_autocast(kind: str) -> None:
    model = model_of(kind)
    with exactly_in_float32():
        exact = scored(model)
        stock = scored(copy.deepcopy(model).float(), autocast=True)
    medium = scored(model)
    for found, by_autocast, reference in zip(medium, stock, exact, strict=True):
        error, of_autocast = (float((x - reference).norm()) for x in (found, by_autocast))
        assert 0 < error < of_autocast


@pytest.mark.parametrize("kind", MODELS)
def test_the_policy_that_writes_is_the_one_that_learns(kind: str) -> None:
    """A token is drawn with the probability that scoring gives it, up to float32 sums."""
    model = model_of(kind).eval()
    prompt, uniforms = [5, 9, 70, 8, 120], torch.rand(4, 20, dtype=torch.float64)
    engine = Engine(model, stop_ids=[], pad_id=0)
    (rows,) = engine.complete([prompt], 4, 20, Sampling(temperature=1.0), uniforms)
    ids = torch.tensor([prompt + list(row) for row in rows])
    for column in range(len(prompt), ids.shape[1], 6):
        every = torch.arange(150).repeat_interleave(4)
        asked = torch.cat([ids[:, :column].repeat(150, 1), every[:, None]], dim=1)
        with torch.no_grad():
            logps, _ = score(model, asked, torch.ones_like(asked), 1, temperature=1.0)
        cumulated = logps.view(150, 4).t().double().exp().cumsum(1)
        chosen = ids[:, column, None]
        above = cumulated.gather(1, chosen)[:, 0]
        below = above - logps.view(150, 4).t().double().exp().gather(1, chosen)[:, 0]
        drawn = uniforms[:, column - len(prompt)]
        assert bool(((below - 0.02 <= drawn) & (drawn <= above + 0.02)).all())


# The setting


def test_the_setting_is_pytorchs_and_ends_with_its_block() -> None:
    with exactly_in_float32():
        with pytest.raises(RuntimeError), float32_matmul_precision("medium"):
            assert torch.get_float32_matmul_precision() == "medium"
            raise RuntimeError
        assert torch.get_float32_matmul_precision() == "highest"


def test_a_name_that_pytorch_does_not_know_is_refused_as_that() -> None:
    """A run's config.yaml may have been edited."""
    with exactly_in_float32():
        refused = pytest.raises(ModelError, match="'medum' is not a precision")
        with refused, float32_matmul_precision("medum"):
            pass
        assert torch.get_float32_matmul_precision() == "highest"


def test_the_default_leaves_what_a_script_has_set() -> None:
    with float32_matmul_precision("highest"):
        assert torch.get_float32_matmul_precision() == "medium"


def test_pytorchs_newer_setting_is_no_fault_and_does_not_go_with_ours(imported: Imported) -> None:
    """As --tf32 leaves it: asking for the older one raises within PyTorch."""
    code = """
import torch
torch.backends.fp32_precision = "tf32"
from abacist.errors import ModelError
from abacist.policy.choices import float32_matmul_precision
from abacist.policy.kernels.decode import Packed
from abacist.policy.kernels.multiply import multiply
x, weight = torch.randn(3, 8), torch.randn(5, 8).bfloat16()
with float32_matmul_precision("highest"):
    found = multiply(x, weight), Packed([weight], [None])(x)
exact = x.double() @ weight.double().t()
assert all(float((y.double() - exact).abs().max()) < 1e-5 for y in found)
try:
    with float32_matmul_precision("medium"):
        pass
except ModelError as error:
    assert "--tf32" in error.message
else:
    raise AssertionError
"""
    done = imported.run("-c", code)
    assert done.returncode == 0, done.stderr


def test_what_the_setting_means_here_is_said_with_the_reason(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    held, wide = torch.nn.Linear(2, 2).bfloat16(), torch.nn.Linear(2, 2)
    assert explain_matmul_precision("highest", held) is None

    def why(asked: str, model: torch.nn.Module) -> str:
        found = explain_matmul_precision(asked, model)
        assert found is not None and found.value == asked
        return found.why

    assert "round their input to bfloat16" in why("medium", held)
    assert "not held in bfloat16" in why("medium", wide)
    assert "same as highest" in why("high", held)
    monkeypatch.setattr(choices.build, "can_multiply_pairs", lambda: False)
    assert "not faster in bfloat16" in why("medium", held)
    monkeypatch.setattr(choices.build, "refuses_amx", lambda: True)
    assert "does not let this process use AMX" in why("medium", held)
    monkeypatch.setattr(choices.build, "unsupported_reason", lambda: "no compiler was found")
    assert "no compiler was found" in why("medium", held)
