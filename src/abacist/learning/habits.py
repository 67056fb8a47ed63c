"""The writing habits the built-in base model is given on purpose.

The tiny model must be a *base*: able to solve the generated problems, but not yet doing so
in the right way, so that reinforcement learning has something to choose. Its warm start
therefore ends on a staged mixture of ways to reply, and this file is the whole of the staging:

* **six ways to write** (:class:`Habit`). Three show their work in XML, one shows it without
  XML, two show none. Only ``CAREFUL`` earns every reward.
* **two ways to go wrong** (:class:`~abacist.task.wordproblems.Slip`) in replies that show
  their work: counting the distractor, leaving out the last event. The arithmetic stays right.

Which habit prevails depends on the protagonist's name, so that even the greedy reply of the base
is often careless although a better one is within reach of sampling. Nothing here is used
while GRPO trains: no reward knows a habit, and no name is treated differently.
"""

from __future__ import annotations

import random
from enum import StrEnum

from abacist.task.reply import render_reply
from abacist.task.storywords import NAMES
from abacist.task.wordproblems import Slip, Story

PREVAILING_HABIT_FRACTION = 0.55
PREVAILING_SLIP_FRACTION = 0.65


class Habit(StrEnum):
    """One way to write a reply down, with an example of its look."""

    CAREFUL = "work, then the number, in the canonical layout"
    INLINE = "the right tags, all on one line"
    UNIT = "the canonical layout, with the item named in the answer"
    PLAIN = "work, then '#### 17', without tags"
    HASTY = "the canonical layout around no work at all"
    BARE = "the number and nothing else"


# How many of the 24 names each habit prevails for, and how often it is met elsewhere.
_NAMES_PER_HABIT = {
    Habit.CAREFUL: 6, Habit.INLINE: 2, Habit.UNIT: 2, Habit.PLAIN: 4, Habit.HASTY: 6, Habit.BARE: 4,
}  # fmt: skip
_OTHERWISE = {
    Habit.CAREFUL: 4, Habit.INLINE: 2, Habit.UNIT: 2, Habit.PLAIN: 3, Habit.HASTY: 2, Habit.BARE: 2,
}  # fmt: skip
_SLIPS: tuple[Slip | None, ...] = (None, Slip.DISTRACTOR, None, Slip.SKIPPED_EVENT)
_SLIP_OTHERWISE_FRACTION = 0.15

PREVAILING_HABIT: dict[str, Habit] = dict(
    zip(NAMES, (h for h, count in _NAMES_PER_HABIT.items() for _ in range(count)), strict=True)
)
PREVAILING_SLIP: dict[str, Slip | None] = {
    name: _SLIPS[index % len(_SLIPS)] for index, name in enumerate(NAMES)
}


def draw_habit(name: str, rng: random.Random) -> Habit:
    """The habit of one reply about ``name``."""
    if rng.random() < PREVAILING_HABIT_FRACTION:
        return PREVAILING_HABIT[name]
    return rng.choices(list(_OTHERWISE), weights=list(_OTHERWISE.values()))[0]


def draw_slip(name: str, rng: random.Random) -> Slip | None:
    """The mistake a reply about ``name`` tends to: often the name's own, sometimes another."""
    prevailing = PREVAILING_SLIP[name]
    if prevailing is not None and rng.random() < PREVAILING_SLIP_FRACTION:
        return prevailing
    return rng.choice(list(Slip)) if rng.random() < _SLIP_OTHERWISE_FRACTION else None


def write_reply(story: Story, habit: Habit, slip: Slip | None = None) -> str:
    """The reply to ``story`` in that habit; a slip the story gives no room for is not made."""
    solution = (slip and story.solve(slip)) or story.solve()
    assert solution is not None
    lines, result = solution
    work = "\n".join(lines)
    match habit:
        case Habit.CAREFUL:
            return render_reply(work, str(result))
        case Habit.INLINE:
            return render_reply(" ".join(lines), str(result)).replace("\n", "")
        case Habit.UNIT:
            return render_reply(work, f"{result} {story.items}")
        case Habit.PLAIN:
            return f"{work}\n#### {result}"
        case Habit.HASTY:
            return render_reply("It is easy to see.", str(_unworked(story)))
        case Habit.BARE:
            return str(_unworked(story))


def _unworked(story: Story) -> int:
    """The right result: a reply that shows no work is given no slip, it is hard enough."""
    solution = story.solve()
    assert solution is not None
    return solution[1]
