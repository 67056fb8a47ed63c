"""Groups of equal rewards have no signal, whatever rounding makes of their advantages.

In float32 the mean of eight times 0.3 is not 0.3. TRL takes such a group for one with a signal.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import trl
from hypothesis import given
from hypothesis import strategies as st

from abacist.delivery import verify_training
from abacist.delivery.findings import Check
from abacist.learning import fastpath, reply_selection
from abacist.learning.arguments import GRPOConfig
from abacist.learning.trainer import GRPOTrainer
from abacist.records.rollout import Rollout
from evaluated import GOOD
from made_runs import rollout
from unit.test_reply_selection import make

Lookalike = Callable[[str], Path]
G = 8
MIXED = [0.3] * 4 + [0.4] * 4
GROUPS = [[0.3] * G, MIXED, [-0.41] * G, [70.01] * G]
SILENT_ROWS = torch.tensor([group is not MIXED for group in GROUPS]).repeat_interleave(G)
ZERO_STD = "frac_reward_zero_std"
SILENT = "frac_zero_advantage"


def generated(
    kind: type, config: type, folder: Path, output: Path, **settings: Any
) -> tuple[Any, dict[str, Any]]:
    """A trainer, and a generation batch whose replies earn ``GROUPS``."""
    trainer = make(kind, folder, output, config=config, num_generations=G,
                   per_device_train_batch_size=G * len(GROUPS), **settings)  # fmt: skip
    trainer.reward_funcs = [lambda completions, **columns: [each for g in GROUPS for each in g]]
    rows = [row for row in list(trainer.train_dataset)[: len(GROUPS)] for _ in range(G)]
    return trainer, trainer._generate_and_score_completions(rows)


@pytest.mark.parametrize("scale", ["group", "none", "batch"])
def test_they_have_advantages_of_exactly_0_take_no_forward_and_are_counted(
    scale: str, lookalike: Lookalike, tmp_path: Path
) -> None:
    folder = lookalike("qwen2.5-instruct")
    _, of_trl = generated(trl.GRPOTrainer, trl.GRPOConfig, folder, tmp_path, scale_rewards=scale)
    if not of_trl["advantages"][SILENT_ROWS].any():
        pytest.skip("the mean of equal rewards is exact on this machine")
    trainer, found = generated(GRPOTrainer, GRPOConfig, folder, tmp_path, scale_rewards=scale)
    assert bool((found["advantages"][SILENT_ROWS] == 0).all())
    assert torch.equal(found["advantages"][~SILENT_ROWS], of_trl["advantages"][~SILENT_ROWS])
    assert trainer._metrics["train"][ZERO_STD] == [pytest.approx(0.75)]
    assert trainer._metrics["train"][SILENT] == [pytest.approx(0.75)]
    skipped = fastpath.zero_advantage_rows(trainer, found)
    assert skipped is not None and torch.equal(skipped, SILENT_ROWS)


def test_with_trls_own_configuration_advantages_are_trls_and_the_groups_are_counted(
    lookalike: Lookalike, tmp_path: Path
) -> None:
    folder = lookalike("qwen2.5-instruct")
    _, of_trl = generated(trl.GRPOTrainer, trl.GRPOConfig, folder, tmp_path)
    trainer, found = generated(GRPOTrainer, trl.GRPOConfig, folder, tmp_path)
    assert torch.equal(found["advantages"], of_trl["advantages"])
    assert SILENT not in trainer._metrics["train"]
    assert trainer._metrics["train"][ZERO_STD] == [pytest.approx(0.75)]


def test_trls_table_of_completions_shows_the_advantages_that_are_trained_on(
    lookalike: Lookalike, tmp_path: Path
) -> None:
    trainer, found = generated(GRPOTrainer, GRPOConfig, lookalike("qwen2.5-instruct"), tmp_path,
                               log_completions=True)  # fmt: skip
    assert list(trainer._logs["advantages"]) == found["advantages"].tolist()
    assert 0.0 in trainer._logs["advantages"] and len(set(trainer._logs["advantages"])) == 3


def test_equal_are_rewards_one_by_one_where_each_is_normalised_by_itself(
    lookalike: Lookalike, tmp_path: Path
) -> None:
    way = "normalize_then_sum"
    trainer, found = generated(GRPOTrainer, GRPOConfig, lookalike("qwen2.5-instruct"), tmp_path,
                               multi_objective_aggregation=way)  # fmt: skip
    assert bool((found["advantages"][SILENT_ROWS] == 0).all())
    assert bool(found["advantages"][~SILENT_ROWS].all())
    assert trainer._metrics["train"][ZERO_STD] == [pytest.approx(0.75)]
    trainer.reward_weights = torch.ones(2)
    for rewards, is_equal in (([[1.0, 0.0], [0.0, 1.0]], False), ([[1.0, 0.0]] * 2, True)):
        trainer._rewards = torch.tensor(rewards)
        assert reply_selection.has_equal_rewards(trainer, 2).tolist() == [is_equal] * 2


def test_a_group_of_one_reward_among_none_is_silent(lookalike: Lookalike, tmp_path: Path) -> None:
    trainer, _ = generated(GRPOTrainer, GRPOConfig, lookalike("qwen2.5-instruct"), tmp_path)
    given = [
        [None] * G,
        [0.3, *[None] * (G - 1)],
        [0.3, 0.4, *[None] * (G - 2)],
        [None, *[0.3] * 7],
    ]
    trainer.reward_funcs = [lambda completions, **columns: [each for g in given for each in g]]
    rows = [row for row in list(trainer.train_dataset)[: len(given)] for _ in range(G)]
    advantages = trainer._generate_and_score_completions(rows)["advantages"].view(-1, G)
    assert advantages.bool().any(dim=1).tolist() == [False, False, True, False]
    assert trainer._metrics["train"][ZERO_STD][-1] == pytest.approx(0.75)


def test_a_group_teaches_where_a_token_that_is_trained_on_has_an_advantage() -> None:
    def silent(advantages: torch.Tensor, *masked: int) -> float:
        mask = torch.ones(4, 3, dtype=torch.int)
        mask[list(masked)] = 0
        trainer = SimpleNamespace(
            accelerator=SimpleNamespace(gather=lambda each: each),
            num_generations=2,
            _metrics={"train": defaultdict(list)},
        )
        reply_selection.count_silent(trainer, {"advantages": advantages, "completion_mask": mask})
        ((share,),) = trainer._metrics["train"].values()
        return float(share)

    assert silent(torch.tensor([0.0, 0.0, 0.0, 0.0])) == 1.0
    assert silent(torch.tensor([0.5, -0.5, 0.0, 0.0])) == 0.5
    assert silent(torch.tensor([0.5, -0.5, 0.5, -0.5]), 0, 1) == 0.5  # both were cut off
    assert silent(torch.tensor([0.5, 0.0, 0.0, -0.5]), 0) == 0.5
    of_steps = torch.zeros(4, 3)
    of_steps[3, 1] = -0.2
    assert silent(of_steps) == 0.5


def test_each_process_silences_its_own_part_of_the_batch() -> None:
    rewards = torch.tensor([0.0, 1.0, 0.3, 0.3])
    for process, expected in enumerate([[-0.5, 0.5], [0.0, 0.0]]):
        trainer = SimpleNamespace(
            accelerator=SimpleNamespace(process_index=process),
            num_generations=2,
            multi_objective_aggregation="sum_then_normalize",
            reward_weights=torch.ones(1),
            _rewards=rewards[:, None],
        )
        advantages = torch.tensor([-0.5, 0.5] if process == 0 else [3e-4, -3e-4])
        reply_selection.silence(trainer, advantages)
        assert advantages.tolist() == expected


@given(
    st.lists(
        st.lists(st.sampled_from([None, 0.3, 0.30001, -2.0, 1e6, 1e6 + 1]), min_size=4, max_size=4),
        min_size=1, max_size=5,
    )
)  # fmt: skip
def test_equal_are_groups_of_one_reward_or_of_fewer_than_two(groups: list[list[Any]]) -> None:
    flat = [math.nan if each is None else each for group in groups for each in group]
    found = reply_selection.groups_with_equal_rewards(torch.tensor(flat)[:, None], 4)
    assert found.tolist() == [len(set(group) - {None}) < 2 for group in groups]


@pytest.mark.parametrize(
    ("one", "other", "is_equal"),
    [
        ([0.1, 0.2], [0.3, 0.0], True),  # 0.1 + 0.2 is not 0.3
        ([1000.0, -1000.3], [2000.0, -2000.3], True),  # equal but for what float32 can hold
        ([0.0, 0.0], [0.0, 1e-7], False),  # small, and all that there is
        ([1000.0, 0.0], [1000.001, 0.0], False),
        ([1000.0, math.nan], [math.nan, 1000.0], True),
    ],
)
def test_sums_are_equal_where_rounding_can_be_all_of_their_difference(
    one: list[float], other: list[float], is_equal: bool
) -> None:
    found = reply_selection.groups_with_equal_rewards(torch.tensor([one, other]), 2)
    assert found.tolist() == [is_equal]


# What is verified of a run.

PAID = verify_training.Paid([], {"first": 0.6}, [])


def replies(advantage: float) -> list[Rollout]:
    import dataclasses

    return [
        dataclasses.replace(
            rollout("run", 1, 0, member, GOOD),
            rewards={"first": 0.5}, reward=0.3, advantage=advantage,
        )
        for member in range(G)
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("advantage", "holds"),
    [(0.0, True), (2.9792831e-4, True), (-2.9792831e-4, True), (0.5, False), (-0.002, False)],
)
def test_an_advantage_of_exactly_0_and_what_rounding_makes_of_it_are_both_sound(
    advantage: float, holds: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(verify_training, "_recomputed", lambda rollouts, *_: [
        dict(one.rewards) for one in rollouts
    ])  # fmt: skip
    for name in ("check_run_id", "check_reading"):
        monkeypatch.setattr(verify_training, name, lambda *_: None)
    opened: Any = SimpleNamespace(settings={"num_generations": G})
    check = Check("training")
    verify_training._check_rollouts(opened, "a.parquet", 1, replies(advantage), PAID, check)
    assert (not any("advantage" in fault.item for fault in check.faults)) is holds


@pytest.mark.parametrize(("share", "holds"), [(1.0, True), (0.5, False)])
def test_a_share_of_silent_groups_is_counted_again(share: float, holds: bool) -> None:
    opened: Any = SimpleNamespace(settings={"num_generations": G})
    row = verify_training._metrics_of(replies(0.0), PAID, opened) | {"step": 1, ZERO_STD: share}
    check = Check("training")
    verify_training._check_line(opened, "metrics", row, [replies(0.0)], PAID, 0.0, check)
    assert (not check.faults) is holds


def test_a_share_that_misses_groups_whose_mean_is_rounded_is_of_an_older_run() -> None:
    opened: Any = SimpleNamespace(settings={"num_generations": G})
    stds = trl.trainer.utils.nanstd(torch.full((1, G), 0.3), dim=1)
    old = float(torch.isclose(stds, torch.zeros(1)))
    assert verify_training._is_of_an_older_run(old, [replies(0.0)], PAID, opened)
    assert not verify_training._is_of_an_older_run(0.5, [replies(0.0)], PAID, opened)
