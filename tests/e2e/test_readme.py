"""Every Python example of the README and of docs/python.md runs as it stands."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from abacist.task.prompts import SYSTEM_PROMPT

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = TEXT, (ROOT / "docs" / "python.md").read_text(encoding="utf-8")
EXAMPLES = [
    one for page in PAGES for one in re.findall(r"^```python\n(.*?)^```", page, re.M | re.S)
]
LINK = re.compile(r"\]\(([^)#:]+)(?:#[^)]*)?\)")


def test_there_are_five_python_examples() -> None:
    assert len(EXAMPLES) == 5


@pytest.mark.parametrize(
    "page", [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")], ids=lambda path: path.name
)
def test_every_link_to_a_file_leads_to_one(page: Path) -> None:
    links = LINK.findall(page.read_text(encoding="utf-8"))
    assert [link for link in links if not (page.parent / link).exists()] == []


def test_the_readme_shows_the_system_prompt_as_it_is() -> None:
    assert f"```\n{SYSTEM_PROMPT.strip()}\n```" in TEXT


@pytest.mark.e2e
@pytest.mark.parametrize("example", EXAMPLES)
def test_a_python_example_runs_and_prints_what_its_comments_say(
    example: str, tmp_path: Path
) -> None:
    # Python started as a reader would: an import that an example has forgotten is missed.
    done = subprocess.run(
        [sys.executable, "-"],
        input=example,
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT / "src"), "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        encoding="utf-8",
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    promised = re.findall(r"^print\(.*\)  # (.+)$", example, re.M)
    assert all(line in done.stdout.split("\n") for line in promised), done.stdout
