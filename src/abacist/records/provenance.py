"""The manifest of a run: versions, commit, seed, command line, data. No secrets, no clock times.

The manifest holds no clock reading, so two runs of the same thing have the same manifest, and
versions are read from package metadata, so writing one imports neither torch nor transformers.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import platform
import re
import subprocess
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from abacist.records.secrets import REDACTED, names_a_secret, without_secrets
from abacist.task.problems import Problem

MANIFEST_FORMAT = "abacist-run"
MANIFEST_VERSION = 1
# The record of what was exported from a run, and how it was proven: see `delivery`.
EXPORT_NAME = "abacist.json"
EXPORT_FORMAT, EXPORT_VERSION = "abacist-export", 1
RECORDED_PACKAGES = (
    "abacist",
    "torch",
    "transformers",
    "trl",
    "peft",
    "accelerate",
    "datasets",
    "tokenizers",
)

_SECRET_TEXT = re.compile(r"\b(hf_|sk-|gh[a-z]_|github_pat_)[\w-]{16,}|(?<=://)[^/@\s]+(?=@)")
_NAME = re.compile(r"[\w.-]+")


def build_manifest(
    *,
    seed: int,
    argv: Sequence[str],
    problems: Iterable[Problem] | None = None,
    source: str | None = None,
) -> dict[str, Any]:
    """The manifest of a run, ready for ``RunDir.write_manifest``.

    ``source`` is the data set's name as the user gave it; ``problems`` are those trained on.
    """
    problems = None if problems is None else list(problems)
    return {
        "format": MANIFEST_FORMAT,
        "format_version": MANIFEST_VERSION,
        "versions": {"python": platform.python_version()} | package_versions(),
        "platform": platform.platform(),
        "git_commit": git_commit(),
        "seed": seed,
        "argv": scrub_argv(argv),
        "data": {
            "source": None if source is None else without_secrets(source),
            "problems": None if problems is None else len(problems),
            "sha256": None if problems is None else data_fingerprint(problems),
            **({"columns_sha256": found} if (found := columns_fingerprint(problems or [])) else {}),
        },
    }


def data_fingerprint(problems: Iterable[Problem]) -> str:
    """SHA-256 over ids, questions and golds in order: changed data, or another order, shows.

    >>> data_fingerprint([])[:12]
    'e3b0c44298fc'
    """
    digest = hashlib.sha256()
    for problem in problems:
        for text in (problem.problem_id, problem.question, problem.answer):
            encoded = text.encode("utf-8", "surrogatepass")
            digest.update(f"{len(encoded)}:".encode() + encoded)
    return digest.hexdigest()


def columns_fingerprint(problems: Iterable[Problem]) -> str | None:
    """SHA-256 over the columns that rewards get; None if they add nothing to the questions.

    >>> columns_fingerprint([]) is None
    True
    """
    digest = hashlib.sha256()
    is_empty = True
    for problem in problems:
        columns = {
            name: value
            for name, value in problem.columns.items()
            if not (isinstance(value, str) and value.strip() == problem.question)
        }
        is_empty = is_empty and not columns
        digest.update(json.dumps(columns, sort_keys=True, default=str).encode() + b"\n")
    return None if is_empty else digest.hexdigest()


def scrub_argv(argv: Sequence[str]) -> list[str]:
    """The command line without secrets: values of flags named like one, and text shaped like one.

    >>> scrub_argv(["train", "--hub_token", "abc", "--api-key=def", "--seed", "3"])
    ['train', '--hub_token', '<redacted>', '--api-key=<redacted>', '--seed', '3']
    """
    scrubbed: list[str] = []
    hide = False
    for word in argv:
        name, equals, _ = word.partition("=")
        if word.startswith("--"):
            hide = names_a_secret(name)
        elif hide:
            word = REDACTED
        if equals and _NAME.fullmatch(name) and names_a_secret(name):
            word = f"{name}={REDACTED}"
        scrubbed.append(word)
    return [without_secrets(_SECRET_TEXT.sub(REDACTED, word)) for word in scrubbed]


def package_versions() -> dict[str, str | None]:
    """The installed versions of :data:`RECORDED_PACKAGES`; None for one that is not installed."""
    versions: dict[str, str | None] = {}
    for name in RECORDED_PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = None
    return versions


def git_commit() -> str | None:
    """The commit of Abacist's own checkout (``-dirty`` if it has changes), or None without one.

    A package installed inside somebody else's repository has no commit of its own.
    """
    package = Path(__file__).resolve().parents[1]
    root = package.parents[1]
    if not (root / ".git").exists() or package != root / "src" / "abacist":
        return None
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=40"]
    try:
        answer = subprocess.run(
            [*command, "--exclude=*"],
            capture_output=True,
            text=True,
            timeout=5,
            check=True,
            encoding="utf-8",
            errors="replace",
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return answer.stdout.strip() or None
