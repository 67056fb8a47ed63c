"""Every script in examples/ runs as it stands, from an empty folder."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from imported import Imported

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"
PAGE = (ROOT / "docs" / "neighbours.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```python\n(.*?)^```", PAGE, re.M | re.S)
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
def test_an_example_runs_as_it_stands(name: str, imported: Imported, tmp_path: Path) -> None:
    done = imported.run(str(EXAMPLES / name), cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    assert SAID[name] in done.stdout


def test_the_reward_of_an_example_is_one_that_train_takes(tmp_path: Path) -> None:
    from abacist.task.rewards import load_reward_funcs

    (reward,) = load_reward_funcs([f"{EXAMPLES / 'custom_reward.py'}:shows_work"])
    replies = [[{"content": f"<reasoning>\n{work}\n</reasoning>"}] for work in ("1 + 1 = 2", "so")]
    assert reward(prompts=["", ""], completions=replies, answer=["2", "2"]) == [0.2, 0.0]


@pytest.mark.parametrize("block", BLOCKS)
def test_what_the_page_of_neighbours_shows_runs_and_writes(
    block: str, imported: Imported, tmp_path: Path
) -> None:
    done = imported.run("-c", block, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    assert [path for path in tmp_path.rglob("*") if path.is_file()]


def test_the_page_names_files_that_are_there() -> None:
    for name in re.findall(r"\w+\.py", PAGE):
        if name not in ("grpo_demo.py", "NAME_rewards.py"):
            assert (EXAMPLES / name).is_file(), name
