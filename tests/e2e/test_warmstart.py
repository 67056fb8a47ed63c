"""The command that remakes the built-in model, and the frozen model it made."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
import torch

from abacist.policy.decoding.generation import generate
from abacist.policy.loading import load_policy
from abacist.policy.source import BUILT_IN_FOLDER
from warmstart import Plan, make_tokenizer, pretrain

LAB = Path(__file__).parents[2] / "docs" / "lab.md"
FEW = Plan(short_steps=3, long_steps=2, habit_steps=2, batch_size=4, warmup_steps=1)


@pytest.fixture(scope="module")
def remade(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folders = [tmp_path_factory.mktemp(name) for name in ("one", "two")]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    for folder in folders:
        pretrain(FEW, folder)
    torch.set_num_threads(threads)
    return folders


def test_the_same_plan_makes_the_same_bytes_on_one_machine(remade: list[Path]) -> None:
    for name in ("model.safetensors", "tokenizer.json", "config.json"):
        assert (remade[0] / name).read_bytes() == (remade[1] / name).read_bytes(), name


def test_what_it_makes_is_a_policy_of_the_built_in_kind(remade: list[Path]) -> None:
    made, built_in = load_policy(str(remade[0])), load_policy("tiny")
    shapes = [
        {name: tuple(p.shape) for name, p in policy.model.named_parameters()}
        for policy in (made, built_in)
    ]
    assert shapes[0] == shapes[1] and made.chat.stop_ids == built_in.chat.stop_ids
    replies = generate(made, [[{"role": "user", "content": "1+1?"}]], max_completion_tokens=4)
    assert len(replies[0][0].ids) <= 4


def test_the_tokenizer_in_the_package_is_the_one_the_command_makes() -> None:
    ours = load_policy("tiny").chat.tokenizer
    assert make_tokenizer(Plan().seed).get_vocab() == ours.get_vocab()


def test_the_base_is_the_one_the_notebook_names() -> None:
    # A changed base is a new line in docs/lab.md, never a quiet better number.
    digest = hashlib.sha256((BUILT_IN_FOLDER / "model.safetensors").read_bytes()).hexdigest()
    assert digest[:12] in LAB.read_text(encoding="utf-8")


def test_the_built_in_model_stays_small() -> None:
    size = sum(path.stat().st_size for path in BUILT_IN_FOLDER.iterdir())
    assert size <= 10 * 2**20
