"""The page of a comparison says n, interval and method of every number, and quotes no foreign
text that could act."""

from __future__ import annotations

import re

import pytest
from rich.cells import cell_len

from abacist.proof.comparison.compare import Comparison, compare
from abacist.proof.comparison.seeds import combine
from abacist.view.comparison import control_blocks, headline, pair_page, seeds_page, shots_page
from abacist.view.sheet import WIDTH, Quote, Table, as_markdown, as_text
from evaluated import BARE, GOOD, WORKLESS, WRONG, evaluation, problem

PROBLEMS = [problem(n, difficulty=1 + n % 3, unseen=n % 2 == 1) for n in range(40)]
NAMES = ("runs/a, before training", "runs/a, after training")


def of(before: list[str], after: list[str], **more: str) -> Comparison:
    return compare(evaluation(before, PROBLEMS), evaluation(after, PROBLEMS), **more)


BETTER = of([BARE] * 10 + [WRONG] * 15 + [GOOD] * 15, [GOOD] * 38 + [WRONG] * 2)
SAME = of([GOOD] * 20 + [WRONG] * 20, [GOOD] * 21 + [WRONG] * 19)
SAMPLED = compare(
    evaluation([[GOOD, WRONG]] * 40, PROBLEMS), evaluation([[GOOD, GOOD]] * 40, PROBLEMS)
)
PAGES = {
    "pair": pair_page(BETTER, NAMES),
    "same": pair_page(SAME, NAMES),
    "sampled": pair_page(SAMPLED, NAMES),
    "seeds": seeds_page(combine(["a", "b", "c"], [BETTER, SAME, BETTER]), "base"),
    "control": control_blocks(BETTER, SAME, BETTER, "runs/c"),
    "shots": shots_page({0: BETTER, 8: SAME}, "runs/a"),
}


@pytest.mark.parametrize("name", PAGES)
def test_every_row_of_numbers_has_its_interval_its_n_and_its_method(name: str) -> None:
    tables = [block for block in PAGES[name] if isinstance(block, Table)]
    figures = [table for table in tables if "95 % interval" in table.heading]
    assert figures
    for table in figures:
        assert {"n", "method"} <= set(table.heading) or name == "seeds"
        interval, method = table.heading.index("95 % interval"), table.heading.index("method")
        for row in table.rows:
            if row[interval]:
                assert re.fullmatch(r"\[\S+, \S+\]|-", row[interval]) and row[method]


@pytest.mark.parametrize("name", PAGES)
def test_a_page_is_plain_text_of_at_most_a_hundred_columns(name: str) -> None:
    lines = as_text(PAGES[name]).split("\n")
    assert all(cell_len(line) <= WIDTH and line == line.rstrip() for line in lines)
    assert "nan" not in " ".join(lines).replace("nance", "")


def test_the_headline_never_claims_more_than_interval_and_test_show() -> None:
    assert headline(BETTER.accuracy).startswith("Better: 37.5 % → 95.0 % correct on 40 problems")
    assert headline(SAME.accuracy).startswith("Not proven better: 50.0 % → 52.5 %")
    assert "Chance alone" in headline(SAME.accuracy)
    assert headline(of([GOOD] * 40, [WRONG] * 40).accuracy).startswith("Worse: 100.0 % → 0.0 %")
    assert "p≤2e-04" in headline(SAMPLED.accuracy)


def test_the_split_names_the_gains_of_format_and_of_reasoning() -> None:
    text = as_text(PAGES["pair"])
    rows = {line.split()[0]: line.split() for line in text.split("\n") if line.strip()}
    assert rows["format"][1] == "+25.0" and rows["format"][4:6] == ["10", "0"]
    assert rows["reasoning"][1] == "+32.5" and rows["reasoning"][4:6] == ["15", "2"]
    assert "in all      +57.5" in text


def test_a_control_is_called_one_wherever_it_stands() -> None:
    control = of([GOOD] * 20 + [WRONG] * 20, [WRONG] * 40, control="random")
    assert "B is a control, trained on random rewards" in as_text(pair_page(control, NAMES))
    assert "B1 is a control" in as_text(seeds_page(combine(["a", "b"], [control, control]), "x"))
    text = as_text(control_blocks(BETTER, control, BETTER, "runs/c")).replace("\n", " ")
    assert "damaged by its training" in text
    assert "damaged" not in as_text(PAGES["control"])


HOSTILE = [
    "\x1b[2J",
    "\u202eevil",
    "| a |\n| - |",
    "```\n# x",
    "<script>",
    "漢字" * 900,
    "\ud800\x00",
]


@pytest.mark.parametrize("text", HOSTILE)
def test_hostile_replies_and_ids_are_shown_harmless_in_text_and_markdown(text: str) -> None:
    problems = [problem(n) for n in range(3)]
    before = evaluation([text] * 3, problems)
    page = pair_page(compare(before, evaluation([text + GOOD, GOOD, WORKLESS], problems)),
                     (text, text))  # fmt: skip
    plain, marked = as_text(page), as_markdown("Comparison", page)
    assert all(c.isprintable() or c == "\n" for c in plain + marked)
    assert all(cell_len(line) <= WIDTH for line in plain.split("\n"))
    outside = [line for line in marked.split("\n") if not line.startswith("    ")]
    assert "<script>" not in "\n".join(outside) and "```" not in "\n".join(outside)


def test_markdown_holds_the_same_cells_as_the_text() -> None:
    blocks = [Table(("of | which", "n"), [("a_b", "1"), ("c", "2")]), Quote("Example", ["# x"])]
    assert as_markdown("T", blocks) == (
        "# T\n\n| of \\| which | n |\n| --- | ---: |\n| a\\_b | 1 |\n| c | 2 |\n\n"
        "**Example**\n\n    # x\n"
    )
    assert as_text(blocks) == "of | which  n\n  a_b       1\n  c         2\n\nExample\n  # x"


def test_shots_other_than_the_trained_number_are_explained_and_the_trained_one_is_not() -> None:
    found = {0: BETTER, 1: SAME, 8: SAME}
    built_in = as_text(shots_page(found, "runs/a", trained_at="0", is_built_in=True))
    assert "only ever read bare questions" in " ".join(built_in.split())
    other = " ".join(as_text(shots_page(found, "runs/a", trained_at="1")).split())
    assert "trained with 1 worked example in its prompt" in other and "bare" not in other
    for trained_at, is_built_in in (("0", True), ("0", False)):
        page = shots_page({0: BETTER}, "runs/a", trained_at=trained_at, is_built_in=is_built_in)
        assert page == shots_page({0: BETTER}, "runs/a")
