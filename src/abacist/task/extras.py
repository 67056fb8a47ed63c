"""The other columns of a data set, for reward functions: as in TRL, each arrives as a keyword.

They go through an Arrow table, as every data set of TRL's does, in which a column has one type. A
column that mixes types (a number here, a text there) is left out, and so is one whose name means
something else to a reward; both are said.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

# What `abacist train` hands to rewards under these names is its own.
OWN_COLUMNS = ("prompt", "answer", "problem_id", "difficulty")
# TRL's: what it computes itself, or takes for a completion, a conversation, images or tools. Any of
# `messages`, `chosen` and `rejected` may decide, in the order of a set, whether all rows are chats.
TRL_NAMES = (
    "prompts", "completions", "completion", "completion_ids", "chosen", "rejected", "messages",
    "trainer_state", "log_extra", "log_metric", "environment", "environments", "image", "images",
    "tools",
)  # fmt: skip
_MAX_DEPTH = 16
_WIDER = {("int", "float"): "float", ("int", "long int"): "long int"}


class _Mixed(Exception):
    """Two values that cannot stand in one column, or one that cannot stand in any."""


def shared_extras(
    rows: Sequence[Mapping[str, object]], *, answer_column: str, prompt_column: str
) -> tuple[list[dict[str, object]], str]:
    """For each row the same extra columns (None where it lacks one), and what was left out and why.

    ``answer_column`` and ``prompt_column`` have been read already: nothing is said of them.
    """
    names = {name: None for row in rows for name in row if name}
    read = {answer_column, prompt_column, "problem_id"}
    kept, said = [], []
    for name in names:
        if name in OWN_COLUMNS or name in TRL_NAMES:
            if name not in read:
                whose = "Abacist's" if name in OWN_COLUMNS else "TRL's"
                said.append(f"rewards do not get the column {name!r}: the name is {whose} own")
            continue
        try:
            _common_kind([row.get(name) for row in rows])
        except (_Mixed, RecursionError) as reason:
            said.append(f"rewards do not get the column {name!r}: {reason or 'it is too deep'}")
        else:
            kept.append(name)
    return [{name: row.get(name) for name in kept} for row in rows], "; ".join(said)


def _common_kind(values: Sequence[object], depth: int = 0) -> Any:
    kind: Any = None
    for value in values:
        kind = _merged(kind, _kind(value, depth))
    return kind


def _kind(value: object, depth: int) -> Any:
    """What Arrow would make of a value; None for a missing one."""
    if depth > _MAX_DEPTH:
        raise _Mixed("it is too deep")
    if value is None:
        return None
    if isinstance(value, bool):
        return "bool"
    if isinstance(value, int):
        if not -(2**63) <= value < 2**63:
            raise _Mixed("it holds an integer of more than 64 bits")
        return "int" if abs(value) <= 2**53 else "long int"
    if isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError:
            raise _Mixed("it holds broken Unicode") from None
        return "text"
    if isinstance(value, list | tuple):
        return [_common_kind(value, depth + 1)]
    if isinstance(value, Mapping):
        return {str(key): _kind(one, depth + 1) for key, one in value.items()}
    return type(value).__name__


def _merged(one: Any, other: Any) -> Any:
    if one is None or other is None or one == other:
        return other if one is None else one
    if isinstance(one, list) and isinstance(other, list):
        return [_merged(one[0], other[0])]
    if isinstance(one, dict) and isinstance(other, dict):
        return {key: _merged(one.get(key), other.get(key)) for key in {**one, **other}}
    if isinstance(one, str) and isinstance(other, str):
        wider = _WIDER.get((one, other)) or _WIDER.get((other, one))
        if wider:
            return wider
    raise _Mixed(f"it mixes {_word(one)} and {_word(other)}")


def _word(kind: Any) -> str:
    return kind if isinstance(kind, str) else "a list" if isinstance(kind, list) else "an object"
