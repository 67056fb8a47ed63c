"""A real browser for the pages that Abacist writes.

Chromium from the system's packages, driven by Playwright; where one of them is absent, these tests
are skipped, with the command that brings it.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """A headless browser. It ends with its module: its event loop is in the way of other tests."""
    api = pytest.importorskip("playwright.sync_api", reason="pip install -e '.[dev]' brings it")
    program = next(filter(None, map(shutil.which, NAMES)), None)
    if program is None:
        pytest.skip("there is no Chromium here: apt-get install chromium (or your system's way)")
    with api.sync_playwright() as playwright:
        found = playwright.chromium.launch(executable_path=program, args=["--no-sandbox"])
        yield found
        found.close()


@pytest.fixture
def show(browser: Any) -> Iterator[Callable[..., Any]]:
    """``show(path, **options of the context)``: the page, which must not fail, warn or fetch.

    ``at`` is what stands behind the path: ``"#replies?outcome=0"``.
    """
    wrong: list[str] = []
    contexts = []

    def open_page(path: Path, at: str = "", **options: Any) -> Any:
        context = browser.new_context(**options)
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda said: wrong.append(f"{said.type}: {said.text}"))
        page.on("pageerror", lambda error: wrong.append(f"error: {error}"))
        page.on("dialog", lambda dialog: wrong.append(f"dialog: {dialog.message}"))
        page.on(
            "request",
            lambda request: (
                wrong.append(f"request: {request.url}")
                if not request.url.startswith((path.as_uri(), "data:"))
                else None
            ),
        )
        page.goto(path.as_uri() + at)
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert not wrong
