"""The pictures of the README: one command remakes them all from a run.

    make pictures RUN=runs/tiny-001        # or: python tools/pictures.py RUN docs

``first-run.png`` shows how the run went and what its verdict is. ``report.png`` and ``replies.png``
are the page of ``abacist report``, and ``terminal.png`` is the terminal in the middle of the run,
as Chromium shows them; without Chromium or Playwright they are left as they are.
"""

from __future__ import annotations

import argparse
import io
import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from rich.console import Console, RenderableType
from rich.terminal_theme import MONOKAI
from rich.text import Text

from abacist.proof.evaluation import Evaluation
from abacist.records.rollout import read_rollouts
from abacist.records.rundir import RunDir, read_json_lines
from abacist.view.live import Live
from abacist.view.report.writing import write_report

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
CHROMIUM = ("chromium", "chromium-browser", "google-chrome")


def main() -> None:
    """Writes the pictures of a run into a folder and names them."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("run", type=Path)
    parser.add_argument("folder", type=Path)
    options = parser.parse_args()
    draw_first_run(options.run, options.folder / "first-run.png")
    print(options.folder / "first-run.png")
    for path in take_screenshots(options.run, options.folder):
        print(path)


def draw_first_run(run: Path, picture: Path) -> None:
    """Rewards in training on the left, correct answers by difficulty on the right."""
    figure = Figure(figsize=(10, 3.4), dpi=130, layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    draw_rewards(left, run)
    draw_verdict(right, run)
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
        axes.set_ylim(0, 105)
        axes.grid(axis="y", color="#e5e5e5", linewidth=0.8)
        axes.set_axisbelow(True)
    figure.savefig(picture, metadata={"Software": None})


class Recorded:
    """A screen of a terminal that keeps what was drawn last."""

    draws, redraw_seconds, size, ascii_only = True, 0.0, (92, 38), False
    panel: RenderableType = ""

    def print(self, text: Text) -> None:
        """Lines above the panel are not in the picture."""

    def draw(self, panel: RenderableType) -> None:
        self.panel = panel

    def close(self) -> None:
        """What was drawn last stays."""


def terminal_html(run: Path, step: int) -> str:
    """The live view of a run as it was while the step after ``step`` was in work, as HTML."""
    screen, clock = Recorded(), [0.0]
    live = Live(screen=screen, clock=lambda: clock[0])
    folder = RunDir(run)
    seconds = {row["step"]: row for row in read_json_lines(folder.timings_path)[0]}
    max_steps = folder.read_settings()["max_steps"]
    for row in read_json_lines(folder.metrics_path)[0]:
        if row["step"] > step:
            break
        clock[0] += seconds.get(row["step"], {}).get("step_time", 0.0) * ("loss" in row)
        live.step({**row, **seconds.get(row["step"], {}), "max_steps": max_steps})
    live.replies(step, read_rollouts(folder.rollouts_dir / f"step-{step:06d}.parquet"))
    live.within_step(step + 1, "rollouts", 0, 64, "0 of 64 replies")
    clock[0] += 1.5
    live.within_step(step + 1, "rollouts", 40, 64, "40 of 64 replies, token 31 of at most 96")
    console = Console(
        file=io.StringIO(), record=True, width=screen.size[0], force_terminal=True,
        color_system="truecolor", _environ={},  # coloured also where NO_COLOR is set
    )  # fmt: skip
    console.print(screen.panel)
    style = "padding:1rem 1.2rem;margin:0;display:inline-block;font:14px/1.35 'DejaVu Sans Mono'"
    body = f'<pre style="{style};background:#16181c;color:#e6e6e6">{{code}}</pre>'
    return console.export_html(
        theme=MONOKAI,
        inline_styles=True,
        code_format=f'<body style="margin:0;background:#16181c">{body}</body>',
    )


def take_screenshots(run: Path, folder: Path) -> list[Path]:
    """The report and the terminal as a browser shows them."""
    program = next(filter(None, map(shutil.which, CHROMIUM)), None)
    if program is None:
        print("no Chromium here: the pictures of pages are left as they are")
        return []
    from playwright.sync_api import sync_playwright

    first, replies, terminal = (folder / f"{n}.png" for n in ("report", "replies", "terminal"))
    with tempfile.TemporaryDirectory() as place, sync_playwright() as playwright:
        page_path = Path(place) / "report.html"
        write_report([run], page_path)
        browser = playwright.chromium.launch(executable_path=program, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1000, "height": 1010})
        page.goto(page_path.as_uri())
        page.screenshot(path=first)
        page.set_viewport_size({"width": 1100, "height": 760})
        page.select_option("select[name=source]", label="training")
        page.locator("#replies h2").scroll_into_view_if_needed()
        page.evaluate("document.getElementById('replies').scrollIntoView()")
        page.screenshot(path=replies)
        # A page of its own: the report's security policy would forbid the colours.
        page = browser.new_page(viewport={"width": 860, "height": 700})
        page.set_content(terminal_html(run, step=12))
        page.locator("pre").screenshot(path=terminal)
        browser.close()
    return [first, replies, terminal]


def draw_rewards(axes: Any, run: Path) -> None:
    text = (run / "metrics.jsonl").read_text(encoding="utf-8")
    rows = [row for row in map(json.loads, text.splitlines()) if "reward" in row]
    steps = [row["step"] for row in rows]
    for name, maximum in MAXIMA.items():
        means = [100 * row[f"rewards/{name}/mean"] / maximum for row in rows]
        axes.plot(steps, means, color=COLOURS[name], linewidth=1.8, label=name)
    axes.set_title("rewards in training, % of the maximum", loc="left", fontsize=10.5, color=INK)
    axes.set_xlabel("optimizer step", fontsize=9.5)
    axes.legend(frameon=False, fontsize=9, loc="lower right")


def draw_verdict(axes: Any, run: Path) -> None:
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
