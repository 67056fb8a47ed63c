"""Branches that may be taken or not, and what goes round: statements with others in them."""

from __future__ import annotations

import ast
from collections.abc import Iterable, Iterator
from typing import Any

from abacist.delivery.importing.values import (
    CONDITION,
    PLAIN,
    REST,
    Class,
    Instance,
    Made,
    Scope,
    Table,
    Unknown,
    either,
    elements,
    options_of,
    unknown_of,
)
from abacist.delivery.importing.walker import Walker

_Contents = dict[Any, Any] | list[Any]


class Containers:
    """What the lists, dicts and objects that statements name hold before they run."""

    def __init__(self, statements: Iterable[ast.stmt], scope: Scope) -> None:
        held: dict[int, _Contents] = {}
        for statement in statements:
            for node in ast.walk(statement):
                if isinstance(node, ast.Name) and (found := scope.find(node.id)) is not None:
                    held |= {id(one): one for one in _contents(found.value)}
        self.held = list(held.values())
        self.before = self._now()

    def _now(self) -> list[_Contents]:
        return [list(one) if isinstance(one, list) else dict(one) for one in self.held]

    def put_back(self) -> list[_Contents]:
        """Undo what was changed; returns what they held until now."""
        now = self._now()
        for one, before in zip(self.held, self.before, strict=True):
            _fill(one, before)
        return now

    def join(self, other: list[_Contents], line: int, *, lists: bool = True) -> None:
        """Make what they hold now and what they hold in ``other`` a matter of the condition.

        Without ``lists``, what was put into a list stays in it.
        """
        for one, first in zip(self.held, other, strict=True):
            if lists or isinstance(one, dict):
                _fill(one, _joined(first, one, line))


def _contents(value: Any) -> Iterator[_Contents]:
    for one in options_of(value):
        match one:
            case list() | Table():
                yield one
            case Made(kwargs=kwargs):
                yield kwargs
            case Instance(fields=fields) | Class(fields=fields):
                yield fields
                for inner in fields.values():
                    if isinstance(inner, list | Table):
                        yield inner
                    elif isinstance(inner, Made):
                        yield inner.kwargs


def _joined(first: _Contents, second: _Contents, line: int) -> _Contents:
    if isinstance(first, list) and isinstance(second, list):
        shared = [either(line, one, other) for one, other in zip(first, second, strict=False)]
        rest = max(first, second, key=len)[len(shared) :]
        return shared + [either(line, one, None) for one in rest]
    assert isinstance(first, dict) and isinstance(second, dict)
    joined: dict[Any, Any] = {}
    for key in (*second, *(key for key in first if key not in second)):
        if key in first and key in second:
            joined[key] = either(line, first[key], second[key])
        else:
            only = first[key] if key in first else second[key]
            is_untold = isinstance(only, Unknown) and not only.options
            joined[key] = only if is_untold else Unknown(line, CONDITION, (*options_of(only), None))
    return joined


def _fill(container: _Contents, contents: _Contents) -> None:
    container.clear()
    if isinstance(container, list):
        container.extend(contents)
    else:
        container.update(contents)


def as_read(target: ast.expr) -> ast.expr:
    """The target of ``x += 1`` as the expression ``x``."""
    match target:
        case ast.Name():
            read: ast.expr = ast.Name(target.id, ast.Load())
        case ast.Attribute():
            read = ast.Attribute(target.value, target.attr, ast.Load())
        case ast.Subscript():
            read = ast.Subscript(target.value, target.slice, ast.Load())
        case _:
            return target
    return ast.copy_location(read, target)


def as_if(node: ast.Match) -> ast.stmt:
    """A ``match`` as the ``if`` that it stands for; most patterns are taken as not known."""
    rest: list[ast.stmt] = []
    for case in reversed(node.cases):
        test: ast.expr = ast.Name("", ast.Load())
        if case.guard is None and isinstance(case.pattern, ast.MatchValue):
            test = ast.Compare(node.subject, [ast.Eq()], [case.pattern.value])
        elif case.guard is None and isinstance(case.pattern, ast.MatchAs):
            test = ast.Constant(True) if case.pattern.pattern is None else test
        branch = ast.If(test, case.body, rest)
        ast.copy_location(test, case.pattern)
        rest = [ast.copy_location(branch, case.pattern)]
    return rest[0]


def comprehension(
    reader: Walker, node: ast.ListComp | ast.GeneratorExp | ast.DictComp, scope: Scope
) -> Any:
    """What a comprehension over a known list gives."""
    inner = Scope(outer=scope)
    made: list[tuple[Any, Any]] = []

    def go(at: int) -> Any:
        """Go through one ``for``; what keeps it from being read, or None."""
        if at == len(node.generators):
            if isinstance(node, ast.DictComp):
                made.append((reader.value(node.key, inner), reader.value(node.value, inner)))
            else:
                made.append((None, reader.value(node.elt, inner)))
            return None
        one = node.generators[at]
        items = elements(value := reader.value(one.iter, inner))
        if items is None:
            return unknown_of(node.lineno, value)
        for item in items:
            reader.bind(one.target, item, one.iter, inner)
            tests = [reader.is_true(test, inner) for test in one.ifs]
            if None in tests:
                return Unknown(node.lineno)
            if all(tests) and (unread := go(at + 1)) is not None:
                return unread
        return None

    if (unread := go(0)) is not None:
        return unread
    if isinstance(node, ast.DictComp):
        table = Table()
        for key, value in made:
            table.take({key if isinstance(key, PLAIN) else REST: value}, node.lineno)
        return table
    return [value for _, value in made]
