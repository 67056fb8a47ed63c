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
    try:
        write_run_card(run)
    except Exception as error:
        print(f"The model card was not written: {first_line(error)}", file=sys.stderr)
    page, ended = default_path([run]), RunDir(run).manifest_path
    try:
        # A finished run that is asked to resume is left as it is.
        if not page.exists() or page.stat().st_mtime_ns < ended.stat().st_mtime_ns:
            write_report([run], page)
    except Exception as error:
        print(f"The report was not written: {first_line(error)}", file=sys.stderr)
        return None
    return page
