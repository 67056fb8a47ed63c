"""The engine writes what the model itself would write, sooner, and leaves the model alone."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from scipy import stats
from transformers import (
    AutoModelForCausalLM,
    GenerationConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LogitsProcessorList,
    MinPLogitsWarper,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from abacist.errors import ModelError
from abacist.policy.decoding import network
from abacist.policy.decoding.engine import Engine, Sampling
from abacist.policy.decoding.network import DecodingNetwork, Uncopied
from abacist.policy.decoding.progress import Decoded
from abacist.policy.families import FastPart, unsupported_reason
from abacist.policy.kernels import decode, tree_attention
from abacist.policy.source import BUILT_IN_FOLDER

Fold = Callable[[str], Path]
BUDGET_TOKENS = 12
NO_STOP = (10**6,)

_SMALL = {
    "vocab_size": 200,
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "initializer_range": 0.2,
}


def random_prompts(shared_tokens: int = 0) -> list[list[int]]:
    """Ragged prompts of token ids, the first ``shared_tokens`` the same in all."""
    generator = torch.Generator().manual_seed(7)

    def some(count: int) -> list[int]:
        return torch.randint(3, 190, (count,), generator=generator).tolist()

    shared = some(shared_tokens)
    return [shared + some(count) for count in (5, 17, 1, 9, 17, 30)]


def with_adapter(model: Any) -> Any:
    """``model`` in a LoRA adapter on every linear layer that speaks loudly."""
    config = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", lora_dropout=0.1)
    adapted = get_peft_model(copy.deepcopy(model), config)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, weight in adapted.named_parameters():
            if "lora_B" in name:
                weight.copy_(torch.randn(weight.shape, generator=generator) * 0.05)
    return adapted


def load(kind: str, lookalike: Fold) -> Any:
    if kind == "qwen3":
        torch.manual_seed(0)
        model: Any = Qwen3ForCausalLM(Qwen3Config(**_SMALL, tie_word_embeddings=False))
        for name, weight in model.named_parameters():
            if name.endswith("_norm.weight"):
                torch.nn.init.uniform_(weight, 0.5, 1.5)
    elif kind == "mistral":
        torch.manual_seed(0)
        model = MistralForCausalLM(MistralConfig(**_SMALL, sliding_window=None))
    else:
        folder = BUILT_IN_FOLDER if kind == "tiny" else lookalike(kind)
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        torch.manual_seed(1)
        for name, weight in model.named_parameters():
            if name.endswith("proj.bias"):
                torch.nn.init.normal_(weight, std=0.2)
    model.generation_config = GenerationConfig()  # Qwen2.5's own has a repetition penalty
    return model.eval()


@pytest.fixture(
    scope="module", params=["qwen2.5-instruct", "llama-3.2-instruct", "qwen3", "mistral", "tiny"]
)
def plain(request: pytest.FixtureRequest, lookalike: Fold) -> Any:
    return load(request.param, lookalike)


@pytest.fixture(scope="module", params=["plain", "adapter"])
def model(request: pytest.FixtureRequest, plain: Any) -> Any:
    return plain if request.param == "plain" else with_adapter(plain).eval()


@pytest.fixture(scope="module")
def small(lookalike: Fold) -> Any:
    return with_adapter(load("qwen2.5-instruct", lookalike)).eval()


def up_to_stop(ids: list[int], stop_ids: Sequence[int]) -> list[int]:
    end = next((place + 1 for place, token in enumerate(ids) if token in stop_ids), len(ids))
    return ids[:end]


def by_transformers(
    model: Any, prompts: list[list[int]], budget_tokens: int = BUDGET_TOKENS
) -> list[list[int]]:
    """Greedy completions, each prompt alone and without a stop token."""
    config = GenerationConfig(max_new_tokens=budget_tokens, do_sample=False, pad_token_id=0)
    return [
        model.generate(
            input_ids=torch.tensor([ids]),
            attention_mask=torch.ones(1, len(ids), dtype=torch.long),
            generation_config=config,
        )[0, len(ids) :].tolist()
        for ids in prompts
    ]


def engine(model: Any, stop_ids: Sequence[int] = NO_STOP, max_rows: int = 64) -> Engine:
    return Engine(model, stop_ids=stop_ids, pad_id=0, max_rows=max_rows)


@pytest.mark.parametrize("shared_tokens", [0, 11])
def test_greedy_tokens_are_those_of_transformers(model: Any, shared_tokens: int) -> None:
    assert unsupported_reason(model, FastPart.DECODING) is None
    prompts = random_prompts(shared_tokens)
    whole = by_transformers(model, prompts)
    for max_rows, samples in ((64, 2), (2, 1), (5, 3)):
        written = engine(model, max_rows=max_rows).complete(prompts, samples, BUDGET_TOKENS, None)
        assert written == [[ids] * samples for ids in whole]
    # Stop tokens that end rows at all kinds of moments: they leave, and others take their places.
    stop_ids = (whole[0][2], whole[1][5], whole[3][0])
    for max_rows in (64, 4, 1):
        written = engine(model, stop_ids, max_rows).complete(prompts, 3, BUDGET_TOKENS, None)
        assert written == [[up_to_stop(ids, stop_ids)] * 3 for ids in whole]


def test_a_single_row_of_a_large_model_is_written_without_a_copy_of_its_weights(
    model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts = random_prompts()
    whole = by_transformers(model, prompts)
    largest = sum(weight.numel() for weight in model.parameters())
    monkeypatch.setattr(network, "NO_COPY_WEIGHTS", largest // 2)
    with torch.inference_mode():
        assert type(DecodingNetwork(model, 50, 1).head) is Uncopied
        assert type(DecodingNetwork(model, 50, 2).head) is not Uncopied
    assert engine(model, max_rows=1).complete(prompts, 1, BUDGET_TOKENS, None) == [
        [ids] for ids in whole
    ]
    monkeypatch.setattr(network, "NO_COPY_WEIGHTS", 2 * largest)
    with torch.inference_mode():
        assert type(DecodingNetwork(model, 50, 1).head) is not Uncopied


def test_samples_may_differ_in_number_and_prompts_may_be_equal(small: Any) -> None:
    prompts = random_prompts()
    whole = by_transformers(small, prompts)
    asked = [prompts[2], prompts[0], prompts[2], prompts[5]]
    written = engine(small, max_rows=3).complete(asked, [2, 0, 1, 4], 5, None)
    first, last = whole[2][:5], whole[5][:5]
    assert written == [[first] * 2, [], [first], [last] * 4]


def test_what_a_row_draws_depends_on_its_own_numbers_alone(small: Any) -> None:
    prompts = random_prompts(9)
    uniforms = torch.rand(4 * len(prompts), 20, generator=torch.Generator().manual_seed(1))
    stop_ids = list(range(0, 660, 9))  # rows end early and late
    sampling = Sampling(0.9, top_p=0.95, top_k=50, min_p=0.001, repetition_penalty=1.2)
    whole = engine(small, stop_ids).complete(prompts, 4, 20, sampling, uniforms)
    assert len({len(ids) for group in whole for ids in group}) > 5
    for max_rows in (1, 3, 7):
        assert (
            engine(small, stop_ids, max_rows).complete(prompts, 4, 20, sampling, uniforms) == whole
        )
    alone = engine(small, stop_ids).complete(prompts[2:3], 4, 20, sampling, uniforms[8:12])
    assert alone == whole[2:3]


def test_a_generator_decides_the_uniforms_and_without_one_the_global_generator(small: Any) -> None:
    prompts = random_prompts()

    def drawn(generator: torch.Generator | None) -> list[list[list[int]]]:
        return engine(small).complete(prompts, 2, 4, Sampling(), generator)

    seeded = [drawn(torch.Generator().manual_seed(seed)) for seed in (1, 1, 2)]
    assert seeded[0] == seeded[1] != seeded[2]
    torch.manual_seed(1)
    assert drawn(None) == seeded[0] != drawn(None)


SAMPLINGS = [
    Sampling(),
    Sampling(temperature=0.6),
    Sampling(temperature=0.5, top_k=4),
    Sampling(top_p=0.7),
    Sampling(min_p=0.15),
    Sampling(repetition_penalty=1.8),
    Sampling(temperature=1.2, top_p=0.9, top_k=12, min_p=0.05, repetition_penalty=1.3),
]


def exact(model: Any, ids: torch.Tensor, sampling: Sampling) -> torch.Tensor:
    """The distribution [B, V] of the token behind ``ids`` [B, T], by transformers' processors."""
    processors = LogitsProcessorList()
    if sampling.repetition_penalty != 1:
        processors.append(RepetitionPenaltyLogitsProcessor(sampling.repetition_penalty))
    processors.append(TemperatureLogitsWarper(sampling.temperature))
    if sampling.top_k:
        processors.append(TopKLogitsWarper(sampling.top_k))
    if sampling.top_p < 1:
        processors.append(TopPLogitsWarper(sampling.top_p))
    if sampling.min_p:
        processors.append(MinPLogitsWarper(sampling.min_p))
    with torch.no_grad():
        logits = model(ids).logits[:, -1].float()
    return processors(ids, logits).softmax(-1).double()


def agreement(likelihood: torch.Tensor, drawn: torch.Tensor) -> float:
    """p of a chi-square test: do ``drawn`` [B] follow ``likelihood`` [B, V]?

    The cells are the likeliest tokens of each row that make up a sixth, the next that do, and so
    on; what a cell should hold is the exact sum over all rows.
    """
    ordered, order = likelihood.sort(dim=-1, descending=True)
    cells = torch.zeros_like(order).scatter(-1, order, (6 * (ordered.cumsum(-1) - ordered)).long())
    cells.clamp_(max=5)
    expected = [float(likelihood[cells == cell].sum()) for cell in range(6)]
    mine = cells.gather(1, drawn[:, None])[:, 0]
    observed = [int((mine == cell).sum()) for cell in range(6)]
    used = [cell for cell in range(6) if expected[cell] >= 5]
    counts, likely = [observed[cell] for cell in used], [expected[cell] for cell in used]
    return float(stats.chisquare(counts, [x * sum(counts) / sum(likely) for x in likely]).pvalue)


@pytest.mark.parametrize("sampling", SAMPLINGS, ids=str)
def test_tokens_are_drawn_as_often_as_they_are_likely(small: Any, sampling: Sampling) -> None:
    prompt = random_prompts()[3]
    prompt = [*prompt, *by_transformers(small, [prompt], 3)[0]]  # so that a penalty bites
    generator = torch.Generator().manual_seed(11)
    [written] = engine(small, max_rows=1200).complete([prompt], 2000, 2, sampling, generator)
    first, second = torch.tensor(written).unbind(1)
    known, which = first.unique(return_inverse=True)
    behind = torch.cat((torch.tensor([prompt]).expand(len(known), -1), known[:, None]), dim=1)

    def agreements(other: Sampling) -> tuple[float, float]:
        at_first = exact(small, torch.tensor([prompt]), other).expand(len(first), -1)
        return agreement(at_first, first), agreement(exact(small, behind, other)[which], second)

    at_first = exact(small, torch.tensor([prompt]), sampling)[0]
    assert at_first[first].min() > 0, "a token was drawn that cannot be"
    assert exact(small, behind, sampling)[which, second].min() > 0
    assert min(agreements(sampling)) > 1e-3
    warmer = replace(sampling, temperature=1.5 * sampling.temperature)
    assert min(agreements(warmer)) < 1e-4, "the test must be able to notice"


def test_the_live_model_is_not_touched(plain: Any) -> None:
    model = with_adapter(plain)
    model.train()
    frozen = {name: weight.requires_grad for name, weight in model.named_parameters()}
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    ids = torch.tensor(random_prompts()[:1])
    model(input_ids=ids, labels=ids).loss.backward()
    gradients = {n: w.grad.clone() for n, w in model.named_parameters() if w.grad is not None}
    engine(model, max_rows=4).complete(random_prompts(8), 2, 4, Sampling(repetition_penalty=1.1))
    assert all(module.training for module in model.modules())
    assert frozen == {name: weight.requires_grad for name, weight in model.named_parameters()}
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]) and not tensor.is_inference()
    for name, weight in model.named_parameters():
        assert name not in gradients or torch.equal(weight.grad, gradients[name])
    model(input_ids=ids, labels=ids).loss.backward()  # nothing of inference mode was left behind


def test_a_model_in_training_writes_without_dropout(small: Any) -> None:
    prompts = random_prompts()
    expected = engine(small).complete(prompts, 1, 6, None)
    small.train()
    try:
        assert engine(small).complete(prompts, 1, 6, None) == expected
    finally:
        small.eval()


def test_weights_are_read_anew_by_every_engine(plain: Any) -> None:
    model, prompts = with_adapter(plain), random_prompts()
    first = engine(model).complete(prompts, 1, 8, None)
    with model.disable_adapter():
        assert engine(model).complete(prompts, 1, 8, None) == engine(plain).complete(
            prompts, 1, 8, None
        )
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                weight.mul_(-3)
    assert engine(model).complete(prompts, 1, 8, None) != first
    model.merge_adapter()
    merged = engine(model).complete(prompts, 1, 8, None)
    assert merged == [[ids] for ids in by_transformers(model, prompts, 8)]


def test_merged_weights_are_gone_when_all_is_written(
    small: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    networks: list[weakref.ref[DecodingNetwork]] = []
    build = DecodingNetwork.__init__

    def watched(network: DecodingNetwork, *args: Any) -> None:
        networks.append(weakref.ref(network))
        build(network, *args)

    monkeypatch.setattr(DecodingNetwork, "__init__", watched)
    gc.disable()  # it would come too late: the training that follows needs the memory
    try:
        engine(small, max_rows=4).complete(random_prompts(8), 2, 4, Sampling())
        assert networks
        assert all(network() is None for network in networks)
    finally:
        gc.enable()


def test_half_precision_weights_write_nearly_what_they_write_in_float32(plain: Any) -> None:
    half = copy.deepcopy(plain).to(torch.bfloat16)
    prompts = random_prompts(8)
    for model in (half, with_adapter(half)):
        written = engine(model, max_rows=4).complete(prompts, 2, 6, Sampling(top_p=0.9))
        assert all(len(ids) == 6 for group in written for ids in group)
    firsts = [group[0][0] for group in engine(half).complete(prompts, 1, 1, None)]
    for ids, token in zip(prompts, firsts, strict=True):
        with torch.no_grad():
            logits = half.float()(torch.tensor([ids])).logits[0, -1]
        assert logits.max() - logits[token] <= 0.03 * logits.abs().max()


def test_autocast_around_it_changes_nothing(small: Any) -> None:
    prompts = random_prompts()
    expected = engine(small).complete(prompts, 1, 8, None)
    with torch.autocast("cpu", torch.bfloat16):
        assert engine(small).complete(prompts, 1, 8, None) == expected


def test_progress_ends_with_all_done(small: Any) -> None:
    seen: list[Decoded] = []
    written = engine(small, range(0, 660, 9), 4).complete(
        random_prompts(), 3, 15, Sampling(), progress=seen.append
    )
    ended = [found.ended for found in seen]
    assert ended == sorted(ended) and ended[-1] == seen[-1].replies == 18 and len(set(ended)) > 3
    assert seen[-1].expected_tokens == seen[-1].written_tokens
    exact = sum(len(ids) for group in written for ids in group)
    assert exact <= seen[-1].written_tokens <= 18 * 15
    assert max(found.open for found in seen) == 4


def test_what_it_cannot_compute_exactly_is_refused_with_the_reason(lookalike: Fold) -> None:
    qwen = load("qwen2.5-instruct", lookalike)

    def adapted(**options: Any) -> Any:
        options = {"target_modules": ["q_proj"], **options}
        return get_peft_model(copy.deepcopy(qwen), LoraConfig(r=2, **options))

    gpt2 = GPT2LMHeadModel(GPT2Config(vocab_size=50, n_embd=16, n_layer=1, n_head=2))
    small = {key: value for key, value in _SMALL.items() if key != "head_dim"}
    window = Qwen2Config(**small, use_sliding_window=True, sliding_window=8, max_window_layers=1)
    scaled = Qwen2Config(**small, rope_parameters={"rope_type": "dynamic", "factor": 2.0})
    scaled.rope_parameters["rope_theta"] = 10000.0
    gelu = Qwen2Config(**small, hidden_act="gelu")
    hooked = adapted()
    hooked.get_base_model().model.layers[0].register_forward_hook(lambda *_: None)
    for model, reason in (
        (hooked, "hook"),
        (gpt2, "is not one of Llama"),
        (MistralForCausalLM(MistralConfig(**_SMALL, sliding_window=8)), "sliding-window"),
        (Qwen2ForCausalLM(window), "sliding-window"),
        (Qwen2ForCausalLM(scaled), "rotary"),
        (Qwen2ForCausalLM(gelu), "activation"),
        (adapted(use_dora=True), "DoRA"),
        (adapted(modules_to_save=["lm_head"]), "ModulesToSave"),
        (adapted(target_modules=["q_proj", "embed_tokens"]), "embedding"),
        (adapted(lora_bias=True, target_modules=["q_proj"]), "bias"),
    ):
        assert reason in (unsupported_reason(model, FastPart.DECODING) or "it was taken")
        with pytest.raises(ModelError, match="does not support this model"):
            engine(model)
    for model in (adapted(), qwen):
        assert unsupported_reason(model, FastPart.DECODING) is None


def damaged(model: Any, name: str) -> Any:
    damaged = copy.deepcopy(model)
    with torch.no_grad():
        [weight] = [w for n, w in damaged.named_parameters() if n.endswith(name)]
        weight[-1].fill_(torch.nan)
    return damaged


@pytest.mark.parametrize("kernels", [True, False])
@pytest.mark.parametrize("sampling", [None, SAMPLINGS[0], SAMPLINGS[-1]], ids=str)
def test_scores_that_are_no_numbers_are_refused_and_their_cause_named(
    small: Any, sampling: Sampling | None, kernels: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not kernels:
        for owner in (decode, tree_attention):
            monkeypatch.setattr(owner, "supports", lambda *_: False)
    prompts = random_prompts()
    for name in ("layers.1.mlp.down_proj.base_layer.weight", "layers.0.self_attn.k_proj.bias"):
        broken = damaged(small, name.replace("bias", "base_layer.bias"))
        with pytest.raises(ModelError, match=r"in 6 of 6 completions.*_proj") as raised:
            engine(broken).complete(prompts, 1, 4, sampling)
        assert "is NaN or infinite" in str(raised.value) and "checkpoint" in raised.value.hint
    for budget_tokens in (1, 4):
        with pytest.raises(ModelError, match="NaN or infinite in 2 of 2"):
            engine(broken, max_rows=2).complete(prompts, 1, budget_tokens, sampling)


def test_one_completion_whose_scores_are_no_numbers_is_enough(lookalike: Fold) -> None:
    prompts = [[3, 4, 5], [3, 199, 5], [4, 4, 4]]
    broken = damaged(load("qwen3", lookalike), "embed_tokens.weight")  # of token 199
    assert len(engine(broken).complete([prompts[0], prompts[2]], 1, 1, None)) == 2
    with pytest.raises(ModelError, match="in 1 of 3 completions"):
        engine(broken).complete(prompts, 1, 1, None)


def test_numbers_that_overflow_are_named_with_their_dtype(lookalike: Fold) -> None:
    model = load("qwen3", lookalike).half()
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight.fill_(6e4)
    with pytest.raises(ModelError, match=r"All weights are finite.*float16") as raised:
        engine(model).complete(random_prompts(), 1, 3, Sampling())
    assert "--dtype float32" in raised.value.hint


def test_bad_requests_are_named(small: Any) -> None:
    with pytest.raises(ModelError, match="no tokens was asked"):
        engine(small).complete([[1]], 1, 0, None)
    with pytest.raises(ModelError, match="Prompt 1 has no tokens"):
        engine(small).complete([[1], []], 1, 4, None)
    for options in (
        {"temperature": 0.0},
        {"top_p": 1.5},
        {"top_k": -1},
        {"min_p": 2.0},
        {"repetition_penalty": 0.0},
    ):
        with pytest.raises(ModelError, match=next(iter(options))):
            Sampling(**options)
    assert engine(small).complete([], 2, 4, Sampling()) == []
    assert engine(small).complete([[1, 2]], 0, 4, None) == [[]]
