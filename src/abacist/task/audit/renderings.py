"""Every legitimate way to write a right reply, and answers that only look alike.

The audit's questions to a reward set. One problem becomes: its worked solution in several layouts;
its gold rewritten so that the value stays (which must be paid) and so that it changes or is no
longer one number (which must not); and answers that are no number at all. A *home* is the layout in
which a reward set looks for the answer: ours, unless it pays only in another.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from enum import StrEnum
from fractions import Fraction
from typing import NamedTuple

from abacist.task.answers import gold_text, read_answer
from abacist.task.problems import Problem
from abacist.task.prompts import render_solution
from abacist.task.reply import ANSWER_CLOSE, ANSWER_OPEN, REASONING_CLOSE, REASONING_OPEN


class Role(StrEnum):
    """What a reply is in the audit, and so what it should earn."""

    LAYOUT = "right and worked, in the layout asked for or one near it"
    OTHER_LAYOUT = "right and worked, in a layout that others ask for"
    WRONG = "worked, with a wrong result"
    SAME_VALUE = "the gold, written in another way"
    OTHER_VALUE = "another number, or not one number"
    NO_NUMBER = "an answer that is no number"
    WORKLESS = "the right answer without work"
    LIST = "a list of numbers, the right one among them"
    BLIND = "written without knowing the answer"


class Variant(NamedTuple):
    """One reply of the audit; ``answer`` is what of it to show as an example."""

    name: str
    role: Role
    text: str
    answer: str


MAX_PLACES = 40  # of a decimal that is written out: a double has 17 digits
ASKED = "as the prompt asks"
WRONG = "wrong, as the prompt asks"
PLAIN_DIGITS = "plain digits"
GROUPED = "thousands commas"


def tagged(reasoning: str, answer: str) -> str:
    """The layout asked for, with both texts exactly as given."""
    return (
        f"{REASONING_OPEN}\n{reasoning}\n{REASONING_CLOSE}\n{ANSWER_OPEN}\n{answer}\n{ANSWER_CLOSE}"
    )


HOMES: dict[str, Callable[[str, str], str]] = {
    ASKED: tagged,
    "<think>, then <answer>": lambda reasoning, answer: (
        f"<think>\n{reasoning}\n</think>\n{ANSWER_OPEN}\n{answer}\n{ANSWER_CLOSE}"
    ),
    "<think>, then \\boxed{}": lambda reasoning, answer: (
        f"<think>\n{reasoning}\n</think>\n\\boxed{{{answer}}}"
    ),
    "\\boxed{} at the end": lambda reasoning, answer: f"{reasoning}\n\\boxed{{{answer}}}",
    "#### at the end": lambda reasoning, answer: f"{reasoning}\n#### {answer}",
    "a sentence at the end": lambda reasoning, answer: f"{reasoning}\nThe answer is {answer}",
}


def gold_value(problem: Problem) -> Fraction:
    """The gold as a number to calculate with; see :func:`can_be_rewritten`."""
    value = read_answer(gold_text(problem.answer))
    if not isinstance(value, Fraction):
        raise ValueError(f"problem {problem.problem_id} has a gold that is no number, or too long")
    return value


def can_be_rewritten(problem: Problem) -> bool:
    """Has it a gold that is a number, and of no more than 1,000 digits?"""
    return isinstance(read_answer(gold_text(problem.answer)), Fraction)


def numeral(value: Fraction) -> str:
    """The value in plain digits: an integer, a finite decimal, or else a fraction.

    >>> numeral(Fraction(-1450)), numeral(Fraction(5, 2)), numeral(Fraction(1, 3))
    ('-1450', '2.5', '1/3')
    """
    if value.denominator == 1:
        return str(value.numerator)
    for places in range(1, MAX_PLACES + 1):
        if 10**places % value.denominator == 0:
            digits = f"{abs(value.numerator) * 10**places // value.denominator:0{places + 1}}"
            return f"{'-' * (value < 0)}{digits[:-places]}.{digits[-places:]}"
    return f"{value.numerator}/{value.denominator}"


def reasoning_of(problem: Problem) -> str:
    """The worked solution without calculator annotations."""
    if not problem.solution:
        return f"The question leads to {problem.answer}."
    shown = render_solution(problem)
    return shown[len(REASONING_OPEN) + 1 : shown.rindex(REASONING_CLOSE) - 1]


def layouts(problem: Problem) -> Iterator[Variant]:
    """The worked solution with the gold as it stands, in every layout."""
    reasoning, gold = reasoning_of(problem), gold_text(problem.answer)
    one_line = " ".join(reasoning.split())
    asked = tagged(reasoning, gold)
    inline = f"{REASONING_OPEN}{{}}{REASONING_CLOSE}{ANSWER_OPEN}{gold}{ANSWER_CLOSE}"
    forms = {
        ASKED: asked,
        "… and a final newline": asked + "\n",
        "reasoning on one line": tagged(one_line, gold),
        "reasoning on one line, final newline": tagged(one_line, gold) + "\n",
        "tags inline": inline.replace("{}", reasoning),
        "tags inline, reasoning on one line": inline.replace("{}", one_line),
        "line ends as on Windows": asked.replace("\n", "\r\n"),
        "blank lines between": asked.replace("\n", "\n\n"),
        "a greeting before": f"Sure.\n{asked}",
    }
    for name, text in forms.items():
        yield Variant(name, Role.LAYOUT, text, gold)
    for name, write in HOMES.items():
        if name != ASKED:
            yield Variant(name, Role.OTHER_LAYOUT, write(reasoning, gold), gold)


def wrong_solutions(problem: Problem) -> Iterator[Variant]:
    """The same solution with a result that is one too large, wherever it stands."""
    value = gold_value(problem)
    wrong = numeral(value + 1)
    reasoning = reasoning_of(problem)
    for written in {gold_text(problem.answer), numeral(value)}:
        reasoning = re.sub(rf"(?<![\d.,]){re.escape(written)}(?![\d])", wrong, reasoning)
    for name, write in HOMES.items():
        called = WRONG if name == ASKED else f"wrong, {name}"
        yield Variant(called, Role.WRONG, write(reasoning, wrong), wrong)


def slips(problem: Problem) -> Iterator[Variant]:
    """Another answer, behind the solution as it is, and behind the right answer without work."""
    wrong = numeral(gold_value(problem) + 1)
    worked, bare = reasoning_of(problem), f"It leads to {gold_text(problem.answer)}."
    for name, write in HOMES.items():
        yield Variant(f"slip, {name}", Role.WRONG, write(worked, wrong), wrong)
        yield Variant(f"slip without work, {name}", Role.WRONG, write(bare, wrong), wrong)


def rewritten(problem: Problem, home: str = ASKED) -> Iterator[Variant]:
    """The gold in other words, other numbers in its place, and what is no number."""
    value = gold_value(problem)
    kinds = (
        (Role.SAME_VALUE, same_value(value)),
        (Role.OTHER_VALUE, other_value(value)),
        (Role.NO_NUMBER, {"a superscript": "²", "a circled digit": "①", "words": "n/a"}),
    )
    for role, answers in kinds:
        for name, answer in answers.items():
            # Short and without numerals, so that only the answer can make a difference.
            yield Variant(name, role, HOMES[home]("Step by step.", answer), answer)


def same_value(value: Fraction) -> dict[str, str]:
    """Ways to write ``value`` that a careful grader takes for it, by name.

    >>> forms = same_value(Fraction(-1450))
    >>> forms["thousands commas"], forms["currency, commas and decimals"]
    ('-1,450', '-$1,450.00')
    """
    digits = numeral(value)
    sign, size = ("-", digits[1:]) if value < 0 else ("", digits)
    forms = {
        PLAIN_DIGITS: digits,
        "bold": f"**{digits}**",
        "spaces around": f"  {digits}\t",
        "a carriage return": f"{digits}\r",
        "a no-break space": f"\u00a0{digits}",
        "bold in HTML": f"<b>{digits}</b>",
        "a gloss that says it again": f"{digits} ({digits} in all)",
    }
    if "/" in digits:
        return forms
    whole, point, decimals = size.partition(".")
    long = f"{int(whole):,}.{decimals:0<2}"
    forms |= {
        "a currency sign": f"{sign}${size}",
        "a full stop": f"{digits}.",
        "decimals": f"{digits}{'0' if point else '.00'}",
        "boxed": f"\\boxed{{{digits}}}",
        "dollar signs around": f"${digits}$",
        "a unit": f"{digits} apples",
        "x = …": f"x = {digits}",
        "a sentence": f"The answer is {digits}.",
        "currency, commas and decimals": f"{sign}${long}",
        "full-width digits": digits.translate({48 + n: 0xFF10 + n for n in range(10)}),
    }
    if len(whole) > 3:
        forms[GROUPED] = f"{sign}{int(whole):,}{point}{decimals}"
        forms["thousands spaces"] = forms[GROUPED].replace(",", " ")
    if value < 0:
        forms["a Unicode minus"] = f"−{size}"
    else:
        forms["a plus sign"] = f"+{digits}"
    return forms


def other_value(value: Fraction) -> dict[str, str]:
    """Answers that are near ``value``, or hold it, and are not it, by name."""
    digits, more = numeral(value), numeral(value + 1)
    forms = {
        "one more": more,
        "one less": numeral(value - 1),
        "two answers": f"{digits} or {more}",
        "a list": f"{digits}, {more}",
        "a range": f"{digits} to {more}",
        "a hedge": f"about {digits}",
        "a bound": f"at least {digits}",
        "a negation": f"not {digits}",
        "a gloss that says another": f"{digits} ({more})",
        "a gloss that doubts": f"{digits} (or {more})",
        "struck out": f"<s>{digits}</s>",
        "a sum not carried out": f"{numeral(value - 1)} + 1",
        "nothing": "",
        "not a number": "nan",
    }
    if value != 0:
        forms |= {
            "the other sign": numeral(-value),
            "ten times": numeral(10 * value),
            "a tenth": numeral(value / 10),
            "thousands": f"{digits} thousand",
        }
    if value.denominator == 1:
        forms["a half more"] = numeral(value + Fraction(1, 2) * (1 if value >= 0 else -1))
        if abs(value) >= 10:
            forms["the last digit dropped"] = digits[:-1]
        if value not in (0, 1):
            forms["squared"] = f"{digits}^2" if value > 0 else f"({digits})^2"
    return forms


def edge_problems() -> list[Problem]:
    """Made-up problems with the rarer kinds of gold that GSM8K has."""
    sums = {"-7": "5 - 12", "0": "9 - 9", "1,450": "1,400 + 50", "2,125,000": "2,125 * 1,000"}
    first = Problem("", "How much is {}?", "", "", 1)
    return [
        replace(
            first,
            problem_id=f"edge {gold}",
            question=first.question.format(work),
            solution=f"This is to be worked out.\n{work} = {gold}",
            answer=gold,
        )
        for gold, work in sums.items()
    ]
