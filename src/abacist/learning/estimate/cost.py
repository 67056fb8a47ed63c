"""What a run is made of, and what it takes at the rates of a trial."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

from abacist.learning.config import Config
from abacist.learning.dryrun.schedule import occasions, total_steps
from abacist.learning.estimate.trial import Rates, Writing
from abacist.learning.judge import VERDICT_SAMPLES
from abacist.learning.task import Task


@dataclass(frozen=True)
class Work:
    """A run, or the rest of one, in numbers: what its time depends on.

    ``generations`` are replies to a problem, ``problems`` are those of a step. ``forwards`` are
    further passes over what is trained on (a reference, an old policy), in steps' worth.
    ``prompt_tokens`` of a problem include the ``shared_tokens`` that all begin with.
    """

    steps: int
    problems: int
    generations: int
    rollouts_a_step: float  # one, unless completions serve several steps
    budget_tokens: int
    prompt_tokens: float
    shared_tokens: int
    heldout: int
    repeated: int
    measurements: int
    selection: int
    selection_measurements: int
    eval_rows: int
    forwards: float
    recomputes: bool  # gradient checkpointing: every forward is made twice
    reads_prompt_once: bool

    @property
    def measured_replies(self) -> int:
        """In one measurement, greedy and sampled."""
        return self.heldout + VERDICT_SAMPLES * self.repeated


@dataclass(frozen=True)
class Cost:
    """Seconds by part: one step's rollout (None: not known) and training, one measurement, all
    measurements on the selection split together."""

    rollout_seconds: float | None
    training_seconds: float
    measurement_seconds: float
    selection_seconds: float
    work: Work

    @property
    def step_seconds(self) -> float:
        """One optimizer step, as far as it is known."""
        return (self.rollout_seconds or 0.0) + self.training_seconds

    @property
    def steps_seconds(self) -> float:
        """All steps."""
        return self.work.steps * self.step_seconds

    @property
    def measuring_seconds(self) -> float:
        """Both measurements, or those that are left."""
        return self.work.measurements * self.measurement_seconds

    @property
    def total_seconds(self) -> float:
        """Everything but loading and saving."""
        return self.steps_seconds + self.measuring_seconds + self.selection_seconds


def work_of(
    config: Config,
    task: Task,
    trainer: Any,
    *,
    prompt_tokens: float,
    shared_tokens: int,
    reads_prompt_once: bool,
    steps_done: int = 0,
    measurements: int = 2,
) -> Work:
    """What ``config`` has ahead of it, ``steps_done`` behind it."""
    training = config.training
    steps = max(0, total_steps(config, len(task.train)) - steps_done)
    each_rows = int(training.steps_per_generation or 1) * training.num_iterations
    a_step = training.gradient_accumulation_steps / max(1, each_rows)
    looks = occasions(
        training.eval_strategy, training.eval_steps, steps, training.num_train_epochs
    )
    uses_old_policy = training.gradient_accumulation_steps % max(1, each_rows) != 0
    return Work(
        steps=steps,
        problems=max(1, config.problems_per_step),
        generations=trainer.num_generations,
        rollouts_a_step=a_step,
        budget_tokens=config.max_completion_tokens,
        prompt_tokens=prompt_tokens,
        shared_tokens=shared_tokens,
        heldout=len(task.heldout),
        repeated=min(config.script.num_consistency_problems, len(task.heldout)),
        measurements=measurements if task.heldout else 0,
        selection=len(task.selection),
        selection_measurements=looks if task.selection else 0,
        eval_rows=config.script.eval_batch_size,
        forwards=bool(training.beta) + a_step * uses_old_policy,
        recomputes=bool(training.gradient_checkpointing),
        reads_prompt_once=reads_prompt_once,
    )


def cost_of(work: Work, rates: Rates, length_fraction: float = 1.0) -> Cost:
    """What ``work`` takes if replies have this fraction of their budget on average."""
    length = length_fraction * work.budget_tokens
    own_tokens = work.prompt_tokens - work.shared_tokens

    def written(writing: Writing, problems: int, replies: int, rows: int) -> float:
        return writing.seconds(replies, rows, length, work.shared_tokens + problems * own_tokens)

    replies = work.problems * work.generations
    rollout = None
    if rates.rollouts is not None:
        rollout = work.rollouts_a_step * written(rates.rollouts, work.problems, replies, replies)
    prompts = work.problems if work.reads_prompt_once else replies
    tokens = replies * length + prompts * work.prompt_tokens
    passes = (1 + work.recomputes + work.forwards) * rates.forward_token_seconds
    micro_steps = work.rollouts_a_step or 1.0
    trained = micro_steps * tokens * (passes + rates.backward_token_seconds)
    measured = written(rates.measuring, work.heldout, work.measured_replies, work.eval_rows)
    look = written(rates.measuring, work.selection, work.selection, work.eval_rows)
    return Cost(rollout, trained, measured, work.selection_measurements * look, work)


def with_step(work: Work, problems: int, generations: int) -> Work:
    """The same run with another number of replies a step."""
    return replace(work, problems=problems, generations=generations)


def roughly(seconds: float) -> str:
    """A length of time with two digits at most, for an estimate.

    >>> roughly(0.04), roughly(3.21), roughly(47), roughly(754), roughly(5000)
    ('0.04 s', '3.2 s', '47 s', '13 min', '1.4 h')
    >>> roughly(45_000), roughly(86_400 * 3.4), roughly(86_400 * 260)
    ('12 h', '3.4 days', '260 days')
    """
    for size, unit in ((86_400, "days"), (3600, "h"), (60, "min"), (1, "s")):
        amount = seconds / size
        if amount >= (2 if unit == "days" else 1) or unit == "s":
            break
    if amount <= 0:
        return "0 s"
    digits = 1 - math.floor(math.log10(amount))
    return f"{round(amount, digits):.{max(0, min(digits, 3))}f} {unit}".replace(".0 ", " ")
