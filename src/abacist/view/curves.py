"""The plots that a result draws in a notebook: a training over its steps, a comparison by kind.

Figures of matplotlib, made without pyplot: nothing stays open and no backend is chosen. They share
the look of :mod:`abacist.view.charts`.
"""

from __future__ import annotations

import math
from typing import Any

from abacist.learning.health.history import reward_names
from abacist.proof.comparison.compare import Comparison
from abacist.task.rewards import built_in
from abacist.view.charts import FAINT, INK
from abacist.view.plaintext import cut_middle, visible
from abacist.view.plot import Plot, canvas
from abacist.view.report.figures import COLOURS, DASHES
from abacist.view.report.reading import Reading
from abacist.view.step import Step

MAX_LINES = len(COLOURS)  # of rewards, told apart by colour and dashes
LABEL_CHARACTERS = 28

Points = list[tuple[int, float]]


def training_plot(reading: Reading) -> Plot:
    """What a run was paid, how often it was right, and how long its replies were, step by step."""
    figure = canvas(9.0, 5.4)
    (rewards, right), (length, signal) = figure.subplots(2, 2)
    _draw(rewards, "rewards, mean of a step, % of the most each pays", _reward_lines(reading))
    accuracy = {
        "sampled, in training": [
            (step, 100 * share)
            for step, row in reading.steps.items()
            if (share := Step.read(row).right_fraction) is not None
        ],
        "greedy, on the selection problems": [
            (step, 100 * value) for step, value in reading.measurement("eval_accuracy")
        ],
    }
    _draw(right, "correct, %", accuracy)
    _draw(length, "tokens a reply", {"": reading.metric("completions/mean_length")})
    shares = reading.silent_groups()
    _draw(signal, "groups with signal, %",
          {"": [(step, 100 * (1 - value)) for step, value in shares]})  # fmt: skip
    for axes in (length, signal):
        axes.set_xlabel("step", fontsize=9, color=INK)
    return figure


def _reward_lines(reading: Reading) -> dict[str, Points]:
    """A line for each reward; one of the user's own as it is paid."""
    names = dict.fromkeys(name for row in reading.steps.values() for name in reward_names(row))
    lines: dict[str, Points] = {}
    for name in list(names)[:MAX_LINES]:
        ours, mean = built_in(name), reading.metric(f"rewards/{name}/mean")
        label = cut_middle(visible(name).replace("\n", " "), LABEL_CHARACTERS)
        if ours is None:
            lines[f"{label} (as paid)"] = mean
        else:
            lines[f"{label} (of {ours.maximum:g})"] = [
                (step, 100 * value / ours.maximum) for step, value in mean
            ]
    return lines


def _draw(axes: Any, title: str, lines: dict[str, Points]) -> None:
    _dress(axes, title)
    drawn = [(name, points) for name, points in lines.items() if points]
    for number, (name, points) in enumerate(drawn):
        marker = "o" if len(points) < 12 else ""
        axes.plot(
            [step for step, _ in points], [value for _, value in points], label=name, marker=marker,
            color=COLOURS[number], linestyle=DASHES[number], linewidth=1.6, markersize=4,
        )  # fmt: skip
    if not drawn:
        axes.text(0.5, 0.5, "not logged", ha="center", va="center", color=INK, fontsize=9,
                  transform=axes.transAxes)  # fmt: skip
        axes.set_xticks([])
        axes.set_yticks([])
        return
    axes.xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)
    if drawn[0][0]:
        axes.legend(fontsize=8, frameon=False, labelcolor=INK)


def comparison_plot(comparison: Comparison) -> Plot:
    """Correct answers on both sides by the number of steps a problem takes, with 95 % intervals."""
    sides = [comparison.before.by_difficulty(), comparison.after.by_difficulty()]
    figure = canvas(max(6.4, 1.1 * len(sides[0]) + 2.6), 3.8)
    axes: Any = figure.subplots()
    _dress(axes, f"correct, %, on {len(comparison.before.problems):,} problems, by their steps")
    for number, (rows, side) in enumerate(zip(sides, comparison.names, strict=True)):
        places = [at + 0.19 * (2 * number - 1) for at in range(len(rows))]
        found = [row.accuracy for row in rows]
        values = [_percent(one.value) for one in found]
        below = [max(0.0, _percent(one.value) - _percent(one.low)) for one in found]
        above = [max(0.0, _percent(one.high) - _percent(one.value)) for one in found]
        name = cut_middle(visible(side).replace("\n", " "), 2 * LABEL_CHARACTERS)
        axes.bar(
            places, values, 0.36, yerr=[below, above], capsize=2.5, label=name,
            color=("#9A9A9A", COLOURS[0])[number], error_kw={"ecolor": INK, "elinewidth": 1.1},
        )  # fmt: skip
    labels = [f"{row.label.replace('more than ', '> ')}\nn = {row.n:,}" for row in sides[0]]
    axes.set_xticks(range(len(labels)), labels)
    axes.set_ylim(0, 103)
    figure.legend(loc="outside lower left", ncols=2, fontsize=9, frameon=False, labelcolor=INK)
    return figure


def _percent(share: float) -> float:
    return 100 * share if math.isfinite(share) else 0.0


def _dress(axes: Any, title: str) -> None:
    axes.set_title(title, loc="left", fontsize=10, color=INK)
    axes.grid(axis="y", color=FAINT, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.tick_params(length=0, labelsize=9, labelcolor=INK)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(FAINT)
