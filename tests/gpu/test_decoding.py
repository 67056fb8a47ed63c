"""Our engine on a GPU: by graphs it writes what it writes eagerly, and what ``generate`` writes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import GenerationConfig

from abacist.policy.decoding import graphs
from abacist.policy.decoding.engine import Engine, Sampling

pytestmark = pytest.mark.gpu

BUDGET_TOKENS = 48
PROMPTS = [[(7 * number + place * place) % 190 for place in range(9 + 30 * number)]
           for number in range(3)]  # fmt: skip


def written(model: Any, sampling: Sampling | None) -> list[list[list[int]]]:
    engine = Engine(model, stop_ids=[10**6], pad_id=0, max_rows=4)
    generator = torch.Generator().manual_seed(1)
    return engine.complete(PROMPTS, 2, BUDGET_TOKENS, sampling, generator)


def by_transformers(model: Any) -> list[list[int]]:
    config = GenerationConfig(max_new_tokens=BUDGET_TOKENS, do_sample=False, pad_token_id=0)
    model.get_base_model().generation_config = GenerationConfig()
    found = []
    for prompt in PROMPTS:
        ids = torch.tensor([prompt], device="cuda")
        with torch.no_grad():
            whole = model.generate(
                input_ids=ids, attention_mask=torch.ones_like(ids), generation_config=config
            )
        found.append(whole[0, len(prompt) :].tolist())
    return found


def test_graphs_write_what_eager_steps_write_and_generate_too(
    make_model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    replayed: list[None] = []
    replay = torch.cuda.CUDAGraph.replay

    def counted(graph: Any) -> None:
        replayed.append(None)
        replay(graph)

    monkeypatch.setattr(torch.cuda.CUDAGraph, "replay", counted)
    monkeypatch.setattr(graphs, "_given_up", None)
    model = make_model(torch.float32).eval()
    # Few tokens to draw from, or rounding alone would make of one another.
    samplings = (None, Sampling(top_k=20))
    by_graphs = [written(model, sampling) for sampling in samplings]
    assert graphs.unsupported_reason() is None and len(replayed) > BUDGET_TOKENS
    count = len(replayed)
    monkeypatch.setenv("ABACIST_CUDA_GRAPHS", "0")
    assert [written(model, sampling) for sampling in samplings] == by_graphs
    assert len(replayed) == count
    assert by_graphs[0] == [[ids] * 2 for ids in by_transformers(model)]
