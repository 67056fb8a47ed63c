"""Which column of a stranger's data set holds the question, and which the gold.

Data sets name them differently, and some hold a chat instead of a text. What is asked for by name
is taken; where only the default names were asked for and are absent, a usual other name is taken,
and the caller says which.
"""

from __future__ import annotations

import decimal
import math
from collections.abc import Iterable, Mapping

DEFAULT_QUESTION, DEFAULT_ANSWER = "question", "answer"
# In order of preference. A short gold comes before a worked solution.
QUESTION_NAMES = ("question", "problem", "prompt", "query", "instruction", "input", "messages")
ANSWER_NAMES = (
    "answer", "ground_truth", "gold", "final_answer", "label", "target", "solution", "response",
    "output", "completion",
)  # fmt: skip


def choose(columns: Iterable[str], question_column: str, answer_column: str) -> tuple[str, str]:
    """The columns to read: as asked, or a usual name where the default one is absent.

    >>> choose(["problem", "solution"], "question", "answer")
    ('problem', 'solution')
    >>> choose(["question", "label", "solution"], "question", "answer")
    ('question', 'label')
    >>> choose(["messages"], "question", "answer")
    ('messages', 'messages')
    >>> choose(["problem", "solution"], "query", "answer")  # a name that was given stays
    ('query', 'solution')
    """
    present = set(columns)
    if question_column == DEFAULT_QUESTION:
        question_column = next((one for one in QUESTION_NAMES if one in present), question_column)
    if answer_column == DEFAULT_ANSWER:
        free = present - {question_column}
        answer_column = next((one for one in ANSWER_NAMES if one in free), answer_column)
        if answer_column not in present and question_column == "messages":
            answer_column = "messages"  # a chat that ends with the assistant's solution
    return question_column, answer_column


def turn_of(chat: object, role: str) -> str | None:
    """The text of the last turn of ``role`` in a list of messages; None if it is no such list.

    >>> chat = [{"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "4"}]
    >>> turn_of(chat, "user"), turn_of(chat, "assistant"), turn_of("2 + 2?", "user")
    ('2 + 2?', '4', None)
    """
    if not isinstance(chat, list):
        return None
    for message in reversed(chat):
        if isinstance(message, Mapping) and message.get("role") == role:
            content = message.get("content")
            if isinstance(content, list):  # parts, as multimodal templates take them
                parts = (part.get("text") for part in content if isinstance(part, Mapping))
                content = "".join(part for part in parts if isinstance(part, str))
            return content if isinstance(content, str) else None
    return None


def number_text(value: object) -> str | None:
    """A number of a typed column as its shortest text; None for what is no finite number.

    >>> number_text(18), number_text(18.0), number_text(0.1), number_text(1e-05)
    ('18', '18', '0.1', '1e-05')
    >>> number_text(float("nan")), number_text(True)
    (None, None)
    """
    if isinstance(value, bool):
        return None
    if isinstance(value, int):
        return str(value)
    if isinstance(value, float) and math.isfinite(value):
        return str(int(value)) if value.is_integer() and abs(value) < 1e16 else repr(value)
    if isinstance(value, decimal.Decimal) and value.is_finite():
        return str(value)
    return None


def is_empty(value: object) -> bool:
    """Whether a cell holds nothing: null, blank text, or the NaN that pandas writes for it."""
    if isinstance(value, str):
        return not value.strip()
    return value is None or (isinstance(value, float) and math.isnan(value))
