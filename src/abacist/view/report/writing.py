"""From the folders of runs to the file of their report."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from abacist.errors import UsageError, first_line
from abacist.proof.comparison.compare import Comparison
from abacist.proof.evaluation import Evaluation
from abacist.records.rundir import write_aside
from abacist.view.charts import save_difficulty_chart
from abacist.view.evaltext import PLOT_NAME, evaluation_markdown
from abacist.view.report.explorer import REPLIES_IN_PAGE
from abacist.view.report.page import PAGE_NAME, comparison_page, page
from abacist.view.report.reading import read
from abacist.view.sheet import Block

HTML_SUFFIXES = (".html", ".htm")
_OURS = ("Abacist report</title>", "# Abacist comparison\n")  # one is in each page's first lines


def default_path(paths: Sequence[Path]) -> Path:
    """Where the report of these runs goes: into the run, or beside the user for several."""
    return paths[0] / PAGE_NAME if len(paths) == 1 else Path(PAGE_NAME)


def write_report(
    paths: Sequence[Path], target: Path, *, replies: int = REPLIES_IN_PAGE
) -> dict[str, Any]:
    """Read the runs and write their page to ``target``, whole or not at all.

    Returns the remarks on what is missing or damaged, and the size in bytes. Raises RunError for a
    folder that holds no run, UsageError where ``target`` is a folder or a file that is no page.
    """
    refuse_unfit(target)
    readings = [read(path) for path in paths]
    text = page(readings, replies=replies).encode("utf-8", "backslashreplace")
    write_aside(target, text)
    remarks = [
        f"{reading.name}: {line}" if len(readings) > 1 else line
        for reading in readings
        for line in reading.remarks
    ]
    return {"remarks": remarks, "bytes": len(text)}


def write_evaluation(folder: Path, greedy: Evaluation, sampled: Evaluation | None) -> None:
    """Write what a person reads of an evaluation beside it: Markdown, the plot, and the page."""
    text = evaluation_markdown(greedy, sampled)
    write_aside(folder / "evaluation.md", text.encode("utf-8", "backslashreplace"))
    save_difficulty_chart(folder / PLOT_NAME, greedy, sampled)
    try:
        write_report([folder], folder / PAGE_NAME)
    except Exception as error:  # the figures are kept without it
        print(f"The page was not written: {first_line(error)}", file=sys.stderr)


def write_comparison(
    target: Path,
    blocks: Sequence[Block],
    names: tuple[str, str],
    comparison: Comparison | None = None,
) -> None:
    """Write what a comparison says to ``target``, whole or not at all; UsageError as above."""
    refuse_unfit(target)
    text = comparison_page(blocks, names, comparison)
    write_aside(target, text.encode("utf-8", "backslashreplace"))


def refuse_unfit(target: Path, kind: str = "HTML", *suffixes: str) -> None:
    """Raise UsageError where no file of this kind can be written to ``target``.

    That is a folder, a file that holds anything but a page of ours, or a place that cannot be
    written to. Asked before the work whose result goes there, which may take a while.
    """
    suffixes = suffixes or HTML_SUFFIXES
    if str(target) == "-":
        raise UsageError(
            f"{kind} is written to a file, not to stdout", f"Name a file that ends {suffixes[0]}."
        )
    if target.is_dir():
        name = Path(PAGE_NAME).with_suffix(suffixes[0])
        raise UsageError(f"{target} is a folder", f"Name a file: {target / name}")
    if target.exists() and target.suffix.lower() not in suffixes:
        raise UsageError(
            f"{target} exists and is no {kind} file: it is left alone",
            f"Name a file that ends {suffixes[0]}.",
        )
    folder = next((one for one in target.absolute().parents if one.exists()), Path("/"))
    try:
        if target.exists():
            if not target.is_file():
                raise OSError(None, "it is no regular file")
            with target.open(encoding="utf-8", errors="replace") as file:
                head = file.read(20_000)
            if head and not any(mark in head for mark in _OURS):
                raise UsageError(
                    f"{target} exists and is no page of Abacist's: it is left alone",
                    "Name another file, or remove that one.",
                )
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise UsageError(
            f"{target} cannot be written: {error.strerror or error}", "Choose another place."
        ) from error
