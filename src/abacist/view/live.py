"""The terminal while a model trains: what is being learned, how fast, and for how long still.

:class:`Live` is told about stages, steps and progress and decides itself how to show them: a
panel that redraws on a terminal, plain lines at sensible intervals anywhere else (a log file, a
pipe, CI). It reads the metrics under the names TRL logs them, copes with absent, unknown and
not-a-number values, and never raises because of one.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from types import TracebackType

import rich.live
from rich.console import Console, Group, RenderableType
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from abacist.records.secrets import without_secrets
from abacist.view.plaintext import visible
from abacist.view.readings import REWARD_MAXIMA, Pace, Step, measured_words

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
        self,
        console: Console | None = None,
        *,
        maxima: Mapping[str, float] = REWARD_MAXIMA,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.console = console or Console()
        self.draws = self.console.is_terminal and not self.console.is_dumb_terminal
        self._maxima = maxima
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
        self._finish()
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
            self._progress_pace = Pace(self._clock)
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
        self._finish()

    def __enter__(self) -> Live:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    # How it is shown.

    def _finish(self) -> None:
        if self._display is not None:
            self._display.stop()
            self._display = None
        self._print_pending()
        self._reset()

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
        maximum = self._maxima.get(name)
        return f"{value:.2f}" if maximum is None else f"{value:.2f}/{maximum:g}"

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
            full = self._maxima.get(name) or self._highest.get(name) or 1.0
            filled = min(max(value, 0.0), full) if math.isfinite(value) else 0.0
            first = at_first.get(name, math.nan)
            table.add_row(
                Text(visible(name)),
                ProgressBar(total=full, completed=filled, width=BAR_COLUMNS),
                Text(self._out_of(name, value)),
                Text(f"at first {first:.2f}" if math.isfinite(first) else "", style="dim"),
            )
        return table
