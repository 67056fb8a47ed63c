"""Runs that are ended from outside: at random moments, and before every change a save makes.

Each trial starts ``abacist train``, ends it by a signal, resumes it until it is through, and
compares every byte of the result with that of a run that nobody touched.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from transformers import PreTrainedTokenizerFast

from abacist.learning.resume import resumable
from abacist.learning.resume.checkpoints import ASIDE, checkpoints_of, defect, step_of
from soak import warm
from soak.ledger import Trial

# A step of 8 replies takes 2 of the 6 problems, so the run has two epochs.
FLAGS = [
    "--max_steps", "6", "--save_steps", "2", "--num_heldout_problems", "2",
    "--num_selection_problems", "2", "--eval_steps", "3", "--num_train_problems", "6",
    "--logging_steps", "1", "--per_device_train_batch_size", "8", "--num_generations", "4",
    "--max_completion_length", "12",
]  # fmt: skip
SAVE_STEPS = 2
SAVE_OF_STEP = 4  # the third of the run: one to keep, one to rotate away
SAME = ("adapter_model.safetensors", "metrics.jsonl", "config.yaml", "evals", "rollouts")
KILLS_IN_A_RUN = 3
CHANGES = {"os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.truncate", "os.link"}
Trials = list[tuple[str, Callable[[Path], Trial]]]


def contents(run: Path) -> dict[str, bytes]:
    """What a resumed run must have in common with the uninterrupted one."""
    files = [path for name in SAME for path in [run / name, *(run / name).rglob("*")]]
    return {str(path.relative_to(run)): path.read_bytes() for path in files if path.is_file()}


def newest_sound(run: Path) -> int:
    """The step of the newest sound checkpoint; -1 without one."""
    return max((step_of(path) for path in checkpoints_of(run) if defect(path) is None), default=-1)


def steps_done(run: Path) -> int:
    """The last step that was logged."""
    path = run / "metrics.jsonl"
    whole = (
        path.read_text(encoding="utf-8").rpartition("\n")[0].split("\n") if path.exists() else []
    )
    return max((json.loads(line)["step"] for line in whole if line), default=0)


def uninterrupted(shared: Path) -> tuple[Path, float]:
    """The run that nobody kills, and how many seconds it takes."""
    run, began = shared / "whole" / "run", time.monotonic()
    code = warm.exit_code(train_anew(run, output=shared / "output"))
    if code != 0:
        raise RuntimeError((shared / "output").read_text(encoding="utf-8"))
    return run, time.monotonic() - began


def train_anew(run: Path, **how: Any) -> Any:
    """The command that begins the run, in a process of its own."""
    return warm.train("--output_dir", str(run), "--overwrite", *FLAGS, **how)


def go_on(run: Path, **how: Any) -> Any:
    """The command that takes the run up again; that which began it, if it never was one."""
    if (run / "config.yaml").exists():
        return warm.train("--resume", str(run), **how)
    return train_anew(run, **how)


def finish(run: Path, whole: Path) -> list[str]:
    """Resume a run to its end and name what differs from the whole one, and what is left over."""
    output = run.parent / "finish"
    code = warm.exit_code(go_on(run, output=output))
    if code != 0:
        said = output.read_text(errors="replace", encoding="utf-8").strip().split("\n")
        return [f"resuming ended with {code}: {said[-1][:200]}"]
    one, other = contents(whole), contents(run)
    wrong = sorted(name for name in one.keys() | other.keys() if one.get(name) != other.get(name))
    return wrong + [f"left over: {path.name}" for path in run.rglob(".*")]


def kills(shared: Path, options: argparse.Namespace) -> Trials:
    """Runs killed at random moments, up to three times each, until there were enough kills."""
    whole, seconds = uninterrupted(shared)
    wanted = [min(KILLS_IN_A_RUN, options.kills - n) for n in range(0, options.kills, 3)]
    return [
        (f"run {n} ({count} kills)", functools.partial(_kill, whole, seconds, count, n))
        for n, count in enumerate(wanted)
    ]


def _kill(whole: Path, seconds: float, count: int, seed: int, place: Path) -> Trial:
    trial, rng, run, moments = Trial(), random.Random(seed), place / "run", []
    trial.seen["most steps lost"] = 0
    wrong: list[str] = []
    while len(moments) < count:
        process, moment = go_on(run, output=place / "output"), rng.uniform(0, seconds)
        time.sleep(moment)
        process.kill()
        if warm.exit_code(process) != -signal.SIGKILL:  # it was through before
            through = finish(run, whole)
            trial.failed += [f"through after {moments}: {through}"] if through else []
            shutil.rmtree(run)
            seconds *= 0.8  # the machine has become faster since these were measured
            continue
        moments.append(f"{moment:.2f} s")
        lost = max(steps_done(run) - max(newest_sound(run), 0), 0)
        trial.seen["most steps lost"] = max(lost, trial.seen["most steps lost"])
        wrong = [f"{lost} steps lost"] if lost > SAVE_STEPS else []
        if len(moments) < count:
            trial.expect(f"killed after {', '.join(moments)}", wrong)
    trial.expect(f"killed after {', '.join(moments)}", wrong + finish(run, whole))
    return trial


def sigterm(shared: Path, options: argparse.Namespace) -> Trials:
    """Runs that are told to end, once each, at a random moment after they began."""
    whole, seconds = uninterrupted(shared)
    return [
        (f"run {n}", functools.partial(_terminate, whole, seconds, n))
        for n in range(options.sigterms)
    ]


def _terminate(whole: Path, seconds: float, seed: int, place: Path) -> Trial:
    trial, rng, run, output = Trial(), random.Random(seed), place / "run", place / "output"
    code = 0
    while code == 0:  # a run that was through before the signal came proves nothing
        shutil.rmtree(run, ignore_errors=True)
        process = train_anew(run, output=output)
        warm.wait_for(run / "config.yaml", process)
        time.sleep(moment := rng.uniform(0, seconds))
        process.terminate()
        told = time.monotonic()
        code = warm.exit_code(process)
    trial.seen["most seconds to stop"] = round(time.monotonic() - told, 2)
    wrong = [] if code == 128 + signal.SIGTERM else [f"it ended with {code}"]
    if f"abacist train --resume {run}" not in output.read_text(encoding="utf-8"):
        wrong.append("it did not say how to go on")
    if steps_done(run) > max(newest_sound(run), 0):
        wrong.append(f"step {steps_done(run)} done, {newest_sound(run)} saved")
    wrong += [f"{path.name} is not sound" for path in checkpoints_of(run) if defect(path)]
    trial.expect(f"told after {moment:.2f} s", wrong + finish(run, whole))
    return trial


def saves(shared: Path, options: argparse.Namespace) -> Trials:
    """One save, killed before each of its changes on the disk in turn, and within its large files.

    The last trial checks that between any two files of the checkpoint there was a kill.
    """
    whole, _ = uninterrupted(shared)
    begun, seen = shared / "begun" / "run", shared / "seen"
    code = warm.exit_code(
        train_anew(begun, output=shared / "output", before=lambda: kill_in_save(0, seen))
    )
    if code != -signal.SIGKILL or newest_sound(begun) != SAVE_OF_STEP - SAVE_STEPS:
        raise RuntimeError((shared / "output").read_text(encoding="utf-8"))
    probe = shared / "probe" / "run"
    shutil.copytree(begun, probe)
    warm.exit_code(go_on(probe, output=shared / "output", before=lambda: kill_in_save(-1, seen)))
    operations = seen.read_text(encoding="utf-8").split("\n")[:-1]
    trials: Trials = [
        (f"{n}: {operation}", functools.partial(_kill_in_save, begun, whole, n))
        for n, operation in enumerate(operations)
    ]
    counts = {int(operation.partition(" ")[0]) for operation in operations}
    gaps = [f"none with {n}" for n in range(max(counts)) if n not in counts]
    between = Trial(seen={"files of a checkpoint": max(counts), "kills": len(operations)})
    between.expect("a kill between any two files", gaps)
    return [*trials, ("between any two files", lambda place: between)]


def _kill_in_save(begun: Path, whole: Path, operation: int, place: Path) -> Trial:
    trial, run, seen = Trial(), place / "run", place / "seen"
    shutil.copytree(begun, run)
    process = go_on(run, output=place / "output", before=lambda: kill_in_save(operation, seen))
    code = warm.exit_code(process)
    wrong = [] if code == -signal.SIGKILL else [f"it ended with {code}"]
    if newest_sound(run) < SAVE_OF_STEP - SAVE_STEPS:
        wrong.append("no sound checkpoint")
    trial.expect(
        seen.read_text(encoding="utf-8").strip().split("\n")[-1], wrong + finish(run, whole)
    )
    return trial


def kill_in_save(operation: int, seen: Path) -> None:
    """Have this process die before the n-th change that a save makes; with -1 only at its end.

    What the changes are, and how many files stood in the unfinished checkpoint before each, is
    written to ``seen``.
    """
    seen.parent.mkdir(parents=True, exist_ok=True)
    log = os.open(seen, os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
    left, aside = [operation], [Path()]
    counting: list[bool] = []

    def passing(what: str) -> None:
        if not counting:
            return
        counting.clear()  # what is done here is no operation of the save
        files = sum(path.is_file() for path in aside[0].rglob("*"))
        os.write(log, f"{files} files, {what}\n".encode())
        if left[0] == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        left[0] -= 1
        counting.append(True)

    def audited(event: str, arguments: tuple[Any, ...]) -> None:
        if not counting or not arguments or not isinstance(arguments[0], str | bytes | os.PathLike):
            return
        path = Path(os.fsdecode(arguments[0]))
        writes = event == "open" and arguments[2] & (os.O_CREAT | os.O_TRUNC)
        if writes or (event in CHANGES and not (event == "os.mkdir" and path.exists())):
            passing(f"{event} {path.name}")

    def half(path: Path, what: str) -> None:
        """Pass a moment at which only the first half of a file is on the disk."""
        counting.clear()
        content = path.read_bytes()
        path.write_bytes(content[: len(content) // 2])
        counting.append(True)
        passing(what)
        counting.clear()
        path.write_bytes(content)
        counting.append(True)

    def counted(owner: Any, name: str, place: Callable[..., Any] | None = None) -> None:
        do = getattr(owner, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            passing(name)
            result = do(*args, **kwargs)
            if place and counting:
                half(Path(str(place(*args))), f"{name}, half written")
            return result

        setattr(owner, name, call)

    # What is written by C++ and Rust raises no audit event.
    counted(torch, "save", lambda value, path: path)
    counted(safetensors.torch, "serialize_file", lambda value, path, *rest: path)
    counted(PreTrainedTokenizerFast, "_save_pretrained")
    sys.addaudithook(audited)
    save = resumable.ResumableTrainer._save_checkpoint

    def watched(self: Any, *args: Any) -> None:
        is_it = self.state.global_step == SAVE_OF_STEP
        if is_it:
            aside[0] = Path(self.args.output_dir) / ASIDE
            counting.append(True)
        save(self, *args)
        if is_it:
            passing("the save is over")
            os.kill(os.getpid(), signal.SIGKILL)

    resumable.ResumableTrainer._save_checkpoint = watched  # type: ignore[method-assign]
