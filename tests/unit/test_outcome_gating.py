"""Outcome gating: groups whose outcomes are all alike are silent once the format is learned."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import trl
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, AutoTokenizer

from abacist.delivery import verify_training
from abacist.delivery.findings import Check
from abacist.errors import DataError
from abacist.learning import outcome_gating
from abacist.learning.arguments import GRPOConfig
from abacist.learning.rollout_rows import Scored
from abacist.learning.trainer import GRPOTrainer
from abacist.records.rollout import StopReason, read_rollouts
from abacist.task.reply import render_reply
from lookalikes import build

GOLD = "7"
RIGHT, WRONG, LOOSE = (
    render_reply("3 + 4 = 7", "7"),
    render_reply("3 + 4 = 8", "8"),
    "I think <answer>7</answer>",  # right, and not strict
)


def gated(
    replies: list[str],
    size: int = 4,
    process: int = 0,
    cut_off: int = 0,
    is_masked: bool = True,
    gold: object = GOLD,
) -> tuple[list[float], float]:
    """The advantages, all 1 before, and the share of groups that was silenced.

    The first ``cut_off`` replies did not stop; ``is_masked``: such are not trained on.
    """
    trainer = SimpleNamespace(
        num_generations=size,
        eos_token_ids=[9],
        mask_truncated_completions=is_masked,
        accelerator=SimpleNamespace(process_index=process),
        _metrics={"train": defaultdict(list)},
    )
    ids = [[5, 4]] * cut_off + [[5, 9]] * (len(replies) - cut_off)
    scored = Scored([{"answer": gold}] * len(replies), [], replies, ids, torch.empty(0))
    advantages = torch.ones(len(replies))
    outcome_gating.gate(trainer, scored, advantages)
    (share,) = trainer._metrics["train"]["frac_outcome_gated"]
    return advantages.tolist(), share


def test_only_groups_that_are_all_right_or_all_wrong_are_silenced() -> None:
    advantages, share = gated([RIGHT] * 4 + [WRONG] * 4 + [RIGHT, WRONG, WRONG, WRONG])
    assert advantages == [0.0] * 8 + [1.0] * 4
    assert share == pytest.approx(2 / 3)


@pytest.mark.parametrize(("loose", "is_learned"), [(0, True), (1, True), (2, False)])
def test_nothing_is_silenced_until_nine_replies_in_ten_are_strict(
    loose: int, is_learned: bool
) -> None:
    advantages, share = gated([LOOSE] * loose + [RIGHT] * (10 - loose), size=2)
    assert advantages == [0.0 if is_learned else 1.0] * 10
    assert share == is_learned


def test_replies_that_are_cut_off_say_nothing_about_the_format_where_they_are_left_out() -> None:
    replies = [LOOSE] * 4 + [WRONG] * 6
    assert gated(replies, size=2, cut_off=4) == ([0.0] * 10, 1.0)
    assert gated(replies, size=2, cut_off=4, is_masked=False) == ([1.0] * 10, 0.0)
    assert gated(replies, size=2, cut_off=2) == ([1.0] * 10, 0.0)  # 2 of 8 are loose
    assert gated([WRONG] * 4, size=2, cut_off=4) == ([1.0] * 4, 0.0)  # nothing is known


def test_golds_are_numbers_too_and_a_problem_without_one_has_no_outcome() -> None:
    assert gated([RIGHT] * 4 + [WRONG] * 4, gold=7) == ([0.0] * 8, 1.0)
    assert gated([RIGHT, WRONG] * 2, gold=7.0) == ([1.0] * 4, 0.0)
    assert gated([RIGHT] * 4, gold=None) == ([1.0] * 4, 0.0)


@given(st.lists(st.sampled_from([RIGHT, WRONG]), min_size=3, max_size=30))
def test_a_mixed_group_keeps_every_advantage_and_no_other_keeps_one(replies: list[str]) -> None:
    replies = replies[: len(replies) // 3 * 3]
    advantages, _ = gated(replies, size=3)
    for start in range(0, len(replies), 3):
        is_mixed = len(set(replies[start : start + 3])) > 1
        assert advantages[start : start + 3] == [float(is_mixed)] * 3


def test_a_group_that_is_spread_over_processes_is_judged_whole(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    first = [(is_right, True, True) for is_right in (True, True, False)]  # strict, counted
    monkeypatch.setattr(outcome_gating, "gather_object", lambda mine: first + mine)
    assert gated([RIGHT, WRONG, WRONG], size=2, process=1)[0] == [1.0, 0.0, 0.0]
    assert gated([WRONG, WRONG, WRONG], size=2, process=1)[0] == [0.0, 0.0, 0.0]


def varied(prompts: Any, completions: Any, **columns: Any) -> list[float]:
    """A shaping reward that differs within every group."""
    return [float(member % 2) for member in range(len(prompts))]


def make_trainer(folder: Path, model: Path, rows: list[dict[str, str]], **more: Any) -> GRPOTrainer:
    settings: dict[str, Any] = {
        "output_dir": str(folder), "bf16": False, "use_cpu": True, "num_generations": 2,
        "per_device_train_batch_size": 4, "max_completion_length": 4, "max_steps": 1,
        "save_strategy": "no", "disable_tqdm": True, "report_to": [], "learning_rate": 1e-2,
    }  # fmt: skip
    kind = GRPOConfig if more else trl.GRPOConfig
    return GRPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32),
        reward_funcs=[varied],
        args=kind(**settings, **more),
        train_dataset=Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(model, padding_side="left"),
    )


ROWS = [{"prompt": f"{n} + 1?", "answer": str(n + 1)} for n in range(8)]


@pytest.mark.parametrize(
    ("more", "share_strict", "moves"),
    [
        ({}, 0.0, True),  # a plain trl.GRPOConfig
        ({"keep_rollouts": True}, 0.0, True),
        ({"keep_rollouts": True, "outcome_gating": True}, 0.0, False),
        ({"keep_rollouts": True, "outcome_gating": True}, 0.9, True),
    ],
)
def test_a_gated_trainer_learns_nothing_from_form_alone_and_an_ungated_one_does(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    more: dict[str, bool],
    share_strict: float,
    moves: bool,
) -> None:
    # Random weights solve nothing and are never strict, so the threshold decides.
    monkeypatch.setattr(outcome_gating, "LEARNED_STRICT_FRACTION", share_strict)
    trainer = make_trainer(tmp_path / "run", build("qwen2.5-base", tmp_path / "m"), ROWS, **more)
    before = {name: one.detach().clone() for name, one in trainer.model.named_parameters()}
    trainer.train()
    after = dict(trainer.model.named_parameters())
    assert any(not torch.equal(before[name], after[name]) for name in before) is moves
    if more:
        kept = read_rollouts(tmp_path / "run" / "rollouts")
        assert all((one.advantage != 0) is moves for one in kept)
        assert {one.reward for one in kept} == {0.0, 1.0}  # what was paid is kept as it was


def test_data_without_golds_is_refused_before_training(tmp_path: Path) -> None:
    model = build("qwen2.5-base", tmp_path / "m")
    rows = [{"prompt": row["prompt"]} for row in ROWS]
    with pytest.raises(DataError, match="answer"):
        make_trainer(tmp_path / "run", model, rows, outcome_gating=True)


@pytest.mark.parametrize("is_masked", [True, False])
@pytest.mark.parametrize("gold", [GOLD, None])
def test_verify_silences_the_groups_that_the_trainer_did(is_masked: bool, gold: str | None) -> None:
    # Of eight replies one is loose and cut off: seven of seven are strict, or seven of eight.
    replies = [LOOSE, RIGHT, RIGHT, RIGHT, RIGHT, WRONG, WRONG, WRONG]
    trained, _ = gated(replies, cut_off=1, is_masked=is_masked, gold=gold)
    rollouts: Any = [
        SimpleNamespace(
            completion=reply,
            gold=gold,
            is_correct=None if gold is None else reply is not WRONG,
            stop_reason=StopReason.LENGTH if at < 1 else StopReason.STOPPED,
        )
        for at, reply in enumerate(replies)
    ]
    settings = {"outcome_gating": True, "mask_truncated_completions": is_masked,
                "num_generations": 4, "scale_rewards": "none"}  # fmt: skip
    opened: Any = SimpleNamespace(settings=settings)
    paid = verify_training.Paid([], {"mine": 1.0}, [])
    rewards = [{"mine": float(at % 4)} for at in range(8)]
    found = verify_training._advantages(opened, rollouts, rewards, paid, Check("training"))
    assert found is not None
    silent = [bool((group == 0).all()) for group in found.view(-1, 4)]
    assert silent == [not any(trained[at : at + 4]) for at in (0, 4)]
    assert silent == [is_masked and gold is not None, False]
