"""Stops a run without losing it: signals, and a limit of hours.

The first SIGTERM or Ctrl-C ends the run at the next moment at which nothing is half changed. While
completions are sampled and gradients computed, that is at once: the current step is discarded and
the state after the last whole step is saved. While weights change, metrics are written or a
checkpoint is made, it is afterwards. A second Ctrl-C stops there and then;
what is on disk is whole either way.

Several processes stop together, or one would wait for another for ever: a signal that any of them
heard, and hours that any finds used up, stop all at the next moment at which they ask each other,
which is before every micro-batch and after every step.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

SIGNALS = (signal.SIGINT, signal.SIGTERM)
_CALLED = {signal.SIGINT: "Ctrl-C", signal.SIGTERM: "SIGTERM"}


class StopNow(BaseException):
    """Raised to stop a run. Not an Exception, so that no handler on the way catches it.

    ``signal_number`` is None when the hours are used up; ``checkpoint`` is set once the state has
    been saved.
    """

    def __init__(self, signal_number: int | None) -> None:
        super().__init__(signal_number)
        self.signal_number = signal_number
        self.checkpoint: Path | None = None
        self.step = 0
        self.max_steps = 0

    @property
    def reason(self) -> str:
        """What stopped the run, as words."""
        if self.signal_number is None:
            return "--max_hours"
        return _CALLED.get(signal.Signals(self.signal_number), str(self.signal_number))


class StopRequests:
    """Receives signals, and counts hours, for one run. A context manager.

    Outside :meth:`deferred` a signal raises :class:`StopNow` wherever the run is. Inside, it
    waits for the next :meth:`check`, or for an :meth:`at_once` section. Does nothing outside
    the main thread, where signals cannot be heard.

    ``agreed`` gives the largest of each number over all processes, if there are several.
    ``is_resumed`` only changes what ``where`` says before training.
    """

    def __init__(
        self,
        max_hours: float | None = None,
        agreed: Callable[..., tuple[int, ...]] | None = None,
        *,
        is_resumed: bool = False,
    ) -> None:
        self.began = time.monotonic()
        self.max_seconds = None if max_hours is None else max_hours * 3600
        self.requested: int | None = None
        self._agreed = agreed
        self.where = (
            "before training went on, when there was nothing new to save"
            if is_resumed
            else "before its first step, when there was nothing to save"
        )
        self._may_raise = True
        self._process = os.getpid()
        self._previous: dict[int, Any] = {}
        self._last_check = self.began

    def __enter__(self) -> StopRequests:
        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS:
                self._previous[number] = signal.signal(number, self._heard)
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous = {}

    @contextmanager
    def deferred(self) -> Iterator[None]:
        """A section in which a signal waits."""
        before, self._may_raise = self._may_raise, False
        try:
            yield
        finally:
            self._may_raise = before

    @contextmanager
    def at_once(self) -> Iterator[None]:
        """A section inside a deferred one in which a signal acts at once.

        With several processes it acts where this is entered: they are in step nowhere else.
        """
        before = self._may_raise
        self._may_raise = before or self._agreed is None
        try:
            self._obey()
            yield
        finally:
            self._may_raise = before

    def check(self) -> None:
        """Between two steps. Raises :class:`StopNow` if a signal waits, or if another step as
        long as the last one would pass the limit of hours."""
        now = time.monotonic()
        last_step_seconds, self._last_check = now - self._last_check, now
        at_its_end = now - self.began + last_step_seconds
        self._obey(self.max_seconds is not None and at_its_end > self.max_seconds)

    def end_of_training(self) -> None:
        """The trained model is saved. Raises :class:`StopNow` if a signal came in the last step."""
        self.where = "after its last step, before its verdict; what it learned is saved"
        self._obey()

    def start_of_training(self) -> None:
        """Start the clock of the first step."""
        self._last_check = time.monotonic()

    def _obey(self, is_late: bool = False) -> None:
        """Raise :class:`StopNow` if this process, or another one, has reason to."""
        number, late = self.requested or 0, int(is_late)
        if self._agreed is not None:
            number, late = self._agreed(number, late)
        if number or late:
            raise StopNow(number or None)

    def _heard(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._process:  # a worker of a data loader, forked with this handler
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
            return
        if self.requested is not None:
            if number == signal.SIGINT:
                raise KeyboardInterrupt
            return  # supervisors repeat SIGTERM; the first is being obeyed
        self.requested = number
        if self._may_raise:
            raise StopNow(number)
