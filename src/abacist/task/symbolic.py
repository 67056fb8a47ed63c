"""GSM-Symbolic problems, made by the optional package reasoning-gym: 85 GSM8K templates.

Templates of real GSM8K problems with other names and numbers, a second look at whether a model
reasons or remembers. Some rationales round on the way ("0.87 * 60 = 52") or end in another number
than their answer; rows whose worked solution is not right, step by step, are left out.

As with the built-in generator, a question belongs to exactly one split, by the hash of its text.
"""

from __future__ import annotations

from collections.abc import Iterator
from fractions import Fraction
from itertools import islice
from typing import Any

from abacist.errors import DataError
from abacist.task.answers import gold_text, read_answer
from abacist.task.rows import normalise_question
from abacist.task.steps import Equation, equations
from abacist.task.variants.story_numbers import numerals
from abacist.task.wordproblems import split_of

FLOAT_NOISE = Fraction(1, 10**6)

_INSTRUCTION = " Give the result as your final answer. Do not include units."
# Rows made for each one wanted: the smallest split holds one question in twenty.
_SURPLUS = 40


def gsm_symbolic(count: int, *, seed: int, split: str) -> Iterator[dict[str, object]]:
    """``count`` different records of ``split``; more with the same seed begin with the fewer.

    ``structure`` names the template. The package's instruction to leave out units is taken off
    the question: the prompt says what to write. Raises DataError where reasoning-gym is missing.
    """
    try:
        import reasoning_gym  # takes over a second to import
    except ImportError as error:
        raise DataError(
            "The problems `gsm_symbolic` come from the package reasoning-gym, which is not "
            f"installed ({error}).",
            "Install it with `pip install 'abacist[reasoning-gym]'`, or use --dataset_name "
            "generated, which needs nothing.",
        ) from error
    made = reasoning_gym.create_dataset("gsm_symbolic", seed=seed, size=_SURPLUS * count + 1_000)
    return islice(_records(made, split), count)


def _records(made: Any, split: str) -> Iterator[dict[str, object]]:
    met: set[str] = set()
    for index, row in enumerate(made):
        question = row["question"].removesuffix(_INSTRUCTION)
        solution = row["metadata"]["answer_cot"]
        key = normalise_question(question)
        if key in met or split_of(question) != split or not _is_sound(solution):
            continue
        met.add(key)
        template = made.task_indices[index]
        yield {"question": question, "answer": solution, "structure": f"template {template}"}


def _is_sound(solution: str) -> bool:
    """Does its last line say the gold, and is every equation true?

    Up to the noise of floats, with which the package calculates.

    >>> _is_sound("0.87 * 60 = 52\\n#### 52"), _is_sound("So 9 - 2 = 7 of 9 eggs.\\n#### 7")
    (False, True)
    """
    working = solution.rpartition("####")[0].strip()
    said = {each.value for each in numerals(working.rpartition("\n")[2])}
    gold = read_answer(gold_text(solution))
    return gold is not None and abs(gold) in said and all(map(_is_true, equations(working)))


def _is_true(equation: Equation) -> bool:
    left, right = equation.left, equation.right
    is_close = left is not None and right is not None and abs(left - right) < FLOAT_NOISE
    return equation.is_true or is_close
