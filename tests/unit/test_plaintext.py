"""What is shown of a model's text is harmless and bounded."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from abacist.view.plaintext import excerpt, visible


@given(
    st.text(st.characters(), max_size=400),
    st.integers(1, 20),
    st.integers(30, 300),
)
def test_an_excerpt_has_no_more_lines_than_asked_and_nothing_that_acts(
    text: str, lines: int, characters: int
) -> None:
    shown = excerpt(text, 40, characters=characters, lines=lines)
    assert len(shown) <= lines
    assert all(visible(line) == line and "\x1b" not in line for line in shown)
