"""The faults that the tests inject, written down where they are injected.

A test that injects a fault carries the marker :func:`fault`, on itself or on a parameter::

    @fault("training", "the loss becomes NaN", "the step, and that it was refused", exit_code=1)
    def test_a_nan_loss_never_reaches_the_weights(...) -> None: ...

    pytest.param(NAN, marks=fault("rewards", "a reward returns NaN", "its name and the sample"))

``cause`` completes "when …", ``seen`` is what the user is shown or what happens instead, and
``exit_code`` is that of the command. Every test so marked asserts what its marker says.
``python tests/faults.py`` collects them all, without running any, and prints the table of
docs/reliability.md; with ``--write`` it puts it there, with ``--run`` it runs them and prints the
outcome of each as JSON. tests/contract/test_reliability.py holds the page to the marks.
"""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
PAGE = TESTS.parent / "docs" / "reliability.md"
MARKS = ("<!-- faults: written by `python tests/faults.py --write` -->", "<!-- faults end -->")


@dataclass(frozen=True, slots=True)
class Fault:
    """One row of the table; ``test`` is the node that injects it."""

    area: str
    cause: str
    seen: str
    exit_code: int
    test: str


def fault(area: str, cause: str, seen: str, exit_code: int = 1) -> pytest.MarkDecorator:
    """The marker of a test, or of one of its parameters, that injects a fault."""
    return pytest.mark.fault(area=area, cause=cause, seen=seen, exit_code=exit_code)


class Collector:
    """A pytest plugin that gathers the marked tests and, where they run, their outcomes."""

    def __init__(self) -> None:
        self.faults: list[Fault] = []
        self.outcomes: dict[str, str] = {}

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        for item in items:
            for mark in item.iter_markers("fault"):
                self.faults.append(Fault(**mark.kwargs, test=item.nodeid))

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call" or report.outcome != "passed":
            self.outcomes[report.nodeid] = report.outcome


def table(faults: Iterable[Fault]) -> str:
    """The faults as a Markdown table by area.

    >>> print(table([Fault("rewards", "a reward returns NaN", "its name", 1, "test_x")]))
    | area | when … | the user sees | exit code |
    |---|---|---|---:|
    | rewards | a reward returns NaN | its name | 1 |
    """
    rows = {(one.area, one.cause, one.seen, str(one.exit_code)) for one in faults}
    heading = ("area", "when …", "the user sees", "exit code")
    lines = ["| " + " | ".join(cells) + " |" for cells in [heading, *sorted(rows)]]
    return "\n".join([lines[0], "|---|---|---|---:|", *lines[1:]])


def collect(*options: str) -> Collector:
    """What pytest finds, and with other options than these does, in the files that hold marks.

    Raises RuntimeError if they cannot be collected.
    """
    collector = Collector()
    files = [
        str(path)
        for path in TESTS.rglob("test_*.py")
        if "import fault\n" in path.read_text("utf-8")
    ]
    arguments = ["-m", "fault", "-qq", "-p", "no:cacheprovider", *options, *files]
    with contextlib.redirect_stdout(sys.stderr):
        code = pytest.main(arguments, plugins=[collector])
    if code not in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED):
        raise RuntimeError(f"the tests cannot be collected ({code!r}): run pytest --collect-only")
    return collector


def write_between(path: Path, marks: tuple[str, str], text: str) -> None:
    """Replace what stands between two marks of a page."""
    before, _, rest = path.read_text(encoding="utf-8").partition(marks[0])
    _, _, after = rest.partition(marks[1])
    path.write_text(f"{before}{marks[0]}\n\n{text}\n\n{marks[1]}{after}", encoding="utf-8")


if __name__ == "__main__":
    if "--run" in sys.argv:
        print(json.dumps(collect().outcomes))
    elif "--write" in sys.argv:
        write_between(PAGE, MARKS, table(collect("--collect-only").faults))
    else:
        print(table(collect("--collect-only").faults))
