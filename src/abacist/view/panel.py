"""What the terminal shows while a model trains, as lines that fit the screen.

A :class:`Scene` is what is known at a moment; :func:`panel` lays it out. No line is wider than the
screen and no panel higher: sample replies, warnings and details give way in this order, and what
is too wide is clipped with an ellipsis.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from rich.cells import cell_len
from rich.console import Group, RenderableType
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from abacist.proof.outcomes import rollout_outcome
from abacist.records.rollout import Rollout, question_of
from abacist.task.rewards import built_in
from abacist.view.pace import ASCII_BLOCKS, BLOCKS, Trail
from abacist.view.plaintext import fold, visible
from abacist.view.rollouts import (
    STYLES,
    amount,
    question_lines,
    reply_lines,
    tagged,
    verdict_on,
)
from abacist.view.step import Step, out_of

SEPARATOR = " | "
LEAST_WIDTH = 20
MAX_BAR_COLUMNS = 30
MAX_SPARK_COLUMNS = 30
_NAME_COLUMNS = 24
_SAMPLE_LINES = 9  # a heading, one line of the question, some of the reply, the verdict
_MAX_SAMPLE_LINES = 16
_WARNING_LINES = 4
_NARROW = 46  # below it there is no room for a sparkline beside a bar


@dataclass(frozen=True, slots=True)
class Motion:
    """How far a piece of work is: ``done`` of ``total``, and the same in words."""

    label: str
    words: str
    done: float
    total: float
    left: str

    def line(self) -> str:
        """All of it as one line."""
        return f"{self.label}: {self.words}" + (f"{SEPARATOR}{self.left}" if self.left else "")


@dataclass
class Samples:
    """Some replies of a step. They are laid out once for a screen, not at every redrawing."""

    step: int
    rollouts: Sequence[Rollout]
    _drawn: dict[tuple[int, ...], list[Text]] = field(default_factory=dict)

    def drawn(self, screen: tuple[int, ...], draw: Callable[[], list[Text]]) -> list[Text]:
        """What ``draw`` makes of them for a screen of these sizes."""
        if screen not in self._drawn:
            self._drawn = {screen: draw()}  # a terminal has one size at a time
        return self._drawn[screen]


@dataclass
class Scene:
    """What is known of a training at one moment."""

    step: Step | None = None
    first: Step | None = None
    left: str = ""
    trails: dict[str, Trail] = field(default_factory=dict)
    measured: tuple[int | None, float] | None = None  # the step, and the accuracy there
    speeds: list[str] = field(default_factory=list)
    within: Motion | None = None
    progress: Motion | None = None
    warnings: list[str] = field(default_factory=list)
    samples: Samples | None = None

    def trail(self, name: str) -> Trail:
        """The past of the number with this name."""
        return self.trails.setdefault(name, Trail())


def panel(scene: Scene, width: int, height: int, *, ascii_only: bool = False) -> RenderableType:
    """The scene on at most ``height`` lines of at most ``width`` columns."""
    width = max(width, LEAST_WIDTH)
    painter = _Painter(scene, width, ASCII_BLOCKS if ascii_only else BLOCKS)
    top, bars, words, motion = (
        painter.heading(), painter.rows(), painter.words(), painter.motion(),
    )  # fmt: skip
    room = max(height, 1) - len(top) - len(motion)
    if len(bars) > room:
        left_out = len(bars) - max(room - 1, 0)
        bars = [*bars[: max(room - 1, 0)], _line(f"and {left_out} more", width, "dim")][
            : max(room, 0)
        ]
    room -= len(bars)
    words = words[: max(room, 0)]
    room -= len(words)
    warnings = painter.warnings(room)
    room -= len(warnings)
    return Group(*top, *bars, *words, *warnings, *painter.samples(room), *motion)


def joined(parts: Iterable[str], width: int) -> list[str]:
    """The parts in lines of at most ``width`` columns, broken between them and clipped within.

    >>> joined(["48 tokens", "stopped 97%", "loss 0.1"], 24)
    ['48 tokens | stopped 97%', 'loss 0.1']
    """
    lines: list[str] = []
    for part in map(visible, parts):
        line = f"{lines[-1]}{SEPARATOR}{part}" if lines else part
        if lines and cell_len(line) <= width:
            lines[-1] = line
        else:
            lines.append(clipped(part, width))
    return lines


def clipped(text: str, width: int) -> str:
    """Harmless text on one line of at most ``width`` columns.

    >>> clipped("a long way\\nto go", 8)
    'a long …'
    """
    found = Text(" ".join(text.split("\n")))
    found.truncate(width, overflow="ellipsis")
    return found.plain


def _line(text: str, width: int, style: str = "") -> Text:
    return Text(clipped(text, width), style=style, no_wrap=True, overflow="crop")


@dataclass(frozen=True, slots=True)
class _Painter:
    scene: Scene
    width: int
    blocks: str

    def heading(self) -> list[Text]:
        """Where the run is, what it earns, how long it still takes."""
        step = self.scene.step
        if step is None:
            return []
        reward = "" if step.reward is None else f"reward {step.reward:.2f}"
        parts = [part for part in (step.position(), reward, self.scene.left) if part]
        return [_line(line, self.width, "bold") for line in joined(parts, self.width)]

    def words(self) -> list[Text]:
        step = self.scene.step
        if step is None:
            return []
        parts = step.words(of_length=False)
        lines = [*joined(parts, self.width), *joined(self.scene.speeds, self.width)]
        return [_line(line, self.width, "dim") for line in lines]

    def rows(self) -> list[RenderableType]:
        """A line for every reward and for accuracy: a bar, the number, how it came there."""
        step = self.scene.step
        if step is None:
            return []
        rows = [self._reward_row(name, value, step) for name, value in step.rewards.items()]
        first = self.scene.first or step
        if (right := step.right_fraction) is not None:
            at_first = first.right_fraction
            since = "" if at_first is None else f"at first {at_first:.0%}"
            rows.append(_Row("right", right, f"{right:.0%}", self._trail("right", 0.0, 1.0), since))
        if self.scene.measured is not None:
            at, share = self.scene.measured
            when = "" if at is None else f"at step {at}"
            spark = self._trail("measured", 0.0, 1.0)
            rows.append(_Row("measured", share, f"{share:.0%}", spark, when))
        if (length := step.length_tokens) is not None:
            at_first = first.length_tokens
            since = "" if at_first is None else f"at first {at_first:.0f}"
            highest = self.scene.trail("length").bounds()[1]
            spark = self._trail("length", 0.0, highest)
            rows.append(_Row("tokens a reply", None, f"{length:.0f}", spark, since))
        return _laid_out(rows, self.width)

    def _reward_row(self, name: str, value: float, step: Step) -> _Row:
        ours = built_in(name)
        low, high = self.scene.trail(f"reward {name}").bounds()
        full = ours.maximum if ours else max(high, 0.0) or 1.0
        first = (self.scene.first or step).rewards.get(name, math.nan)
        since = f"at first {first:.2f}" if math.isfinite(first) else ""
        spark = self._trail(f"reward {name}", min(low, 0.0), full)
        filled = value / full if math.isfinite(value) else 0.0
        return _Row(visible(name), filled, out_of(name, value), spark, since)

    def _trail(self, name: str, low: float, high: float) -> tuple[Trail, float, float, str]:
        return self.scene.trail(name), low, high, self.blocks

    def warnings(self, room: int) -> list[Text]:
        """The newest warnings, each with its remedy, as far as there is room."""
        shown: list[Text] = []
        for warning in reversed(self.scene.warnings):
            lines = fold(visible(warning), self.width - 2)
            lines = [piece for piece in lines if piece.strip()]
            space = min(
                room - len(shown), _WARNING_LINES if self.width >= 60 else _WARNING_LINES + 2
            )
            if space < 1:
                break
            if len(lines) > space:  # the rest of it joins the last line that fits, and is clipped
                last = clipped(" ".join(lines[space - 1 :]), self.width - 2)
                lines = [*lines[: space - 1], last]
            marks = ["! ", *["  "] * (len(lines) - 1)]
            found = [
                _line(mark + line, self.width, "yellow")
                for mark, line in zip(marks, lines, strict=True)
            ]
            shown = [*found, *shown]
        return shown

    def samples(self, room: int) -> list[Text]:
        """One or two replies of the newest step, if there is room for them."""
        if self.scene.samples is None or room < _SAMPLE_LINES or self.width < 40:
            return []
        samples = self.scene.samples
        step, rollouts = samples.step, samples.rollouts
        count = min(len(rollouts), room // _SAMPLE_LINES, 2)
        # With room for one: the lowest and the highest take turns.
        chosen = [rollouts[step % len(rollouts)]] if count == 1 else rollouts[:count]
        lines = min(room // max(count, 1), _MAX_SAMPLE_LINES)
        screen = (self.width, count, lines, self.blocks == ASCII_BLOCKS)
        return samples.drawn(screen, lambda: self._samples(step, chosen, lines))

    def _samples(self, step: int, chosen: Sequence[Rollout], lines: int) -> list[Text]:
        shown: list[Text] = []
        asked: str | None = None
        for one in chosen:
            # Of one group: what both answer is said once.
            shown += self._sample(step, one, lines, has_question=question_of(one.messages) != asked)
            asked = question_of(one.messages)
        return shown

    def _sample(self, step: int, rollout: Rollout, most: int, *, has_question: bool) -> list[Text]:
        outcome = rollout_outcome(rollout)
        advantage = "" if rollout.advantage is None else f", advantage {rollout.advantage:+.2f}"
        title = (
            f"a reply of step {step}: {outcome.value}, reward {amount(rollout.reward)}{advantage}"
        )
        rule = clipped(f"── {title} " + "─" * self.width, self.width).replace("…", "─")
        if self.blocks == ASCII_BLOCKS:
            rule = rule.replace("─", "-")
        inner = self.width - 2
        asked = (
            question_lines(rollout, inner, lines=2, characters=4 * inner) if has_question else []
        )
        verdict = fold(visible(verdict_on(rollout, outcome)), inner)[:2]
        space = most - 1 - len(asked) - len(verdict)
        reply = reply_lines(rollout, inner, lines=max(space, 3), characters=(space + 2) * inner)
        lines = [Text(rule, STYLES[outcome])]
        lines += [Text(f"  {line}", "dim") for line in asked]
        lines += [tagged([f"  {line}"]) for line in reply[: max(space, 1)]]
        lines += [Text(f"  {line}", "italic") for line in verdict]
        for line in lines:
            line.no_wrap, line.overflow = True, "crop"
        return lines[:most]

    def motion(self) -> list[RenderableType]:
        """The work in hand: a bar, and beneath it how far it is in words."""
        shown: list[RenderableType] = []
        for motion in filter(None, (self.scene.within, self.scene.progress)):
            parts = [f"{motion.label}: {motion.words}", motion.left]
            lines = joined([part for part in parts if part], self.width)
            shown += [_line(line, self.width) for line in lines]
            if math.isfinite(motion.done) and 0 < motion.total < math.inf:
                done = min(max(motion.done, 0.0), motion.total)
                columns = min(self.width, 2 * MAX_BAR_COLUMNS)
                grid = Table.grid()  # a bar alone would not end its line
                grid.add_row(ProgressBar(total=motion.total, completed=done, width=columns))
                shown.append(grid)
        return shown


@dataclass(frozen=True, slots=True)
class _Row:
    name: str
    filled: float | None  # of the bar, 0 to 1; None for none
    value: str
    trail: tuple[Trail, float, float, str]
    since: str


def _laid_out(rows: Sequence[_Row], width: int) -> list[RenderableType]:
    """The rows in columns; a column that finds no room is left out."""
    if not rows:
        return []
    name_columns = min(max(cell_len(row.name) for row in rows), _NAME_COLUMNS, width // 3)
    value_columns = max(cell_len(row.value) for row in rows)
    value_columns = min(value_columns, width // 3)
    since_columns = max(cell_len(row.since) for row in rows)
    free = width - name_columns - value_columns - 2
    bar_columns, spark_columns = max(free, 0), 0
    if width >= _NARROW:
        has_since = free - since_columns - 1 >= 32
        since_columns = since_columns if has_since else 0
        free -= since_columns + 1 if has_since else 0
        bar_columns = min((free - 1) // 2, MAX_BAR_COLUMNS)
        spark_columns = min(free - 1 - bar_columns, MAX_SPARK_COLUMNS)
    else:
        since_columns = 0
    lines: list[RenderableType] = []
    for row in rows:
        grid = Table.grid(padding=(0, 1, 0, 0))
        cells: list[RenderableType] = [_line(row.name, name_columns)]
        widths = [name_columns, bar_columns, value_columns]
        filled = row.filled
        cells.append(
            Text("")
            if filled is None
            else ProgressBar(total=1.0, completed=min(max(filled, 0.0), 1.0), width=bar_columns)
        )
        cells.append(_line(row.value, value_columns))
        if spark_columns:
            trail, low, high, blocks = row.trail
            spark = trail.drawn(spark_columns, low, high, blocks)
            cells.append(Text(spark, "cyan", no_wrap=True, overflow="crop"))
            widths.append(spark_columns)
        if since_columns:
            cells.append(_line(row.since, since_columns, "dim"))
            widths.append(since_columns)
        for columns in widths:
            grid.add_column(width=columns, no_wrap=True, overflow="crop")
        grid.add_row(*cells)
        lines.append(grid)
    return lines
