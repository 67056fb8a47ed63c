"""What is counted about replies, and how it is summed up.

A :class:`Mark` is everything the verdict counts about one reply, each a yes or no (or a
length). Everything above it, a share with its interval, a table by difficulty, a paired
comparison, is a sum over marks; so a new figure is one field here and one line in a table.

Terms: *Shows work*: the reasoning holds an equation whose numbers stand in it.
*Valid steps*: every such equation is true. *Structure adherence*: strict format and shows
work. *Consistency*: the share of problems on which all k sampled replies keep the strict format.
*Any-format accuracy*: :func:`~abacist.proof.scorers.lm_eval_flexible`.

A problem without a gold is never right; :mod:`~abacist.proof.evaluation` counts such problems.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from decimal import Decimal
from typing import Any

from abacist.proof.native import number_in_own_form
from abacist.proof.scorers import lm_eval_flexible, lm_eval_strict
from abacist.proof.statistics import Interval, clustered_mean, clustered_proportion, proportion
from abacist.records.rollout import Rollout, StopReason
from abacist.task.answers import Number, is_integer_numeral, read_answer
from abacist.task.problems import Problem
from abacist.task.reply import parse_reply
from abacist.task.steps import shows_work, valid_steps

#: The yes-or-no measures of a reply, by the name of their :class:`Mark` field, with their label.
SHARES: Mapping[str, str] = {
    "correct": "correct",
    "any_format": "correct in any format",
    "lm_eval_strict": "correct by lm-eval's strict filter",
    "strict": "strict format",
    "soft": "soft format",
    "integer": "bare integer as answer",
    "shows_work": "shows its work",
    "valid_steps": "every step shown is true",
    "adheres": "structure adherence",
    "stopped": "stopped by itself",
}

MOST_STEPS = 12

#: What :func:`answer_size_label` says, smallest first.
ANSWER_SIZES = (
    "0 to 9", "10 to 99", "100 to 999", "1,000 to 9,999", "10,000 or more", "not whole", "no gold",
)  # fmt: skip
_SIZE_ENDS = (10, 100, 1_000, 10_000)


@dataclass(frozen=True, slots=True)
class Mark:
    """What one reply shows. ``number`` is its answer by value, None if it commits to none.

    ``valid_steps`` implies ``shows_work``: where no work is shown, no step is valid.
    """

    problem_id: str
    correct: bool
    any_format: bool
    lm_eval_strict: bool
    strict: bool
    soft: bool
    integer: bool
    shows_work: bool
    valid_steps: bool
    stopped: bool
    number: Number | None
    completion_tokens: int

    @property
    def adheres(self) -> bool:
        """Structure adherence: strict format, and work shown in it."""
        return self.strict and self.shows_work


def mark_of(rollout: Rollout, *, is_native: bool = False) -> Mark:
    """Reads one reply: its text, its gold, and how it ended.

    ``is_native``: it was asked in the model's own prompt, and its answer is read in that form.
    """
    reply = parse_reply(rollout.completion)
    works = shows_work(reply.reasoning)
    gold, text = rollout.gold, rollout.completion
    number = number_in_own_form(text, gold) if is_native else read_answer(reply.answer or "")
    return Mark(
        problem_id=rollout.problem_id or "",
        correct=bool(rollout.is_correct),
        any_format=gold is not None and lm_eval_flexible(text, gold),
        lm_eval_strict=gold is not None and lm_eval_strict(text, gold),
        strict=reply.strict,
        soft=reply.soft,
        integer=reply.answer is not None and is_integer_numeral(reply.answer),
        shows_work=works,
        valid_steps=works and valid_steps(reply.reasoning),
        stopped=rollout.stop_reason is not StopReason.LENGTH,
        number=number,
        completion_tokens=rollout.completion_tokens,
    )


def share(marks: Sequence[Mark], measure: str) -> Interval:
    """The share of replies of which the measure is true, clustered by problem."""
    outcomes = [bool(getattr(mark, measure)) for mark in marks]
    return clustered_proportion(outcomes, [mark.problem_id for mark in marks])


def mean_tokens(marks: Sequence[Mark]) -> Interval:
    """The mean length of a completion, in tokens, clustered by problem."""
    lengths = [float(mark.completion_tokens) for mark in marks]
    return clustered_mean(lengths, [mark.problem_id for mark in marks])


def by_problem(marks: Iterable[Mark]) -> dict[str, list[Mark]]:
    """The marks of each problem, in the order in which the problems come."""
    replies: dict[str, list[Mark]] = {}
    for mark in marks:
        replies.setdefault(mark.problem_id, []).append(mark)
    return replies


def keeps_format(replies: Sequence[Mark]) -> bool:
    """Whether all replies to one problem are strict."""
    return all(mark.strict for mark in replies)


def keeps_answer(replies: Sequence[Mark]) -> bool:
    """Whether all replies to one problem give the same answer; no answer agrees with nothing."""
    numbers = {mark.number for mark in replies}
    return len(numbers) == 1 and None not in numbers


def consistency(
    marks: Sequence[Mark], rule: Callable[[Sequence[Mark]], bool] = keeps_format
) -> Interval | None:
    """The share of problems whose replies agree by ``rule``; None with one reply to a problem."""
    replies = by_problem(marks)
    if len(replies) == len(marks):
        return None
    return proportion([rule(of_one) for of_one in replies.values()])


@dataclass(frozen=True, slots=True)
class Row:
    """One row of a table: the problems of one kind. ``n`` counts problems."""

    label: str
    n: int
    accuracy: Interval
    any_format: Interval
    strict: Interval
    adherence: Interval
    valid_steps: Interval
    consistency: Interval | None
    answer_consistency: Interval | None

    def to_json(self) -> dict[str, Any]:
        """The row, each interval as an object."""
        _, _, *intervals = (field.name for field in fields(self))
        found = {name: getattr(self, name) for name in intervals}
        shown = {name: interval and interval.to_json() for name, interval in found.items()}
        return {"label": self.label, "problems": self.n, **shown}


def steps_label(problem: Problem) -> str:
    """How many steps a problem takes, in words; the few beyond :data:`MOST_STEPS` are one kind."""
    if problem.difficulty > MOST_STEPS:
        return f"more than {MOST_STEPS} steps"
    return "1 step" if problem.difficulty == 1 else f"{problem.difficulty} steps"


def answer_size_label(problem: Problem) -> str:
    """How large the right answer is, in powers of ten.

    >>> answer_size_label(Problem("p", "How many?", "", "-1,450", 1))
    '1,000 to 9,999'
    """
    gold = read_answer(problem.answer)
    if gold is None:
        return ANSWER_SIZES[-1]
    if isinstance(gold, Decimal):  # of more than 1,000 digits
        return ANSWER_SIZES[-2 if gold.adjusted() < 0 else -3]
    if gold.denominator != 1:
        return ANSWER_SIZES[-2]
    return ANSWER_SIZES[sum(abs(gold) >= end for end in _SIZE_ENDS)]


def structure_label(problem: Problem) -> str | None:
    """Whether problems of this structure were trained on; None where that is not known."""
    if problem.unseen_structure is None:
        return None
    return "unseen structures" if problem.unseen_structure else "seen structures"


def rows(
    problems: Iterable[Problem], marks: Sequence[Mark], label_of: Callable[[Problem], str | None]
) -> list[Row]:
    """A table of the problems, one row for each label in the order of the labels' first problems.

    Problems labelled None are left out.
    """
    labels = {problem.problem_id: label_of(problem) for problem in problems}
    table: list[Row] = []
    for label in dict.fromkeys(label for label in labels.values() if label is not None):
        members = [mark for mark in marks if labels[mark.problem_id] == label]
        table.append(
            Row(
                label=label,
                n=sum(other == label for other in labels.values()),
                accuracy=share(members, "correct"),
                any_format=share(members, "any_format"),
                strict=share(members, "strict"),
                adherence=share(members, "adheres"),
                valid_steps=share(members, "valid_steps"),
                consistency=consistency(members),
                answer_consistency=consistency(members, keeps_answer),
            )
        )
    return table
