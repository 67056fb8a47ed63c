"""A run that is stopped, killed or damaged, and taken up again from the command line."""

from __future__ import annotations

import json
import os
import shutil
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from abacist.cli.main import main
from abacist.learning import train
from abacist.learning.resume.checkpoints import checkpoints_of, defect
from abacist.learning.trainer import GRPOTrainer
from bundles import forget_the_end
from faults import fault
from imported import Imported

pytestmark = [pytest.mark.e2e, pytest.mark.slow]

FLAGS = ["--max_steps", "5", "--save_steps", "2", "--num_heldout_problems", "6"]
FLAGS += ["--num_selection_problems", "0", "--num_train_problems", "40", "--logging_steps", "1"]
FLAGS += ["--per_device_train_batch_size", "8", "--num_generations", "4"]
FLAGS += ["--max_completion_length", "24"]
SAME = ("adapter_model.safetensors", "metrics.jsonl", "config.yaml", "evals", "rollouts")
Captured = pytest.CaptureFixture[str]


def contents(run: Path) -> dict[str, bytes]:
    """What a resumed run must have in common with the uninterrupted one."""
    files = [path for name in SAME for path in [run / name, *(run / name).rglob("*")]]
    return {str(path.relative_to(run)): path.read_bytes() for path in files if path.is_file()}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("whole") / "run"
    assert main(["train", "--output_dir", str(run), *FLAGS]) == 0
    return run


def resumed_until(run: Path, steps: int, number: int) -> int:
    """The exit code of a resume that this process's own signal ends once ``steps`` are logged."""

    def send() -> None:
        while lines(run / "metrics.jsonl") < steps:
            time.sleep(0.01)
        os.kill(os.getpid(), number)

    threading.Thread(target=send, daemon=True).start()
    return main(["train", "--resume", str(run)])


def lines(path: Path) -> int:
    return len(path.read_bytes().splitlines()) if path.exists() else 0


@fault("stops", "SIGTERM", "the step it stands after, its checkpoint, how to go on", 143)
@fault("stops", "Ctrl-C", "the step it stands after, its checkpoint, how to go on", 130)
@fault(
    "run directory",
    "a second process resumes the run that one is writing",
    "which process is writing it",
)
@fault("run directory", "the process that wrote the run died and left its lock",
       "nothing: the next one takes it over", 0)  # fmt: skip
def test_sigterm_ctrl_c_and_kill_in_one_run_change_no_byte_of_its_result(
    whole: Path, imported: Imported, tmp_path: Path, capsys: Captured
) -> None:
    run = tmp_path / "run"
    first = imported.start("-m", "abacist", "train", "--output_dir", str(run), *FLAGS)
    while not (run / "config.yaml").exists():
        assert first.poll() is None
        time.sleep(0.02)
    first.send_signal(signal.SIGSTOP)  # while it measures, before the first step
    assert main(["train", "--resume", str(run)]) == 1
    assert "is writing this run" in capsys.readouterr().err
    first.kill()
    first.wait()
    for steps, number, name, code in (
        (1, signal.SIGTERM, "SIGTERM", 143),
        (3, signal.SIGINT, "Ctrl-C", 130),
    ):
        assert resumed_until(run, steps, number) == code
        said = capsys.readouterr().err
        assert f"stopped by {name} after step" in said and f"abacist train --resume {run}" in said
        assert all(defect(path) is None for path in checkpoints_of(run))
    assert main(["train", "--resume", str(run)]) == 0
    assert contents(run) == contents(whole)
    assert not list(run.rglob(".*"))


@fault("resume", "the run is finished already", "that nothing was done, and its verdict", 0)
def test_a_finished_run_is_left_as_it_is(whole: Path, capsys: Captured) -> None:
    before = {path: path.stat().st_mtime_ns for path in whole.rglob("*")}
    assert main(["train", "--resume", str(whole), "--json"]) == 0
    said = capsys.readouterr()
    assert "finished already" in said.err and json.loads(said.out)["verdict"]
    assert {path: path.stat().st_mtime_ns for path in whole.rglob("*")} == before
    # A checkpoint that it does not have is not the run, finished or not.
    assert main(["train", "--resume", str(whole / "checkpoint-77")]) == 1
    said = capsys.readouterr()
    assert "checkpoint-77: no such checkpoint." in said.err and "holds checkpoint-" in said.err
    assert main(["train", "--resume", str(checkpoints_of(whole)[0])]) == 0
    assert "finished already" in capsys.readouterr().out
    # Steps decide how long it is, so more epochs make it no longer.
    assert main(["train", "--resume", str(whole), "--num_train_epochs", "9"]) == 0
    said = capsys.readouterr()
    assert "nothing was done" in said.out and "give more --max_steps." in said.out
    assert {path: path.stat().st_mtime_ns for path in whole.rglob("*")} == before


@fault("stops", "--max_hours is used up", "the step it stands after, how to go on", 0)
def test_max_hours_saves_and_says_how_to_go_on(
    whole: Path, tmp_path: Path, capsys: Captured
) -> None:
    run = tmp_path / "run"
    assert main(["train", "--output_dir", str(run), *FLAGS, "--max_hours", "1e-9"]) == 0
    said = capsys.readouterr().out
    assert "Stopped by --max_hours after step 1 of 5" in said
    assert f"train --resume {run}" in said
    assert main(["train", "--resume", str(run / "checkpoint-1"), "--max_hours", "10"]) == 0
    assert {n: b for n, b in contents(run).items() if n != "config.yaml"} == {
        n: b for n, b in contents(whole).items() if n != "config.yaml"
    }


@fault(
    "checkpoints",
    "the newest checkpoint is damaged, and the run is resumed",
    "the damaged file; the checkpoint before it is taken",
    0,
)
@fault("checkpoints", "a damaged checkpoint is resumed by its name",
       "the damaged file, and that it is not resumed")  # fmt: skip
def test_a_damaged_newest_checkpoint_is_named_and_the_one_before_it_taken(
    whole: Path, tmp_path: Path, capsys: Captured
) -> None:
    run = tmp_path / "run"
    shutil.copytree(whole, run)
    forget_the_end(run)
    content = bytearray((run / "checkpoint-5" / "optimizer.pt").read_bytes())
    content[len(content) // 2] ^= 4
    (run / "checkpoint-5" / "optimizer.pt").write_bytes(content)
    assert main(["train", "--resume", str(run / "checkpoint-5")]) == 1
    refused = capsys.readouterr().err
    assert "is not resumed" in refused and "optimizer.pt" in refused
    assert main(["train", "--resume", str(run)]) == 0
    said = capsys.readouterr().out
    assert "checkpoint-5 is passed over" in said and "optimizer.pt" in said
    assert "checkpoint-4: step 4 of 5" in said
    assert contents(run) == contents(whole)


@fault("resume", "other settings than the run was begun with", "the list of them, and --force")
def test_another_configuration_is_refused_with_the_list_and_forced_on_request(
    whole: Path, tmp_path: Path, capsys: Captured
) -> None:
    run = tmp_path / "run"
    shutil.copytree(whole, run)
    changed = ["--seed", "5", "--learning_rate", "1e-4", "--max_steps", "6"]
    before = contents(run)
    assert main(["train", "--resume", str(run), *changed]) == 1
    refused = capsys.readouterr().err
    assert "seed: 0 → 5" in refused and "learning_rate: 0.0015 → 0.0001" in refused
    assert "max_steps: 5 → 6 (the learning rate's schedule depends on it)" in refused
    assert "--force" in refused and contents(run) == before
    manifest = json.loads((run / "manifest.json").read_text(encoding="utf-8"))
    manifest["versions"] |= {"torch": "2.0", "CPU kernels": "made by another compiler"}
    (run / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
    forced = ["--max_steps", "6", "--weight_decay", "0.01", "--max_completion_length", "20"]
    forced += ["--force"]
    assert main(["train", "--resume", str(run), *forced]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "checkpoint-5: step 5 of 6" in said
    assert "torch was 2.0 and is" in said and "the last bits may differ" in said
    assert "CPU kernels was made by another compiler and is" in said
    # The new budget is the verdict's on both sides.
    assert "Measuring before training" in said and (run / "evals" / "verdict.json").exists()
    assert json.loads((run / "manifest.json").read_text(encoding="utf-8"))["resumed"][0]["forced"]
    assert lines(run / "metrics.jsonl") == 7  # six steps and the summary


STEADY = [*FLAGS[2:], "--lr_scheduler_type", "constant_with_warmup", "--warmup_steps", "1"]


@pytest.fixture(scope="module")
def short(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("short") / "run"
    assert main(["train", "--output_dir", str(run), "--max_steps", "3", *STEADY]) == 0
    return run


def test_a_finished_run_that_is_made_longer_is_the_run_that_was_begun_longer(
    short: Path, tmp_path: Path, capsys: Captured
) -> None:
    long, run = tmp_path / "long" / "run", tmp_path / "run"
    assert main(["train", "--output_dir", str(long), "--max_steps", "5", *STEADY]) == 0
    shutil.copytree(short, run)
    verdict = (run / "evals" / "verdict.json").read_bytes()
    after = (run / "evals" / "after" / "evaluation.json").read_bytes()
    capsys.readouterr()
    assert main(["train", "--resume", str(run), "--max_steps", "5"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "max_steps 3 → 5. The learning rate (constant_with_warmup) does not depend" in said
    assert "checkpoint-3: step 3 of 5" in said
    kept = contents(run)
    # Nothing that was found at the first end is lost.
    assert kept.pop("evals/verdict-step-3.json") == verdict
    assert kept["evals/after-step-3/evaluation.json"] == after
    kept = {name: content for name, content in kept.items() if "after-step-3" not in name}
    assert kept == contents(long)
    resumed = json.loads((run / "manifest.json").read_text(encoding="utf-8"))["resumed"][0]
    assert resumed["longer"] and not resumed["forced"]
    assert main(["train", "--resume", str(run)]) == 0  # finished again: nothing to do
    assert "finished already" in capsys.readouterr().out


def test_a_longer_run_on_another_schedule_says_what_differs_and_goes_on_at_its_rate(
    whole: Path, tmp_path: Path, capsys: Captured
) -> None:
    run = tmp_path / "run"
    shutil.copytree(whole, run)
    assert main(["train", "--resume", str(run), "--max_steps", "8"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "schedule (linear) was for 5, from here on it is the one for 8" in said
    rows = [
        json.loads(line)
        for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    rates = {row["step"]: row["learning_rate"] for row in rows if "learning_rate" in row}
    # Warm-up 1, then down to 0 at the end: step n + 1 is made at the rate logged here for n + 1.
    assert [round(rates[step] / 0.0015 * 7, 6) for step in (6, 7, 8)] == [3, 2, 1]
    assert lines(run / "metrics.jsonl") == 9


@fault("resume", "a finished run without checkpoints is to be made longer",
       "that it cannot go on, and how to begin from it; it stays as it is")  # fmt: skip
def test_a_finished_run_that_cannot_go_on_is_left_as_it_is(
    short: Path, tmp_path: Path, capsys: Captured
) -> None:
    run = tmp_path / "run"
    shutil.copytree(short, run)
    for path in checkpoints_of(run):
        shutil.rmtree(path)
    before = contents(run)
    assert main(["train", "--resume", str(run), "--max_steps", "5"]) == 1
    said = capsys.readouterr().err
    assert "is finished and cannot go on" in said and f"--model_name_or_path {run}" in said
    assert contents(run) == before
    assert json.loads((run / "manifest.json").read_text(encoding="utf-8"))["finished"]


@fault("resume", "a finished run is to be made shorter", "both numbers, and --force")
def test_a_shorter_run_is_another_run(short: Path, capsys: Captured) -> None:
    before = contents(short)
    assert main(["train", "--resume", str(short), "--max_steps", "2"]) == 1
    assert "max_steps: 3 → 2" in capsys.readouterr().err and contents(short) == before


@fault("resume", "the run does not exist", "that there is none")
@fault("resume", "no run is named", "that it must be", 2)
def test_what_cannot_be_resumed_says_why(tmp_path: Path, capsys: Captured) -> None:
    assert main(["train", "--resume", str(tmp_path / "none")]) == 1
    assert "no such run" in capsys.readouterr().err
    assert main(["train", "--resume"]) == 2
    assert main(["train", "--resume_from_checkpoint", "latest"]) == 2
    assert "of which run" in capsys.readouterr().err


@fault("stops", "SIGTERM while the trained model is written",
       "that what it learned is saved, and how to get the verdict", 143)  # fmt: skip
def test_a_signal_while_the_trained_model_is_saved_waits_until_it_is(
    short: Path, tmp_path: Path, capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    save = GRPOTrainer.save_model

    def interrupted(self: Any, output_dir: str | None = None, **how: Any) -> None:
        if output_dir is None:
            os.kill(os.getpid(), signal.SIGTERM)
        save(self, output_dir, **how)

    run = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(GRPOTrainer, "save_model", interrupted)
        assert main(["train", "--output_dir", str(run), "--max_steps", "3", *STEADY]) == 143
    assert "before its verdict; what it learned is saved" in capsys.readouterr().err
    weights = "adapter_model.safetensors"
    assert (run / weights).read_bytes() == (short / weights).read_bytes()
    assert main(["train", "--resume", str(run)]) == 0
    assert contents(run) == contents(short)


def test_a_stop_before_a_resumed_run_trains_does_not_speak_of_its_first_step(
    short: Path, tmp_path: Path, capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Path(shutil.copytree(short, tmp_path / "run"))
    # Called within the section that hears signals, before anything is trained.
    monkeypatch.setattr(train, "_train_in", lambda *_: os.kill(os.getpid(), signal.SIGINT))
    assert main(["train", "--resume", str(run), "--max_steps", "5"]) == 130
    said = capsys.readouterr().err
    assert "before training went on, when there was nothing new to save" in said
    assert "--resume" in said


def test_a_control_that_is_made_longer_has_forced_nothing(tmp_path: Path, capsys: Captured) -> None:
    run = tmp_path / "run"
    control = ["--control", "random", "--reward_weights", "1", "1", "1", "1", "0.5"]
    assert main(["train", "--output_dir", str(run), "--max_steps", "1", *STEADY, *control]) == 0
    assert main(["train", "--resume", str(run), "--max_steps", "2"]) == 0
    assert "forced" not in capsys.readouterr().out
    resumed = json.loads((run / "manifest.json").read_text(encoding="utf-8"))["resumed"][0]
    assert resumed["longer"] and not resumed["forced"]
