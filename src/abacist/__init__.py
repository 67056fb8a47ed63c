"""Abacist teaches small language models GSM8K maths with GRPO, and proves what they learned.

Everything public is importable from here, and loaded only when it is first used: ``import
abacist`` costs milliseconds, and ``from abacist import parse_reply`` loads no torch.

>>> from abacist import parse_reply
>>> parse_reply("<reasoning>\\n5 + 7 = 12\\n</reasoning>\\n<answer>\\n12\\n</answer>").answer
'12'
"""

from __future__ import annotations

from importlib import import_module, metadata
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from abacist.learning.arguments import GRPOConfig as GRPOConfig
    from abacist.learning.trainer import GRPOTrainer as GRPOTrainer
    from abacist.proof.comparison.compare import compare as compare
    from abacist.proof.evaluate import evaluate as evaluate
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
    from abacist.task.rewards import xml_count as xml_count
    from abacist.view.notebook import train as train

_HOME = {
    "GRPOConfig": "abacist.learning.arguments",
    "GRPOTrainer": "abacist.learning.trainer",
    "Problem": "abacist.task.problems",
    "Rollout": "abacist.records.rollout",
    "audit": "abacist.task.audit.audit",
    "compare": "abacist.proof.comparison.compare",
    "correctness": "abacist.task.rewards",
    "evaluate": "abacist.proof.evaluate",
    "integer": "abacist.task.rewards",
    "load_problems": "abacist.task.problems",
    "parse_reply": "abacist.task.reply",
    "same_answer": "abacist.task.answers",
    "soft_format": "abacist.task.rewards",
    "strict_format": "abacist.task.rewards",
    "train": "abacist.view.notebook",
    "xml_count": "abacist.task.rewards",
}
# What a notebook shows of the results of these functions. Results hold data, and no layer below the
# view may import it; so they learn to show themselves here, where the whole package is open, when
# the function that makes them is handed out. The view is imported when a notebook asks.
_EVALUATION = ("abacist.proof.evaluation", "Evaluation")
_COMPARISON = ("abacist.proof.comparison.compare", "Comparison")
_RESULTS = {
    "audit": [("abacist.task.audit.findings", "Audit")],
    "compare": [_COMPARISON, _EVALUATION],
    "evaluate": [_EVALUATION],
    "train": [("abacist.learning.resume.resuming", "Run"), _COMPARISON, _EVALUATION],
}
__all__ = [*sorted(["__version__", *_HOME])]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        value = _version()
    elif name in _HOME:
        value = getattr(import_module(_HOME[name]), name)
        for home, result in _RESULTS.get(name, ()):
            # setattr, because no layer's class declares it
            setattr(getattr(import_module(home), result), "_repr_html_", _html_of)  # noqa: B010
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value  # the next use finds it without coming here
    return value


def _html_of(result: Any) -> str:
    from abacist.view.notebook import result_html

    return result_html(result)


def __dir__() -> list[str]:
    return sorted(set(globals()) | set(__all__))


def _version() -> str:
    try:
        return metadata.version("abacist")
    except metadata.PackageNotFoundError:  # run from a source tree that was never installed
        return "0+source"
