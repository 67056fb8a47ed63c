"""Operators and calls whose result a script's text tells: on texts, dicts, lists and flags."""

from __future__ import annotations

import ast
import builtins
import operator
from collections.abc import Callable
from typing import Any

from abacist.delivery.importing.values import (
    MAX_ITEMS,
    PLAIN,
    Instance,
    Made,
    Symbol,
    Table,
    Unknown,
    done,
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
    ast.Pow: operator.pow, ast.BitOr: operator.or_,
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
    if isinstance(op, ast.Mult | ast.Mod | ast.Pow):
        if isinstance(left, str) or isinstance(right, str):
            return Unknown(line)
        if isinstance(op, ast.Pow) and (abs(right or 0) > 64 or abs(left or 0) > 10**6):
            return Unknown(line, "is too large")
    return done(lambda: do(left, right), line)


def compared(op: ast.cmpop, left: Any, right: Any, line: int) -> Any:
    """The result of a comparison of constants."""
    if not is_plain(left) or not is_plain(right):
        return unknown_of(line, left, right)
    return done(lambda: _COMPARE[type(op)](left, right), line)


def of_symbol(
    called: Symbol, args: list[Any], kwargs: dict[str, Any], node: ast.Call
) -> list[Any] | None:
    """``[value]`` of a call of a few well-known functions."""
    if called.dotted in ("os.getenv", "os.environ.get"):
        default = args[1] if len(args) > 1 else kwargs.get("default")
        unknown = Unknown(node.lineno, "comes from the environment")
        return [default if default is not None else unknown]
    if called.dotted == "dict" and not args:
        table = Table(kwargs)
        table.lines = {one.arg: one.value.lineno for one in node.keywords if one.arg}
        return [table]
    if called.dotted in _PURE and not kwargs and is_plain(args):
        return [done(lambda: getattr(builtins, called.dotted)(*args), node.lineno)]
    if called.dotted in ("range", "list", "copy.deepcopy", "copy.copy") and len(args) == 1:
        return [args[0]] if called.dotted != "range" else None
    if called.last in ("SimpleNamespace", "Namespace"):
        return [Instance(Table(kwargs), None, node)]
    if called.last in ("asdict", "vars") and args and isinstance(args[0], Instance):
        return [args[0].fields]
    return None


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
        if name not in _TEXT_METHODS or not is_plain(args) or not is_plain(kwargs):
            return [Unknown(node.lineno)]
        given = sum(len(str(one)) for one in (*args, *kwargs.values()))
        if (len(owner) + 1) * (given + 1) > MAX_WORK or (
            name == "format" and not formats_narrowly(owner)
        ):
            return [Unknown(node.lineno, "is too large")]
        return [done(lambda: getattr(owner, name)(*args, **kwargs), node.lineno)]
    if isinstance(owner, dict):
        if name == "get" and args and isinstance(args[0], PLAIN):
            return [owner.get(args[0], args[1] if len(args) > 1 else None)]
        if name == "update":
            for other in (*args, kwargs):
                if isinstance(other, dict):
                    owner.update(other)
                    if isinstance(owner, Table):
                        owner.lines |= getattr(other, "lines", lines)
        return [Table(owner) if name == "copy" else None]
    if isinstance(owner, list):
        if name == "append" and args and len(owner) < MAX_ITEMS:
            owner.append(args[0])
        elif name == "extend" and args and isinstance(args[0], list):
            owner.extend(args[0][: MAX_ITEMS - len(owner)])
        return [None]
    if isinstance(owner, Made) and owner.name == "ArgumentParser" and name == "add_argument":
        _add_argument(owner, args, kwargs, lines, node)
        return [None]
    if isinstance(owner, Made) and owner.name == "ArgumentParser" and name in _PARSING:
        space = Instance(owner.kwargs.get("fields", Table()), None, node)
        return [space if name == "parse_args" else [space, []]]
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
