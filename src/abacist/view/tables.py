"""The verdict's tables: a line for every figure, before and after, each change with its interval.

Lines of plain text, at most 100 columns wide, numbers under one another.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

from abacist.proof.comparison.compare import Comparison, changes
from abacist.proof.evaluation import Evaluation
from abacist.proof.metrics import SHARES, Row
from abacist.proof.statistics import Interval
from abacist.records.rollout import REWARD_PREFIX
from abacist.task.rewards import built_in
from abacist.view.plaintext import visible

Figures = Mapping[str, Interval]

LABEL_COLUMNS = 38
_GREEDY = (
    "correct", "any_format", "strict", "soft", "shows_work", "adheres", "valid_steps", "integer",
    "stopped",
)  # fmt: skip
_SAMPLED = (
    "correct", "any_format", "strict", "adheres", "stopped", "format_consistency",
    "answer_consistency",
)  # fmt: skip


def percent(interval: Interval) -> str:
    """The value as ``"34.2 %"``."""
    return f"{100 * interval.value:.1f} %" if math.isfinite(interval.value) else "-"


def points(share: float) -> str:
    """A difference of shares in percentage points, signed: ``"+43.8"``."""
    return f"{100 * share:+.1f}" if math.isfinite(share) else "-"


def bracket(interval: Interval) -> str:
    """The bounds in percentage points: ``"[+38.1, +49.5]"``."""
    return f"[{points(interval.low)}, {points(interval.high)}]"


def greedy_table(comparison: Comparison) -> list[str]:
    """The shares and the length of the greedy replies."""
    before, after, changed = comparison.before, comparison.after, comparison.changes
    return [
        _heading("greedy replies"),
        *_shares(before.figures, after.figures, changed, _GREEDY, SHARES),
        _mean_line("tokens a reply", "completion_tokens", 1, before, after, changed),
    ]


def sampled_table(before: Evaluation, after: Evaluation) -> list[str]:
    """The same of several sampled replies to each problem, and how consistent these are."""
    count = before.settings.num_samples
    changed = changes(before, after)
    labels = {
        **SHARES,
        "format_consistency": f"all {count} in strict format (consistency)",
        "answer_consistency": f"all {count} give the same answer",
    }
    names = [name for name in _SAMPLED if name in changed]
    return [
        _heading(f"sampled, {count} replies to {len(before.problems):,} problems"),
        *_shares(before.figures, after.figures, changed, names, labels),
        _mean_line("tokens a reply", "completion_tokens", 1, before, after, changed),
    ]


def reward_table(comparison: Comparison) -> list[str]:
    """What each reward paid for the greedy replies, on average."""
    before, after, changed = comparison.before, comparison.after, comparison.changes
    lines = [_heading("mean reward (at most)")]
    for name in before.rewards:
        if REWARD_PREFIX + name in changed:
            ours = built_in(name)
            most = f" ({ours.maximum:g})" if ours else ""
            label = visible(name)[:28] + most
            lines.append(_mean_line(label, REWARD_PREFIX + name, 2, before, after, changed))
    return lines


def kind_table(
    comparison: Comparison, sampled_before: Evaluation | None, sampled_after: Evaluation | None
) -> list[str]:
    """Accuracy, adherence and, where sampled, consistency by number of steps and by structure."""
    greedy = _rows(comparison.before), _rows(comparison.after)
    sampled = _rows(sampled_before), _rows(sampled_after)
    columns = ["correct", "adherence"] + (["consistency"] if all(sampled) else [])
    lines = [_kind_line("in per cent, before → after", "problems", columns)]
    for label, before in greedy[0].items():
        after = greedy[1][label]
        pairs = (before.accuracy, after.accuracy), (before.adherence, after.adherence)
        cells = [_arrow(*pair) for pair in pairs]
        if label in sampled[0] and label in sampled[1]:
            cells.append(_arrow(sampled[0][label].consistency, sampled[1][label].consistency))
        lines.append(_kind_line(f"  {label}", f"{before.n:,}", cells))
    return lines


def _rows(evaluation: Evaluation | None) -> dict[str, Row]:
    if evaluation is None:
        return {}
    return {row.label: row for row in [*evaluation.by_difficulty(), *evaluation.by_structure()]}


def _kind_line(label: str, count: str, cells: Iterable[str]) -> str:
    return f"{label:<{LABEL_COLUMNS}} {count:>9}" + "".join(f" {cell:>15}" for cell in cells)


def _arrow(before: Interval | None, after: Interval | None) -> str:
    if before is None or after is None:
        return "-"
    return f"{100 * before.value:.1f} → {100 * after.value:>5.1f}"


def _shares(
    before: Figures,
    after: Figures,
    changed: Figures,
    names: Iterable[str],
    labels: Mapping[str, str],
) -> list[str]:
    lines = []
    for name in names:
        values = percent(before[name]), percent(after[name]), points(changed[name].value)
        lines.append(_line(f"  {labels[name]}", *values, bracket(changed[name])))
    return lines


def _mean_line(
    label: str, name: str, digits: int, before: Evaluation, after: Evaluation, changed: Figures
) -> str:
    def shown(number: float, sign: str = "") -> str:
        return f"{number:{sign}.{digits}f}" if math.isfinite(number) else "-"

    change = changed[name]
    values = shown(before.figures[name].value), shown(after.figures[name].value)
    bounds = f"[{shown(change.low, '+')}, {shown(change.high, '+')}]"
    return _line(f"  {label}", *values, shown(change.value, "+"), bounds)


def _heading(title: str) -> str:
    return _line(title, "before", "after", "change", "95 % interval")


def _line(label: str, before: str, after: str, change: str, interval: str) -> str:
    return f"{label:<{LABEL_COLUMNS}} {before:>9} {after:>9} {change:>9}  {interval}"
