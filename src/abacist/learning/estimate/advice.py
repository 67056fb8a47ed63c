"""Where a run is far too much for its machine: the flags that would fit.

A run is cut down in the order in which that hurts least: problems of a step, room for a reply,
problems of the verdict, replies to a problem, and steps last.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from abacist.learning.config import Config
from abacist.learning.estimate.cost import Cost, Work, cost_of
from abacist.learning.estimate.trial import Rates

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


def fitting(work: Work, rates: Rates) -> Cost:
    """The run cut down to ``FITTING_SECONDS``, or to one step of the smallest kind."""
    found = None
    for smaller in _LADDER:
        one = _cut(work, smaller)
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
    return replace(
        work,
        problems=min(work.problems, smaller.problems),
        generations=min(work.generations, smaller.generations),
        budget_tokens=min(work.budget_tokens, smaller.budget_tokens),
        heldout=heldout,
        repeated=min(work.repeated, smaller.repeated, heldout),
        selection=min(work.selection, max(1, smaller.heldout // 2)),
    )


def flags(config: Config, work: Work, smaller: Work) -> str:
    """What to add to the command line so that ``work`` becomes ``smaller``."""
    found: list[str] = []

    def add(name: str, now: object, then: object) -> None:
        if now != then:
            found.append(f"--{name} {then}")

    add("num_generations", work.generations, smaller.generations)
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
