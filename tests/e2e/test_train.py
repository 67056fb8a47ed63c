"""The first run, as a newcomer meets it, and what it says when something is wrong."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from abacist.cli.main import main
from abacist.learning import heldout
from abacist.policy.source import BUILT_IN_FOLDER
from abacist.proof.evaluate import evaluate
from abacist.proof.evaluation import Evaluation
from abacist.records.rollout import read_rollouts
from empty_charts import draw_charts
from imported import Imported

pytestmark = pytest.mark.e2e

SHORT = ["--max_steps", "2", "--num_heldout_problems", "12", "--num_selection_problems", "6"]
SHORT += ["--eval_steps", "1", "--num_train_problems", "40", "--save_steps", "1"]
SHORT += ["--num_consistency_problems", "2"]
FEW = ["--per_device_train_batch_size", "8", "--num_generations", "4"]
Captured = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def measured() -> list[Evaluation]:
    """Every measurement that the run makes, in order."""
    return []


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, measured: list[Evaluation]) -> Path:
    run = tmp_path_factory.mktemp("runs") / "first"

    def watched(*args: Any, **kwargs: Any) -> Evaluation:
        measured.append(evaluate(*args, **kwargs))
        return measured[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(heldout, "evaluate", watched)
        draw_charts(patch)
        assert main(["train", "--output_dir", str(run), *SHORT, *FEW]) == 0
    return run


def test_a_run_leaves_everything_a_person_needs(finished: Path) -> None:
    names = {path.name for path in finished.iterdir()}
    assert {"config.yaml", "manifest.json", "metrics.jsonl", "timings.jsonl", "rollouts"} <= names
    assert {"adapter_model.safetensors", "adapter_config.json", "tokenizer.json"} <= names
    assert {"checkpoint-1", "checkpoint-2", "report.html"} <= names
    assert {path.name for path in (finished / "evals").iterdir()} == {
        "before", "after", "before-sampled", "after-sampled", "verdict.json",
    }  # fmt: skip
    assert len(read_rollouts(finished / "rollouts")) == 2 * 8


def test_the_report_of_a_run_shows_where_its_time_went_and_every_reply(finished: Path) -> None:
    text = (finished / "report.html").read_text(encoding="utf-8")
    assert "Where the time went" in text and "rollout" in text
    charts = re.findall(r"<svg.*?</svg>", text, re.DOTALL)
    assert len(charts) > 5 and all("<path" in chart for chart in charts)
    rows = json.loads(text.split('id="data">')[1].split("</script>")[0])["rows"]
    assert len(rows) == 2 * 8 + sum(
        len(read_rollouts(path)) for path in (finished / "evals").glob("*/rollouts.parquet")
    )


def test_metrics_hold_accuracy_on_the_selection_split_during_training_and_no_times(
    finished: Path, measured: list[Evaluation]
) -> None:
    rows = [
        json.loads(line)
        for line in (finished / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    during = measured[2:-2]
    assert [r.split for one in measured for r in one.rollouts[:1]] == [
        *["heldout"] * 2, *["selection"] * 2, *["heldout"] * 2
    ]  # fmt: skip
    assert [len(one.problems) for one in during] == [6, 6]
    assert during[0].problems == during[1].problems
    found = [(r["step"], r["eval_accuracy"]) for r in rows if "eval_accuracy" in r]
    assert found == [(step, one.accuracy.value) for step, one in enumerate(during, 1)]
    assert all("rewards/correctness/mean" in row for row in rows if "reward" in row)
    assert not any(key.endswith(("_time", "_runtime")) for row in rows for key in row)


def test_the_three_splits_of_a_run_share_no_problem(
    finished: Path, measured: list[Evaluation]
) -> None:
    judged = {p.problem_id for p in Evaluation.load(finished / "evals" / "before").problems}
    selection = {p.problem_id for p in measured[2].problems}
    trained = {r.problem_id for r in read_rollouts(finished / "rollouts")}
    assert len(judged) == 12 and len(selection) == 6
    assert not judged & trained and not judged & selection and not selection & trained


def test_before_and_after_are_measured_on_the_same_problems(finished: Path) -> None:
    before, after = (Evaluation.load(finished / "evals" / name) for name in ("before", "after"))
    assert before.problems == after.problems and before.settings == after.settings
    arithmetic = {"arithmetic": "float32 on cpu, our engine's attention"}
    assert before.conditions == after.conditions == arithmetic
    verdict = json.loads((finished / "evals" / "verdict.json").read_text(encoding="utf-8"))
    assert verdict["paired"]["accuracy"]["before"]["value"] == before.accuracy.value


def test_the_adapter_says_which_base_it_belongs_to_by_a_folder_that_every_library_finds(
    finished: Path,
) -> None:
    config = json.loads((finished / "adapter_config.json").read_text(encoding="utf-8"))
    assert config["base_model_name_or_path"] == str(BUILT_IN_FOLDER)


def test_a_run_answers_a_question_with_its_reasoning(finished: Path, capsys: Captured) -> None:
    question = "Mia has 3 boxes with 8 pens in each box. How many pens does Mia have now?"
    assert main(["ask", str(finished), question, "--json"]) == 0
    asked = json.loads(capsys.readouterr().out)
    assert question in json.dumps(asked) and "completion" in json.dumps(asked)


def test_a_run_that_exists_is_never_overwritten_by_accident(
    finished: Path, capsys: Captured
) -> None:
    before = {path: path.stat().st_mtime_ns for path in finished.rglob("*")}
    assert main(["train", "--output_dir", str(finished), *SHORT, *FEW]) == 1
    error = capsys.readouterr().err
    assert str(finished) in error and "--overwrite" in error and "Traceback" not in error
    assert {path: path.stat().st_mtime_ns for path in finished.rglob("*")} == before


def rows(path: Path, *lines: str) -> str:
    path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    return str(path)


NOWHERE = ["--model_name_or_path", "./nowhere"]
GOOD = json.dumps({"question": "How much is 1 + 1?", "answer": "1+1=2\n#### 2"})
WRONG: list[tuple[str, Callable[[Path], list[str]], int, str]] = [
    ("unknown recipe", lambda _: ["train", "tny"], 2, "Did you mean tiny"),
    ("unknown key", lambda _: ["train", "--num_generation", "4"], 2, "num_generations"),
    ("unknown model", lambda _: ["train", "--dataset_name", "generated", *NOWHERE], 1, "nowhere"),
    ("unknown reward", lambda _: ["train", "--reward_funcs", "corectness"], 1, "correctness"),
    ("weights that do not fit", lambda _: ["train", "--reward_weights", "1", "2"], 2, "2 given, 5"),
    ("unknown file", lambda p: ["train", "--dataset_name", f"{p}/no.jsonl"], 1, "no.jsonl"),
    ("empty data", lambda p: ["train", "--dataset_name", rows(p / "e.jsonl")], 1, "e.jsonl"),
    ("tiny data", lambda p: ["train", "--dataset_name", rows(p / "t.jsonl", GOOD)], 1, "rows"),
    ("malformed", lambda p: ["train", "--dataset_name", rows(p / "m.jsonl", "{")], 1, "line 1"),
    (
        "no such column",
        lambda p: ["train", "--dataset_name", rows(p / "c.jsonl", '{"q": "?", "a": "1"}')],
        1,
        "--question_column",
    ),
    (
        "no gold",
        lambda p: [
            "train", "--dataset_name",
            rows(p / "g.jsonl", json.dumps({"question": "Why?", "answer": "because"})),
        ],
        1,
        "gold",
    ),
    ("prompt too long", lambda _: ["train", "--max_completion_length", "2040"], 1, "context"),
    ("unknown config", lambda p: ["train", "--config", f"{p}/no.yaml"], 2, "no.yaml"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "code", "said"), [w[1:] for w in WRONG], ids=[w[0] for w in WRONG]
)
def test_bad_input_ends_in_one_message_and_writes_nothing(
    arguments: Callable[[Path], list[str]],
    code: int,
    said: str,
    tmp_path: Path,
    capsys: Captured,
) -> None:
    run = tmp_path / "run"
    assert (
        main([*arguments(tmp_path), "--output_dir", str(run), "--num_train_problems", "8"]) == code
    )
    error = capsys.readouterr().err
    assert said in error and "Traceback" not in error
    assert not run.exists()


def test_a_reward_of_the_users_own_that_breaks_is_named_with_its_sample(
    tmp_path: Path, capsys: Captured
) -> None:
    path = tmp_path / "mine.py"
    path.write_text(
        "def broken(prompts, completions, **columns):\n    return [1 / 0] * 8\n", encoding="utf-8"
    )
    flags = ["--reward_funcs", "default", f"{path}:broken", "--output_dir", str(tmp_path / "run")]
    assert main(["train", *flags, *SHORT, *FEW]) == 1
    error = capsys.readouterr().err
    assert "broken" in error and "ZeroDivisionError" in error and "Traceback" not in error


def test_a_custom_reward_with_a_weight_is_paid_and_recorded(
    tmp_path: Path, capsys: Captured
) -> None:
    path = tmp_path / "mine.py"
    path.write_text(
        "def brief(completions, **columns):\n    return [0.5 for _ in completions]\n",
        encoding="utf-8",
    )
    flags = ["--reward_funcs", "correctness", f"{path}:brief", "--reward_weights", "1", "10"]
    run = tmp_path / "run"
    assert main(["train", *flags, "--output_dir", str(run), *SHORT, *FEW]) == 0
    for rollout in read_rollouts(run / "rollouts"):
        assert set(rollout.rewards) == {"correctness", "brief"}
        assert rollout.reward == pytest.approx(rollout.rewards["correctness"] + 5.0)  # type: ignore[operator]
    capsys.readouterr()


@pytest.mark.slow
def test_twenty_steps_teach_the_built_in_model(tmp_path: Path, capsys: Captured) -> None:
    run = tmp_path / "run"
    flags = ["--max_steps", "20", "--num_heldout_problems", "100", "--eval_strategy", "no"]
    flags += ["--num_consistency_problems", "0"]
    assert main(["train", "--output_dir", str(run), *flags]) == 0
    shown = capsys.readouterr().out
    assert "Learned:" in shown
    lines = [
        json.loads(line)
        for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    rewards = [line["reward"] for line in lines if "reward" in line]
    # Without learning the difference of two such means has a standard deviation below 0.2.
    assert sum(rewards[-5:]) / 5 - sum(rewards[:5]) / 5 > 0.7
    before, after = (Evaluation.load(run / "evals" / name) for name in ("before", "after"))
    assert after.accuracy.value - before.accuracy.value > 0.2


def run_with_wandb(mode: str, folder: Path, imported: Imported) -> str:
    """What ``abacist train --report_to wandb`` prints, in a process and a home of its own.

    W&B remembers its mode and its login for as long as a process lives.
    """
    environment = {key: value for key, value in os.environ.items() if "WANDB" not in key}
    environment |= {"HOME": str(folder), "WANDB_MODE": mode}
    command = ["-m", "abacist", "train", "--report_to", "wandb", "--output_dir", "run"]
    done = imported.run(*command, *SHORT, *FEW, env=environment, cwd=folder)
    assert done.returncode == 0, done.stderr
    assert (folder / "run" / "adapter_model.safetensors").exists()
    assert (folder / "run" / "metrics.jsonl").exists()
    return done.stdout


@pytest.mark.parametrize("mode", ["offline", "disabled"])
def test_wandb_works_without_a_network_in_its_own_modes(
    mode: str, imported: Imported, tmp_path: Path
) -> None:
    assert "left out" not in run_with_wandb(mode, tmp_path, imported)
    kept = list((tmp_path / "wandb").glob("offline-run-*/*.wandb"))
    assert bool(kept) is (mode == "offline")


def test_wandb_without_a_key_costs_one_warning_and_not_the_run(
    imported: Imported, tmp_path: Path
) -> None:
    assert run_with_wandb("online", tmp_path, imported).count("is left out from here on") == 1
