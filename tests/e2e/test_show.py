"""`abacist show` as a person types it: into a terminal, into a pipe, and at what is not a run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from abacist.records.rollout import Rollout, StopReason, write_rollouts
from abacist.task.reply import parse_reply, render_reply

pytestmark = pytest.mark.e2e

SOURCE = Path(__file__).resolve().parents[2] / "src"


def show(*arguments: object, **environ: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "abacist", "show", *map(str, arguments)],
        capture_output=True, text=True, encoding="utf-8", timeout=120, check=False,
        env={**os.environ, "PYTHONPATH": str(SOURCE), "PYTHONIOENCODING": "utf-8", **environ},
    )  # fmt: skip


def rollout(number: int, completion: str, is_correct: bool) -> Rollout:
    return Rollout(
        run_id="run", step=1 + number // 8, split="train", group=number // 4 % 2, member=number % 4,
        messages=[{"role": "user", "content": f"What is 5 + 7? ({number})"}], completion=completion,
        completion_ids=[1], prompt_tokens=1, completion_tokens=1, stop_reason=StopReason.STOPPED,
        problem_id=f"p{number // 4}", difficulty=1, gold="12",
        read_answer=parse_reply(completion).answer, is_correct=is_correct,
        rewards={"correctness": 2.0 * is_correct}, reward=2.0 * is_correct, advantage=0.0,
    )  # fmt: skip


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was killed in its third step: 16 replies of two steps, no `finished`."""
    folder = tmp_path_factory.mktemp("show") / "killed"
    kinds = [(render_reply("5 + 7 = 12", "12"), True), (render_reply("5 + 7 = 13", "13"), False),
             ("It is 12", False), ("\x1b[2J\ud800<script>", False)]  # fmt: skip
    rows = [rollout(number, *kinds[number % 4]) for number in range(16)]
    for step in (1, 2):
        write_rollouts(folder / "rollouts" / f"step-{step:06d}.parquet",
                       [row for row in rows if row.step == step])  # fmt: skip
    manifest = {"format": "abacist-run", "format_version": 1}
    (folder / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
    (folder / "rollouts" / ".step-000003.parquet.77.tmp").write_bytes(b"half of")
    return folder


def test_without_filters_it_tells_the_newest_steps_story(run: Path) -> None:
    done = show(run)
    assert done.returncode == 0 and done.stderr == ""
    text = " ".join(done.stdout.split())
    assert "8 replies of step 2: 2 right, 2 unformatted, 4 wrong." in text
    assert "The run has not finished" in text
    for said in (
        "Right: the answer block holds “12”, the gold is “12”.",
        "Right in another format, not by our rule",
        "Wrong: the answer block holds “13”, the gold is “12”.",
        "Layout: There is no <reasoning> tag. There is no <answer> tag.",
    ):
        assert text.count(said) == 1, said


def test_into_a_pipe_it_is_plain(run: Path) -> None:
    for environ in ({}, {"NO_COLOR": "1"}, {"TERM": "dumb"}, {"COLUMNS": "40"}):
        done = show(run, "--num", 8, "--step", 1, **environ)
        assert done.returncode == 0 and "\x1b" not in done.stdout
        assert "\\x1b[2J" in done.stdout and "<script>" in done.stdout


def test_a_pipe_that_is_closed_early_is_no_failure_of_ours(run: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "abacist", "show", str(run), "--num", "16", "--min_reward", "-1"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(SOURCE)},
    )  # fmt: skip
    assert process.stdout is not None and process.stderr is not None
    process.stdout.close()
    errors = process.stderr.read()
    process.stderr.close()
    assert process.wait(timeout=120) == 141 and errors == b""


def test_a_group_is_shown_whole(run: Path) -> None:
    done = show(run, "--step", 1, "--group", "--outcome", "unformatted", "--num", 1)
    assert done.returncode == 0 and "4 replies | gold “12”" in done.stdout
    assert all(f"reply {member}: " in done.stdout for member in range(4))
    assert ">2  unformatted" in done.stdout


def test_for_machines_it_is_one_object(run: Path) -> None:
    found = json.loads(show(run, "--json", "--outcome", "wrong", "--num", 9).stdout)
    assert found["matching"] == 8 and found["outcomes"] == {"wrong": 8}
    assert found["finished"] is False and found["damaged"] == []
    assert {one["outcome"] for one in found["replies"]} == {"wrong"}
    assert found["replies"][1]["completion"] == "\x1b[2J\ufffd<script>"
    assert found["replies"][1]["defects"] == ["no_reasoning", "no_answer"]
    groups = json.loads(show(run, "--json", "--group", "--num", 2).stdout)["groups"]
    assert [len(group) for group in groups] == [4, 4]


def test_what_does_not_fit_is_an_error_that_says_what_there_is(run: Path) -> None:
    done = show(run, "--problem", "p33")
    assert done.returncode == 1 and "none of 16 replies fits" in done.stderr
    assert "Did you mean --problem p3?" in done.stderr and "Steps: 1 to 2." in done.stderr
    done = show(run, "--step", 7)
    assert done.returncode == 1 and "Steps: 1 to 2." in done.stderr


@pytest.mark.parametrize(
    "flags",
    [["--outcome", "green"], ["--step", "-1"], ["--num", "0"], ["--min_reward", "nan"],
     ["--min_reward", "2", "--max_reward", "1"], ["--stpe", "1"]],
    ids=" ".join,
)  # fmt: skip
def test_a_flag_that_makes_no_sense_is_a_usage_error(run: Path, flags: list[str]) -> None:
    done = show(run, *flags)
    assert done.returncode == 2 and done.stdout == "" and "error:" in done.stderr


def test_a_negative_reward_can_be_asked_for(run: Path) -> None:
    assert show(run, "--min_reward", "-1", "--num", 1).returncode == 0
    assert show(run, "--max_reward=-1").returncode == 1


def test_damage_is_named_and_the_rest_shown(run: Path, tmp_path: Path) -> None:
    folder = tmp_path / "rollouts"
    folder.mkdir()
    whole = (run / "rollouts" / "step-000001.parquet").read_bytes()
    (folder / "step-000001.parquet").write_bytes(whole)
    (folder / "step-000002.parquet").write_bytes(whole[: len(whole) // 2])
    done = show(tmp_path)
    assert done.returncode == 1
    assert "step-000002.parquet" in done.stderr and "8 replies of step 1" in done.stdout
    (folder / "step-000001.parquet").write_bytes(b"")
    done = show(tmp_path)
    assert done.returncode == 1 and "no reply that can be read" in done.stderr


@pytest.mark.parametrize("content", ["nothing", "a trainer's output", "a file", "not there"])
def test_what_is_no_run_gets_a_message(tmp_path: Path, content: str) -> None:
    path = tmp_path / "it"
    if content == "a file":
        path.write_text("hello", encoding="utf-8")
    elif content != "not there":
        path.mkdir()
    if content == "a trainer's output":
        (path / "checkpoint-2").mkdir()
        (path / "training_args.bin").write_bytes(b"x")
    done = show(path)
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr.startswith("error: ") and "Traceback" not in done.stderr
    assert "bug" not in done.stderr
