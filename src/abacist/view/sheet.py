"""A page of paragraphs and tables, written once and shown as plain text, Markdown or HTML.

Whatever comes from a model or from foreign data has to pass ``view.plaintext`` on its way here;
what Markdown or HTML would take for markup is escaped here.
"""

from __future__ import annotations

import html
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from rich.cells import cell_len

from abacist.view.plaintext import cut_middle, fold, visible

WIDTH = 100
_WORDS_COLUMNS, _LEAST_WORDS_COLUMNS = 22, 14  # that words keep in a table that is too wide
_INDENT = re.compile(r"(?:  | ?\| )*")
_MARKUP = re.compile(r"([\\`*_\[\]<>|#])")


@dataclass(frozen=True, slots=True)
class Table:
    """Rows under a heading, whose first cell is the title. Numbers stand under one another;
    the first column, and the last if ``has_words``, are words."""

    heading: tuple[str, ...]
    rows: Sequence[tuple[str, ...]]
    has_words: bool = False


@dataclass(frozen=True, slots=True)
class Quote:
    """A heading and lines that are shown exactly as they are."""

    heading: str
    lines: Sequence[str]


Block = str | Table | Quote


def as_text(blocks: Iterable[Block], width: int = WIDTH) -> str:
    """The page as plain text, blocks parted by a blank line, no line ending in white space.

    At most ``width`` columns: where a table is wider, its words take several lines; one whose
    numbers alone are wider stays so.
    """
    return "\n\n".join("\n".join(_text(block, width)) for block in blocks)


def as_markdown(title: str, blocks: Iterable[Block]) -> str:
    """The page as Markdown (with GitHub's tables) under a heading, ending in a newline."""
    parts = [f"# {_escaped(title)}", *("\n".join(_markdown(block)) for block in blocks)]
    return "\n\n".join(parts) + "\n"


def as_html(blocks: Iterable[Block]) -> str:
    """The page as a piece of HTML without scripts, styles of its own or references."""
    # Half a surrogate pair has no place in UTF-8.
    page = "\n".join(map(_html, blocks)).encode("utf-8", "backslashreplace").decode("utf-8")
    return f"<div>\n{page}\n</div>"


def one_line(text: str, columns: int) -> str:
    """Foreign text as one harmless line of at most so many columns; the end is kept, because
    there paths differ.

    >>> one_line("a long way to go", 9)
    '…ay to go'
    """
    line = " ".join(visible(cut_middle(text, 4 * columns)).split())
    while cell_len(line) > columns:
        line = "…" + line[2:]
    return line


def _text(block: Block, width: int) -> list[str]:
    if isinstance(block, str):
        return fold(block, width)
    if isinstance(block, Quote):
        lines = [piece for line in block.lines for piece in _hanging(line, width - 2)]
        return [*fold(block.heading, width), *(f"  {line}".rstrip() for line in lines)]
    rows = [block.heading, *((f"  {row[0]}", *row[1:]) for row in block.rows)]
    widths, gap = _layout(block, rows, width)
    last = len(widths) - 1

    def lines_of(row: tuple[str, ...]) -> list[str]:
        cells = []
        for column, (cell, columns) in enumerate(zip(row, widths, strict=True)):
            words = column == 0 or (column == last and block.has_words)
            pieces = _hanging(cell, columns) if words else [cell]
            spaces = [" " * (columns - cell_len(piece)) for piece in pieces]
            padded = zip(pieces, spaces, strict=True)
            cells.append([p + space if words else space + p for p, space in padded])
        height = max(map(len, cells))
        full = [
            [*pieces, *[" " * columns] * (height - len(pieces))]
            for pieces, columns in zip(cells, widths, strict=True)
        ]
        return [gap.join(line).rstrip() for line in zip(*full, strict=True)]

    return [line for row in rows for line in lines_of(row)]


def _layout(block: Table, rows: Sequence[tuple[str, ...]], width: int) -> tuple[list[int], str]:
    """The columns' widths and the gap between them: as wide as the cells.

    Of a table that is too wide the words give way, then the gaps, then the words once more.
    """
    widths = [max(cell_len(row[column]) for row in rows) for column in range(len(block.heading))]
    last, gap = len(widths) - 1, 2
    for least, narrow_gap in ((_WORDS_COLUMNS, 2), (_LEAST_WORDS_COLUMNS, 1), (10, 1)):
        for column in (0, last) if block.has_words else (0,):
            over = sum(widths) + gap * last - width
            if over > 0:
                widths[column] -= min(over, max(widths[column] - least, 0))
        if sum(widths) + gap * last > width:
            gap = narrow_gap
    return widths, " " * gap


def _hanging(line: str, width: int) -> list[str]:
    """The line folded, what follows indented as the line is (a quotation's bar included)."""
    if cell_len(line) <= width:
        return [line]
    indent = _INDENT.match(line)
    lead = indent[0] if indent else ""
    pieces = fold(line[len(lead) :], max(width - cell_len(lead), 1))
    return [lead + piece for piece in pieces]


def _markdown(block: Block) -> list[str]:
    if isinstance(block, str):
        return [_escaped(block)]
    if isinstance(block, Quote):
        # An indented block, because no text can break out of one.
        return [f"**{_escaped(block.heading)}**", "", *(f"    {line}" for line in block.lines)]
    last = len(block.heading) - 1
    rule = [
        "---" if column == 0 or (column == last and block.has_words) else "---:"
        for column in range(last + 1)
    ]
    heading, *rows = (tuple(map(_escaped, row)) for row in (block.heading, *block.rows))
    return [f"| {' | '.join(row)} |" for row in (heading, rule, *rows)]


def _html(block: Block) -> str:
    if isinstance(block, str):
        return f"<p>{html.escape(block)}</p>"
    if isinstance(block, Quote):
        quoted = html.escape("\n".join(block.lines))
        return f"<p><b>{html.escape(block.heading)}</b></p>\n<pre>{quoted}</pre>"
    last = len(block.heading) - 1

    def row(cells: Sequence[str], tag: str) -> str:
        written = ""
        for column, cell in enumerate(cells):
            words = column == 0 or (column == last and block.has_words)
            side = "left" if words else "right"
            written += f'<{tag} style="text-align:{side}">{html.escape(cell)}</{tag}>'
        return f"<tr>{written}</tr>"

    body = "\n".join(row(cells, "td") for cells in block.rows)
    heading = row(block.heading, "th")
    apart = '<table style="margin-bottom:1em">'
    return f"{apart}\n<thead>{heading}</thead>\n<tbody>{body}</tbody>\n</table>"


def _escaped(text: str) -> str:
    return _MARKUP.sub(r"\\\1", text)
