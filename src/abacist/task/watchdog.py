"""A time limit for a user's code, so that a reward that hangs ends the run instead of blocking it.

Most hanging code is a regular expression that backtracks without end. It blocks every other
thread, but a signal reaches it. So the limit is the alarm signal where there is one (main thread,
not Windows), because rewards that use the alarm themselves, such as math-verify's, must stay
in that thread too. Elsewhere the call runs in a thread that is given up. Code that stops in a
library without ever coming back to Python is ended, with the whole process and a traceback, when
:data:`GRACE_SECONDS` more have passed.
"""

from __future__ import annotations

import contextlib
import faulthandler
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

GRACE_SECONDS = 60.0
REPEAT_SECONDS = 1.0  # the alarm comes again, for code that swallowed the first

T = TypeVar("T")


class TimeIsUp(BaseException):
    """Raised in the code that took too long; no Exception, so that it is not caught in there."""


def call_within(seconds: float, func: Callable[[], T]) -> T:
    """What ``func`` returns. Raises TimeIsUp if that takes longer than ``seconds`` (0: no limit).

    >>> call_within(5.0, lambda: 42)
    42
    """
    if seconds <= 0:
        return func()
    if threading.current_thread() is threading.main_thread() and hasattr(signal, "setitimer"):
        with _alarm(seconds):
            return func()
    return _in_thread(seconds, func)


@contextlib.contextmanager
def _alarm(seconds: float) -> Iterator[None]:
    armed = True

    def time_is_up(signal_number: int, frame: object) -> None:
        if armed:
            raise TimeIsUp

    before = signal.signal(signal.SIGALRM, time_is_up)
    signal.setitimer(signal.ITIMER_REAL, seconds, REPEAT_SECONDS)
    with contextlib.suppress(AttributeError, OSError, ValueError):  # stderr may be no real file
        faulthandler.dump_traceback_later(
            seconds + GRACE_SECONDS, exit=True, file=sys.__stderr__ or sys.stderr
        )
    try:
        try:
            yield
        finally:
            armed = False  # an alarm just before this line still passes through the one below
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
        faulthandler.cancel_dump_traceback_later()


def _in_thread(seconds: float, func: Callable[[], T]) -> T:
    returned: list[T] = []
    raised: list[BaseException] = []

    def work() -> None:
        try:
            returned.append(func())
        except BaseException as error:
            raised.append(error)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join(seconds)
    if raised:
        raise raised[0]
    if not returned:
        raise TimeIsUp
    return returned[0]


def slice_of(everything: dict[str, Any], sample: int, count: int) -> dict[str, Any]:
    """A reward's keyword arguments for one sample of a batch of ``count``."""
    return {
        key: [value[sample]] if isinstance(value, list) and len(value) == count else value
        for key, value in everything.items()
    }
