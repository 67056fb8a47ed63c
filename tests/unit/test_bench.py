"""The benches' own arithmetic: what a step is given, and what is counted of it."""

from __future__ import annotations

import argparse
import importlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from abacist.policy.kernels.build import supports
from abacist.policy.kernels.decode import Packed
from abacist.policy.scoring import linears as own

BENCH = Path(__file__).parents[2] / "bench"
MODEL, SHORTEST, LONGEST = "smoke-qwen", 4, 8


@pytest.fixture(scope="module")
def modules() -> Iterator[Any]:
    """Imports a file of bench/ by its name."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCH))
        yield importlib.import_module


def draw(modules: Any, number: int, shots: int = 1) -> Any:
    batches = modules("batches")
    return batches.draw_batch(MODEL, shots=shots, prompts=2, generations=8, number=number)


def test_every_step_has_other_prompts_lengths_and_tokens(modules: Any) -> None:
    drawn = [draw(modules, number) for number in range(5)]
    questions = [row["prompt"][-1]["content"] for batch in drawn for row in batch.rows]
    assert len(set(questions)) == len(questions) == 10
    assert len({tuple(batch.lengths) for batch in drawn}) == 5
    assert len({str(batch.replies) for batch in drawn}) == 5


def test_the_same_step_is_the_same_for_everybody(modules: Any) -> None:
    assert draw(modules, 3) == draw(modules, 3)


def test_the_worked_examples_stay_from_step_to_step(modules: Any) -> None:
    in_front = [str(row["prompt"][:-1]) for n in range(3) for row in draw(modules, n).rows]
    assert len(set(in_front)) == 1 and len(in_front[0]) > 100


def test_one_reply_of_every_batch_uses_the_whole_budget(modules: Any) -> None:
    for number in range(20):
        lengths = draw(modules, number, shots=0).lengths
        assert max(lengths) == LONGEST and min(lengths) >= SHORTEST


def test_replies_end_with_the_end_token_and_hold_no_other_special_one(modules: Any) -> None:
    tokenizer = modules("models").build_tokenizer(MODEL)
    for reply in draw(modules, 0, shots=0).replies:
        assert reply[-1] == tokenizer.eos_token_id
        assert not set(reply[:-1]) & set(tokenizer.all_special_ids)


def test_the_small_batch_has_as_many_rows_and_hardly_a_token(modules: Any) -> None:
    small = modules("batches").small_batch(MODEL, prompts=2, generations=8)
    assert len(small.rows) == 2 and small.lengths == [3] * 16


def products_of(modules: Any, work: Any, counted: bool = True) -> Counter[Any]:
    with modules("limits").MatrixProducts(lambda: counted) as products:
        work()
    return products.counts


def test_products_are_counted_by_whatever_library_they_are_made(modules: Any) -> None:
    x, weight = torch.rand(5, 16), torch.rand(24, 16)
    to, bias = torch.rand(5, 24), torch.rand(24)
    for work in (
        lambda: x @ weight.t(),
        lambda: torch.addmm(bias, x, weight.t()),
        lambda: to.clone().addmm_(x, weight.t()),
        lambda: torch.nn.functional.linear(x, weight, bias),
        lambda: own.product(x, weight),
        lambda: own.product_added(x, weight, to.clone()),
    ):
        assert products_of(modules, work) == {(1, 5, 16, 24): 1}
        with torch.no_grad():
            assert products_of(modules, work) == {(1, 5, 16, 24): 1}


def test_products_of_our_kernels_are_counted_too(modules: Any) -> None:
    if not supports(torch.rand(1)):
        pytest.skip("no kernels here: there is no compiler, or they are switched off")
    x = torch.rand(5, 16)
    both = [torch.rand(24, 16), torch.rand(24, 16)]
    beside, gated = (Packed(both, [None, None], gated=on) for on in (False, True))
    bare = beside(x)
    assert products_of(modules, lambda: (beside(x), gated(x))) == {(1, 5, 16, 48): 2}
    assert products_of(modules, lambda: beside(x), counted=False) == {}
    assert torch.equal(beside(x), bare)


def test_a_backward_pass_is_counted_with_the_forward(modules: Any) -> None:
    x = torch.rand(5, 16, requires_grad=True)
    weight = torch.rand(24, 16, requires_grad=True)
    counts = products_of(modules, lambda: (x @ weight.t()).sum().backward())
    assert modules("limits").operations(counts) == 3 * 2 * 5 * 16 * 24


def test_a_cell_measured_with_other_settings_is_neither_kept_nor_overwritten(modules: Any) -> None:
    speed = modules("speed")

    def options(**given: Any) -> argparse.Namespace:
        settings = {"checkpointing": "recipe", "equal_batches": False, "again": False}
        return argparse.Namespace(output="kept.json", **settings | given)

    cell = f"{MODEL}/0/1"
    setups = {kind: asdict(one) for kind, one in speed.setups_of(cell, options()).items()}
    kept = {cell: {"setups": setups}}
    assert speed._keep(cell, kept, options())
    assert not speed._keep(cell, {}, options())
    assert not speed._keep(cell, kept, options(equal_batches=True, again=True))
    for other in ({"equal_batches": True}, {"checkpointing": "on"}):
        with pytest.raises(SystemExit, match="other settings"):
            speed._keep(cell, kept, options(**other))


def test_stock_ends_with_the_first_step_that_passes_the_time_of_ours(
    modules: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench = modules("equal_time")
    now = iter([0.0, 4.0, 10.0, 14.0, 20.0, 25.0])  # steps of 4, 4 and 5 seconds, and pauses
    monkeypatch.setattr(bench.time, "perf_counter", lambda: next(now))
    clock, ended = bench.Clock(seconds=8.5), []
    for step in (1, 2, 3):
        control, state = SimpleNamespace(should_training_stop=False), SimpleNamespace(global_step=0)
        clock.on_step_begin(None, state, control)
        clock.on_step_end(None, state, control)
        ended.append((step, control.should_training_stop))
    assert ended == [(1, False), (2, False), (3, True)]
    assert clock.step_seconds == [4.0, 4.0, 5.0]
