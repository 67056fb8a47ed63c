"""Where a training is shown: a terminal that is redrawn, a log that only grows, a notebook's cell.

A terminal is redrawn only if it is one and a person looks at it: not a pipe, not ``TERM=dumb``,
not CI, and not the pseudo-terminal in which a notebook runs ``!abacist train``, whose cell cannot
move a cursor. Colours are rich's decision, ``NO_COLOR`` included.
"""

from __future__ import annotations

import io
import math
import os
import sys
import time
from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any, Protocol

import rich.live
from rich.console import Console, RenderableType
from rich.terminal_theme import TerminalTheme
from rich.text import Text

# Colours that can be read on a white page and on a black one, which only the reader knows.
_ON_ANY_PAGE = TerminalTheme(
    (128, 128, 128),
    (128, 128, 128),
    [(110, 110, 110), (209, 66, 66), (46, 139, 87), (170, 120, 0), (64, 120, 220),
     (178, 80, 178), (0, 139, 139), (128, 128, 128)],
)  # fmt: skip
NOTEBOOK_COLUMNS = 100
NOTEBOOK_LINES = 48
TERMINAL_REDRAW_SECONDS = 0.25  # drawing takes milliseconds of the thread that decodes
NOTEBOOK_REDRAW_SECONDS = 1.0  # each redrawing is a message to the browser


class Screen(Protocol):
    """What :class:`abacist.view.live.Live` prints to and, where it can be redrawn, draws on."""

    draws: bool
    redraw_seconds: float

    @property
    def size(self) -> tuple[int, int]:
        """Columns and lines."""

    @property
    def ascii_only(self) -> bool:
        """Whether nothing but ASCII can be shown."""

    def print(self, text: Text) -> None: ...
    def draw(self, panel: RenderableType) -> None: ...
    def close(self) -> None:
        """What was drawn stays; what is drawn next stands below it."""


def console_on(*, stderr: bool = False) -> Console:
    """A console on stdout or stderr that is redrawn only where a person looks at a terminal."""
    stream = sys.stderr if stderr else sys.stdout
    is_terminal = bool(getattr(stream, "isatty", lambda: False)())
    is_seen = is_terminal and not is_ci() and not is_started_by_notebook()
    return Console(stderr=stderr, force_interactive=is_seen, force_jupyter=False)


class Terminal:
    """A terminal or, where ``draws`` is False, a stream of plain lines."""

    redraw_seconds = TERMINAL_REDRAW_SECONDS

    def __init__(self, console: Console | None = None) -> None:
        self.console = console = console or console_on()
        self.draws = console.is_interactive and console.is_terminal and not console.is_dumb_terminal
        self._display: rich.live.Live | None = None

    @property
    def size(self) -> tuple[int, int]:
        return self.console.width, self.console.height - 1

    @property
    def ascii_only(self) -> bool:
        return self.console.options.ascii_only

    def print(self, text: Text) -> None:
        if self.draws:
            self.console.print(_folded(text, self.console))
        else:  # a log keeps its lines
            self.console.print(text, soft_wrap=True)

    def draw(self, panel: RenderableType) -> None:
        if self._display is None:
            # No refresh thread: it is redrawn when there is news, and idle in between.
            self._display = rich.live.Live(console=self.console, auto_refresh=False)
            self._display.start()
        self._display.update(panel, refresh=True)

    def close(self) -> None:
        if self._display is not None:
            self._display.stop()
            self._display = None


class NotebookCell:
    """The output of a notebook's cell: a panel that IPython replaces, without a widget."""

    draws = True
    redraw_seconds = NOTEBOOK_REDRAW_SECONDS
    size = (NOTEBOOK_COLUMNS, NOTEBOOK_LINES)
    ascii_only = False

    def __init__(self, display: Any, clock: Callable[[], float] = time.monotonic) -> None:
        """``display`` is the module ``IPython.display``."""
        self._display = display
        self._clock = clock
        self._handle: Any = None
        self._drawn_at = -math.inf
        self._waiting: RenderableType | None = None  # too soon after the last one to be shown

    def print(self, text: Text) -> None:
        print(text.plain, flush=True)

    def draw(self, panel: RenderableType) -> None:
        if self._handle is not None and self._clock() - self._drawn_at < self.redraw_seconds:
            self._waiting = panel
            return
        self._show(panel)

    def _show(self, panel: RenderableType) -> None:
        page = self._display.HTML(as_html(panel))
        if self._handle is None:
            self._handle = self._display.display(page, display_id=True)
        else:
            self._handle.update(page)
        self._drawn_at, self._waiting = self._clock(), None

    def close(self) -> None:
        if self._waiting is not None:
            self._show(self._waiting)
        self._handle = None


def _folded(text: Text, console: Console) -> Text:
    """The text broken between words, what goes on set in deeper than what began."""
    lines = []
    for line in text.split("\n", allow_blank=True):
        begins = " " * (len(line.plain) - len(line.plain.lstrip(" ")))
        goes_on = f"{begins}  " if begins else ""
        width = max(console.width - len(goes_on), 20)
        pieces = line[len(begins) :].wrap(console, width)
        for at, piece in enumerate(pieces or [Text()]):
            piece.rstrip()
            lines.append(Text.assemble(goes_on if at else begins, piece))
    return Text("\n").join(lines)


def as_html(panel: RenderableType, columns: int = NOTEBOOK_COLUMNS) -> str:
    """What rich draws, as one ``<pre>`` with inline colours; all text in it is escaped."""
    console = Console(
        file=io.StringIO(), record=True, width=columns, force_terminal=True, force_jupyter=False,
        color_system="truecolor", legacy_windows=False, _environ={},
    )  # fmt: skip
    console.print(panel)
    pre = '<pre style="font-family:monospace;line-height:1.3;white-space:pre">{code}</pre>'
    return console.export_html(theme=_ON_ANY_PAGE, inline_styles=True, code_format=pre)


def notebook_cell() -> NotebookCell | None:
    """The cell that this code runs in, None outside a notebook, where IPython is not imported."""
    ipython = sys.modules.get("IPython")
    shell = (
        ipython.get_ipython() if ipython is not None and hasattr(ipython, "get_ipython") else None
    )
    if getattr(shell, "kernel", None) is None:  # IPython in a terminal has none
        return None
    return NotebookCell(import_module("IPython.display"))


def is_ci(environ: Mapping[str, str] = os.environ) -> bool:
    """Whether this runs in continuous integration, which sets ``CI``."""
    return environ.get("CI", "").lower() not in ("", "0", "false", "no")


def is_started_by_notebook(environ: Mapping[str, str] = os.environ) -> bool:
    """Whether a notebook's kernel started this program, as ``!abacist`` does, in a pseudo-terminal.

    Jupyter names its process to its kernels, and ipykernel turns pagers off in this very way.
    """
    as_ipykernel = environ.get("TERM") == "xterm-color" and environ.get("GIT_PAGER") == "cat"
    return "JPY_PARENT_PID" in environ or as_ipykernel
