"""What a soak test has found so far, and how the documentation tells it.

A part of the soak is a list of trials, each of many checks. Every finished trial is kept at once,
so that a soak that is stopped goes on where it was; one of other source code is begun anew.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
import transformers
import trl

import abacist

MARKS = ("<!-- soak: written by `make soak` -->", "<!-- soak ends -->")


@dataclass
class Trial:
    """The checks of one trial: how many held, and what was found where one did not.

    ``seen`` holds numbers worth telling; the documentation tells the largest of each name.
    """

    passed: int = 0
    failed: list[str] = field(default_factory=list)
    seen: dict[str, float] = field(default_factory=dict)
    seconds: float = 0.0

    def expect(self, what: str, wrong: Iterable[str]) -> None:
        """One check: it holds if nothing is ``wrong``."""
        found = list(wrong)
        if found:
            self.failed.append(f"{what}: {', '.join(found)}")
        else:
            self.passed += 1


class Ledger:
    """The trials that are done, by part and name, in one JSON file."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.parts: dict[str, dict[str, Any]] = {}
        if path.exists():
            self.parts = json.loads(path.read_text(encoding="utf-8"))

    def begin(self, part: str, command: str) -> None:
        """Go on with a part, or begin it anew if it was done with other code."""
        about = {"source": source_sum(), "machine": machine(), "command": command}
        kept = self.parts.get(part, {})
        trials = kept.get("trials", {}) if kept.get("source") == about["source"] else {}
        self.parts[part] = {**about, "trials": trials}

    def trial(self, part: str, name: str) -> Trial | None:
        """A trial that is done; None if it is still to do, or failed and is to be done again."""
        kept = self.parts[part]["trials"].get(name)
        return Trial(**kept) if kept and not kept["failed"] else None

    def keep(self, part: str, name: str, trial: Trial) -> None:
        """Write a trial down."""
        self.parts[part]["trials"][name] = asdict(trial)
        self.parts[part]["date"] = f"{datetime.now(UTC):%Y-%m-%d}"
        self.path.parent.mkdir(parents=True, exist_ok=True)
        aside = self.path.with_suffix(".part")
        aside.write_text(json.dumps(self.parts, indent=1, ensure_ascii=False), encoding="utf-8")
        os.replace(aside, self.path)

    def failures(self, parts: Iterable[str]) -> list[str]:
        """What did not hold, a line each."""
        return [
            f"{part}, {name}: {line}"
            for part in parts
            for name, trial in self.parts.get(part, {}).get("trials", {}).items()
            for line in trial["failed"]
        ]

    def table(self, titles: dict[str, str]) -> str:
        """Every part as a row of a Markdown table, and where and how it was run below."""
        lines = [
            "| part | passed | failed | also seen | minutes | date | source |",
            "|---|---:|---:|---|---:|---|---|",
        ]
        for name, title in titles.items():
            part = self.parts.get(name, {})
            trials = [Trial(**kept) for kept in part.get("trials", {}).values()]
            if not trials:
                lines.append(f"| {title} | not run | | | | | |")
                continue
            seen: dict[str, float] = {}
            for trial in trials:
                for what, value in trial.seen.items():
                    seen[what] = max(value, seen.get(what, value))
            cells = [
                title,
                str(sum(trial.passed for trial in trials)),
                str(sum(len(trial.failed) for trial in trials)),
                "; ".join(f"{what} {value:g}" for what, value in seen.items()),
                f"{sum(trial.seconds for trial in trials) / 60:.1f}",
                part["date"],
                part["source"],
            ]
            lines.append("| " + " | ".join(cells) + " |")
        commands: dict[str, list[str]] = {}
        for part in self.parts.values():
            told = commands.setdefault(part["machine"], []) if part["trials"] else []
            told += [] if part["command"] in told else [part["command"]]
        lines.append("")
        lines += [f"Run by `{'`, `'.join(told)}` on {where}." for where, told in commands.items()]
        return "\n".join(lines)


def source_sum() -> str:
    """What tells one state of Abacist's code from another, in twelve digits."""
    digest, package = hashlib.sha256(), Path(abacist.__file__).parent
    for path in sorted(package.rglob("*.py")):
        digest.update(path.relative_to(package).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:12]


def machine() -> str:
    """The processor and the libraries, as words."""
    model = platform.machine()
    described = Path("/proc/cpuinfo")
    if described.exists():
        for line in described.read_text(encoding="utf-8").split("\n"):
            if line.startswith("model name"):
                model = line.partition(":")[2].strip()
                break
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return (
        f"{cores} core{'s' if cores != 1 else ''} of {model}, {platform.system()}, "
        f"Python {platform.python_version()}, torch {torch.__version__}, "
        f"transformers {transformers.__version__}, TRL {trl.__version__}"
    )
