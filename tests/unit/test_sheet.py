"""A page is one content in three forms, and as text it fits the terminal that it is printed in."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.cells import cell_len

from abacist.proof.comparison.compare import compare
from abacist.view.comparison import pair_page
from abacist.view.evaltext import evaluation_page
from abacist.view.sheet import Quote, Table, as_html, as_text
from abacist.view.verdict import verdict_page
from evaluated import BARE, GOOD, WORKLESS, WRONG, evaluation, problem

PROBLEMS = [problem(number, 1 + number % 4, number % 2 == 1) for number in range(40)]
BEFORE = evaluation([WRONG, BARE, WORKLESS, GOOD] * 10, PROBLEMS)
AFTER = evaluation([GOOD] * 39 + [WRONG], PROBLEMS)
SEVERAL = [
    evaluation([[text] * 4 for text in texts], PROBLEMS, temperature=1.0)
    for texts in ([WRONG, GOOD] * 20, [GOOD] * 40)
]
PAGES = {
    "verdict": verdict_page(compare(BEFORE, AFTER), *SEVERAL),
    "evaluation": evaluation_page(AFTER, SEVERAL[1]),
    "comparison": pair_page(compare(BEFORE, AFTER), ("runs/" + "a" * 60, "b")),
}


@pytest.mark.parametrize("name", PAGES)
@pytest.mark.parametrize("width", [80, 90, 100, 140])
def test_every_page_fits_80_columns_and_more(name: str, width: int) -> None:
    lines = as_text(PAGES[name], width).splitlines()
    assert max(map(cell_len, lines)) <= width
    assert all(line == line.rstrip() for line in lines)


@pytest.mark.parametrize("name", PAGES)
def test_a_narrow_page_holds_every_word_of_a_wide_one(name: str) -> None:
    wide, narrow = (sorted(as_text(PAGES[name], width).split()) for width in (200, 80))
    wide, narrow = ([word for word in words if word != "|"] for words in (wide, narrow))
    assert [word for word in wide if len(word) < 20] == [word for word in narrow if len(word) < 20]


def test_words_of_a_narrow_table_stand_in_their_column() -> None:
    heading, row = ("what was found", "n", "method"), ("a row with many words in it", "12", "m")
    assert as_text([Table(heading, [row], has_words=True)], 34).splitlines() == [
        "what was found           n  method",
        "  a row with many       12  m",
        "  words in it",
    ]


def test_a_quotation_keeps_its_bar_where_it_is_folded() -> None:
    text = as_text([Quote("before, right:", ["  | one two three four five", "plain"])], 20)
    assert text.splitlines() == [
        "before, right:", "    | one two three", "    | four five", "  plain",
    ]  # fmt: skip


cells = st.text(st.characters(codec="utf-8", categories=["L", "N", "P", "Zs"]), max_size=30)


@settings(deadline=None)
@given(st.lists(st.tuples(cells, cells, cells), max_size=4), st.booleans(), st.integers(20, 120))
def test_no_table_raises_at_any_width(rows: list, has_words: bool, width: int) -> None:
    table = Table(("title", "n", "words"), rows, has_words)
    assert as_text([table], width)
    page = as_html([table])
    assert page.count("<tr>") == 1 + len(rows) and page.count("<td") == 3 * len(rows)


def test_html_escapes_headings_cells_and_quotations() -> None:
    bad = '<b onclick="x">&\ud800'
    page = as_html([bad, Table((bad, bad), [(bad, bad)]), Quote(bad, [bad, bad])])
    assert "<b onclick" not in page and page.count("&lt;b onclick=&quot;x&quot;&gt;&amp;") == 8
    page.encode("utf-8")
