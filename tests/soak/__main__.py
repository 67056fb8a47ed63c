"""``make soak``: everything that docs/reliability.md promises about stops, tried at length.

    PYTHONPATH=src:tests python -m soak [PART ...] [--kills N] [--rank_kills N] [--sigterms N]

Every trial is kept in runs/soak.json as soon as it is done, so a soak that is stopped goes on where
it was. At the end its result is written to docs/reliability.md.
"""

from __future__ import annotations

import argparse
import functools
import importlib
import json
import os
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path

from offline import OFFLINE

# Read once, when they are imported.
os.environ.update(OFFLINE, OMP_NUM_THREADS="1")

from faults import PAGE, write_between
from soak import warm
from soak.ledger import MARKS, Ledger, Trial

ROOT = Path(__file__).parents[2]
# What stands for a part: the trials it has to make, each a name and work to be done in a folder.
Trials = Iterator[tuple[str, Callable[[Path], Trial]]]
TITLES = {
    "matrix": "resumed after each step, in 25 configurations: equal to the last byte",
    "saves": "SIGKILL before every change that a save makes on the disk, then resumed to the end",
    "kills": "SIGKILL at a random moment, then resumed to the end",
    "ranks": "one of two processes killed by SIGKILL: the other ends, then resumed to the end",
    "hosts": "a run on two hosts, one of which is lost: the other ends, then resumed to the end",
    "sigterm": "SIGTERM at a random moment: saved, exit 143, then resumed to the end",
    "damage": "each file of a checkpoint emptied, zeroed, halved, missing, one bit flipped",
    "faults": "every fault that the table above had on that day",
}


def main(argv: list[str]) -> int:
    """Make the trials that are still to be made; 1 if anything did not hold."""
    parser = argparse.ArgumentParser(prog="python -m soak", description=__doc__)
    parser.add_argument("parts", nargs="*", metavar="PART", help=" ".join(TITLES))
    parser.add_argument("--kills", type=int, default=100, help="SIGKILLs at random moments")
    parser.add_argument("--sigterms", type=int, default=20, help="SIGTERMs at random moments")
    parser.add_argument("--rank_kills", type=int, default=20, help="runs on two processes")
    parser.add_argument("--ledger", type=Path, default=ROOT / "runs" / "soak.json")
    options = parser.parse_args(argv)
    unknown = [part for part in options.parts if part not in TITLES]
    if unknown:
        parser.error(f"no such part: {', '.join(unknown)}")
    parts = options.parts or list(TITLES)
    place = [f"TMPDIR={os.environ['TMPDIR']}"] if "TMPDIR" in os.environ else []
    arguments = [f'ARGS="{shlex.join(argv)}"'] if argv else []
    command = " ".join([*place, "make soak", *arguments])
    ledger = Ledger(options.ledger)
    for part in parts:
        ledger.begin(part, command)
        with tempfile.TemporaryDirectory(prefix=f"soak-{part}-") as folder:
            run_part(part, trials_of(part, options, Path(folder)), ledger, Path(folder))
    failures = ledger.failures(parts)
    print("\n" + ledger.table(TITLES))
    print("\n".join(["", "FAILED", *failures] if failures else ["", "Everything held."]))
    write_between(PAGE, MARKS, ledger.table(TITLES))
    return 1 if failures else 0


def trials_of(part: str, options: argparse.Namespace, folder: Path) -> Trials:
    """The trials of a part, in order; what they share is made in ``folder``."""
    if part == "matrix":
        from soak.resume_matrix import CASES, resumed_everywhere

        for case in CASES:
            yield case.name, functools.partial(resumed_everywhere, case)
    elif part == "faults":
        yield "all", injected_faults
    else:
        own = {"damage": "soak.damage", "ranks": "soak.ranks", "hosts": "soak.hosts"}
        module = importlib.import_module(own.get(part, "soak.kills"))
        yield from getattr(module, part)(folder / "shared", options)


def injected_faults(place: Path) -> Trial:
    """The tests that inject a fault, with the outcome of each."""
    command = [sys.executable, str(ROOT / "tests" / "faults.py"), "--run"]
    ran = subprocess.run(command, stdout=subprocess.PIPE, check=True, cwd=ROOT)
    trial = Trial()
    for test, outcome in json.loads(ran.stdout).items():
        if outcome == "skipped":
            trial.seen["skipped"] = trial.seen.get("skipped", 0) + 1
        else:
            trial.expect(test, [] if outcome == "passed" else [outcome])
    return trial


def run_part(part: str, trials: Trials, ledger: Ledger, folder: Path) -> None:
    """Make the trials of a part, one process each, and keep what they find."""
    todo, began, made = list(trials), time.monotonic(), 0
    print(f"== {part}: {TITLES[part]}", flush=True)
    for number, (name, work) in enumerate(todo, 1):
        if ledger.trial(part, name) is None:
            trial = isolated(work, folder / f"{number}")
            ledger.keep(part, name, trial)
            made += 1
            pace = (time.monotonic() - began) / made
            left = sum(ledger.trial(part, other) is None for other, _ in todo[number:])
            print(
                f"{part} {number}/{len(todo)}  {name}: {trial.passed} passed, "
                f"{len(trial.failed)} failed  ETA {pace * left / 60:.0f} min",
                *(f"\n  {line}" for line in trial.failed),
                flush=True,
            )


def isolated(work: Callable[[Path], Trial], place: Path) -> Trial:
    """A trial in a process of its own: what it leaves in memory touches no other."""
    found, output, began = place / "trial.json", place / "output", time.monotonic()
    process = warm.start(
        lambda: found.write_text(json.dumps(asdict(work(place))), encoding="utf-8") and 0, output
    )
    try:
        code = warm.exit_code(process, seconds=3600)
        wrong = "" if code == 0 else f"it ended with {code}"
    except TimeoutError as error:
        wrong = str(error)
    if wrong:
        said = output.read_text(errors="replace", encoding="utf-8").strip().split("\n")
        trial = Trial(failed=[f"{wrong}: {said[-1][:300]}"])
    else:
        trial = Trial(**json.loads(found.read_text(encoding="utf-8")))
    trial.seconds = time.monotonic() - began
    return trial


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
