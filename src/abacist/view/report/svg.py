"""Charts as SVG that live inside a page: they need no style of their own.

matplotlib writes a ``style`` attribute on every element, which a strict content security policy
forbids, and fixed colours, which a dark page cannot read. :class:`Styles` turns each distinct
attribute into a class of the page's own style sheet, and the colours of :data:`INKS` into CSS
variables. Ids are made unique, because many charts share one page.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable
from typing import Any

#: Drawn in these, shown in the page's own: text and axes, grid lines, and the page itself.
INKS = {"#010203": "var(--ink)", "#040506": "var(--line)", "#070809": "var(--page)"}
INK, LINE, PAGE = INKS

# Within a tag only: matplotlib leaves quotes in a text as they are, and a name may hold anything.
_TAG = re.compile(r"<[a-zA-Z][^<>]*>")
_STYLE = re.compile(r' style="([^"]*)"')
_ID = re.compile(r'(\bid="|url\(#|xlink:href="#)')
_HEAD = re.compile(r"^.*?(?=<svg)|<metadata>.*?</metadata>|<style[^>]*>.*?</style>", re.DOTALL)


class Styles:
    """The style sheet of the charts of one page; grows by every chart that is added."""

    def __init__(self) -> None:
        self._names: dict[str, str] = {}
        self._charts = 0

    def css(self) -> str:
        """The rules, one a distinct style of the charts so far."""
        return "\n".join(f".{name}{{{style}}}" for style, name in self._names.items())

    def add(self, figure: Any, label: str) -> str:
        """The figure as an ``<svg>`` element with ``label`` as its name for those who listen."""
        import matplotlib

        self._charts += 1
        prefix = f"c{self._charts}-"
        buffer = io.StringIO()
        with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": prefix}):
            figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
        svg = _HEAD.sub("", buffer.getvalue())
        svg = re.sub(r"<svg [^>]*>", self._opening(label), svg, count=1)

        def own(tag: re.Match[str]) -> str:
            return _STYLE.sub(self._class_of, _ID.sub(rf"\g<1>{prefix}", tag[0]))

        return _TAG.sub(own, svg).strip()

    def _opening(self, label: str) -> Callable[[re.Match[str]], str]:
        def opening(match: re.Match[str]) -> str:
            box = re.search(r'viewBox="[^"]*"', match[0])
            name = label.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
            name = name.replace('"', "&quot;")
            return (
                f'<svg xmlns="http://www.w3.org/2000/svg" {box[0] if box else ""} '
                f'xmlns:xlink="http://www.w3.org/1999/xlink" role="img" aria-label="{name}">'
            )

        return opening

    def _class_of(self, match: re.Match[str]) -> str:
        style = match[1].strip().rstrip(";")
        for drawn, shown in INKS.items():
            style = style.replace(drawn, shown)
        # The page's font, which every machine has, in place of the one that was measured with.
        style = re.sub(r"font(?:-family)?: *([^;]*)", _font, style)
        name = self._names.setdefault(style, f"s{len(self._names)}")
        return f' class="{name}"'


def _font(match: re.Match[str]) -> str:
    """Of a ``font`` only size and weight: the family is inherited."""
    size = re.search(r"[\d.]+px", match[1])
    weight = "font-weight: bold; " if "bold" in match[1] or "700" in match[1] else ""
    return f"{weight}font-size: {size[0]}" if size else "font-family: inherit"
