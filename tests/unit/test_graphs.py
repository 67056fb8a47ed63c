"""Recorded steps write what eager steps write, and what goes wrong with them costs only speed.

There is no GPU in a test: the steps run on the CPU, as PyTorch alone computes them, and a replay
runs the recorded step again. What a real graph would not do is not done either: a step gets
nothing from outside but the tensors it was recorded with.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, GenerationConfig

from abacist.policy.decoding import graphs
from abacist.policy.decoding.engine import Engine, Sampling
from abacist.policy.kernels import decode, tree_attention

Fold = Callable[[str], Path]
BUDGET_TOKENS = 40
EVERYTHING = Sampling(1.1, top_p=0.95, top_k=60, min_p=0.001, repetition_penalty=1.2)


class Again:
    """A recorder whose replays run the recorded step again."""

    def __init__(self) -> None:
        self.recorded = self.replayed = 0
        self.is_closed = False

    def warm_up(self, step: graphs.Step) -> torch.Tensor:
        self.logits = step()
        return self.logits

    def record(self, step: graphs.Step) -> tuple[graphs.Replay, torch.Tensor]:
        self.recorded += 1
        logits = torch.zeros_like(self.logits)

        def replay() -> None:
            self.replayed += 1
            logits.copy_(self.replayed_step(step))

        return replay, logits

    def replayed_step(self, step: graphs.Step) -> torch.Tensor:
        return step()

    def close(self) -> None:
        self.is_closed = True


@pytest.fixture(autouse=True)
def small_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every size is worth a graph, and the window changes in the middle of a completion."""
    for owner, name, value in (
        (decode, "supports", lambda *_: False),
        (tree_attention, "supports", lambda *_: False),
        (graphs, "_WORTH_RECORDING_TOKENS", 1),
        (graphs, "_SMALLEST_WINDOW_TOKENS", 8),
        (graphs, "_given_up", None),
    ):
        monkeypatch.setattr(owner, name, value)
    monkeypatch.delenv("ABACIST_CUDA_GRAPHS", raising=False)


@pytest.fixture
def use(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[graphs.Recorder], None]]:
    """Let a recorder record on the CPU."""

    def install(recorder: Any) -> None:
        off = graphs.unsupported_reason
        monkeypatch.setattr(graphs, "cuda_recorder", lambda _: recorder if off() is None else None)

    yield install


@pytest.fixture(scope="module", params=["qwen2.5-instruct", "llama-3.2-instruct"])
def model(request: pytest.FixtureRequest, lookalike: Fold) -> Any:
    return load(lookalike(request.param))


@pytest.fixture(scope="module")
def qwen(lookalike: Fold) -> Any:
    return load(lookalike("qwen2.5-instruct"))


def load(folder: Path) -> Any:
    made: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    made.generation_config = GenerationConfig()
    torch.manual_seed(1)
    for name, weight in made.named_parameters():
        if name.endswith("proj.bias"):
            torch.nn.init.normal_(weight, std=0.2)
    return made.eval()


def prompts(shared_tokens: int = 0) -> list[list[int]]:
    generator = torch.Generator().manual_seed(7)

    def some(count: int) -> list[int]:
        return torch.randint(3, 190, (count,), generator=generator).tolist()

    shared = some(shared_tokens)
    return [shared + some(count) for count in (5, 17, 1, 9, 17)]


def written(
    model: Any,
    sampling: Sampling | None = None,
    *,
    stop_every: int | None = None,
    max_rows: int = 64,
    shared_tokens: int = 0,
    samples: int | list[int] = 3,
) -> list[list[list[int]]]:
    stop_ids = [10**6] if stop_every is None else range(0, 660, stop_every)
    uniforms = torch.Generator().manual_seed(5)
    return Engine(model, stop_ids=stop_ids, pad_id=0, max_rows=max_rows).complete(
        prompts(shared_tokens), samples, BUDGET_TOKENS, sampling, uniforms
    )


@pytest.mark.parametrize("shared_tokens", [0, 11])
def test_greedy_tokens_are_those_of_transformers(model: Any, shared_tokens: int, use: Any) -> None:
    whole = [
        model.generate(
            torch.tensor([ids]), max_new_tokens=BUDGET_TOKENS, do_sample=False, pad_token_id=0
        )[0, len(ids) :].tolist()
        for ids in prompts(shared_tokens)
    ]
    use(recorder := Again())
    assert written(model, shared_tokens=shared_tokens, samples=2) == [[ids] * 2 for ids in whole]
    assert recorder.recorded == 4 and recorder.is_closed  # windows of 8, 16, 32 and 40 tokens
    assert recorder.replayed == BUDGET_TOKENS - 1
    for max_rows in (4, 1):  # fewer than there are to write
        use(recorder := Again())
        found = written(model, max_rows=max_rows, shared_tokens=shared_tokens, samples=2)
        assert found == [[ids] * 2 for ids in whole]
        assert recorder.recorded <= 12 and recorder.replayed > 2 * recorder.recorded


@pytest.mark.parametrize("sampling", [None, Sampling(), EVERYTHING], ids=["greedy", "1", "all"])
@pytest.mark.parametrize("max_rows", [64, 9, 3])
@pytest.mark.parametrize("samples", [4, [1, 0, 6, 2, 3]], ids=str)
def test_rows_that_end_early_and_are_replaced_write_what_they_write_eagerly(
    model: Any, sampling: Sampling | None, max_rows: int, samples: Any, use: Any
) -> None:
    asked = {"stop_every": 23, "max_rows": max_rows, "shared_tokens": 9, "samples": samples}
    eager = written(model, sampling, **asked)
    use(recorder := Again())
    assert written(model, sampling, **asked) == eager
    assert recorder.replayed > recorder.recorded > 1
    assert len({len(ids) for group in eager for ids in group}) > 2


class FailsAt(Again):
    """Cannot record its ``number``-th step."""

    def __init__(self, number: int, error: RuntimeError, *, warm: bool) -> None:
        super().__init__()
        self.number, self.error, self.warm = number, error, warm

    def warm_up(self, step: graphs.Step) -> torch.Tensor:
        logits = super().warm_up(step)
        if self.warm and self.recorded + 1 == self.number:
            raise self.error
        return logits

    def record(self, step: graphs.Step) -> tuple[graphs.Replay, torch.Tensor]:
        recorded = super().record(step)
        if self.recorded == self.number:
            raise self.error
        return recorded


@pytest.mark.parametrize("warm", [True, False])
@pytest.mark.parametrize("number", [1, 3])
@pytest.mark.parametrize(
    ("error", "said"),
    [
        (RuntimeError("operation not permitted.\nMore of it."), "failed (operation not permitted)"),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to"), "too little memory"),
    ],
)
def test_a_step_that_cannot_be_recorded_is_done_eagerly_from_there_on(
    qwen: Any,
    number: int,
    warm: bool,
    error: RuntimeError,
    said: str,
    use: Any,
    caplog: pytest.LogCaptureFixture,
) -> None:
    asked = {"stop_every": 23, "max_rows": 6}
    eager = written(qwen, EVERYTHING, **asked)
    use(recorder := FailsAt(number, error, warm=warm))
    with caplog.at_level(logging.WARNING):
        assert written(qwen, EVERYTHING, **asked) == eager
        done = recorder.replayed
        assert written(qwen, EVERYTHING, **asked) == eager  # and in every later call
    assert recorder.is_closed and recorder.replayed == done and (done > 0) == (number > 1)
    [record] = caplog.records
    assert "without CUDA graphs" in record.message and said in record.message
    assert said in (graphs.unsupported_reason() or "")


class Wrong(Again):
    """Replays something else than was recorded."""

    def __init__(self, batches: list[Any], mistake: str) -> None:
        super().__init__()
        self.batches, self.mistake = batches, mistake

    def replayed_step(self, step: graphs.Step) -> torch.Tensor:
        batch = self.batches[-1]
        if self.mistake == "reads other tokens":
            batch._state[0] += 1
        if self.mistake == "does nothing":
            return torch.zeros(())
        logits = step()
        if self.mistake == "counts twice":
            batch._state[3] += 1
        if self.mistake == "chooses another token":
            batch._state[0, 0] += 1
        if self.mistake == "not a number":
            logits[0, 3] = torch.nan
        return logits


@pytest.mark.parametrize(
    "mistake",
    ["reads other tokens", "does nothing", "counts twice", "chooses another token", "not a number"],
)
def test_a_replay_that_is_not_the_step_is_found_and_nothing_of_it_used(
    qwen: Any,
    mistake: str,
    use: Any,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    from abacist.policy.decoding import engine

    eager = written(qwen, EVERYTHING, stop_every=23)
    batches: list[Any] = []
    made = engine.Batch

    def noted(*arguments: Any, **options: Any) -> Any:
        batches.append(made(*arguments, **options))
        return batches[-1]

    monkeypatch.setattr(engine, "Batch", noted)
    use(recorder := Wrong(batches, mistake))
    with caplog.at_level(logging.WARNING):
        assert written(qwen, EVERYTHING, stop_every=23) == eager
    assert recorder.replayed == 1 and recorder.is_closed and len(batches) == 2
    assert "did not reproduce" in caplog.text
    assert written(qwen, EVERYTHING, stop_every=23) == eager and recorder.replayed == 1


def test_rounding_is_no_mistake_and_more_than_rounding_is() -> None:
    torch.manual_seed(0)
    state = torch.randint(9, (4, 6))
    for dtype, fits, off in (
        (torch.float32, 1e-5, 1e-2),
        (torch.bfloat16, 0.02, 0.5),
        (torch.float16, 1e-3, 0.1),
    ):
        scores = torch.randn(6, 50, dtype=torch.float64)
        expected, near, far = (
            (scores + by * torch.randn(6, 50)).to(dtype) for by in (0.0, fits, off)
        )
        assert graphs._agree(near, expected, state, state)
        assert not graphs._agree(far, expected, state, state)


def test_nothing_is_recorded_for_a_few_tokens(
    qwen: Any, use: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    eager = written(qwen, EVERYTHING)
    monkeypatch.setattr(graphs, "_WORTH_RECORDING_TOKENS", 24)
    use(recorder := Again())
    assert written(qwen, EVERYTHING) == eager
    assert recorder.recorded == 1  # 39 steps in a window of 40, and none in smaller ones
    monkeypatch.setattr(graphs, "_WORTH_RECORDING_TOKENS", BUDGET_TOKENS)
    use(recorder := Again())
    assert written(qwen, EVERYTHING) == eager
    assert recorder.recorded == 0


def test_graphs_are_for_cuda_and_can_be_switched_off(monkeypatch: pytest.MonkeyPatch) -> None:
    assert graphs.unsupported_reason() is None
    assert graphs.cuda_recorder(torch.device("cpu")) is None
    monkeypatch.setenv("ABACIST_CUDA_GRAPHS", "0")
    assert graphs.unsupported_reason() == "ABACIST_CUDA_GRAPHS=0 turns them off"
    assert graphs.cuda_recorder(torch.device("cuda", 0)) is None


@given(st.integers(1, 3000), st.data())
def test_sizes_hold_what_is_asked_and_are_few(most: int, data: st.DataObject) -> None:
    alive = data.draw(st.integers(1, most))
    assert alive <= graphs.padded_rows(alive, most) <= most
    assert graphs.padded_window(alive, most) >= alive
    assert graphs.padded_window(alive, most) <= most
    assert len({graphs.padded_rows(one, most) for one in range(1, most + 1)}) <= 7
    assert len({graphs.padded_window(one, most) for one in range(1, most + 1)}) <= 10
