"""Through the command line: a run that goes wrong says so, with a remedy, and loses nothing."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

import pytest

from abacist.cli.main import main
from abacist.learning.trainer import GRPOTrainer
from faults import fault

pytestmark = pytest.mark.e2e

SHORT = ["--num_heldout_problems", "0", "--num_selection_problems", "0", "--save_steps", "1",
         "--num_train_problems", "16", "--per_device_train_batch_size", "8",
         "--num_generations", "4", "--save_total_limit", "9",
         "--max_completion_length", "40"]  # fmt: skip
Captured = pytest.CaptureFixture[str]


@pytest.fixture(autouse=True)
def no_audit(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the audit before a training says of these rewards is tested with it."""
    monkeypatch.setattr("abacist.learning.train.refuse_hackable", lambda *args: None)


def train(run: Path, *flags: str) -> int:
    return main(["train", "--output_dir", str(run), *SHORT, *flags])


def metrics(run: Path) -> list[dict[str, Any]]:
    lines = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [row for row in map(json.loads, lines) if "reward" in row]


def adapter(folder: Path) -> bytes:
    return (folder / "adapter_model.safetensors").read_bytes()


@pytest.fixture
def nan_at_step_2(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = GRPOTrainer._compute_loss

    def poisoned(self: Any, model: Any, inputs: Any) -> Any:
        return whole(self, model, inputs) * (math.nan if self.state.global_step == 1 else 1.0)

    monkeypatch.setattr(GRPOTrainer, "_compute_loss", poisoned)


@fault("training", "the loss or its gradient is NaN or infinite",
       "the step and the weight; the step was refused, the state before it saved")  # fmt: skip
def test_a_nan_stops_the_run_before_it_reaches_the_weights(
    nan_at_step_2: None, tmp_path: Path, capsys: Captured
) -> None:
    run = tmp_path / "run"
    assert train(run, "--max_steps", "3", "--warmup_steps", "0") == 1
    said = capsys.readouterr().err
    assert said.count("error:") == 1 and "Traceback" not in said
    assert "At step 2" in said and "checkpoint-2" in said and "--nan_policy skip" in said
    assert adapter(run / "checkpoint-1") == adapter(run / "checkpoint-2")
    assert adapter(run / "checkpoint-0") != adapter(run / "checkpoint-1")
    assert metrics(run)[-1]["loss"] is None and metrics(run)[-1]["refused_steps"] == 1

    assert main(["doctor", str(run), "--json"]) == 1
    findings = {one["name"]: one for one in json.loads(capsys.readouterr().out)["findings"]}
    assert "refused" in findings["not finite"]["found"] and findings["not finite"]["remedy"]


@fault("training", "the same with --nan_policy skip",
       "a line for each refused step; the run goes on with the next", 0)  # fmt: skip
def test_a_nan_step_can_be_left_out(nan_at_step_2: None, tmp_path: Path, capsys: Captured) -> None:
    run = tmp_path / "run"
    flags = ["--max_steps", "3", "--warmup_steps", "0", "--nan_policy", "skip"]
    assert train(run, *flags) == 0
    assert "At step 2 the gradient is not a finite number" in capsys.readouterr().out
    assert adapter(run / "checkpoint-1") == adapter(run / "checkpoint-2")
    assert adapter(run / "checkpoint-2") != adapter(run / "checkpoint-3")
    assert [row["loss"] is None for row in metrics(run)] == [False, True, False]


@fault("training", "every group has equal rewards for --max_silent_steps steps",
       "since when nothing could be learned, and what to change")  # fmt: skip
def test_a_run_in_which_nothing_can_be_learned_is_told_early_and_stopped(
    tmp_path: Path, capsys: Captured
) -> None:
    run = tmp_path / "run"
    mine = tmp_path / "mine.py"
    mine.write_text(
        "def flat(completions, **columns):\n    return [0.0] * len(completions)\n", encoding="utf-8"
    )
    flags = ["--max_steps", "3", "--reward_funcs", f"{mine}:flat"]
    assert train(run, *flags, "--max_silent_steps", "2") == 1
    out, err = capsys.readouterr()
    assert "In the last 2 steps" in err and err.count("error:") == 1 and "Traceback" not in err
    assert len(metrics(run)) == 2 and (run / "checkpoint-2").is_dir()

    assert train(run, *flags, "--overwrite") == 0
    out = capsys.readouterr().out
    assert out.count("no signal:") == 1 and out.count("dead reward:") == 1
    assert main(["doctor", str(run)]) == 1
    out = capsys.readouterr().out
    assert "mend  no signal" in out and "note  dead reward" in out and "'flat'" in out


RETURNS = {
    "NaN": ("[float('nan')] * len(completions)", "returned nan for sample 0"),
    "infinity": ("[float('inf')] * len(completions)", "returned inf for sample 0"),
    "1e38": ("[1e38] * len(completions)", "returned 1e+38 for sample 0"),
    "-1e38 for one sample": ("[0.0] * 5 + [-1e38] + [0.0] * 2", "returned -1e+38 for sample 5"),
    "the wrong number of values": ("[1.0]", "returned 1 rewards for 8 completions"),
    "strings": ("['1.0'] * len(completions)", "returned '1.0' for sample 0"),
    "one number in place of a list": ("1.0", "returned a float"),
    "nothing": ("None", "returned a NoneType"),
}
BACKTRACKS = "[re.fullmatch('(a+)+', 'a' * 64 + str(c)) for c in completions]"


@pytest.mark.parametrize(
    ("body", "said"),
    [
        *(pytest.param(body, said, id=what, marks=fault("rewards", f"a reward returns {what}",
          "its name, what it returned, and the sample"))
          for what, (body, said) in RETURNS.items()),
        pytest.param("[1 / 0]", "raised ZeroDivisionError on sample 0", id="raises",
                     marks=fault("rewards", "a reward raises",
                                 "its name, the exception and the sample")),
        pytest.param(BACKTRACKS, "was stopped after 1 seconds: it hangs on sample 0", id="hangs",
                     marks=fault("rewards", "a reward hangs (a regular expression that backtracks)",
                                 "its name and the sample, after --reward_timeout_seconds")),
    ],
)  # fmt: skip
def test_a_reward_that_goes_wrong_is_named_with_the_sample(
    body: str, said: str, tmp_path: Path, capsys: Captured
) -> None:
    mine = tmp_path / "mine.py"
    mine.write_text(
        f"import re\ndef mine(completions, **columns):\n    return {body}\n", encoding="utf-8"
    )
    flags = ["--max_steps", "1", "--reward_timeout_seconds", "1"]
    assert train(tmp_path / "run", *flags, "--reward_funcs", "correctness", f"{mine}:mine") == 1
    error = capsys.readouterr().err
    assert "'mine'" in error and said in error
    assert error.count("error:") == 1 and "Traceback" not in error


@fault("rewards", "a reward returns None for a sample",
       "nothing: it does not apply there, as in TRL", 0)  # fmt: skip
def test_none_stays_not_applicable(tmp_path: Path) -> None:
    mine = tmp_path / "mine.py"
    mine.write_text(
        "def mine(completions, **columns):\n    return [None] * len(completions)\n",
        encoding="utf-8",
    )
    flags = ["--max_steps", "1", "--reward_funcs", "correctness", f"{mine}:mine"]
    assert train(tmp_path / "run", *flags) == 0
    assert metrics(tmp_path / "run")[0]["rewards/mine/mean"] is None


@fault("run directory", "a run name that would leave the runs folder",
       "the name and what it may hold")  # fmt: skip
@pytest.mark.parametrize("name", ["../outside", "/tmp/outside", "a/b", "..", ".hidden"])
def test_a_run_name_cannot_leave_the_runs_folder(
    name: str, tmp_path: Path, capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    inside = tmp_path / "here"
    inside.mkdir()
    monkeypatch.chdir(inside)
    assert main(["train", "--run_name", name, *SHORT, "--max_steps", "1"]) == 1
    assert "cannot be named" in capsys.readouterr().err
    assert os.listdir(tmp_path) == ["here"] and not list(inside.iterdir())
