"""Do the declared ranges hold? The quick suite with the lowest and the newest core dependencies.

    make ranges                                           both ends, one after another
    make ranges ENDS=lowest ARGS="tests/contract"         one end, a part of the suite

For each end an environment is made in .ranges/ (1.7 GB, kept for the next time) with Abacist, its
core dependencies and pytest; tests of optional packages are skipped there. "Lowest" is the lower
bound that pyproject.toml states, of every core dependency at once: a bound that is no release, or
cannot be installed together with the others, ends in pip's explanation. "Newest" is what pip takes
when nothing but the ranges binds it. What they depend on in turn is the newest in both. PyTorch is
the build that this environment has, in both: other builds are several gigabytes.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import subprocess
import sys
import time
import tomllib
from pathlib import Path
from typing import NamedTuple

from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parents[1]
ENDS = ("lowest", "newest")
SUITE = ("tests/unit", "tests/contract")
TEST_TOOLS = ("pytest", "pytest-xdist", "hypothesis")
NOT_VARIED = ("torch",)


class Outcome(NamedTuple):
    """What became of one end: the versions of its core dependencies, and pytest's last line."""

    end: str
    versions: dict[str, str]
    result: str
    passed: bool
    log: Path
    seconds: float


def core_dependencies() -> list[Requirement]:
    """The dependencies that every installation has, from pyproject.toml."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    return [Requirement(text) for text in project["dependencies"]]


def lower_bound(requirement: Requirement) -> str:
    """The version after ``>=``. Raises ValueError if there is not exactly one.

    >>> lower_bound(Requirement("rich>=14,<16"))
    '14'
    """
    bounds = [each.version for each in requirement.specifier if each.operator == ">="]
    if len(bounds) != 1:
        raise ValueError(f"{requirement} should state one lower bound (>=)")
    return bounds[0]


def constraints(end: str) -> str:
    """pip's constraints for one end, one a line."""
    lines = [f"{name}=={importlib.metadata.version(name)}" for name in NOT_VARIED]
    if end == "lowest":
        lines += [
            f"{requirement.name}=={lower_bound(requirement)}"
            for requirement in core_dependencies()
            if requirement.name not in NOT_VARIED
        ]
    return "\n".join(lines) + "\n"


def environment(end: str, folder: Path) -> Path:
    """The Python of an environment with this end installed; made if it is not there or is stale."""
    place = folder / end
    python, stamp = place / "bin" / "python", place / "installed"
    # The newest may be newer tomorrow, so it is installed again on another day.
    made_of = constraints(end) + ("" if end == "lowest" else time.strftime("# %Y-%m-%d\n"))
    if stamp.is_file() and stamp.read_text(encoding="utf-8") == made_of:
        return python
    print(f"{end}: installing into {place}", flush=True)
    subprocess.run([sys.executable, "-m", "venv", "--clear", place], check=True)
    pins = place / "constraints.txt"
    pins.write_text(constraints(end), encoding="utf-8")
    install = [str(python), "-m", "pip", "--disable-pip-version-check", "--quiet", "install"]
    wanted = ["--constraint", str(pins), "--editable", str(ROOT), *TEST_TOOLS]
    subprocess.run([*install, *wanted], check=True, cwd=place)
    stamp.write_text(made_of, encoding="utf-8")
    return python


def versions(python: Path) -> dict[str, str]:
    """The installed versions of the core dependencies."""
    names = [requirement.name for requirement in core_dependencies()]
    code = "import sys, importlib.metadata as m; print(*map(m.version, sys.argv[1:]))"
    told = subprocess.run(
        [python, "-c", code, *names], check=True, capture_output=True, text=True, encoding="utf-8"
    )
    return dict(zip(names, told.stdout.split(), strict=True))


def try_end(end: str, folder: Path, pytest_arguments: list[str]) -> Outcome:
    """Install one end and run the suite in it; the suite's output goes to a file."""
    python = environment(end, folder)
    log = folder / f"{end}.log"
    print(f"{end}: running {' '.join(pytest_arguments)}; output in {log}", flush=True)
    began = time.monotonic()
    alone = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VIRTUAL_ENV")}
    with log.open("w", encoding="utf-8") as output:
        done = subprocess.run(
            [python, "-m", "pytest", "-q", *pytest_arguments],
            cwd=ROOT,
            env=alone | {"OMP_NUM_THREADS": "1"},
            stdout=output,
            stderr=subprocess.STDOUT,
        )
    lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    result = lines[-1] if lines else "no output"
    seconds = time.monotonic() - began
    return Outcome(end, versions(python), result, done.returncode == 0, log, seconds)


def summary(outcomes: list[Outcome]) -> str:
    """A table of versions, one column an end, and below it how each went."""
    rows = [["", *(outcome.end for outcome in outcomes)]]
    for requirement in core_dependencies():
        name = requirement.name
        rows.append([str(requirement), *(outcome.versions[name] for outcome in outcomes)])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]
    for outcome in outcomes:
        state = "ok" if outcome.passed else "FAILED"
        lines.append(f"{outcome.end}: {state}: {outcome.result} ({outcome.log})")
    lines.append(f"Not varied: {', '.join(NOT_VARIED)} (the build at hand).")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    """Try the ends that were named; 1 if a suite failed in one of them."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--ends", nargs="+", choices=ENDS, default=ENDS)
    parser.add_argument("--folder", type=Path, default=ROOT / ".ranges")
    parser.add_argument(
        "pytest", nargs="*", help="after --: what pytest gets, the quick suite unless given"
    )
    options = parser.parse_args(argv)
    arguments = options.pytest or list(SUITE)
    options.folder.mkdir(parents=True, exist_ok=True)
    folder = options.folder.resolve()
    outcomes = [try_end(end, folder, arguments) for end in options.ends]
    print(summary(outcomes))
    return 0 if all(outcome.passed for outcome in outcomes) else 1


if __name__ == "__main__":
    sys.exit(main())
