"""The estimate as it is said: before a run begins, and once more after its first step."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from transformers import TrainerCallback

from abacist.errors import AbacistError
from abacist.learning import fastpath
from abacist.learning.config import Config
from abacist.learning.estimate import advice
from abacist.learning.estimate.cost import Cost, Work, cost_of, roughly, work_of
from abacist.learning.estimate.trial import Rates, measure_rates
from abacist.learning.task import Task
from abacist.learning.tracking import Watcher
from abacist.policy.decoding.cache import common_prefix_tokens
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
    rates = measure_rates(policy, trainer, prompts, work.problems * work.generations, measured_rows)
    fraction = MIDDLE_FRACTION
    if reply_tokens is not None:
        fraction = min(1.0, reply_tokens / work.budget_tokens)
    return Estimate(
        rates,
        cost_of(work, rates),
        cost_of(work, rates, fraction),
        fraction * work.budget_tokens,
        reply_tokens is not None,
    )


def lines(found: Estimate, config: Config) -> list[str]:
    """The estimate for a person, with a warning and a way out where it is far too much."""
    most, likely, work = found.most, found.likely, found.most.work
    replies = f"{work.problems * work.generations:,} replies of at most {work.budget_tokens} tokens"
    told = []
    if work.steps:
        rollout = "not known, another engine writes them"
        if most.rollout_seconds is not None:
            rollout = roughly(most.rollout_seconds)
        told.append(
            f"{work.steps:,} steps × at most {roughly(most.step_seconds)} ({replies}: "
            f"{rollout}; training on them: {roughly(most.training_seconds)}): "
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
    is_limited = (config.script.max_hours or advice.DAY_SECONDS) * 3600 <= advice.DAY_SECONDS
    if likely.total_seconds > advice.DAY_SECONDS and not is_limited:
        told += _warning(found, config, work)
    return told


def _warning(found: Estimate, config: Config, work: Work) -> list[str]:
    likely = roughly(found.likely.total_seconds)
    told = [f"Warning: this machine would be at it for about {likely}."]
    if config.training.resume_from_checkpoint is not None:
        # Its other settings belong to the run that was begun.
        return [*told, "--max_hours 8 saves and stops in time; --resume goes on from there."]
    is_batch_set = {"generation_batch_size", "steps_per_generation"} & config.settings.keys()
    smaller = advice.fitting(work, found.rates, keeps_batch=bool(is_batch_set))
    flags = advice.flags(config, work, smaller.work)
    told.append(f"A run of at most {roughly(smaller.total_seconds)} here: {flags}")
    if smaller.total_seconds > 2 * advice.FITTING_SECONDS:
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
    """Say what the run will take; None where that could not be found out, which is said too."""
    watcher.stage("What this run will take here")
    try:
        found = estimate(config, task, policy, trainer, **where)
    except (AbacistError, RuntimeError, MemoryError) as error:
        # A matter of courtesy must not end a run; what is wrong will show where it matters.
        first_line = (str(error).strip() or type(error).__name__).splitlines()[0]
        watcher.note(f"  not known, because trying it failed: {first_line[:200]}")
        return None
    for line in lines(found, config):
        watcher.note(f"  {line}")
    watcher.note(f"  (tried for {roughly(found.rates.trial_seconds)})")
    return found


class FirstStep(TrainerCallback):
    """Says after the first step that is taken what the rest will take, by what was really seen.

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
            f"  the first step took {roughly(step_seconds)} (foretold: at most "
            f"{roughly(self.found.most.step_seconds)}); at this pace the other {left:,} take "
            f"{roughly(seconds)}, and with the measuring it is {roughly(rest)} to the end"
        )
