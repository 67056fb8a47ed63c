"""`make gpu`, with stand-in parts on the CPU: it survives what fails, and goes on where it was."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

import gpu
from gpu import Part, run_all


def stand_in(name: str, code: str, minutes: float = 1) -> Part:
    return Part(name, [sys.executable, "-c", code], minutes)


def record(folder: Path, name: str) -> dict[str, object]:
    found: dict[str, object] = json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))
    return found


def test_without_a_gpu_it_says_so_in_one_line_and_fails(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--output", str(tmp_path / "out")])
    assert gpu.main() == 1
    said = capsys.readouterr().err
    assert said.startswith("no GPU here") and said.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_a_part_that_fails_or_hangs_or_is_not_there_stops_no_other(tmp_path: Path) -> None:
    them = [
        stand_in("fails", "import sys; print('the reason'); sys.exit(3)"),
        stand_in("hangs", "import time; time.sleep(600)", minutes=0.01),
        Part("absent", ["/no/such/program"], 1),
        Part("left", ["/no/such/program"], 1, skipped="no weights"),
        stand_in("works", "import os; print(os.environ['HF_HUB_OFFLINE'])"),
    ]
    assert run_all(them, tmp_path) == 1
    states = {part.name: record(tmp_path, part.name)["state"] for part in them}
    assert states == {
        "fails": "failed", "hangs": "out of time", "absent": "failed", "left": "skipped",
        "works": "done",
    }  # fmt: skip
    assert record(tmp_path, "fails")["last_lines"] == ["the reason"]
    assert record(tmp_path, "works")["last_lines"] == ["1"]


def test_the_same_command_repeats_only_what_is_not_done(tmp_path: Path) -> None:
    count = tmp_path / "count"
    works = stand_in("works", f"open({str(count)!r}, 'a').write('x')")
    flaky = stand_in("flaky", f"open({str(count)!r}, 'a').write('y'); raise SystemExit(1)")
    assert [run_all([works, flaky], tmp_path) for _ in range(2)] == [1, 1]
    assert count.read_text(encoding="utf-8") == "xyy"
    assert run_all([works], tmp_path, again=["works"]) == 0
    assert count.read_text(encoding="utf-8") == "xyyx"


def test_every_part_ends_within_nine_minutes_and_a_real_model_that_is_not_there_is_skipped(
    tmp_path: Path,
) -> None:
    them = gpu.parts(tmp_path, None, None)
    assert [part.name for part in them] == ["tests", "memory", "bench", "tiny", "real"]
    assert all(part.limit_minutes < 9 for part in them)
    for part in them:  # what a part names is there
        for word in part.command[1:]:
            assert not word.startswith(("bench/", "tests/")) or (gpu.ROOT / word).exists()
    assert them[-1].skipped and not gpu.parts(tmp_path, "model", "data")[-1].skipped
