r"""What stands in a text's ``\boxed{…}``: where instruct models put an answer, and data a gold."""

from __future__ import annotations

import re
from collections import deque

MAX_BOXES = 30  # of a text, from its end: nobody's answer stands farther away
_TOKEN = re.compile(r"\\(?:boxed|fbox)\s?\{|\\[{}]|[{}]")


def boxes(text: str) -> list[str]:
    r"""What stands in each ``\boxed{…}`` or ``\fbox{…}``, in the order in which they close.

    Braces inside are matched; a box that is never closed is none. At most the last
    :data:`MAX_BOXES`; linear time.

    >>> boxes("Half: \\boxed{\\frac{1}{2}}, so \\fbox{7}."), boxes("\\boxed{7")
    (['\\frac{1}{2}', '7'], [])
    """
    opened: list[tuple[int, bool]] = []  # where the content of a brace starts, and is it a box's?
    spans: deque[tuple[int, int]] = deque(maxlen=MAX_BOXES)
    for token in _TOKEN.finditer(text):
        if token[0] == "}" and opened:
            start, is_box = opened.pop()
            if is_box:
                spans.append((start, token.start()))
        elif token[0][-1] == "{" and token[0] != r"\{":
            opened.append((token.end(), len(token[0]) > 1))
    return [text[start:end].strip() for start, end in spans]
