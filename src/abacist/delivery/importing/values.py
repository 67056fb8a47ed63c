"""What a name in a script can stand for, as far as its text tells.

Constants stand for themselves. What a call of something foreign gives is a :class:`Made`, a name of
another module a :class:`Symbol`, and what depends on the machine, the command line or a file is
:class:`Unknown`.
"""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from string import Formatter
from typing import Any

MAX_DEPTH = 60  # of calls and of nested expressions
MAX_TEXT = 100_000
MAX_NUMBER = 10**30
MAX_ITEMS = 2_000
MAX_PLAIN = 20_000
MAX_OPTIONS = 8


@dataclass(frozen=True, eq=False)
class Unknown:
    """A value that the text does not tell; ``options`` are those that a condition decides on."""

    line: int
    why: str = "is computed when the script runs"
    options: tuple[Any, ...] = ()


CONDITION = "depends on a condition that is known when the script runs"
REST = "**"  # the key of settings whose names the text does not tell


def either(line: int, first: Any, second: Any) -> Any:
    """One of two values, by a condition that is not known: what both are alike is known."""
    if first is second or (is_plain(first) and is_plain(second) and first == second):
        return first
    return Unknown(line, CONDITION, (*options_of(first), *options_of(second))[:MAX_OPTIONS])


def one_of_returned(line: int, first: Any, second: Any) -> Any:
    """What a function gives that returns one or the other, by a condition that is not known.

    A value that is made of a row is what the function is for: the other is for rows without one.
    """
    for one in (second, first):
        if column_of(one) is not None:
            return one
    return either(line, first, second)


def options_of(value: Any) -> tuple[Any, ...]:
    """What a value may be: itself, or the values that a condition decides on."""
    return value.options if isinstance(value, Unknown) and value.options else (value,)


@dataclass(frozen=True)
class Symbol:
    """A name of another module, as ``torch.bfloat16``."""

    dotted: str

    @property
    def last(self) -> str:
        return self.dotted.rpartition(".")[2]


@dataclass(eq=False)
class Made:
    """What a call of something that is not the script's own gives.

    ``of`` is what a method was called on. ``name`` is the last part of what was called; indexing is
    called ``[]``, an attribute ``.name``.
    """

    name: str
    dotted: str
    args: list[Any]
    kwargs: dict[str, Any]
    node: ast.AST
    of: Any = None
    #: lines of the keyword arguments, and attributes that are set later
    lines: dict[str, int] = field(default_factory=dict)

    @property
    def line(self) -> int:
        return getattr(self.node, "lineno", 0)

    def chain(self) -> Iterable[Made]:
        """This, what it was called on, and so on."""
        at: Any = self
        for _ in range(MAX_DEPTH):
            if not isinstance(at, Made):
                return
            yield at
            at = at.of


ROW = Made("row", "row", [], {}, ast.Pass(lineno=0))  # a row of the data set


def column_of(value: Any) -> str | None:
    """The column of a row that a value was made from."""
    if isinstance(value, Made):
        if value.name == "text":
            return next((found for part in value.args if (found := column_of(part))), None)
        for step in value.chain():
            if step.of is ROW and step.name in ("[]", "get") and step.args:
                return str(step.args[0])
        for one in (*value.args, *value.kwargs.values()):
            if (found := column_of(one)) is not None:
                return found
    return None


def is_column(value: Any) -> bool:
    """Whether a value is a column of the data set as it stands."""
    return isinstance(value, Made) and value.of is ROW


class Table(dict[Any, Any]):
    """A dict that knows the line of each value.

    One that stands for a row of a data set has a ``column``, which gives what is not set in it.
    """

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.lines: dict[Any, int] = {}
        self.column: Callable[[Any], Any] | None = None

    def __missing__(self, key: Any) -> Any:
        if self.column is None:
            raise KeyError(key)
        return self.column(key)

    def take(self, other: Any, line: int) -> None:
        """Take over what another dict holds; of anything else the names are not known."""
        options = options_of(other)
        if len(options) > 1 and all(isinstance(one, Table) for one in options):
            names = dict.fromkeys(name for one in options for name in one)
            other = {
                name: Unknown(line, CONDITION, tuple(one.get(name) for one in options))
                for name in names
            }
        if not isinstance(other, dict):
            other = {REST: unknown_of(line, other)}
        self.update(other)
        self.lines |= dict.fromkeys(other, line) | getattr(other, "lines", {})
        self.column = getattr(other, "column", None) or self.column

    def look_up(self, key: Any, line: int, default: Any) -> Any:
        """The value of a key, ``default`` where it is absent, Unknown where it may be either."""
        if key in self or self.column is not None:
            return self[key]
        return Unknown(line) if REST in self else default


@dataclass(eq=False)
class Binding:
    """What a name is bound to, and the expression or statement that bound it."""

    value: Any
    node: ast.AST


@dataclass(eq=False)
class Scope:
    """Names, and the scope around it."""

    names: dict[str, Binding] = field(default_factory=dict)
    outer: Scope | None = None

    def find(self, name: str) -> Binding | None:
        scope: Scope | None = self
        while scope is not None:
            if name in scope.names:
                return scope.names[name]
            scope = scope.outer
        return None


@dataclass(eq=False)
class Function:
    """A function of the script's own, with the scope that it closes over.

    ``of_class`` is the class of a method, and ``owner`` the object that it was asked of.
    """

    node: ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda
    scope: Scope
    of_class: str = ""
    owner: Any = None

    @property
    def name(self) -> str:
        return f"lambda_of_line_{self.node.lineno}" if self.is_lambda else self.node.name  # type: ignore[union-attr]

    @property
    def is_lambda(self) -> bool:
        return isinstance(self.node, ast.Lambda)


@dataclass(eq=False)
class Class:
    """A class of the script's own: its bases, its fields with their defaults, its methods."""

    node: ast.ClassDef
    bases: list[Any]
    fields: Table
    methods: dict[str, Function] = field(default_factory=dict)


@dataclass(eq=False)
class Instance:
    """An object of a class of the script's own, or a namespace of arguments."""

    fields: Table
    kind: Class | None = None
    node: ast.AST | None = None


def copied(value: Any) -> Any:
    """A container of its own with the same contents; any other value as it is."""
    match value:
        case Table():
            table = Table()
            table.take(value, 0)
            return table
        case list():
            return list(value)
        case Made():
            return replace(value, args=[*value.args], kwargs=dict(value.kwargs),
                           lines=dict(value.lines))  # fmt: skip
        case Instance():
            return replace(value, fields=copied(value.fields))
    return value


def unwrapped(
    value: Any, args: list[Any], kwargs: dict[str, Any]
) -> tuple[Any, list[Any], dict[str, Any]]:
    """What ``functools.partial`` calls, with all its arguments; anything else as it is."""
    while isinstance(value, Made) and value.dotted in PARTIALS and value.args:
        args, kwargs = [*value.args[1:], *args], value.kwargs | kwargs
        value = value.args[0]
    return value, args, kwargs


PARTIALS = ("functools.partial",)
PLAIN = (str, int, float, bool, type(None))


def elements(value: Any) -> list[Any] | None:
    """What a loop over a value goes through, or None where the text does not tell."""
    match value:
        case list() | tuple():
            return list(value)
        case Table() if value.column is None and REST not in value:
            return list(value)
        case Made(name="range", args=args) if args and all(type(one) is int for one in args):
            numbers = done(lambda: range(*args), value.line)
            return list(numbers) if isinstance(numbers, range) and len(numbers) < 1000 else None
    return None


def is_plain(value: Any) -> bool:
    """Whether a value is made of constants alone, and of no more than can be worked with."""
    waiting, seen = [value], 0
    while waiting:
        one = waiting.pop()
        seen += 1
        # Lists may hold each other, and then what they spell out has no end.
        if seen > MAX_PLAIN:
            return False
        if isinstance(one, list | tuple):
            waiting += one
        elif isinstance(one, dict):
            waiting += one.values()
        elif not isinstance(one, PLAIN):
            return False
    return True


def unknown_of(line: int, *values: Any) -> Unknown:
    """The first of ``values`` that is unknown, with its reason, or a new Unknown."""
    return next((one for one in values if isinstance(one, Unknown)), Unknown(line))


def bounded(value: Any, line: int) -> Any:
    """``value``, or Unknown where it is too large to be worked with."""
    is_long = isinstance(value, str | list | tuple) and len(value) > MAX_TEXT
    is_large = isinstance(value, int) and abs(value) > MAX_NUMBER
    return Unknown(line, "is too large") if is_long or is_large else value


def done(do: Callable[[], Any], line: int) -> Any:
    """A bounded result of ``do``, or Unknown where it fails."""
    try:
        return bounded(do(), line)
    except Exception:  # whatever operators and formats raise on values that do not fit
        return Unknown(line)


def formats_narrowly(template: str) -> bool:
    """Whether every width in a template of ``format`` stands in it, and is none of thousands."""
    try:
        specs = [spec for _, _, spec, _ in Formatter().parse(template) if spec]
    except ValueError:
        return False
    return not any("{" in spec or pads_widely(spec) for spec in specs)


def pads_widely(spec: str) -> bool:
    """Whether a format asks for a width of thousands: one of a billion would fill the memory."""
    return any(
        len(digits) > 3 for digits in "".join(one if one.isdigit() else " " for one in spec).split()
    )
