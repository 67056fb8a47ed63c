"""What an import found out, one sentence each, with the line it is about."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from typing import Any


class Kind(Enum):
    """What a note is about; the value is the heading it stands under."""

    WRONG = "wrong in the script"
    CHANGED = "carried over with a change"
    LEFT_OUT = "left out"
    CARRIED = "carried over"


@dataclass(frozen=True)
class Note:
    """One finding."""

    kind: Kind
    line: int | None
    text: str


@dataclass(frozen=True)
class Setting:
    """One line of the configuration. ``line`` is None for what the script does not say."""

    value: Any
    line: int | None
    why: str = ""


@dataclass
class Draft:
    """A configuration while it is being made."""

    settings: dict[str, Setting] = field(default_factory=dict)
    notes: list[Note] = field(default_factory=list)
    #: files that are written beside the configuration, by the end of their name
    files: dict[str, str] = field(default_factory=dict)

    def set(self, name: str, value: Any, line: int | None, why: str = "") -> None:
        self.settings[name] = Setting(value, line, why)

    def wrong(self, line: int | None, text: str) -> None:
        self._note(Kind.WRONG, line, text)

    def changed(self, line: int | None, text: str) -> None:
        self._note(Kind.CHANGED, line, text)

    def left_out(self, line: int | None, text: str) -> None:
        self._note(Kind.LEFT_OUT, line, text)

    def _note(self, kind: Kind, line: int | None, text: str) -> None:
        note = Note(kind, line, text)
        if note not in self.notes:
            self.notes.append(note)
