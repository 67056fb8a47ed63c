"""Weights held in bfloat16 on a CPU compute what the same numbers in float32 compute."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

import abacist
from abacist.cli.main import main
from abacist.errors import UsageError
from abacist.policy import families
from abacist.policy.decoding import network
from abacist.policy.decoding.engine import Engine
from abacist.policy.decoding.network import DecodingNetwork
from abacist.policy.families import FastPart, compute_dtype_of, unsupported_reason
from abacist.policy.kernels import build
from abacist.policy.kernels.decode import Adapter, Packed
from abacist.policy.kernels.multiply import multiply, multiply_row
from abacist.policy.loading import default_lora, load_policy
from abacist.policy.scoring.score import score

pytestmark = pytest.mark.skipif(
    build.library() is None, reason=f"there are no kernels: {build.unsupported_reason()}"
)
Fold = Callable[[str], Path]
LANES = build.library().kernels_lanes() if build.library() else 4
QWEN = "qwen2.5-instruct"
SIZES: dict[str, Any] = {
    "vocab_size": 150,
    "hidden_size": 64,
    "intermediate_size": 104,  # no whole panels
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.2,
}
MODELS: dict[str, Callable[[], Any]] = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SIZES, tie_word_embeddings=True)),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**SIZES, tie_word_embeddings=False)),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**SIZES, head_dim=16)),
}


def pair(kind: str, *, adapted: bool = True) -> tuple[Any, Any]:
    """The same model with its frozen weights in float32, and held in bfloat16."""
    torch.manual_seed(3)
    wide = MODELS[kind]()
    for weight in wide.parameters():
        weight.data = torch.randn_like(weight) * 0.1 if weight.dim() == 1 else weight.data
        weight.data = weight.data.bfloat16().float()
    held = copy.deepcopy(wide)
    for weight in held.parameters():  # buffers stay float32, as from_pretrained leaves them
        weight.data = weight.data.bfloat16()
    if not adapted:
        return wide.requires_grad_(False), held.requires_grad_(False)
    lora = LoraConfig(r=5, lora_alpha=8, target_modules="all-linear")
    wide, held = (get_peft_model(model, lora) for model in (wide, held))
    for name, weight in wide.named_parameters():
        if "lora_" in name:
            weight.data.normal_(std=0.1)
            held.get_parameter(name).data.copy_(weight.data)
    return wide, held


def batch() -> tuple[torch.Tensor, torch.Tensor, int]:
    draw = torch.Generator().manual_seed(1)
    prompts = torch.randint(5, 150, (2, 9), generator=draw).repeat_interleave(3, 0)
    ids = torch.cat([prompts, torch.randint(5, 150, (6, 7), generator=draw)], dim=1)
    return ids, torch.ones_like(ids), 7


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("kind", MODELS)
def test_scores_and_gradients_are_those_of_float32_to_the_bit(
    kind: str, checkpointing: bool
) -> None:
    found = []
    for model in pair(kind):
        model.train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
            model.enable_input_require_grads()
        assert compute_dtype_of(model.get_base_model()) == torch.float32
        assert unsupported_reason(model, FastPart.FUSED_LAYERS) is None
        logps, entropies = score(model, *batch(), temperature=0.9, compute_entropy=True)
        assert entropies is not None
        (logps * torch.linspace(-1, 1, 6)[:, None]).sum().backward()
        grads = [w.grad for w in model.parameters() if w.requires_grad]
        assert all(grad is not None and grad.dtype == torch.float32 for grad in grads)
        assert any(float(grad.norm()) > 0 for grad in grads if grad is not None)
        found.append([logps.detach(), entropies, *grads])
    assert all(map(torch.equal, *found))


@pytest.mark.parametrize("adapted", [False, True])
@pytest.mark.parametrize("kind", MODELS)
def test_logits_while_decoding_are_those_of_float32(kind: str, adapted: bool) -> None:
    ids = torch.tensor([5, 9, 70, 8, 120])
    logits = []
    for model in (model.eval() for model in pair(kind, adapted=adapted)):
        written = Engine(model, stop_ids=[], pad_id=0).complete([ids.tolist()] * 2, 3, 9, None)
        with torch.no_grad():
            wide = copy.deepcopy(model).float()
            assert len({tuple(row) for group in written for row in group}) == 1
            full = torch.cat([ids, torch.tensor(written[0][0])])[None]
            logits.append(wide(full).logits[0, len(ids) - 1 : -1])
        # Each token is the most likely one, by transformers' own forward in float32.
        best, chosen = logits[-1].max(-1).values, torch.tensor(written[0][0])
        assert (best - logits[-1].gather(-1, chosen[:, None])[:, 0]).max() < 1e-4
    assert torch.equal(*logits)


def test_a_single_row_of_a_large_model_is_written_without_a_copy(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = pair("qwen2")[1].eval()
    copied = Engine(model, stop_ids=[], pad_id=0).complete([[5, 9, 70]], 1, 9, None)
    monkeypatch.setattr(network, "NO_COPY_WEIGHTS", 1)

    def refused(*_: Any, **__: Any) -> Any:
        raise AssertionError("the weights were packed")

    monkeypatch.setattr(network.kernels.Packed, "__init__", refused)
    assert Engine(model, stop_ids=[], pad_id=0).complete([[5, 9, 70]], 1, 9, None) == copied


def test_packed_weights_take_half_the_memory() -> None:
    wide, held = (DecodingNetwork(model.eval(), 20) for model in pair("llama", adapted=False))
    sizes = [each.layers[0].down._packed.nbytes for each in (wide, held)]  # type: ignore[attr-defined]
    assert sizes[0] == 2 * sizes[1]


sizes = st.integers(1, 5 * LANES)


@given(rows=st.integers(1, 120), inputs=sizes, outputs=sizes, turned=st.booleans())
def test_a_product_widens_every_weight_exactly(
    rows: int, inputs: int, outputs: int, turned: bool
) -> None:
    x, weight = torch.randn(rows, inputs), torch.randn(outputs, inputs).bfloat16()
    if turned:
        weight = weight.t().contiguous().t()
    assert torch.equal(multiply(x, weight), multiply(x, weight.float()))
    assert torch.equal(Packed([weight], [None])(x), Packed([weight.float()], [None])(x))


@given(inputs=sizes, outputs=sizes, biased=st.booleans())
def test_a_single_row_is_multiplied_by_weights_where_they_are(
    inputs: int, outputs: int, biased: bool
) -> None:
    x, weight = torch.randn(1, inputs), torch.randn(outputs, inputs).bfloat16()
    bias = torch.randn(outputs) if biased else None
    exact = x.double() @ weight.double().t() + (0 if bias is None else bias.double())
    found = multiply_row(x, weight, bias)
    assert float((found.double() - exact).abs().max()) < 1e-5 * (inputs + 1)


@given(
    rows=st.integers(1, 40),
    inputs=sizes,
    outputs=st.lists(sizes, min_size=1, max_size=3),
    ranks=st.lists(st.integers(0, LANES + 3), min_size=3, max_size=3),
    seed=st.integers(0, 99),
)
def test_an_adapter_beside_packed_weights_adds_its_product(
    rows: int, inputs: int, outputs: list[int], ranks: list[int], seed: int
) -> None:
    torch.manual_seed(seed)
    x, residual = torch.randn(rows, inputs), torch.randn(rows, sum(outputs))
    weights = [torch.randn(count, inputs).bfloat16() for count in outputs]
    biases = [None if count % 2 else torch.randn(count).bfloat16() for count in outputs]
    adapters = [
        [Adapter(torch.randn(rank, inputs), torch.randn(count, rank))] if rank else []
        for count, rank in zip(outputs, ranks, strict=False)
    ]
    exact = residual.double() + torch.cat(
        [
            x.double() @ weight.double().t()
            + (0 if bias is None else bias.double())
            + sum(x.double() @ (a.outer.double() @ a.inner.double()).t() for a in adapter)
            for weight, bias, adapter in zip(weights, biases, adapters, strict=True)
        ],
        dim=1,
    )
    found = Packed(weights, biases, adapters=adapters)(x, residual)
    assert float((found.double() - exact).abs().max()) < 2e-5 * (inputs + sum(ranks))


def test_a_gated_product_takes_the_adapters_of_both() -> None:
    torch.manual_seed(0)
    gate, up = (torch.randn(LANES + 3, 20).bfloat16() for _ in range(2))
    adapters = [Adapter(torch.randn(r, 20), torch.randn(LANES + 3, r) * 0.3) for r in (2, 3)]
    x = torch.randn(5, 20)
    gates, ups = (
        x.double() @ (weight.double() + one.outer.double() @ one.inner.double()).t()
        for weight, one in zip((gate, up), adapters, strict=True)
    )
    found = Packed([gate, up], [None, None], gated=True, adapters=[[one] for one in adapters])(x)
    torch.testing.assert_close(
        found.double(), torch.nn.functional.silu(gates) * ups, rtol=1e-4, atol=1e-4
    )


# What is chosen while loading


def dtype_of(folder: Path, **options: Any) -> tuple[torch.dtype, str, str]:
    policy = load_policy(str(folder), device="cpu", **options)
    choice = policy.choices[1]
    return policy.model.dtype, choice.value, choice.why


def test_what_is_stored_in_bfloat16_stays_so(lookalike: Fold) -> None:
    for options in ({}, {"lora": default_lora(r=4)}):
        dtype, value, why = dtype_of(lookalike(QWEN), **options)
        assert (dtype, value) == (torch.bfloat16, "bfloat16")
        assert "as stored; our kernels compute in float32" in why


def test_all_weights_are_trained_in_float32(lookalike: Fold) -> None:
    assert dtype_of(lookalike(QWEN), trainable=True)[:2] == (torch.float32, "float32")


def stored_in_float32(lookalike: Fold, tmp_path: Path) -> Path:
    folder = tmp_path / "wide"
    folder.mkdir()
    for path in lookalike(QWEN).iterdir():
        if path.suffix != ".safetensors":
            (folder / path.name).write_bytes(path.read_bytes())
    weights = load_file(lookalike(QWEN) / "model.safetensors")
    wide = {name: weight.float() + 1e-6 for name, weight in weights.items()}
    save_file(wide, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    for key in ("dtype", "torch_dtype"):
        if key in config:
            config[key] = "bfloat16"  # what the config says does not matter
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


def test_what_is_stored_in_more_bits_is_not_rounded_unasked(
    lookalike: Fold, tmp_path: Path
) -> None:
    folder = stored_in_float32(lookalike, tmp_path)
    assert dtype_of(folder)[:2] == (torch.float32, "float32")
    dtype, _, why = dtype_of(folder, dtype="bfloat16")
    assert dtype == torch.bfloat16
    assert "stored in more bits, are rounded" in why
    assert "rounded" not in dtype_of(lookalike(QWEN), dtype="bfloat16")[2]


def test_files_and_tensors_that_are_no_weights_of_the_model_do_not_decide(
    lookalike: Fold, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(lookalike(QWEN), tmp_path / "model"))
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    save_file({"tok_embeddings.weight": torch.ones(4)}, folder / "consolidated.safetensors")
    assert dtype_of(folder)[0] == torch.bfloat16


def test_what_a_fast_part_does_not_support_is_loaded_in_float32_with_the_reason(
    lookalike: Fold,
) -> None:
    lora = default_lora(r=4, dropout=0.1)
    dtype, value, why = dtype_of(lookalike(QWEN), lora=lora)
    assert (dtype, value) == (torch.float32, "float32")
    assert "dropout 0.1" in why
    dtype, _, why = dtype_of(lookalike(QWEN), lora=lora, dtype="bfloat16")
    assert dtype == torch.bfloat16
    assert "computed in bfloat16, because" in why


def test_without_kernels_weights_are_loaded_in_float32(
    lookalike: Fold, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(build, "library", lambda: None)
    monkeypatch.setattr(build, "unsupported_reason", lambda: "there is no compiler")
    assert dtype_of(lookalike(QWEN))[:2] == (torch.float32, "float32")
    assert "there is no compiler" in dtype_of(lookalike(QWEN), dtype="bfloat16")[2]


def test_a_model_that_is_not_fused_is_scored_in_bfloat16_as_before() -> None:
    model = pair("qwen2")[1].train()
    model.get_base_model().model.layers[1].mlp.register_forward_hook(lambda *_: None)
    assert compute_dtype_of(model.get_base_model()) == torch.bfloat16
    assert families.not_widened_reason(model, trains=True) is not None


# What is settled once the trainer stands


def run_of(lookalike: Fold, folder: Path, *flags: str) -> list[str]:
    return [
        *("train", "any", "--model_name_or_path", str(lookalike(QWEN)), "--device", "cpu"),
        *("--dataset_name", "generated", "--num_train_problems", "20", "--num_generations", "2"),
        *("--num_heldout_problems", "0", "--num_selection_problems", "0", "--warmup_steps", "0"),
        *("--per_device_train_batch_size", "4", "--gradient_accumulation_steps", "1"),
        *("--max_completion_length", "8", "--save_steps", "1", "--output_dir", str(folder)),
        *flags,
    ]


@pytest.mark.e2e
@pytest.mark.parametrize(
    ("flag", "why"),
    [("--no_use_fast_path", "use_fast_path is off"), ("--bf16 true", "autocast is on")],
)
def test_what_trls_path_or_autocast_computes_is_held_in_float32(
    flag: str, why: str, lookalike: Fold, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(run_of(lookalike, tmp_path / "run", *flag.split(), "--max_steps", "1")) == 0
    assert f"dtype: float32 after all ({why})" in capsys.readouterr().out


@pytest.mark.e2e
def test_a_run_goes_on_in_the_dtype_that_it_began_in(
    lookalike: Fold, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    assert main(run_of(lookalike, run, "--max_steps", "2", "--dtype", "float32")) == 0
    # As a run that began before weights were held in bfloat16 left it.
    settings = yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8"))
    (run / "config.yaml").write_text(yaml.safe_dump(settings | {"dtype": "auto"}), encoding="utf-8")
    manifest = json.loads((run / "manifest.json").read_text(encoding="utf-8"))
    assert manifest.pop("dtype") == "float32"
    (run / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
    capsys.readouterr()
    assert main(["train", "--resume", str(run), "--max_steps", "3"]) == 0
    assert "dtype: float32" in capsys.readouterr().out


@pytest.mark.e2e
def test_deciding_on_checkpointing_draws_nothing(lookalike: Fold, tmp_path: Path) -> None:
    adapters = []
    for choice in ("auto", "false"):
        flags = ("--lora_dropout", "0.2", "--gradient_checkpointing", choice, "--max_steps", "1")
        assert main(run_of(lookalike, tmp_path / choice, *flags)) == 0
        adapters.append((tmp_path / choice / "adapter_model.safetensors").read_bytes())
    assert adapters[0] == adapters[1]


@pytest.mark.e2e
def test_a_run_is_measured_in_the_precision_it_was_trained_in_unless_told_otherwise(
    lookalike: Fold, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    flags = ("--max_steps", "1", "--float32_matmul_precision", "medium", "--num_heldout_problems")
    assert main([*run_of(lookalike, run, *flags, "3"), "--num_consistency_problems", "0"]) == 0

    def recorded(folder: Path) -> str:
        found = json.loads((folder / "evaluation.json").read_text(encoding="utf-8"))
        return str(found["evaluation"]["conditions"]["arithmetic"])

    def arithmetic(folder: Path, *more: str) -> str:
        asked = ("eval", str(run), "--output_dir", str(folder), "--max_completion_length", "8")
        assert main([*asked, *more]) == 0
        return recorded(folder)

    own = recorded(run / "evals" / "after")
    assert own.endswith(", float32_matmul_precision medium")
    assert arithmetic(tmp_path / "as-trained") == own
    assert main(["compare", str(run), "--shots", "1"]) in (0, 3)
    assert {recorded(run / "evals" / "shots-1" / when) for when in ("before", "after")} == {own}
    assert "float32_matmul_precision: medium (" in capsys.readouterr().out
    exact = ("--float32_matmul_precision", "highest")
    assert arithmetic(tmp_path / "exact", *exact) + ", float32_matmul_precision medium" == own
    assert torch.get_float32_matmul_precision() == "highest"
    assert main(["eval", str(run), "--float32_matmul_precision", "low"]) == 2
    with pytest.raises(UsageError, match="PyTorch knows"):
        abacist.evaluate(run, float32_matmul_precision="low")
