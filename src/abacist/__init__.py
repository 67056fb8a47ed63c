"""Abacist teaches small language models GSM8K maths with GRPO, and proves what they learned.

    import abacist

    run = abacist.train("tiny")             teach the built-in model: minutes, no GPU, no network
    run                                     the verdict, before and after; in a notebook as a page
    run.plot(), run.to_pandas()             curves over the steps, and the numbers behind them
    abacist.ask(run, "What is 3 * 4?")      put a question to what it has learned

    abacist.audit(["default", my_reward], problems)    what can these rewards be made to pay for?
    abacist.train(model="Qwen/Qwen2.5-1.5B-Instruct", dataset="openai/gsm8k",
                  reward_funcs=["default", my_reward], max_steps=200)
    abacist.train(resume="runs/tiny-001")   go on where a training was stopped
    abacist.evaluate("tiny", num_problems=100)         measure a model, with intervals
    abacist.compare("runs/a", "runs/b")     is B better than A? paired, problem by problem
    abacist.load_run("runs/tiny-001")       read a run that was made before

Keywords are the flags of the commands: `abacist train --help` lists them. Results are plain
objects; each prints as one line, and has .text(), .plot() and .to_pandas(). What a person can mend
is raised as abacist.AbacistError: what is wrong, where, and how to mend it.

Rewards and answers by themselves, without torch: parse_reply, same_answer, correctness, integer,
strict_format, soft_format, xml_count; a sixth, valid_steps. load_problems. The trainer in place of
TRL's: GRPOTrainer, GRPOConfig. docs/python.md shows all of it in examples.

Everything is loaded when it is first used: `import abacist` costs milliseconds.

>>> from abacist import parse_reply
>>> parse_reply("<reasoning>\\n5 + 7 = 12\\n</reasoning>\\n<answer>\\n12\\n</answer>").answer
'12'
"""

from __future__ import annotations

import warnings
from importlib import import_module, metadata
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from abacist.api import ask as ask
    from abacist.api import compare as compare
    from abacist.api import evaluate as evaluate
    from abacist.api import train as train
    from abacist.errors import AbacistError as AbacistError
    from abacist.learning.arguments import GRPOConfig as GRPOConfig
    from abacist.learning.resume.resuming import load_run as load_run
    from abacist.learning.trainer import GRPOTrainer as GRPOTrainer
    from abacist.records.rollout import Rollout as Rollout
    from abacist.task.answers import same_answer as same_answer
    from abacist.task.audit.audit import audit as audit
    from abacist.task.problems import Problem as Problem
    from abacist.task.problems import load_problems as load_problems
    from abacist.task.reply import parse_reply as parse_reply
    from abacist.task.rewards import correctness as correctness
    from abacist.task.rewards import integer as integer
    from abacist.task.rewards import soft_format as soft_format
    from abacist.task.rewards import strict_format as strict_format
    from abacist.task.rewards import valid_steps as valid_steps
    from abacist.task.rewards import xml_count as xml_count

_HOME = {
    "AbacistError": "abacist.errors",
    "GRPOConfig": "abacist.learning.arguments",
    "GRPOTrainer": "abacist.learning.trainer",
    "Problem": "abacist.task.problems",
    "Rollout": "abacist.records.rollout",
    "ask": "abacist.api",
    "audit": "abacist.task.audit.audit",
    "compare": "abacist.api",
    "correctness": "abacist.task.rewards",
    "evaluate": "abacist.api",
    "integer": "abacist.task.rewards",
    "load_problems": "abacist.task.problems",
    "load_run": "abacist.learning.resume.resuming",
    "parse_reply": "abacist.task.reply",
    "same_answer": "abacist.task.answers",
    "soft_format": "abacist.task.rewards",
    "strict_format": "abacist.task.rewards",
    "train": "abacist.api",
    "valid_steps": "abacist.task.rewards",
    "xml_count": "abacist.task.rewards",
}
# What is seen of the results of these functions. Results hold data, and no layer below the view may
# import it; so they get the methods that show them here, where the whole package is open, when the
# function that makes them is handed out. The view is imported when one of them is called.
_EVALUATION = ("abacist.proof.evaluation", "Evaluation")
_COMPARISON = ("abacist.proof.comparison.compare", "Comparison")
_RUN = ("abacist.learning.resume.resuming", "Run")
_RESULTS = {
    "ask": [("abacist.proof.ask", "Answers")],
    "audit": [("abacist.task.audit.findings", "Audit")],
    "compare": [_COMPARISON, _EVALUATION],
    "evaluate": [_EVALUATION],
    "load_run": [_RUN, _COMPARISON, _EVALUATION],
    "train": [_RUN, _COMPARISON, _EVALUATION],
}
_METHODS = ("_repr_html_", "text", "plot", "to_pandas")
__all__ = [*sorted(["__version__", *_HOME])]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        value = _version()
    elif name in _HOME:
        # tqdm says in a notebook that it would like widgets. Progress is shown without them here.
        warnings.filterwarnings("ignore", message="IProgress not found")
        value = getattr(import_module(_HOME[name]), name)
        for home, result in _RESULTS.get(name, ()):
            kind = getattr(import_module(home), result)
            for method in _METHODS:
                setattr(kind, method, getattr(_Shown, method))
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value  # the next use finds it without coming here
    return value


class _Shown:
    """The methods that every result gets."""

    def _repr_html_(self) -> str:
        """The result as a piece of HTML, in which everything foreign is escaped."""
        from abacist.view.notebook import result_html

        return result_html(self)  # type: ignore[arg-type]

    def text(self, width: int = 100) -> str:
        """The whole result as plain text of at most ``width`` columns, as the command prints it."""
        from abacist.view.results import result_text

        return result_text(self, width)  # type: ignore[arg-type]

    def plot(self) -> Any:
        """A matplotlib figure: curves of a run, accuracy by difficulty of an evaluation, before
        and after of a comparison."""
        from abacist.view.results import result_plot

        return result_plot(self)  # type: ignore[arg-type]

    def to_pandas(self, what: str | None = None) -> Any:
        """A pandas table: of an evaluation and of answers a row for each reply, of a comparison one
        for each problem, of an audit one for each finding. Of a run ``what`` is ``"metrics"`` (a
        row for each step: the default), ``"rollouts"`` or ``"problems"``."""
        from abacist.view.results import result_frame

        return result_frame(self, what)  # type: ignore[arg-type]


def __dir__() -> list[str]:
    return sorted({name for name in globals() if name.startswith("__")} | set(__all__))


def _version() -> str:
    try:
        return metadata.version("abacist")
    except metadata.PackageNotFoundError:  # run from a source tree that was never installed
        return "0+source"
