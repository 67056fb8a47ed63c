"""A data set as people have it, through the command line, from one folder and then from another."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from abacist.cli.main import main
from abacist.learning.config import load_config
from abacist.learning.task import load_task
from abacist.task.rewards import load_reward_funcs

pytestmark = pytest.mark.e2e

Captured = pytest.CaptureFixture[str]

REWARD = '''
import json, pathlib

def on_topic(completions, answer, topic, Problem, **columns):
    """Pays where topic and gold belong to one row; keeps what it was called with."""
    with (pathlib.Path(__file__).parent / "seen.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps([answer, topic, Problem, sorted(columns)]) + "\\n")
    return [0.1 if "topic " + gold == each else 0.0 for gold, each in zip(answer, topic)]
'''
FEW = ["--max_steps", "1", "--num_heldout_problems", "2", "--num_selection_problems", "0",
       "--num_consistency_problems", "0", "--per_device_train_batch_size", "8",
       "--num_generations", "4", "--max_completion_length", "4"]  # fmt: skip


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a spreadsheet's file (semicolons, UTF-16, decimal commas) and a reward."""
    here = tmp_path / "here"
    here.mkdir()
    (tmp_path / "elsewhere").mkdir()
    rows = [f"Ada has {n} pens and half a pen. How many?;{n},5;topic {n}.5\r\n" for n in range(30)]
    text = "Problem;ground_truth;topic\r\n" + "".join(rows) + ";;\r\n"
    (here / "data.csv").write_bytes(b"\xff\xfe" + text.encode("utf-16-le"))
    (here / "own_data_mine.py").write_text(REWARD, encoding="utf-8")
    monkeypatch.chdir(here)
    return here


def train(*flags: str) -> int:
    return main(["train", "--dataset_name", "data.csv", "--output_dir", "run", *FEW, *flags])


def test_the_decimal_mark_is_asked_for_before_anything_is_loaded(
    here: Path, capsys: Captured
) -> None:
    assert train() == 1
    error = " ".join(capsys.readouterr().err.split())
    assert "the golds in 'ground_truth' do not say what their decimal mark is" in error
    assert "line 2: '0,5'" in error and "--decimal_mark comma" in error
    assert "Traceback" not in error and not (here / "run").exists()
    for verb in (["eval", "tiny"], ["audit"]):
        assert main([*verb, "--dataset_name", "data.csv"]) == 1
        assert "--decimal_mark comma" in capsys.readouterr().err


def test_a_run_on_own_data_is_evaluated_and_resumed_from_another_folder(
    here: Path, capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = ["--decimal_mark", "comma", "--reward_funcs", "default", "own_data_mine.on_topic"]
    assert train(*flags) == 0, capsys.readouterr().err
    seen = [json.loads(line) for line in (here / "seen.jsonl").read_text("utf-8").splitlines()]
    calls = [call for call in seen if "trainer_state" in call[3] and len(call[0]) == 8]
    golds, topics, questions, columns = calls[-1]
    assert topics == [f"topic {gold}" for gold in golds]
    assert all(
        f"has {gold[:-2]} pens" in asked for gold, asked in zip(golds, questions, strict=True)
    )
    assert {"problem_id", "difficulty", "prompts"} <= set(columns)

    monkeypatch.chdir(here.parent / "elsewhere")
    run = here / "run"
    kept = yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8"))
    assert kept["dataset_name"] == str(here / "data.csv") and kept["decimal_mark"] == "comma"
    assert kept["reward_funcs"] == ["default", str(here / "own_data_mine.on_topic")]
    assert main(["eval", str(run), "--num_problems", "2", "--max_completion_length", "4"]) == 0
    assert main(["train", "--resume", str(run), "--max_steps", "2"]) == 0
    assert len(list((run / "rollouts").iterdir())) == 2
    again = load_config(None, str(run / "config.yaml"), [])
    assert len(load_task(again).train) >= 20
    assert [func.__name__ for func in load_reward_funcs(again.script.reward_funcs)][
        -1
    ] == "on_topic"
