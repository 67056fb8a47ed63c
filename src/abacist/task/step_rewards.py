"""What each step of a reasoning is worth, by the results of a reference solution.

A step is a line of the reasoning with at least one equation. It begins where the step before it
ends, so that the words which lead to an equation belong to it. Its reward:

- 1 where all its equations are true, and the last of them comes to a result of the reference
  solution that was not reached before. In a reply whose answer is right, every step of true
  equations has 1: it led there, whichever way the reference took. The last equation counts and not
  any of them: else a line of "1 + 0 = 1, 2 + 0 = 2, …" would reach every result.
- 0 where one of its equations is false, or where it is the first that leaves the reference.
- None for true equations after a step with 0: they go on from there, and are not judged. None also
  for true equations that come to a result once more than the reference does: to repeat it is no
  error, and earns nothing.

In a completion that was cut off, a last line without its end is no step: its last numeral may lack
digits.

The last step is the conclusion: all that is left, to the end of the completion. It is 1 where the
answer is right, and 0 where it is wrong although no step before was, so that to stop before the
last result costs what a wrong step costs. Where nobody knows whether the answer is right, it is
None.

Model output is hostile text: linear time, no exception on any str.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from fractions import Fraction
from typing import NamedTuple

from abacist.task.reply import ANSWER_OPEN, REASONING_CLOSE, REASONING_OPEN
from abacist.task.steps import Equation, equations, valid_steps

_LINE = re.compile(r"[^\n]*\n?")

RIGHT, WRONG, NOT_JUDGED = STEP_OUTCOMES = ("right", "wrong", "not judged")


class StepReward(NamedTuple):
    """A step, characters ``[start, end)`` of a completion, and its reward; None: not judged."""

    start: int
    end: int
    reward: float | None

    @property
    def outcome(self) -> str:
        """One of :data:`STEP_OUTCOMES`."""
        if self.reward is None or not math.isfinite(self.reward):
            return NOT_JUDGED
        return RIGHT if self.reward > 0 else WRONG


def step_rewards(
    completion: str, solution: str, *, is_correct: bool | None, is_cut: bool = False
) -> list[StepReward]:
    """The steps of a completion with their rewards, in order; the last is its conclusion.

    ``solution`` is the reference, ``is_correct`` whether the answer of the completion is right,
    None where the problem has no gold, and ``is_cut`` whether it was cut off at its budget.

    >>> reply = "May:\\n48 / 2 = 24\\n24 + 24 = 48\\n48 + 24 = 73\\n73 - 1 = 72\\nSo 73."
    >>> for start, end, reward in step_rewards(reply, "48/2 = 24, 48+24 = 72", is_correct=False):
    ...     print(repr(reply[start:end]), reward)
    'May:\\n48 / 2 = 24\\n' 1.0
    '24 + 24 = 48\\n' 0.0
    '48 + 24 = 73\\n' 0.0
    '73 - 1 = 72\\n' 1.0
    'So 73.' None
    """
    wanted = [values for equation in equations(solution) if (values := _values(equation))]
    known = set().union(*wanted)
    start, stop = _reasoning(completion)
    found: list[StepReward] = []
    is_lost = False
    for line in _LINE.finditer(completion, start, stop):
        shown = equations(line[0])
        if not shown or (is_cut and line.end() == len(completion) and not line[0].endswith("\n")):
            continue
        reward: float | None
        if not valid_steps(line[0]):
            reward = 0.0
        else:
            results = [_values(equation) for equation in shown]
            if is_correct or any(results[-1] & result for result in wanted):
                reward = 1.0
                for values in results:
                    reached = next((result for result in wanted if result & values), None)
                    if reached is not None:
                        wanted.remove(reached)
            else:
                is_repeated = bool(results[-1] & known)
                reward = None if is_lost or is_repeated else 0.0
        is_lost = is_lost or reward == 0.0
        found.append(StepReward(start, line.end(), reward))
        start = line.end()
    if start < len(completion):
        conclusion = 1.0 if is_correct else None if is_lost or is_correct is None else 0.0
        found.append(StepReward(start, len(completion), conclusion))
    return found


def within(steps: Iterable[StepReward], characters: int) -> list[StepReward]:
    """Those of the steps that lie one after another in a completion of so many characters.

    All that :func:`step_rewards` finds do. A file may hold others, which no text shows.

    >>> within([StepReward(2, 5, 1.0), StepReward(4, 6, 0.0), StepReward(6, 99, None)], 9)
    [StepReward(start=2, end=5, reward=1.0)]
    """
    found: list[StepReward] = []
    for step in steps:
        last = found[-1].end if found else 0
        if last <= step.start < step.end <= characters:
            found.append(step)
    return found


def _values(equation: Equation) -> set[Fraction]:
    """What the result of a true equation may be written as; empty for a false one.

    "= 40%" is 40 to one solution and 0.4 to another, "10 / 3 = 3.33" is 10/3 and 3.33.
    """
    if not equation.is_true or equation.left is None or equation.right is None:
        return set()
    if "%" in equation.text.partition("=")[2]:
        return {equation.right, equation.right * 100}
    # A percent sign on the left may be a mere unit, and the value there another.
    return {equation.right} if "%" in equation.text else {equation.left, equation.right}


def _reasoning(completion: str) -> tuple[int, int]:
    """Where the reasoning stands: inside its tags, as far as there are any."""
    opened = completion.find(REASONING_OPEN)
    start = opened + len(REASONING_OPEN) if opened >= 0 else 0
    ends = [completion.find(tag, start) for tag in (REASONING_CLOSE, ANSWER_OPEN)]
    return start, min((end for end in ends if end >= 0), default=len(completion))
