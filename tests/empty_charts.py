"""Pages that runs end with, with empty charts: to draw them takes as long as all else of a run.

All else of such a page is as ever. Charts are drawn where a page is asked for (test_report.py and
test_report_replies.py), and at the end of the run of test_train.py.
"""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest

from abacist.delivery import ending
from abacist.view.report.writing import write_report

EMPTY = '<svg viewBox="0 0 600 300"><g id="figure_1"></g></svg>'


def _save_nothing(self: Any, target: Any, **how: Any) -> None:
    target.write(EMPTY)


def _write(*args: Any, **how: Any) -> Any:
    with mock.patch("matplotlib.figure.Figure.savefig", _save_nothing):
        return write_report(*args, **how)


def leave_charts_empty(patch: pytest.MonkeyPatch) -> None:
    """From here on, in this process."""
    patch.setattr(ending, "write_report", _write)


def draw_charts(patch: pytest.MonkeyPatch) -> None:
    """As without :func:`leave_charts_empty`."""
    patch.setattr(ending, "write_report", write_report)
