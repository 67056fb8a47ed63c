"""A program for the emulated GPU: graphs are recorded, replayed, and write what a CPU writes."""

from __future__ import annotations

import copy
from typing import Any
from unittest import mock

import torch
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

from abacist.policy.decoding import graphs
from abacist.policy.decoding.batch import Batch
from abacist.policy.decoding.engine import Engine, Sampling

SIZES = {
    "vocab_size": 200,
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "initializer_range": 0.2,
}
BUDGET_TOKENS = 40
PROMPTS = [[(7 * number + place * place) % 190 for place in range(5 + 6 * number)]
           for number in range(4)]  # fmt: skip
EVERYTHING = Sampling(1.1, top_p=0.9, top_k=50, min_p=0.01, repetition_penalty=1.2)


def written(model: Any, sampling: Sampling | None, max_rows: int) -> list[list[list[int]]]:
    engine = Engine(model, stop_ids=range(0, 200, 31), pad_id=0, max_rows=max_rows)
    generator = torch.Generator().manual_seed(1)
    return engine.complete(PROMPTS, 4, BUDGET_TOKENS, sampling, generator)


def main() -> None:
    """Exits with an error where something is not as it should be."""
    # Small sizes, so that the window changes in the middle of a completion.
    graphs._WORTH_RECORDING_TOKENS, graphs._SMALLEST_WINDOW_TOKENS = 1, 8
    replay, begin = torch.cuda.CUDAGraph.replay, torch.cuda.CUDAGraph.capture_begin
    replayed, begun = mock.Mock(side_effect=replay), mock.Mock(side_effect=begin)
    torch.cuda.CUDAGraph.replay = lambda self: replayed(self)  # type: ignore[method-assign]
    torch.cuda.CUDAGraph.capture_begin = lambda *a, **k: begun(*a, **k)  # type: ignore[method-assign]
    torch.manual_seed(0)
    qwen = Qwen2ForCausalLM(Qwen2Config(**SIZES)).eval()
    for model in (qwen, LlamaForCausalLM(LlamaConfig(**SIZES)).eval()):
        on_gpu = copy.deepcopy(model).to("cuda")
        for sampling in (None, EVERYTHING):
            for max_rows in (64, 5):
                replayed.reset_mock()
                begun.reset_mock()
                found = written(on_gpu, sampling, max_rows)
                assert graphs.unsupported_reason() is None, graphs.unsupported_reason()
                assert replayed.call_count > 2 * begun.call_count > 4
                assert found == written(model, sampling, max_rows)

    # What may not be captured is refused, and decoding goes on without.
    choose = Batch._choose

    def choose_and_look(self: Batch, *arguments: Any) -> torch.Tensor:
        tokens = choose(self, *arguments)
        assert int(tokens[0]) >= 0
        return tokens

    replayed.reset_mock()
    with mock.patch.object(Batch, "_choose", choose_and_look):
        on_gpu = copy.deepcopy(qwen).to("cuda")
        assert written(on_gpu, EVERYTHING, 5) == written(qwen, EVERYTHING, 5)
    assert "capturing" in (graphs.unsupported_reason() or ""), graphs.unsupported_reason()
    assert replayed.call_count == 0


if __name__ == "__main__":
    main()
