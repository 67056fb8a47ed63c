"""Values given in Python as plain ones: of numpy, torch and pandas, paths, enums, generators."""

from __future__ import annotations

import math
import os
import struct
from collections.abc import Iterator, Mapping
from contextlib import suppress
from decimal import Decimal
from enum import Enum
from typing import Any


def plain(value: Any) -> Any:
    """``value`` as a text, number, list or dict, where it is one of another kind; else as it is.

    An array, a tensor, a series and their scalars are what their ``tolist()`` gives; a path is its
    text, a member of an enum its value, a dtype or device of torch its name, a Decimal the float
    that is written like it. Tuples, ranges and iterators become lists.

    >>> plain((1, 2)), plain(Decimal("0.10")), plain(map(str, range(2)))
    ([1, 2], 0.1, ['0', '1'])
    """
    if isinstance(value, Enum):
        return plain(value.value)
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if callable(getattr(value, "tolist", None)) and not isinstance(value, type):
        held = value.tolist()
        narrow = _NARROW_FLOATS.get(str(getattr(value, "dtype", "")).removeprefix("torch."))
        if narrow:
            return _shortest_float(held, *narrow)
        return plain(held) if isinstance(held, list) else held
    if isinstance(value, list | tuple | range | Iterator):
        return [plain(one) for one in value]
    if isinstance(value, Mapping):
        return {plain(key): plain(one) for key, one in value.items()}
    if isinstance(value, Decimal) and value.is_finite():
        number = float(value)
        return number if Decimal(repr(number)) == value else value
    if type(value).__module__ == "torch" and type(value).__name__ in ("dtype", "device"):
        return str(value).removeprefix("torch.")
    return value


# Format for `struct` and the digits that tell any two of them apart.
_NARROW_FLOATS = dict.fromkeys(("float", "float32"), ("f", 9))
_NARROW_FLOATS |= dict.fromkeys(("halffloat", "float16"), ("e", 5))


def shortest(fields: Mapping[str, object], kinds: Mapping[str, str]) -> Mapping[str, object]:
    """``fields`` with the numbers of float32 and float16 columns as they were written.

    Python's float has more digits than such a column: 0.1 would read 0.10000000149011612.

    >>> shortest({"a": 0.10000000149011612, "b": 0.1}, {"a": "float", "b": "double"})
    {'a': 0.1, 'b': 0.1}
    """
    narrow = {name: _NARROW_FLOATS[kind] for name, kind in kinds.items() if kind in _NARROW_FLOATS}
    if not narrow:
        return fields
    return {
        name: _shortest_float(value, *narrow[name]) if name in narrow else value
        for name, value in fields.items()
    }


def _shortest_float(value: Any, kind: str, most_digits: int) -> Any:
    if isinstance(value, list):
        return [_shortest_float(one, kind, most_digits) for one in value]
    if not isinstance(value, float) or not math.isfinite(value):
        return value
    for digits in range(1, most_digits):
        short = float(f"{value:.{digits}g}")
        with suppress(OverflowError):
            if struct.unpack(kind, struct.pack(kind, short))[0] == value:
                return short
    return value


def is_whole(value: object) -> bool:
    """Whether a plain value is a whole number; a bool is none."""
    return isinstance(value, int) and not isinstance(value, bool)


def is_number(value: object) -> bool:
    """Whether a plain value is a number; a bool is none."""
    return is_whole(value) or isinstance(value, float)
