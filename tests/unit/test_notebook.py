"""A notebook shows results as harmless HTML and a training in its cell; IPython is a guest."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from rich.text import Text

import abacist
from abacist.learning.resume.resuming import Run
from abacist.proof.comparison.compare import compare
from abacist.task.audit.findings import Audit, Earned, Finding, Kind
from abacist.view.live import Live
from abacist.view.notebook import result_html
from abacist.view.screen import NotebookCell, is_started_by_notebook, notebook_cell
from evaluated import GOOD, WRONG, evaluation, problem
from imported import Imported

SOURCE = Path(abacist.__file__).resolve().parents[1]
HOSTILE = "<script>alert(1)</script>\x1b[2J\u202e\ud800\"'&<img src=x onerror=alert(2)>"
PROBLEMS = [problem(number) for number in range(6)]


class Display:
    """IPython.display as far as it is used: what each cell output shows, now and before."""

    def __init__(self) -> None:
        self.outputs: list[list[str]] = []

    def HTML(self, data: str) -> str:
        return data

    def display(self, page: str, *, display_id: bool) -> Any:
        assert display_id
        self.outputs.append([page])
        return SimpleNamespace(update=self.outputs[-1].append)


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def in_cell() -> tuple[Live, Display, Clock]:
    display, clock = Display(), Clock()
    return Live(screen=NotebookCell(display, clock), clock=clock), display, clock


class Reader(HTMLParser):
    """The text and the tags of a page."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.attributes: set[str] = set()
        self.text = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.tags.add(tag)
        self.attributes |= {name for name, _ in attrs}

    def handle_data(self, data: str) -> None:
        self.text += data


def is_harmless(page: str) -> bool:
    page.encode("utf-8")
    read = Reader(page)
    known = {"div", "p", "b", "pre", "span", "table", "thead", "tbody", "tr", "th", "td"}
    return read.tags <= known and read.attributes <= {"style"} and "\x1b" not in page


def audit_of(text: str) -> Audit:
    return Audit(
        rewards=(text,), weights=(1.0,), num_problems=2, num_problems_given=2, num_replies=9,
        home="strict", answer_rewards=(text,), nominal_maximum=1.0, reachable_maximum=1.0,
        earned=(Earned("right answers", text, 1.0, {text: 1.0}),),
        findings=(Finding.of(next(iter(Kind)), text, text),), remarks=(text,),
    )  # fmt: skip


def results() -> list[Any]:
    before = evaluation([HOSTILE] * 6, PROBLEMS)
    after = evaluation([GOOD] * 5 + [WRONG], PROBLEMS)
    found = compare(before, after)
    run = Run(Path(f"runs/{HOSTILE[:20]}"), before, after, None, None, found)
    stopped = Run(Path("runs/a"), before, None, None, None, None, f"the time limit {HOSTILE}")
    unjudged = Run(Path("runs/a"), None, None, None, None, None)
    return [before, after, found, run, stopped, unjudged, audit_of(HOSTILE)]


@pytest.mark.parametrize("result", results(), ids=lambda result: type(result).__name__)
def test_a_result_is_shown_as_html_that_executes_nothing(result: Any) -> None:
    page = result_html(result)
    assert is_harmless(page) and len(page) > 40


def test_replies_are_shown_as_they_were() -> None:
    page = Reader(result_html(compare(*(evaluation([x] * 6, PROBLEMS) for x in (GOOD, HOSTILE)))))
    assert "<script>alert(1)</script>\\x1b[2J\\u202e\\ud800" in page.text
    assert "Worse: 100.0 % → 0.0 % correct on 6 problems" in page.text


def test_a_result_says_in_one_line_what_it_is() -> None:
    before, after, found, run, stopped, unjudged, audit = map(repr, results())
    assert before == "<Evaluation: 6 problems, 6 greedy replies, 0.0 % correct>"
    assert after == "<Evaluation: 6 problems, 6 greedy replies, 83.3 % correct>"
    assert found == "<Comparison: 0.0 % → 83.3 % correct on 6 problems>"
    assert run.startswith("<Run: runs/") and run.endswith(", 0.0 % → 83.3 % correct on 6 problems>")
    assert stopped.startswith("<Run: runs/a, stopped by the time limit")
    assert unjudged == "<Run: runs/a, no verdict>"
    assert re.fullmatch(r"<Audit: .*, 1 finding, 1 reward, 9 replies to 2 problems>", audit)
    assert max(map(len, (before, found, unjudged, audit))) < 200
    assert (
        repr(evaluation([GOOD], PROBLEMS[:1]).without({"p000"}))
        == "<Evaluation: 0 problems, 0 greedy replies>"
    )


def test_the_package_lets_results_show_themselves_and_imports_no_view_for_it() -> None:
    code = (
        "import sys, abacist\n"
        "from abacist.task.audit.findings import Audit\n"
        "assert not hasattr(Audit, '_repr_html_')\n"
        "abacist.audit\n"
        "assert hasattr(Audit, '_repr_html_')\n"
        "assert not [name for name in sys.modules if name.startswith('abacist.view')]\n"
        "assert 'IPython' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": str(SOURCE)},
                   check=True, timeout=120)  # fmt: skip


@pytest.mark.parametrize("name", sorted(abacist._RESULTS))
def test_what_a_function_gives_can_be_shown(name: str) -> None:
    assert callable(getattr(abacist, name))
    abacist.__dict__.pop(name)
    assert callable(abacist.__getattr__(name))
    for result in results():
        if type(result).__name__ in {kind for _, kind in abacist._RESULTS[name]}:
            assert result._repr_html_() == result_html(result)


def test_a_cell_holds_one_panel_a_stage_and_updates_it() -> None:
    live, display, clock = in_cell()
    with live:
        live.stage("Training")
        for step in range(1, 6):
            clock.now += 2
            live.step({"step": step, "max_steps": 9, "rewards/correctness/mean": 0.2 * step})
        live.stage("Measuring")
        live.progress(1, 4, "after training")
    first, second = display.outputs
    assert len(first) >= 5 and "step 5/9" in Reader(first[-1]).text
    assert "after training: 1 of 4" in " ".join(Reader(second[-1]).text.split())
    assert all(map(is_harmless, first + second))


def test_a_cell_is_not_flooded_and_ends_with_the_last_state() -> None:
    live, display, clock = in_cell()
    with live:
        for step in range(1, 1001):
            clock.now += 0.01
            live.step({"step": step, "max_steps": 1000, "reward": 1.0})
            live.within_step(step + 1, "rollouts", 1, 2, HOSTILE)
        live.step({"step": 1000, "max_steps": 1000, "reward": 2.0})
    (pages,) = display.outputs
    assert len(pages) < 20 and "step 1000/1000 | reward 2.00" in Reader(pages[-1]).text
    assert all(map(is_harmless, pages))


def test_notes_of_a_cell_are_plain_lines(capsys: pytest.CaptureFixture[str]) -> None:
    live, display, _ = in_cell()
    with live:
        live.stage("Loading")
        live.note(HOSTILE)
    said = capsys.readouterr().out
    assert said.startswith("== Loading\n<script>") and "\x1b" not in said
    assert display.outputs == []
    NotebookCell(Display()).print(Text("x", style="bold red"))
    assert capsys.readouterr().out == "x\n"


def test_without_ipython_there_is_no_cell(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "IPython", None)
    assert notebook_cell() is None and Live.here() is None
    monkeypatch.setitem(sys.modules, "IPython", ModuleType("IPython"))  # half imported
    assert notebook_cell() is None


PROGRAM = """
from abacist.view.live import Live
with Live() as live:
    live.stage("Training")
    live.step({"step": 1, "max_steps": 2, "reward": 1.0})
"""


@pytest.mark.parametrize(
    ("environ", "moves"),
    [
        ({}, True),
        ({"JPY_PARENT_PID": "1"}, False),  # `!abacist train`: a pseudo-terminal in a cell
        ({"TERM": "xterm-color", "GIT_PAGER": "cat", "FORCE_COLOR": "1"}, False),
        ({"CI": "1"}, False),
        ({"TERM": "dumb"}, False),
    ],
    ids=str,
)
def test_a_pseudo_terminal_gets_cursor_codes_only_where_a_person_looks(environ, moves) -> None:
    ours = {
        "TERM",
        "CI",
        "NO_COLOR",
        "FORCE_COLOR",
        "JPY_PARENT_PID",
        "GIT_PAGER",
        "TTY_INTERACTIVE",
    }
    kept = {name: value for name, value in os.environ.items() if name not in ours}
    master, slave = pytest.importorskip("pty").openpty()  # not on Windows
    try:
        subprocess.run(
            [sys.executable, "-c", PROGRAM], stdout=slave, stderr=slave, timeout=120, check=True,
            env={**kept, "PYTHONPATH": str(SOURCE), "TERM": "xterm-256color", **environ},
        )  # fmt: skip
        written = os.read(master, 100_000).decode("utf-8")
    finally:
        os.close(slave)
        os.close(master)
    assert "step 1/2 | reward 1.00" in written
    assert ("\x1b[?25l" in written) == moves
    assert moves or not re.search(r"\x1b\[[0-9;?]*[A-HJKSTfhl]", written)


def test_colours_that_are_forced_into_a_pipe_bring_no_cursor_codes() -> None:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], capture_output=True, text=True, timeout=120, check=True,
        env={**os.environ, "PYTHONPATH": str(SOURCE), "FORCE_COLOR": "1", "TERM": "xterm"},
        encoding="utf-8",
    )  # fmt: skip
    assert not re.search(r"\x1b\[[0-9;?]*[A-HJKSTfhl]", done.stdout)
    assert "step 1/2 | reward 1.00" in done.stdout


def test_a_terminal_that_jupyter_opens_for_a_person_is_one() -> None:
    assert not is_started_by_notebook({"TERM": "xterm-color", "JUPYTER_SERVER_ROOT": "/"})
    assert is_started_by_notebook({"JPY_PARENT_PID": "12"})


ASKING = """
import sys
from abacist.cli.ask import _watcher
with _watcher() as watcher:
    watcher.progress(1, 4, "reply", "token 1")
"""


@pytest.mark.parametrize("inside", [False, True], ids=["a terminal", "a notebook's cell"])
def test_what_is_told_on_stderr_follows_the_same_rule(inside: bool, imported: Imported) -> None:
    ours = {"TERM", "CI", "NO_COLOR", "FORCE_COLOR", "JPY_PARENT_PID", "TTY_INTERACTIVE"}
    kept = {name: value for name, value in os.environ.items() if name not in ours}
    notebook = {"JPY_PARENT_PID": "1"} if inside else {}
    master, slave = pytest.importorskip("pty").openpty()  # not on Windows
    try:
        environ = {**kept, "TERM": "xterm-256color", **notebook}
        process = imported.start("-c", ASKING, env=environ, stderr=os.ttyname(slave))
        assert process.wait(120) == 0
        written = os.read(master, 100_000).decode("utf-8")
    finally:
        os.close(slave)
        os.close(master)
    assert "reply: token 1" in written and ("\x1b[?25l" in written) != inside
