"""The whole error model on one page.

Every failure a user can cause or meet is an :class:`AbacistError`: *what* went wrong and
*where* in ``message``, how to mend it in ``hint``. The command line prints both without a
traceback and exits with ``exit_code``; library callers catch one base class.

Exit codes: 0 done, 1 failed (bad data, model, reward or run directory), 2 usage,
3 "not better" (compare) or "unsound" (audit), 130 interrupted, 143 terminated.
"""

from __future__ import annotations

import sysconfig
import traceback
from pathlib import Path


def first_line(error: BaseException) -> str:
    """The beginning of an error's text, for a one-line message."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]


class AbacistError(Exception):
    """Something a person can mend. ``str(error)`` is the message, then the hint on its own line."""

    exit_code = 1
    is_told = False  # to the other processes of a training, of which the main one says it

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message, hint)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message}\n  {self.hint}" if self.hint else self.message

    def _render_traceback_(self) -> list[str]:
        """What IPython shows in place of a traceback: the lines of the caller's own code that led
        here, those of what it raised itself, if that was the cause, and then the error."""
        shown = []
        for error in (self.__cause__, self):
            frames = _own_frames(error)
            if error is self or frames:
                shown += [line.rstrip() for line in traceback.format_list(frames)]
                kind = type(error).__name__
                shown += ["", f"{kind}: {error}"] if error is self else [f"{kind}: {error}", ""]
        return [harmless("\n".join(shown).strip("\n"))]


def _own_frames(error: BaseException | None) -> list[traceback.FrameSummary]:
    """The frames of an error that stand neither in this package nor in an installed one."""
    if error is None:
        return []
    paths = sysconfig.get_paths()
    others = [Path(__file__).parent, *(Path(paths[name]) for name in ("purelib", "stdlib"))]
    found = traceback.extract_tb(error.__traceback__)
    return [
        one
        for one in found
        if not any(Path(one.filename).is_relative_to(place) for place in others)
    ]


def harmless(text: str) -> str:
    """``text``, which may quote what is foreign: control characters are shown, not obeyed."""
    return "".join(
        one if one == "\n" or one.isprintable() else one.encode("unicode_escape").decode("ascii")
        for one in text
    )


class UsageError(AbacistError):
    """An unknown flag, recipe, key or value on the command line or in a config file."""

    exit_code = 2


class DataError(AbacistError):
    """A data set that is missing, empty, malformed, or has no gold answers."""


class ModelError(AbacistError):
    """A model, adapter or tokenizer that cannot be found, reached, read or used."""


class RewardError(AbacistError):
    """A reward function that cannot be imported, raises, or returns something unusable."""


class RunError(AbacistError):
    """A run directory that exists already, is damaged, or is not a run at all."""


class NoCheckpoint(RunError, ValueError):
    """No sound checkpoint to resume from. A ValueError too, which TRL's trainer raises for it."""


class TrainingError(AbacistError):
    """A training that was stopped because it could not go on soundly; what was good is kept."""


class ProcessLost(TrainingError):
    """Another process of a training is gone. Every process that is left says so."""


class EngineLost(TrainingError):
    """The engine that writes the replies, a vLLM server, is gone in the middle of a training."""


class Interrupted(AbacistError):
    """Work that a signal ended. Its exit code is the shell's: 130 Ctrl-C, 143 SIGTERM."""

    def __init__(self, message: str, hint: str, signal_number: int) -> None:
        super().__init__(message, hint)
        self.exit_code = 128 + signal_number
