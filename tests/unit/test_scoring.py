"""The lean forward has the values, the gradients and the manners of TRL's own."""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    GemmaConfig,
    GemmaForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    SmolLM3Config,
    SmolLM3ForCausalLM,
)
from trl import GRPOTrainer
from trl.trainer.utils import add_fused_lm_head

from abacist.policy.families import FastPart, unsupported_reason
from abacist.policy.kernels import build, tree_attention
from abacist.policy.model_parts import base_of
from abacist.policy.scoring import score as scoring
from abacist.policy.scoring.head import score_tokens
from abacist.policy.scoring.packing import pack
from abacist.policy.scoring.score import score
from abacist.policy.source import BUILT_IN_FOLDER

TEMPERATURE = 0.9
VOCABULARY = 160
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.08,
}
ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 32.0,
    "high_freq_factor": 4.0,
    "low_freq_factor": 1.0,
    "original_max_position_embeddings": 64,
}
FAMILIES: dict[str, Callable[[], Any]] = {
    "llama": lambda: LlamaForCausalLM(
        LlamaConfig(**SIZES, tie_word_embeddings=True, rope_parameters=ROPE)
    ),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**SIZES, tie_word_embeddings=False)),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**SIZES, head_dim=16)),
    "mistral": lambda: MistralForCausalLM(MistralConfig(**SIZES, sliding_window=None)),
    "smollm3": lambda: SmolLM3ForCausalLM(
        SmolLM3Config(**SIZES, pad_token_id=3, no_rope_layer_interval=2)
    ),
    "tiny": lambda: AutoModelForCausalLM.from_pretrained(BUILT_IN_FOLDER, dtype=torch.float32),
}
LORA = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear")

# Lengths of the prompts (told apart by their last tokens), how many completions each has, and
# how many tokens all prompts begin with.
BATCHES = {
    "groups": ((9, 12, 7), (4, 4, 4), 0),
    "one group": ((11,), (5,), 0),
    "groups and singletons": ((8, 15, 9, 10), (3, 1, 2, 1), 0),
    "few-shot": ((70, 64, 81), (3, 2, 3), 60),
}


def make(family: str, tuning: str = "lora", *, checkpointing: bool = False) -> Any:
    torch.manual_seed(5)
    model = FAMILIES[family]()
    add_fused_lm_head(model, temperature=TEMPERATURE, outputs=("log_probs", "entropy"))
    if tuning == "lora":
        model = get_peft_model(model, LORA)
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(weight, std=0.02)
    model.train()
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.enable_input_require_grads()
    return model


def unsupported(model: Any) -> str | None:
    return unsupported_reason(model, FastPart.SCORING)


def batch_of(name: str, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, int]:
    lengths, counts, common = BATCHES[name]
    draw = torch.Generator().manual_seed(seed)

    def tokens(count: int) -> torch.Tensor:
        return torch.randint(5, VOCABULARY, (count,), generator=draw)

    opening = tokens(common)
    prompts = [torch.cat([opening, tokens(length - common)]) for length in lengths]
    rows = [
        (prompt, tokens(int(torch.randint(1, 14, (), generator=draw))))
        for prompt, count in zip(prompts, counts, strict=True)
        for _ in range(count)
    ]
    rows = [rows[i] for i in torch.randperm(len(rows), generator=draw)]  # as TRL shuffles them
    left, right = max(lengths) + 2, max(len(completion) for _, completion in rows)
    ids = torch.full((len(rows), left + right), 3)
    mask = torch.zeros_like(ids)
    for row, (prompt, completion) in enumerate(rows):
        for start, part in ((left - len(prompt), prompt), (left, completion)):
            ids[row, start : start + len(part)] = part
            mask[row, start : start + len(part)] = 1
    return ids, mask, right


def stock(model: Any, ids: Any, mask: Any, width: int) -> tuple[Any, Any]:
    """TRL's own method, given no more of a trainer than it asks for."""
    accelerator = SimpleNamespace(autocast=nullcontext, is_main_process=False)
    trainer: Any = SimpleNamespace(accelerator=accelerator)
    logps, entropies, _ = GRPOTrainer._get_per_token_logps_and_entropies(
        trainer, model, ids, mask, width, compute_entropy=True
    )
    return logps, entropies


def ours(model: Any, ids: Any, mask: Any, width: int, **options: Any) -> tuple[Any, Any]:
    options = {"temperature": TEMPERATURE, "compute_entropy": True, **options}
    return score(model, ids, mask, width, **options)


def gradients(model: Any, logps: torch.Tensor, weights: torch.Tensor | None = None) -> torch.Tensor:
    """Of a GRPO loss with old log-probabilities a little off, all in one vector."""
    model.zero_grad()
    places = torch.arange(logps.numel(), device=logps.device).view_as(logps)
    old = (logps + 0.1 * torch.sin(places)).detach()
    if weights is None:
        weights = torch.linspace(-1.5, 1, len(logps), device=logps.device)[:, None]
    ratio = torch.exp(logps - old)
    loss = -torch.min(ratio * weights, ratio.clamp(0.9, 1.1) * weights)
    (loss * (logps != 0)).sum().div(logps.numel()).backward()
    return torch.cat(
        [w.grad.reshape(-1).float() for w in model.parameters() if w.grad is not None]
    ).clone()


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a.double() - b.double()).norm() / b.double().norm())


def furthest(a: torch.Tensor, b: torch.Tensor) -> float:
    """The largest difference, relative to values beyond 1 (a trained model's reach -30)."""
    return float(((a - b).abs() / b.abs().clamp(min=1.0)).max())


def compare(model: Any, batch: Any, **options: Any) -> tuple[float, float, float]:
    """How far ours is from stock: log-probabilities, entropies, gradients (relative)."""
    logps, entropies = ours(model, *batch, **options)
    mine = gradients(model, logps)
    stock_logps, stock_entropies = stock(model, *batch)
    theirs = gradients(model, stock_logps)
    return (
        furthest(logps.detach(), stock_logps.detach()),
        furthest(entropies, stock_entropies.detach()),
        distance(mine, theirs),
    )


@pytest.fixture(params=["kernel", "pytorch"])
def either_attention(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Attention by our kernel, and by PyTorch where that cannot be had."""
    if request.param == "pytorch":
        monkeypatch.setattr(tree_attention, "supports", lambda *_: False)
    elif reason := build.unsupported_reason():
        pytest.skip(f"no kernels here: {reason}")


@pytest.mark.usefixtures("either_attention")
@pytest.mark.parametrize("name", BATCHES)
@pytest.mark.parametrize("tuning", ["lora", "full"])
@pytest.mark.parametrize("family", FAMILIES)
def test_values_and_gradients_are_those_of_stock_trl(family: str, tuning: str, name: str) -> None:
    model = make(family, tuning)
    assert unsupported(model) is None
    logps, entropies, gradient = compare(model, batch_of(name))
    assert logps < 1e-5
    assert entropies < 2e-5  # of up to 6 nats: how a CPU rounds moves them by more than 1e-5
    assert gradient < 1e-5


@pytest.mark.usefixtures("either_attention")
@pytest.mark.parametrize("tuning", ["lora", "full"])
@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_changes_nothing(tuning: str, reentrant: bool) -> None:
    model = make("qwen2", tuning)
    plain = gradients(model, ours(model, *batch_of("few-shot"))[0])
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    assert distance(gradients(model, ours(model, *batch_of("few-shot"))[0]), plain) < 1e-6


def test_chunks_of_the_head_change_nothing() -> None:
    for tuning in ("lora", "full"):
        *values, gradient = compare(make("llama", tuning), batch_of("groups"), head_chunk_tokens=3)
        assert max(*values, gradient) < 1e-5


@pytest.mark.usefixtures("either_attention")
def test_skipped_rows_are_zero_and_leave_the_others_as_they_are() -> None:
    model, (ids, mask, width) = make("qwen2"), batch_of("groups and singletons")
    skip = torch.tensor([True, False, False, True, False, False, True])
    weights = torch.where(skip, 0.0, torch.linspace(-1.5, 1, 7))[:, None]
    whole, _ = ours(model, ids, mask, width)
    expected = gradients(model, whole, weights)
    part, entropies = ours(model, ids, mask, width, skip_rows=skip)
    assert torch.equal(part[skip], torch.zeros_like(part[skip]))
    assert torch.equal(entropies[skip], torch.zeros_like(part[skip]))
    assert torch.allclose(part[~skip], whole[~skip], atol=1e-5)
    assert distance(gradients(model, part, weights), expected) < 1e-5


def test_a_batch_of_nothing_gives_every_weight_a_zero_gradient() -> None:
    model, (ids, mask, width) = make("qwen2"), batch_of("groups")
    logps, entropies = ours(model, ids, mask, width, skip_rows=torch.ones(len(ids)).bool())
    (logps * 2).sum().backward()
    assert not logps.any() and not entropies.any()
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    assert all(weight.grad is not None and not weight.grad.any() for weight in trained)


def test_completions_masked_whole_are_not_scored() -> None:
    model, (ids, mask, width) = make("qwen2"), batch_of("groups")
    mask[3, -width:] = 0
    values = compare(model, (ids, mask, width))
    assert max(values) < 1e-5
    assert not ours(model, ids, mask, width)[0][3].any()


def test_padding_in_the_wrong_place_is_refused() -> None:
    model, (ids, mask, width) = make("qwen2"), batch_of("groups")
    first = ids.shape[1] - width
    for place in (first - 2, first):  # a hole in the prompt, one in the completion
        wrong = torch.ones_like(mask)
        wrong[1, place] = 0
        with pytest.raises(ValueError, match="padded on the"):
            ours(model, ids, wrong, width)
    mask[2, :first] = 0
    with pytest.raises(ValueError, match="without any prompt"):
        ours(model, ids, mask, width)


@pytest.mark.usefixtures("either_attention")
def test_without_gradients_the_values_are_the_same() -> None:
    model, batch = make("qwen3"), batch_of("few-shot")
    with torch.no_grad():
        logps, _ = ours(model, *batch)
    assert not logps.requires_grad
    assert torch.allclose(logps, ours(model, *batch)[0], atol=1e-6)


def test_an_adapter_switched_off_gives_the_reference_model() -> None:
    model, batch = make("qwen2"), batch_of("groups")
    with torch.no_grad(), model.disable_adapter():
        logps, _ = ours(model, *batch)
        expected, _ = stock(model, *batch)
    assert torch.allclose(logps, expected, atol=1e-5)
    assert not torch.allclose(logps, ours(model, *batch)[0], atol=1e-3)


@pytest.mark.parametrize("tuning", ["lora", "full"])
@pytest.mark.parametrize("weights", ["bfloat16", "autocast"])
@pytest.mark.parametrize("name", ["groups", "few-shot"])
def test_bfloat16_gradients_are_as_near_to_float32_as_those_of_stock(
    tuning: str, weights: str, name: str
) -> None:
    errors = {"ours": 0.0, "stock": 0.0}
    for seed in range(3):
        model, batch = make("qwen2", tuning), batch_of(name, seed)
        if weights == "bfloat16":  # the same numbers in both dtypes
            for weight in model.parameters():
                weight.data = weight.data.bfloat16().float()
        exact = gradients(model, stock(model, *batch)[0])
        low = copy.deepcopy(model)
        if weights == "bfloat16":
            low = low.to(torch.bfloat16)
        for who, path in (("ours", ours), ("stock", stock)):
            # deepcopy leaves TRL's patched forward bound to the model it was copied from
            subject = model if weights == "autocast" else _patched_again(low)
            with torch.autocast("cpu", torch.bfloat16, enabled=weights == "autocast"):
                logps, _ = path(subject, *batch)
            errors[who] += distance(gradients(subject, logps), exact)
    assert errors["ours"] <= 1.2 * errors["stock"], errors


def _patched_again(model: Any) -> Any:
    causal = base_of(model)
    causal.__dict__.pop("forward", None)
    add_fused_lm_head(causal, temperature=TEMPERATURE, outputs=("log_probs", "entropy"))
    return model


@pytest.mark.usefixtures("either_attention")
@pytest.mark.parametrize("fault", ["position", "neighbour", "common opening"])
def test_a_fault_in_the_packing_would_be_noticed(
    fault: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def faulty(*args: Any) -> Any:
        packing = pack(*args)
        assert packing is not None
        leaf = packing.levels[-1]
        assert leaf.sees is not None and leaf.parents is not None
        if fault == "position":
            packing.position_ids[-3] += 1
        elif fault == "neighbour":
            leaf.parents = leaf.parents.roll(1)
            leaves = packing.branches[-len(leaf.parents) :]
            leaves[:, 2] = leaves[:, 2].roll(1)
        else:
            leaf.sees = leaf.sees.clone()
            leaf.sees[:, 0] = False
            packing.branches[1 : -len(leaf.parents), 2] = -1
        return packing

    monkeypatch.setattr(scoring, "pack", faulty)
    logps, _, gradient = compare(make("qwen2"), batch_of("few-shot"))
    assert logps > 1e-3
    assert gradient > 1e-3


@pytest.mark.usefixtures("either_attention")
def test_completions_do_not_see_each_other() -> None:
    model, (ids, mask, width) = make("qwen2"), batch_of("one group")
    before, _ = ours(model, ids, mask, width)
    ids[0, -width:] = 7
    after, _ = ours(model, ids, mask, width)
    assert torch.allclose(before[1:], after[1:], atol=1e-6)
    assert not torch.allclose(before[0], after[0], atol=1e-2)


def test_what_rows_share_is_laid_out_once() -> None:
    ids, mask, width = batch_of("few-shot")
    packing = pack(ids, mask, width)
    assert packing is not None
    completions = int(mask[:, -width:].sum()) - len(ids)  # nothing depends on a last token
    assert len(packing.token_ids) == 60 + (10 + 4 + 21) + completions
    assert [level.tokens for level in packing.levels] == [60, 35, completions]


@pytest.fixture
def model_with_past() -> Iterator[tuple[Any, Any]]:
    yield make("qwen2", checkpointing=True), make("qwen2", checkpointing=True)


def test_an_ordinary_forward_and_generate_are_untouched_afterwards(
    model_with_past: tuple[Any, Any],
) -> None:
    used, fresh = model_with_past
    ids, mask, width = batch_of("groups")
    gradients(used, ours(used, ids, mask, width)[0])
    implementation = fresh.config._attn_implementation
    assert used.config._attn_implementation == implementation
    for model in (used, fresh):
        model.eval()
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 3}
    with torch.no_grad():
        logits = [model(input_ids=ids, attention_mask=mask).logits for model in (used, fresh)]
        texts = [
            model.generate(input_ids=ids[:, :-width], attention_mask=mask[:, :-width], **options)
            for model in (used, fresh)
        ]
    assert torch.equal(*logits)
    assert torch.equal(*texts)


def test_a_model_in_ddp_is_scored_within_its_forward(tmp_path: Path) -> None:
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1
    )
    try:
        model, batch = make("qwen2"), batch_of("groups")
        expected = gradients(model, ours(model, *batch)[0])
        wrapped: Any = torch.nn.parallel.DistributedDataParallel(model)
        assert unsupported(wrapped) is None
        assert distance(gradients(wrapped, ours(wrapped, *batch)[0]), expected) < 1e-6
        assert "forward" not in model.__dict__
    finally:
        # Should the wrapper outlive the group, freeing it can wait for the group's own thread.
        wrapped = None
        gc.collect()
        torch.distributed.destroy_process_group()


def test_the_frozen_head_keeps_no_logits() -> None:
    kept: list[int] = []
    hidden = torch.randn(50, 8, requires_grad=True)
    weight = torch.randn(1000, 8)

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        score_tokens(hidden, weight, torch.arange(50))
    assert sum(kept) <= hidden.numel()


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"use_dora": True}, "variant"),
        ({"modules_to_save": ["lm_head"]}, "plain linear|modules_to_save"),
        ({"lora_dropout": 0.05}, "dropout"),
        ({"target_modules": ["q_proj", "embed_tokens"]}, "Embedding"),
        ({"target_modules": ["q_proj", "lm_head"]}, "head"),
    ],
)
def test_adapters_of_other_kinds_are_refused(change: dict[str, Any], reason: str) -> None:
    settings = {"r": 4, "target_modules": ["q_proj"], **change}
    said = unsupported(get_peft_model(FAMILIES["qwen2"](), LoraConfig(**settings)).train())
    assert said is not None
    assert any(word in said for word in reason.split("|"))


def test_models_of_other_kinds_are_refused() -> None:
    sliding = Qwen2Config(**SIZES, use_sliding_window=True, sliding_window=8, max_window_layers=0)
    dropping = Qwen2Config(**SIZES, attention_dropout=0.1)
    dynamic = LlamaConfig(
        **SIZES, rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
    )
    eager = Qwen2ForCausalLM._from_config(Qwen2Config(**SIZES), attn_implementation="eager")
    for model, word in (
        (GemmaForCausalLM(GemmaConfig(**SIZES)), "GemmaForCausalLM is not one of"),
        (MistralForCausalLM(MistralConfig(**SIZES, sliding_window=8)), "sliding"),
        (Qwen2ForCausalLM(sliding), "sliding"),
        (Qwen2ForCausalLM(dropping).train(), "dropout"),
        (LlamaForCausalLM(dynamic), "rotary"),
        (eager, "eager"),
    ):
        assert word in str(unsupported(model))
    assert unsupported(Qwen2ForCausalLM(dropping).eval()) is None
    lora = LoraConfig(r=4, target_modules=["q_proj"], lora_dropout=0.05)
    assert unsupported(get_peft_model(FAMILIES["qwen2"](), lora).eval()) is None
