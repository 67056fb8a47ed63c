"""A run's completions become Trackio traces: all of them, or a sample, whatever they hold."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from abacist.errors import RunError, UsageError
from abacist.records.provenance import build_manifest
from abacist.records.rollout import Rollout, StopReason, write_rollouts
from abacist.records.rundir import RunDir
from abacist.task.step_rewards import StepReward
from abacist.view import trackio_traces
from abacist.view.trackio_traces import log_traces

HOSTILE = '<script>alert(1)</script>\x1b[2J\x00\ud800\u202e=cmd|" /C calc"!A0'


def rollout(step: int, member: int, completion: str = "<answer>4</answer>", **more: Any) -> Rollout:
    return Rollout(
        run_id="r", step=step, split="train", group=0, member=member,
        messages=[{"role": "user", "content": "2 + 2?"}], completion=completion,
        completion_ids=[1], prompt_tokens=3, completion_tokens=1, stop_reason=StopReason.STOPPED,
        gold="4", read_answer="4", is_correct=True, rewards={"correctness": 2.0, "mine": None},
        reward=2.0, advantage=0.5, **more,
    )  # fmt: skip


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    run = RunDir(tmp_path / "arith")
    run.write_manifest(build_manifest(seed=0, argv=["train"]))
    for step in (1, 2):
        replies = [rollout(step, member, HOSTILE if member else "4") for member in range(3)]
        write_rollouts(run.rollouts_dir / f"step-{step:06d}.parquet", replies)
    return run


def test_every_completion_becomes_a_trace_and_a_second_export_replaces_the_first(
    run: RunDir, tmp_path: Path
) -> None:
    pytest.importorskip("trackio")
    code = (
        "import json, sys; from pathlib import Path\n"
        "from abacist.view.trackio_traces import log_traces\n"
        "import trackio\n"
        "trackio.init('arithmetic', name='arith-rollouts'); trackio.log({'mine': 1})\n"
        "trackio.finish()\n"  # a person's own, by chance of that name
        "counts = [log_traces(Path(sys.argv[1]), 'arithmetic') for _ in range(2)]\n"
        "from trackio.sqlite_storage import SQLiteStorage as S\n"
        "runs = S.get_run_records('arithmetic')\n"
        "traces = [S.get_traces('arithmetic', r['name'], run_id=r['id']) for r in runs]\n"
        "print('\\n' + json.dumps([counts, traces]))\n"
    )
    ours = {k: v for k, v in os.environ.items() if not k.startswith("TRACKIO")}
    ours |= {"TRACKIO_DIR": str(tmp_path / "db"), "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, "-c", code, str(run.path)], env=ours, cwd=tmp_path, capture_output=True,
        text=True, encoding="utf-8", timeout=120, stdin=subprocess.DEVNULL,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    counts, per_run = json.loads(done.stdout.splitlines()[-1])
    assert counts == [6, 6] and sorted(map(len, per_run)) == [0, 6]
    traces = max(per_run, key=len)
    assert sorted(trace["step"] for trace in traces) == [1, 1, 1, 2, 2, 2]
    said = [trace["messages"][-1]["content"] for trace in traces]
    assert said.count(HOSTILE.replace("\ud800", "\ufffd")) == 4  # as Parquet keeps it
    about = traces[0]["metadata"]
    assert about["gold"] == about["read_answer"] == "4" and about["is_correct"] is True
    assert about["rewards/correctness"] == 2.0 and about["advantage"] == 0.5
    assert "rewards/mine" not in about


class StandIn:
    """Trackio as far as it is called, remembering what is logged."""

    __version__ = "1"

    def __init__(self) -> None:
        self.logged: list[tuple[int, list[dict[str, Any]]]] = []
        self.finished = False

    def init(self, **how: Any) -> None:
        self.how = how

    def log(self, metrics: dict[str, Any], step: int) -> None:
        self.logged.append((step, metrics["completions"]))

    def finish(self) -> None:
        self.finished = True

    Trace = staticmethod(lambda messages, metadata: {"messages": messages, **metadata})


def test_a_sample_of_a_long_run_is_the_same_each_time_and_is_said(
    run: RunDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trackio_traces, "MOST_TRACES", 4)
    said: list[str] = []
    found = []
    for _ in range(2):
        stand_in = StandIn()
        monkeypatch.setattr(trackio_traces, "_trackio", lambda found=stand_in: found)
        assert log_traces(run.path, "p", said.append) == 4 and stand_in.finished
        assert stand_in.how["config"]["completions"] == 6
        found.append(stand_in.logged)
    assert found[0] == found[1] and sum(len(traces) for _, traces in found[0]) == 4
    assert said == ["6 completions: 4 of them, drawn at random, become traces"] * 2


def test_a_trace_tells_how_steps_were_paid(run: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    steps = [StepReward(0, 3, 1.0), StepReward(3, 5, 0.0), StepReward(5, 9, 0.0)]
    write_rollouts(run.rollouts_dir / "step-000003.parquet", [rollout(3, 0, steps=steps)])
    stand_in = StandIn()
    monkeypatch.setattr(trackio_traces, "_trackio", lambda: stand_in)
    log_traces(run.path, "p")
    told = [trace.get("steps") for _, traces in stand_in.logged for trace in traces]
    assert told == [None] * 6 + ["1 right, 2 wrong"]


def test_what_cannot_be_logged_is_refused_before_anything_is(
    run: RunDir, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stand_in = StandIn()
    monkeypatch.setattr(trackio_traces, "_trackio", lambda: stand_in)
    with pytest.raises(RunError, match="no such run"):
        log_traces(tmp_path / "nowhere", "p")
    (run.rollouts_dir / "step-000002.parquet").write_bytes(b"PAR1 torn")
    with pytest.raises(RunError, match=r"step-000002\.parquet"):
        log_traces(run.path, "p")
    for path in run.rollouts_dir.iterdir():
        path.unlink()
    with pytest.raises(UsageError, match="keeps no rollouts"):
        log_traces(run.path, "p")
    assert not hasattr(stand_in, "how")


def test_without_trackio_or_its_traces_the_mend_is_said(
    run: RunDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "trackio", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UsageError, match="not installed") as error:
        log_traces(run.path, "p")
    assert "pip install" in error.value.hint
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    monkeypatch.setitem(sys.modules, "trackio", type("Old", (), {"__version__": "0.10"}))
    with pytest.raises(UsageError, match=r"0\.10 has no traces"):
        log_traces(run.path, "p")
