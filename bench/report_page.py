"""How long the report takes: to write, to load in a browser, and to filter.

    python bench/report_page.py                  # made up: 50,000 replies, 5,000 in the page
    python bench/report_page.py --run runs/tiny-001

Prints medians and the slowest. Needs Chromium and Playwright (``pip install -e '.[dev]'``).
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

from abacist.view.report.writing import write_report

CHROMIUM = ("chromium", "chromium-browser", "google-chrome")
FILTERS = (
    ("outcome", "0"), ("outcome", "3"), ("step", "100-400"), ("reward", "1-3"),
    ("text", "3 + 4"), ("text", "nothing like it"), ("text", ""),
)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--run", type=Path)
    parser.add_argument("--replies", type=int, default=5_000)
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        run = options.run
        if run is None:
            from made_runs import made_run

            run = made_run(Path(place) / "run", steps=500, groups=25)
        page = Path(place) / "report.html"
        began = time.perf_counter()
        told = write_report([run], page, replies=options.replies)
        print(f"written in {time.perf_counter() - began:.1f} s, {told['bytes'] / 1e6:.1f} MB")
        measure(page, options.repeats)


def measure(page_path: Path, repeats: int) -> None:
    """Load the page and filter it, several times."""
    from playwright.sync_api import sync_playwright

    program = next(filter(None, map(shutil.which, CHROMIUM)), None)
    if program is None:
        sys.exit("there is no Chromium here")
    loads: list[float] = []
    filters: list[float] = []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program, args=["--no-sandbox"])
        for _ in range(repeats):
            page = browser.new_page()
            began = time.perf_counter()
            page.goto(page_path.as_uri(), wait_until="load")
            page.wait_for_selector("#list .item")
            loads.append(time.perf_counter() - began)
            for name, value in FILTERS:
                # Until the changed list is laid out, in the browser's own clock.
                took = page.evaluate(
                    """([name, value]) => { const control = document.forms.filters.elements[name];
                    const began = performance.now(); control.value = value;
                    control.dispatchEvent(new Event('input', {bubbles: true}));
                    document.getElementById('list').getBoundingClientRect();
                    return performance.now() - began; }""",
                    [name, value],
                )
                filters.append(took)
            page.close()
        browser.close()
    print(f"loads in {statistics.median(loads):.2f} s, at most {max(loads):.2f} s")
    print(f"filters in {statistics.median(filters):.0f} ms, at most {max(filters):.0f} ms")


if __name__ == "__main__":
    main()
