"""The verdict's tables: a line for every figure, before and after, each change with its interval.

Blocks of :mod:`abacist.view.sheet`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

from abacist.proof.comparison.compare import Comparison
from abacist.proof.comparison.sentence import bracket, percent, points
from abacist.proof.metrics import SHARES, Row
from abacist.proof.statistics import Interval
from abacist.records.rollout import REWARD_PREFIX
from abacist.task.rewards import built_in
from abacist.view.plaintext import visible
from abacist.view.sheet import Table

_COLUMNS = ("before", "after", "change", "95 % interval")
_GREEDY = (
    "correct", "any_format", "strict", "soft", "shows_work", "adheres", "valid_steps", "integer",
    "stopped",
)  # fmt: skip
_SAMPLED = (
    "correct", "any_format", "strict", "adheres", "stopped", "format_consistency",
    "answer_consistency",
)  # fmt: skip


def greedy_table(comparison: Comparison) -> Table:
    """The shares and the length of the greedy replies."""
    return _figures_table("greedy replies", comparison, _GREEDY, SHARES)


def sampled_table(comparison: Comparison) -> Table:
    """The same of several sampled replies to each problem, and how consistent these are."""
    count = comparison.before.settings.num_samples
    labels = {
        **SHARES,
        "format_consistency": f"all {count} in strict format (consistency)",
        "answer_consistency": f"all {count} give the same answer",
    }
    names = [name for name in _SAMPLED if name in comparison.changes]
    title = f"sampled, {count} replies to {len(comparison.before.problems):,} problems"
    return _figures_table(title, comparison, names, labels)


def reward_table(comparison: Comparison) -> Table:
    """What each reward paid for the greedy replies, on average."""
    rows = []
    for name in comparison.before.rewards:
        if (figure := REWARD_PREFIX + name) in comparison.changes:
            ours = built_in(name)
            most = f" ({ours.maximum:g})" if ours else ""
            rows.append(_mean_row(visible(name)[:28] + most, figure, 2, comparison))
    return Table(("mean reward (at most)", *_COLUMNS), rows, has_words=True)


def kind_table(comparison: Comparison, sampled: Comparison | None) -> Table:
    """Accuracy, adherence and, where sampled, consistency by number of steps and by structure."""
    heading = ["in per cent, before → after", "problems", "correct", "adherence"]
    heading += ["consistency"] * (sampled is not None)
    twins = _rows(sampled) if sampled else {}
    rows = []
    for label, (before, after) in _rows(comparison).items():
        cells = [_arrow(before.accuracy, after.accuracy), _arrow(before.adherence, after.adherence)]
        if sampled is not None:
            pair = twins.get(label)
            cells.append(_arrow(*(twin.consistency for twin in pair)) if pair else "-")
        rows.append((label, f"{before.n:,}", *cells))
    return Table(tuple(heading), rows)


def _rows(comparison: Comparison) -> dict[str, tuple[Row, Row]]:
    """The rows of both sides, by number of steps and by structure."""
    first, second = (
        [*side.by_difficulty(), *side.by_structure()]
        for side in (comparison.before, comparison.after)
    )
    return {before.label: (before, after) for before, after in zip(first, second, strict=True)}


def _arrow(before: Interval | None, after: Interval | None) -> str:
    if before is None or after is None:
        return "-"
    return f"{100 * before.value:.1f} → {100 * after.value:>5.1f}"


def _figures_table(
    title: str, comparison: Comparison, names: Iterable[str], labels: Mapping[str, str]
) -> Table:
    before, after = comparison.before.figures, comparison.after.figures
    rows = []
    for name in names:
        change = comparison.changes[name]
        both = percent(before[name]), percent(after[name])
        rows.append((labels[name], *both, points(change.value), bracket(change)))
    rows.append(_mean_row("tokens a reply", "completion_tokens", 1, comparison))
    return Table((title, *_COLUMNS), rows, has_words=True)


def _mean_row(
    label: str, name: str, digits: int, comparison: Comparison
) -> tuple[str, str, str, str, str]:
    def shown(number: float, sign: str = "") -> str:
        return f"{number:{sign}.{digits}f}" if math.isfinite(number) else "-"

    change = comparison.changes[name]
    before, after = (side.figures[name].value for side in (comparison.before, comparison.after))
    bounds = f"[{shown(change.low, '+')}, {shown(change.high, '+')}]"
    return label, shown(before), shown(after), shown(change.value, "+"), bounds
