"""What `make docs` writes is up to date: the command reference, and the list of pages."""

from __future__ import annotations

import importlib.metadata
import sys
from pathlib import Path

import pytest

import reference
from abacist.cli.main import VERBS
from abacist.learning.helptext import recipe_names

PAGE = reference.PAGE.read_text(encoding="utf-8")
RECIPES = "## Recipes"
SETTINGS = "## Every setting of abacist train"
CONSTRAINTS = (Path(__file__).parents[2] / "constraints.txt").read_text(encoding="utf-8")
MADE_WITH = {
    name: version
    for line in CONSTRAINTS.splitlines()
    for name, _, version in [line.partition("==")]
    if name in ("torch", "transformers", "trl")
}

only_with_this_argparse = pytest.mark.skipif(
    sys.version_info >= (3, 13), reason="argparse lays its pages out otherwise since Python 3.13"
)


def of(verb: str) -> str:
    """The section of a verb."""
    start = PAGE.index(f"\n## abacist {verb}\n")
    return PAGE[start + 1 : PAGE.index("\n```\n", start) + 5]


@only_with_this_argparse
@pytest.mark.parametrize("columns", ["20", "300"])
def test_the_help_of_every_verb_stands_there_whatever_the_width_of_the_terminal(
    columns: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", columns)
    for verb in VERBS:
        told = f"## abacist {verb}\n\n```text\n{reference.help_of(verb)}\n```\n"
        assert of(verb) == told, "make docs writes it again"
    assert f"```text\n{reference.help_of()}\n```" in PAGE, "make docs writes it again"


def test_every_recipe_stands_there() -> None:
    told = PAGE[PAGE.index(f"{RECIPES}\n") : PAGE.index(f"\n\n{SETTINGS}")]
    assert told == reference.recipes(), "make docs writes it again"
    for name in recipe_names():
        assert told.count(f"| `{name}` |") == 1, name


def test_every_setting_stands_there() -> None:
    for name, version in MADE_WITH.items():
        if importlib.metadata.version(name).partition("+")[0] != version:
            pytest.skip(f"the settings were listed with {name} {version}")
    assert PAGE[PAGE.index(SETTINGS) :] == reference.settings(), "make docs writes it again"


def test_the_page_holds_nothing_but_what_is_written() -> None:
    sections = [line for line in PAGE.splitlines() if line.startswith("## ")]
    assert sections == [*(f"## abacist {verb}" for verb in VERBS), RECIPES, SETTINGS]


def test_no_page_of_help_is_wider_than_a_terminal_of_100_columns() -> None:
    for verb in VERBS:
        assert max(map(len, reference.help_of(verb).splitlines())) <= 100, verb


def test_the_index_lists_every_page() -> None:
    assert reference.INDEX.read_text(encoding="utf-8") == reference.index(), "make docs writes it"
