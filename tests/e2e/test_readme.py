"""Every Python example of the README runs as it stands."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from abacist.task.prompts import SYSTEM_PROMPT

README = Path(__file__).parents[2] / "README.md"
TEXT = README.read_text(encoding="utf-8")
EXAMPLES = re.findall(r"^```python\n(.*?)^```", TEXT, re.M | re.S)


def test_the_readme_has_three_python_examples() -> None:
    assert len(EXAMPLES) == 3


def test_the_readme_shows_the_system_prompt_as_it_is() -> None:
    assert f"```\n{SYSTEM_PROMPT.strip()}\n```" in TEXT


@pytest.mark.e2e
@pytest.mark.parametrize("example", EXAMPLES)
def test_a_python_example_runs_and_prints_what_its_comments_say(
    example: str, tmp_path: Path
) -> None:
    source = Path(__file__).parents[2] / "src"
    done = subprocess.run(
        [sys.executable, "-"],
        input=example,
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(source), "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        encoding="utf-8",
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    promised = re.findall(r"^print\(.*\)  # (.+)$", example, re.M)
    assert all(line in done.stdout.split("\n") for line in promised), done.stdout
