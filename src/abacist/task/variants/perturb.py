"""GSM8K with other numbers: the same story, other figures, an exact solution.

A model that has learned to reason does as well on such a variant as on the original; one that
remembers the original does not. GSM8K's worked solutions carry calculator annotations
(``48/2=<<48/2=24>>24``), which make a solution a small program over the question's numbers. Here
the numbers of the question are drawn anew, the program is run again in exact arithmetic, and
question, solution and gold are written out with the new values.

A problem is perturbed only if every number of its solution can be traced: to a number of the
question, to an earlier result, or to a constant (``story_numbers.py``). Where a number
could be traced to two of them that now differ, where a number of the question is never used (it may
restate another), or where the story turns on a comparison, there is no variant. A variant keeps the
order and the number of digits of the question's numbers, and of every value on the way its sign,
whether it is whole, and its rough size. Every equation of the new solution is true.

Short problems have a variant more often than long ones (55 % of those with two steps, 10 % with
eight), so accuracy on variants belongs beside accuracy on *their* originals, not on all problems.
"""

from __future__ import annotations

import random
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import replace
from enum import StrEnum
from fractions import Fraction
from itertools import pairwise

from abacist.task.answers import read_answer
from abacist.task.problems import Problem, normalise_question
from abacist.task.steps import equations
from abacist.task.variants.story_numbers import (
    SMALLEST_CHANGED,
    StoryNumbers,
    numerals,
    rewritten,
    spelled_numbers,
    story_numbers,
    touches_a_name,
)
from abacist.task.variants.worked import Step, is_like, read_steps

MAX_DRAWS = 400
MAX_TEXT_CHARS = 5_000

# The outcome of a comparison or a rounding may turn when the numbers do.
_TURNS_ON = re.compile(
    r"""\b(?:round|rounds|rounded|rounding|nearest|at\ least|at\ most|maximum|minimum|max|min|limit
    |cheapest|cheaper|fewest|largest|smallest|biggest|highest|lowest|whichever|remainder|enough
    |prime|even|odd|up\ to|no\ more\ than|exceeds?|over\ time|overtime|leap|average\ of\ the|median
    |whole|full|sequence|pattern|alternat\w*|consecutive|older\ than|youngest|oldest)\b""",
    re.VERBOSE | re.IGNORECASE,
)

#: Old and new result of each step.
Results = list[tuple[Fraction, Fraction]]


class Refusal(StrEnum):
    """Why a problem has no variant."""

    NO_ANNOTATIONS = "its solution has no calculator annotations that can be run"
    INEXACT = "an annotation is rounded or wrong"
    GOLD = "the gold is not the last annotation's result"
    COMPARISON = "the story turns on a comparison or a rounding"
    TEXT = "its text has letters or signs at numbers that cannot be rewritten for sure"
    NOTHING_TO_CHANGE = "no number of the question may change"
    UNUSED = "a number of the question is not used by the solution"
    UNTRACED = "a number of the solution comes from nowhere in the question"
    AMBIGUOUS = "a number of the solution could come from two places"
    UNUSED_RESULT = "a result is not used any further"
    NO_FIT = "no other numbers keep signs, whole values and sizes"
    EQUATIONS = "an equation in the solution's text would be false"
    DUPLICATE = "the variant's question is there already"


class _Refused(Exception):
    def __init__(self, reason: Refusal) -> None:
        super().__init__(reason)
        self.reason = reason


def perturb(problem: Problem, *, seed: int) -> Problem | None:
    """The same problem with other numbers, or None if there is no variant to be sure of.

    The same seed gives the same variant. Its id is ``<id>~<seed>``; its gold differs from the
    original's, and its solution keeps its annotations.

    >>> ada = Problem("a", "Ada has 12 eggs. She eats 7. What is left?", "12-7=<<12-7=5>>5", "5", 1)
    >>> variant = perturb(ada, seed=1)
    >>> variant.question, variant.solution
    ('Ada has 15 eggs. She eats 9. What is left?', '15-9=<<15-9=6>>6')
    """
    try:
        return _variant(problem, seed)
    except _Refused:
        return None


def perturb_all(
    problems: Iterable[Problem], *, seed: int, variants: int = 1
) -> tuple[list[Problem], Counter[str]]:
    """The variants of all problems in order, and how often there was none, by reason.

    A problem has up to ``variants``, for the seeds from ``seed`` on. No two have one question,
    and none has the question of an original.
    """
    originals = list(problems)
    met = {normalise_question(problem.question) for problem in originals}
    made: list[Problem] = []
    reasons: Counter[str] = Counter()
    for problem in originals:
        for one_seed in range(seed, seed + variants):
            try:
                variant = _variant(problem, one_seed)
                question = normalise_question(variant.question)
                if question in met:
                    raise _Refused(Refusal.DUPLICATE)
            except _Refused as refused:
                reasons[refused.reason] += 1
            else:
                met.add(question)
                made.append(variant)
    return made, reasons


def _variant(problem: Problem, seed: int) -> Problem:
    steps = _steps(problem)
    numbers = _numbers(problem, steps)
    choices = {value: _choices(value, bound) for value, bound in numbers.bounds.items()}
    rng = random.Random(f"{problem.problem_id}~{seed}")
    for draw in range(MAX_DRAWS):
        drawn = {
            value: value if draw >= MAX_DRAWS // 2 and rng.random() < 0.5 else rng.choice(others)
            for value, others in choices.items()
        }
        results = _results(steps, drawn, numbers)
        if results is None or results[-1][0] == results[-1][1]:
            continue
        if not _keeps_order(drawn, results, numbers):
            continue
        variant = _written(problem, seed, steps, drawn, results, numbers)
        if variant is not None:
            return variant
    raise _Refused(Refusal.NO_FIT)


def _steps(problem: Problem) -> list[Step]:
    """The solution as a program. Raises _Refused unless it runs, exactly, and ends in the gold."""
    if len(problem.solution) + len(problem.question) > MAX_TEXT_CHARS:
        raise _Refused(Refusal.TEXT)
    steps = read_steps(problem.solution)
    if not steps:
        raise _Refused(Refusal.NO_ANNOTATIONS)
    if any(step.values[-1] != step.result.value for step in steps):
        raise _Refused(Refusal.INEXACT)
    gold = [each.text for each in numerals(problem.answer)]
    if gold != [problem.answer] or read_answer(problem.answer) != steps[-1].result.value:
        raise _Refused(Refusal.GOLD)
    used = {operand.value for step in steps for operand in step.operands}
    if any(step.result.value not in used for step in steps[:-1]):
        raise _Refused(Refusal.UNUSED_RESULT)
    return steps


def _numbers(problem: Problem, steps: list[Step]) -> StoryNumbers:
    """The question's numbers. Raises _Refused where the story or its text is not for this."""
    question, solution = problem.question, problem.solution
    both = question + solution
    if _TURNS_ON.search(question):
        raise _Refused(Refusal.COMPARISON)
    is_odd = any(char.isnumeric() and not char.isascii() for char in both)
    if is_odd or any(touches_a_name(each, solution) for each in numerals(solution)):
        raise _Refused(Refusal.TEXT)
    numbers = story_numbers(question, solution)
    used = {operand.value for step in steps for operand in step.operands}
    if not numbers.bounds:
        raise _Refused(Refusal.NOTHING_TO_CHANGE)
    spelled = {value for value in spelled_numbers(question) if value >= SMALLEST_CHANGED}
    if not numbers.bounds.keys() | spelled <= used or not all(
        shapes & used for shapes in numbers.kept.values()
    ):
        raise _Refused(Refusal.UNUSED)
    return numbers


def _choices(value: Fraction, bound: int) -> list[Fraction]:
    """Other numbers for a number: as long, as round, and near."""
    digits = str(int(value))
    zeros = len(digits) - len(digits.rstrip("0"))
    step = 10 ** max(0, zeros - (len(digits) - zeros == 1))
    low, high = value * Fraction(3, 5), min(int(value * Fraction(8, 5)), bound)
    return [
        Fraction(number)
        for number in range(0, high + 1, step)
        if low <= number and number > 2 and number != value and len(str(number)) == len(digits)
    ] or [value]


def _keeps_order(
    drawn: Mapping[Fraction, Fraction], results: Results, numbers: StoryNumbers
) -> bool:
    """Is each number of the question, and the gold, still larger than what it was larger than?"""
    whole = {value: value for value in numbers.kept if value.denominator == 1}
    ordered = sorted({**whole, **drawn}.items())
    gold, new_gold = results[-1]
    return all(a < b for (_, a), (_, b) in pairwise(ordered)) and all(
        ((old > gold) - (old < gold)) == ((new > new_gold) - (new < new_gold))
        for old, new in drawn.items()
    )


def _results(
    steps: list[Step], drawn: Mapping[Fraction, Fraction], numbers: StoryNumbers
) -> Results | None:
    """Every annotation run again, or None where a value is no longer of the same kind."""
    results: Results = []
    for step in steps:
        operands = [_new(each.value, drawn, results, numbers) for each in step.operands]
        try:
            values = step.run(operands)
        except ZeroDivisionError:
            return None
        if not all(map(is_like, step.values, values)):
            return None
        results.append((step.result.value, values[-1]))
    return results


def _new(
    value: Fraction, drawn: Mapping[Fraction, Fraction], results: Results, numbers: StoryNumbers
) -> Fraction:
    """What becomes of a number of the solution, if all it could stand for agree."""
    found = {new for old, new in results if old == value}
    if value in drawn:
        found.add(drawn[value])
    if value in numbers.constants:
        found.add(value)
    if not found:
        raise _Refused(Refusal.UNTRACED)
    if len(found) > 1:
        raise _Refused(Refusal.AMBIGUOUS)
    return found.pop()


def _written(
    problem: Problem,
    seed: int,
    steps: list[Step],
    drawn: Mapping[Fraction, Fraction],
    results: Results,
    numbers: StoryNumbers,
) -> Problem | None:
    """The variant, or None where these numbers cannot be written into the text."""
    solution = problem.solution
    told = numerals(solution)
    changed = {old for old, new in results if old != new}
    if changed & spelled_numbers(f"{problem.question} {solution}"):
        raise _Refused(Refusal.AMBIGUOUS)
    new_values: dict[int, Fraction] = {}  # by the numeral's place in the solution
    for index, (step, (_, new)) in enumerate(zip(steps, results, strict=True)):
        for operand in step.operands:
            new_values[operand.start] = _new(operand.value, drawn, results[:index], numbers)
        new_values[step.result.start] = new
        restated = step.result.end + len(">>")
        if any((each.start, each.value) == (restated, step.result.value) for each in told):
            new_values[restated] = new
    for numeral in told:
        if numeral.start not in new_values:
            new_values[numeral.start] = _new(numeral.value, drawn, results, numbers)
    asked = {each.start: drawn.get(each.value, each.value) for each in numerals(problem.question)}
    has_commas = bool(re.search(r"[0-9],[0-9]{3}", problem.question + solution))
    texts = [
        rewritten(text, values, has_commas=has_commas)
        for text, values in (
            (problem.question, asked),
            (solution, new_values),
            (problem.answer, {0: results[-1][1]}),
        )
    ]
    if None in texts:
        return None
    question, solution, answer = map(str, texts)
    if not all(equation.is_true for equation in equations(solution)):
        raise _Refused(Refusal.EQUATIONS)
    return replace(
        problem,
        problem_id=f"{problem.problem_id}~{seed}",
        question=question,
        solution=solution,
        answer=answer,
        columns={},  # they tell of the other numbers
    )
