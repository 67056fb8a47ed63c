"""FSDP2: a run on two processes, each with half of every weight, from start to end."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import safetensors.torch

from abacist.policy.decoding.generation import generate
from abacist.policy.loading import load_policy
from abacist.records.rollout import read_rollouts
from bundles import forget_the_end
from imported import Imported

pytestmark = [pytest.mark.e2e, pytest.mark.slow]

SCRIPT = Path(__file__).with_name("fsdp2_on_cpus.py")
FLAGS = [
    "--num_heldout_problems", "5", "--num_consistency_problems", "1", "--num_selection_problems",
    "3", "--num_train_problems", "40", "--max_completion_length", "24", "--num_generations", "4",
    "--max_steps", "3", "--save_steps", "1", "--save_total_limit", "9", "--eval_steps", "2",
    "--logging_steps", "1", "--per_device_train_batch_size", "8",
]  # fmt: skip
# As accelerate launch hands on TRL's profile fsdp2, without its bfloat16.
PROFILE = {
    "ACCELERATE_USE_CPU": "true",
    "ACCELERATE_USE_FSDP": "true",
    "ACCELERATE_MIXED_PRECISION": "no",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_CPU_RAM_EFFICIENT_LOADING": "true",
    "FSDP_RESHARD_AFTER_FORWARD": "true",
    "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT",
}


def train(python: Imported, *arguments: str, sharded: bool = True) -> str:
    """What the first of two processes says."""
    program = [str(SCRIPT)] if sharded else ["-m", "abacist"]
    profile = PROFILE if sharded else {"ACCELERATE_USE_CPU": "true"}
    ended = python.run_in(2, *program, "train", *arguments, env=os.environ | profile)
    assert not any(one.returncode for one in ended), [
        one.stdout[-2000:] + one.stderr[-3000:] for one in ended
    ]
    return ended[0].stdout


@pytest.fixture(scope="module")
def run(imported: Imported, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run in shards to its verdict: read only."""
    path = tmp_path_factory.mktemp("sharded") / "run"
    said = train(imported, "--output_dir", str(path), *FLAGS)
    assert "rollouts: our engine" in said
    assert "training: TRL's path (the model is sharded over processes)" in said
    return path


def test_shards_learn_what_whole_models_in_two_processes_learn(
    imported: Imported, run: Path, tmp_path: Path
) -> None:
    other = tmp_path / "whole"
    train(imported, "--output_dir", str(other), *FLAGS, sharded=False)
    first = "rollouts/step-000001.parquet"
    ours, theirs = (read_rollouts(path / first) for path in (run, other))
    assert [one.completion_ids for one in ours] == [one.completion_ids for one in theirs]
    assert [one.reward for one in ours] == [one.reward for one in theirs]
    trained, expected, start = (
        safetensors.torch.load_file(path / "adapter_model.safetensors")
        for path in (run / "checkpoint-1", other / "checkpoint-1", other / "checkpoint-0")
    )
    assert trained.keys() == expected.keys()
    assert max(float((expected[name] - start[name]).abs().max()) for name in expected) > 1e-4
    # Adam's first step is as long for a gradient of 1e-9 as for one of 1, and rounding decides the
    # sign of the first: so not all weights are equal, but nearly all.
    apart = [(trained[name] - expected[name]).abs() for name in expected]
    total = sum(weight.numel() for weight in apart)
    assert sum(int((weight > 1e-6).sum()) for weight in apart) < total / 100


def test_problems_are_measured_with_the_weights_that_are_saved(run: Path) -> None:
    measured = read_rollouts(run / "evals" / "after" / "rollouts.parquet")
    assert len(measured) == 5
    policy = load_policy(str(run), device="cpu")
    written = generate(policy, [one.messages for one in measured], max_completion_tokens=24)
    assert [one.completion_ids for one in measured] == [reply.ids for [reply] in written]
    before = read_rollouts(run / "evals" / "before" / "rollouts.parquet")
    assert [one.completion_ids for one in measured] != [one.completion_ids for one in before]
    logged = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in logged]
    assert [row["step"] for row in rows if "eval_accuracy" in row] == [2, 3]


def test_a_run_in_shards_resumes_exactly(imported: Imported, run: Path, tmp_path: Path) -> None:
    resumed = tmp_path / "run"
    shutil.copytree(run, resumed)
    forget_the_end(resumed)  # of a run that is finished nothing would be done
    train(imported, "--resume", str(resumed / "checkpoint-2"))
    for name in ("adapter_model.safetensors", "metrics.jsonl", "evals/after/rollouts.parquet"):
        assert (resumed / name).read_bytes() == (run / name).read_bytes(), name
