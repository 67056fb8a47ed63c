"""Operators and calls whose result a script's text tells: on texts, dicts, lists and flags."""

from __future__ import annotations

import ast
import builtins
import operator
from collections.abc import Callable
from string import Formatter
from typing import Any

from abacist.delivery.importing.values import (
    MAX_ITEMS,
    MAX_TEXT,
    PLAIN,
    Instance,
    Made,
    Symbol,
    Table,
    Unknown,
    copied,
    done,
    elements,
    formats_narrowly,
    is_plain,
    unknown_of,
)

MAX_WORK = 10_000_000  # characters that one call may write

_TEXT_METHODS = {
    "strip", "lstrip", "rstrip", "lower", "upper", "title", "split", "rsplit", "replace", "format",
    "join", "startswith", "endswith", "removeprefix", "removesuffix", "partition", "rpartition",
}  # fmt: skip
_PARSING = ("parse_args", "parse_known_args")
_PURE = {"int", "float", "str", "bool", "len", "min", "max", "round", "abs", "list", "tuple", "sum"}

_BINARY: dict[type, Callable[[Any, Any], Any]] = {
    ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul,
    ast.Div: operator.truediv, ast.FloorDiv: operator.floordiv, ast.Mod: operator.mod,
    ast.Pow: operator.pow, ast.BitOr: operator.or_, ast.LShift: operator.lshift,
}  # fmt: skip
_COMPARE: dict[type, Callable[[Any, Any], Any]] = {
    ast.Eq: operator.eq, ast.NotEq: operator.ne, ast.Lt: operator.lt, ast.LtE: operator.le,
    ast.Gt: operator.gt, ast.GtE: operator.ge, ast.Is: operator.is_, ast.IsNot: operator.is_not,
    ast.In: lambda a, b: a in b, ast.NotIn: lambda a, b: a not in b,
}  # fmt: skip


def binary(op: ast.operator, left: Any, right: Any, line: int) -> Any:
    """The result of an operator on constants."""
    do = _BINARY.get(type(op))
    if do is None or not isinstance(left, PLAIN) or not isinstance(right, PLAIN):
        return unknown_of(line, left, right)
    if isinstance(op, ast.Mult | ast.Mod | ast.Pow | ast.LShift):
        if isinstance(left, str) or isinstance(right, str):
            return Unknown(line)
        is_growing = isinstance(op, ast.Pow | ast.LShift)
        if is_growing and (abs(right or 0) > 64 or abs(left or 0) > 10**6):
            return Unknown(line, "is too large")
    return done(lambda: do(left, right), line)


def compared(op: ast.cmpop, left: Any, right: Any, line: int) -> Any:
    """The result of a comparison of constants."""
    is_open = any(isinstance(one, Table) and elements(one) is None for one in (left, right))
    if is_open or not is_plain(left) or not is_plain(right):
        return unknown_of(line, left, right)
    return done(lambda: _COMPARE[type(op)](left, right), line)


def of_symbol(
    called: Symbol,
    args: list[Any],
    kwargs: dict[str, Any],
    lines: dict[str, int],
    node: ast.Call,
) -> list[Any] | None:
    """``[value]`` of a call of a few well-known functions."""
    line, first = node.lineno, args[0] if args else None
    match called.dotted:
        case "os.getenv" | "os.environ.get":
            default = args[1] if len(args) > 1 else kwargs.get("default")
            unknown = Unknown(line, "comes from the environment")
            return [default if default is not None else unknown]
        case "dict":
            table = Table()
            _update(table, args, kwargs, lines, line)
            return [table]
        case "dataclasses.replace" if args:
            changed = copied(first)
            if isinstance(changed, Made):
                changed.kwargs |= kwargs
                changed.lines |= lines
                return [changed]
            if isinstance(changed, Instance):
                changed.fields.take(kwargs, line)
                changed.fields.lines |= lines
                return [changed]
            return [unknown_of(line, first)]
        case "copy.deepcopy" | "copy.copy" if len(args) == 1:
            return [copied(first)]
        case "list" | "tuple" | "iter" if len(args) == 1 and (items := elements(first)) is not None:
            return [items]
        case "len" if len(args) == 1 and not isinstance(first, str):
            items = elements(first)
            return None if items is None or first is items else [len(items)]
        case "zip" | "enumerate" | "reversed":
            groups = [elements(one) for one in args]
            if not groups or None in groups or kwargs.keys() - {"strict"}:
                return None
            # A list, whose items have an order: what they hold need not be known.
            of_all: Any = getattr(builtins, called.dotted)(*groups)
            return [[list(one) if isinstance(one, tuple) else one for one in of_all]]
    if called.dotted in _PURE and not kwargs and is_plain(args):
        return [done(lambda: getattr(builtins, called.dotted)(*args), line)]
    if called.last in ("SimpleNamespace", "Namespace"):
        return [Instance(Table(kwargs), None, node)]
    if called.last in ("asdict", "vars") and isinstance(first, Instance):
        return [copied(first.fields) if called.last == "asdict" else first.fields]
    return None


def _update(
    table: Table, args: list[Any], kwargs: dict[str, Any], lines: dict[str, int], line: int
) -> None:
    """What ``dict`` and ``update`` do with their arguments."""
    for one in args:
        table.take(_pairs(one), line)
    table.take(kwargs, line)
    table.lines |= lines


def _pairs(value: Any) -> Any:
    """A list of keys with their values as a dict; anything else as it is."""
    if isinstance(value, list) and all(
        isinstance(one, list) and len(one) == 2 and isinstance(one[0], PLAIN) for one in value
    ):
        return {one[0]: one[1] for one in value}
    return value


def of_method(
    owner: Any,
    name: str,
    args: list[Any],
    kwargs: dict[str, Any],
    lines: dict[str, int],
    node: ast.Call,
) -> list[Any] | None:
    """``[value]`` of a method of a text, a dict, a list or a parser of arguments."""
    if isinstance(owner, str):
        return [_of_text(owner, name, args, kwargs, node)]
    if isinstance(owner, Table):
        return [_of_table(owner, name, args, kwargs, lines, node.lineno)]
    if isinstance(owner, list):
        return [of_list(owner, name, args, node.lineno)]
    if isinstance(owner, Made) and owner.name == "ArgumentParser" and name == "add_argument":
        _add_argument(owner, args, kwargs, lines, node)
        return [None]
    if isinstance(owner, Made) and owner.name == "ArgumentParser" and name in _PARSING:
        space = Instance(owner.kwargs.get("fields", Table()), None, node)
        return [space if name == "parse_args" else [space, []]]
    return None


def _of_text(owner: str, name: str, args: list[Any], kwargs: dict[str, Any], node: ast.Call) -> Any:
    if name not in _TEXT_METHODS:
        return Unknown(node.lineno)
    if not is_plain(args) or not is_plain(kwargs):
        return _text_around(owner, name, args, kwargs, node)
    given = sum(len(str(one)) for one in (*args, *kwargs.values()))
    if (len(owner) + 1) * (given + 1) > MAX_WORK or (
        name == "format" and not formats_narrowly(owner)
    ):
        return Unknown(node.lineno, "is too large")
    return done(lambda: getattr(owner, name)(*args, **kwargs), node.lineno)


def _text_around(
    owner: str, name: str, args: list[Any], kwargs: dict[str, Any], node: ast.Call
) -> Any:
    """A text with a column of the data set in it: by ``format``, ``replace`` or ``join``."""
    pieces: list[Any] = []
    unknown = unknown_of(node.lineno, *args, *kwargs.values())
    if name == "format":
        positions = iter(range(len(args)))
        try:
            for text, key, spec, _ in Formatter().parse(owner):
                pieces.append(text)
                if key is None:
                    continue
                at = next(positions, len(args)) if key == "" else key
                place = int(at) if str(at).isdecimal() else None
                if spec or (place is None and key not in kwargs) or (place or 0) >= len(args) > 0:
                    return unknown
                pieces.append(kwargs[key] if place is None else args[place])
        except (ValueError, IndexError):
            return unknown
    elif name == "replace" and len(args) == 2 and isinstance(args[0], str) and args[0]:
        for at, text in enumerate(owner.split(args[0])):
            pieces += [args[1], text] if at else [text]
    elif name == "join" and len(args) == 1 and isinstance(args[0], list):
        for at, one in enumerate(args[0]):
            pieces += [owner, one] if at else [one]
    else:
        return unknown
    return joined(pieces, node)


def joined(pieces: list[Any], node: ast.expr) -> Any:
    """Pieces of a text as a text, or, where some are foreign, as a Made called ``text``."""
    plain: list[Any] = []
    whole = [part for one in pieces for part in (one.args if _is_joined(one) else [one])]
    for one in whole:
        if not isinstance(one, (*PLAIN, Made)):
            return unknown_of(node.lineno, one)
        is_text = isinstance(one, PLAIN)
        if is_text and plain and isinstance(plain[-1], str):
            plain[-1] += str(one)
        elif one != "":
            plain.append(str(one) if is_text else one)
    if sum(len(one) for one in plain if isinstance(one, str)) > MAX_TEXT:
        return Unknown(node.lineno, "is too large")
    if len(plain) < 2 and not any(isinstance(one, Made) for one in plain):
        return plain[0] if plain else ""
    return Made("text", "text", plain[:MAX_ITEMS], {}, node)


def _is_joined(value: Any) -> bool:
    return isinstance(value, Made) and value.name == "text" and value.of is None


def _of_table(
    owner: Table,
    name: str,
    args: list[Any],
    kwargs: dict[str, Any],
    lines: dict[str, int],
    line: int,
) -> Any:
    key = args[0] if args else None
    match name:
        case "get" | "pop" | "setdefault" if isinstance(key, PLAIN):
            value = owner.look_up(key, line, args[1] if len(args) > 1 else kwargs.get("default"))
            if name == "pop":
                owner.pop(key, None)
            elif name == "setdefault" and key not in owner:
                owner.take({key: value}, line)
            return value
        case "update":
            _update(owner, args, kwargs, lines, line)
            return None
        case "clear":
            owner.clear()
            return None
        case "copy":
            return copied(owner)
        case "keys" | "values" | "items" if elements(owner) is not None:
            pairs = [[one, value] for one, value in owner.items()]
            return pairs if name == "items" else list(getattr(owner, name)())
        case "pop" | "popitem" | "setdefault":
            owner.take(None, line)
    return unknown_of(line, key)


def of_list(owner: list[Any], name: str, args: list[Any], line: int) -> Any:
    """What a method of a list gives, and does to it."""
    first = args[0] if args else None
    match name:
        case "append" if args and len(owner) < MAX_ITEMS:
            owner.append(first)
        case "extend" if args:
            items = elements(first)
            more = [unknown_of(line, first)] if items is None else items
            owner.extend(more[: MAX_ITEMS - len(owner)])
        case "insert" if len(args) == 2 and isinstance(first, int):
            owner.insert(first, args[1])
        case "remove" if args and any(one is first or one == first for one in owner):
            owner.remove(first)
        case "pop" if owner and (first is None or isinstance(first, int)):
            return done(lambda: owner.pop(-1 if first is None else first), line)
        case "clear" | "reverse":
            getattr(owner, name)()
        case "copy":
            return list(owner)
        case "index" | "count":
            return Unknown(line)
        case _:  # in an order, or with contents, that the text does not tell
            owner[:] = [Unknown(line)]
    return None


def _add_argument(
    parser: Made,
    args: list[Any],
    kwargs: dict[str, Any],
    lines: dict[str, int],
    node: ast.Call,
) -> None:
    fields = parser.kwargs.setdefault("fields", Table())
    flags = [one for one in args if isinstance(one, str)]
    if not flags:
        return
    longest = kwargs.get("dest") or max(flags, key=len).lstrip("-").replace("-", "_")
    action = kwargs.get("action")
    default: Any = Unknown(node.lineno, "comes from the command line")
    if action in ("store_true", "store_false"):
        default = action == "store_false"
    elif not flags[0].startswith("-") or kwargs.get("required") is True:
        kwargs = {}
    fields[str(longest)] = kwargs.get("default", default)
    fields.lines[str(longest)] = lines.get("default", node.lineno)
