"""How a reply is judged in lm-evaluation-harness: by our rule, as in ``abacist eval``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from abacist.proof.scorers import lm_eval_flexible
from abacist.task.answers import same_answer
from abacist.task.reply import parse_reply


def process_results(doc: Mapping[str, Any], results: Sequence[str]) -> dict[str, float]:
    """The metrics of one reply; the harness takes the mean of each.

    >>> process_results({"answer": "18"}, ["<answer>$18.00</answer>"])["correct"]
    1.0
    """
    text, gold = results[0], str(doc["answer"])
    reply = parse_reply(text)
    return {
        "correct": float(same_answer(reply.answer, gold)),
        "any_format": float(lm_eval_flexible(text, gold)),
        "strict_format": float(reply.strict),
    }
