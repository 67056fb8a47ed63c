"""The head: a vocabulary that comes part by part gives what it gives whole."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from abacist.policy.kernels import build, pointwise
from abacist.policy.scoring import head
from abacist.policy.scoring.head import score_tokens


@pytest.fixture(params=["kernels", "PyTorch"])
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "PyTorch":
        monkeypatch.setattr(build, "library", lambda: None)
    elif build.library() is None:
        pytest.skip(f"there are no kernels: {build.unsupported_reason()}")
    return str(request.param)


@given(
    rows=st.integers(1, 7),
    sizes=st.lists(st.integers(1, 70), min_size=1, max_size=5),
    loud=st.sampled_from([0.1, 5.0, 300.0]),
    rising=st.booleans(),
    seed=st.integers(0, 99),
)
def test_a_softmax_in_parts_is_the_whole_one(
    rows: int, sizes: list[int], loud: float, rising: bool, seed: int
) -> None:
    draw = torch.Generator().manual_seed(seed)
    vocabulary = sum(sizes)
    logits = torch.randn(rows, vocabulary, generator=draw) * loud
    if rising:  # each part has a larger logit than those before
        logits = logits.sort(dim=1).values
    targets = torch.randint(vocabulary, (rows,), generator=draw)
    softmax = pointwise.Softmax(targets, 0.7, logits)
    weighed, start = torch.zeros(rows, 0), 0
    for size in sizes:
        part = logits[:, start : start + size].clone()
        weights, factors = softmax.weigh(part, start)
        weighed = torch.cat([weighed * factors[:, None], weights], dim=1)
        start += size
    exact = (logits.double() * 0.7).log_softmax(-1)
    probabilities = weighed.double() / softmax.totals.double()[:, None]
    torch.testing.assert_close(probabilities, exact.exp(), rtol=2e-5, atol=1e-6)
    picked = exact.gather(1, targets[:, None])[:, 0]
    torch.testing.assert_close(softmax.logps.double(), picked, rtol=1e-5, atol=2e-5 * (1 + loud))
    entropy = -(exact.exp() * exact.clamp(min=-1e30)).sum(-1)
    torch.testing.assert_close(
        softmax.entropies.double(), entropy, rtol=1e-4, atol=2e-5 * (1 + loud)
    )


def scored(
    hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor
) -> tuple[torch.Tensor, ...]:
    hidden = hidden.clone().requires_grad_()
    logps, entropies = score_tokens(hidden, weight, targets, temperature=0.9, compute_entropy=True)
    assert entropies is not None
    (logps * torch.linspace(-1, 1, len(logps))).sum().backward()
    assert hidden.grad is not None
    return logps.detach(), entropies, hidden.grad


@pytest.mark.parametrize("at_once", [1, 7, 64, 1000])
@pytest.mark.parametrize("trained", [False, True])
def test_parts_of_any_size_give_values_and_gradients_of_the_whole(
    path: str, at_once: int, trained: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    draw = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(9, 24, generator=draw), torch.randn(130, 24, generator=draw)
    targets = torch.randint(130, (9,), generator=draw)
    monkeypatch.setattr(head, "_CPU_VOCABULARY", at_once)
    weight.requires_grad_(trained)
    found = scored(hidden, weight, targets)
    logits = (hidden.double().requires_grad_() @ weight.detach().double().t()) / 0.9
    exact = logits.log_softmax(-1)
    picked = exact[torch.arange(9), targets]
    by_logits = torch.autograd.grad(
        (picked * torch.linspace(-1, 1, 9).double()).sum(), logits, retain_graph=True
    )[0]
    right = (
        picked.detach(),
        -(exact.exp() * exact).sum(-1).detach(),
        by_logits @ weight.detach().double() / 0.9,
    )
    for ours, theirs in zip(found, right, strict=True):
        torch.testing.assert_close(ours.double(), theirs, rtol=1e-5, atol=1e-5)


def test_a_row_has_the_same_result_in_any_company(path: str) -> None:
    draw = torch.Generator().manual_seed(0)
    vocabulary = 2 * head._CPU_VOCABULARY + 77
    hidden = torch.randn(300, 16, generator=draw)
    weight = torch.randn(vocabulary, 16, generator=draw)
    targets = torch.randint(vocabulary, (300,), generator=draw)
    with torch.no_grad():
        logps, _ = score_tokens(hidden, weight, targets)
        some, _ = score_tokens(hidden[5:130], weight, targets[5:130])
    if path == "kernels":
        assert torch.equal(some, logps[5:130])
    else:
        torch.testing.assert_close(some, logps[5:130])


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_not_a_number_shows(
    path: str, value: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(head, "_CPU_VOCABULARY", 32)
    hidden, weight = torch.ones(2, 8), torch.ones(100, 8)
    weight[70] = value
    logps, entropies, _ = scored(hidden, weight, torch.tensor([3, 99]))
    assert not logps.isfinite().any()
    assert not entropies.isfinite().any()
