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


class Live:
    """The watcher that a training reports to.

    On a terminal it keeps a panel up to date; elsewhere it prints lines: the first, the last,
    and between them one after every tenth of the way, or after ten seconds. Usable as a context
    manager; :meth:`close` may be called more than once.
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
        self._reset()

    def _reset(self) -> None:
        self._step: Step | None = None
        self._progress: tuple[int, int, str] | None = None
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
        self._step = step
        self._first = self._first or step
        for name, value in step.rewards.items():
            if math.isfinite(value):
                self._highest[name] = max(self._highest.get(name, 0.0), value)
        self._step_pace.mark(step.step or 0)
        self._show(self._step_pace, step.max_steps, self._step_line)

    def progress(self, done: int, total: int, label: str) -> None:
        """``done`` of ``total`` things of one kind, such as problems answered."""
        if self._progress is None or self._progress[2] != label or done < self._progress[0]:
            self._progress_pace = Pace(self._clock)
        self._progress = (done, total, label)
        self._progress_pace.mark(done)
        self._show(self._progress_pace, total, self._progress_line)
        if done >= total:
            self._progress = None

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

    def _print_pending(self) -> None:
        if self._pending:
            self._print(self._pending)
            self._pending = ""

    def _show(self, pace: Pace, total: int | None, line: Callable[[], str]) -> None:
        if self.draws:
            self._draw()
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
        done, total, label = self._progress
        share = f" ({done / total:.0%})" if total else ""
        left = self._progress_pace.left(total)
        return f"{label}: {done} of {total}{share}" + (f" | {left}" if left else "")

    def _out_of(self, name: str, value: float) -> str:
        if not math.isfinite(value):
            return "n/a"
        maximum = self._maxima.get(name)
        return f"{value:.2f}" if maximum is None else f"{value:.2f}/{maximum:g}"

    def _draw(self) -> None:
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
