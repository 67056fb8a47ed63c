"""Reads a dataclass out of JSON that may be damaged, or a stranger's."""

from __future__ import annotations

import functools
import sys
import types
from collections.abc import Mapping
from typing import Any, TypeVar, Union, cast, get_args, get_origin, get_type_hints

T = TypeVar("T")


def typed(kind: type[T], fields: object) -> T:
    """``kind(**fields)``, once every value has the type its field is declared with.

    A whole number may stand for a float; NaN and infinities are no values. Types inside a list or
    a mapping are not looked at. Raises TypeError that names the field.

    >>> from dataclasses import make_dataclass
    >>> Asked = make_dataclass("Asked", [("tokens", int), ("temperature", float)])
    >>> typed(Asked, {"tokens": 300, "temperature": 1})
    Asked(tokens=300, temperature=1)
    >>> typed(Asked, {"tokens": "300", "temperature": 1})
    Traceback (most recent call last):
    ...
    TypeError: tokens is '300'
    """
    if not isinstance(fields, Mapping):
        raise TypeError(f"{kind.__name__} is {str(fields)[:40]!r}")
    declared = _types_of(cast(Any, kind))
    for name, value in fields.items():
        if name not in declared:
            raise TypeError(f"{str(name)[:40]!r} is unknown")
        if not _is_one_of(declared[name], value):
            raise TypeError(f"{name} is {repr(value)[:40]}")
    return kind(**fields)


@functools.cache
def _types_of(kind: Any) -> dict[str, tuple[type, ...]]:
    """Each field's types, without what they hold: ``list[str] | None`` is list and NoneType."""
    found = {}
    for name, hint in get_type_hints(kind).items():
        parts = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
        found[name] = tuple(get_origin(part) or part for part in parts)
    return found


def _is_one_of(kinds: tuple[type, ...], value: Any) -> bool:
    if isinstance(value, bool):
        return bool in kinds
    if isinstance(value, int | float) and float in kinds:
        return -sys.float_info.max <= value <= sys.float_info.max  # an int may have 400 digits
    return isinstance(value, kinds)
