"""How long the whole run will take: its steps, its evaluations and its checkpoints."""

from __future__ import annotations

import math
from typing import Any

from abacist.learning.config import Config
from abacist.learning.dryrun.burst import Burst
from abacist.learning.dryrun.probe import Probe
from abacist.learning.judge import VERDICT_SAMPLES
from abacist.learning.task import Task

DISK_BYTES_PER_SECOND = 200e6  # assumed, not measured: a dry run writes nothing


def total_steps(config: Config, num_problems: int) -> int:
    """How many optimizer steps the run will have."""
    training = config.training
    if training.max_steps > 0:
        return int(training.max_steps)
    passes = int(training.steps_per_generation or 1) * training.num_iterations
    micro_batches = num_problems // max(1, config.problems_per_step) * passes
    per_epoch = max(1, micro_batches // training.gradient_accumulation_steps)
    return math.ceil(training.num_train_epochs * per_epoch)


def occasions(strategy: Any, every: float | None, steps: int, epochs: float) -> int:
    """How often something falls due that happens by TRL's ``strategy`` and ``every``.

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


def run_seconds(
    config: Config, task: Task, steps: int, burst: Burst | None, probe: Probe, checkpoint_bytes: int
) -> dict[str, float]:
    """The whole run by part; nothing where no step was taken.

    A greedy reply is taken to last as long as a sampled one.
    """
    if burst is None:
        return {}
    training = config.training
    epochs = training.num_train_epochs
    sampled = VERDICT_SAMPLES * min(config.script.num_consistency_problems, len(task.heldout))
    verdict_replies = 2 * (len(task.heldout) + sampled)
    looks = occasions(training.eval_strategy, training.eval_steps, steps, epochs)
    saves = 1 + occasions(training.save_strategy, training.save_steps, steps, epochs)
    return {
        "rollouts": steps * burst.rollout_seconds,
        "training": steps * burst.training_seconds,
        "verdict, before and after": verdict_replies * probe.reply_seconds,
        "selection problems": looks * len(task.selection) * probe.reply_seconds,
        "checkpoints": saves * checkpoint_bytes / DISK_BYTES_PER_SECOND,
    }
