"""The untrained policy on a sample of the training problems: what is there to learn from.

The replies are sampled as training samples them, graded by our answer rule, and paid with the
run's own rewards, by the trainer's own code.

GRPO learns from a group only if its rewards differ; of a group in which every reply is right, or
every reply wrong, the outcome teaches nothing. Whether a group of G replies is *mixed* depends on
the problem's own solve rate p: the chance is 1 - p^G - (1 - p)^G. A few replies to each of a few
problems do not give every p, but they do give the distribution of p over problems, and that is
all that a prediction for another G needs (:class:`SolveRates`).

The distribution is taken to be a Beta, so that the solved replies of a problem are Beta-binomial.
Its mean and its concentration are not estimated as one pair: every pair on a grid is weighed by
its likelihood (flat in the mean and in the logarithm of the concentration), which yields the
interval too, also where no reply was right or none wrong and a best pair would claim certainty.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import numpy as np
from scipy.special import betaln

from abacist.learning.config import Config
from abacist.learning.task import Task
from abacist.policy.decoding import generation as decoding
from abacist.policy.decoding.progress import Progress
from abacist.policy.loading import Policy
from abacist.proof.evaluate import Evaluation, evaluate
from abacist.proof.statistics import CONFIDENCE, Interval, clustered_mean, proportion
from abacist.task.problems import draw

PROBE_SAMPLES = 8


@dataclass(frozen=True)
class Probe:
    """Figures of the untrained policy on a sample of the training problems.

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
    config: Config, task: Task, policy: Policy, trainer: Any, num_problems: int, progress: Progress
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
        rewards=[],
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


GROUP_SIZES = (4, 8, 16, 32)
METHOD = "Beta-binomial over problems, weighed on a grid"

_MEANS = (np.arange(100) + 0.5) / 100
# From "each problem always or never" to "every problem alike".
_CONCENTRATIONS = np.geomspace(0.1, 300, 40)


@dataclass(frozen=True)
class SolveRates:
    """Of ``samples`` replies to each problem, ``solved`` were right, a number for each problem."""

    solved: Sequence[int]
    samples: int

    @property
    def mean(self) -> float:
        """The share of replies that are right."""
        return sum(self.solved) / (self.samples * len(self.solved))

    def histogram(self) -> list[int]:
        """How many problems have 0, 1, … ``samples`` right replies.

        >>> SolveRates([0, 2, 2, 1], samples=2).histogram()
        [1, 1, 2]
        """
        return [list(self.solved).count(right) for right in range(self.samples + 1)]

    def observed_mixed(self) -> Interval:
        """The share of these very groups that are mixed."""
        return proportion([0 < right < self.samples for right in self.solved])

    def predicted_mixed(self, group_size: int) -> Interval:
        """The share of groups of ``group_size`` replies that will be mixed.

        With 95 % bounds for the share over all problems like these; ``n`` counts problems.
        """
        first, second = self._shapes
        whole = betaln(first, second)
        all_right = np.exp(betaln(first + group_size, second) - whole)
        all_wrong = np.exp(betaln(first, second + group_size) - whole)
        shares = (1 - all_right - all_wrong).ravel()
        order = np.argsort(shares)
        reached = np.cumsum(self._weights[order])
        tail = (1 - CONFIDENCE) / 2
        places = np.searchsorted(reached, [tail, 1 - tail]).clip(max=len(order) - 1)
        low, high = shares[order[places]].tolist()
        value = float(self._weights @ shares)
        return Interval(value, low, high, len(self.solved), METHOD)

    @property
    def _shapes(self) -> tuple[np.ndarray, np.ndarray]:
        """Both parameters of each Beta on the grid, [concentrations, means]."""
        return _CONCENTRATIONS[:, None] * _MEANS, _CONCENTRATIONS[:, None] * (1 - _MEANS)

    @cached_property
    def _weights(self) -> np.ndarray:
        """The normalised likelihood of each Beta on the grid."""
        first, second = self._shapes
        likelihood = np.zeros_like(first)
        for right, problems in enumerate(self.histogram()):
            if problems:
                likelihood += problems * betaln(first + right, second + self.samples - right)
        likelihood -= len(self.solved) * betaln(first, second)
        weights = np.exp(likelihood - likelihood.max()).ravel()
        return weights / weights.sum()
