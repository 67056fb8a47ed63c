"""The staged habits of the built-in base: each looks as documented, and only one pays in full."""

from __future__ import annotations

import itertools
import random
from collections import Counter

import pytest

from abacist.task.answers import same_answer
from abacist.task.reply import parse_reply
from abacist.task.rewards import REWARD_SETS
from abacist.task.steps import shows_work
from abacist.task.wordproblems import NAMES, Slip, Story, stories
from warmstart import (
    PREVAILING_HABIT,
    PREVAILING_SLIP,
    Habit,
    draw_habit,
    draw_slip,
    write_reply,
)

STORIES = list(itertools.islice(stories("train", seed=3), 60))


def total_reward(text: str, gold: str) -> float:
    return sum(
        reward(prompts=[""], completions=[text], answer=[gold])[0]
        for reward in REWARD_SETS["default"]
    )


def gold_of(story: Story) -> str:
    solution = story.solve()
    assert solution is not None
    return str(solution[1])


@pytest.mark.parametrize("story", STORIES[:20], ids=lambda story: story.structure)
def test_a_careful_right_reply_earns_everything_and_no_other_habit_earns_more(
    story: Story,
) -> None:
    earned = {habit: total_reward(write_reply(story, habit), gold_of(story)) for habit in Habit}
    assert earned[Habit.CAREFUL] == pytest.approx(4.0)
    assert max(earned.values()) == earned[Habit.CAREFUL]
    assert earned[Habit.PLAIN] < 2.0 and earned[Habit.BARE] < 2.0


@pytest.mark.parametrize("habit", Habit)
def test_only_the_working_habits_show_work(habit: Habit) -> None:
    works = habit in (Habit.CAREFUL, Habit.INLINE, Habit.UNIT)
    for story in STORIES:
        assert shows_work(parse_reply(write_reply(story, habit)).reasoning) is works


@pytest.mark.parametrize("slip", Slip)
def test_a_slip_changes_the_work_of_a_reply(slip: Slip) -> None:
    changed = [s for s in STORIES if s.solve(slip) is not None]
    assert len(changed) > 10
    for story in changed:
        right, wrong = (write_reply(story, Habit.CAREFUL, s) for s in (None, slip))
        assert right != wrong
        if story.solve(slip)[1] != story.solve()[1]:  # type: ignore[index]
            assert not same_answer(parse_reply(wrong).answer, gold_of(story))


def test_every_name_has_a_habit_and_half_of_them_a_slip() -> None:
    assert set(PREVAILING_HABIT) == set(NAMES) == set(PREVAILING_SLIP)
    assert set(PREVAILING_HABIT.values()) == set(Habit)
    assert sum(slip is not None for slip in PREVAILING_SLIP.values()) == len(NAMES) // 2


def test_the_prevailing_habit_prevails_and_every_habit_is_met_for_every_name() -> None:
    rng = random.Random(0)
    for name in NAMES:
        drawn = Counter(draw_habit(name, rng) for _ in range(500))
        assert drawn.most_common(1)[0][0] is PREVAILING_HABIT[name]
        assert set(drawn) == set(Habit)


def test_slips_are_frequent_where_they_prevail_and_rare_elsewhere() -> None:
    rng = random.Random(0)
    for name in NAMES:
        share = sum(draw_slip(name, rng) is not None for _ in range(400)) / 400
        assert share > 0.5 if PREVAILING_SLIP[name] else share < 0.3
