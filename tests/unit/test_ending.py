"""A run's page and card are written at its end, and their faults cost nothing else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from abacist.delivery import ending
from made_runs import made_run


def fails(*_: Any) -> None:
    raise RuntimeError("no fonts\nand a second line")


def test_a_run_gets_its_page_and_a_finished_one_keeps_it(tmp_path: Path) -> None:
    run = made_run(tmp_path / "run")
    page = ending.write_page_and_card(run)
    assert page == run / "report.html" and page.exists()
    page.write_text("kept", encoding="utf-8")
    assert ending.write_page_and_card(run) == page
    assert page.read_text(encoding="utf-8") == "kept"


@pytest.mark.parametrize(
    ("part", "told"),
    [("write_report", "The report was not written"), ("write_run_card", "The model card was not")],
)
def test_a_fault_of_the_page_or_the_card_is_one_line(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    part: str,
    told: str,
) -> None:
    run = made_run(tmp_path / "run")
    monkeypatch.setattr(ending, "write_run_card", lambda run: None)
    monkeypatch.setattr(ending, part, fails)
    page = ending.write_page_and_card(run)
    assert (page is None) is (part == "write_report")
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(told) and line.endswith("no fonts")
