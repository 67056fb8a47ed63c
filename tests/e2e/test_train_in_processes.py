"""``abacist train --accelerate_config multi_cpu``: a run on two processes, from start to end."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from abacist.cli.main import main
from abacist.records.openings import (
    AFTER,
    BEFORE,
    OPENINGS_NAME,
    SELECTION,
    TRAINING,
    read_openings,
)
from abacist.records.rollout import read_rollouts
from imported import Imported

pytestmark = [pytest.mark.e2e, pytest.mark.slow]

STEPS, REPLIES = 4, 16
ON_TWO = ["--accelerate_config", "multi_cpu", "--num_processes", "2"]
TASK = [
    "--num_heldout_problems", "4", "--num_consistency_problems", "2", "--num_selection_problems",
    "3", "--num_train_problems", "40", "--max_completion_length", "16", "--num_generations", "4",
]  # fmt: skip
FLAGS = [
    *TASK, "--max_steps", str(STEPS), "--save_steps", "2", "--eval_steps", "3", "--logging_steps",
    "1", "--per_device_train_batch_size", str(REPLIES // 2),
]  # fmt: skip
SAME = ("adapter_model.safetensors", "metrics.jsonl", "config.yaml", "evals", "rollouts")


def start(*arguments: str, log: Path) -> subprocess.Popen[str]:
    """``abacist train`` with the flags that start two processes."""
    with log.open("w", encoding="utf-8") as file:
        return subprocess.Popen(
            [sys.executable, "-m", "abacist", "train", *arguments, *ON_TWO],
            env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"},
            stdout=file,
            stderr=subprocess.STDOUT,
            text=True,
            encoding="utf-8",
        )


def resumed(run: Path, *flags: str, python: Imported) -> str:
    """What two processes say that go on with ``run``, one after the other.

    The launcher would start such processes, which import everything anew.
    """
    launched = {"ABACIST_LAUNCH_FLAGS": " ".join(ON_TWO), "ACCELERATE_USE_CPU": "true"}
    told = python.run_in(
        *(2, "-m", "abacist", "train", "--resume", str(run), *flags), env=python.env | launched
    )
    assert not any(one.returncode for one in told), [one.stderr[-3000:] for one in told]
    return "".join(one.stdout for one in told)


def ended(process: subprocess.Popen[str], log: Path, code: int = 0) -> str:
    process.wait(timeout=300)
    said = log.read_text(encoding="utf-8")
    assert process.returncode == code, said[-3000:]
    return said


def contents(run: Path) -> dict[str, bytes]:
    files = [path for name in SAME for path in [run / name, *(run / name).rglob("*")]]
    return {str(path.relative_to(run)): path.read_bytes() for path in files if path.is_file()}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on two processes that nobody disturbs: read only."""
    run, log = (tmp_path_factory.mktemp("two") / name for name in ("run", "log"))
    said = ended(start("--output_dir", str(run), *FLAGS, log=log), log)
    assert said.count("== Training") == 1  # one process speaks
    return run


def test_every_reply_is_recorded_once_and_in_the_order_of_one_process(
    whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    alone = tmp_path / "run"
    flags = [*TASK, "--max_steps", "1", "--per_device_train_batch_size", str(REPLIES)]
    assert main(["train", "--output_dir", str(alone), *flags, "--eval_strategy", "no"]) == 0
    capsys.readouterr()
    # Measured by both processes, and the same bytes.
    for kept in ("before/rollouts.parquet", "before-sampled/rollouts.parquet"):
        assert (whole / "evals" / kept).read_bytes() == (alone / "evals" / kept).read_bytes()
    names = [path.name for path in sorted((whole / "rollouts").iterdir())]
    assert names == [f"step-{step:06d}.parquet" for step in range(1, STEPS + 1)]
    ours, theirs = (read_rollouts(run / "rollouts" / names[0]) for run in (whole, alone))
    assert len(ours) == REPLIES
    for kind in ("group", "member", "problem_id", "messages", "prompt_tokens"):
        assert [getattr(one, kind) for one in ours] == [getattr(one, kind) for one in theirs]


def test_each_opening_of_a_split_is_noted_once(whole: Path) -> None:
    found, faults = read_openings(whole / OPENINGS_NAME)
    purposes = [BEFORE, BEFORE, TRAINING, SELECTION, SELECTION, AFTER, AFTER]
    assert [one.purpose for one in found] == purposes and faults == []


def test_a_run_that_a_kill_and_then_max_hours_ended_in_all_processes_resumes_exactly(
    whole: Path, imported: Imported, tmp_path: Path
) -> None:
    run, log = tmp_path / "run", tmp_path / "log"
    process = start("--output_dir", str(run), *FLAGS, log=log)
    while not (run / "checkpoint-2").exists() and process.poll() is None:
        time.sleep(0.02)
    ranks = {child.environ()["RANK"]: child for child in psutil.Process(process.pid).children()}
    ranks["1"].kill()
    began = time.monotonic()
    said = ended(process, log, code=1)
    assert time.monotonic() - began < 60 and not ranks["0"].is_running()
    assert "rank 0 cannot go on: rank 1" in said and "Traceback" not in said
    said = resumed(run, "--max_hours", "1e-9", python=imported)
    assert said.count("Stopped by --max_hours after step 3 of 4") == 1  # one process speaks
    assert f"train --resume {run} {' '.join(ON_TWO)}" in said
    resumed(run, python=imported)
    one, other = contents(run), contents(whole)
    assert one.pop("config.yaml") != other.pop("config.yaml")  # which has no --max_hours
    assert one == other


def test_another_number_of_processes_is_refused_and_nothing_is_changed(
    whole: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = (whole / "manifest.json").read_bytes()
    assert main(["train", "--resume", str(whole), "--max_steps", str(STEPS + 2)]) == 1
    said = capsys.readouterr().err
    assert "started on 2 processes and is resumed on 1" in said
    assert "with --accelerate_config and --num_processes 2, as it was started" in said
    assert (whole / "manifest.json").read_bytes() == before
