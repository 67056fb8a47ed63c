"""The faults that the tests inject, written down where they are injected.

A test that injects a fault carries the marker :func:`fault`, on itself or on a parameter::

    @fault("training", "the loss becomes NaN", "the step, and that it was refused", exit_code=1)
    def test_a_nan_loss_never_reaches_the_weights(...) -> None: ...

    pytest.param(NAN, marks=fault("rewards", "a reward returns NaN", "its name and the sample"))

``cause`` completes "when …", ``seen`` is what the user is shown or what happens instead, and
``exit_code`` is that of the command. Every test so marked asserts what its marker says.
``python tests/faults.py`` collects them all, without running any, and prints the table of
docs/reliability.md; :func:`table` takes the outcomes of a run as well (see :class:`Collector`).
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest

TESTS = Path(__file__).parent


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


def table(faults: Iterable[Fault], outcomes: Mapping[str, str] | None = None) -> str:
    """The faults as a Markdown table by area, with the outcome of each test if it ran.

    >>> print(table([Fault("rewards", "a reward returns NaN", "its name", 1, "test_x")]))
    | area | fault | what the user sees | exit code |
    |---|---|---|---:|
    | rewards | a reward returns NaN | its name | 1 |
    """
    heading = ["area", "fault", "what the user sees", "exit code"]
    rule = ["---", "---", "---", "---:"]
    if outcomes is not None:
        heading, rule = [*heading, "test"], [*rule, "---"]
    rows = {}
    for one in faults:
        row = [one.area, one.cause, one.seen, str(one.exit_code)]
        if outcomes is not None:
            row.append(outcomes.get(one.test, "not run"))
        rows[tuple(row)] = None
    lines = ["| " + " | ".join(cells) + " |" for cells in [heading, *sorted(rows)]]
    return "\n".join([lines[0], "|" + "|".join(rule) + "|", *lines[1:]])


if __name__ == "__main__":
    collector = Collector()
    with contextlib.redirect_stdout(sys.stderr):
        code = pytest.main(["--collect-only", "-qqq", str(TESTS)], plugins=[collector])
    if code != 0:
        sys.exit("the tests cannot be collected: run pytest --collect-only")
    print(table(collector.faults))
