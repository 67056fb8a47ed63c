"""What a run will take: said before it begins, near the truth, and without changing anything."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow.parquet
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from abacist.learning import train as training
from abacist.learning.config import Config, load_config
from abacist.learning.estimate import estimate as estimating
from abacist.learning.estimate.cost import Work, cost_of, roughly, steps_within
from abacist.learning.estimate.estimate import (
    ENOUGH_STEPS,
    FITTING_SECONDS,
    Estimate,
    FirstStep,
    fitting,
    lines,
    tell_estimate,
)
from abacist.learning.estimate.trial import Pass, Rates, Writing, measure_rates
from abacist.learning.heldout import HeldoutEvaluation
from abacist.learning.resume import resuming
from abacist.learning.tracking import Silent
from abacist.records.rundir import RunDir

SMALL = ["--num_train_problems", "24", "--num_heldout_problems", "3", "--eval_strategy", "no",
         "--num_consistency_problems", "2", "--num_selection_problems", "0",
         "--per_device_train_batch_size", "8", "--gradient_accumulation_steps", "2",
         "--max_completion_length", "24", "--max_steps", "1", "--save_strategy", "no"]  # fmt: skip


class Heard(Silent):
    """A watcher that keeps what it is told."""

    def __init__(self) -> None:
        self.notes: list[str] = []
        self.stages: list[str] = []
        self.parts: list[tuple[int, str, float, float, str]] = []
        self.shares: dict[str, list[float]] = {}
        self.words: list[str] = []

    def stage(self, name: str) -> None:
        self.stages.append(name)

    def note(self, text: str) -> None:
        self.notes.append(text)

    def progress(self, done: float, total: float, label: str, words: str = "") -> None:
        self.shares.setdefault(label, []).append(done / total)
        self.words.append(words)

    def within_step(self, step: int, part: str, done: float, total: float, words: str) -> None:
        self.parts.append((step, part, done, total, words))


def run_in(folder: Path, *flags: str, watcher: Silent | None = None) -> Path:
    config = load_config(None, None, [*SMALL, "--output_dir", str(folder / "run"), *flags])
    return training.train(config, watcher or Silent()).path


@pytest.fixture(scope="module")
def assembled(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """A run of the built-in model, ready to be trained."""
    config = load_config(None, None, SMALL)
    task, rewards, policy = training.load_parts(config, Silent())
    run = RunDir(tmp_path_factory.mktemp("run"))
    config.training.output_dir = str(run.path)
    judge = HeldoutEvaluation(config, task, run, Silent())
    trainer = training.make_trainer(policy, rewards, judge)
    return SimpleNamespace(config=config, task=task, policy=policy, trainer=trainer)


def states() -> list[Any]:
    numeric = np.random.get_state(legacy=True)
    return [random.getstate(), numeric[0], numeric[1].tolist(), torch.get_rng_state().tolist()]


def test_a_trial_leaves_random_states_weights_gradients_and_modes_as_they_were(
    assembled: SimpleNamespace,
) -> None:
    model = assembled.trainer.model
    before, weights = states(), {n: w.detach().clone() for n, w in model.named_parameters()}
    modes = [module.training for module in model.modules()]
    found = measure_rates(assembled.policy, assembled.trainer, [list(range(1, 40))], 16, 9)
    assert states() == before
    assert [module.training for module in model.modules()] == modes
    for name, weight in model.named_parameters():
        assert torch.equal(weights[name], weight) and weight.grad is None
    assert found.rollouts is found.measuring
    assert min(found.forward.token_seconds, found.backward.token_seconds) > 0
    assert found.measuring.step_seconds(16) > 0 and found.measuring.prompt_token_seconds > 0


@pytest.mark.parametrize("flags", [(), ("--no_use_fast_path",)])
def test_a_run_is_the_same_to_the_bit_with_and_without_an_estimate(
    flags: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def kept(run: Path) -> tuple[Any, bytes, str]:
        (rollouts,) = (run / "rollouts").iterdir()
        table = pyarrow.parquet.read_table(rollouts).drop_columns("run_id")
        weights = (run / "adapter_model.safetensors").read_bytes()
        return table, weights, (run / "metrics.jsonl").read_text(encoding="utf-8")

    told = kept(run_in(tmp_path / "told", *flags))
    monkeypatch.setattr(training, "tell_estimate", lambda *args, **where: None)
    untold = kept(run_in(tmp_path / "untold", *flags))
    assert told[0].equals(untold[0]) and told[1:] == untold[1:]


@pytest.mark.parametrize("path", ["rollouts: our engine", "rollouts: TRL's path"])
def test_a_run_says_first_what_it_takes_and_then_how_far_it_is(path: str, tmp_path: Path) -> None:
    heard = Heard()
    run_in(tmp_path, *(["--no_use_fast_path"] if "TRL" in path else []), watcher=heard)
    order = [name.split()[0] for name in heard.stages]
    assert order == ["Loading", "What", "Measuring", "Training:", "Measuring"]
    told = "\n".join(heard.notes)
    assert path in told
    assert "  1 steps × at most " in told and "(16 replies of at most 24 tokens" in told
    assert (
        "measuring before and after, 11 replies each time" in told and "Warning: this" not in told
    )
    assert "11 replies to 3 held-out problems, about" in heard.stages[2]
    # Greedy and sampled replies are one piece of work.
    assert list(heard.shares) == ["before training", "after training"]
    for shares in heard.shares.values():
        assert shares[0] == 0 and shares[-1] == 1 and len(shares) > 20
        assert max(a - b for a, b in pairwise(shares)) < 0.5
    assert "11 of 11 replies" in heard.words[-1]
    parts = list(dict.fromkeys((step, part) for step, part, *_ in heard.parts))
    assert parts == [(1, "rollouts"), (1, "training")][("TRL" in path) :]
    training_words = [words for _, part, _, _, words in heard.parts if part == "training"]
    assert training_words == ["micro-batch 1 of 2", "micro-batch 2 of 2"]
    if "engine" in path:
        tokens = [words for _, part, _, _, words in heard.parts if part == "rollouts"]
        assert "0 of 16 replies, token 1 of at most 24" in tokens


def test_replies_that_are_left_out_cost_a_rollout_and_no_training() -> None:
    whole, half = cost_of(WORK, RATES), cost_of(replace(WORK, trained=4), RATES)
    assert half.rollout_seconds == whole.rollout_seconds
    prompts_seconds = 16 * 300.0 * 0.003  # a group's prompt is computed either way
    assert half.training_seconds - prompts_seconds == pytest.approx(
        (whole.training_seconds - prompts_seconds) / 2
    )
    # The old policy scores them all: which ones are trained on is not known before.
    stale = replace(WORK, forwards=1)
    more = cost_of(stale, RATES).training_seconds - whole.training_seconds
    assert cost_of(replace(stale, trained=4), RATES).training_seconds == pytest.approx(
        half.training_seconds + more
    )


def test_what_cannot_be_tried_is_said_and_stops_nothing(
    assembled: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*args: Any) -> Rates:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory\nand more")

    monkeypatch.setattr(estimating, "measure_rates", fails)
    heard = Heard()
    parts = (assembled.config, assembled.task, assembled.policy, assembled.trainer)
    assert tell_estimate(*parts, heard) is None
    assert heard.notes == [
        "  not known, because the trial failed: DefaultCPUAllocator: can't allocate memory"
    ]


WRITING = Writing(1.0, 0.001, ((8, 0.1), (64, 0.4)))
RATES = Rates(WRITING, WRITING, Pass(0.0, 0.001), Pass(0.0, 0.002), 5.0)
WORK = Work(
    steps=250, problems=16, generations=8, trained=8, micro_rows=8, rollouts_a_step=1.0,
    iterations=1, budget_tokens=512, prompt_tokens=300.0, shared_tokens=200, heldout=600,
    repeated=100, measurements=2,
    selection=100, selection_measurements=5, eval_rows=100, forwards=0, recomputes=False,
    reads_prompt_once=True,
)  # fmt: skip


def slower(factor: float) -> Rates:
    points = tuple((rows, factor * seconds) for rows, seconds in WRITING.token_seconds)
    writing = Writing(factor, factor * 0.001, points)
    return Rates(writing, writing, Pass(0.0, factor * 0.001), Pass(0.0, factor * 0.002), 5.0)


def test_a_step_is_the_tokens_it_writes_reads_and_trains_on() -> None:
    cost = cost_of(WORK, RATES)
    assert cost.rollout_seconds == pytest.approx(1 + 0.001 * (200 + 16 * 100) + 0.8 * 512)
    tokens = 128 * 512 + 16 * 300
    assert cost.training_seconds == pytest.approx(0.003 * tokens)
    again = cost_of(replace(WORK, recomputes=True), RATES)
    assert again.training_seconds == pytest.approx(0.004 * tokens)
    started = cost_of(WORK, replace(RATES, forward=Pass(0.5, 0.001)))
    assert started.training_seconds == pytest.approx(0.003 * tokens + 16 * 0.5)
    stock = cost_of(replace(WORK, reads_prompt_once=False), RATES)
    assert stock.training_seconds == pytest.approx(0.003 * 128 * 812)
    twice = cost_of(replace(WORK, iterations=2, rollouts_a_step=0.5), RATES)
    assert twice.training_seconds == pytest.approx(cost.training_seconds)
    assert twice.rollout_seconds == pytest.approx(0.5 * (cost.rollout_seconds or 0))
    assert cost.total_seconds == pytest.approx(
        250 * cost.step_seconds + 2 * cost.measurement_seconds + cost.selection_seconds
    )


@given(st.floats(0, 1), st.floats(0, 1))
def test_shorter_replies_never_take_longer(one: float, other: float) -> None:
    short, long = sorted((one, other))
    assert cost_of(WORK, RATES, short).total_seconds <= cost_of(WORK, RATES, long).total_seconds


@given(st.integers(1, 500), st.integers(1, 500))
def test_more_rows_never_take_less_time(one: int, other: int) -> None:
    few, many = sorted((one, other))
    assert WRITING.step_seconds(few) <= WRITING.step_seconds(many)


def estimate_of(work: Work, rates: Rates, length: float | None = None) -> Estimate:
    fraction = length or 0.5
    return Estimate(rates, cost_of(work, rates), cost_of(work, rates, fraction),
                    fraction * work.budget_tokens, length is not None)  # fmt: skip


def config_of(*flags: str) -> Config:
    return load_config("any", None, ["--model_name_or_path", "tiny", *flags])


def flags_in(told: list[str]) -> list[str]:
    (line,) = [line for line in told if line.startswith("A run of at most")]
    return line.split(" here: ")[1].split()


def test_an_absurd_run_is_warned_of_with_flags_that_fit_and_are_read_as_meant() -> None:
    told = lines(estimate_of(WORK, slower(8)), config_of())
    assert any(line.startswith("Warning: this run would take about") for line in told)
    assert "The recipe any-cpu is made for a machine without a GPU." in told
    given = flags_in(told)
    smaller = config_of(*given)
    cut = fitting(WORK, slower(8)).work
    assert smaller.problems_per_step == cut.problems < 16
    assert smaller.training.num_generations == cut.generations == 8
    assert smaller.training.max_steps == cut.steps >= ENOUGH_STEPS
    assert smaller.max_completion_tokens == cut.budget_tokens
    assert smaller.script.num_heldout_problems == cut.heldout < 600
    assert smaller.script.num_consistency_problems == cut.repeated
    assert smaller.training.warmup_steps <= smaller.training.max_steps / 10
    assert cost_of(cut, slower(8)).total_seconds <= FITTING_SECONDS
    assert "--max_hours" in told[-1]


def test_a_run_of_less_than_a_day_is_not_warned_of() -> None:
    day = 86_400 / cost_of(WORK, RATES, 0.5).total_seconds
    assert not any(
        "Warning" in line for line in lines(estimate_of(WORK, slower(0.95 * day)), config_of())
    )
    over = estimate_of(WORK, slower(1.05 * day))
    assert any("Warning" in line for line in lines(over, config_of()))
    # Nor one that was told when to stop; a limit beyond a day is none.
    assert not any("Warning" in line for line in lines(over, config_of("--max_hours", "10")))
    assert any("Warning" in line for line in lines(over, config_of("--max_hours", "100")))


def test_a_batch_that_was_set_in_other_words_is_left_alone() -> None:
    told = lines(estimate_of(WORK, slower(8)), config_of("--steps_per_generation", "16"))
    assert not {"--gradient_accumulation_steps", "--num_generations"} & set(flags_in(told))


def test_a_resumed_run_is_not_told_to_become_another_one() -> None:
    config = config_of()
    config.training.resume_from_checkpoint = "latest"
    rest = replace(WORK, measurements=1, steps=100)
    told = lines(estimate_of(rest, slower(20), 0.25), config)
    assert any("Warning" in line for line in told)
    assert not any("--num_generations" in line for line in told)
    assert any(line.startswith("measuring after, ") for line in told)
    assert any("as replies have 128 tokens on average" in line for line in told)


def test_rollouts_of_another_engine_are_said_not_to_be_known() -> None:
    told = lines(estimate_of(WORK, replace(RATES, rollouts=None)), config_of())
    assert "not known, another engine writes them" in told[0]


@given(st.floats(1e-4, 1e5), st.booleans())
def test_what_is_advised_is_never_more_than_what_was_asked(factor: float, keeps: bool) -> None:
    cost = fitting(WORK, slower(factor), keeps_batch=keeps)
    work = cost.work
    for name in ("problems", "generations", "budget_tokens", "heldout", "repeated", "selection"):
        assert getattr(work, name) <= getattr(WORK, name)
    assert 1 <= work.steps <= WORK.steps and work.repeated <= work.heldout
    fits = cost.total_seconds <= FITTING_SECONDS * 1.001
    assert fits or work.steps == 1


def test_the_rest_of_a_run_begins_at_its_checkpoint(tmp_path: Path) -> None:
    for step in (0, 10, 4):
        (tmp_path / f"checkpoint-{step}").mkdir()
    run = RunDir(tmp_path)

    def left(wanted: str | None, measured: Any = None) -> Mapping[str, Any]:
        config = config_of()
        config.training.resume_from_checkpoint = wanted
        return resuming.what_is_left(config, run, measured)

    assert left(None) == {"measurements": 2}
    assert left("latest") == left(str(tmp_path)) == {"measurements": 2, "steps_done": 10}
    greedy = SimpleNamespace(figures={"completion_tokens": SimpleNamespace(value=40.0)})
    assert left(str(tmp_path / "checkpoint-4"), (greedy, None)) == {
        "measurements": 1, "steps_done": 4, "reply_tokens": 40.0,
    }  # fmt: skip


def step_through(callback: FirstStep, clock: list[float], seconds: float, steps: int) -> None:
    for step in range(1, 3):
        state = SimpleNamespace(global_step=step, max_steps=steps)
        callback.on_step_begin(None, state, None)
        clock[0] += seconds
        callback.on_step_end(None, state, None)


@pytest.mark.parametrize(("seconds", "told"), [(30.0, True), (0.5, False)])
def test_the_first_step_mends_the_estimate_once_and_of_long_runs_only(
    seconds: float, told: bool
) -> None:
    heard, clock = Heard(), [0.0]
    found = estimate_of(replace(WORK, selection_measurements=0), RATES)
    clocked: Callable[[], float] = lambda: clock[0]  # noqa: E731
    step_through(FirstStep(found, heard, 60.0, clocked), clock, seconds, 41)
    foretold = roughly(found.most.step_seconds)
    expected = (
        f"  the first step took 30 s (estimate: at most {foretold}); at this pace the other 40 "
        "take 20 min, and 21 min remain with the evaluations"
    )
    assert heard.notes == ([expected] if told else [])


def test_hours_are_told_in_steps_and_replies_before_the_run_begins() -> None:
    limited = config_of("--max_hours", "8")
    half = 2 * 8 * 3600 / cost_of(WORK, RATES, 0.5).total_seconds  # twice as long as 8 hours
    (some,) = [x for x in lines(estimate_of(WORK, slower(half)), limited) if "8 hours" in x]
    assert some.startswith("8 hours: about ") and " of 250 steps, " in some
    assert some.endswith(" replies, if replies have 256 tokens")
    steps = int(some.split("about ")[1].split()[0])
    assert 100 < steps < 140  # what measuring takes is left out of the steps
    (all_,) = [x for x in lines(estimate_of(WORK, slower(half / 8)), limited) if "8 hours" in x]
    assert "all 250 steps, 32,000 replies" in all_ and "would fit (--max_steps" in all_
    (none,) = [x for x in lines(estimate_of(WORK, slower(1e4)), limited) if "8 hours" in x]
    assert "not one step" in none
    unknown = lines(estimate_of(WORK, replace(RATES, rollouts=None)), limited)
    assert any("8 hours" in line and "not known" in line for line in unknown)
    assert not any("8 hours" in line for line in lines(estimate_of(WORK, RATES), config_of()))


@given(st.floats(0.01, 100), st.floats(0.1, 1e4), st.floats(0, 1e5), st.integers(1, 1000))
def test_no_more_steps_are_promised_than_fit(
    hours: float, step: float, before: float, steps: int
) -> None:
    line = steps_within(hours, step_seconds=step, before_seconds=before, after_seconds=before,
                        steps=steps, replies=32)  # fmt: skip
    if "about" in line and " of " in line:
        promised = int(line.split("about ")[1].split()[0].replace(",", ""))
        assert 0 < promised < steps
        assert before + promised * step <= hours * 3600 * (1 + 1e-9)
