"""A reward of None is no signal: a group without two rewards counts as silent everywhere."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch

from abacist.learning.health.history import Facts
from abacist.learning.health.rules import Watch
from abacist.learning.rollout_rows import Scored, rollouts_of
from abacist.learning.trainer import GRPOTrainer
from abacist.records.rollout import read_rollouts, write_rollouts
from abacist.task.reply import render_reply
from faults import fault
from unit.test_fastpath import PROBLEMS, G, fix_completions, make

Lookalike = Callable[[str], Path]
NONE = [None] * G


def paying(groups: Iterable[list[float | None]]) -> Callable[..., list[float | None]]:
    flat = [reward for group in groups for reward in group]

    def reward(completions: Any, **columns: Any) -> list[float | None]:
        return flat

    return reward


def batch(trainer: Any) -> dict[str, Any]:
    fix_completions(trainer)
    trainer.model.train()
    rows = [row for row in list(trainer.train_dataset)[:PROBLEMS] for _ in range(G)]
    return dict(trainer._generate_and_score_completions(rows))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    import lookalikes

    return lookalikes.build("qwen2.5-instruct", tmp_path_factory.mktemp("q") / "model", size=32)


MIXED, EQUAL = [0.0, 1.0, 0.0, 1.0], [1.0] * G


@pytest.mark.parametrize("scale", ["group", "none", "batch"])
@pytest.mark.parametrize(
    ("groups", "silent"),
    [
        ([NONE] * 4, 1.0),
        ([[math.nan] * G] * 4, 1.0),
        ([[1.0, None, None, None], *[NONE] * 3], 1.0),  # nothing to compare it with
        ([MIXED, NONE, NONE, MIXED], 0.5),
        ([[0.0, 1.0, None, None], MIXED, MIXED, NONE], 0.25),  # two are enough
        ([MIXED] * 4, 0.0),
    ],
)
def test_a_group_without_two_rewards_is_silent_and_moves_nothing(
    groups: list[list[float | None]], silent: float, scale: str, folder: Path, tmp_path: Path
) -> None:
    trainer = make(GRPOTrainer, folder, tmp_path, scale_rewards=scale)
    trainer.reward_funcs = [paying(groups)]
    found = batch(trainer)
    assert trainer._metrics["train"]["frac_reward_zero_std"] == [pytest.approx(silent)]
    assert bool(found["advantages"].isfinite().all())
    quiet = (found["advantages"].view(-1, G) == 0).all(dim=1).float().mean()
    assert float(quiet) == pytest.approx(silent)


def test_equal_rewards_and_none_add_up(folder: Path, tmp_path: Path) -> None:
    trainer = make(GRPOTrainer, folder, tmp_path)
    trainer.reward_funcs = [paying([EQUAL, NONE, MIXED, MIXED])]
    batch(trainer)
    assert trainer._metrics["train"]["frac_reward_zero_std"] == [pytest.approx(0.5)]


@fault("rewards", "every reward returns None or NaN for a whole step",
       "nothing moves; the groups count as without signal", 0)  # fmt: skip
def test_a_step_without_any_reward_leaves_every_weight_as_it_is(
    folder: Path, tmp_path: Path
) -> None:
    trainer = make(GRPOTrainer, folder, tmp_path)
    before = {name: w.detach().clone() for name, w in trainer.model.named_parameters()}
    trainer.reward_funcs = [paying([NONE] * PROBLEMS)]
    fix_completions(trainer)
    trainer.train()
    for name, weight in trainer.model.named_parameters():
        assert torch.equal(weight, before[name]), name
    assert trainer.state.log_history[0]["frac_reward_zero_std"] == 1.0


def test_a_reply_to_which_no_reward_applied_is_kept_without_one(
    folder: Path, tmp_path: Path
) -> None:
    trainer = make(GRPOTrainer, folder, tmp_path)
    rewards = torch.tensor([[math.nan], [0.0]])
    scored = Scored([{"prompt": "a"}] * 2, ["a"] * 2, ["b"] * 2, [[5, 6]] * 2, rewards)
    first, second = rollouts_of(trainer, scored, [1, 1], [0.0, 0.0])
    assert first.reward is None and second.reward == 0.0


@pytest.mark.parametrize("missing", [math.nan, None])
def test_the_doctor_names_rewards_that_never_applied(missing: float | None) -> None:
    watch = Watch(Facts(learning_rate=1e-4, problems_per_step=4))
    row = {
        "loss": 0.0, "reward": missing, "reward_std": missing, "frac_reward_zero_std": 1.0,
        "rewards/mine/mean": missing, "rewards/mine/std": missing,
        "completions/clipped_ratio": 0.0,
    }  # fmt: skip
    found = {d.name: d for step in range(1, 20) for d in watch.see({**row, "step": step})}
    assert set(found) == {"no signal", "dead reward"}
    assert "no reward applied" in found["no signal"].evidence
    assert "nothing at all (None)" in found["dead reward"].evidence
    assert watch.zero_advantage_steps == 19


def test_a_reward_that_applies_to_one_reply_a_step_is_not_called_dead() -> None:
    watch = Watch(Facts(learning_rate=1e-4, problems_per_step=4))
    for step in range(1, 20):
        row = {
            "loss": 0.1, "reward": 0.5, "frac_reward_zero_std": 0.2,
            "rewards/mine/mean": step / 20, "rewards/mine/std": math.nan,
            "completions/clipped_ratio": 0.0, "step": step,
        }  # fmt: skip
        assert watch.see(row) == []


@pytest.mark.parametrize(
    ("difficulty", "kept"), [(2, 2), (2.0, 2), (2.5, None), ("hard", None), (math.nan, None)]
)
def test_labels_and_golds_of_other_types_are_kept_as_far_as_they_can_be(
    difficulty: Any, kept: int | None, folder: Path, tmp_path: Path
) -> None:
    trainer = make(GRPOTrainer, folder, tmp_path)
    row = {"problem_id": 17, "difficulty": difficulty, "answer": 4}
    replies = [render_reply("2 + 2 = 4", "4"), "no answer"]
    scored = Scored([row] * 2, ["a"] * 2, replies, [[5, 6]] * 2, torch.zeros(2, 1))
    write_rollouts(tmp_path / "a.parquet", rollouts_of(trainer, scored, [1, 1], [0.0, 0.0]))
    first, second = read_rollouts(tmp_path / "a.parquet")
    assert (first.problem_id, first.difficulty, first.gold) == ("17", kept, "4")
    assert (first.is_correct, second.is_correct) == (True, False)


@pytest.mark.parametrize(
    "settings", [{"scale_rewards": "batch"}, {"multi_objective_aggregation": "normalize_then_sum"}]
)
def test_groups_that_are_paid_alike_are_counted_whatever_the_rewards_are_scaled_by(
    settings: dict[str, str], folder: Path, tmp_path: Path
) -> None:
    trainer = make(GRPOTrainer, folder, tmp_path, **settings)
    trainer.reward_funcs = [paying([[0.7] * G, [2.0] * G, MIXED, [1.0, None, None, None]])]
    batch(trainer)
    assert trainer._metrics["train"]["frac_reward_zero_std"] == [pytest.approx(0.75)]
