"""Golds that no reply can match, or hardly any: found before a GPU hour is spent on them."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from itertools import islice

from abacist.errors import DataError
from abacist.task.answers import Number, gold_text, read_answer
from abacist.task.audit.findings import Finding, Kind
from abacist.task.problems import Problem
from abacist.task.reply import parse_reply, render_reply
from abacist.task.sources import shown

MAX_DECIMALS = 8
_NUM_EXAMPLES = 3


def gold_findings(problems: Sequence[Problem]) -> tuple[list[Problem], list[Finding]]:
    """The problems whose gold a reply can match, and what is found of the golds of all.

    A gold is matched if the gold itself, as the answer of a reply, is right by the answer rule.
    Raises DataError if none can be matched.
    """
    matched: list[Problem] = []
    unmatched: list[Problem] = []
    long: list[Problem] = []
    for problem in problems:
        gold = gold_text(problem.answer)
        value = _value_in_a_reply(gold)
        (unmatched if value is None else matched).append(problem)
        if value is not None and _is_long(gold, value):
            long.append(problem)
    found = []
    if unmatched:
        said = f"{len(unmatched):,} of {len(problems):,} golds: {_examples(unmatched)}"
        if not matched:
            raise DataError(
                f"No reply can match any of these golds: {_examples(unmatched)}.",
                "A gold is one number, perhaps with a unit; name its column with --answer_column.",
            )
        found.append(Finding.of(Kind.UNMATCHED_GOLD, said))
    if long:
        said = (
            f"{len(long):,} of {len(problems):,} golds have more than {MAX_DECIMALS} decimals, and "
            f"only a reply with all of them is right: {_examples(long)}. Round what the question "
            "asks for, or write a fraction (1/3)"
        )
        found.append(Finding.of(Kind.LONG_GOLD, said))
    return matched, found


def _value_in_a_reply(gold: str) -> Number | None:
    """What the gold says where it stands as the answer of a reply; None if that matches nothing."""
    answer = gold
    if "<" in gold:  # a tag would end the answer
        answer = parse_reply(render_reply("This is worked out.", gold)).answer or ""
    value = read_answer(answer)
    return value if answer == gold or value == read_answer(gold) else None


def _is_long(gold: str, value: Number) -> bool:
    """Whether it has more decimals than allowed; a fraction has none."""
    if not isinstance(value, Fraction):  # of more than 1,000 digits
        return value != value.to_integral_value()
    is_fraction = "/" in gold or "frac" in gold
    return not is_fraction and 10**MAX_DECIMALS % value.denominator != 0


def _examples(problems: Sequence[Problem]) -> str:
    named = (f"{shown(one.answer)} (problem {one.problem_id})" for one in problems)
    return ", ".join(islice(named, _NUM_EXAMPLES)) + ", …" * (len(problems) > _NUM_EXAMPLES)
