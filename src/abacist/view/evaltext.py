"""An evaluation in words and tables: plain text for the terminal, Markdown for the file.

Every figure stands with its 95 % interval, the number of problems behind it, and the method.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import Any

from abacist.proof.evaluation import Evaluation
from abacist.proof.metrics import SHARES, Row
from abacist.proof.statistics import Interval
from abacist.records.rollout import REWARD_PREFIX
from abacist.view.plaintext import fold, visible
from abacist.view.sheet import WIDTH, Block, Quote, Table, as_markdown, as_text

PLOT_NAME = "difficulty.png"
# From this share of replies on without our tags, the figures say nothing of the arithmetic.
_TAGLESS_FRACTION = 0.9
_LABELS = {
    **SHARES,
    "correct": "correct, by our answer rule",
    "any_format": "correct, by lm-eval's flexible filter",
    "lm_eval_strict": "correct, by lm-eval's strict filter",
    "valid_steps": "valid steps: each one shown is true",
    "format_consistency": "all replies in strict format",
    "answer_consistency": "all replies give the same answer",
}
_ORDER = (
    "correct", "any_format", "lm_eval_strict", "strict", "soft", "integer", "shows_work",
    "valid_steps", "adheres", "stopped", "format_consistency", "answer_consistency",
)  # fmt: skip
_COUNTED = {
    "replies_never_stopped": ("never stopped", "never stopped"),
    "replies_empty": ("is empty", "are empty"),
    "replies_without_answer": ("commits to no answer", "commit to no answer"),
}
NOTES = (
    "Brackets hold 95 % intervals; the unit is the problem, also where it has several replies. "
    "Tables by kind: Wilson, n is the number of problems; all but consistency (same format, same "
    "answer: of the sampled replies) are of the greedy replies. lm-eval's filters read the same "
    "replies: the flexible one takes the last number wherever it stands (any format), the strict "
    "one wants '#### n', which only prompts in GSM8K's own form ask for. Structure adherence: "
    "strict format, and work shown in it. Valid steps: work is shown, and each equation in it "
    "holds. Nothing is dropped: a reply that never stops, is empty, or answers a problem without "
    "gold counts as wrong."
)


def evaluation_text(
    greedy: Evaluation, sampled: Evaluation | None = None, width: int = WIDTH
) -> str:
    """The whole evaluation for a terminal of so many columns."""
    return as_text(evaluation_page(greedy, sampled), width)


def evaluation_page(greedy: Evaluation, sampled: Evaluation | None = None) -> list[Block]:
    """The whole evaluation as blocks, headline first."""
    return [headline(greedy), *remarks(greedy), *_blocks(greedy, sampled)]


def evaluation_markdown(greedy: Evaluation, sampled: Evaluation | None = None) -> str:
    """The whole evaluation as Markdown, with the plot that is saved beside it."""
    page = as_markdown("Evaluation", evaluation_page(greedy, sampled))
    return f"{page}\n![By number of steps]({PLOT_NAME})\n"


def evaluation_json(greedy: Evaluation, sampled: Evaluation | None = None) -> dict[str, Any]:
    """The figures of both for machines."""
    return {
        "headline": headline(greedy),
        "remarks": remarks(greedy),
        "seen": greedy.overlap and greedy.overlap.to_json(),
        "greedy": greedy.to_json(),
        "sampled": sampled.to_json() if sampled else None,
    }


def headline(greedy: Evaluation) -> str:
    """The evaluation in one sentence, and what can be set against other people's figures."""
    model = visible(greedy.conditions.get("model", "The model"))
    figures, problems = greedy.figures, f"{len(greedy.problems):,} problems"
    if (overlap := greedy.overlap) is not None and overlap.kinds and not overlap.is_left_out:
        problems += f" ({len(overlap.kinds):,} of them seen in training)"
    flexible = f"{shown(figures['any_format'])} by lm-eval's flexible filter"
    if greedy.own_form_accuracy is not None:
        return (
            f"{model}, in its own best-known prompt: {shown(greedy.own_form_accuracy)} correct on "
            f"{problems}, read in the form that prompt asks for; {flexible}. Either may be set "
            "against published figures; our own rule, which wants our tags, does not apply."
        )
    return (
        f"{model}: {shown(figures['correct'])} correct on {problems}, by our answer rule; "
        f"{flexible}, the one to compare with figures made with other prompts."
    )


def remarks(greedy: Evaluation) -> list[str]:
    """What a reader has to know before the figures, and how to ask otherwise; often nothing."""
    if greedy.settings.native_prompt:
        return []
    texts = [rollout.completion for rollout in greedy.rollouts]
    tagless = sum("<answer>" not in text for text in texts)
    if tagless < _TAGLESS_FRACTION * len(texts):
        return []
    how_many = "None" if tagless == len(texts) else f"Only {len(texts) - tagless:,}"
    shots = ""
    if greedy.settings.num_shots == 0:
        shots = ", and --num_shots 2 shows it our layout in two worked examples"
    return [
        f"{how_many} of {len(texts):,} replies used our <answer> tag, so the low figures below are "
        "about the layout and not about arithmetic. --native_prompt asks a model in its own "
        f"best-known way{shots}."
    ]


def _blocks(greedy: Evaluation, sampled: Evaluation | None) -> Iterator[Block]:
    """Everything below the headline, in order."""
    yield Quote("how it was asked", _conditions(greedy))
    yield from _counted(greedy, sampled)
    yield _figures(f"greedy, {len(greedy.rollouts):,} replies", greedy)
    if sampled is not None:
        count, warmth = sampled.settings.num_samples, sampled.settings.temperature
        yield _figures(f"sampled, {count} a problem, temperature {warmth:g}", sampled)
    yield _by_steps(greedy, sampled)
    for title, kinds in (
        ("by size of the answer, per cent", greedy.by_answer_size()),
        ("by structure, per cent", greedy.by_structure()),
    ):
        if kinds:
            yield _by_kind(title, kinds)
    rewards = [
        _figure(visible(name.removeprefix(REWARD_PREFIX)), found, scale=1, digits=2)
        for name, found in greedy.figures.items()
        if name.startswith(REWARD_PREFIX)
    ]
    yield Table(("mean reward, greedy", *_COLUMNS), rewards, has_words=True)
    yield NOTES


def _conditions(evaluation: Evaluation) -> list[str]:
    told = {name: visible(text) for name, text in evaluation.conditions.items() if text}
    width = max(map(len, told), default=0)
    return [
        f"{name if part == 0 else '':<{width}}  {piece}"
        for name, text in told.items()
        for part, piece in enumerate(fold(text, WIDTH - width - 4))
    ]


def _counted(greedy: Evaluation, sampled: Evaluation | None) -> Iterator[str]:
    said = []
    if missing := greedy.counts["problems_without_gold"]:
        have = "problem has" if missing == 1 else "problems have"
        said.append(
            f"Of {len(greedy.problems):,} problems, {missing:,} {have} no gold answer; they are "
            "kept, and every reply to them counts as wrong."
        )
    for kind, evaluation in (("greedy", greedy), ("sampled", sampled)):
        if evaluation is not None:
            counts = evaluation.counts
            parts = [f"{counts[n]:,} {_COUNTED[n][counts[n] != 1]}" for n in _COUNTED]
            said.append(f"Of {counts['replies']:,} {kind} replies, {', '.join(parts)}.")
    yield " ".join(said)


_COLUMNS = ("value", "95 % interval", "n", "method")


def _figures(title: str, evaluation: Evaluation) -> Table:
    figures = evaluation.figures
    labels = dict(_LABELS)
    if evaluation.settings.native_prompt:
        labels["correct"] = "correct, in the form asked for"
    rows = [_figure(labels[name], figures[name]) for name in _ORDER if name in figures]
    rows += [_figure(name, found) for name, found in evaluation.attempts.items()]
    rows.append(_figure("tokens a reply", figures["completion_tokens"], scale=1))
    return Table((title, *_COLUMNS), rows, has_words=True)


def _figure(
    label: str, found: Interval, *, scale: int = 100, digits: int = 1
) -> tuple[str, str, str, str, str]:
    unit = " %" if scale == 100 else ""

    def number(value: float) -> str:
        return f"{scale * value:.{digits}f}" if math.isfinite(value) else "-"

    bounds = f"[{number(found.low)}, {number(found.high)}]"
    return label, number(found.value) + unit, bounds, f"{found.n:,}", found.method


def _by_steps(greedy: Evaluation, sampled: Evaluation | None) -> Table:
    """The one table of correctness, structure, steps and consistency across difficulty."""
    heading = ["by steps, per cent", "n", "correct", "adherence", "valid steps"]
    repeated = {row.label: row for row in sampled.by_difficulty()} if sampled else {}
    if repeated:
        heading += ["same format", "same answer"]
    rows = []
    for row in greedy.by_difficulty():
        cells: list[Interval | None] = [row.accuracy, row.adherence, row.valid_steps]
        if repeated:  # a training samples fewer problems, perhaps none of this kind
            twin = repeated.get(row.label)
            cells += [twin.consistency, twin.answer_consistency] if twin else [None, None]
        rows.append((row.label, f"{row.n:,}", *map(short, cells)))
    return Table(tuple(heading), rows)


def _by_kind(title: str, kinds: Iterable[Row]) -> Table:
    rows = [
        (
            row.label,
            f"{row.n:,}",
            *map(short, (row.accuracy, row.any_format, row.adherence, row.valid_steps)),
        )
        for row in kinds
    ]
    return Table((title, "n", "correct", "any format", "adherence", "valid steps"), rows)


def shown(found: Interval) -> str:
    """``"34.2 % [29.0, 39.9]"``."""
    _, value, bounds, *_ = _figure("", found)
    return f"{value} {bounds}"


def short(found: Interval | None) -> str:
    """``"34 [29–40]"``, in whole per cent."""
    if found is None or not math.isfinite(found.value):
        return "-"
    return f"{100 * found.value:.0f} [{100 * found.low:.0f}–{100 * found.high:.0f}]"
