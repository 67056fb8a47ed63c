"""Evaluations made of texts, without a model: what `proof` and `view` are tested on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

from abacist.policy.decoding.progress import Decoded
from abacist.proof.evaluate import evaluate
from abacist.proof.evaluation import Evaluation
from abacist.records.rollout import StopReason
from abacist.task.problems import Problem
from abacist.task.reply import render_reply

GOOD = render_reply("3 + 4 = 7", "7")
WORKLESS = render_reply("It must be so.", "7")
WRONG = render_reply("3 + 4 = 8", "8")
BARE = "7"
SILENT = ""


def problem(number: int, difficulty: int = 1, unseen: bool | None = None) -> Problem:
    """A problem whose answer is 7, whatever its number."""
    return Problem(
        problem_id=f"p{number:03d}",
        question=f"How much is 3 + 4, asked for time {number}?",
        solution="3 + 4 = 7",
        answer="7",
        difficulty=difficulty,
        structure=None if unseen is None else "sum",
        unseen_structure=unseen,
    )


@dataclass
class Completion:
    ids: list[int]
    text: str
    stop_reason: StopReason


POLICY: Any = SimpleNamespace(
    chat=SimpleNamespace(
        encode=lambda messages, *, prefill="": [0] * (len(messages) + len(prefill))
    )
)


def saying(texts: Sequence[Sequence[str]]) -> Callable[..., list[list[Completion]]]:
    """A ``generate`` that gives these replies; one as long as its budget counts as cut off."""

    def generate(policy: Any, prompts: Any, **settings: Any) -> list[list[Completion]]:
        assert len(prompts) == len(texts)
        budget = settings["max_completion_tokens"]
        if settings["progress"] is not None:
            settings["progress"](Decoded.all_ended([1] * len(prompts), budget))

        def completion(text: str) -> Completion:
            ids = list(range(min(budget, len(text.split()) + 1)))
            reason = StopReason.LENGTH if len(ids) == budget else StopReason.STOPPED
            return Completion(ids, text, reason if text else StopReason.EMPTY)

        return [[completion(text) for text in replies] for replies in texts]

    return generate


def evaluation(
    replies: Sequence[str | Sequence[str]],
    problems: Sequence[Problem] | None = None,
    **settings: Any,
) -> Evaluation:
    """One evaluation in which problem number n got the n-th of ``replies`` (or all of several)."""
    several = [[text] if isinstance(text, str) else list(text) for text in replies]
    options = {"max_completion_tokens": 50, "num_samples": len(several[0])} | settings
    if options["num_samples"] > 1:
        options.setdefault("temperature", 1.0)
    return evaluate(
        POLICY,
        problems or [problem(number) for number in range(len(several))],
        generate=saying(several),
        **options,
    )
