"""The terminal while a model trains: what is being learned, how fast, and for how long still.

:class:`Live` is told about stages, steps and progress and decides itself how to show them: a
panel that redraws on a terminal, plain lines at sensible intervals anywhere else (a log file, a
pipe, CI). It reads the metrics under the names TRL logs them, copes with absent, unknown and
not-a-number values, and never raises because of one.

Which metrics are there depends on TRL's version and settings, and any of them may be nan.
:class:`Step` picks out what a person wants to see; :class:`Pace` turns a series of "so many done"
into the time that is left.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import rich.live
from rich.console import Console, Group, RenderableType
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from abacist.learning.health.history import reward_names
from abacist.records.secrets import without_secrets
from abacist.task.rewards import built_in
from abacist.view.plaintext import visible

REPORT_SECONDS = 10.0
_MARKS_APART_SECONDS = 1.0


@dataclass(frozen=True, slots=True)
class Step:
    """One step's metrics, as far as they were logged and are numbers; the rest is None or nan."""

    step: int | None
    max_steps: int | None
    rewards: dict[str, float]
    reward: float | None
    length_tokens: float | None
    stopped_fraction: float | None
    zero_signal_fraction: float | None
    details: dict[str, float]
    seconds: float | None

    @classmethod
    def read(cls, metrics: Mapping[str, object]) -> Step:
        """Picks what is shown out of a dictionary of TRL's log."""
        rewards = {name: _number(metrics[f"rewards/{name}/mean"]) for name in reward_names(metrics)}
        clipped = _known(metrics, "completions/clipped_ratio")
        details = {name: _known(metrics, name) for name in ("loss", "kl", "entropy")}
        step, max_steps = _known(metrics, "step"), _known(metrics, "max_steps")
        return cls(
            step=None if step is None else int(step),
            max_steps=None if not max_steps else int(max_steps),
            rewards=rewards,
            reward=_known(metrics, "reward"),
            length_tokens=_known(metrics, "completions/mean_length"),
            stopped_fraction=None if clipped is None else 1 - clipped,
            zero_signal_fraction=_known(metrics, "frac_reward_zero_std"),
            details={name: value for name, value in details.items() if value is not None},
            seconds=_known(metrics, "step_seconds") or _known(metrics, "step_time"),
        )

    def position(self) -> str:
        """``"step 3/60"``, as far as it is known."""
        if self.step is None:
            return ""
        return f"step {self.step}/{self.max_steps}" if self.max_steps else f"step {self.step}"

    def words(self) -> list[str]:
        """The figures beside the rewards, each as a few words."""
        words = []
        if self.length_tokens is not None:
            words.append(f"{self.length_tokens:.0f} tokens a reply")
        if self.stopped_fraction is not None:
            words.append(f"stopped {self.stopped_fraction:.0%}")
        if self.zero_signal_fraction is not None:
            words.append(f"groups without signal {self.zero_signal_fraction:.0%}")
        return words + [f"{name} {value:.4g}" for name, value in self.details.items()]


def measured_words(metrics: Mapping[str, object]) -> str:
    """What an evaluation during training logged, as words; "" if it is none.

    >>> measured_words({"step": 20, "eval_accuracy": 0.45, "eval_runtime": 3.0})
    'step 20 | measured: accuracy 0.450'
    """
    clocks = ("runtime", "per_second", "_time")
    found = {
        name.removeprefix("eval_"): _known(metrics, name)
        for name in metrics
        if name.startswith("eval_") and "/" not in name and not name.endswith(clocks)
    }
    words = [f"{name} {value:.3f}" for name, value in found.items() if value is not None]
    step = _known(metrics, "step")
    return f"step {step or 0:.0f} | measured: {', '.join(words)}" if words else ""


def _number(value: object) -> float:
    try:
        return float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError, OverflowError):
        return math.nan


def _known(metrics: Mapping[str, object], name: str) -> float | None:
    value = _number(metrics.get(name))
    return value if math.isfinite(value) else None


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


BAR_COLUMNS = 30
REDRAW_SECONDS = 0.1
SILENT_SECONDS = 30.0  # after which a log hears how far the step in work is


class Live:
    """The watcher that a training reports to.

    On a terminal it keeps a panel up to date; elsewhere it prints lines: the first, the last,
    and between them one after every tenth of the way, or after ten seconds. From within a step it
    prints only where nothing else was said for half a minute. Usable as a context manager;
    :meth:`close` may be called more than once.
    """

    def __init__(
        self, console: Console | None = None, *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.console = console or Console()
        self.draws = self.console.is_terminal and not self.console.is_dumb_terminal
        self._highest: dict[str, float] = {}
        self._clock = clock
        self._display: rich.live.Live | None = None
        self._first: Step | None = None
        self._drawn_at = self._said_at = -math.inf
        self._reset()

    def _reset(self) -> None:
        self._step: Step | None = None
        self._progress: tuple[float, float, str, str] | None = None
        self._within: tuple[int, str, float, float, str] | None = None
        self._within_pace = Pace(self._clock)
        self._step_pace = Pace(self._clock)
        self._progress_pace = Pace(self._clock)
        self._shown: Pace | None = None
        self._pending = ""

    # What a training tells.

    def stage(self, name: str) -> None:
        """A new part of the run begins; what was drawn of the last one stays on the screen."""
        self.close()
        self._print(f"== {name}", style="bold")

    def note(self, text: str) -> None:
        """A line worth keeping, above whatever is being drawn."""
        self._print_pending()
        self._print(text)

    def step(self, metrics: Mapping[str, object]) -> None:
        """One log of the trainer, under TRL's names: a step's, or an evaluation's in between."""
        step = Step.read(metrics)
        if not step.rewards and step.reward is None and "loss" not in step.details:
            if words := measured_words(metrics):
                self.note(words)
            return
        self._step, self._within = step, None
        self._first = self._first or step
        for name, value in step.rewards.items():
            if math.isfinite(value):
                self._highest[name] = max(self._highest.get(name, 0.0), value)
        self._step_pace.mark(step.step or 0)
        self._show(self._step_pace, step.max_steps, self._step_line)

    def progress(self, done: float, total: float, label: str, words: str = "") -> None:
        """``done`` of ``total``, in things such as problems or in tokens of work.

        ``words`` are shown in place of the two numbers.
        """
        is_new = self._progress is None or self._progress[2] != label
        if is_new or done < self._progress_pace.marks[0][1]:
            # Where words are told at every token, the first says nothing yet.
            reported_at = self._clock() if words else -math.inf
            self._progress_pace = Pace(self._clock, reported_at=reported_at)
        is_over = done >= total
        self._progress = (done, total, label, words)
        self._progress_pace.mark(done)
        self._show(self._progress_pace, total, self._progress_line, at_once=is_new or is_over)
        if is_over:
            self._progress = None

    def within_step(self, step: int, part: str, done: float, total: float, words: str) -> None:
        """How far the step in work is: ``part`` is what it does now, ``words`` how far that is."""
        is_new = self._within is None or self._within[:2] != (step, part)
        if is_new:
            self._within_pace = Pace(self._clock)
        self._within = (step, part, done, total, words)
        self._within_pace.mark(done)
        if self.draws:
            self._draw(at_once=is_new)
        elif self._clock() - self._said_at >= SILENT_SECONDS:
            self._print_pending()
            self._print(self._within_line())

    def close(self) -> None:
        """Leaves the last state on the screen and the terminal as it was."""
        if self._display is not None:
            self._display.stop()
            self._display = None
        self._print_pending()
        self._reset()

    def __enter__(self) -> Live:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    # How it is shown.

    def _print(self, text: str, style: str = "") -> None:
        said = visible(without_secrets(text))
        self.console.print(Text(said, style=style), soft_wrap=True)
        self._said_at = self._clock()

    def _print_pending(self) -> None:
        if self._pending:
            self._print(self._pending)
            self._pending = ""

    def _show(
        self, pace: Pace, total: float | None, line: Callable[[], str], at_once: bool = True
    ) -> None:
        if self.draws:
            self._draw(at_once)
            return
        # What is not due is kept, so that the last line of anything is always printed.
        if pace is not self._shown:
            self._print_pending()
        self._shown, self._pending = pace, line()
        if pace.is_due(total):
            self._print_pending()

    def _heading(self, step: Step) -> list[str]:
        reward = "" if step.reward is None else f"reward {step.reward:.2f}"
        return [part for part in (step.position(), reward) if part]

    def _step_left(self, step: Step) -> list[str]:
        left = self._step_pace.left(step.max_steps, step.seconds)
        return [left] if left else []

    def _step_line(self) -> str:
        step = self._step
        assert step is not None
        rewards = [f"{name} {self._out_of(name, value)}" for name, value in step.rewards.items()]
        parts = [", ".join(rewards)] if rewards else []
        return " | ".join([*self._heading(step), *parts, *step.words(), *self._step_left(step)])

    def _progress_line(self) -> str:
        assert self._progress is not None
        done, total, label, words = self._progress
        share = f" ({done / total:.0%})" if total else ""
        left = self._progress_pace.left(total)
        words = words or f"{done} of {total}"
        return f"{label}: {words}{share}" + (f" | {left}" if left else "")

    def _within_line(self) -> str:
        assert self._within is not None
        step, part, _, total, words = self._within
        left = self._within_pace.left(total)
        return f"step {step}, {part}: {words}" + (f" | {left} in this part" if left else "")

    def _out_of(self, name: str, value: float) -> str:
        if not math.isfinite(value):
            return "n/a"
        ours = built_in(name)
        return f"{value:.2f}" if ours is None else f"{value:.2f}/{ours.maximum:g}"

    def _draw(self, at_once: bool = True) -> None:
        now = self._clock()
        if not at_once and now - self._drawn_at < REDRAW_SECONDS:
            return
        self._drawn_at = now
        if self._display is None:
            # No refresh thread: it is redrawn when there is news, and idle in between.
            self._display = rich.live.Live(console=self.console, auto_refresh=False)
            self._display.start()
        self._display.update(self._panel(), refresh=True)

    def _panel(self) -> RenderableType:
        parts: list[RenderableType] = []
        if (step := self._step) is not None:
            heading = self._heading(step) + self._step_left(step)
            parts.append(Text(" | ".join(heading), style="bold"))
            parts.append(self._bars(step))
            if step.words():
                parts.append(Text(" | ".join(step.words()), style="dim"))
        if self._within is not None:
            parts.append(Text(visible(self._within_line())))
        if self._progress is not None:
            parts.append(Text(visible(self._progress_line())))
        return Group(*parts)

    def _bars(self, step: Step) -> Table:
        table = Table.grid(padding=(0, 1))
        at_first = self._first.rewards if self._first else {}
        for name, value in step.rewards.items():
            ours = built_in(name)
            full = ours.maximum if ours else self._highest.get(name) or 1.0
            filled = min(max(value, 0.0), full) if math.isfinite(value) else 0.0
            first = at_first.get(name, math.nan)
            table.add_row(
                Text(visible(name)),
                ProgressBar(total=full, completed=filled, width=BAR_COLUMNS),
                Text(self._out_of(name, value)),
                Text(f"at first {first:.2f}" if math.isfinite(first) else "", style="dim"),
            )
        return table
