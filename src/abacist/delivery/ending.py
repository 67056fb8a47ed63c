"""What a run that has ended gets for people: its page, and the model card beside its weights."""

from __future__ import annotations

import sys
from pathlib import Path

from abacist.delivery.card import write_run_card
from abacist.errors import first_line
from abacist.records.rundir import RunDir
from abacist.view.report.writing import default_path, write_report


def write_page_and_card(run: Path) -> Path | None:
    """Write the report and the model card into a run; returns the report's path.

    Where one of them fails, for whatever reason, a line on stderr says why, and None stands for
    the report: the run and its verdict are whole without them.
    """
    ended = RunDir(run).manifest_path
    try:
        if _is_older(run / "README.md", ended):
            write_run_card(run)
    except Exception as error:
        print(f"The model card was not written: {first_line(error)}", file=sys.stderr)
    page = default_path([run])
    try:
        if _is_older(page, ended):
            write_report([run], page)
    except Exception as error:
        print(f"The report was not written: {first_line(error)}", file=sys.stderr)
        return None
    return page


def _is_older(file: Path, ended: Path) -> bool:
    """Whether a file is from before the run's end: a finished run that is resumed keeps its own."""
    return not file.exists() or file.stat().st_mtime_ns < ended.stat().st_mtime_ns
