"""Makes text that a model wrote safe to show.

A reply may hold anything: terminal escapes that clear the screen, marks that reverse the reading
direction, a hundred thousand characters, halves of surrogate pairs. Whatever is shown goes
through here first; :func:`excerpt` is the whole way from a reply to lines that can be printed.
"""

from __future__ import annotations

import io
import unicodedata

from rich.console import Console
from rich.text import Text


def visible(text: str) -> str:
    r"""The text with every character that acts rather than shows written as its escape.

    Line feeds and tabs stay; a carriage return before a line feed is dropped. Linear time.

    >>> visible("\x1b[2Jgone\u202e")
    '\\x1b[2Jgone\\u202e'
    """
    return "".join(map(_shown, text.replace("\r\n", "\n")))


def _shown(character: str) -> str:
    if character in "\n\t" or character.isprintable() or unicodedata.category(character) == "Zs":
        return character
    return character.encode("unicode_escape").decode("ascii")


def cut_middle(text: str, limit: int) -> str:
    """The text, or its beginning and end with a note of how much was left out between.

    ``limit`` bounds what is kept of the text, in characters. The end is kept because there the
    answer stands.

    >>> cut_middle("abcdefghij", 6)
    'abcd [... 4 characters left out ...] ij'
    """
    if len(text) <= limit:
        return text
    tail = limit // 3
    head = limit - tail
    return f"{text[:head]} [... {len(text) - limit:,} characters left out ...] {text[-tail:]}"


def fold(text: str, width: int) -> list[str]:
    """The lines of the text, each at most ``width`` terminal columns wide, broken between words.

    Wide characters count as two columns. Expects text that :func:`visible` has made harmless.
    """
    console = Console(file=io.StringIO(), width=width)
    return [
        piece.plain.rstrip()
        for line in text.split("\n")
        for piece in (Text(line).wrap(console, width, tab_size=4) or [Text("")])
    ]


def excerpt(text: str, width: int, *, characters: int = 600, lines: int = 16) -> list[str]:
    """The text as at most ``lines`` harmless lines of ``width`` columns, cut in the middle."""
    folded = fold(visible(cut_middle(text.strip(), characters)), width)
    if len(folded) <= lines:
        return folded
    tail = lines // 3
    head = lines - 1 - tail
    left_out = len(folded) - head - tail
    return [*folded[:head], f"[... {left_out} lines ...]", *folded[len(folded) - tail :]]
