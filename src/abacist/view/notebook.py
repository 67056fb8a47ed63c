"""What there is to read of a result, as a page; and the HTML of it that a notebook shows.

Without widgets, scripts and styles: a result has the colours of the page that it stands in.
"""

from __future__ import annotations

from abacist.learning.resume.resuming import Run
from abacist.proof.ask import Answers
from abacist.proof.comparison.compare import Comparison
from abacist.proof.evaluation import Evaluation
from abacist.task.audit.findings import Audit
from abacist.view.answers import answers_page
from abacist.view.audit import audit_page
from abacist.view.comparison import pair_page
from abacist.view.evaltext import evaluation_page
from abacist.view.plaintext import visible
from abacist.view.sheet import Block, as_html
from abacist.view.verdict import verdict_page

Result = Run | Evaluation | Comparison | Audit | Answers


def result_html(result: Result) -> str:
    """A result as a piece of HTML in which everything foreign is escaped."""
    return as_html(result_page(result))


def result_page(result: Result) -> list[Block]:
    """What there is to read of a result."""
    if isinstance(result, Evaluation):
        kept = [f"Kept in {visible(str(result.path))}."] if result.path else []
        return [*evaluation_page(result, result.sampled), *kept]
    if isinstance(result, Comparison):
        return [
            *pair_page(result, result.names),
            *(f"Note: {visible(note)}" for note in result.notes),
        ]
    if isinstance(result, Answers):
        return answers_page(result)
    if isinstance(result, Audit):
        return audit_page(result)
    from abacist.view.report.page import PAGE_NAME  # with matplotlib: only where it is named

    where = f"The run is in {visible(str(result.path))}."
    if (result.path / PAGE_NAME).exists():
        where += f" Its page, to be opened in a browser, is {PAGE_NAME} in it."
    if result.stopped:
        return [f"Stopped by {visible(result.stopped)}.", where]
    if result.comparison is None:
        return ["There is no verdict: no problems were held out.", where]
    sampled = result.sampled_before, result.sampled_after
    return [*verdict_page(result.comparison, *sampled), where]
