"""``abacist report`` by the command line: what it writes, says, and refuses."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest

from abacist.cli.main import main
from made_runs import made_run

Captured = pytest.CaptureFixture[str]


def test_it_writes_one_file_into_the_run_and_names_it(tmp_path: Path, capsys: Captured) -> None:
    run = made_run(tmp_path / "run")
    before = {path.name for path in run.iterdir()}
    assert main(["report", str(run)]) == 0
    assert {path.name for path in run.iterdir()} - before == {"report.html"}
    assert str(run / "report.html") in capsys.readouterr().out


def test_what_is_missing_is_said_beside_the_path_and_in_json(
    tmp_path: Path, capsys: Captured
) -> None:
    run = made_run(tmp_path / "run", finished=False)
    (run / "rollouts/step-000001.parquet").write_bytes(b"")
    target = tmp_path / "pages" / "page.html"
    assert main(["report", str(run), "-o", str(target), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["report"] == str(target) and told["bytes"] == target.stat().st_size
    assert any("step-000001.parquet" in line for line in told["remarks"])


def test_several_runs_make_one_page_in_the_working_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("a", "b"):
        made_run(tmp_path / name, steps=2)
    assert main(["report", "a", "b"]) == 0
    assert (tmp_path / "report.html").exists() and not (tmp_path / "a/report.html").exists()


@pytest.mark.parametrize(
    ("argv", "code", "says"),
    [
        ([], 2, "required"),
        (["nowhere"], 1, "no such run"),
        (["."], 1, "holds no run"),
        (["run", "./run"], 2, "named twice"),
        (["run", "-o", "run"], 2, "is a folder"),
        (["run", "-o", "run/config.yaml"], 2, "left alone"),
        (["run", "--serve", "-o", "x.html"], 2, "writes no file"),
        (["run", "--serve", "--port", "99999"], 2, "cannot be used"),
        (["run", "--replies", "0"], 2, "--replies"),
    ],
)
def test_bad_input_is_one_message_and_writes_nothing(
    argv: list[str],
    code: int,
    says: str,
    tmp_path: Path,
    capsys: Captured,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    made_run(tmp_path / "run", steps=1, finished=False)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert main(["report", *argv]) == code
    said = capsys.readouterr().err
    assert says in said and "Traceback" not in said
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_a_served_report_ends_with_ctrl_c(tmp_path: Path) -> None:
    run = made_run(tmp_path / "run", finished=False)
    served = subprocess.Popen(
        [sys.executable, "-m", "abacist", "report", str(run), "--serve", "--port", "0"],
        stdout=subprocess.PIPE,
        text=True,
        encoding="utf-8",
        # A suite in the background is started with Ctrl-C ignored, and so would be its children.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert served.stdout is not None
    (address,) = re.findall(r"http://localhost:\d+/", served.stdout.readline())
    assert b"Abacist report" in urllib.request.urlopen(address).read()
    served.send_signal(signal.SIGINT)
    assert served.wait(timeout=60) == 0
