"""The documentation holds together: links lead somewhere, and every page can be reached."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from urllib.parse import unquote

import pytest
import yaml

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = sorted(
    page
    for pattern in ("*.md", "docs/**/*.md", "examples/**/*.md", "skills/**/*.md")
    for page in ROOT.glob(pattern)
)
_CODE = re.compile(r"^(```|~~~).*?^\1|`[^`\n]*`", re.MULTILINE | re.DOTALL)
_LINK = re.compile(r"(?<!\\)\[(?:[^\]\\]|\\.)*\]\(\s*<?([^)\s>]+)>?[^)]*\)")
_ELSEWHERE = re.compile(r"[a-z][a-z0-9+.-]*:|//", re.IGNORECASE)
_HEADING = re.compile(r"^#{1,6} +(.+?) *#* *$", re.MULTILINE)


def links(text: str) -> list[str]:
    """The targets of the links and pictures in Markdown, those in code left out.

    >>> links("[a](b.md#c), `[x](y)`, ![p](q.png)")
    ['b.md#c', 'q.png']
    """
    pictured = re.sub(r"!\[[^\]]*\]", "[]", _CODE.sub("", text))
    return _LINK.findall(pictured)


def anchors(text: str) -> set[str]:
    """The anchors that a code host gives the headings of a page.

    >>> sorted(anchors("# What a run costs, and `how`\\n## A\\n## A"))
    ['a', 'a-1', 'what-a-run-costs-and-how']
    """
    found: set[str] = set()
    without_blocks = re.sub(r"^(```|~~~).*?^\1", "", text, flags=re.MULTILINE | re.DOTALL)
    for heading in _HEADING.findall(without_blocks):
        shown = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading)
        name = re.sub(r"[^\w\- ]", "", shown.lower()).replace(" ", "-")
        number = 0
        while (one := f"{name}-{number}" if number else name) in found:
            number += 1
        found.add(one)
    return found


def broken(page: Path, text: str) -> list[str]:
    """The relative links in ``text`` that lead nowhere from ``page``."""
    wrong = []
    for link in links(text):
        if _ELSEWHERE.match(link):
            continue
        name, _, anchor = unquote(link).partition("#")
        target = (page.parent / name).resolve() if name else page
        if not target.exists() or not target.is_relative_to(ROOT):
            wrong.append(link)
        elif anchor and target.suffix == ".md":
            there = text if target == page else target.read_text(encoding="utf-8")
            if anchor not in anchors(there):
                wrong.append(link)
    return wrong


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_every_relative_link_leads_somewhere(page: Path) -> None:
    assert broken(page, page.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    "link",
    ["missing.md", "data.md#no-such-heading", "#nowhere", "../../outside.md", "data.md#No-Case"],
)
def test_a_link_that_leads_nowhere_is_seen(link: str) -> None:
    page = DOCS / "index.md"
    assert broken(page, f"# Here\n\n[there]({link})") == [link]
    assert broken(page, f"# Here\n\n[there](data.md), [up](#here), `[code]({link})`") == []


def test_every_page_of_the_documentation_is_reached_from_its_index() -> None:
    reached, waiting = set(), [DOCS / "index.md"]
    while waiting:
        page = waiting.pop()
        if page in reached:
            continue
        reached.add(page)
        targets = (link.partition("#")[0] for link in links(page.read_text(encoding="utf-8")))
        near = [page.parent / name for name in targets if name and not _ELSEWHERE.match(name)]
        waiting += [path.resolve() for path in near if path.suffix == ".md" and path.exists()]
    assert [page for page in PAGES if page not in reached] == []


def test_every_extra_is_explained_in_the_index() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    rows = re.findall(r"^\| `([\w-]+)` \| \S.*\|$", (DOCS / "index.md").read_text("utf-8"), re.M)
    assert sorted(rows) == sorted(project["optional-dependencies"])


def test_the_citation_names_this_version_and_the_paper_of_the_method() -> None:
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert cited["cff-version"] == "1.2.0" and cited["message"] and cited["title"]
    assert cited["authors"] == [{"name": "The Abacist developers"}]
    assert cited["version"] == project["version"] and cited["license"] == project["license"]
    papers = [one["value"] for work in cited["references"] for one in work["identifiers"]]
    assert "arXiv:2402.03300" in papers


# With an extra, pip takes the package that is installed; without one, or to upgrade, it asks the
# index, where a stranger may have the name.
_FROM_INDEX = re.compile(
    r"""pip\ install\b(?=[^\n]*[\ '"`]abacist(?![\w\[./:-])|[^\n]*--upgrade[^\n]*abacist)""",
    re.VERBOSE,
)


@pytest.mark.parametrize(
    ("text", "is_told"),
    [
        ("pip install abacist verifiers", True),
        ("%pip install --quiet abacist", True),
        ("pip install --upgrade 'abacist[wandb]'", True),
        ("pip install 'abacist[wandb]'", False),
        ("pip install . verifiers", False),
        ("pip install -e '.[dev]' && abacist train", False),
        ("pip install ./abacist-0.1.0-py3-none-any.whl", False),
    ],
)
def test_what_asks_the_index_is_told_from_what_does_not(text: str, is_told: bool) -> None:
    assert bool(_FROM_INDEX.search(text.partition("&&")[0])) is is_told


def test_nothing_says_to_install_from_an_index_what_is_published_on_none() -> None:
    places = [*PAGES, *ROOT.glob("examples/*.py"), *ROOT.glob("notebooks/*.ipynb")]
    places += (ROOT / "src").rglob("*.py")
    said = [
        f"{place.relative_to(ROOT)}: {line.strip()}"
        for place in places
        for line in place.read_text(encoding="utf-8").split("\n")
        if _FROM_INDEX.search(line)
    ]
    assert said == []
