"""Every script in examples/ runs as it stands, from an empty folder."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from offline import OFFLINE

EXAMPLES = Path(__file__).parents[2] / "examples"
# What each of them must have said. abacist_gsm8k.py is for verifiers, and has a test of its own.
SAID = {
    "plain_trl.py": "reward by step: [",
    "custom_reward.py": "sound",
    "custom_data.py": "held out, for example:",
    "few_shot.py": "--- assistant\n<reasoning>\n",
}


def test_every_example_is_tried() -> None:
    assert {path.name for path in EXAMPLES.glob("*.py")} == {*SAID, "abacist_gsm8k.py"}


@pytest.mark.e2e
@pytest.mark.parametrize("name", SAID)
def test_an_example_runs_as_it_stands(name: str, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, EXAMPLES / name],
        cwd=tmp_path, env={**os.environ, **OFFLINE}, capture_output=True, text=True,
        encoding="utf-8",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert SAID[name] in done.stdout


def test_the_reward_of_an_example_is_one_that_train_takes(tmp_path: Path) -> None:
    from abacist.task.rewards import load_reward_funcs

    (reward,) = load_reward_funcs([f"{EXAMPLES / 'custom_reward.py'}:shows_work"])
    replies = [[{"content": f"<reasoning>\n{work}\n</reasoning>"}] for work in ("1 + 1 = 2", "so")]
    assert reward(prompts=["", ""], completions=replies, answer=["2", "2"]) == [0.2, 0.0]
