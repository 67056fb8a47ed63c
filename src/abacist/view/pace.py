"""Time and change while something runs: how long it still takes, how fast it is, how it moved.

:class:`Pace` turns a series of "so many done" into the time that is left; :class:`Trail` keeps a
series of any length in a bounded number of points, for a sparkline.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

REPORT_SECONDS = 10.0
_MARKS_APART_SECONDS = 1.0

BLOCKS = "▁▂▃▄▅▆▇█"
ASCII_BLOCKS = "_.-=+*%#"


def duration(seconds: float) -> str:
    """A length of time as people say it.

    >>> duration(8.4), duration(125), duration(4321)
    ('8 s', '2 min 05 s', '1 h 12 min')
    """
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


@dataclass
class Pace:
    """The advance of one thing towards its total: how long it still takes, when to report it."""

    clock: Callable[[], float]
    marks: deque[tuple[float, float]] = field(default_factory=lambda: deque(maxlen=20))
    reported_at: float = -math.inf
    reported_done: float = 0

    def mark(self, done: float) -> None:
        """Record that ``done`` is done now."""
        now = self.clock()
        # Marks of every token would soon reach back no further than a moment.
        if len(self.marks) > 1 and now - self.marks[-2][0] < _MARKS_APART_SECONDS:
            self.marks.pop()
        self.marks.append((now, done))

    def left(self, total: float | None, seconds_each: float | None = None) -> str:
        """``"2 min 05 s left"`` by the recent speed; nothing while that cannot be known.

        ``seconds_each`` stands in until there are two marks to judge by.
        """
        if total is None or not self.marks:
            return ""
        (start, first), (now, done) = self.marks[0], self.marks[-1]
        if done > first:
            seconds_each = (now - start) / (done - first)
        if seconds_each is None or done >= total:
            return ""
        seconds = seconds_each * (total - done)
        return f"{duration(seconds)} left" if math.isfinite(seconds) else ""

    def is_due(self, total: float | None) -> bool:
        """Whether the latest mark deserves a line of a log; if so it counts as reported."""
        now, done = self.marks[-1]
        advance = done - self.reported_done
        is_far = total is not None and (done >= total or advance >= total / 10)
        if not is_far and now - self.reported_at < REPORT_SECONDS:
            return False
        self.reported_at, self.reported_done = now, done
        return True


@dataclass
class Speed:
    """How many things a second, counted from rising totals that may begin anew."""

    clock: Callable[[], float]
    done: float = 0.0
    seconds: float = 0.0
    _last: tuple[float, float] | None = None

    def mark(self, done: float) -> None:
        """Record that ``done`` is done now; fewer than before means that a new count began."""
        now = self.clock()
        if self._last is not None and done >= self._last[1]:
            self.done += done - self._last[1]
            self.seconds += now - self._last[0]
        self._last = (now, done)

    def a_second(self) -> float | None:
        """The mean speed; None while it is not known."""
        return self.done / self.seconds if self.done > 0 and self.seconds > 0 else None


class Trail:
    """The past of one number in at most :data:`MOST` points: when full, neighbours are averaged."""

    MOST = 256

    def __init__(self) -> None:
        self.points: list[float] = []
        self._each = 1  # values that a point stands for
        self._waiting: list[float] = []

    def add(self, value: float) -> None:
        """Append a value; nan and infinities count as gaps."""
        self._waiting.append(value)
        if len(self._waiting) < self._each:
            return
        self.points.append(_mean(self._waiting))
        self._waiting = []
        if len(self.points) >= self.MOST:
            self.points = _halved(self.points)
            self._each *= 2

    def drawn(self, width: int, low: float, high: float, blocks: str = BLOCKS) -> str:
        """A sparkline of at most ``width`` characters, ``low`` to ``high``; a space for a gap.

        >>> trail = Trail()
        >>> for value in (0.0, 1.0, math.nan, 2.0):
        ...     trail.add(value)
        >>> trail.drawn(4, 0.0, 2.0)
        '▁▅ █'
        """
        points = self.points
        while len(points) > max(width, 1):
            points = _halved(points)
        return "".join(_block(point, low, high, blocks) for point in points)

    def bounds(self) -> tuple[float, float]:
        """The lowest and the highest point, (0, 1) if there is none."""
        known = [point for point in self.points if math.isfinite(point)]
        return (min(known), max(known)) if known else (0.0, 1.0)


def _halved(points: Sequence[float]) -> list[float]:
    return [_mean(points[start : start + 2]) for start in range(0, len(points), 2)]


def _mean(values: Sequence[float]) -> float:
    known = [value for value in values if math.isfinite(value)]
    return sum(value / len(known) for value in known) if known else math.nan


def _block(point: float, low: float, high: float, blocks: str) -> str:
    if not math.isfinite(point):
        return " "
    spread = high - low
    share = (point - low) / spread if 0 < spread < math.inf else 0.5
    return blocks[round(min(max(share, 0.0), 1.0) * (len(blocks) - 1))]
