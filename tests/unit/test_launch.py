"""What ``--accelerate_config`` and ``--num_processes`` take, before any process is started."""

from __future__ import annotations

import os
from pathlib import Path

import accelerate.commands.launch
import pytest
import torch
from torch.distributed.elastic.utils.logging import get_logger

from abacist.cli import launch
from abacist.cli.launch import PROFILES, Launch, hand_over, take_launch
from abacist.errors import UsageError


def refusal(*flags: str) -> str:
    with pytest.raises(UsageError) as caught:
        found = take_launch(list(flags))
        assert found is not None
        hand_over(found, [])
    return str(caught.value)


def test_the_two_flags_are_taken_and_the_others_left() -> None:
    flags = ["--seed", "1", "--accelerate_config", "multi_cpu", "--num_processes", "2", "--json"]
    assert take_launch(flags) == Launch("multi_cpu", 2)
    assert flags == ["--seed", "1", "--json"]
    assert take_launch(flags) is None and take_launch(["--num_processes", "1"]) is None


@pytest.mark.parametrize(
    "typed",
    [
        ["--accelerate_config=multi_cpu", "--num_processes=2"],
        ["--accelerate-config", "multi_cpu", "--num-processes", "2"],
    ],
)
def test_the_two_flags_may_be_spelled_as_every_other_flag(typed: list[str]) -> None:
    flags = ["tiny", *typed, "--seed", "1"]
    launch = take_launch(flags)
    assert launch is not None and (launch.config, launch.num_processes) == ("multi_cpu", 2)
    assert flags == ["tiny", "--seed", "1"]


def test_a_path_with_a_space_is_quoted_where_a_command_is_printed() -> None:
    assert Launch("my file.yaml", 2).flags == "--accelerate_config 'my file.yaml' --num_processes 2"


def test_every_profile_but_ours_is_a_file_of_trl() -> None:
    for name in PROFILES:
        if name != launch.MULTI_CPU:
            path, settings = launch._settings_of(name)
            assert path.is_file() and "distributed_type" in settings


def test_what_cannot_be_started_is_refused_with_what_can(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert "multi_gpu" in refusal("--accelerate_config", "multi-gpu")
    assert "--accelerate_config multi_gpu" in refusal("--num_processes", "2")
    assert "a number" in refusal("--accelerate_config", "multi_cpu", "--num_processes", "two")
    assert "how many" in refusal("--accelerate_config", "multi_cpu")
    assert "once" in refusal("--accelerate_config")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert "no GPU" in refusal("--accelerate_config", "fsdp2", "--num_processes", "2")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert "at most 2" in refusal("--accelerate_config", "multi_gpu", "--num_processes", "3")
    assert "at most 1" in refusal("--accelerate_config", "single_gpu", "--num_processes", "2")
    monkeypatch.setattr(launch, "find_spec", lambda name: None)
    assert "deepspeed" in refusal("--accelerate_config", "zero2", "--num_processes", "2")
    file = tmp_path / "mine.yaml"
    file.write_text("num_processes: 4\n", encoding="utf-8")
    assert "asks for 4 processes" in refusal("--accelerate_config", str(file))
    file.write_text("- 4\n", encoding="utf-8")
    assert "no settings" in refusal("--accelerate_config", str(file))
    monkeypatch.setenv("LOCAL_RANK", "0")
    assert "has started this one" in refusal("--accelerate_config", "multi_gpu")


def test_one_process_is_not_launched(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert hand_over(Launch("multi_cpu", 1), []) is None


def test_the_launcher_itself_says_nothing_while_the_processes_run(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    for name in ("ABACIST_LAUNCH_FLAGS", "ABACIST_PROGRAM", "CUDA_VISIBLE_DEVICES"):
        monkeypatch.setenv(name, "")  # and put back after the test
    logger = get_logger("torch.distributed.elastic.agent.server.api")  # as torch's launcher has it
    monkeypatch.setattr(
        accelerate.commands.launch, "launch_command", lambda asked: logger.warning("death signal")
    )
    monkeypatch.setattr(logger, "propagate", True)
    assert hand_over(Launch("multi_cpu", 2), []) == 0
    # By which the processes say how a run of theirs is resumed.
    flags = "--accelerate_config multi_cpu --num_processes 2"
    assert os.environ["ABACIST_LAUNCH_FLAGS"] == flags
    assert caplog.messages == []
    logger.warning("heard again")
    assert caplog.messages == ["heard again"]
