"""A base in 4 or 8 bits: what is refused without bitsandbytes, and that ours computes the same."""

from __future__ import annotations

import json
from importlib import util
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from transformers import BitsAndBytesConfig, GenerationConfig
from trl import ModelConfig

from abacist.errors import ModelError, UsageError
from abacist.learning import arguments
from abacist.learning.config import load_config
from abacist.learning.dryrun import memory
from abacist.learning.enough_memory import refuse_too_large
from abacist.learning.tracking import Silent
from abacist.learning.train import train
from abacist.policy import quantization
from abacist.policy.decoding.engine import Engine
from abacist.policy.families import FastPart, unsupported_reason
from abacist.policy.loading import Policy, default_lora, load_policy
from abacist.policy.quantization import Quantization
from abacist.policy.scoring.score import score
from adapters import stir

WAYS = [Quantization(4), Quantization(4, "fp4", is_nested=True)]
needs_bitsandbytes = pytest.mark.skipif(
    util.find_spec("bitsandbytes") is None, reason="bitsandbytes (extra quant) is not installed"
)


def quantized(held: Quantization, **how: Any) -> Policy:
    """The built-in model held so, under an adapter that does something."""
    policy = load_policy("tiny", quantization=held, lora=default_lora(), dtype="float32", **how)
    stir(policy.model)
    return policy


def flags(*typed: str) -> Any:
    return load_config("tiny", None, ["--device", "cpu", *typed])


# --- Without bitsandbytes ---


def test_the_flags_are_those_of_trl_with_its_defaults() -> None:
    theirs, ours = ModelConfig(), arguments.ModelConfig()
    for name in ("load_in_4bit", "load_in_8bit", "bnb_4bit_quant_type", "use_bnb_nested_quant"):
        assert getattr(ours, name) == getattr(theirs, name)
    assert ours.quantization is None


def test_flags_say_how_the_base_is_held() -> None:
    typed = ["--load_in_4bit", "--bnb_4bit_quant_type", "fp4", "--use_bnb_nested_quant"]
    assert flags(*typed).model.quantization == Quantization(4, "fp4", is_nested=True)
    assert flags("--load_in_8bit").model.quantization == Quantization(8)


@pytest.mark.parametrize(
    ("typed", "said"),
    [
        (["--load_in_4bit", "--no_use_peft"], "all weights trained"),
        (["--load_in_4bit", "--load_in_8bit"], "contradict"),
        (["--load_in_8bit", "--use_vllm"], "round it away"),
        (["--load_in_4bit", "--bnb_4bit_quant_type", "int4"], "invalid choice"),
    ],
)
def test_what_does_not_work_on_few_bits_is_refused_by_its_flags(
    typed: list[str], said: str
) -> None:
    with pytest.raises(UsageError, match=said):
        flags(*typed)


def test_without_bitsandbytes_a_run_is_refused_before_anything_is_read_or_written(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(quantization, "find_spec", lambda name: None)
    config = flags("--load_in_4bit", "--output_dir", str(tmp_path / "run"))
    config.script.dataset_name = str(tmp_path / "not-there.jsonl")
    with pytest.raises(ModelError, match=r"bitsandbytes.*not installed") as refused:
        train(config, Silent())
    assert "abacist[quant]" in refused.value.hint
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("held", [*WAYS, Quantization(8)])
def test_what_an_adapter_records_of_its_base_is_read_back(held: Quantization) -> None:
    record = json.loads(json.dumps(held.record()))
    assert quantization.recorded({quantization.RECORD: record}) == held
    config = BitsAndBytesConfig(**{k: v for k, v in record.items() if k != "quant_method"})
    same = config.to_dict()
    assert {name: same[name] for name in record if name in same}.items() <= record.items()


@pytest.mark.parametrize("bad", [{"load_in_4bit": "yes"}, {}, {"load_in_4bit": True,
                                 "bnb_4bit_quant_type": "x"}])  # fmt: skip
def test_a_record_of_another_program_is_refused(bad: dict[str, Any]) -> None:
    with pytest.raises(ModelError, match="names no way"):
        quantization.recorded({quantization.RECORD: bad})


def test_few_bits_fit_where_float32_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    weights = 1_716_000  # of the built-in model, most of them in its layers
    monkeypatch.setattr(memory, "available_bytes", lambda *args: 2 * weights)
    with pytest.raises(ModelError):
        refuse_too_large(flags())
    refuse_too_large(flags("--load_in_4bit"))
    monkeypatch.setattr(memory, "available_bytes", lambda *args: weights // 4)
    with pytest.raises(ModelError, match=r"linear layers in 4 bits \(nf4\)"):
        refuse_too_large(flags("--load_in_4bit"))


# --- With it ---


@needs_bitsandbytes
@pytest.mark.parametrize("held", WAYS, ids=str)
def test_our_engine_writes_the_greedy_tokens_of_the_quantised_model(held: Quantization) -> None:
    policy = quantized(held)
    policy.model.eval()
    assert unsupported_reason(policy.model, FastPart.DECODING) is None
    prompts = [[5, 9, 23, 40, 7], [11, 12, 13], [5, 9, 23, 8]]
    greedy = GenerationConfig(max_new_tokens=12, do_sample=False, pad_token_id=0)
    engine = Engine(policy.model, stop_ids=policy.chat.stop_ids, pad_id=0, max_rows=8)
    ours = engine.complete(prompts, 1, 12, None)
    for prompt, (written,) in zip(prompts, ours, strict=True):
        ids = torch.tensor([prompt])
        theirs = policy.model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), generation_config=greedy
        )
        assert written == theirs[0, len(prompt) :].tolist()
    # What bitsandbytes would have repacked for good by now, on some processors.
    assert unsupported_reason(policy.model, FastPart.DECODING) is None


@needs_bitsandbytes
@pytest.mark.parametrize("held", WAYS, ids=str)
def test_our_scoring_has_its_log_probabilities_and_gradients(held: Quantization) -> None:
    model = quantized(held).model
    assert unsupported_reason(model, FastPart.SCORING) is None
    ids = torch.randint(5, 300, (4, 14), generator=torch.Generator().manual_seed(2))
    ids[:, :8] = ids[0, :8]
    mask, weights = torch.ones_like(ids), torch.linspace(-1, 1, 24).view(4, 6)

    def gradients(logps: torch.Tensor) -> torch.Tensor:
        model.zero_grad()
        (logps * weights).sum().backward()
        return torch.cat([w.grad.flatten() for w in model.parameters() if w.grad is not None])

    ours, _ = score(model, ids, mask, 6, temperature=1.0, compute_entropy=True)
    logits = model(input_ids=ids, attention_mask=mask).logits[:, -7:-1].float()
    theirs = logits.log_softmax(-1).gather(-1, ids[:, -6:, None])[..., 0]
    assert torch.allclose(ours, theirs, atol=1e-4)
    mine, stock = gradients(ours).clone(), gradients(theirs)
    assert float(stock.norm()) > 0
    assert float((mine - stock).norm() / stock.norm()) < 1e-5


@needs_bitsandbytes
@pytest.mark.parametrize("part", [FastPart.DECODING, FastPart.SCORING])
def test_8_bit_layers_of_bitsandbytes_are_left_to_trl_with_the_reason(
    part: FastPart, monkeypatch: pytest.MonkeyPatch
) -> None:
    # As an adapter has it that learned on them on a GPU: asked for on a CPU, they are ours.
    monkeypatch.setattr(Quantization, "on", lambda self, device: self)
    model = quantized(Quantization(8)).model
    assert "round what they read too" in str(unsupported_reason(model, part))


@needs_bitsandbytes
def test_4_bit_layers_that_compute_in_another_dtype_are_left_to_trl() -> None:
    model = quantized(Quantization(4)).model
    for module in model.modules():
        if quantization.is_4bit(module):
            module.compute_dtype = torch.bfloat16
    reason = unsupported_reason(model, FastPart.DECODING)
    assert reason == "its 4-bit layers compute in bfloat16"


@needs_bitsandbytes
def test_what_the_weights_take_is_counted_with_their_scales() -> None:
    plain = load_policy("tiny", dtype="float32").model
    held = load_policy("tiny", dtype="float32", quantization=Quantization(4)).model
    layers = [module for module in held.modules() if quantization.is_4bit(module)]
    numbers = quantization.num_weights(layer.weight for layer in layers)
    assert quantization.num_weights(held.parameters()) == sum(p.numel() for p in plain.parameters())
    codes = sum(layer.weight.numel() for layer in layers)
    assert codes == numbers // 2
    of_scales = quantization.scale_bytes(held)
    assert numbers / 16 <= of_scales < numbers / 16 + 128 * len(layers)
    assert sum(map(quantization.dense_bytes, layers)) == 4 * numbers


@needs_bitsandbytes
def test_a_run_on_few_bits_learns_in_float32_and_its_base_comes_back_as_it_was(
    tmp_path: Path,
) -> None:
    folder = tmp_path / "run"
    config = flags(
        "--load_in_4bit", "--output_dir", str(folder), "--max_steps", "1",
        "--max_completion_length", "12", "--num_heldout_problems", "0",
        "--num_selection_problems", "0", "--num_consistency_problems", "0",
        "--per_device_train_batch_size", "16",
    )  # fmt: skip
    train(config, Silent())
    with safe_open(folder / "adapter_model.safetensors", "pt") as stored:
        assert {str(stored.get_tensor(name).dtype) for name in stored.keys()} == {"torch.float32"}  # noqa: SIM118
    again = load_policy(str(folder), dtype="float32")
    assert "4 bits (nf4)" in {choice.value for choice in again.choices}
    dense = load_policy(str(folder), dtype="float32", dequantized=True)
    assert not any(map(quantization.is_4bit, dense.model.modules()))
    ids = torch.tensor([[5, 9, 23, 40, 7]])
    with torch.no_grad():
        expected = again.model(input_ids=ids).logits
        assert torch.allclose(dense.model(input_ids=ids).logits, expected, atol=1e-4)
        merged = dense.model.merge_and_unload()
        assert torch.allclose(merged(input_ids=ids).logits, expected, atol=1e-4)
    full = load_policy("tiny", dtype="float32").model(input_ids=ids).logits
    assert not torch.allclose(full, expected, atol=1e-2)
