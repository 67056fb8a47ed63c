"""Calls in a script: of its own functions, which are followed, and of what is known or foreign."""

from __future__ import annotations

import ast
from collections.abc import Mapping
from typing import Any

from abacist.delivery.importing.known_calls import of_method, of_symbol
from abacist.delivery.importing.values import (
    MAX_ITEMS,
    REST,
    Binding,
    Class,
    Function,
    Instance,
    Made,
    Scope,
    Symbol,
    Table,
    Unknown,
    elements,
    one_of_returned,
    unknown_of,
    unwrapped,
)
from abacist.delivery.importing.walker import Walker

_PARSERS = ("HfArgumentParser", "TrlParser")
_PLAIN_BASES = ("object", "abc.ABC", "typing.NamedTuple")


def call(reader: Walker, node: ast.Call, scope: Scope) -> Any:
    """What a call gives; a call of something foreign is kept in ``reader.made``."""
    receiver: Any = None
    name = node.func.id if isinstance(node.func, ast.Name) else ""
    if isinstance(node.func, ast.Attribute):
        receiver, name = reader.value(node.func.value, scope), node.func.attr
        if isinstance(receiver, Symbol | Class | Instance):
            called = reader.attribute(receiver, name, node)
        else:
            called = None
    else:
        called = reader.value(node.func, scope)
    args, kwargs, lines = _arguments(reader, node, scope)
    called, args, kwargs = unwrapped(reader.resolved(called), args, kwargs)
    if isinstance(called, Function):
        return follow(reader, called, args, kwargs, node, lines)
    if isinstance(called, Class):
        return instance(reader, called, args, kwargs, lines, node)
    if isinstance(called, Symbol):
        if called.dotted in ("setattr", "getattr") and len(args) > 1:
            return _by_name(reader, called.dotted, args, node)
        known = of_symbol(called, args, kwargs, lines, node)
        if known is not None:
            return known[0]
        name, dotted = called.last, called.dotted
    elif isinstance(receiver, Made) and receiver.name in _PARSERS and name.startswith("parse"):
        return _parsed(reader, receiver, node)
    elif (known := of_method(receiver, name, args, kwargs, lines, node)) is not None:
        return known[0]
    else:
        dotted = name
    made = Made(name, dotted, args, kwargs, node, receiver, lines)
    reader.made.append(made)
    return made


def _by_name(reader: Walker, name: str, args: list[Any], node: ast.Call) -> Any:
    """``setattr`` and ``getattr``; a name that the text does not tell may be any."""
    owner, attribute = args[:2]
    if name == "setattr":
        value = args[2] if len(args) > 2 else Unknown(node.lineno)
        reader.set_attribute(owner, attribute, value, node.lineno)
        return None
    if not isinstance(attribute, str):
        return unknown_of(node.lineno, attribute)
    found = reader.attribute(owner, attribute, node)
    is_absent = isinstance(found, Unknown) and isinstance(owner, Instance | Class)
    return args[2] if is_absent and len(args) > 2 else found


def _arguments(
    reader: Walker, node: ast.Call, scope: Scope
) -> tuple[list[Any], dict[str, Any], dict[str, int]]:
    args: list[Any] = []
    for one in node.args:
        value = reader.value(one, scope)
        items = elements(value) if isinstance(one, ast.Starred) else None
        args += [value] if items is None else items[:MAX_ITEMS]
    given = Table()
    for keyword in node.keywords:
        value, line = reader.value(keyword.value, scope), keyword.value.lineno
        if keyword.arg is None:
            given.take(value.fields if isinstance(value, Instance) else value, line)
        else:
            given[keyword.arg] = value
            given.lines[keyword.arg] = line
    return args, {str(key): one for key, one in given.items()}, given.lines


def instance(
    reader: Walker,
    kind: Class,
    args: list[Any],
    kwargs: dict[str, Any],
    lines: dict[str, int],
    node: ast.Call,
) -> Any:
    """An object of a class of the script's own."""
    foreign = next((base for base in kind.bases if isinstance(base, Symbol)), None)
    if foreign is not None and foreign.dotted not in _PLAIN_BASES:
        # A subclass of a foreign class is that class, with other defaults.
        made = Made(
            foreign.last, foreign.dotted, args, {**kind.fields, **kwargs}, node, kind,
            {**kind.fields.lines, **lines},
        )  # fmt: skip
        reader.made.append(made)
        return made
    fields = Table(kind.fields)
    fields.lines = dict(kind.fields.lines)
    made_of = Instance(fields, kind, node)
    if (init := kind.methods.get("__init__")) is not None:
        follow(reader, init, [made_of, *args], kwargs, node)
        return made_of
    fields.update({**dict(zip(kind.fields, args, strict=False)), **kwargs})
    fields.lines |= lines
    return made_of


def _parsed(reader: Walker, parser: Made, node: ast.Call) -> Any:
    """What TRL's and transformers' parsers give when nothing is typed: the defaults."""
    kinds = parser.args[0] if parser.args else parser.kwargs.get("dataclass_types")
    kinds = kinds if isinstance(kinds, list | tuple) else [kinds]
    found: list[Any] = []
    for kind in kinds:
        if isinstance(kind, Class):
            found.append(instance(reader, kind, [], {}, {}, node))
        elif isinstance(kind, Symbol):
            made = Made(kind.last, kind.dotted, [], {REST: Unknown(
                node.lineno, "comes from the command line")}, node, parser)  # fmt: skip
            reader.made.append(made)
            found.append(made)
        else:
            found.append(Unknown(node.lineno))
    return found


def follow(
    reader: Walker,
    function: Function,
    args: list[Any],
    kwargs: dict[str, Any],
    at: ast.AST,
    lines: Mapping[str, int] | None = None,
) -> Any:
    """Walk the body of the script's own function with these arguments, given on these lines."""
    node, given = function.node, function.node.args
    with reader.deeper() as is_too_deep:
        if is_too_deep:
            return Unknown(getattr(at, "lineno", 0), "is nested too deeply")
        if function.owner is not None:
            args = [function.owner, *args]
        scope = Scope(outer=function.scope)
        parameters = [*given.posonlyargs, *given.args]
        names = [one.arg for one in (*parameters, *given.kwonlyargs)]
        for name in names:
            scope.names[name] = Binding(Unknown(node.lineno), node)
        by_default = [
            *zip(parameters[len(parameters) - len(given.defaults) :], given.defaults, strict=True),
            *zip(given.kwonlyargs, given.kw_defaults, strict=True),
        ]
        for parameter, default in by_default:
            if default is not None:
                value = reader.value(default, function.scope)
                scope.names[parameter.arg] = Binding(value, default)
        for parameter, value in zip(parameters, args, strict=False):
            scope.names[parameter.arg] = Binding(value, at)
        rest = Table()
        for name, value in kwargs.items():
            if name in names:
                scope.names[name] = Binding(value, at)
            else:
                rest.take({name: value}, (lines or {}).get(name, getattr(at, "lineno", 0)))
        if given.kwarg is not None:
            scope.names[given.kwarg.arg] = Binding(rest, at)
        if given.vararg is not None:
            scope.names[given.vararg.arg] = Binding(args[len(parameters) :], at)
        if isinstance(node, ast.Lambda):
            return reader.value(node.body, scope)
        returned = reader.walk(node.body, scope)
        found = None if returned is None else returned[0]
        for one in reversed(reader.returned[-1]):
            found = one_of_returned(node.lineno, one, found)
        return found
