"""Which problems next: those that are sometimes solved, without end to exploration."""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
import trl
from datasets import Dataset, IterableDataset
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, AutoTokenizer

from abacist.errors import DataError, UsageError
from abacist.learning.arguments import GRPOConfig
from abacist.learning.problem_sampling import (
    HALF_LIFE_BATCHES,
    SolveRateSampler,
    _pick,
    outcomes,
)
from abacist.learning.trainer import GRPOTrainer
from abacist.records.rollout import read_rollouts
from lookalikes import build


def sampler(problems: int = 40, batch: int = 4, **more: Any) -> SolveRateSampler:
    return SolveRateSampler(
        [f"p{n}" for n in range(problems)],
        [n % 2 for n in range(problems)],
        problems_per_batch=batch,
        **more,
    )


def batches(order: Iterator[int], size: int, count: int) -> Iterator[list[int]]:
    return (list(islice(order, size)) for _ in range(count))


def solved(problem: int, share: float) -> list[tuple[str, bool]]:
    return [(f"p{problem}", member < 8 * share) for member in range(8)]


def simulate(one: SolveRateSampler, count: int) -> list[list[int]]:
    """Problems divisible by 5 are solved half the time, the others always."""
    seen = []
    for batch in batches(iter(one), 4, count):
        seen.append(batch)
        for problem in batch:
            one.observe(solved(problem, 0.5 if problem % 5 == 0 else 1.0))
    return seen


def test_the_order_is_trls_groups_in_batches_and_batches_again() -> None:
    one = sampler(copies=3, repeats=2)
    order = list(one)
    assert len(order) == len(one) == 40 * 3 * 2
    for start in range(0, len(order), 4 * 3 * 2):
        block = order[start : start + 24]
        assert block[:12] == block[12:]
        assert all(len(set(block[at : at + 3])) == 1 for at in range(0, 12, 3))
        assert len(set(block)) == 4


@given(st.integers(1, 30), st.integers(1, 8), st.integers(0, 3), st.floats(0, 1))
@settings(max_examples=40, deadline=None)
def test_a_batch_never_holds_a_problem_twice_nor_an_unknown_one(
    problems: int, batch: int, seed: int, fresh_fraction: float
) -> None:
    batch = min(batch, problems)
    one = sampler(problems, batch, seed=seed, fresh_fraction=fresh_fraction)
    for _ in range(2):
        for chosen in batches(iter(one), batch, problems // batch):
            assert len(set(chosen)) == batch and set(chosen) <= set(range(problems))
            for problem in chosen:
                one.observe(solved(problem, (problem % 9) / 8))


def test_same_seed_and_same_outcomes_give_the_same_order_and_another_seed_another() -> None:
    assert simulate(sampler(seed=1), 10) == simulate(sampler(seed=1), 10)
    assert simulate(sampler(seed=1), 10) != simulate(sampler(seed=2), 10)


def test_problems_solved_half_the_time_come_back_and_those_always_solved_do_not() -> None:
    visits = [problem for batch in simulate(sampler(200), 30) for problem in batch]
    mixed = [problem for problem in visits if problem % 5 == 0]
    always = [problem for problem in visits if problem % 5]
    assert len(mixed) / len(set(mixed)) > 2
    assert len(always) / len(set(always)) < 1.2


def test_half_of_every_batch_is_fresh_while_there_are_fresh_problems() -> None:
    met: set[int] = set()
    for batch in simulate(sampler(200), 30):
        assert len(set(batch) - met) >= 2
        met |= set(batch)


def test_problems_whose_outcomes_are_not_known_yet_are_not_drawn_again() -> None:
    order = list(batches(iter(sampler(40)), 4, 10))
    assert len({problem for batch in order for problem in batch}) == 40


def test_an_untried_problem_borrows_the_rate_of_its_difficulty() -> None:
    one = sampler()
    one.observe([*solved(0, 0.5), *solved(1, 1.0)])
    assert one.variance(2) > 2 * one.variance(3) > 0
    assert one.variance(0) > one.variance(2)


def test_an_outcome_counts_half_after_the_half_life() -> None:
    one = sampler()
    one.observe(solved(0, 0.5))
    for _ in range(int(HALF_LIFE_BATCHES)):
        one.observe(solved(1, 1.0))
    state = one.state_dict()
    assert state["problems"]["p0"] == state["pools"]["0"] == pytest.approx([2.0, 4.0])


@given(st.lists(st.tuples(st.integers(0, 39), st.booleans()), max_size=60))
@settings(max_examples=40, deadline=None)
def test_every_problem_always_keeps_a_chance(heard: list[tuple[int, bool]]) -> None:
    one = sampler()
    one.observe([(f"p{problem}", is_solved) for problem, is_solved in heard])
    assert all(0 < one.variance(index) <= 0.25 for index in range(40))


def test_problems_of_tiny_weights_are_drawn_alike_and_not_in_the_order_of_the_file() -> None:
    rng, drawn = random.Random(0), Counter[int]()
    for _ in range(400):
        drawn.update(_pick(rng, range(16), [1e-5] * 16, 4))
    assert len(drawn) == 16 and max(drawn.values()) < 2 * min(drawn.values())
    few = Counter(at for _ in range(400) for at in _pick(rng, range(3), [1e-5, 1e-5, 3e-5], 1))
    assert 150 < few[2] < 290  # 240 are expected of three fifths


def test_the_state_is_json_and_continues_the_epoch_where_it_was() -> None:
    first, whole = sampler(seed=3), []
    order = iter(first)
    for number in range(8):
        batch = list(islice(order, 4))
        whole.append(batch)
        for problem in batch:
            first.observe(solved(problem, (problem % 9) / 8))
        if number == 3:
            state = json.loads(json.dumps(first.state_dict()))
    again = sampler(seed=99)
    again.load_state_dict(state)
    resumed = iter(again)
    for number, expected in enumerate(whole):
        assert list(islice(resumed, 4)) == expected
        if number >= 4:  # the first four are replayed, and a resumed trainer skips them
            for problem in expected:
                again.observe(solved(problem, (problem % 9) / 8))
    assert again.state_dict() == first.state_dict()


def test_a_state_of_other_problems_is_refused() -> None:
    state = sampler(40).state_dict() | {"waiting": ["p39"]}
    with pytest.raises(DataError, match="p39"):
        sampler(20).load_state_dict(state)


def test_alike_ids_and_too_few_problems_are_refused() -> None:
    with pytest.raises(DataError, match="same problem_id"):
        SolveRateSampler(["a", "a"], [1, 1], problems_per_batch=1)
    with pytest.raises(DataError, match="do not fill"):
        sampler(3, 4)


def test_outcomes_are_read_by_the_answer_rule() -> None:
    golds = {"a": "7", "b": 8, "c": 7.0, "d": None}
    rows = [{"problem_id": name, "answer": gold} for name, gold in golds.items()]
    text = "<reasoning>\n3 + 4 = 7\n</reasoning>\n<answer>\n7\n</answer>"
    replies = [[{"role": "assistant", "content": text}]] * 4
    assert outcomes(rows, replies) == [("a", True), ("b", False), ("c", True)]


ROWS = [
    {
        "prompt": [{"role": "user", "content": f"{n} + 1?"}],
        "answer": str(n + 1),
        "problem_id": f"p{n}",
        "difficulty": 1,
    }
    for n in range(8)
]


def constant_reward(prompts: Any, completions: Any, **columns: Any) -> list[float]:
    return [0.0] * len(prompts)


def make_trainer(folder: Path, rows: Any, model_folder: Path, **more: Any) -> GRPOTrainer:
    settings: dict[str, Any] = {
        "output_dir": str(folder), "bf16": False, "use_cpu": True, "num_generations": 2,
        "per_device_train_batch_size": 4, "max_completion_length": 4, "max_steps": 4,
        "save_strategy": "no", "disable_tqdm": True, "keep_rollouts": True,
        "problem_sampling": "solve_rate", "report_to": [],
    }  # fmt: skip
    return GRPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32),
        reward_funcs=[constant_reward],
        args=GRPOConfig(**(settings | more)),
        train_dataset=rows,
        processing_class=AutoTokenizer.from_pretrained(model_folder, padding_side="left"),
    )


@pytest.mark.parametrize("accumulation", [1, 2])
def test_the_trainer_follows_the_sampler_and_tells_it_every_outcome_once(
    tmp_path: Path, accumulation: int
) -> None:
    model = build("qwen2.5-instruct", tmp_path / "model")
    trainer = make_trainer(
        tmp_path / "run",
        Dataset.from_list(ROWS),
        model,
        per_device_train_batch_size=4 // accumulation,
        gradient_accumulation_steps=accumulation,
    )
    one = trainer.problem_sampler
    assert one is not None
    drawn: list[list[int]] = []
    draw = one._draw
    one._draw = lambda: drawn.append(draw()) or drawn[-1]  # type: ignore[method-assign,func-returns-value]
    heard: list[list[str]] = []
    observe = one.observe
    one.observe = lambda told: heard.append([p for p, _ in told]) or observe(told)  # type: ignore[method-assign,func-returns-value]
    trainer.train()
    assert heard == [[f"p{n}" for n in batch for _ in range(2)] for batch in drawn[:4]]
    # One batch is fetched ahead, and the last of the epoch was asked for before its end.
    assert len(drawn) in (4, 5)
    told = [one.problem_id for one in read_rollouts(tmp_path / "run" / "rollouts")]
    assert told == [problem for batch in heard for problem in batch]


def test_data_whose_solve_rates_cannot_be_measured_is_refused_before_training(
    tmp_path: Path,
) -> None:
    model = build("qwen2.5-instruct", tmp_path / "model")
    bare = [{"prompt": row["prompt"], "answer": row["answer"]} for row in ROWS]
    with pytest.raises(DataError, match="problem_id"):
        make_trainer(tmp_path / "a", Dataset.from_list(bare), model)
    with pytest.raises(UsageError, match="own order"):
        make_trainer(tmp_path / "b", Dataset.from_list(ROWS), model, shuffle_dataset=False)
    stream = IterableDataset.from_generator(lambda: iter(ROWS))
    with pytest.raises(UsageError, match="own order"):
        make_trainer(tmp_path / "c", stream, model)
    with pytest.raises(UsageError, match="best"):
        make_trainer(tmp_path / "d", Dataset.from_list(ROWS), model, problem_sampling="best")


def test_uniform_sampling_leaves_trls_order_alone_whatever_epoch_it_begins_with(
    tmp_path: Path,
) -> None:
    model = build("qwen2.5-instruct", tmp_path / "model")
    trainer = make_trainer(
        tmp_path / "run", Dataset.from_list(ROWS), model, problem_sampling="uniform"
    )
    assert trainer.problem_sampler is None
    ours, trls = trainer._get_train_sampler(), trl.GRPOTrainer._get_train_sampler(trainer)
    assert type(trls).__name__ == "RepeatSampler"
    epochs = [list(trls) for _ in range(3)]
    assert [list(ours) for _ in range(3)] == epochs and epochs[0] != epochs[1]
    place = ours.state_dict()
    for mid_epoch, wanted in ((True, epochs[2]), (False, list(trls))):
        again = trainer._get_train_sampler()
        again.load_state_dict(place, mid_epoch=mid_epoch)
        assert again.state_dict() == place  # as it is kept once more where a step is taken back
        assert list(again) == wanted
