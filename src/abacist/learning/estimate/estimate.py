"""The estimate of a run: told before it begins, and once more after its first step.

Where a run is far too much for its machine, :func:`fitting` cuts it down in the order in which that
hurts least (problems of a step, room for a reply, problems of the verdict, replies to a problem,
and steps last), and :func:`flags_for` says what to add to the command line.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from statistics import fmean
from typing import Any

from transformers import TrainerCallback

from abacist.errors import AbacistError, first_line
from abacist.learning import fastpath, processes
from abacist.learning.config import Config
from abacist.learning.estimate.cost import Cost, Work, cost_of, roughly, steps_within, work_of
from abacist.learning.estimate.trial import Rates, measure_rates
from abacist.learning.helptext import recipe_names
from abacist.learning.task import Task
from abacist.learning.tracking import Watcher
from abacist.policy.common_prefix import common_prefix_tokens
from abacist.policy.families import FastPart
from abacist.policy.loading import Policy

SAMPLE_PROBLEMS = 16  # whose prompts are counted
MIDDLE_FRACTION = 0.5  # of its budget, for a reply of which nothing is known
WORTH_REFINING_SECONDS = 300.0


@dataclass(frozen=True)
class Estimate:
    """What a run, or the rest of it, is expected to take: at most, and with shorter replies."""

    rates: Rates
    most: Cost
    likely: Cost
    likely_tokens: float
    is_known_length: bool

    def share_of_measuring(self) -> str:
        """How much of the run one measurement is, as the end of a sentence."""
        total = self.likely.total_seconds
        if not total:
            return ""
        return f"about {self.likely.measurement_seconds / total:.0%} of the run"


def estimate(
    config: Config,
    task: Task,
    policy: Policy,
    trainer: Any,
    *,
    steps_done: int = 0,
    measurements: int = 2,
    reply_tokens: float | None = None,
) -> Estimate:
    """Measure for a few seconds and add up what is ahead.

    ``steps_done`` and ``measurements`` (still to be made) say where a resumed run stands;
    ``reply_tokens`` is the mean length of its replies, if that is known. The run stays as it is,
    random states included. Raises whatever the run itself would raise in its first step.
    """
    rows = task.rows(task.train[:SAMPLE_PROBLEMS])
    prompts = [policy.chat.encode(row["prompt"]) for row in rows]
    work = work_of(
        config,
        task,
        trainer,
        prompt_tokens=fmean(map(len, prompts)),
        shared_tokens=common_prefix_tokens([tuple(ids) for ids in prompts]),
        reads_prompt_once=fastpath.unsupported_reason(trainer, FastPart.SCORING) is None,
        steps_done=steps_done,
        measurements=measurements,
    )
    measured_rows = min(work.eval_rows, max(work.measured_replies, work.selection, 1))
    # Every process tries at once, and so as fast as it will be beside the others.
    share = work.shared_by(processes.count())
    replies = share.problems * work.generations
    rates = measure_rates(policy, trainer, prompts, replies, measured_rows)
    fraction = MIDDLE_FRACTION
    if reply_tokens is not None:
        fraction = min(1.0, reply_tokens / work.budget_tokens)
    return Estimate(
        rates,
        replace(cost_of(share, rates), work=work),
        replace(cost_of(share, rates, fraction), work=work),
        fraction * work.budget_tokens,
        reply_tokens is not None,
    )


def lines(found: Estimate, config: Config) -> list[str]:
    """The estimate as lines, with a warning and flags that help where it is far too much."""
    most, likely, work = found.most, found.likely, found.most.work
    replies = f"{work.problems * work.generations:,} replies of at most {work.budget_tokens} tokens"
    told = []
    if work.steps:
        rollout = "not known, another engine writes them"
        is_part = work.trained < work.generations
        trained = f"{work.problems * work.trained:,} of them" if is_part else "them"
        if most.rollout_seconds is not None:
            rollout = roughly(most.rollout_seconds)
        told.append(
            f"{work.steps:,} steps × at most {roughly(most.step_seconds)} ({replies}: "
            f"{rollout}; training on {trained}: {roughly(most.training_seconds)}): "
            f"at most {roughly(most.steps_seconds)}"
        )
    if work.measurements:
        when = "before and after" if work.measurements == 2 else "after"
        told.append(
            f"measuring {when}, {work.measured_replies:,} replies each time: "
            f"at most {roughly(most.measuring_seconds)}"
        )
    if work.selection_measurements:
        told.append(
            f"selection problems, {work.selection_measurements:,} × {work.selection:,} replies: "
            f"at most {roughly(most.selection_seconds)}"
        )
    because = "if" if not found.is_known_length else "as"
    told.append(
        f"in all at most {roughly(most.total_seconds)}; about {roughly(likely.total_seconds)} "
        f"{because} replies have {found.likely_tokens:.0f} tokens on average"
    )
    if config.script.max_hours is not None and work.steps:
        told.append(_within(found, config.script.max_hours))
    hours = config.script.max_hours
    is_limited = hours is not None and hours * 3600 <= DAY_SECONDS
    if likely.total_seconds > DAY_SECONDS and not is_limited:
        told += _warning(found, config, work)
    return told


def _within(found: Estimate, hours: float) -> str:
    """How many of the steps the hours suffice for, by replies of the likely length."""
    likely, work = found.likely, found.likely.work
    if likely.rollout_seconds is None:
        return f"{hours:g} hours: how many steps that is is not known, see above"
    line = steps_within(
        hours,
        step_seconds=likely.step_seconds + likely.selection_seconds / work.steps,
        before_seconds=likely.measurement_seconds if work.measurements == 2 else 0.0,
        after_seconds=likely.measurement_seconds if work.measurements else 0.0,
        steps=work.steps,
        replies=work.rollouts_a_step * work.problems * work.generations,
    )
    length = "" if found.is_known_length else f", if replies have {found.likely_tokens:.0f} tokens"
    return line + length


def _warning(found: Estimate, config: Config, work: Work) -> list[str]:
    likely = roughly(found.likely.total_seconds)
    told = [f"Warning: this run would take about {likely} on this machine."]
    if config.training.resume_from_checkpoint is not None or processes.count() > 1:
        # Its other settings belong to the run that was begun.
        return [*told, "--max_hours 8 saves and stops in time; --resume goes on from there."]
    if f"{config.recipe}-cpu" in recipe_names():
        told.append(f"The recipe {config.recipe}-cpu is made for a machine without a GPU.")
    is_batch_set = {"generation_batch_size", "steps_per_generation"} & config.settings.keys()
    smaller = fitting(work, found.rates, keeps_batch=bool(is_batch_set))
    flags = flags_for(config, work, smaller.work)
    told.append(f"A run of at most {roughly(smaller.total_seconds)} here: {flags}")
    if smaller.total_seconds > 2 * FITTING_SECONDS:
        told.append("Even that is long: take a smaller model, or a GPU.")
    told.append("--max_hours 8 saves and stops in time; --resume goes on from there.")
    return told


def tell_estimate(
    config: Config,
    task: Task,
    policy: Policy,
    trainer: Any,
    watcher: Watcher,
    **where: Any,
) -> Estimate | None:
    """Report what the run will take; None where the trial failed, which is reported too."""
    watcher.stage("What this run will take here")
    try:
        found = estimate(config, task, policy, trainer, **where)
    except (AbacistError, RuntimeError, MemoryError) as error:
        # A matter of courtesy must not end a run; what is wrong will show where it matters.
        watcher.note(f"  not known, because the trial failed: {first_line(error)}")
        return None
    for line in lines(found, config):
        watcher.note(f"  {line}")
    watcher.note(f"  (tried for {roughly(found.rates.trial_seconds)})")
    return found


class FirstStep(TrainerCallback):
    """Reports after the first step what the rest will take, by the measured time.

    ``measurement_seconds`` tells how long the measurement after training will be, if that is known.
    Short runs are left in peace.
    """

    def __init__(
        self,
        found: Estimate,
        watcher: Watcher,
        measurement_seconds: float | None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.found, self.watcher, self.clock = found, watcher, clock
        self.measurement_seconds = measurement_seconds
        self._began: float | None = None
        self._is_told = False

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._began = self.clock()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._is_told or self._began is None:
            return
        self._is_told = True
        step_seconds = self.clock() - self._began
        left = state.max_steps - state.global_step
        seconds = left * step_seconds
        cost = self.found.likely
        after = self.measurement_seconds or cost.measurement_seconds
        rest = seconds + after * bool(cost.work.measurements) + cost.selection_seconds
        if left < 1 or rest < WORTH_REFINING_SECONDS:
            return
        self.watcher.note(
            f"  the first step took {roughly(step_seconds)} (estimate: at most "
            f"{roughly(self.found.most.step_seconds)}); at this pace the other {left:,} take "
            f"{roughly(seconds)}, and {roughly(rest)} remain with the evaluations"
        )


DAY_SECONDS = 86_400.0
FITTING_SECONDS = DAY_SECONDS / 2  # what is advised takes at most so long, every reply full
ENOUGH_STEPS = 30  # fewer teach little: cut something else first
_MOST_WARMUP_FRACTION = 0.1


@dataclass(frozen=True)
class _Smaller:
    """How far a run is cut down: at most so many of each."""

    problems: int
    generations: int
    budget_tokens: int
    heldout: int
    repeated: int


_LADDER = (
    _Smaller(8, 8, 512, 300, 100),
    _Smaller(4, 8, 320, 200, 50),
    _Smaller(4, 8, 256, 100, 20),
    _Smaller(4, 8, 160, 100, 20),
    _Smaller(2, 8, 160, 64, 10),
    _Smaller(2, 4, 128, 32, 0),
)


def fitting(work: Work, rates: Rates, *, keeps_batch: bool = False) -> Cost:
    """The run cut down to ``FITTING_SECONDS``, or to one step of the smallest kind.

    ``keeps_batch`` leaves the replies of a step as they are.
    """
    found = None
    for smaller in _LADDER:
        one = _cut(work, smaller)
        if keeps_batch:
            one = replace(
                one,
                problems=work.problems,
                generations=work.generations,
                trained=work.trained,
                micro_rows=work.micro_rows,
            )
        cost = cost_of(one, rates)
        rest = FITTING_SECONDS - cost.measuring_seconds - cost.selection_seconds
        steps = min(work.steps, int(rest / cost.step_seconds)) if cost.step_seconds else work.steps
        found = cost_of(replace(one, steps=max(1, steps)), rates)
        if steps >= min(work.steps, ENOUGH_STEPS):
            break
    assert found is not None
    return found


def _cut(work: Work, smaller: _Smaller) -> Work:
    heldout = min(work.heldout, smaller.heldout)
    problems = min(work.problems, smaller.problems)
    generations = min(work.generations, smaller.generations)
    is_same = (problems, generations) == (work.problems, work.generations)
    return replace(
        work,
        problems=problems,
        generations=generations,
        trained=max(1, work.trained * generations // work.generations),
        micro_rows=work.micro_rows if is_same else generations,
        budget_tokens=min(work.budget_tokens, smaller.budget_tokens),
        heldout=heldout,
        repeated=min(work.repeated, smaller.repeated, heldout),
        selection=min(work.selection, max(1, smaller.heldout // 2)),
    )


def flags_for(config: Config, work: Work, smaller: Work) -> str:
    """What to add to the command line so that ``work`` becomes ``smaller``."""
    found: list[str] = []

    def add(name: str, now: object, then: object) -> None:
        if now != then:
            found.append(f"--{name} {then}")

    add("num_generations", work.generations, smaller.generations)
    asked = config.training.train_replies
    if asked is not None and asked > smaller.generations:
        found.append(f"--train_replies {smaller.generations}")
    elif smaller.trained < smaller.generations:
        add("train_replies", work.trained, smaller.trained)
    if (work.problems, work.generations) != (smaller.problems, smaller.generations):
        # One group a micro-batch: a step of so many groups, whatever the recipe's batch was.
        found.append(f"--per_device_train_batch_size {smaller.generations}")
        found.append(f"--gradient_accumulation_steps {smaller.problems}")
    add("max_completion_length", work.budget_tokens, smaller.budget_tokens)
    add("max_steps", work.steps, smaller.steps)
    warmup = float(config.training.warmup_steps or 0)
    if warmup >= 1 and warmup > _MOST_WARMUP_FRACTION * smaller.steps:
        add("warmup_steps", int(warmup), max(1, int(_MOST_WARMUP_FRACTION * smaller.steps)))
    add("num_heldout_problems", work.heldout, smaller.heldout)
    add("num_consistency_problems", work.repeated, smaller.repeated)
    if smaller.selection_measurements:
        add("num_selection_problems", work.selection, smaller.selection)
    return " ".join(found)
