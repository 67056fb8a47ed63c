"""``abacist train --accelerate_config NAME|FILE``: hand over to ``accelerate launch``.

The profiles are TRL's own files, and ``multi_cpu`` beside them. What the command line says is
checked here, in one process, before several are started. The processes run ``abacist train`` with
the rest of the command line, and their exit code is this command's.
"""

from __future__ import annotations

import logging
import os
import shlex
import signal
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from abacist.cli import console
from abacist.cli.flags import nearest
from abacist.errors import AbacistError, ProcessLost, UsageError, first_line

MULTI_CPU, SINGLE_GPU = "multi_cpu", "single_gpu"
PROFILES = (SINGLE_GPU, "multi_gpu", "fsdp1", "fsdp2", "zero1", "zero2", "zero3", MULTI_CPU)
# A step, and a checkpoint after it, may take minutes; accelerate's launcher would wait for 30 s.
SHUTDOWN_SECONDS = 600
ENDED_BY_LAUNCHER = (signal.SIGTERM, signal.SIGINT)
_CPU_FLAGS = [
    "--multi_gpu", "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no",
    "--main_process_port", "0",
]  # fmt: skip


@dataclass(frozen=True)
class Launch:
    """What ``--accelerate_config`` and ``--num_processes`` ask for."""

    config: str
    num_processes: int | None

    @property
    def flags(self) -> str:
        """The two flags, as typed."""
        number = "" if self.num_processes is None else f" --num_processes {self.num_processes}"
        return f"--accelerate_config {shlex.quote(self.config)}{number}"


def take_launch(flags: list[str]) -> Launch | None:
    """Take ``--accelerate_config`` and ``--num_processes`` out of ``flags``; None without them.

    Raises UsageError for an unknown profile, and for anything but a number of processes.
    """
    config, number = (_take(flags, name) for name in ("--accelerate_config", "--num_processes"))
    if number is not None and not (
        number.isascii() and number.isdigit() and len(number) < 7 and int(number) > 0
    ):
        what = f"--num_processes takes a number, not {number[:40]!r}"
        raise UsageError(what, "--num_processes 2")
    if config is None:
        if number is not None and int(number) > 1:
            raise UsageError(
                "--num_processes does not say how processes are started",
                f"Add --accelerate_config multi_gpu, or {MULTI_CPU} on a machine without GPUs.",
            )
        return None
    if config not in PROFILES and not Path(config).is_file():
        guess = nearest(config, PROFILES)
        raise UsageError(
            f"--accelerate_config {config} is neither a profile nor a file",
            f"Did you mean {guess}?" if guess else f"There are: {', '.join(PROFILES)}.",
        )
    if "LOCAL_RANK" in os.environ:
        raise UsageError(
            f"--accelerate_config {config} starts processes, and a launcher has started this one",
            "Leave it out under accelerate launch and torchrun.",
        )
    return Launch(config, None if number is None else int(number))


def _take(flags: list[str], name: str) -> str | None:
    for at, flag in enumerate(flags):  # --num-processes=2, as for every other flag
        spelled, equals, value = flag.partition("=")
        if spelled.replace("-", "_") == name.replace("-", "_") and flag != name:
            flags[at : at + 1] = [name, value] if equals else [name]
    if name not in flags:
        return None
    at = flags.index(name)
    value = flags[at + 1] if at + 1 < len(flags) else ""
    if not value or value.startswith("--") or name in flags[at + 1 :]:
        raise UsageError(f"{name} takes one value, once", f"abacist train {name} …")
    del flags[at : at + 2]
    return value


def hand_over(launch: Launch, argv: Sequence[str]) -> int | None:
    """Run ``abacist train`` with ``argv`` in the processes that are asked for: its exit code.

    None where that is one process, and this one will do. Raises UsageError for more processes than
    GPUs, a package that is missing and a file that accelerate does not take.
    """
    import torch

    cards = torch.cuda.device_count()
    on_cpu = launch.config == MULTI_CPU
    number = launch.num_processes
    if on_cpu and number is None:
        raise UsageError(f"{MULTI_CPU} does not say how many", "Add --num_processes 2.")
    if launch.config in PROFILES and not on_cpu:
        number = number or (1 if launch.config == SINGLE_GPU else cards)
        most = min(cards, 1) if launch.config == SINGLE_GPU else cards
        if number > most or not cards:
            here = f"{cards} GPU{'s' * (cards != 1)}" if cards else "no GPU that PyTorch sees"
            raise UsageError(
                f"--accelerate_config {launch.config} --num_processes {max(number, 1)}: "
                f"this machine has {here}",
                f"Start at most {most}."
                if cards
                else f"--accelerate_config {MULTI_CPU} runs on CPUs.",
            )
    if number == 1 and launch.config in (SINGLE_GPU, MULTI_CPU):
        if on_cpu:
            os.environ["CUDA_VISIBLE_DEVICES"] = ""
        return None
    return _launched(launch, _arguments(launch, number, cards), argv)


def _arguments(launch: Launch, number: int | None, cards: int) -> list[str]:
    """What ``accelerate launch`` is given before the program."""
    if launch.config == MULTI_CPU:
        threads = os.environ.get("OMP_NUM_THREADS")
        threads = threads or str(max(1, (os.cpu_count() or 1) // (number or 1)))
        return [
            *_CPU_FLAGS, "--num_processes", str(number), "--num_cpu_threads_per_process", threads,
        ]  # fmt: skip
    path, settings = _settings_of(launch.config)
    kind = str(settings.get("distributed_type", "")).upper()
    if kind == "DEEPSPEED" and find_spec("deepspeed") is None:
        raise UsageError(
            f"--accelerate_config {launch.config} needs deepspeed, which is not installed",
            'pip install "abacist[deepspeed]"',
        )
    number = number or settings.get("num_processes")
    on_cpu = settings.get("use_cpu") or kind == "MULTI_CPU"
    if on_cpu and kind != "FSDP":  # which is refused where it is found not to shard
        raise UsageError(
            f"{launch.config} is for CPUs, where accelerate's launcher starts one process only",
            f"--accelerate_config {MULTI_CPU} --num_processes {number or 2}",
        )
    machines = settings.get("num_machines") or 1
    if not on_cpu and machines == 1 and isinstance(number, int) and number > cards:
        raise UsageError(
            f"{launch.config} asks for {number} processes, and this machine has {cards} "
            f"GPU{'s' * (cards != 1)}",
            f"Add --num_processes {cards}." if cards else f"On CPUs: {MULTI_CPU}.",
        )
    arguments = ["--config_file", str(path)]
    if machines == 1 and not settings.get("main_process_port"):
        arguments += ["--main_process_port", "0"]
    return arguments + ([] if number is None else ["--num_processes", str(number)])


def _settings_of(config: str) -> tuple[Path, dict[str, Any]]:
    import yaml

    path = Path(config)
    if config in PROFILES:
        path = Path(str(resources.files("trl.accelerate_configs").joinpath(f"{config}.yaml")))
    try:
        settings = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UsageError(f"{config} cannot be read: {first_line(error)}") from error
    if not isinstance(settings, dict):
        raise UsageError(f"{config} holds no settings", "`accelerate config` writes such a file.")
    return path, settings


def _launched(launch: Launch, arguments: list[str], argv: Sequence[str]) -> int:
    from accelerate.commands.launch import launch_command, launch_command_parser
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    parser = launch_command_parser()
    asked = parser.parse_args([*arguments, "-m", "abacist", "train", *argv])
    asked.shutdown_timeout, asked.monitor_interval = SHUTDOWN_SECONDS, 0.2
    os.environ["ABACIST_LAUNCH_FLAGS"] = launch.flags
    os.environ["ABACIST_PROGRAM"] = console.program()
    if launch.config == MULTI_CPU:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    # What a process has to say it says itself; each logger of torch's launcher has its own level.
    disabled = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            launch_command(asked)
    except ChildFailedError as error:
        codes = {rank: failure.exitcode for rank, failure in error.failures.items()}
        for rank, code in codes.items():
            if code < 0 and -code not in ENDED_BY_LAUNCHER:  # it could not say so itself
                raise ProcessLost(
                    f"rank {rank} was ended by {signal.Signals(-code).name}, and with it the run",
                    "Something else ended it: too little memory, or a person.",
                ) from error
        code = int(codes.get(0) or next(iter(codes.values())))
        return code if code > 0 else 128 - code
    except SignalException as stop:
        return 128 + int(stop.sigval)
    except (AbacistError, MemoryError):
        raise
    except Exception as error:  # accelerate checks what it is given in many ways
        raise UsageError(
            f"--accelerate_config {launch.config} was not started: {first_line(error)}",
            "`accelerate launch --help` says what such a file may hold.",
        ) from error
    finally:
        logging.disable(disabled)
    return 0
