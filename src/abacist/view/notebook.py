"""What a notebook shows: results as HTML, and a training in a cell that follows it.

Without widgets and without cursor codes: IPython's own display is enough, and IPython is used only
where it is running already.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from abacist.proof.comparison.compare import Comparison
from abacist.proof.evaluation import Evaluation
from abacist.task.audit.findings import Audit
from abacist.view.audit import audit_page
from abacist.view.comparison import pair_page
from abacist.view.evaltext import evaluation_page
from abacist.view.live import Live
from abacist.view.plaintext import visible
from abacist.view.sheet import Block, as_html
from abacist.view.verdict import verdict_page

if TYPE_CHECKING:
    from abacist.learning.config import Config
    from abacist.learning.resume.resuming import Run
    from abacist.learning.tracking import Watcher


def train(config: Config, watcher: Watcher | None = None) -> Run:
    """Train by ``config`` and judge the result: :func:`abacist.learning.train.train`.

    In a notebook the training is shown in its cell, unless ``watcher`` says otherwise; elsewhere it
    is silent without one.
    """
    from abacist.learning.train import train as run

    cell = Live.here() if watcher is None else None
    if cell is None:
        return run(config, watcher)
    with cell:
        return run(config, cell)


def result_html(result: Run | Evaluation | Comparison | Audit) -> str:
    """A result as a piece of HTML in which everything foreign is escaped."""
    return as_html(result_page(result))


def result_page(result: Run | Evaluation | Comparison | Audit) -> list[Block]:
    """What there is to read of a result."""
    if isinstance(result, Evaluation):
        return evaluation_page(result)
    if isinstance(result, Comparison):
        return pair_page(result, ("the first evaluation", "the second"))
    if isinstance(result, Audit):
        return audit_page(result)
    where = f"The run is in {visible(str(result.path))}."
    if result.stopped:
        return [f"Stopped by {visible(result.stopped)}.", where]
    if result.comparison is None:
        return ["There is no verdict: no problems were held out.", where]
    sampled = result.sampled_before, result.sampled_after
    return [*verdict_page(result.comparison, *sampled), where]
