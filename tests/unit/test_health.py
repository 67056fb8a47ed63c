"""Each way in which a run can be silently wrong is named, and a healthy run is left in peace."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import TrainerControl

from abacist.errors import ModelError, TrainingError
from abacist.learning.health.guard import (
    MOST_REFUSED_IN_A_ROW,
    Guard,
    all_finite,
    refuse_broken_weights,
)
from abacist.learning.health.history import Facts, MetricsHistory
from abacist.learning.health.rules import RULES, Watch, rate_out_of_band
from abacist.learning.tracking import Silent
from faults import fault

STEPS = 60
FACTS = Facts(learning_rate=1e-4, problems_per_step=8, max_steps=STEPS, max_completion_length=96)
Row = dict[str, Any]


def healthy(step: int) -> Row:
    """A row as a run that learns logs it: up from 0.5 to 1.7 of 2."""
    share = min(1.0, step / 40)
    return {
        "step": step,
        "loss": 0.01,
        "grad_norm": 0.05,
        "learning_rate": 1e-4,
        "reward": 1.0 + 2 * share,
        "reward_std": 1.0,
        "rewards/correctness/mean": 0.5 + 1.2 * share,
        "rewards/correctness/std": 0.9,
        "rewards/strict_format/mean": 0.2 + 0.3 * share,
        "rewards/strict_format/std": 0.25 * (1.001 - share),
        "completions/clipped_ratio": 0.02,
        "completions/mean_length": 40.0 + 10 * share,
        "frac_reward_zero_std": 0.1 + 0.5 * share,
        "entropy": 0.1 * (1.05 - share),
    }


def wrong(**changes: Callable[[int], Any] | Any) -> Callable[[int], Row]:
    """A run that is healthy but for some metrics (``__`` stands for ``/``)."""

    def row(step: int) -> Row:
        changed = {
            name.replace("__", "/"): value(step) if callable(value) else value
            for name, value in changes.items()
        }
        return healthy(step) | changed

    return row


FLAT = {"rewards__correctness__mean": 0.4, "reward": 1.0}
UNSOLVED = FLAT | {"entropy": 0.1}
GOES_ON = "a warning with evidence and remedy; the run goes on"


def ill(cause: str, name: str, row: Callable[[int], Row]) -> Any:
    return pytest.param(name, row, id=cause, marks=fault("training", cause, GOES_ON, 0))


ILLNESSES = [
    ill("no group has replies of different rewards", "no signal",
        wrong(frac_reward_zero_std=1.0, **UNSOLVED)),
    ill("a reward always pays the same", "dead reward",
        wrong(rewards__mine__mean=0.3, rewards__mine__std=0.0)),
    ill("a reward always pays the same, a number like 0.3 that is rounded", "dead reward",
        wrong(rewards__mine__std=3.0e-8, rewards__mine__mean=lambda s: 0.3 + 3e-8 * (s % 2))),
    ill("a reward never applies", "dead reward",
        wrong(rewards__mine__mean=None, rewards__mine__std=None)),
    ill("a reward falls to 0 and stays there", "dead reward",
        wrong(rewards__mine__mean=lambda s: 0.3 if s < 20 else 0.0, rewards__mine__std=0.0)),
    ill("no reply ever ends by itself (template, stop token)", "never stops",
        wrong(completions__clipped_ratio=1.0, **UNSOLVED)),
    ill("most replies are cut at the budget", "cut replies",
        wrong(completions__clipped_ratio=lambda s: 0.1 if s < 9 else 0.8)),
    ill("format rewards rise and accuracy does not", "format only", wrong(**UNSOLVED)),
    ill("replies collapse in length without a gain", "length",
        wrong(completions__mean_length=lambda s: 60 / s, **UNSOLVED)),
    ill("replies grow in length without a gain", "length",
        wrong(completions__mean_length=lambda s: 30.0 + 5 * s, **UNSOLVED)),
    ill("entropy collapses without a gain", "entropy",
        wrong(entropy=lambda s: 0.5 / s**2, frac_reward_zero_std=0.7, **FLAT)),
    ill("entropy rises without a gain", "entropy",
        wrong(entropy=lambda s: 0.1 * s, **FLAT)),
    ill("the policy drifts away from its reference (KL)", "KL drift",
        wrong(kl=lambda s: 0.01 * 1.2**s)),
    ill("the logged gradient is not finite", "not finite",
        wrong(grad_norm=lambda s: None if s == 30 else 0.05)),
    ill("the gradient explodes", "gradient", wrong(grad_norm=lambda s: 0.05 if s < 40 else 50.0)),
    ill("the sampling engine and the model disagree", "two engines",
        wrong(**{"sampling__sampling_logp_difference__mean": 0.4})),
]  # fmt: skip


def told(row: Callable[[int], Row], facts: Facts = FACTS) -> list[str]:
    watch = Watch(facts)
    return [found.name for step in range(1, STEPS + 1) for found in watch.see(row(step))]


@pytest.mark.parametrize(("name", "row"), ILLNESSES)
def test_every_illness_is_named_once_and_alone(name: str, row: Callable[[int], Row]) -> None:
    found = told(row)
    assert found.count(name) == 1
    # A run that fails in one way mostly fails to improve, and then its format may still rise.
    assert set(found) <= {name, "format only"}


def test_every_rule_has_a_run_that_it_finds() -> None:
    covered = {parameter.values[0] for parameter in ILLNESSES}
    assert covered | {"held-out fall", "learning rate"} == set(RULES)


def test_a_healthy_run_is_left_in_peace() -> None:
    assert told(healthy) == []


@pytest.mark.parametrize(("silent", "learns"), [(0.5, True), (1.0, False)])
def test_groups_that_learn_from_their_steps_are_not_called_silent(
    silent: float, learns: bool
) -> None:
    row = wrong(frac_reward_zero_std=1.0, step_reward=0.5, frac_step_reward_zero_std=silent,
                **UNSOLVED)  # fmt: skip
    assert ("no signal" in told(row)) is not learns
    watch = Watch(FACTS)
    for step in range(1, STEPS + 1):
        watch.see(row(step))
    assert watch.zero_advantage_steps == (0 if learns else STEPS)


@fault("training", "--outcome_gating silences every group", GOES_ON, 0)
def test_groups_that_gating_silenced_teach_nothing_although_their_rewards_differ() -> None:
    row = wrong(
        frac_reward_zero_std=0.1, frac_outcome_gated=1.0, frac_zero_advantage=1.0, **UNSOLVED
    )
    watch = Watch(FACTS)
    said = [found for step in range(1, STEPS + 1) for found in watch.see(row(step))]
    assert watch.zero_advantage_steps == STEPS
    (told_of,) = [found for found in said if found.name == "no signal"]
    assert "--outcome_gating silenced 100%" in told_of.evidence
    half = wrong(
        frac_reward_zero_std=0.1, frac_outcome_gated=0.5, frac_zero_advantage=0.6, **UNSOLVED
    )
    assert "no signal" not in told(half)
    # Rewards are all equal, and steps were paid: what was learned from counts, and not the first.
    assert "no signal" not in told(
        wrong(frac_reward_zero_std=1.0, frac_zero_advantage=0.2, **UNSOLVED)
    )


def test_a_solved_task_is_no_illness() -> None:
    solved = wrong(
        rewards__correctness__mean=lambda s: 0.5 if s < 6 else 1.95,
        frac_reward_zero_std=lambda s: 0.1 if s < 6 else 1.0,
        entropy=lambda s: 0.1 if s < 6 else 1e-4,
    )
    assert told(solved) == []


@pytest.mark.parametrize(("name", "row"), ILLNESSES[:9])
def test_two_steps_are_never_enough_for_what_needs_a_stretch(
    name: str, row: Callable[[int], Row]
) -> None:
    watch = Watch(FACTS)
    assert [found.name for step in (1, 2) for found in watch.see(row(step))] == []


def test_a_row_that_speaks_for_ten_steps_counts_as_ten() -> None:
    watch = Watch(FACTS)
    row = wrong(frac_reward_zero_std=1.0, **UNSOLVED)
    assert [found.name for found in watch.see(row(10))] == ["no signal"]


@fault("training", "eval_accuracy falls while the reward rises", GOES_ON, 0)
def test_a_fall_of_held_out_accuracy_is_named_with_the_step_to_go_back_to() -> None:
    watch = Watch(FACTS)
    for step in range(1, STEPS + 1):
        watch.see(healthy(step))
        if step % 20 == 0:
            watch.see({"step": step, "eval_accuracy": 0.7 - step / 200})
    assert "step 20" in watch.found["held-out fall"].evidence


@fault("training", "the learning rate is out of the band of LoRA or full fine-tuning", GOES_ON, 0)
def test_a_learning_rate_is_judged_by_what_is_trained() -> None:
    big = 1_500_000_000
    for lora, rate, is_fine in [
        (True, 4e-5, True), (True, 1e-6, False), (True, 5e-3, False),
        (False, 1e-6, True), (False, 4e-4, False), (False, 1e-9, False),
    ]:  # fmt: skip
        facts = Facts(learning_rate=rate, uses_lora=lora, parameters=big)
        assert (rate_out_of_band(facts) is None) is is_fine, (lora, rate)
    assert rate_out_of_band(Facts(learning_rate=1.5e-3, parameters=1_900_000)) is None
    assert rate_out_of_band(Facts(learning_rate=math.nan)) is None
    said = told(healthy, Facts(learning_rate=1e-7, max_steps=STEPS, problems_per_step=8))
    assert said == ["learning rate"]


ANYTHING = st.recursive(
    st.none() | st.booleans() | st.floats() | st.integers() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=2),
    max_leaves=3,
)
NAMES = st.sampled_from([*healthy(1), "kl", "eval_accuracy", "rewards/x/mean", "refused_steps"])


@given(st.lists(st.dictionaries(NAMES, ANYTHING), max_size=12))
def test_no_row_of_any_kind_is_fatal_to_the_watch(rows: list[Row]) -> None:
    watch = Watch(FACTS)
    for step, row in enumerate(rows, 1):
        watch.see(healthy(step) | row | {"step": step})


def test_a_run_of_epochs_has_the_patience_of_a_long_one() -> None:
    assert MetricsHistory(Facts.of({"max_steps": -1, "num_generations": 8})).patience_steps == 40


def test_the_problems_of_a_step_are_those_of_all_processes() -> None:
    settings = {"per_device_train_batch_size": 16, "num_generations": 4}
    found = [Facts.of(settings, processes=count).problems_per_step for count in (1, 2, None, "x")]
    assert found == [4, 8, 4, 4]


SETTINGS = ["learning_rate", "num_generations", "max_steps", "use_peft", "max_grad_norm"]


@given(st.dictionaries(st.sampled_from(SETTINGS), ANYTHING))
def test_no_settings_of_any_kind_are_fatal_to_the_facts(settings: Row) -> None:
    assert Facts.of(settings).problems_per_step >= 1


# The guard


def trained() -> torch.nn.Module:
    model = torch.nn.Linear(3, 2)
    for weight in model.parameters():
        weight.grad = torch.ones_like(weight)
    return model


ARGS = SimpleNamespace(fp16=False)


def state(step: int = 4) -> Any:
    return SimpleNamespace(global_step=step, max_steps=STEPS, log_history=[healthy(step)])


@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("policy", ["stop", "skip"])
def test_a_poisoned_gradient_never_reaches_the_optimizer(poison: float, policy: str) -> None:
    model = trained()
    before = [weight.detach().clone() for weight in model.parameters()]
    optimizer = torch.optim.AdamW(model.parameters())
    guard = Guard(FACTS, Silent(), nan_policy=policy)
    model.weight.grad[0, 1] = poison
    guard.on_pre_optimizer_step(ARGS, state(), None, model=model)
    optimizer.step()
    assert all(map(torch.equal, before, model.parameters())) and not optimizer.state
    if policy == "skip":
        guard.check()
    else:
        with pytest.raises(TrainingError, match=r"At step 5 .*first in weight"):
            guard.check()


def test_a_sound_gradient_passes_untouched() -> None:
    model = trained()
    guard = Guard(FACTS, Silent())
    guard.on_pre_optimizer_step(ARGS, state(), None, model=model)
    guard.on_optimizer_step(ARGS, state(), None, model=model)
    guard.check()
    assert all(bool((weight.grad == 1).all()) for weight in model.parameters())


def test_skipping_ends_when_more_steps_in_a_row_are_poisoned_than_are_allowed() -> None:
    guard = Guard(FACTS, Silent(), nan_policy="skip")
    in_a_row = [*[True] * MOST_REFUSED_IN_A_ROW, False]  # a good step begins the count anew
    for step, is_poisoned in enumerate([*in_a_row * 2, *[True] * (MOST_REFUSED_IN_A_ROW + 1)]):
        guard.check()
        model = trained()
        if is_poisoned:
            model.bias.grad[0] = math.nan
        guard.on_pre_optimizer_step(ARGS, state(step), None, model=model)
    with pytest.raises(TrainingError, match=f"the {MOST_REFUSED_IN_A_ROW + 1}th time in a row"):
        guard.check()


def test_in_float16_an_overflow_is_left_to_the_gradient_scaler() -> None:
    model = trained()
    model.bias.grad[0] = math.inf
    guard = Guard(FACTS, Silent())
    guard.on_pre_optimizer_step(SimpleNamespace(fp16=True), state(), None, model=model)
    guard.check()
    assert bool(model.bias.grad[0].isinf())


SILENT = {"frac_reward_zero_std": lambda s: 1.0 if s > 3 else 0.5}


@pytest.mark.parametrize(
    ("row", "steps", "max_steps", "is_ended"),
    [
        (wrong(**SILENT, **UNSOLVED), 8, STEPS, True),
        (wrong(**SILENT, **UNSOLVED), 7, STEPS, False),  # one step too few
        (wrong(**SILENT, **UNSOLVED), 8, 8, False),  # there is nothing left to stop
        (wrong(**SILENT, rewards__correctness__mean=2.0), 8, STEPS, False),  # or to learn
    ],
    ids=["silent", "not for long enough", "at its end", "solved"],
)
def test_only_a_run_that_could_still_learn_is_ended_by_silent_steps(
    row: Callable[[int], Row], steps: int, max_steps: int, is_ended: bool
) -> None:
    guard = Guard(FACTS, Silent(), max_silent_steps=5)
    control = SimpleNamespace(should_training_stop=False, should_save=False)
    for step in range(1, steps + 1):
        after = SimpleNamespace(global_step=step, max_steps=max_steps, log_history=[])
        guard.on_log(ARGS, after, control, logs=row(step))
    assert (guard.fault is not None) == control.should_training_stop == is_ended
    assert control.should_save == is_ended


def test_a_resumed_run_does_not_repeat_what_was_said_before_the_stop() -> None:
    class Told(Silent):
        def __init__(self) -> None:
            self.warnings: list[str] = []

        def warning(self, text: str) -> None:
            self.warnings.append(text)

    row, counts = wrong(frac_reward_zero_std=1.0, **UNSOLVED), []
    for before in ([], [row(step) for step in range(1, 31)]):
        guard = Guard(FACTS, Told())
        guard.on_train_begin(ARGS, SimpleNamespace(log_history=before), None)
        for step in range(len(before) + 1, len(before) + 31):
            guard.on_log(ARGS, state(step), None, logs=row(step))
        counts.append(sum("no signal" in text for text in guard.watcher.warnings))
    assert counts == [1, 0]


@fault("training", "a step makes the weights overflow",
       "the step; nothing is saved, the last checkpoint stands")  # fmt: skip
def test_weights_that_overflow_end_the_run_before_they_are_saved() -> None:
    model = trained()
    model.weight.data[1, 1] = math.inf
    with pytest.raises(TrainingError, match=r"Step 5 made the weights overflow \(weight\)"):
        Guard(FACTS, Silent()).on_optimizer_step(ARGS, state(), None, model=model)


def test_a_refused_step_is_logged_as_one_and_never_with_an_invented_loss() -> None:
    guard = Guard(FACTS, Silent(), nan_policy="skip")
    model = trained()
    model.bias.grad[0] = math.nan
    guard.on_pre_optimizer_step(ARGS, state(), None, model=model)
    logs, after, control = healthy(5), state(5), TrainerControl()
    guard.on_step_end(ARGS, after, control)
    assert control.should_log  # before the run can be stopped, whatever logging_steps is
    guard.on_log(ARGS, after, None, logs=logs)
    for kept in (logs, after.log_history[-1]):
        assert math.isnan(kept["loss"]) and kept["refused_steps"] == 1
    logs, control = healthy(6), TrainerControl()
    guard.on_step_end(ARGS, state(6), control)
    assert not control.should_log
    guard.on_log(ARGS, state(6), None, logs=logs)
    assert logs["loss"] == 0.01 and "refused_steps" not in logs


def test_all_finite_sees_every_tensor_and_is_not_fooled_by_large_ones() -> None:
    large = torch.full((4,), 3e38)
    assert all_finite([large, torch.zeros(0), torch.tensor([6e4]).half()])
    assert not all_finite([large, torch.tensor([0.0, math.nan]), large])


@fault("model", "the weights of the model hold NaN", "the model and the weight")
def test_broken_weights_are_refused_by_name() -> None:
    model = torch.nn.Linear(2, 2)
    refuse_broken_weights(model, "mine")
    model.bias.data[0] = math.nan
    with pytest.raises(ModelError, match=r"'mine' hold numbers .* \(first in bias"):
        refuse_broken_weights(model, "mine")


def test_the_watch_reads_what_was_written_as_it_read_what_was_logged(tmp_path: Path) -> None:
    from abacist.learning.tracking import append_json_line

    row = wrong(grad_norm=lambda s: math.nan if s == 30 else 0.05)
    live, later = Watch(FACTS), Watch(FACTS)
    path = tmp_path / "metrics.jsonl"
    for step in range(1, STEPS + 1):
        live.see(row(step))
        append_json_line(path, row(step))
    for line in path.read_text(encoding="utf-8").splitlines():
        later.see(json.loads(line))
    assert live.found == later.found and set(live.found) == {"not finite"}
