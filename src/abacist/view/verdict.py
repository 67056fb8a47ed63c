"""The verdict: what a training has changed, in words and tables for a newcomer.

Plain text, without colours, at most 100 columns wide; the same figures for machines by
:func:`verdict_json`. It says "learned" only where the paired interval and the exact test agree,
and says beside it how much is left when the format is ignored, because a model can learn
the format without calculating any better.
"""

from __future__ import annotations

from typing import Any

from abacist.proof.comparison.compare import Comparison, Example, Paired, compare
from abacist.proof.comparison.sentence import bracket, headline, judgement, percent, points
from abacist.proof.evaluation import Evaluation
from abacist.records.rollout import Rollout
from abacist.view.plaintext import excerpt
from abacist.view.sheet import WIDTH, Block, Quote, as_text
from abacist.view.tables import (
    greedy_table,
    kind_table,
    reward_table,
    sampled_table,
)

_EXAMPLE_COLUMNS = 76  # fits a terminal of 80 without being broken once more

NOTES = (
    "Brackets hold 95 % intervals; changes are paired, problem by problem. p is McNemar's exact "
    "test. In any format: the last number of the reply is right, wherever it stands (lm-eval's "
    "flexible rule). Structure adherence: strict format, and work shown in it. Every step shown is "
    "true: work is shown, and each equation in it holds."
)


def verdict_text(
    comparison: Comparison,
    sampled_before: Evaluation | None = None,
    sampled_after: Evaluation | None = None,
    *,
    num_examples: int = 3,
    asked: str = "problems it never saw",
    width: int = WIDTH,
) -> str:
    """The whole verdict for a terminal; see :func:`verdict_page`."""
    return as_text(
        verdict_page(
            comparison, sampled_before, sampled_after, num_examples=num_examples, asked=asked
        ),
        width,
    )


def verdict_page(
    comparison: Comparison,
    sampled_before: Evaluation | None = None,
    sampled_after: Evaluation | None = None,
    *,
    num_examples: int = 3,
    asked: str = "problems it never saw",
) -> list[Block]:
    """The whole verdict, headline first. ``asked`` says in words what the problems were.

    The sampled evaluations, given both, add consistency. Text of the model is escaped and cut.
    """
    sampled = _sampled(sampled_before, sampled_after)
    blocks: list[Block] = [
        headline(comparison, asked),
        *remarks(comparison),
        greedy_table(comparison),
        *([sampled_table(sampled)] if sampled else []),
        kind_table(comparison, sampled),
        reward_table(comparison),
    ]
    for number, example in enumerate(comparison.examples(num_examples), start=1):
        blocks.append(Quote(*example_lines(number, example)))
    return [*blocks, NOTES]


def _sampled(before: Evaluation | None, after: Evaluation | None) -> Comparison | None:
    return compare(before, after) if before and after else None


def remarks(comparison: Comparison) -> list[str]:
    """What keeps the headline honest: the same without format, on unseen structures, with work."""
    learned = comparison.accuracy.is_better
    any_format, unseen, worked = comparison.any_format, comparison.unseen, comparison.shown_work
    if learned:
        leads = {
            "learned": "Not only format",
            "unproven": "Beyond the format nothing is proven",
            "worse": "Beware, it got worse when format is ignored",
        }
    else:
        leads = {
            "learned": "When format is ignored it learned",
            "unproven": "Nothing is proven when format is ignored",
            "worse": "It got worse when format is ignored",
        }
    remarks = [f"{leads[judgement(any_format)]}: in any format {_change(any_format)}."]
    if unseen:
        lead = "On structures never trained on"
        remarks.append(f"{lead} ({unseen.change.n} problems): {_change(unseen)}.")
    if worked:
        lead = f"Where work is shown both times ({worked.change.n} problems)"
        tails = {
            "learned": "so the reasoning itself got better",
            "worse": "so the reasoning itself got worse",
            "unproven": "so better reasoning is not proven",
        }
        found, apart = judgement(worked), comparison.shown_reasoning
        tail = tails[found]
        if found != "unproven" and apart and judgement(apart) != found:
            tail = f"but in any format {_change(apart)}: the layout may be all of it"
        remarks.append(f"{lead}: {_change(worked)}, {tail}.")
    return remarks


def _change(paired: Paired) -> str:
    return (
        f"{percent(paired.before)} → {percent(paired.after)}, "
        f"{points(paired.change.value)} points {bracket(paired.change)}"
    )


def example_lines(
    number: int, example: Example, sides: tuple[str, str] = ("before", "after")
) -> tuple[str, list[str]]:
    """The heading of an example, and its lines: the question, the gold, and both replies."""
    problem = example.problem
    kind = ", an unseen structure" if problem.unseen_structure else ""
    gold = " ".join(excerpt(problem.answer, _EXAMPLE_COLUMNS - 18, characters=60, lines=1))
    lines = [*excerpt(problem.question, _EXAMPLE_COLUMNS), f"The right answer is {gold}."]
    lines += _reply(sides[0], example.before) + _reply(sides[1], example.after)
    return f"Example {number}: {example.outcome}{kind}", lines


def _reply(when: str, rollout: Rollout) -> list[str]:
    outcome = "right" if rollout.is_correct else "wrong"
    lines = ["(nothing)"]
    if rollout.completion.strip():
        lines = excerpt(rollout.completion, _EXAMPLE_COLUMNS - 4)
    return [f"{when}, {outcome}:", *(f"  | {line}" for line in lines)]


def verdict_json(
    comparison: Comparison,
    sampled_before: Evaluation | None = None,
    sampled_after: Evaluation | None = None,
    *,
    num_examples: int = 3,
    asked: str = "problems it never saw",
) -> dict[str, Any]:
    """The verdict for machines: judgement, headline, figures, paired tests, examples."""
    sampled = _sampled(sampled_before, sampled_after)
    return {
        "judgement": judgement(comparison.accuracy),
        "control": comparison.control,
        "headline": headline(comparison, asked),
        "greedy": comparison.to_json(),
        "sampled": sampled
        and {
            "before": sampled.before.to_json(),
            "after": sampled.after.to_json(),
            "changes": {name: change.to_json() for name, change in sampled.changes.items()},
        },
        "examples": [example.to_json() for example in comparison.examples(num_examples)],
    }
