"""Stopping: a signal ends a run where nothing is half changed, and the hours are kept."""

from __future__ import annotations

import os
import signal
import threading
from typing import Any

import pytest

from abacist.errors import Interrupted
from abacist.learning.resume import stopping
from abacist.learning.resume.stopping import StopNow, StopRequests
from faults import fault


def send(number: int) -> None:
    os.kill(os.getpid(), number)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_outside_training_a_signal_stops_at_once_and_the_old_handlers_return(number: int) -> None:
    before = signal.getsignal(number)
    with pytest.raises(StopNow) as caught, StopRequests():
        send(number)
        pytest.fail("went on")
    assert caught.value.signal_number == number
    assert signal.getsignal(number) is before


def test_a_deferred_signal_waits_for_the_next_safe_place() -> None:
    with StopRequests() as stops, stops.deferred():
        stops.check()
        send(signal.SIGTERM)
        send(signal.SIGTERM)  # supervisors repeat it
        done = "the step"
        with pytest.raises(StopNow):
            stops.check()
        with pytest.raises(StopNow), stops.at_once():
            pytest.fail("began a step more")
    assert done


def test_inside_an_interruptible_section_a_signal_acts_there_and_nowhere_after() -> None:
    with StopRequests() as stops, stops.deferred():
        with pytest.raises(StopNow), stops.at_once():
            send(signal.SIGTERM)
            pytest.fail("went on")
        stops.requested = None
        send(signal.SIGTERM)  # deferred again


@fault("stops", "Ctrl-C twice", "nothing is saved; the last checkpoint stands", 130)
def test_a_second_ctrl_c_stops_there_and_then() -> None:
    with StopRequests() as stops, stops.deferred():
        send(signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            send(signal.SIGINT)


def test_no_except_exception_on_the_way_can_swallow_a_stop() -> None:
    with pytest.raises(StopNow), StopRequests():
        try:
            send(signal.SIGTERM)
        except Exception:
            pytest.fail("a reward function swallowed the stop")


def test_it_stops_before_the_step_that_would_pass_the_hours(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    clock = [1000.0]
    monkeypatch.setattr(stopping.time, "monotonic", lambda: clock[0])
    stops = StopRequests(max_hours=1.0)
    clock[0] += 1800  # half an hour of measuring is no step
    stops.start_of_training()
    steps = 0
    with pytest.raises(StopNow) as caught:
        while True:
            clock[0] += 400
            steps += 1
            stops.check()
    assert steps == 4 and caught.value.signal_number is None
    assert caught.value.reason == "--max_hours"


def test_in_a_thread_it_hears_nothing_and_breaks_nothing() -> None:
    failures: list[BaseException] = []

    def work() -> None:
        try:
            with StopRequests() as stops, stops.deferred(), stops.at_once():
                stops.check()
        except BaseException as error:
            failures.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert failures == []


def test_a_forked_worker_dies_of_the_signal_and_does_not_stop_the_run() -> None:
    with StopRequests() as stops:
        child = os.fork()
        if child == 0:
            try:
                send(signal.SIGTERM)
            finally:
                os._exit(7)
        _, status = os.waitpid(child, 0)
        assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGTERM
        assert stops.requested is None


def test_an_interrupted_run_has_the_exit_code_of_its_signal() -> None:
    codes: list[Any] = [
        Interrupted("stopped", "", number).exit_code for number in (signal.SIGINT, signal.SIGTERM)
    ]
    assert codes == [130, 143]


def test_several_processes_stop_where_they_ask_each_other_and_nowhere_else() -> None:
    heard_elsewhere = [0, 0]

    def agreed(*numbers: int) -> tuple[int, ...]:
        return tuple(map(max, numbers, heard_elsewhere))

    with StopRequests(agreed=agreed) as stops, stops.deferred():
        with stops.at_once():
            signal.raise_signal(signal.SIGTERM)  # the others are elsewhere: it waits
        with pytest.raises(StopNow) as mine, stops.at_once():
            pytest.fail("it went on although a signal was heard")
        stops.requested = None
        stops.check()
        heard_elsewhere[0] = signal.SIGINT
        with pytest.raises(StopNow) as theirs:
            stops.check()
        heard_elsewhere[:] = [0, 1]
        with pytest.raises(StopNow) as hours:
            stops.check()
    stops_by = [one.value.signal_number for one in (mine, theirs, hours)]
    assert stops_by == [signal.SIGTERM, signal.SIGINT, None]


@pytest.mark.parametrize("faster", [0, 1])
def test_hours_that_the_clock_of_one_process_finds_used_up_stop_all_after_the_same_step(
    faster: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    mine, together = threading.local(), threading.Barrier(2, timeout=60)
    clocks, told, stopped_after = [0.0, 0.0], [(0, 0), (0, 0)], [0, 0]
    monkeypatch.setattr(stopping.time, "monotonic", lambda: clocks[mine.rank])

    def agreed(*numbers: int) -> tuple[int, ...]:
        told[mine.rank] = numbers[0], numbers[1]
        together.wait()  # breaks where the other process no longer asks
        largest = tuple(map(max, *told))
        together.wait()
        return largest

    def train(rank: int) -> None:
        mine.rank = rank
        stops = StopRequests(max_hours=1.0, agreed=agreed)
        stops.start_of_training()
        with pytest.raises(StopNow):
            while True:
                clocks[rank] += 1000 if rank == faster else 400
                stopped_after[rank] += 1
                stops.check()

    threads = [threading.Thread(target=train, args=(rank,)) for rank in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert stopped_after == [3, 3]  # a fourth of 1000 s would pass the hour
