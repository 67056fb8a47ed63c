"""The charts of the report, each with its numbers as a table.

Every figure is drawn once, when the page is written, so that it can be read without a script and on
paper. Colours are Okabe and Ito's, which colour-blind eyes tell apart, and lines differ by dashes
too. A chart that has nothing to show is None.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from abacist.learning.health.history import reward_names
from abacist.proof.comparison.compare import Comparison
from abacist.proof.comparison.sentence import bracket, percent, points
from abacist.proof.evaluation import Evaluation
from abacist.proof.metrics import SHARES
from abacist.proof.statistics import Interval
from abacist.task.rewards import built_in
from abacist.view.charts import difficulty_plot, difficulty_series
from abacist.view.plaintext import cut_middle, visible
from abacist.view.report.attribution import LENGTH, attribute, rewards_in, weights_of
from abacist.view.report.reading import LARGEST_NUMBER, Reading
from abacist.view.report.svg import INK, LINE, PAGE, Styles
from abacist.view.sheet import Table
from abacist.view.step import Step

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#8C6D00", "#7F7F7F")
DASHES = ("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)), (0, (1, 1)), (0, (8, 2)), (0, (3, 5)))
GREY, BLUE = "#8A8A8A", "#0072B2"
ROWS_SHOWN = 200  # of a table of steps; beyond, every second, third … step stands in it
_PANEL = (3.3, 2.15)  # inches
_MOST_BARS = 60  # drawn one by one; more are an area


@dataclass(frozen=True, slots=True)
class Chart:
    """A drawing, what it says in a sentence, and its numbers."""

    title: str
    caption: str
    svg: str
    table: Table


@dataclass(frozen=True, slots=True)
class Curve:
    """One line: its name, and its points (step, value)."""

    name: str
    points: Sequence[tuple[int, float]]


Points = list[tuple[int, float]]  # a step and a value


def _logged(name: str) -> Callable[[Reading], Points]:
    return lambda reading: reading.metric(name)


# What is drawn of the log beside the rewards: title, where it is read, what is shown of a value.
_PANELS: tuple[tuple[str, Callable[[Reading], Points], Callable[[float], float]], ...] = (
    ("tokens a reply", _logged("completions/mean_length"), float),
    ("replies that stop by themselves, %", _logged("completions/clipped_ratio"),
     lambda x: 100 * (1 - x)),
    ("steps that are right, %", _logged("step_reward"), lambda x: 100 * x),
    ("groups with signal, %", Reading.silent_groups, lambda x: 100 * (1 - x)),
    ("entropy, nats a token", _logged("entropy"), float),
    ("KL to the reference, nats a token", _logged("kl"), float),
    ("gradient norm", _logged("grad_norm"), float),
    ("loss", _logged("loss"), float),
    ("learning rate", _logged("learning_rate"), float),
)  # fmt: skip


def of_comparison(
    comparison: Comparison, styles: Styles, sides: tuple[str, str] = ("before", "after")
) -> list[Chart]:
    """Both sides: by what is measured, and by the number of steps a problem takes."""
    return [_by_measure(comparison, styles, sides), _by_difficulty(comparison, styles, sides)]


def of_evaluation(greedy: Evaluation, sampled: Evaluation | None, styles: Styles) -> Chart:
    """One evaluation: the plot that `abacist eval` writes, with its numbers."""
    figure = difficulty_plot(greedy, sampled, ink=INK, faint=LINE, page=PAGE)
    series = difficulty_series(greedy, sampled)
    table = [
        (row.label, f"{row.n:,}", *(_with_bounds(values[at]) for values in series.values()))
        for at, row in enumerate(greedy.by_difficulty())
    ]
    return Chart(
        "By the number of steps a problem takes",
        f"{len(greedy.problems):,} problems; bars are 95 % intervals. Few problems say little.",
        styles.add(figure, "Correctness, structure and consistency by number of steps"),
        Table(("steps", "problems", *series), table),
    )


def of_training(readings: Sequence[Reading], styles: Styles) -> list[Chart]:
    """The learning curves of one run, or of several over one another."""
    charts = [_rewards(readings, styles), _accuracy(readings, styles)]
    for title, points_of, shown in _PANELS:
        curves = [
            Curve(one.name, [(step, shown(value)) for step, value in points_of(one)])
            for one in readings
        ]
        charts.append(_lines(title, curves, styles))
    return [chart for chart in charts if chart is not None]


def of_rewards(reading: Reading, styles: Styles) -> list[Chart]:
    """Who earned the advantage, how rewards are spread, and where the time went, of one run."""
    charts = [_attribution(reading, styles), _spread(reading, styles), _time(reading, styles)]
    return [chart for chart in charts if chart is not None]


def _by_measure(comparison: Comparison, styles: Styles, sides: tuple[str, str]) -> Chart:
    names = [name for name in SHARES if name in comparison.changes and name != "lm_eval_strict"]
    before, after = comparison.before.figures, comparison.after.figures
    figure, axes = _canvas((7.2, 0.42 * len(names) + 0.9))
    for shift, figures, colour, when in (
        (-0.17, before, GREY, sides[0]),
        (0.17, after, BLUE, sides[1]),
    ):
        _bars(axes, [figures[name] for name in names], shift, colour, when, horizontal=True)
    axes.set_yticks(range(len(names)), [SHARES[name] for name in names])
    axes.invert_yaxis()
    axes.set_xlim(0, 100)
    axes.grid(axis="x", color=LINE, linewidth=0.8)
    axes.set_xlabel("% of replies, with 95 % intervals")
    _legend(figure, axes)
    rows = [
        (
            SHARES[name],
            *(percent(found[name]) for found in (before, after)),
            points(comparison.changes[name].value),
            bracket(comparison.changes[name]),
        )
        for name in names
    ]
    return Chart(
        f"{sides[0].capitalize()} and {sides[1]}, by what is measured",
        f"{len(comparison.before.problems):,} problems, the same both times.",
        styles.add(figure, f"Shares of replies, {sides[0]} and {sides[1]}, by measure"),
        Table(("measure", *sides, "change", "95 % interval"), rows),
    )


def _by_difficulty(comparison: Comparison, styles: Styles, sides: tuple[str, str]) -> Chart:
    both = [side.by_difficulty() for side in (comparison.before, comparison.after)]
    figure, axes = _canvas((7.2, 3.0))
    for shift, rows, colour, when in (
        (-0.2, both[0], GREY, sides[0]),
        (0.2, both[1], BLUE, sides[1]),
    ):
        _bars(axes, [row.accuracy for row in rows], shift, colour, when)
    labels = [f"{row.label.replace('more than ', '> ')}\nn = {row.n:,}" for row in both[0]]
    axes.set_xticks(range(len(labels)), labels)
    axes.set_ylim(0, 100)
    axes.grid(axis="y", color=LINE, linewidth=0.8)
    axes.set_ylabel("correct, %")
    _legend(figure, axes)
    table = [
        (one.label, f"{one.n:,}", *(f"{percent(row.accuracy)} {_bounds(row.accuracy)}"
                                    for row in (one, other)),
         f"{percent(one.adherence)} → {percent(other.adherence)}")
        for one, other in zip(*both, strict=True)
    ]  # fmt: skip
    return Chart(
        "Correct answers by the number of steps a problem takes",
        "Brackets hold 95 % intervals (Wilson). Few problems say little.",
        styles.add(figure, f"Correct answers, {sides[0]} and {sides[1]}, by number of steps"),
        Table(("steps", "problems", *sides, "structure adherence"), table),
    )


def _bars(
    axes: Any, found: list[Interval], shift: float, colour: str, when: str, horizontal: bool = False
) -> None:
    values = [100 * one.value if math.isfinite(one.value) else 0.0 for one in found]
    errors = [
        [max(0.0, 100 * (one.value - one.low)) if math.isfinite(one.low) else 0.0 for one in found],
        [max(0.0, 100 * (one.high - one.value)) if math.isfinite(one.high) else 0.0
         for one in found],
    ]  # fmt: skip
    places = [number + shift for number in range(len(found))]
    bar = {"color": colour, "label": when, "error_kw": {"ecolor": INK, "elinewidth": 1.1}}
    if horizontal:
        axes.barh(places, values, 0.32, xerr=errors, capsize=2, **bar)
    else:
        axes.bar(places, values, 0.38, yerr=errors, capsize=2.5, **bar)


def _rewards(readings: Sequence[Reading], styles: Styles) -> Chart | None:
    """One run: a line a reward. Several: the sum alone, a line a run."""
    if len(readings) > 1:
        curves = [Curve(one.name, one.metric("reward")) for one in readings]
        return _lines("reward, weighted sum", curves, styles)
    reading = readings[0]
    names = list(
        dict.fromkeys(name for row in reading.steps.values() for name in reward_names(row))
    )
    curves = []
    for name in names:
        ours = built_in(name)
        most = ours.maximum if ours else 1.0
        mean = reading.metric(f"rewards/{name}/mean")
        shown = [(step, 100 * value / most) for step, value in mean] if ours else mean
        curves.append(Curve(_short(name) + (f" (of {most:g})" if ours else ""), shown))
    return _lines(
        "rewards, mean of each step, % of the most it pays", curves, styles, size=(7.2, 3.0),
        caption="A reward of your own is drawn as it is paid.",
    )  # fmt: skip


def _accuracy(readings: Sequence[Reading], styles: Styles) -> Chart | None:
    curves = []
    for one in readings:
        own = f"{_short(one.name)}: " if len(readings) > 1 else ""
        right = ((step, Step.read(row).right_fraction) for step, row in one.steps.items())
        sampled = [(step, 100 * share) for step, share in right if share is not None]
        curves.append(Curve(f"{own}sampled, in training", sampled))
        measured = [(step, 100 * value) for step, value in one.measurement("eval_accuracy")]
        curves.append(Curve(f"{own}greedy, on the selection problems", measured))
    return _lines("correct, %", curves, styles)


def _attribution(reading: Reading, styles: Styles) -> Chart | None:
    weights = weights_of(reading.settings, rewards_in(reading.rollouts))
    way = reading.settings.get("multi_objective_aggregation")
    found = attribute(reading.rollouts, weights, normalized=way == "normalize_then_sum")
    if found is None:  # somebody's own script, whose weights nobody wrote down
        return None
    curves = [
        Curve(_short(name), [(step, 100 * value) for step, value in _known(found.steps, shares)])
        for name, shares in found.shares.items()
    ]
    length = [(step, 100 * value) for step, value in _known(found.steps, found.length)]
    paid = " Steps were paid as well (--step_reward_weight), which is not in these shares."
    chart = _lines(
        "what earned the advantage, %",
        [*curves, Curve(f"{LENGTH} alone explains", length)],
        styles,
        size=(7.2, 3.0),
        caption=(
            "The share of each reward in the differences between the replies of a group; those of "
            "a step add up to 100. Below 0, a reward paid for the replies that the others held to "
            "be worse. Apart from these, how much of the advantage the length of a reply explains "
            "by itself. All replies count, also where only some of a group are trained on."
            + (paid if "steps" in reading.rollouts.column_names else "")
        ),
    )
    return chart


def _known(steps: Iterable[int], values: Iterable[float | None]) -> list[tuple[int, float]]:
    return [(step, value) for step, value in zip(steps, values, strict=True) if value is not None]


def _spread(reading: Reading, styles: Styles) -> Chart | None:
    """How rewards are spread at each step, as a map of counts."""
    table = reading.rollouts
    if not table.num_rows:
        return None
    reward_N = table["reward"].to_numpy(zero_copy_only=False).astype(float)
    step_N = table["step"].to_numpy()
    known = np.abs(reward_N) < LARGEST_NUMBER  # nan is not
    if not known.any():
        return None
    reward_N, step_N = reward_N[known], step_N[known]
    low, high = float(reward_N.min()), float(reward_N.max())
    edges = np.linspace(low, high if high > low else low + 1, 21)
    steps = np.unique(step_N)
    if is_thinned := len(steps) > 300:  # neighbours share a column
        steps = steps[:: math.ceil(len(steps) / 300)]
    column = np.searchsorted(steps, step_N, side="right") - 1
    counts, *_ = np.histogram2d(reward_N, column, bins=[edges, np.arange(len(steps) + 1) - 0.5])
    shares = 100 * counts / np.maximum(counts.sum(axis=0), 1)
    figure, axes = _canvas((7.2, 2.6))
    image = axes.imshow(
        shares, aspect="auto", origin="lower", cmap="cividis", interpolation="nearest",
        extent=(0.5, len(steps) + 0.5, edges[0], edges[-1]),
    )  # fmt: skip
    bar = figure.colorbar(image, ax=axes, pad=0.01)
    bar.set_label("% of the step's replies", color=INK, fontsize=9)
    bar.ax.tick_params(labelsize=8, colors=INK)
    bar.outline.set_visible(False)
    axes.set_ylabel("reward of a reply")
    axes.set_xlabel("optimizer step")
    marks = np.arange(0, len(steps), math.ceil(len(steps) / 8))
    axes.set_xticks(marks + 1, [str(steps[at]) for at in marks])
    quarters = [0, 25, 50, 75, 100]
    rows = []
    for step in _thinned(steps.tolist()):
        of_step = np.percentile(reward_N[step_N == step], quarters)
        rows.append((str(step), *(f"{value:.2f}" for value in of_step)))
    return Chart(
        "How rewards are spread, over time",
        f"Each column is {'some steps' if is_thinned else 'a step'}: bright where many replies "
        "earned that much.",
        styles.add(figure, "Map of rewards by step"),
        Table(("step", "least", "quarter", "median", "three quarters", "most"), rows),
    )


def _time(reading: Reading, styles: Styles) -> Chart | None:
    whole = reading.seconds_of("step_time")
    if not sum(whole.values()):
        return None
    rollout, measuring = reading.seconds_of("rollout_time"), reading.seconds_of("eval_runtime")
    parts: dict[str, Mapping[int, float]] = {}
    if rollout:
        parts["rollout"] = rollout
        parts["training"] = {s: max(0.0, whole[s] - rollout.get(s, 0.0)) for s in whole}
    else:
        parts["step"] = whole
    if measuring:
        parts["measuring"] = measuring
    steps = sorted({step for part in parts.values() for step in part})
    figure, axes = _canvas((7.2, 2.4))
    heights = [np.array([part.get(step, 0.0) for step in steps]) for part in parts.values()]
    if len(steps) > _MOST_BARS:
        names = list(parts)
        axes.stackplot(steps, heights, step="mid", labels=names, colors=COLOURS, linewidth=0)
    else:
        bottom = np.zeros(len(steps))
        for name, height, colour in zip(parts, heights, COLOURS, strict=False):
            axes.bar(steps, height, 1.0, bottom=bottom, color=colour, label=name, linewidth=0)
            bottom += height
    axes.grid(axis="y", color=LINE, linewidth=0.8)
    axes.set_ylabel("seconds")
    axes.set_xlabel("optimizer step")
    _legend(figure, axes)
    total = sum(sum(part.values()) for part in parts.values())
    shares = ", ".join(f"{name} {sum(part.values()) / total:.0%}" for name, part in parts.items())
    rows = [
        (str(step), *(f"{part[step]:.1f}" if step in part else "" for part in parts.values()))
        for step in _thinned(steps)
    ]
    return Chart(
        "Where the time went",
        f"{total / 3600:.1f} h in all: {shares}." if total > 3600 else
        f"{total:.0f} s in all: {shares}.",
        styles.add(figure, "Seconds of each step by part"),
        Table(("step", *parts), rows),
    )  # fmt: skip


def _lines(
    title: str,
    curves: Sequence[Curve],
    styles: Styles,
    *,
    size: tuple[float, float] = _PANEL,
    caption: str = "",
) -> Chart | None:
    """Lines over steps; None where no curve has a point."""
    drawn = [(number, curve) for number, curve in enumerate(curves) if curve.points]
    if not drawn:
        return None
    figure, axes = _canvas(size)
    for number, curve in drawn:
        style = DASHES[number % len(DASHES)] if len(drawn) > 1 else "-"
        few = len(curve.points) < 25
        axes.plot(
            [step for step, _ in curve.points], [value for _, value in curve.points],
            color=COLOURS[number % len(COLOURS)], linestyle=style, linewidth=1.6,
            marker="o" if few else None, markersize=3.2, label=_label(curve.name),
        )  # fmt: skip
    values = [value for _, curve in drawn for _, value in curve.points]
    if title.endswith("%") and min(values) >= 0 and max(values) <= 100:
        axes.set_ylim(-3, 104)
    axes.grid(axis="y", color=LINE, linewidth=0.8)
    axes.set_xlabel("optimizer step")
    axes.xaxis.get_major_locator().set_params(integer=True)
    if len(drawn) > 1:
        _legend(figure, axes)
    steps = sorted({step for _, curve in drawn for step, _ in curve.points})
    by_step = [dict(curve.points) for _, curve in drawn]
    rows = [
        (str(step), *(f"{values[step]:.4g}" if step in values else "" for values in by_step))
        for step in _thinned(steps)
    ]
    heading = ("step", *(_short(curve.name) for _, curve in drawn))
    return Chart(
        title[0].upper() + title[1:] if title[:2] != "KL" else title,
        caption, styles.add(figure, title), Table(heading, rows),
    )  # fmt: skip


def _thinned(steps: Sequence[int]) -> Sequence[int]:
    """At most :data:`ROWS_SHOWN` of the steps, evenly, the last among them."""
    every = math.ceil(len(steps) / ROWS_SHOWN)
    kept = list(steps[::every]) if every > 1 else list(steps)
    return kept if not steps or kept[-1] == steps[-1] else [*kept, steps[-1]]


def _canvas(size: tuple[float, float]) -> tuple[Any, Any]:
    figure = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(figure)
    axes: Any = figure.subplots()
    axes.set_axisbelow(True)
    axes.tick_params(length=0, labelsize=9, labelcolor=INK)
    axes.xaxis.label.set(color=INK, fontsize=9)
    axes.yaxis.label.set(color=INK, fontsize=9)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(LINE)
    axes.patch.set_facecolor(PAGE)
    return figure, axes


def _legend(figure: Any, axes: Any) -> None:
    handles, labels = axes.get_legend_handles_labels()
    columns = min(len(labels), 3 if figure.get_figwidth() > 5 else 1)
    figure.legend(
        handles, labels, loc="outside upper left", ncols=columns, frameon=False, fontsize=9,
        labelcolor=INK, handlelength=2.6,
    )  # fmt: skip


def _with_bounds(interval: Interval | None) -> str:
    return f"{percent(interval)} {_bounds(interval)}" if interval else ""


def _bounds(interval: Interval) -> str:
    if not math.isfinite(interval.low):
        return ""
    return f"[{100 * interval.low:.0f}–{100 * interval.high:.0f}]"


def _short(name: str) -> str:
    """A name that somebody gave, harmless and short."""
    return cut_middle(visible(name), 40).replace("\n", " ")


def _label(name: str) -> str:
    """A name as matplotlib shows it as it stands: dollars begin no TeX, ``_`` hides no line."""
    shown = _short(name).replace("$", r"\$")
    return f"\u200b{shown}" if shown.startswith("_") else shown
