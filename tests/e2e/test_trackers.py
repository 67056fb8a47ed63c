"""What W&B, Trackio and TensorBoard hold of a run, read back from what they wrote, offline."""

from __future__ import annotations

import importlib.util
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from abacist.learning.tracking import is_wall_clock
from imported import Imported
from tracker_files import WandbFile, wandb_files

pytest.importorskip("wandb")
pytest.importorskip("trackio")
HAS_TENSORBOARD = importlib.util.find_spec("tensorboard") is not None
needs_tensorboard = pytest.mark.skipif(
    not HAS_TENSORBOARD, reason="tensorboard is not installed: pip install 'abacist[tensorboard]'"
)

TRACKERS = ["wandb", "trackio", *(["tensorboard"] if HAS_TENSORBOARD else [])]
SHORT = ["--num_heldout_problems", "6", "--num_consistency_problems", "0", "--save_steps", "1"]
SHORT += ["--num_selection_problems", "4", "--eval_steps", "2", "--num_train_problems", "20"]
SHORT += ["--per_device_train_batch_size", "8", "--num_generations", "4", "--dtype", "float32"]
# What a tracker adds of its own.
ADDED = {"train/global_step", "timestamp", "step", "completions"}


def offline(folder: Path) -> dict[str, str]:
    """An environment in which a tracker asks nobody, and keeps what it writes in ``folder``."""
    ours = {k: v for k, v in os.environ.items() if not k.startswith(("WANDB", "TRACKIO"))}
    ours |= {"HOME": str(folder), "WANDB_SILENT": "true"}
    ours |= {"WANDB_MODE": "offline", "TRACKIO_DIR": str(folder / "trackio"), "HF_HUB_OFFLINE": "1"}
    return ours


class Home(NamedTuple):
    """A home folder, and Python that knows no other: Trackio reads where it is when imported."""

    folder: Path
    imported: Imported

    def python(self, *arguments: str, cwd: Path | None = None) -> str:
        assert self.imported.env["WANDB_MODE"] == "offline"
        done = self.imported.run(*arguments, cwd=cwd or self.folder)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout


@pytest.fixture(scope="module")
def owner(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Home]:
    folder = tmp_path_factory.mktemp("tracked")
    home = Home(folder, Imported(env=offline(folder)))
    yield home
    home.imported.close()


@pytest.fixture(scope="module")
def home(owner: Home) -> Path:
    """Where a run of two steps was made, and resumed from its first with one step more."""
    folder, python = owner.folder, owner.python
    flags = ["--output_dir", "arith", "--log_completions", "--num_completions_to_print", "1"]
    train = ["-m", "abacist", "train"]
    said = python(*train, "--max_steps", "2", *SHORT, *flags, "--report_to", *TRACKERS)
    resumed = python(*train, "--resume", "arith/checkpoint-1", "--max_steps", "3")
    assert "left out" not in said + resumed
    (folder / "said.txt").write_text(said, encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def parts(home: Path) -> list[WandbFile]:
    return wandb_files(home)


def lines_of(home: Path) -> dict[str, Any]:
    """Every metric and timing of the run, by its name."""
    found: dict[str, Any] = {}
    for name in ("metrics.jsonl", "timings.jsonl"):
        text = (home / "arith" / name).read_text(encoding="utf-8")
        for line in text.splitlines():
            found |= json.loads(line)
    return found


def expected_names(home: Path) -> set[str]:
    names = set(lines_of(home)) - {"step"}
    assert any(is_wall_clock(name) for name in names)
    return {
        f"eval/{name.removeprefix('eval_')}" if name.startswith("eval_") else f"train/{name}"
        for name in names
    }


class Trackio:
    """What Trackio's database holds of a project."""

    def __init__(self, owner: Home, project: str = "abacist") -> None:
        code = (
            "import json, sys; from trackio.sqlite_storage import SQLiteStorage as S\n"
            f"p = {project!r}; runs = S.get_run_records(p)\n"
            "print('\\n' + json.dumps({'runs': runs, "
            "'logs': [S.get_logs(p, r['name'], run_id=r['id']) for r in runs], "
            "'traces': [S.get_traces(p, r['name'], run_id=r['id']) for r in runs], "
            "'configs': [S.get_run_config(p, r['name'], run_id=r['id']) for r in runs]}))"
        )
        self.found = json.loads(owner.python("-c", code).splitlines()[-1])

    def __getattr__(self, name: str) -> Any:
        return self.found[name]


@pytest.fixture(scope="module")
def trackio(owner: Home, home: Path) -> Trackio:
    return Trackio(owner)


def test_wandb_holds_every_metric_of_the_run_under_its_name(
    home: Path, parts: list[WandbFile]
) -> None:
    logged = {name for part in parts for line in part.history for name in line}
    metrics = {name for name in logged if name.startswith(("train/", "eval/"))} - ADDED
    assert metrics == expected_names(home)


def test_trackio_holds_the_same_names_at_the_step_they_are_of(home: Path, trackio: Trackio) -> None:
    (logs,) = trackio.logs
    logged = {name for line in logs for name in line}
    assert {n for n in logged if n.startswith(("train/", "eval/"))} - ADDED == expected_names(home)
    rewards = {line["step"]: line["train/reward"] for line in logs if "train/reward" in line}
    assert set(rewards) == {1, 2, 3} and rewards[3] == lines_of(home)["reward"]


def test_the_project_is_abacist_and_the_run_is_called_like_its_directory(
    parts: list[WandbFile], trackio: Trackio
) -> None:
    assert {(part.project, part.name) for part in parts} == {("abacist", "arith")}
    assert [run["name"] for run in trackio.runs] == ["arith"]


def test_a_table_of_completions_grows_and_nothing_in_it_is_replaced(
    home: Path, parts: list[WandbFile]
) -> None:
    first, second = (part.table("completions") for part in parts)
    assert [row[0] for row in first] == [1] * 8 + [2] * 8
    assert [row[0] for row in second] == [2] * 8 + [3] * 8
    assert first[8:] == second[:8]  # the resumed run took the same step
    pieces = [line for line in parts[0].history if "completions/path" in line]
    assert {line["completions/_type"] for line in pieces} == {"incremental-table-file"}
    assert [line["completions/increment_num"] for line in pieces] == [0, 1]


def test_trackio_has_every_completion_as_a_trace_with_what_it_earned(trackio: Trackio) -> None:
    (traces,) = trackio.traces
    assert len(traces) == 4 * 8
    for trace in traces:
        assert trace["messages"][-1]["role"] == "assistant"
        assert {"rewards/correctness", "rewards/xml_count", "advantage"} <= set(trace["metadata"])
        assert trace["step"] == trace["metadata"]["step"]


def test_completions_are_printed_as_lines_of_the_watcher_not_as_trls_table(home: Path) -> None:
    said = (home / "said.txt").read_text(encoding="utf-8")
    assert said.count(", a completion: advantage ") == 2 and "━" not in said


def test_the_verdict_is_in_the_summary_and_the_run_has_ended(
    home: Path, parts: list[WandbFile], trackio: Trackio
) -> None:
    verdict = json.loads((home / "arith" / "evals" / "verdict.json").read_text(encoding="utf-8"))
    accuracy = verdict["paired"]["accuracy"]
    last = trackio.logs[0][-1]
    for summary in (parts[-1].summary, last):
        assert summary["verdict/before"] == accuracy["before"]["value"]
        assert summary["verdict/after"] == accuracy["after"]["value"]
        assert summary["verdict/gain_low"] == accuracy["change"]["low"]
        assert summary["verdict/gained"] == len(accuracy["gained"])
        assert summary["verdict/p_value"] == accuracy["p_value"]
    sentence = parts[-1].summary["verdict/sentence"]
    assert "6 problems it never saw" in sentence
    assert last["verdict/sentence"]["_value"] == sentence
    assert [part.exit_code for part in parts] == [0, 0]


def test_settings_and_code_state_are_in_the_configuration(
    home: Path, parts: list[WandbFile], trackio: Trackio
) -> None:
    manifest = json.loads((home / "arith" / "manifest.json").read_text(encoding="utf-8"))
    for config in (parts[0].config, trackio.configs[0]):
        told = config["manifest"]
        assert told["task"]["problems"] == {"train": 20, "selection": 4, "heldout": 6}
        assert told["data"] == manifest["data"] and told["git_commit"] == manifest["git_commit"]
        assert told["versions"]["trl"] == manifest["versions"]["trl"]
        assert told["rewards"] == manifest["rewards"] and told["task"]["shots"] == 0
        assert config["lora_r"] == 16 and config["lora_alpha"] == 32
        assert config["lora_target_modules"] == ["all-linear"]
        assert config["dataset_name"] == "generated" and config["control"] == "none"
        assert config["recipe"] == "tiny" and config["dtype"] == "float32"
        assert set(TRACKERS) == set(config["report_to"]) and config["log_completions"] is True


def test_a_resumed_run_goes_on_in_the_same_tracker_run_and_repeats_no_step_in_vain(
    home: Path, parts: list[WandbFile], trackio: Trackio
) -> None:
    first, second = parts
    assert first.run_id == second.run_id
    kept = json.loads((home / "arith" / "trackers.json").read_text(encoding="utf-8"))
    assert kept["wandb"]["id"] == first.run_id and kept["trackio"]["name"] == "arith"
    assert {line["train/global_step"] for line in second.history} == {2, 3}
    assert len(trackio.runs) == 1


@needs_tensorboard
def test_tensorboard_has_each_step_once_the_verdict_and_texts(home: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(home / "arith" / "tensorboard"))
    events.Reload()
    scalars = set(events.Tags()["scalars"])
    assert {n for n in scalars if n.startswith(("train/", "eval/"))} == expected_names(home)
    assert [event.step for event in events.Scalars("train/reward")] == [1, 2, 3]
    assert [event.step for event in events.Scalars("verdict/gain")] == [3]
    texts = {name.removesuffix("/text_summary") for name in events.Tags()["tensors"]}
    assert {"run", "completions", "verdict/sentence"} <= texts


JOINED = """
import sys, trackio, wandb
from abacist.cli.main import main
mine, theirs = wandb.init(project="mine", name="sweep"), trackio.init(project="mine", name="sweep")
assert main(sys.argv[1:]) == 0
assert wandb.run is mine and trackio.context_vars.current_run.get() is theirs, "it was closed"
wandb.log({"after": 1}); trackio.log({"after": 1}); wandb.finish(); trackio.finish()
"""


def test_a_tracker_run_that_a_person_began_is_joined_and_left_open(
    owner: Home, tmp_path: Path
) -> None:
    flags = ["--max_steps", "1", *SHORT, "--report_to", "wandb", "trackio", "--project", "other"]
    owner.python("-c", JOINED, "train", "--output_dir", "run", *flags, cwd=tmp_path)
    (mine,) = wandb_files(tmp_path)
    assert (mine.project, mine.name) == ("mine", "sweep")
    assert "verdict/gain" in mine.summary and mine.summary["after"] == 1
    (logs,) = Trackio(owner, "mine").logs
    assert {"verdict/gain", "after", "train/reward"} <= {name for line in logs for name in line}
