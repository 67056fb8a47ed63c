"""Tokens are sampled as often as they are likely, each by the uniform number of its row."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import TopKLogitsWarper, TopPLogitsWarper

from abacist.policy.decoding.token_sampling import Sampling, sample_tokens

logit_rows = st.lists(st.floats(-30, 30, width=32), min_size=2, max_size=40)


@settings(max_examples=100, deadline=None)
@given(row=logit_rows, temperature=st.sampled_from([0.5, 1.0, 1.7]))
def test_evenly_spread_uniforms_sample_each_token_as_often_as_it_is_likely(
    row: list[float], temperature: float
) -> None:
    count = 1000
    logits = torch.tensor([row])
    uniforms = (torch.arange(count, dtype=torch.float64) + 0.5) / count
    sampled = sample_tokens(logits.expand(count, -1), uniforms, Sampling(temperature))
    frequency = torch.bincount(sampled, minlength=len(row)) / count
    likelihood = (logits[0] / temperature).softmax(-1)
    assert (frequency - likelihood).abs().max() <= 1.01 / count + 1e-6


@settings(max_examples=100, deadline=None)
@given(row=logit_rows, top_p=st.floats(0.01, 1.0), top_k=st.integers(0, 50))
def test_only_what_top_k_and_top_p_leave_is_ever_sampled(
    row: list[float], top_p: float, top_k: int
) -> None:
    logits = torch.tensor([row])
    left = TopKLogitsWarper(top_k)(None, logits) if top_k else logits  # as transformers does it
    left = TopPLogitsWarper(top_p)(None, left) if top_p < 1 else left
    uniforms = torch.tensor([0.0, 0.1, 0.5, 0.9, 1 - 2**-53], dtype=torch.float64)
    sampled = sample_tokens(
        logits.expand(len(uniforms), -1), uniforms, Sampling(top_p=top_p, top_k=top_k)
    )
    kept, likelihood = left[0].isfinite(), logits[0].softmax(-1)
    # At the very edge of top_p rounding may decide, and among equals their order.
    edge = likelihood[~kept].max() - 1e-6 if (~kept).any() else torch.inf
    assert all(kept[token] or likelihood[token] >= edge for token in sampled.tolist())


def test_an_impossible_token_is_never_sampled() -> None:
    logits = torch.tensor([[-torch.inf, 0.0, 1.0, -torch.inf, -torch.inf]])
    uniforms = torch.tensor([0.0, 0.5, 1 - 2**-53], dtype=torch.float64)
    sampled = sample_tokens(logits.expand(3, -1), uniforms, Sampling())
    assert set(sampled.tolist()) <= {1, 2}
