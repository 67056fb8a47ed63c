"""Code of others that hangs is stopped, wherever it hangs, and the sample is named."""

from __future__ import annotations

import asyncio
import re
import signal
import threading
import time
from typing import Any

import pytest

from abacist.errors import RewardError
from abacist.task.custom_rewards import checked
from abacist.task.watchdog import TimeIsUp, call_within

LIMIT = 0.3
PROMPTS = ["p"] * 3
COMPLETIONS = ["fine", "a" * 40 + "!", "fine too"]


def backtracks(prompts: Any, completions: list[str], **columns: Any) -> list[float]:
    return [float(bool(re.fullmatch(r"(a+)+", text))) for text in completions]


def sleeps(prompts: Any, completions: list[str], **columns: Any) -> list[float]:
    return [time.sleep(60) or 0.0 if "!" in text else 1.0 for text in completions]


def catches_everything(prompts: Any, completions: list[str], **columns: Any) -> list[float]:
    while any("!" in text for text in completions):
        try:
            time.sleep(60)
        except Exception:
            continue
    return [0.0] * len(completions)


@pytest.mark.parametrize("reward", [backtracks, sleeps, catches_everything])
def test_a_reward_that_hangs_is_named_with_the_sample_it_hangs_on(reward: Any) -> None:
    with pytest.raises(RewardError) as caught:
        checked(reward, LIMIT)(PROMPTS, COMPLETIONS)
    assert reward.__name__ in caught.value.message and "sample 1, 'aaaa" in caught.value.message
    assert "--reward_timeout_seconds" in caught.value.hint


def test_an_asynchronous_reward_that_hangs_is_named_with_its_sample_too() -> None:
    async def waits(prompts: Any, completions: list[str], **columns: Any) -> list[float]:
        if any("!" in text for text in completions):
            await asyncio.sleep(60)
        return [1.0] * len(completions)

    with pytest.raises(RewardError, match=r"'waits'.*sample 1"):
        asyncio.run(checked(waits, LIMIT)(PROMPTS, COMPLETIONS))


def test_a_time_out_of_the_rewards_own_is_not_taken_for_ours() -> None:
    async def gives_up(prompts: Any, completions: list[str], **columns: Any) -> list[float]:
        raise TimeoutError("the judge did not answer")

    with pytest.raises(RewardError, match=r"raised TimeoutError.*judge did not answer"):
        asyncio.run(checked(gives_up, LIMIT)(PROMPTS, COMPLETIONS))


def test_a_batch_that_is_merely_slow_is_said_to_be_so() -> None:
    def slow(prompts: Any, completions: list[str], **columns: Any) -> list[float]:
        time.sleep(0.15 if len(completions) > 1 else 0.0)
        return [0.0] * len(completions)

    with pytest.raises(RewardError, match="batch of 3 samples, though on none of them alone"):
        checked(slow, 0.1)(PROMPTS, COMPLETIONS)
    assert checked(slow, 0)(PROMPTS, COMPLETIONS) == [0.0] * 3


def test_the_alarm_leaves_no_trace_behind() -> None:
    before = signal.getsignal(signal.SIGALRM)
    assert call_within(60, lambda: "done") == "done"
    with pytest.raises(ZeroDivisionError):
        call_within(60, lambda: 1 / 0)
    assert signal.getsignal(signal.SIGALRM) is before
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)


def test_the_limit_holds_outside_the_main_thread_too() -> None:
    outcome: list[Any] = []

    def work() -> None:
        outcome.append(call_within(60, lambda: 1))
        for func in (lambda: time.sleep(60), lambda: 1 / 0):
            try:
                call_within(LIMIT, func)
            except (TimeIsUp, ZeroDivisionError) as error:
                outcome.append(type(error))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join(20)
    assert outcome == [1, TimeIsUp, ZeroDivisionError]
