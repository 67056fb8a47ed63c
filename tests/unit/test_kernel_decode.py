"""The decoding kernels compute what PyTorch does, whatever the shapes, and refuse what they cannot.

Shapes: N rows, I inputs and O outputs of a product, V vocabulary entries.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from scipy import stats
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    GenerationConfig,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from abacist.policy.decoding.cache import Cache
from abacist.policy.decoding.engine import Engine
from abacist.policy.decoding.network import DecodingNetwork
from abacist.policy.decoding.token_sampling import Sampling, sample_tokens
from abacist.policy.kernels import build, decode, tree_attention

pytestmark = pytest.mark.skipif(
    build.library() is None, reason=f"there are no kernels: {build.unsupported_reason()}"
)
Fold = Callable[[str], Path]
LANES = build.library().kernels_lanes() if build.library() else 4
JUST_BELOW_1 = 1 - 2.0**-53


@contextmanager
def without_kernels() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(decode, "supports", lambda *_: False)
        patch.setattr(tree_attention, "supports", lambda *_: False)
        yield


@contextmanager
def threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(build, "_WORTH_A_THREAD", 1.0)
            yield
    finally:
        torch.set_num_threads(before)


# Products -------------------------------------------------------------------------------------

sizes = st.integers(1, 5 * LANES)


def near(found: torch.Tensor, exact: torch.Tensor, terms: torch.Tensor) -> bool:
    """Whether ``found`` is ``exact`` up to 1e-5 of what was added up for it (float64)."""
    return bool(((found.double() - exact).abs() <= 1e-5 * terms + 1e-6).all())


@given(
    inputs=sizes,
    outputs=st.lists(sizes, min_size=1, max_size=4),
    rows=st.integers(1, 30),
    with_bias=st.lists(st.booleans(), min_size=4, max_size=4),
    with_residual=st.booleans(),
    seed=st.integers(0, 99),
)
def test_linears_side_by_side_are_the_linears(
    inputs: int,
    outputs: list[int],
    rows: int,
    with_bias: list[bool],
    with_residual: bool,
    seed: int,
) -> None:
    torch.manual_seed(seed)
    weights = [torch.randn(count, inputs) for count in outputs]
    biases = [torch.randn(n) if has else None for n, has in zip(outputs, with_bias, strict=False)]
    x = torch.randn(rows, inputs)
    residual = torch.randn(rows, sum(outputs)) if with_residual else None
    exact, terms = (
        torch.cat(
            [
                F.linear(of(x.double()), of(w.double()), None if b is None else of(b.double()))
                for w, b in zip(weights, biases, strict=True)
            ],
            dim=1,
        )
        + (0 if residual is None else of(residual.double()))
        for of in (lambda t: t, torch.abs)
    )
    assert near(decode.Packed(weights, biases)(x, residual), exact, terms)


@given(inputs=sizes, outputs=sizes, rows=st.integers(1, 30), bias=st.booleans())
def test_a_gated_product_is_silu_of_one_times_the_other(
    inputs: int, outputs: int, rows: int, bias: bool
) -> None:
    torch.manual_seed(inputs * outputs + rows)
    weights = [torch.randn(outputs, inputs) for _ in range(2)]
    biases = [torch.randn(outputs) if bias else None for _ in range(2)]
    x = 3 * torch.randn(rows, inputs)
    (gate, up), (gate_terms, up_terms) = (
        [
            F.linear(of(x.double()), of(w.double()), None if b is None else of(b.double()))
            for w, b in zip(weights, biases, strict=True)
        ]
        for of in (lambda t: t, torch.abs)
    )
    found = decode.Packed(weights, biases, gated=True)(x)
    assert near(found, F.silu(gate) * up, gate_terms * up_terms)


def test_a_gate_holds_at_the_ends_of_the_numbers() -> None:
    product = decode.Packed([torch.ones(1, 1)] * 2, [None] * 2, gated=True)
    found = product(torch.tensor([[1e4], [-1e4], [0.0], [-100.0], [torch.nan]]))[:, 0]
    assert found[:4].tolist() == [1e8, 0, 0, 0] and found[4].isnan()


def test_a_row_has_the_same_product_in_any_company_order_and_number_of_threads() -> None:
    torch.manual_seed(0)
    x, weight, residual = torch.randn(300, 700), torch.randn(45, 700), torch.randn(300, 45)
    product = decode.Packed([weight], [None])
    exact = residual.double() + x.double() @ weight.double().T
    terms = residual.double().abs() + x.double().abs() @ weight.double().abs().T
    found = product(x, residual)
    assert near(found, exact, terms)
    assert torch.equal(found[110:130], product(x[110:130], residual[110:130]))
    assert torch.equal(found, product(x.T.contiguous().T, residual.T.contiguous().T))
    with threads(2):
        assert torch.equal(found, product(x, residual))


# The network ----------------------------------------------------------------------------------


def small(family: str = "qwen3", **changes: Any) -> Any:
    sizes = {
        "vocab_size": 90,
        "hidden_size": 3 * LANES + 2,
        "intermediate_size": 2 * LANES + 5,
        "num_hidden_layers": 2,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "head_dim": 2 * LANES,
        "initializer_range": 0.2,
        **changes,
    }
    torch.manual_seed(0)
    if family == "qwen3":
        model: Any = Qwen3ForCausalLM(Qwen3Config(**sizes))
    else:
        model = Qwen2ForCausalLM(Qwen2Config(**sizes))
    for name, weight in model.named_parameters():
        if name.endswith(("norm.weight", "bias")):
            nn.init.uniform_(weight, 0.5, 1.5)
    return model.eval()


def load(kind: str, lookalike: Fold) -> Any:
    if not kind.endswith("instruct"):
        return small(kind)
    return AutoModelForCausalLM.from_pretrained(lookalike(kind), dtype=torch.float32).eval()


def new_cache(network: DecodingNetwork) -> Cache:
    return Cache(network, max_rows=60, max_prompts=4, prompt_tokens=50, completion_tokens=20)


class Both:
    """A cache with kernels and one without: what is asked of one is asked of the other."""

    def __init__(self, model: Any) -> None:
        self.fast = new_cache(DecodingNetwork(model, 70))
        with without_kernels():
            self.plain = new_cache(DecodingNetwork(model, 70))
        assert self.fast._network.decoder is not None and self.plain._network.decoder is None

    def ask(self, name: str, *arguments: Any, **options: Any) -> None:
        fast = getattr(self.fast, name)(*arguments, **options)
        with without_kernels():
            plain = getattr(self.plain, name)(*arguments, **options)
        assert (fast is None) == (plain is None)
        if fast is not None:
            assert torch.allclose(fast, plain, rtol=1e-4, atol=1e-4)

    def step(self, prompt_tokens: list[int], written: list[int]) -> None:
        tokens = torch.randint(90, (len(written),))
        lengths = torch.tensor(prompt_tokens), torch.tensor(written)
        self.ask("step", tokens, *lengths, max(written) + 1)


def ids(count: int) -> list[int]:
    return torch.randint(90, (count,)).tolist()


@pytest.mark.parametrize("kind", ["qwen2.5-instruct", "llama-3.2-instruct", "qwen3", "qwen2"])
@pytest.mark.parametrize("shared", [0, 12])
@torch.inference_mode()
def test_a_step_is_the_plain_step_for_rows_and_prompts_that_come_and_go(
    kind: str, shared: int, lookalike: Fold
) -> None:
    both = Both(load(kind, lookalike))
    torch.manual_seed(1)
    prefix = ids(shared)
    if shared:
        both.ask("keep_prefix", prefix)
    prompts = [prefix + ids(count) for count in (1, 33, 17)]
    lengths = [len(prompt) for prompt in prompts]
    both.ask("read_prompts", prompts, 0)
    # More rows of one prompt than a vector has lanes, not next to each other.
    rows = [place for turn in range(LANES + 3) for place in ((1, 2, 1) if turn < 5 else (1,))]
    written = [0] * len(rows)
    both.ask("arrange", rows, lengths)
    for _ in range(3):
        both.step([lengths[place] for place in rows], written)
        written = [count + 1 for count in written]
    # The first prompt, of no rows, goes; so do the first two rows; five of another prompt come.
    both.ask("move_prompts", [2], [0])
    both.ask("move_rows", [len(rows) - 2, len(rows) - 1], [0, 1], 3)
    rows = [{1: 1, 2: 0}[place] for place in [*rows[-2:], *rows[2:-2]]]
    both.ask("read_prompts", [prefix + ids(9)], 2)
    lengths = [lengths[2], lengths[1], shared + 9]
    rows, written = [*rows, *[2] * 5], [*written[:-2], *[0] * 5]
    both.ask("arrange", rows, lengths)
    for _ in range(LANES + 2 if LANES < 16 else 3):
        both.step([lengths[place] for place in rows], written)
        written = [count + 1 for count in written]


SHARED_OUT = {"intermediate_size": 4096, "hidden_size": 120}  # its layers are larger than a cache


def after_two_tokens(network: DecodingNetwork, rows: list[int], poisoned: bool) -> torch.Tensor:
    """The states of ``rows``, numbers from 0 to 26, each with the same prompt and tokens in any
    company. ``poisoned``: what all prompts begin with is not a number but in the first place."""
    torch.manual_seed(7)
    prefix, lengths = ids(12), [13, 45, 29]
    prompts = [prefix + ids(length - 12) for length in lengths]
    tokens = torch.randint(90, (2, 27))
    prompt_of = [[0, 1, 2, 1][number % 4] for number in range(27)]
    cache = new_cache(network)
    cache.keep_prefix(prefix)
    cache.read_prompts(prompts, 0)
    if poisoned:
        cache._prompts[:, :, 1:, :, :12] = torch.nan
    cache.arrange([prompt_of[row] for row in rows], lengths)
    of_rows = torch.tensor([lengths[prompt_of[row]] for row in rows])
    for step in range(2):
        written = torch.full_like(of_rows, step)
        states = cache.step(tokens[step, rows], of_rows, written, step + 1)
    return states


@pytest.mark.parametrize("sizes", [{}, SHARED_OUT])
@torch.inference_mode()
def test_what_all_prompts_begin_with_is_read_in_one_place_and_a_row_is_the_same_in_any_company(
    sizes: dict[str, int],
) -> None:
    network = DecodingNetwork(small(**sizes), 70)
    together = after_two_tokens(network, list(range(27)), poisoned=False)
    assert together.isfinite().all()
    assert torch.equal(after_two_tokens(network, list(range(27)), poisoned=True), together)
    for rows in ([5], [26, 3, 4], [number for number in range(27) if number % 4 == 2]):
        assert torch.equal(after_two_tokens(network, rows, poisoned=False), together[rows])


def held_in_bfloat16(model: Any) -> Any:
    """``model`` with adapters of other ranks on each projection beside its weights."""
    for weight in model.parameters():
        weight.data = weight.data.bfloat16()
    ranks = {"k_proj": 3, "o_proj": 9, "gate_proj": 17, "down_proj": 2}
    lora = LoraConfig(r=8, rank_pattern=ranks, target_modules="all-linear")
    adapted = get_peft_model(model, lora)
    for name, weight in adapted.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(weight, std=0.1)
    return adapted


@pytest.mark.parametrize("held", [False, True])
@pytest.mark.parametrize("shared", [0, 5])
@pytest.mark.parametrize("sizes", [{}, SHARED_OUT])
@torch.inference_mode()
def test_the_number_of_threads_does_not_change_a_bit(
    sizes: dict[str, int], shared: int, held: bool
) -> None:
    found = []
    torch.manual_seed(4)
    model = held_in_bfloat16(small(**sizes)) if held else small(**sizes)
    for count in (1, 2, 3):
        with threads(count):
            network = DecodingNetwork(model, 60)
            cache = new_cache(network)
            torch.manual_seed(2)
            prefix = ids(shared)
            if prefix:
                cache.keep_prefix(prefix)
            own = [31 - shared, 7 - shared, 40 - shared]
            read = cache.read_prompts([prefix + ids(count) for count in own], 0)
            rows = torch.tensor([0, 1, 2] * 15)
            cache.arrange(rows.tolist(), [31, 7, 40])
            lengths = torch.tensor([31, 7, 40])[rows]
            written = torch.zeros_like(rows)
            states = []
            for _ in range(12):
                states.append(cache.step(torch.randint(90, (45,)), lengths, written, 3))
                written += 1
            logits = network.head(states[-1])
            uniforms = torch.rand(45, dtype=torch.float64)
            tokens = sample_tokens(logits, uniforms, Sampling())
            found.append([read, *states, logits, tokens])
    for others in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], others, strict=True))


def by_transformers(model: Any, prompts: list[list[int]], budget_tokens: int) -> list[list[int]]:
    config = GenerationConfig(max_new_tokens=budget_tokens, do_sample=False, pad_token_id=0)
    return [
        model.generate(torch.tensor([one]), generation_config=config)[0, len(one) :].tolist()
        for one in prompts
    ]


def wider_in_its_second_layer(model: Any) -> Any:
    mlp, hidden, inner = model.model.layers[1].mlp, model.config.hidden_size, 6 * LANES + 1
    mlp.gate_proj, mlp.up_proj = (nn.Linear(hidden, inner, bias=False) for _ in range(2))
    mlp.down_proj = nn.Linear(inner, hidden, bias=False)
    return model


def with_weights_in_another_order(model: Any) -> Any:
    for weight in model.parameters():
        if weight.dim() == 2:
            weight.data = weight.data.T.contiguous().T
        else:
            weight.data = torch.stack((weight.data, -weight.data), dim=1)[:, 0]
    return model


@pytest.mark.parametrize("mode", ["kernels", "plain"])
@pytest.mark.parametrize(
    ("model", "has_decoder"),
    [
        (lambda: small("qwen2"), True),
        (lambda: wider_in_its_second_layer(small()), True),
        (lambda: with_weights_in_another_order(small()), True),
        (lambda: small(head_dim=LANES + 2), False),
        (lambda: small(num_key_value_heads=6, tie_word_embeddings=True), True),
    ],
    ids=["qwen2", "uneven layers", "strided weights", "odd heads", "no groups"],
)
def test_greedy_tokens_are_those_of_transformers(
    mode: str, model: Callable[[], Any], has_decoder: bool
) -> None:
    made = model()
    torch.manual_seed(3)
    prompts = [ids(count) for count in (4, 21, 9)]
    expected = [[one] * 3 for one in by_transformers(made, prompts, 6)]
    writer = Engine(made, stop_ids=[10**6], pad_id=0, max_rows=5)
    if mode == "plain":
        with without_kernels():
            assert writer.complete(prompts, 3, 6, None) == expected
        return
    with torch.inference_mode():
        assert (DecodingNetwork(made, 30).decoder is not None) == has_decoder
    assert writer.complete(prompts, 3, 6, None) == expected


@torch.inference_mode()
def test_what_is_neither_float32_nor_widened_to_it_gets_no_decoder() -> None:
    for name in ("final_norm", "embedding", "cos", "sin"):
        network = DecodingNetwork(small(), 30)
        assert decode.decoder(network.weights()) is not None
        setattr(network, name, getattr(network, name).half())
        assert decode.decoder(network.weights()) is None
    model = small()
    model.model.layers[1].self_attn.q_norm.half()
    assert DecodingNetwork(model, 30).decoder is None
    model = small()
    model.model.layers[1].mlp.up_proj.half()
    assert DecodingNetwork(model, 30).decoder is None
    assert DecodingNetwork(small().half(), 30).decoder is None
    assert DecodingNetwork(small().bfloat16(), 30).decoder is not None


@torch.inference_mode()
def test_logits_are_those_of_the_head_in_memory_that_is_kept_for_fewer_rows() -> None:
    network = DecodingNetwork(small(), 30)
    states = torch.randn(9, network.weights().embedding.shape[1])
    places = set()
    for rows in (4, 9, 5, 9, 1):
        found = network.logits(states[:rows])
        assert torch.equal(found, network.head(states[:rows]))
        places.add(found.data_ptr())
    assert len(places) == 2  # of 4 rows, and then of 9


@pytest.mark.parametrize(
    "broken", ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "down_proj", "k_norm"]
)
@pytest.mark.parametrize("shared", [0, 2])
@torch.inference_mode()
def test_a_weight_that_is_not_a_number_shows_in_every_logit(broken: str, shared: int) -> None:
    model = small()
    layer = model.model.layers[1]
    owner = layer.mlp if hasattr(layer.mlp, broken) else layer.self_attn
    getattr(owner, broken).weight.view(-1)[-1] = torch.nan
    network = DecodingNetwork(model, 30)
    cache = new_cache(network)
    if shared:
        cache.keep_prefix([5, 6])
    cache.read_prompts([[5, 6, 7]], 0)
    cache.arrange([0, 0], [3])
    zeros = torch.zeros(2, dtype=torch.long)
    states = cache.step(torch.tensor([8, 9]), zeros + 3, zeros, 1)
    assert network.head(states).isnan().all()


# Sampling -------------------------------------------------------------------------------------


def drawn(logits: torch.Tensor, uniforms: Any, temperature: float = 1.0) -> torch.Tensor:
    uniforms = torch.as_tensor(uniforms, dtype=torch.float64).expand(len(logits))
    return decode.sample(logits, uniforms, temperature)


@settings(max_examples=40)
@given(
    vocabulary=st.one_of(st.integers(1, 600), st.just(5000)),
    spread=st.sampled_from([0.01, 1.0, 8.0, 60.0]),
    temperature=st.sampled_from([0.3, 1.0, 1.7]),
    impossible=st.booleans(),
    seed=st.integers(0, 10**6),
)
def test_the_token_drawn_is_where_the_cumulated_probability_passes_the_uniform(
    vocabulary: int, spread: float, temperature: float, impossible: bool, seed: int
) -> None:
    torch.manual_seed(seed)
    logits = spread * torch.randn(20, vocabulary) + 30 * torch.randn(20, 1)
    if impossible:
        gone = torch.rand(20, vocabulary) < 0.7
        logits.masked_fill_(gone & ~gone.all(dim=1, keepdim=True), -torch.inf)
    uniforms = torch.rand(20, dtype=torch.float64)
    chosen = drawn(logits, uniforms, temperature)
    likelihood = (logits.double() / temperature).softmax(dim=1)
    cumulated = likelihood.cumsum(dim=1)
    after = cumulated.gather(1, chosen[:, None])[:, 0]
    own = likelihood.gather(1, chosen[:, None])[:, 0]
    assert (own > 0).all() and (uniforms <= after + 1e-5).all()
    assert (uniforms >= after - own - 1e-5).all()
    with without_kernels():
        plain = sample_tokens(logits, uniforms, Sampling(temperature))
    clear = (cumulated - uniforms[:, None]).abs().amin(dim=1) > 1e-5
    assert torch.equal(chosen[clear], plain[clear])


@pytest.mark.parametrize("vocabulary", [1, 2, LANES, 16 * LANES, 16 * LANES + 1, 1000])
def test_at_the_edges_of_uniforms_only_possible_tokens_are_drawn(vocabulary: int) -> None:
    torch.manual_seed(vocabulary)
    logits = torch.randn(50, vocabulary)
    assert (drawn(logits, 0.0) == 0).all()
    assert (drawn(logits, JUST_BELOW_1) == vocabulary - 1).all()
    for only in {0, vocabulary // 2, vocabulary - 1}:
        lonely = torch.full((1, vocabulary), -torch.inf)
        lonely[0, only] = -7.0
        for uniform in (0.0, 0.5, JUST_BELOW_1):
            assert drawn(lonely, uniform).item() == only
    if vocabulary > 3:
        logits[:, [0, -1]] = -torch.inf
        assert (drawn(logits, 0.0) == 1).all()
        assert (drawn(logits, JUST_BELOW_1) == vocabulary - 2).all()


@pytest.mark.parametrize(
    "broken",
    [
        lambda x: x.fill_(torch.nan),
        lambda x: x.fill_(-torch.inf),
        lambda x: x[:, 7].fill_(torch.nan),
        lambda x: x[:, -1].fill_(torch.nan),
        lambda x: x[:, 3].fill_(torch.inf),
    ],
    ids=["all nan", "all impossible", "one nan", "last nan", "one infinite"],
)
def test_of_logits_that_are_no_numbers_the_last_token_is_drawn_as_without_kernels(
    broken: Callable[[torch.Tensor], Any],
) -> None:
    logits = torch.randn(3, 333)
    broken(logits)
    for uniform in (0.0, 0.4, JUST_BELOW_1):
        with without_kernels():
            uniforms = torch.full((3,), uniform, dtype=torch.float64)
            plain = sample_tokens(logits, uniforms, Sampling())
        assert (drawn(logits, uniform) == 332).all() and (plain == 332).all()


def test_tokens_are_drawn_as_often_as_they_are_likely() -> None:
    torch.manual_seed(5)
    row = 1.5 * torch.randn(37)
    uniforms = torch.rand(40_000, dtype=torch.float64)
    counts = drawn(row.expand(40_000, -1), uniforms, 0.8).bincount(minlength=37)
    likely = 40_000 * (row.double() / 0.8).softmax(0)
    assert stats.chisquare(counts.numpy(), likely.numpy()).pvalue > 1e-3
    cooler = 40_000 * row.double().softmax(0)
    assert stats.chisquare(counts.numpy(), cooler.numpy()).pvalue < 1e-6, "it must be able to fail"


def test_strided_logits_and_float32_uniforms_are_read_right() -> None:
    torch.manual_seed(6)
    logits, uniforms = torch.randn(70, 9).T, torch.rand(9)
    expected = drawn(logits.contiguous(), uniforms.double())
    assert torch.equal(decode.sample(logits, uniforms, 1.0), expected)
    assert torch.equal(drawn(logits, torch.stack((uniforms, uniforms), 1)[:, 1].double()), expected)
