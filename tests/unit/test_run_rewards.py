"""A control is paid for anything but right answers, and by the same coins after a resumption."""

from __future__ import annotations

import random
from types import SimpleNamespace
from typing import Any

import pytest

from abacist.errors import UsageError
from abacist.learning.rewards import RandomReward, control_rewards
from abacist.task.rewards import load_reward_funcs
from evaluated import GOOD, SILENT, WRONG

PROMPTS: list[Any] = [[{"role": "user", "content": f"What is {n} + 1?"}] for n in range(8)]


def tossed(seed: int = 0, step: int = 3, texts: list[str] | None = None) -> list[float]:
    return RandomReward(seed)(
        prompts=PROMPTS,
        completions=texts or [GOOD] * 8,
        trainer_state=SimpleNamespace(global_step=step),
        answer=["7"] * 8,
    )


def test_a_coin_depends_on_seed_step_and_place_and_is_the_same_when_tossed_again() -> None:
    assert tossed() == tossed()
    assert tossed() != tossed(step=4) and tossed() != tossed(seed=1)
    assert set(tossed()) == {0.0, 1.0}  # equal replies in one group are paid differently


def test_each_process_tosses_for_the_places_that_its_replies_have_among_all(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    state = SimpleNamespace(global_step=3)
    alone = RandomReward(0)(PROMPTS, [GOOD] * 8, trainer_state=state)
    parts = []
    for rank in ("0", "1"):
        monkeypatch.setenv("RANK", rank)
        mine = slice(4 * int(rank), 4 * int(rank) + 4)
        parts += RandomReward(0)(PROMPTS[mine], [GOOD] * 4, trainer_state=state)
    assert parts == alone


def test_no_global_generator_is_touched() -> None:
    random.seed(1)
    state = random.getstate()
    tossed()
    assert random.getstate() == state


def test_coins_are_fair_and_know_nothing_of_what_is_right() -> None:
    def mean(text: str) -> float:
        return sum(sum(tossed(step=step, texts=[text] * 8)) for step in range(500)) / 4000

    assert mean(GOOD) == pytest.approx(0.5, abs=0.03)
    assert mean(WRONG) == pytest.approx(0.5, abs=0.03)


@pytest.mark.parametrize("text", ["", "\ud800\x00", "\u2028" * 99, "a" * 100_000])
def test_any_text_and_any_shape_of_it_is_paid(text: str) -> None:
    plain = RandomReward(0)(["q"], [text])
    assert plain[0] in (0.0, 1.0)
    assert RandomReward(0)([[{"role": "user", "content": None}]], [[]])[0] in (0.0, 1.0)


@pytest.mark.parametrize("names", [["default"], ["gist"], ["default", "gist.int_reward_func"]])
def test_format_rewards_pay_right_and_wrong_answers_alike(names: list[str]) -> None:
    rewards, _ = control_rewards("format", load_reward_funcs(names), None, seed=0)
    assert len(rewards) == 3

    def paid(text: str) -> list[float]:
        return [reward(prompts=["q"], completions=[text], answer=["7"])[0] for reward in rewards]

    assert paid(GOOD) == paid(GOOD.replace("7\n</answer>", "8\n</answer>")) != paid(SILENT)


def test_weights_stay_with_their_rewards() -> None:
    rewards, weights = control_rewards(
        "format", load_reward_funcs(["default"]), [1, 2, 3, 4, 5], seed=0
    )
    assert [reward.__name__ for reward in rewards] == ["strict_format", "soft_format", "xml_count"]
    assert weights == [3, 4, 5]
    random_ones, none = control_rewards("random", rewards, weights, seed=0)
    assert [one.__name__ for one in random_ones] == ["random_control"] and none is None


def test_without_a_control_nothing_changes() -> None:
    rewards = load_reward_funcs(["default"])
    assert control_rewards("none", rewards, [1.0] * 5, seed=0) == (rewards, [1.0] * 5)


def test_a_format_control_without_format_rewards_is_refused() -> None:
    with pytest.raises(UsageError, match="leaves no reward"):
        control_rewards("format", load_reward_funcs(["correctness"]), None, seed=0)
