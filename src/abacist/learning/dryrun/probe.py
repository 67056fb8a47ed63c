"""The untrained policy on a sample of the training problems: what is there to learn from.

The replies are sampled as training samples them, graded by our answer rule, and paid with the
run's own rewards, by the trainer's own code.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from functools import partial
from typing import Any

from abacist.learning.config import Config
from abacist.learning.dryrun.solverates import SolveRates
from abacist.learning.task import Task
from abacist.policy.decoding import generation as decoding
from abacist.policy.decoding.progress import Progress
from abacist.policy.loading import Policy
from abacist.proof.evaluate import Evaluation, evaluate
from abacist.proof.statistics import Interval, clustered_mean, proportion
from abacist.task.problems import draw

PROBE_SAMPLES = 8


@dataclass(frozen=True)
class Probe:
    """What the untrained policy makes of a sample of the training problems.

    ``rewards`` are those of the run, unweighted; ``varied`` is the share of groups whose weighted
    rewards are not all the same, so that they teach anything at all.
    """

    rates: SolveRates
    figures: dict[str, Interval]
    rewards: dict[str, Interval]
    varied: Interval
    lengths: tuple[int, ...]
    seconds: float

    def length(self, quantile: float) -> int:
        """The shortest length that this share of the replies does not exceed, in tokens."""
        return sorted(self.lengths)[max(0, math.ceil(quantile * len(self.lengths)) - 1)]

    @property
    def truncated_fraction(self) -> float:
        """The share of replies that the budget cut off."""
        return 1 - self.figures["stopped"].value

    @property
    def reply_seconds(self) -> float:
        """Seconds for one reply, while many are written at once, graded."""
        return self.seconds / len(self.lengths)


def ask(
    config: Config,
    task: Task,
    policy: Policy,
    trainer: Any,
    num_problems: int,
    progress: Progress,
) -> Probe:
    """Ask a sample of the training problems as training will, and grade with the run's rewards."""
    training = config.training
    sample = draw(task.train, seed=training.seed, purpose="dry run")[:num_problems]
    began = time.perf_counter()
    found = evaluate(
        policy,
        sample,
        system_prompt=task.system_prompt,
        shots=task.shots,
        max_completion_tokens=config.max_completion_tokens,
        num_samples=PROBE_SAMPLES,
        temperature=training.temperature,
        batch_size=config.script.eval_batch_size,
        seed=training.seed,
        split="train",
        progress=progress,
        generate=partial(decoding.generate, top_p=training.top_p, top_k=training.top_k),
    )
    seconds = time.perf_counter() - began
    rewards, varied = _paid(task, trainer, found)
    marks = found.marks
    groups = [marks[at : at + PROBE_SAMPLES] for at in range(0, len(marks), PROBE_SAMPLES)]
    return Probe(
        rates=SolveRates([sum(m.correct for m in group) for group in groups], PROBE_SAMPLES),
        figures={
            name: found.figures[name]
            for name in ("correct", "any_format", "strict", "adheres", "stopped")
        },
        rewards=rewards,
        varied=varied,
        lengths=tuple(m.completion_tokens for m in marks),
        seconds=seconds,
    )


def _paid(task: Task, trainer: Any, found: Evaluation) -> tuple[dict[str, Interval], Interval]:
    """Each reward of the run on average, and the share of groups in which their sum varies."""
    rows = task.rows(found.problems)
    inputs = [row for row in rows for _ in range(PROBE_SAMPLES)]
    completions = [[{"role": "assistant", "content": r.completion}] for r in found.rollouts]
    paid = trainer._calculate_rewards(
        inputs, [row["prompt"] for row in inputs], completions,
        [list(r.completion_ids) for r in found.rollouts],
    ).double().cpu()  # fmt: skip
    owners = [row["problem_id"] for row in inputs]
    means = {}
    for index, name in enumerate(trainer.reward_func_names):
        known = [
            (value, owner)
            for value, owner in zip(paid[:, index].tolist(), owners, strict=True)
            if not math.isnan(value)
        ]
        means[name] = clustered_mean([v for v, _ in known], [o for _, o in known])
    totals = (paid * trainer.reward_weights.cpu()).nansum(dim=1).view(-1, PROBE_SAMPLES)
    # A reply to which no reward applied (None) is compared with nothing.
    unknown = paid.isnan().all(dim=1).view(-1, PROBE_SAMPLES)
    highest = totals.masked_fill(unknown, -math.inf).amax(dim=1)
    spread = (highest - totals.masked_fill(unknown, math.inf).amin(dim=1)).tolist()
    return means, proportion([width > 1e-6 for width in spread])
