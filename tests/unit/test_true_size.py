"""What depends on true size, at true size: whole vocabularies, real widths, tensors beyond 2**24.

The look-alikes of the other tests are small, and what rounds, overflows or runs past an end only
when it is large passes with them. Here one layer has the widths of Qwen2.5-1.5B or Llama-3.2-1B,
under the family's whole vocabulary, with random weights.
"""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from peft import LoraConfig
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from abacist.learning.resume.resuming import SAMPLED_VALUES, _spread, fingerprints
from abacist.policy.decoding.engine import Engine
from abacist.policy.decoding.token_sampling import Sampling, sample_tokens
from abacist.policy.families import FastPart, unsupported_reason
from abacist.policy.kernels import build
from abacist.policy.loading import Policy, load_policy
from abacist.policy.scoring.head import score_tokens
from abacist.policy.scoring.score import score

VOCABULARY = 151_936  # Qwen2.5's embedding rows
WIDTHS: dict[str, dict[str, Any]] = {
    "qwen2.5-instruct": {  # Qwen2.5-1.5B
        "hidden_size": 1536,
        "intermediate_size": 8960,
        "num_attention_heads": 12,
        "num_key_value_heads": 2,
        "vocab_size": VOCABULARY,
    },
    "llama-3.2-instruct": {  # Llama-3.2-1B
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "vocab_size": 128_256,
    },
}
NO_STOP = (10**6,)


@given(length=st.integers(0, 2**48), count=st.integers(2, SAMPLED_VALUES))
@example(4096 * 4097, SAMPLED_VALUES)
@example(VOCABULARY * 896, SAMPLED_VALUES)
@example(2**31 + 1, SAMPLED_VALUES)
def test_the_places_of_a_fingerprint_lie_within_the_tensor_and_hold_both_ends(
    length: int, count: int
) -> None:
    places = _spread(length, count).tolist()
    assert places == sorted(set(places)) and len(places) == min(length, count)
    if length:
        assert places[0] == 0 and places[-1] == length - 1


@pytest.mark.parametrize("shape", [(4096, 4097), (VOCABULARY, 256)])
def test_a_fingerprint_sees_the_last_of_many_millions_of_weights(shape: tuple[int, int]) -> None:
    model = nn.Linear(1, 1, bias=False)
    model.weight = nn.Parameter(torch.zeros(shape, dtype=torch.bfloat16))
    before = fingerprints(model, [])
    assert fingerprints(model, []) == before
    with torch.no_grad():
        model.weight[-1, -1] = 1
    assert fingerprints(model, []) != before


def one_layer(kind: str, lookalike: Path, folder: Path) -> Path:
    """A model folder of the look-alike's family, one layer of true widths, in bfloat16."""
    shutil.copytree(lookalike, folder)
    config = json.loads((folder / "config.json").read_text("utf-8"))
    config |= {"num_hidden_layers": 1, "initializer_range": 0.02, **WIDTHS[kind]}
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))
    generator = torch.Generator().manual_seed(0)
    weights = {}
    for name, weight in model.state_dict().items():
        if name == "lm_head.weight":  # tied to the embedding
            continue
        made = torch.ones(weight.shape, dtype=torch.bfloat16)
        if "norm" not in name:
            made.uniform_(-0.05, 0.05, generator=generator)
        weights[name] = made
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def with_loud_adapter(folder: Path) -> Policy:
    lora = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
    policy = load_policy(str(folder), device="cpu", lora=lora, trainable=True)
    generator = torch.Generator().manual_seed(1)
    for name, weight in policy.model.named_parameters():
        if "lora_B" in name:
            weight.data.uniform_(-0.02, 0.02, generator=generator)
    return policy


@pytest.mark.slow
@pytest.mark.parametrize("kind", WIDTHS)
def test_a_layer_of_true_width_under_its_whole_vocabulary_does_what_stock_does(
    kind: str, lookalike: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = one_layer(kind, lookalike(kind), tmp_path / "model")
    policy = with_loud_adapter(folder)
    config = policy.model.config
    assert config.vocab_size == WIDTHS[kind]["vocab_size"] > len(policy.chat.tokenizer)
    assert policy.model.get_base_model().lm_head.weight.numel() > 2**24
    fingerprints(policy.model, [])
    # The folder holds bfloat16, and so does the policy where there are kernels, which compute in
    # float32. Stock computes in the dtype that it holds.
    wide = copy.deepcopy(policy.model).float()
    decoded_as_stock(policy, wide)
    scored_as_stock(policy, wide)
    drawn_from_all(policy)


def some_ids(policy: Policy, rows: int, tokens: int) -> Tensor:
    """[rows, tokens] from the whole vocabulary, its last entry among them."""
    most = policy.model.config.vocab_size
    ids = torch.randint(most, (rows, tokens), generator=torch.Generator().manual_seed(2))
    ids[0, 1] = most - 1
    return ids


def decoded_as_stock(policy: Policy, stock: Any) -> None:
    """Every token is the one that transformers' own logits would have chosen, in one row or two."""
    prompts = some_ids(policy, 2, 5)
    for rows in (1, 2):
        engine = Engine(policy.model, stop_ids=NO_STOP, pad_id=0, max_rows=rows)
        written = torch.tensor([ids for [ids] in engine.complete(prompts.tolist(), 1, 3, None)])
        with torch.no_grad():
            logits = stock(input_ids=torch.cat([prompts, written], dim=1)).logits
        assert torch.equal(logits[:, 4:-1].argmax(-1), written)


def trained(model: Any) -> dict[str, Tensor]:
    return {name: weight for name, weight in model.named_parameters() if weight.requires_grad}


def scored_as_stock(policy: Policy, wide: Any) -> None:
    model: Any = policy.model.train()
    ids = some_ids(policy, 4, 11)
    ids[1:, :6] = ids[0, :6]  # one prompt
    assert unsupported_reason(model, FastPart.SCORING) is None
    weights = trained(model)
    found, _ = score(model, ids, torch.ones_like(ids), 5, temperature=1.0)
    gradients = torch.autograd.grad(found.square().sum(), list(weights.values()))
    logits = wide.train()(input_ids=ids).logits[:, 5:-1]
    stock = logits.log_softmax(-1).gather(-1, ids[:, 6:, None])[..., 0]
    torch.testing.assert_close(found, stock, rtol=0, atol=2e-5)
    expected = torch.autograd.grad(stock.square().sum(), list(trained(wide).values()))
    for name, ours, theirs in zip(weights, gradients, expected, strict=True):
        assert (ours - theirs).norm() <= 1e-4 * theirs.norm(), name


def drawn_from_all(policy: Policy) -> None:
    """The last ids of the vocabulary are drawn by uniforms near 1, and decode to some text."""
    engine = Engine(policy.model, stop_ids=NO_STOP, pad_id=0, max_rows=1)
    prompt, most = some_ids(policy, 1, 5).tolist(), policy.model.config.vocab_size
    uniforms = torch.tensor([[0.0], [1 - 1e-12]], dtype=torch.float64)
    [[[first], [last]]] = engine.complete(prompt, 2, 1, Sampling(temperature=50.0), uniforms)
    assert (first, last) == (0, most - 1) and last >= len(policy.chat.tokenizer)
    assert isinstance(policy.chat.decode([first, last]), str)


# Without top-p a kernel draws, where there is one; with it PyTorch.
DRAWS = {"whole": {"top_p": 1.0, "top_k": 0}, "top-k": {"top_p": 1.0, "top_k": VOCABULARY - 1}}


@pytest.mark.parametrize("options", DRAWS.values(), ids=DRAWS)
@pytest.mark.parametrize("impossible", [0, 271])
def test_uniforms_is_shared_out_over_a_whole_vocabulary_and_never_beyond_what_is_possible(
    options: dict[str, Any], impossible: int
) -> None:
    possible = VOCABULARY - impossible
    logits = torch.zeros(1, VOCABULARY)
    logits[:, possible:] = -torch.inf
    uniforms = torch.tensor([0.0, 1e-9, 0.25, 0.5, 0.999999, 1 - 2**-30, 1 - 2**-53]).double()
    drawn = sample_tokens(logits.expand(7, -1), uniforms, Sampling(**options))
    expected = (uniforms * possible).floor().clamp(max=possible - 1)
    assert ((drawn - expected).abs() <= 1).all()
    assert drawn[-1] == possible - 1


@pytest.mark.parametrize("options", DRAWS.values(), ids=DRAWS)
def test_each_rare_token_behind_a_sure_one_is_drawn_by_uniforms_of_its_own(
    options: dict[str, Any],
) -> None:
    rare = 1e-4 / VOCABULARY  # in float32, sums near 1 stand still for ninety of these
    logits = torch.full((1, VOCABULARY), rare).log()
    logits[0, 0] = 0.0
    wanted = torch.arange(100_000, 100_032)
    uniforms = (1 + (wanted.double() - 0.5) * rare) / (1 + (VOCABULARY - 1) * rare)
    drawn = sample_tokens(logits.expand(32, -1), uniforms, Sampling(**options))
    assert (drawn.diff() == 1).sum() >= 28
    assert (drawn - wanted).abs().max() <= 120  # the rounding of the sure one's own weight


@pytest.mark.parametrize("scale", [0.0, 3.0])
@pytest.mark.parametrize("trained", [False, True])
def test_log_probabilities_over_a_whole_vocabulary_are_exact_to_float32(
    scale: float, trained: bool
) -> None:
    generator = torch.Generator().manual_seed(3)
    weight = torch.randn(VOCABULARY, 16, generator=generator) * scale / 4
    hidden = torch.randn(9, 16, generator=generator)
    targets = torch.randint(VOCABULARY, (9,), generator=generator)
    targets[0] = VOCABULARY - 1
    for tensor, learns in ((weight, trained), (hidden, True)):
        tensor.requires_grad_(learns)
    logps, entropies = score_tokens(hidden, weight, targets, compute_entropy=True)
    exact = (hidden.double() @ weight.double().t()).log_softmax(-1)
    torch.testing.assert_close(
        logps.double(), exact[torch.arange(9), targets], rtol=1e-6, atol=5e-6
    )
    assert entropies is not None
    torch.testing.assert_close(
        entropies.double(), -(exact.exp() * exact).sum(-1), rtol=1e-6, atol=1e-5
    )
    asked = [tensor for tensor in (hidden, weight) if tensor.requires_grad]
    found = torch.autograd.grad(logps.sum(), asked)
    stock = torch.autograd.grad(exact[torch.arange(9), targets].sum(), asked)
    for ours, theirs in zip(found, stock, strict=True):
        assert (ours - theirs).norm() <= 1e-5 * theirs.norm() + 1e-5


def test_a_row_of_a_whole_vocabulary_is_weighed_to_a_sum_of_one() -> None:
    if build.library() is None:
        pytest.skip(f"there are no kernels: {build.unsupported_reason()}")
    from abacist.policy.kernels.pointwise import Softmax

    logits = torch.randn(3, VOCABULARY, generator=torch.Generator().manual_seed(4))
    softmax = Softmax(torch.zeros(3, dtype=torch.long), 1.0, logits)
    weights, _ = softmax.weigh(logits.clone(), 0)
    share = weights.double().sum(-1) / softmax.totals.double()
    torch.testing.assert_close(share, torch.ones(3).double(), rtol=0, atol=1e-6)
