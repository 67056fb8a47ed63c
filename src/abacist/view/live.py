"""The watcher of a training: what is being learned, how fast, and for how long still.

:class:`Live` is told about stages, steps, replies and progress and decides itself how to show them:
a panel that is redrawn on a terminal or in a notebook's cell, plain lines at sensible intervals
anywhere else (a log file, a pipe, CI). It reads the metrics under the names TRL logs them, copes
with absent, unknown and not-a-number values, and never raises because of one.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence

from rich.console import Console
from rich.text import Text

from abacist.records.rollout import Rollout
from abacist.records.secrets import without_secrets
from abacist.view.pace import Pace, Speed
from abacist.view.panel import SEPARATOR, Motion, Samples, Scene, panel
from abacist.view.plaintext import visible
from abacist.view.screen import Screen, Terminal, is_ci, notebook_cell
from abacist.view.step import Step, known, measured_words, out_of

SILENT_SECONDS = 30.0  # after which a log hears how far the step in work is
SILENT_SECONDS_IN_CI = 300.0  # often enough for services that stop a job which says nothing
WARNINGS_KEPT = 3
ROLLOUTS = "rollouts"  # the part of a step in which replies are written, as the trainer names it


class Live:
    """The watcher that a training reports to.

    On a terminal and in a notebook it keeps a panel up to date; elsewhere it prints lines: the
    first, the last, and between them one after every tenth of the way, or after ten seconds. From
    within a step it prints only where nothing else was said for half a minute (in CI, for five).
    Usable as a context manager; :meth:`close` may be called more than once.
    """

    def __init__(
        self,
        console: Console | None = None,
        *,
        screen: Screen | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.screen: Screen = screen or Terminal(console)
        self.draws = self.wants_replies = self.screen.draws
        self._silent_seconds = SILENT_SECONDS_IN_CI if is_ci() else SILENT_SECONDS
        self._clock = clock
        self._drawn_at = self._said_at = -math.inf
        self._reset()

    @classmethod
    def here(cls) -> Live | None:
        """A watcher that draws in the cell of the notebook this runs in; None elsewhere."""
        cell = notebook_cell()
        return cls(screen=cell) if cell else None

    def _reset(self) -> None:
        self._scene = Scene()
        self._within_pace = Pace(self._clock)
        self._step_pace = Pace(self._clock)
        self._progress_pace = Pace(self._clock)
        self._rollout_speed = Speed(self._clock)
        self._shown: Pace | None = None
        self._pending = ""
        self._is_drawn = False

    # What a training tells.

    def stage(self, name: str) -> None:
        """A new part of the run begins; what was drawn of the last one stays on the screen."""
        self.close()
        self._print(f"== {name}", style="bold")

    def note(self, text: str) -> None:
        """A line worth keeping, above whatever is being drawn."""
        self._print_pending()
        self._print(text)

    def warning(self, text: str) -> None:
        """A fault and its remedy: in view while the panel is, and on the screen after it."""
        if not self.draws:
            self.note(text)
            return
        self._scene.warnings.append(without_secrets(text))
        if len(self._scene.warnings) > WARNINGS_KEPT:
            self.note(self._scene.warnings.pop(0))
        self._draw()

    def step(self, metrics: Mapping[str, object]) -> None:
        """One log of the trainer, under TRL's names: a step's, or an evaluation's in between."""
        metrics = {name: value for name, value in metrics.items() if isinstance(name, str)}
        step, scene = Step.read(metrics), self._scene
        if not step.rewards and step.reward is None and "loss" not in step.details:
            self._measured(step, metrics)
            return
        before, scene.step, scene.within = scene.step, step, None
        scene.first = scene.first or step
        for name, value in step.rewards.items():
            scene.trail(f"reward {name}").add(value)
        for name, each in (("right", step.right_fraction), ("length", step.length_tokens)):
            if each is not None:
                scene.trail(name).add(each)
        self._step_pace.mark(step.step or 0)
        scene.left = self._step_pace.left(step.max_steps, step.seconds)
        scene.speeds = self._speeds(before, step)
        self._rollout_speed = Speed(self._clock)
        self._show(self._step_pace, step.max_steps, self._step_line)

    def replies(self, step: int, rollouts: Sequence[Rollout]) -> None:
        """The replies of the step in work; a panel with room shows one or two of them."""
        if self.draws and rollouts:
            self._scene.samples = Samples(step, lowest_and_highest(rollouts))
            self._draw(at_once=False)

    def progress(self, done: float, total: float, label: str, words: str = "") -> None:
        """``done`` of ``total``, in things such as problems or in tokens of work.

        ``words`` are shown in place of the two numbers.
        """
        now = self._scene.progress
        is_new = now is None or now.label != label
        if is_new or done < self._progress_pace.marks[0][1]:
            # Where words are told at every token, the first says nothing yet.
            reported_at = self._clock() if words else -math.inf
            self._progress_pace = Pace(self._clock, reported_at=reported_at)
        is_over = done >= total
        self._progress_pace.mark(done)
        share = f" ({done / total:.0%})" if total and math.isfinite(done / total) else ""
        left = self._progress_pace.left(total)
        words = (words or f"{done} of {total}") + share
        motion = self._scene.progress = Motion(label, words, done, total, left)
        self._show(self._progress_pace, total, motion.line, at_once=is_new or is_over)
        if is_over:
            self._scene.progress = None

    def within_step(self, step: int, part: str, done: float, total: float, words: str) -> None:
        """How far the step in work is: ``part`` is what it does now, ``words`` how far that is."""
        label = f"step {step}, {part}"
        is_new = self._scene.within is None or self._scene.within.label != label
        if is_new:
            self._within_pace = Pace(self._clock)
        self._within_pace.mark(done)
        if part == ROLLOUTS:
            self._rollout_speed.mark(done)
        left = self._within_pace.left(total)
        left = f"{left} in this part" if left else ""
        motion = self._scene.within = Motion(label, words, done, total, left)
        if self.draws:
            self._draw(at_once=is_new)
        elif self._clock() - self._said_at >= self._silent_seconds:
            self._print_pending()
            self._print(motion.line())

    def close(self) -> None:
        """Leaves the last state on the screen and the terminal as it was."""
        warnings, self._scene.warnings = self._scene.warnings, []
        if self._is_drawn:
            self._draw()
        for text in warnings:  # in full, and no longer in the panel: once on the screen
            self.note(text)
        self.screen.close()
        self._print_pending()
        self._reset()

    def __enter__(self) -> Live:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    # How it is shown.

    def _measured(self, step: Step, metrics: Mapping[str, object]) -> None:
        if (accuracy := known(metrics, "eval_accuracy")) is not None:
            self._scene.measured = (step.step, accuracy)
            self._scene.trail("measured").add(accuracy)
        if words := measured_words(metrics):
            self.note(words)

    def _speeds(self, before: Step | None, step: Step) -> list[str]:
        """Tokens a second of the rollouts and of whole steps, as far as they can be known."""
        words = []
        if (speed := self._rollout_speed.a_second()) is not None:
            words.append(f"{speed:,.0f} tokens a second in rollouts")
        tokens, steps = step.num_tokens, step.step
        if before is not None and tokens is not None and steps is not None:
            tokens = None if before.num_tokens is None else tokens - before.num_tokens
            steps = None if before.step is None else steps - before.step
        elif step.step != 1:  # a run that goes on: what was before it is not known
            tokens = None
        if tokens and steps and step.seconds and tokens > 0 and steps > 0 and step.seconds > 0:
            words.append(f"{tokens / (steps * step.seconds):,.0f} in the whole step")
        if len(words) == 1 and speed is None:
            return [words[0].replace(" in ", " tokens a second in ", 1)]
        return words

    def _print(self, text: str, style: str = "") -> None:
        self.screen.print(Text(visible(without_secrets(text)), style=style))
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

    def _step_line(self) -> str:
        step = self._scene.step
        assert step is not None
        reward = "" if step.reward is None else f"reward {step.reward:.2f}"
        rewards = ", ".join(f"{name} {out_of(name, value)}" for name, value in step.rewards.items())
        parts = [step.position(), reward, rewards, *step.words(), self._scene.left]
        return SEPARATOR.join(part for part in parts if part)

    def _draw(self, at_once: bool = True) -> None:
        now = self._clock()
        if not at_once and now - self._drawn_at < self.screen.redraw_seconds:
            return
        self._drawn_at = now
        width, height = self.screen.size
        self._is_drawn = True
        self.screen.draw(panel(self._scene, width, height, ascii_only=self.screen.ascii_only))


def lowest_and_highest(rollouts: Sequence[Rollout]) -> list[Rollout]:
    """The lowest and the highest paid reply of the group whose rewards differ most.

    One reply where there is no other in its group.
    """
    groups: dict[int, list[Rollout]] = {}
    for rollout in rollouts:
        groups.setdefault(rollout.group, []).append(rollout)

    def paid(rollout: Rollout) -> float:
        reward = rollout.reward
        return reward if reward is not None and math.isfinite(reward) else -math.inf

    def spread(group: Sequence[Rollout]) -> float:
        known = [each for each in map(paid, group) if each > -math.inf]
        return max(known) - min(known) if known else -1.0

    group = max(groups.values(), key=spread)
    ordered = sorted(group, key=paid)
    return [ordered[0], ordered[-1]] if len(ordered) > 1 else ordered
