"""Which columns hold the question and the gold, and how a cell of them is read.

``question`` and ``answer`` are looked for, or what ``--question_column`` and ``--answer_column``
name. Where only the default names were asked for and are absent, the usual ones are tried in the
order below, without regard to capitals, and what was taken is said. ``reward_model.ground_truth``
is a key inside a column.

A chat list (dictionaries with ``role`` and ``content``, or ``from`` and ``value``) gives its last
user turn as the question, and the assistant's turn behind it as the text that holds the gold.
"""

from __future__ import annotations

import decimal
import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from abacist.task.sources import Row

DEFAULT_QUESTION, DEFAULT_ANSWER = "question", "answer"
# In order of preference. A short gold comes before a worked solution.
QUESTION_NAMES = (
    "question", "problem", "prompt", "query", "instruction", "input", "messages", "conversations",
)  # fmt: skip
ANSWER_NAMES = (
    "answer", "ground_truth", "reward_model.ground_truth", "gold", "final_answer",
    "expected_answer", "label", "target", "solution", "response", "output", "completion",
    "messages", "conversations",
)  # fmt: skip
_CHATS = ("messages", "conversations")  # may hold question and gold both
_SOLUTION = "solution"
_ROLES = {"human": "user", "gpt": "assistant", "model": "assistant"}
_ROWS_LOOKED_AT = 100  # for keys inside columns


class Columns(NamedTuple):
    """The columns taken, and what to say about it ("" if they are those asked for)."""

    question: str
    answer: str
    solution: str | None = None  # a worked solution, where the answer is a bare gold
    note: str = ""


class Turn(NamedTuple):
    """One message of a chat list, its role in the words of chat templates."""

    role: str
    content: str


def choose_columns(rows: Sequence[Row], question: str, answer: str) -> Columns:
    """The columns of ``rows`` that hold question and gold; ``question`` and ``answer`` are wished.

    A wish that is there, and any but the default, stays as it is.

    >>> row = Row("a", "line 1", {"Problem": "1+1?", "answer": "2"})
    >>> choose_columns([row], "question", "answer").note
    "no column 'question'; the question is taken from 'Problem'"
    """
    names = _names_in(rows)
    taken, other_questions = _find(question, DEFAULT_QUESTION, QUESTION_NAMES, names)
    free = {key: name for key, name in names.items() if name != taken or key in _CHATS}
    gold, other_golds = _find(answer, DEFAULT_ANSWER, ANSWER_NAMES, free)
    worked = names.get(_SOLUTION)
    worked = None if worked in (taken, gold) else worked
    said = []
    if absent := [repr(wish) for wish, got in ((question, taken), (answer, gold)) if wish != got]:
        said.append(f"no column {' or '.join(absent)}")
    if taken != question:
        said.append(f"the question is taken from {taken!r}{_besides(other_questions)}")
    if gold != answer:
        said.append(f"the gold is taken from {gold!r}{_besides(other_golds)}")
    if worked is not None:
        said.append(f"worked solutions are taken from {worked!r}")
    return Columns(taken, gold, worked, "; ".join(said + _left_out(rows, taken)))


def _names_in(rows: Sequence[Row]) -> dict[str, str]:
    """The columns, and keys inside them, by their names without regard to capitals."""
    plain = dict.fromkeys(name for row in rows for name in row.fields)
    inner = dict.fromkeys(
        f"{name}.{key}"
        for row in rows[:_ROWS_LOOKED_AT]
        for name, value in row.fields.items()
        if isinstance(value, Mapping)
        for key in value
    )
    # The first of several wins, and a column before a key inside one.
    return {name.strip().casefold(): name for name in reversed([*map(str, plain), *inner])}


def _find(
    wish: str, default: str, usual: Sequence[str], names: Mapping[str, str]
) -> tuple[str, list[str]]:
    """The column to take, and others that would do."""
    if wish != default or wish in names.values():
        return wish, []
    found = [names[name] for name in usual if name in names]
    return (found[0], found[1:]) if found else (wish, [])


def _besides(others: Sequence[str]) -> str:
    return f" (not from {', '.join(map(repr, others))})" if others else ""


def _left_out(rows: Sequence[Row], column: str) -> list[str]:
    """What of chat lists does not become part of a question."""
    chats = [chat for row in rows if (chat := turns(value_of(row.fields, column)))]
    if not chats:
        return []
    said = [f"of each chat in {column!r} the last user turn is the question"]
    if with_system := sum(any(turn.role == "system" for turn in chat) for chat in chats):
        said.append(f"the system turn of {with_system:,} is left out (--system_prompt sets one)")
    if longer := sum([turn.role for turn in chat].count("user") > 1 for chat in chats):
        said.append(f"what was said before it in {longer:,} is left out")
    return said


def value_of(fields: Mapping[str, object], column: str) -> object:
    """The value of a column, or of a key inside one ("reward_model.ground_truth"); None if none.

    >>> value_of({"a.b": 1}, "a.b"), value_of({"a": {"b": 2}}, "a.b"), value_of({}, "a.b")
    (1, 2, None)
    """
    if column in fields:
        return fields[column]
    outer, _, inner = column.partition(".")
    value = fields.get(outer)
    return value.get(inner) if inner and isinstance(value, Mapping) else None


def has_column(fields: Mapping[str, object], column: str) -> bool:
    """Whether there is such a column, or such a key inside one."""
    outer, _, inner = column.partition(".")
    value = fields.get(outer)
    return column in fields or (bool(inner) and isinstance(value, Mapping) and inner in value)


def turns(value: object) -> list[Turn]:
    """The turns of a chat list, [] for anything else.

    >>> turns([{"role": "user", "content": [{"type": "text", "text": "1+1?"}]}])
    [Turn(role='user', content='1+1?')]
    """
    if not isinstance(value, list):
        return []
    found = []
    for turn in value:
        if not isinstance(turn, Mapping):
            return []
        role = turn.get("role", turn.get("from"))
        content = _content(turn.get("content", turn.get("value")))
        if not isinstance(role, str) or content is None:
            return []
        found.append(Turn(_ROLES.get(role, role), content))
    return found


def _content(content: object) -> str | None:
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        return None
    # Parts, as multimodal templates take them. An image cannot be asked about here.
    parts = [part.get("text") for part in content if isinstance(part, Mapping)]
    texts = [part for part in parts if isinstance(part, str)]
    return "".join(texts) if len(texts) == len(content) else None


def question_in(value: object) -> object:
    """The last user turn of a chat list; any other value as it is."""
    said = [turn.content for turn in turns(value) if turn.role == "user"]
    return said[-1] if said else value


def answer_in(value: object) -> object:
    """What the assistant says after the last user turn of a chat list, and the one text or number
    of a list of one; any other value as it is.

    >>> answer_in(["12"]), answer_in(["12", "13"])
    ('12', ['12', '13'])
    """
    if isinstance(value, list) and len(value) == 1 and isinstance(value[0], str | int | float):
        return value[0]
    for turn in reversed(turns(value)):
        if turn.role == "assistant":
            return turn.content
        if turn.role == "user":
            break
    return value


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
        return repr(value).removesuffix(".0")
    if isinstance(value, decimal.Decimal) and value.is_finite():
        return str(value)
    return None


def is_empty(value: object) -> bool:
    """Whether a cell holds nothing: null, blank text, or the NaN that pandas writes for it."""
    if isinstance(value, str):
        return not value.strip()
    return value is None or (isinstance(value, float) and math.isnan(value))
