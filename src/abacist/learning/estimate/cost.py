"""The work of a run in numbers, and its cost in seconds at the rates of a trial."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

from abacist.learning.config import Config
from abacist.learning.estimate.trial import Pass, Rates, Writing
from abacist.learning.heldout import VERDICT_SAMPLES
from abacist.learning.reply_selection import wanted
from abacist.learning.task import Task


@dataclass(frozen=True)
class Work:
    """A run, or the rest of one, in numbers: what its time depends on.

    ``problems`` are those of a rollout, ``generations`` the replies to each, of which ``trained``
    take part in training; ``micro_rows`` are trained on at once. What a rollout gave is trained on
    ``iterations`` times; ``forwards`` are further passes over it, by a reference and by the old
    policy. ``prompt_tokens`` of a problem include the ``shared_tokens`` that all begin with.
    """

    steps: int
    problems: int
    generations: int
    trained: int
    micro_rows: int
    rollouts_a_step: float  # one, unless a rollout serves several steps
    iterations: int
    budget_tokens: int
    prompt_tokens: float
    shared_tokens: int
    heldout: int
    repeated: int
    measurements: int
    selection: int
    selection_measurements: int
    eval_rows: int
    forwards: int
    recomputes: bool  # gradient checkpointing: every forward is made twice
    reads_prompt_once: bool

    @property
    def measured_replies(self) -> int:
        """Replies in one measurement, greedy and sampled."""
        return self.heldout + VERDICT_SAMPLES * self.repeated

    def shared_by(self, processes: int) -> Work:
        """The share of one of so many processes, the largest where it does not come out even."""
        names = ("problems", "heldout", "repeated", "selection")
        shares = {name: math.ceil(getattr(self, name) / processes) for name in names}
        return replace(self, **shares)


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
        """Seconds of all steps."""
        return self.work.steps * self.step_seconds

    @property
    def measuring_seconds(self) -> float:
        """Seconds of the measurements that are left."""
        return self.work.measurements * self.measurement_seconds

    @property
    def total_seconds(self) -> float:
        """Seconds of everything but loading and saving."""
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
    """The work that is left of ``config`` after ``steps_done`` steps."""
    training = config.training
    steps = max(0, total_steps(config, len(task.train)) - steps_done)
    # In micro-batches, as TRL counts them.
    rollout_every = max(1, int(training.steps_per_generation or 1) * training.num_iterations)
    looks = occasions(training.eval_strategy, training.eval_steps, steps, training.num_train_epochs)
    is_stale = training.gradient_accumulation_steps % rollout_every != 0
    return Work(
        steps=steps,
        problems=max(1, config.problems_per_step),
        generations=trainer.num_generations,
        # TRL's path computes those that do not take part too.
        trained=(wanted(training) if reads_prompt_once else None) or trainer.num_generations,
        micro_rows=training.per_device_train_batch_size,
        rollouts_a_step=training.gradient_accumulation_steps / rollout_every,
        iterations=training.num_iterations,
        budget_tokens=config.max_completion_tokens,
        prompt_tokens=prompt_tokens,
        shared_tokens=shared_tokens,
        heldout=len(task.heldout),
        repeated=min(config.script.num_consistency_problems, len(task.heldout)),
        measurements=measurements if task.heldout else 0,
        selection=len(task.selection),
        selection_measurements=looks if task.selection else 0,
        eval_rows=config.script.eval_batch_size,
        forwards=bool(training.beta) + (is_stale or training.use_vllm),
        recomputes=bool(training.gradient_checkpointing),
        reads_prompt_once=reads_prompt_once,
    )


def cost_of(work: Work, rates: Rates, length_fraction: float = 1.0) -> Cost:
    """The cost of ``work`` if replies have this fraction of their budget on average."""
    length = length_fraction * work.budget_tokens
    own_tokens = work.prompt_tokens - work.shared_tokens

    def written(writing: Writing, problems: int, replies: int, rows: int) -> float:
        return writing.seconds(replies, rows, length, work.shared_tokens + problems * own_tokens)

    replies = work.problems * work.generations
    rollout = None
    if rates.rollouts is not None:
        rollout = work.rollouts_a_step * written(rates.rollouts, work.problems, replies, replies)

    def scored(way: Pass, count: int) -> float:
        prompts = work.problems if work.reads_prompt_once else count
        micro_batches = max(1.0, count / work.micro_rows)
        return way.seconds(micro_batches, count * length + prompts * work.prompt_tokens)

    learned_from = work.problems * work.trained
    trained = work.rollouts_a_step * (
        work.iterations * (1 + work.recomputes) * scored(rates.forward, learned_from)
        + work.iterations * scored(rates.backward, learned_from)
        + work.forwards * scored(rates.forward, replies)
    )
    measured = written(rates.measuring, work.heldout, work.measured_replies, work.eval_rows)
    look = written(rates.measuring, work.selection, work.selection, work.eval_rows)
    return Cost(rollout, trained, measured, work.selection_measurements * look, work)


def steps_within(
    hours: float,
    *,
    step_seconds: float,
    before_seconds: float,
    after_seconds: float,
    steps: int,
    replies: float,
) -> str:
    """How far ``--max_hours`` takes a run of ``steps`` steps with so many replies each, as a line.

    ``before_seconds`` pass before the first step, and ``after_seconds`` after the last. A run that
    is stopped by the hours measures nothing after it.

    >>> part = dict(step_seconds=90.0, before_seconds=600.0, after_seconds=600.0, replies=32)
    >>> steps_within(8, steps=400, **part)
    '8 hours: about 310 of 400 steps, 9,900 replies'
    >>> steps_within(8, steps=100, **part)
    '8 hours: all 100 steps, 3,200 replies, in about 2.8 h; about 300 would fit (--max_steps 300)'
    """
    words = f"{hours:g} hour{'' if hours == 1 else 's'}"
    fitting = int(max(0.0, hours * 3600 - before_seconds) / max(step_seconds, 1e-9))
    if fitting < 1:
        needs = roughly(before_seconds + step_seconds)
        return f"{words}: not one step, which with the measurement before it takes about {needs}"
    whole = before_seconds + steps * step_seconds + after_seconds
    if fitting < steps:
        count = _two_digits(fitting)
        return (
            f"{words}: about {count:,} of {steps:,} steps, {_two_digits(count * replies):,} replies"
        )
    line = f"{words}: all {steps:,} steps, {round(steps * replies):,} replies, "
    line += f"in about {roughly(whole)}"
    if whole > hours * 3600:
        return f"{line} with the measurement after them, which is made all the same"
    more = _two_digits((hours * 3600 - before_seconds - after_seconds) / max(step_seconds, 1e-9))
    return f"{line}; about {more:,} would fit (--max_steps {more})" if more > 1.2 * steps else line


def _two_digits(count: float) -> int:
    """Rounded down: an estimate has no more digits.

    >>> [_two_digits(count) for count in (7.9, 42, 318, 9920)]
    [7, 42, 310, 9900]
    """
    whole = int(count)
    unit = 10 ** max(0, len(str(whole)) - 2)
    return whole // unit * unit


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
    return f"{amount:.0f} {unit}" if amount >= 10 else f"{amount:.2g} {unit}"


def total_steps(config: Config, num_problems: int) -> int:
    """How many optimizer steps the run will have."""
    training = config.training
    if training.max_steps > 0:
        return int(training.max_steps)
    passes = int(training.steps_per_generation or 1) * training.num_iterations
    micro_batches = num_problems // max(1, config.problems_per_step) * passes
    per_epoch = max(1, math.ceil(micro_batches / training.gradient_accumulation_steps))
    return math.ceil(training.num_train_epochs * per_epoch)


def occasions(strategy: Any, every: float | None, steps: int, epochs: float) -> int:
    """How often TRL's ``strategy`` and ``every`` trigger an event.

    >>> occasions("steps", 20, steps=60, epochs=1), occasions("steps", 0.25, steps=60, epochs=1)
    (3, 4)
    >>> occasions("epoch", 500, steps=60, epochs=2), occasions("no", 20, steps=60, epochs=1)
    (2, 0)
    """
    kind = str(getattr(strategy, "value", strategy))
    if kind == "epoch":
        return math.ceil(epochs)
    if kind != "steps" or not every:
        return 0
    interval = math.ceil(every * steps) if every < 1 else int(every)
    return steps // max(1, interval)
