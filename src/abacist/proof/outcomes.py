"""What became of a reply, in one word: right, right but unformatted, cut off, or wrong.

The terminal and the report sort replies by it. Shares of it agree with the figures of
:mod:`~abacist.proof.metrics`: *right* is ``correct``, and *right* and *unformatted* together are
``correct`` or ``any_format``.
"""

from __future__ import annotations

from abacist.proof.scorers import lm_eval_flexible
from abacist.records.rollout import Rollout, StopReason
from abacist.task.sentence_enum import SentenceEnum


class Outcome(SentenceEnum):
    """What became of a reply. Each reply has one; the first that fits, in this order."""

    RIGHT = "right", "The answer is right by our rule."
    UNFORMATTED = "unformatted", "The right number is its last, but our rule does not read it."
    TRUNCATED = "truncated", "The reply was cut off at its budget of tokens and is not right."
    WRONG = "wrong", "The right number is not its answer by any rule."
    UNJUDGED = "unjudged", "There is no gold answer to judge it by."


def outcome_of(
    completion: str, gold: str | None, is_correct: bool | None, stop_reason: str
) -> Outcome:
    """What became of a reply, from the columns of its rollout. Never raises; linear time.

    ``is_correct`` is our rule's verdict; ``stop_reason`` is a :class:`StopReason` or its value.
    A reply that was cut off behind the right number counts as *unformatted*, as in ``any_format``.

    >>> outcome_of("So it is 12.", "12", False, "stopped").value
    'unformatted'
    >>> outcome_of("First, 5 + 7", "12", False, "length").value
    'truncated'
    """
    if is_correct:
        return Outcome.RIGHT
    if gold is not None and lm_eval_flexible(completion, gold):
        return Outcome.UNFORMATTED
    if stop_reason == StopReason.LENGTH:
        return Outcome.TRUNCATED
    return Outcome.UNJUDGED if gold is None else Outcome.WRONG


def rollout_outcome(rollout: Rollout) -> Outcome:
    """:func:`outcome_of` of a whole rollout."""
    return outcome_of(rollout.completion, rollout.gold, rollout.is_correct, rollout.stop_reason)
