"""Which of our rewards a reward function of a script is, by what its text does.

A name decides nothing: scripts rename the gist's five, and keep their names for others. What counts
is what a function looks for (tags it counts, patterns it matches, digits, a comparison with the
gold) and what it pays. A function that does anything else, or pays by degrees, is the script's own.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from abacist.delivery.importing.reader import Reader
from abacist.delivery.importing.reward_shapes import DIGITS, TAG, Shape, shape_of
from abacist.delivery.importing.values import Binding, Function, Made, Scope, Symbol, Unknown

MAX_FOLLOWED = 30
GOLD_MARK = "####"

OUR_TAG_NAMES = {"reasoning", "answer"}
# What TRL gives to every reward function; any other parameter is a column.
_TRLS = {
    "prompts", "completions", "completion_ids", "trainer_state", "log_extra", "log_metric", "self",
    "kwargs",
}  # fmt: skip
_MATCHING = {"match", "search", "fullmatch", "findall", "finditer"}
GIST_NAMES = {
    "correctness": "correctness_reward_func",
    "integer": "int_reward_func",
    "strict_format": "strict_format_reward_func",
    "soft_format": "soft_format_reward_func",
    "xml_count": "xmlcount_reward_func",
}


# Expressions that are worked out where a reward binds a name: no call of the script's own.
_TOLD = (ast.Constant, ast.JoinedStr, ast.BinOp, ast.Name, ast.Call)


@dataclass
class Pattern:
    """A regular expression that a reward matches."""

    text: str
    method: str
    line: int
    is_dotall: bool

    @property
    def stops_at_lines(self) -> bool:
        """Whether its dots do not match a line break."""
        without = re.sub(r"\\.|\[[^\]]*\]", "", self.text)
        return "." in without and not self.is_dotall

    @property
    def is_whole(self) -> bool:
        """Whether it must match the whole reply."""
        begins = self.text.startswith(("^", r"\A")) or self.method in ("match", "fullmatch")
        return self.method == "fullmatch" or (begins and self.text.endswith(("$", r"\Z")))


@dataclass
class Looks:
    """What the text of a function, and of those it calls, shows."""

    function: Function
    patterns: list[Pattern] = field(default_factory=list)
    texts: list[tuple[str, int]] = field(default_factory=list)
    counted: list[tuple[str, int]] = field(default_factory=list)
    digits: list[int] = field(default_factory=list)
    splits_at: list[tuple[str, int]] = field(default_factory=list)
    evaluates: list[int] = field(default_factory=list)
    #: lines that look for ####
    marks: list[int] = field(default_factory=list)
    #: whether it reads the content of a message, tells texts from messages (by isinstance), and
    #: hands on what is not followed
    reads_messages: bool = False
    tells_types: bool = False
    hands_on: bool = False
    uses_foreign: bool = False
    shape: Shape | None = None

    @property
    def tags(self) -> set[str]:
        """The names of the tags that it looks for."""
        texts = [text for text, _ in self.texts] + [pattern.text for pattern in self.patterns]
        return {name for text in texts for name in TAG.findall(text)}


@dataclass(frozen=True)
class Recognised:
    """A reward that is one of ours: its name here, and the factor that its pay asks for."""

    name: str
    weight: float
    is_historic: bool
    is_our_format: bool


def look_at(function: Function, reader: Reader) -> Looks:
    """Everything that the function's text shows, and that of the functions it calls."""
    looks = Looks(function)
    waiting = [function]
    known: set[int] = set()
    while waiting and len(known) < MAX_FOLLOWED:
        one = waiting.pop(0)
        if id(one.node) in known:
            continue
        known.add(id(one.node))
        waiting += _look(one, looks, reader)
    looks.shape = shape_of(function, [*columns_of(function)], reader)
    return looks


def columns_of(function: Function) -> dict[str, bool]:
    """The columns of the data set that a reward asks for by name, and whether it has a default."""
    node = function.node.args
    names = [one.arg for one in (*node.posonlyargs, *node.args)]
    by_default = dict.fromkeys(names, False)
    by_default |= dict.fromkeys(names[len(names) - len(node.defaults) :], True)
    by_default |= {
        one.arg: default is not None
        for one, default in zip(node.kwonlyargs, node.kw_defaults, strict=True)
    }
    return {name: has for name, has in by_default.items() if name not in _TRLS}


def recognise(looks: Looks) -> Recognised | None:
    """Which of our rewards it is, or None for one of the script's own."""
    shape = looks.shape
    if looks.uses_foreign or looks.evaluates or shape is None:
        return None
    return Recognised(shape.name, shape.weight, shape.is_historic, looks.tags <= OUR_TAG_NAMES)


def _look(one: Function, looks: Looks, reader: Reader) -> list[Function]:
    """Add what one function shows; returns the script's functions that it names."""
    scope, called = _inner_scope(one, reader), []
    for node in _nodes(one.node):
        match node:
            case ast.Constant(value=str() as text):
                _look_at_text(text, node.lineno, looks)
            case ast.Name(id=name) if isinstance(node.ctx, ast.Load):
                found = scope.find(name)
                if found is not None and isinstance(found.value, Function):
                    called.append(found.value)
                elif found is not None and isinstance(found.value, str):
                    _look_at_text(found.value, node.lineno, looks)
                elif found is not None and isinstance(found.value, Made):
                    for text in (one for one in found.value.args if isinstance(one, str)):
                        looks.marks += [node.lineno] if GOLD_MARK in text else []
                elif found is not None and isinstance(found.value, Symbol):
                    top = found.value.dotted.partition(".")[0]
                    is_known = top in ("re", "regex", "typing", "math")
                    looks.uses_foreign |= not is_known
                    looks.hands_on |= not is_known
            case ast.Call():
                _look_at_call(node, looks, reader, scope)
    return called


def _look_at_text(text: str, line: int, looks: Looks) -> None:
    looks.texts += [(text, line)] if TAG.search(text) else []
    looks.marks += [line] if GOLD_MARK in text else []
    looks.reads_messages |= text == "content"


def _inner_scope(function: Function, reader: Reader) -> Scope:
    """The scope of the body: parameters are not known, texts and patterns bound once are."""
    scope = Scope(outer=function.scope)
    line = function.node.lineno
    for argument in ast.walk(function.node.args):
        if isinstance(argument, ast.arg):
            scope.names[argument.arg] = Binding(Unknown(line), argument)
    for node in _nodes(function.node):
        match node:
            case ast.Assign(targets=[ast.Name(id=name)], value=value):
                is_told = name not in scope.names and isinstance(value, _TOLD)
                found = reader.value(value, scope) if is_told else Unknown(node.lineno)
                scope.names[name] = Binding(found, value)
            case ast.Name(id=name, ctx=ast.Store()) if name not in scope.names:
                scope.names[name] = Binding(Unknown(node.lineno), node)
    return scope


def _look_at_call(node: ast.Call, looks: Looks, reader: Reader, scope: Scope) -> None:
    func = node.func
    if isinstance(func, ast.Name):
        looks.evaluates += [node.lineno] if func.id in ("eval", "exec") else []
        looks.tells_types |= func.id == "isinstance"
        looks.uses_foreign |= func.id in ("float", "open", "abs")
        return
    if not isinstance(func, ast.Attribute):
        return
    first = reader.value(node.args[0], scope) if node.args else None
    if func.attr == "count" and isinstance(first, str):
        looks.counted.append((first, node.lineno))
    elif func.attr in ("split", "partition", "rpartition") and isinstance(first, str):
        looks.splits_at += [(first, node.lineno)] if TAG.search(first) else []
    elif func.attr in DIGITS:
        looks.digits.append(node.lineno)
    elif func.attr in _MATCHING:
        _look_at_match(node, func, first, looks, reader, scope)


def _look_at_match(
    node: ast.Call, func: ast.Attribute, first: Any, looks: Looks, reader: Reader, scope: Scope
) -> None:
    owner = reader.value(func.value, scope)
    if isinstance(owner, Made) and owner.name == "compile" and owner.args:
        text, flags = owner.args[0], [ast.unparse(one) for one in _flag_nodes(owner.node)]
    else:
        text, flags = first, [ast.unparse(one) for one in _flag_nodes(node)]
    if isinstance(text, str) and len(text) < 2_000:
        joined = " ".join(flags)
        is_dotall = (
            bool(re.search(r"\b(DOTALL|S)\b", joined)) or "(?s" in text or "[\\s\\S]" in text
        )
        looks.patterns.append(Pattern(text, func.attr, node.lineno, is_dotall))


def _flag_nodes(call: ast.AST) -> list[ast.expr]:
    if not isinstance(call, ast.Call):
        return []
    return [*call.args[1:], *(one.value for one in call.keywords if one.arg == "flags")]


def _nodes(node: ast.AST) -> Iterator[ast.AST]:
    """The nodes of a function's body in order, nested ones included, docstrings left out."""
    body = node.body if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) else [node]
    for statement in body if isinstance(body, list) else [body]:
        is_docstring = isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant)
        if not is_docstring:
            yield from ast.walk(statement)
