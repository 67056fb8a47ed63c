"""A sum of the code of a reward, by which a resumed run sees that it has changed.

Of a function in a module it is the sum of the file. One that stands in no file (a notebook's, a
lambda, a closure) has another text around it whenever it is given again, so there it is the sum of
its compiled code, its defaults and the plain values it closes over, those of functions it closes
over among them. Globals that it reads are not seen, and of other objects only their type is.
"""

from __future__ import annotations

import hashlib
import inspect
from functools import partial
from pathlib import Path
from types import CodeType
from typing import Any

from abacist.task.custom_rewards import name_of, plain_name, stands_in_no_file

_DEEPEST = 8  # of containers within containers, and of functions that close over functions
_PLAIN = (bool, int, float, str, bytes, type(None))


def reward_sum(reward: Any) -> str:
    """A reward's name; of a user's own also the sum of its code."""
    inner, bound = reward, []
    while hasattr(inner, "func"):  # checked(), functools.partial
        if isinstance(inner, partial):
            bound.append(_value((inner.args, inner.keywords)))
        inner = inner.func
    name = str(getattr(reward, "__name__", "")) or plain_name(inner)
    if str(getattr(inner, "__module__", "")).split(".")[0] == "abacist":
        return name
    if stands_in_no_file(name_of(inner)):
        text = repr((_function(inner), bound)).encode("utf-8", "backslashreplace")
        return f"{name} {hashlib.sha256(text).hexdigest()}"
    try:
        source = Path(str(inspect.getsourcefile(inner))).read_bytes()
    except (TypeError, OSError):
        return name
    return f"{name} {hashlib.sha256(source).hexdigest()}"


def _function(func: Any, depth: int = 0) -> object:
    """Code, defaults and plain values of a function, or of an instance that can be called."""
    if depth > _DEEPEST:
        return "deeper"
    own = [] if hasattr(func, "__code__") else _value(getattr(func, "__dict__", {}))
    func = func if hasattr(func, "__code__") else getattr(type(func), "__call__", None)  # noqa: B004
    func = getattr(func, "__func__", func)
    code = getattr(func, "__code__", None)
    if code is None:
        return own
    cells = [_cell(cell, depth + 1) for cell in func.__closure__ or ()]
    return [_code(code), _value(func.__defaults__), _value(func.__kwdefaults__), cells, own]


def _code(code: CodeType) -> list[object]:
    constants = [_code(one) if isinstance(one, CodeType) else _value(one) for one in code.co_consts]
    return [code.co_code.hex(), code.co_names, code.co_varnames, constants]


def _cell(cell: Any, depth: int) -> object:
    try:
        content = cell.cell_contents
    except ValueError:  # not bound yet
        return "empty"
    return _function(content, depth) if hasattr(content, "__code__") else _value(content)


def _value(value: object, depth: int = 0) -> object:
    """A value whose repr is the same in every process; of any other object its type."""
    if isinstance(value, _PLAIN):
        return value
    if depth > _DEEPEST:  # it may hold itself
        return "deeper"
    if isinstance(value, list | tuple):
        return [_value(one, depth + 1) for one in value]
    if isinstance(value, set | frozenset):
        return sorted(repr(_value(one, depth + 1)) for one in value)
    if isinstance(value, dict):
        return sorted((repr(key), repr(_value(one, depth + 1))) for key, one in value.items())
    return type(value).__qualname__
