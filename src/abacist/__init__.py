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
    from abacist.learning.arguments import GRPOConfig
    from abacist.learning.train import train
    from abacist.learning.trainer import GRPOTrainer
    from abacist.proof.comparison.compare import compare
    from abacist.proof.evaluate import evaluate
    from abacist.records.rollout import Rollout
    from abacist.task.answers import same_answer
    from abacist.task.audit.audit import audit
    from abacist.task.problems import Problem, load_problems
    from abacist.task.reply import parse_reply
    from abacist.task.rewards import correctness, integer, soft_format, strict_format, xml_count

__all__ = [
    "GRPOConfig",
    "GRPOTrainer",
    "Problem",
    "Rollout",
    "__version__",
    "audit",
    "compare",
    "correctness",
    "evaluate",
    "integer",
    "load_problems",
    "parse_reply",
    "same_answer",
    "soft_format",
    "strict_format",
    "train",
    "xml_count",
]

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
    "train": "abacist.learning.train",
    "xml_count": "abacist.task.rewards",
}


def __getattr__(name: str) -> Any:
    if name == "__version__":
        value = _version()
    elif name in _HOME:
        value = getattr(import_module(_HOME[name]), name)
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value  # the next use finds it without coming here
    return value


def __dir__() -> list[str]:
    return sorted(set(globals()) | set(__all__))


def _version() -> str:
    try:
        return metadata.version("abacist")
    except metadata.PackageNotFoundError:  # run from a source tree that was never installed
        return "0+source"
