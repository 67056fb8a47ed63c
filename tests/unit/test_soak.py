"""The ledger of the soak: what is done is not done again, what failed is, and nothing is hidden."""

from __future__ import annotations

from pathlib import Path

import pytest

from soak import ledger
from soak.ledger import Ledger, Trial


def a_trial(*wrong: str) -> Trial:
    trial = Trial(seen={"most steps lost": 1.0}, seconds=30.0)
    trial.expect("killed after 1 s", [])
    trial.expect("killed after 2 s", wrong)
    return trial


def begun(path: Path) -> Ledger:
    kept = Ledger(path)
    kept.begin("kills", "make soak")
    return kept


def test_a_soak_goes_on_where_it_was_and_makes_again_what_failed(tmp_path: Path) -> None:
    first = begun(tmp_path / "soak.json")
    first.keep("kills", "run 0", a_trial())
    first.keep("kills", "run 1", a_trial("metrics.jsonl"))
    again = begun(tmp_path / "soak.json")
    assert again.trial("kills", "run 0") == a_trial()
    assert again.trial("kills", "run 1") is None and again.trial("kills", "run 2") is None
    assert again.failures(["kills"]) == ["kills, run 1: killed after 2 s: metrics.jsonl"]


def test_what_was_found_with_other_code_is_begun_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun(tmp_path / "soak.json").keep("kills", "run 0", a_trial())
    monkeypatch.setattr(ledger, "source_sum", lambda: "another")
    assert begun(tmp_path / "soak.json").trial("kills", "run 0") is None


def test_the_table_counts_what_failed_and_names_what_was_not_run(tmp_path: Path) -> None:
    kept = begun(tmp_path / "soak.json")
    kept.keep("kills", "run 0", a_trial())
    kept.keep("kills", "run 1", a_trial("metrics.jsonl"))
    table = kept.table({"kills": "killed", "sigterm": "told to end"})
    assert "| killed | 3 | 1 | most steps lost 1 | 1.0 |" in table
    assert "| told to end | not run |" in table
    assert f"Run by `make soak` on {ledger.machine()}." in table
