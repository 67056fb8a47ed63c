"""The plot of an evaluation: how accuracy, structure and consistency hold as problems get longer.

One picture, readable in print and by colour-blind eyes: the colours are Okabe and Ito's, every
series has a marker of its own and is named at its side, bars are 95 % intervals, and the number
of problems stands under every group, because a point of three problems says little.
"""

from __future__ import annotations

import io
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from abacist.proof.evaluation import Evaluation
from abacist.proof.metrics import Row
from abacist.proof.statistics import Interval
from abacist.records.rundir import write_aside

if TYPE_CHECKING:
    from abacist.view.plot import Plot

INK, FAINT = "#222222", "#d9d9d9"
# Colour and marker of each series; Okabe and Ito's palette.
_STYLES = {
    "correct": ("#0072B2", "o"),
    "structure adherence": ("#D55E00", "s"),
    "valid steps": ("#009E73", "^"),
    "all in strict format": ("#CC79A7", "D"),
    "all one answer": ("#7A5C00", "v"),
}
# The fields of a row that are drawn, by the name of the series.
_OF_GREEDY = {
    "correct": "accuracy", "structure adherence": "adherence", "valid steps": "valid_steps",
}  # fmt: skip
_OF_SAMPLED = {"all in strict format": "consistency", "all one answer": "answer_consistency"}
_APART = 0.15  # between the series of a group, which are 1 apart
FEW_PROBLEMS = 10  # a group with fewer is drawn pale, and no line leads to it


def save_difficulty_chart(path: Path, greedy: Evaluation, sampled: Evaluation | None) -> None:
    """Write the plot as a PNG, whole or not at all; without samples it has no consistency."""
    buffer = io.BytesIO()
    figure = difficulty_plot(greedy, sampled)
    figure.savefig(buffer, format="png", dpi=150, metadata={"Software": None})
    write_aside(path, buffer.getvalue())


def difficulty_series(
    greedy: Evaluation, sampled: Evaluation | None
) -> dict[str, list[Interval | None]]:
    """What is drawn: each series by its name, with one interval for every group of problems."""
    rows = greedy.by_difficulty()
    series = {name: [getattr(row, field) for row in rows] for name, field in _OF_GREEDY.items()}
    if sampled is not None:
        repeated = {row.label: row for row in sampled.by_difficulty()}
        # A training samples fewer problems, perhaps none of this kind.
        twins = [repeated.get(row.label) for row in rows]
        for name, field in _OF_SAMPLED.items():
            series[name] = [None if row is None else getattr(row, field) for row in twins]
    return series


def difficulty_plot(
    greedy: Evaluation,
    sampled: Evaluation | None,
    *,
    ink: str = INK,
    faint: str = FAINT,
    page: str = "white",
) -> Plot:
    """The plot as a figure of matplotlib, its text and lines in the colours given."""
    from abacist.view.plot import canvas

    rows = greedy.by_difficulty()
    figure = canvas(max(7.6, 1.05 * len(rows) + 3.6), 4.6)
    figure.set_facecolor(page)
    axes: Any = figure.subplots()
    series = difficulty_series(greedy, sampled)
    for number, (name, intervals) in enumerate(series.items()):
        shift = _APART * (number - (len(series) - 1) / 2)
        _draw(axes, name, intervals, [row.n for row in rows], shift, page)
    _dress(axes, rows, ink, faint)
    axes.patch.set_facecolor(page)
    legend = figure.legend(
        *_legend(axes, sampled), loc="outside right center", frameon=False, fontsize=9.5,
        labelcolor=ink, title="share of problems, %\n", title_fontsize=9.5, alignment="left",
    )  # fmt: skip
    legend.get_title().set_color(ink)
    axes.set_title(_title(greedy, rows), loc="left", fontsize=11.5, color=ink, pad=14)
    return figure


def _draw(
    axes: Any,
    name: str,
    intervals: list[Interval | None],
    counts: list[int],
    shift: float,
    page: str,
) -> None:
    colour, marker = _STYLES[name]
    known = [(at, one) for at, one in enumerate(intervals) if one and math.isfinite(one.value)]
    sure = [(at, one) for at, one in known if counts[at] >= FEW_PROBLEMS]
    for points, alpha in ((sure, 1.0), ([point for point in known if point not in sure], 0.4)):
        if not points:
            continue
        below = [max(0.0, 100 * (one.value - one.low)) for _, one in points]
        above = [max(0.0, 100 * (one.high - one.value)) for _, one in points]
        axes.errorbar(
            [at + shift for at, _ in points],
            [100 * one.value for _, one in points],
            yerr=[below, above],
            label=name, color=colour, marker=marker, alpha=alpha, markersize=6, linewidth=1.0,
            linestyle=":" if points is sure else "none", elinewidth=1.4, capsize=2.5,
            markeredgecolor=page, markeredgewidth=0.6,
        )  # fmt: skip


def _dress(axes: Any, rows: list[Row], ink: str, faint: str) -> None:
    axes.set_ylim(-3, 103)
    axes.set_yticks(range(0, 101, 20), [f"{value} %" for value in range(0, 101, 20)])
    axes.set_xlim(-0.5, len(rows) - 0.5)
    labels = [f"{row.label.replace('more than ', '> ')}\nn = {row.n:,}" for row in rows]
    axes.set_xticks(range(len(rows)), labels)
    for at in range(1, len(rows)):
        axes.axvline(at - 0.5, color=faint, linewidth=0.8, zorder=0)
    axes.grid(axis="y", color=faint, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.tick_params(length=0, labelsize=9, labelcolor=ink)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(faint)


def _legend(axes: Any, sampled: Evaluation | None) -> tuple[list[Any], list[str]]:
    """Each series once, by marker and name; consistency says of how many replies it is."""
    count = sampled.settings.num_samples if sampled else 0
    handles, names = axes.get_legend_handles_labels()
    named = dict(zip(reversed(names), reversed(handles), strict=True))  # the first of a name wins
    labels = [label.replace("all ", f"all {count} sampled:\n", 1) for label in _STYLES]
    shown = [(named[name][0], label) for name, label in zip(_STYLES, labels, strict=True)
             if name in named]  # fmt: skip
    return [handle for handle, _ in shown], [label for _, label in shown]


def _title(greedy: Evaluation, rows: list[Row]) -> str:
    title = f"{len(greedy.problems):,} problems by number of steps, with 95 % intervals"
    pale = any(row.n < FEW_PROBLEMS for row in rows)
    return f"{title}; pale: fewer than {FEW_PROBLEMS} problems" if pale else title
