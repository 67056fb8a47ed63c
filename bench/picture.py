"""The picture in the README: how a run went, and what its verdict is.

    python bench/picture.py RUN docs/first-run.png

On the left the mean reward of each training step, one line for each reward, as a share of the most
that it pays. On the right correct answers before and after, by the number of steps a problem takes,
with 95 % intervals.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from abacist.proof.evaluation import Evaluation

# Okabe and Ito's colours, which colour-blind eyes tell apart.
COLOURS = {
    "correctness": "#0072B2",
    "integer": "#E69F00",
    "strict_format": "#D55E00",
    "soft_format": "#CC79A7",
    "xml_count": "#009E73",
}
MAXIMA = {
    "correctness": 2.0,
    "integer": 0.5,
    "strict_format": 0.5,
    "soft_format": 0.5,
    "xml_count": 0.5,
}
BEFORE, AFTER, INK = "#999999", "#0072B2", "#222222"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("run", type=Path)
    parser.add_argument("picture", type=Path)
    options = parser.parse_args()
    figure = Figure(figsize=(10, 3.4), dpi=130, layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    draw_rewards(left, options.run)
    draw_verdict(right, options.run)
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
        axes.set_ylim(0, 105)
        axes.grid(axis="y", color="#e5e5e5", linewidth=0.8)
        axes.set_axisbelow(True)
    figure.savefig(options.picture, metadata={"Software": None})


def draw_rewards(axes, run: Path) -> None:
    text = (run / "metrics.jsonl").read_text(encoding="utf-8")
    rows = [row for row in map(json.loads, text.splitlines()) if "reward" in row]
    steps = [row["step"] for row in rows]
    for name, maximum in MAXIMA.items():
        means = [100 * row[f"rewards/{name}/mean"] / maximum for row in rows]
        axes.plot(steps, means, color=COLOURS[name], linewidth=1.8, label=name)
    axes.set_title("rewards in training, % of the maximum", loc="left", fontsize=10.5, color=INK)
    axes.set_xlabel("optimizer step", fontsize=9.5)
    axes.legend(frameon=False, fontsize=9, loc="lower right")


def draw_verdict(axes, run: Path) -> None:
    for shift, when, colour in ((-0.2, "before", BEFORE), (0.2, "after", AFTER)):
        rows = Evaluation.load(run / "evals" / when).by_difficulty()
        rows = [row for row in rows if row.label[0].isdigit()]
        values = [100 * row.accuracy.value for row in rows]
        low = [100 * (row.accuracy.value - row.accuracy.low) for row in rows]
        high = [100 * (row.accuracy.high - row.accuracy.value) for row in rows]
        places = [number + shift for number in range(len(rows))]
        axes.bar(places, values, 0.38, color=colour, label=f"{when} training")
        axes.errorbar(places, values, [low, high], fmt="none", ecolor=INK, linewidth=1, capsize=3)
    labels = [f"{row.label}\n{row.n} problems" for row in rows]
    axes.set_xticks(range(len(rows)), labels, fontsize=9)
    title = "correct on held-out problems, %, with 95 % intervals"
    axes.set_title(title, loc="left", fontsize=10.5, color=INK)
    axes.legend(frameon=True, framealpha=0.95, edgecolor="none", fontsize=9, loc="lower left")


if __name__ == "__main__":
    main()
