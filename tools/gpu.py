"""What a GPU is to show, part by part: ``make gpu``.

Every part is a program of its own with a limit in minutes, its log and its JSON under ``--output``.
A part that fails, or runs past its limit, is recorded and the next one begins. What is done is not
done again: the same command goes on where it was stopped (``--again PART`` repeats one). Nothing is
fetched: the network is switched off for every library that would use it.

    tests    tests marked `gpu` (tests/gpu): kernels, graphs and engine against what they replace
    memory   one step of each recipe within the 24 GiB that it promises (bench/recipe_memory.py)
    bench    milliseconds a token, step and memory against stock TRL (bench/gpu.py)
    tiny     the built-in recipe, to its verdict
    real     a real model on GSM8K, where both lie on this machine (--model, --data)
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
OFFLINE = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "PIP_NO_INDEX": "1"}


@dataclass(frozen=True)
class Part:
    """One program, and how long it may take. ``skipped``: why it cannot run here."""

    name: str
    command: Sequence[str]
    limit_minutes: float
    skipped: str = ""


def parts(output: Path, model: str | None, data: str | None) -> list[Part]:
    """What is run, in this order: the most telling first, should time run out."""
    python = sys.executable
    train = [python, "-m", "abacist", "train"]
    lacking = "" if model and data else "no --model and --data: its weights are not on this machine"
    return [
        Part("tests", [python, "-m", "pytest", "tests/gpu", "-m", "gpu", "-q"], 8),
        Part(
            "memory",
            [python, "bench/recipe_memory.py", "--output", str(output / "peaks.json")],
            6,
        ),
        Part(
            "bench",
            [python, "bench/gpu.py", "--minutes", "7", "--output", str(output / "speed.json")],
            8.5,
        ),
        Part("tiny", [*train, "tiny", "--json", "--output_dir", str(output / "tiny"),
                      "--overwrite"], 5),
        Part(
            "real",
            [*train, "any", "--json", "--model_name_or_path", str(model), "--dataset_name",
             str(data), "--max_steps", "10", "--num_heldout_problems", "100", "--max_hours", "0.1",
             "--output_dir", str(output / "real"), "--overwrite"],
            8.5,
            lacking,
        ),
    ]  # fmt: skip


def run(part: Part, output: Path) -> dict[str, object]:
    """Run ``part`` and keep what came of it in ``output / NAME.json``, whatever came of it."""
    found: dict[str, object] = {"part": part.name, "limit_minutes": part.limit_minutes}
    if part.skipped:
        found |= {"state": "skipped", "why": part.skipped}
    else:
        found |= _ran(part, output / f"{part.name}.log")
    aside = output / f"{part.name}.json.part"
    aside.write_text(json.dumps(found, indent=1), encoding="utf-8")
    aside.replace(output / f"{part.name}.json")
    return found


def _ran(part: Part, log: Path) -> dict[str, object]:
    begun = time.monotonic()
    with log.open("w", encoding="utf-8") as file:
        try:
            # In a group of its own, so that its children end with it.
            process = subprocess.Popen(
                part.command, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT,
                env=os.environ | OFFLINE, start_new_session=True,
            )  # fmt: skip
        except OSError as error:
            return {"state": "failed", "why": str(error)}
        try:
            code = process.wait(60 * part.limit_minutes)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    state = "done" if code == 0 else "failed"
    why = "" if code == 0 else f"exit code {code}"
    if code is None:
        state, why = "out of time", f"it ran past {part.limit_minutes:g} minutes"
    seconds = round(time.monotonic() - begun, 1)
    return {"state": state, "why": why, "seconds": seconds, "last_lines": lines[-20:]}


def run_all(them: Sequence[Part], output: Path, again: Sequence[str] = ()) -> int:
    """Run all that are not done yet; 1 if any did not end well, else 0."""
    output.mkdir(parents=True, exist_ok=True)
    failed = False
    for part in them:
        record = output / f"{part.name}.json"
        known = json.loads(record.read_text(encoding="utf-8")) if record.is_file() else {}
        if known.get("state") == "done" and part.name not in again:
            print(f"{part.name}: done before, in {known['seconds']} s ({record})", flush=True)
            continue
        found = run(part, output)
        why = f": {found['why']}" if found["why"] else ""
        print(f"{part.name}: {found['state']}{why}", flush=True)
        failed |= found["state"] in ("failed", "out of time")
    return int(failed)


def main() -> int:
    """Look for a GPU, then run the parts."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, default=ROOT / "runs" / "gpu")
    parser.add_argument("--model", help="the folder of a real model")
    parser.add_argument("--data", help="the folder of GSM8K")
    parser.add_argument("--again", nargs="+", default=[], metavar="PART")
    options = parser.parse_args()
    import torch

    if not torch.cuda.is_available():
        print("no GPU here: PyTorch sees no CUDA device, nothing was run", file=sys.stderr)
        return 1
    output = options.output.resolve()
    return run_all(parts(output, options.model, options.data), output, options.again)


if __name__ == "__main__":
    sys.exit(main())
