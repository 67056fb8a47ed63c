"""What a name in a script can stand for, as far as its text tells.

Constants stand for themselves. What a call of something foreign gives is a :class:`Made`, a name of
another module a :class:`Symbol`, and what depends on the machine, the command line or a file is
:class:`Unknown`.
"""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from string import Formatter
from typing import Any

MAX_DEPTH = 60  # of calls and of nested expressions
MAX_TEXT = 100_000
MAX_NUMBER = 10**30
MAX_ITEMS = 2_000
MAX_PLAIN = 20_000


@dataclass(frozen=True, eq=False)
class Unknown:
    """A value that the text does not tell."""

    line: int
    why: str = "is computed when the script runs"


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


class Table(dict[Any, Any]):
    """A dict literal that knows the line of each value."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.lines: dict[Any, int] = {}


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
    """A function of the script's own, with the scope that it closes over."""

    node: ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda
    scope: Scope

    @property
    def name(self) -> str:
        return f"lambda_of_line_{self.node.lineno}" if self.is_lambda else self.node.name  # type: ignore[union-attr]

    @property
    def is_lambda(self) -> bool:
        return isinstance(self.node, ast.Lambda)


@dataclass(eq=False)
class Class:
    """A class of the script's own: its bases, and its fields with their defaults."""

    node: ast.ClassDef
    bases: list[Any]
    fields: Table


@dataclass(eq=False)
class Instance:
    """An object of a class of the script's own, or a namespace of arguments."""

    fields: Table
    kind: Class | None = None
    node: ast.AST | None = None


PLAIN = (str, int, float, bool, type(None))


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
