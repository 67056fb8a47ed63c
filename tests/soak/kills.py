"""Runs that are killed: at random moments, and between any two operations of a save.

Each function starts ``abacist train`` in a process of its own, ends it by SIGKILL, resumes it until
it is through, and compares every byte of the result with that of a run that nobody killed.

    PYTHONPATH=src:tests python tests/soak/kills.py [KILLS]
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from abacist.learning.resume.checkpoints import checkpoints_of, defect, step_of

FLAGS = [
    "--max_steps", "8", "--save_steps", "2", "--num_heldout_problems", "6",
    "--num_selection_problems", "4", "--eval_steps", "3", "--num_train_problems", "40",
    "--logging_steps", "1", "--per_device_train_batch_size", "8", "--num_generations", "4",
    "--max_completion_length", "24",
]  # fmt: skip
SAVE_STEPS = 2
SAME = ("adapter_model.safetensors", "metrics.jsonl", "config.yaml", "evals", "rollouts")
# Run instead of `python -m abacist`: dies at the n-th operation that a save does on the disk.
DYING = """
import os, shutil, signal, sys
from abacist.learning.resume import soundtrainer

left, saving = [int(sys.argv.pop(1))], []
def counted(operation):
    def call(*args, **kwargs):
        if saving:
            left[0] -= 1
            if left[0] < 0:
                os.kill(os.getpid(), signal.SIGKILL)
        return operation(*args, **kwargs)
    return call

for module, name in (
    (os, "replace"), (os, "fsync"), (os, "unlink"), (os, "rmdir"), (os, "mkdir"), (os, "open"),
):
    setattr(module, name, counted(getattr(module, name)))
save = soundtrainer.SoundTrainer._save_checkpoint
def watched(self, *args):
    if self.state.global_step == 4:  # the third of the run: one to keep, one to rotate away
        saving.append(1)
    save(self, *args)
    if saving:
        os.kill(os.getpid(), signal.SIGKILL)
soundtrainer.SoundTrainer._save_checkpoint = watched
from abacist.cli.main import main
sys.exit(main(["train", *sys.argv[1:]]))
"""


def contents(run: Path) -> dict[str, bytes]:
    """What a resumed run must have in common with the uninterrupted one."""
    files = [path for name in SAME for path in [run / name, *(run / name).rglob("*")]]
    return {str(path.relative_to(run)): path.read_bytes() for path in files if path.is_file()}


def start(
    *arguments: str, program: tuple[str, ...] = ("-m", "abacist", "train")
) -> subprocess.Popen[bytes]:
    """``abacist train`` in a process of its own, silent."""
    return subprocess.Popen(
        [sys.executable, *program, *arguments],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )


def newest_sound(run: Path) -> int:
    """The step of the newest sound checkpoint; -1 without one."""
    return max((step_of(path) for path in checkpoints_of(run) if defect(path) is None), default=-1)


def steps_done(run: Path) -> int:
    """The last step that was logged."""
    path = run / "metrics.jsonl"
    whole = path.read_text().rpartition("\n")[0].split("\n") if path.exists() else []
    return max((json.loads(line)["step"] for line in whole if line), default=0)


def uninterrupted(place: Path) -> tuple[Path, float]:
    """The run that nobody kills, and how many seconds it takes."""
    run, began = place / "whole" / "run", time.monotonic()
    if start("--output_dir", str(run), *FLAGS).wait() != 0:
        raise RuntimeError("the uninterrupted run failed")
    return run, time.monotonic() - began


def finish(run: Path, whole: Path, what: str) -> Iterator[str]:
    """Resume a run to its end and name what differs."""
    if (run / "config.yaml").exists():
        code = start("--resume", str(run)).wait()
    else:  # killed before there was a run: the same command again
        code = start("--output_dir", str(run), "--overwrite", *FLAGS).wait()
    if code != 0:
        yield f"{what}: resuming ended with {code}"
        return
    one, other = contents(whole), contents(run)
    different = sorted(
        name for name in one.keys() | other.keys() if one.get(name) != other.get(name)
    )
    if different:
        yield f"{what}: {', '.join(different)}"
    left = [str(path) for path in run.rglob(".*")]
    if left:
        yield f"{what}: left over: {', '.join(left)}"


def killed_at_random(place: Path, kills: int, seed: int = 0) -> Iterator[str]:
    """What goes wrong when runs are killed at ``kills`` random moments, up to three in each."""
    whole, seconds = uninterrupted(place)
    rng, done = random.Random(seed), 0
    while done < kills:
        run = place / "killed" / "run"
        shutil.rmtree(run.parent, ignore_errors=True)
        moments = []
        for _ in range(min(3, kills - done)):
            arguments = ["--resume", str(run)] if (run / "config.yaml").exists() else []
            arguments = arguments or ["--output_dir", str(run), "--overwrite", *FLAGS]
            process, moment = start(*arguments), rng.uniform(0, seconds)
            time.sleep(moment)
            process.kill()
            process.wait()
            done += 1
            moments.append(f"{moment:.2f} s")
            lost = steps_done(run) - newest_sound(run)
            if steps_done(run) and lost > SAVE_STEPS:
                yield f"killed after {moments}: {lost} steps lost"
        yield from finish(run, whole, f"killed after {', '.join(moments)}")


def killed_in_a_save(place: Path, first: int = 0, last: int = 400, every: int = 1) -> Iterator[str]:
    """What goes wrong when a run is killed at any one operation of a save, and then resumed."""
    whole, _ = uninterrupted(place)
    for operation in range(first, last, every):
        run = place / "killed" / "run"
        shutil.rmtree(run.parent, ignore_errors=True)
        program = ("-c", DYING, str(operation))
        code = start("--output_dir", str(run), *FLAGS, program=program).wait()
        if code != -signal.SIGKILL:
            yield f"operation {operation}: ended with {code}"
        if newest_sound(run) < 2:
            yield f"operation {operation}: no sound checkpoint of step 2"
        is_through = newest_sound(run) == 4 and not list(run.glob(".saving*"))
        yield from finish(run, whole, f"killed at operation {operation} of a save")
        if is_through:
            return


def main(kills: int) -> int:
    """Both, and what was found."""
    with tempfile.TemporaryDirectory() as folder:
        found = [
            *killed_in_a_save(Path(folder) / "a"),
            *killed_at_random(Path(folder) / "b", kills),
        ]
    print("\n".join(found) if found else "every killed run ended as the uninterrupted one")
    return 1 if found else 0


if __name__ == "__main__":
    raise SystemExit(main(int(sys.argv[1]) if sys.argv[1:] else 100))
