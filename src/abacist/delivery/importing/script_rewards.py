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
from abacist.delivery.importing.values import Binding, Function, Made, Scope, Symbol, Unknown
from abacist.task.reply import TAGS

MAX_FOLLOWED = 30

TAG = re.compile(r"</?([A-Za-z][\w-]{0,40})>")
OUR_TAG_NAMES = {"reasoning", "answer"}
# What TRL gives to every reward function; any other parameter is a column.
_TRLS = {
    "prompts", "completions", "completion_ids", "trainer_state", "log_extra", "log_metric", "self",
    "kwargs",
}  # fmt: skip
_MATCHING = {"match", "search", "fullmatch", "findall", "finditer"}
_DIGITS = {"isdigit", "isnumeric", "isdecimal"}
_HISTORIC = {
    "strict_format": r"^<reasoning>\n.*?\n</reasoning>\n<answer>\n.*?\n</answer>\n$",
    "soft_format": r"<reasoning>.*?</reasoning>\s*<answer>.*?</answer>",
}
#: What each of ours pays at the most where it pays all or nothing.
MAXIMA = {"correctness": 2.0, "integer": 0.5, "strict_format": 0.5, "soft_format": 0.5}
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
    functions: list[Function] = field(default_factory=list)
    patterns: list[Pattern] = field(default_factory=list)
    texts: list[tuple[str, int]] = field(default_factory=list)
    counted: list[tuple[str, int]] = field(default_factory=list)
    digits: list[int] = field(default_factory=list)
    gold_equals: list[int] = field(default_factory=list)
    splits_at: list[tuple[str, int]] = field(default_factory=list)
    evaluates: list[int] = field(default_factory=list)
    reads_int: bool = False
    uses_gold: bool = False
    uses_foreign: bool = False
    paid: list[float] = field(default_factory=list)

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
        looks.functions.append(one)
        waiting += _look(one, looks, reader, is_reward=one is function)
    looks.paid = _paid(function, reader)
    return looks


def columns_of(function: Function) -> list[str]:
    """The columns of the data set that a reward function asks for by name."""
    node = function.node.args
    names = [one.arg for one in (*node.posonlyargs, *node.args, *node.kwonlyargs)]
    return [name for name in names if name not in _TRLS]


def recognise(looks: Looks) -> Recognised | None:
    """Which of our rewards it is, or None for one of the script's own."""
    if looks.uses_foreign or looks.evaluates:
        return None
    name = _kind(looks)
    if name is None:
        return None
    is_ours = looks.tags <= OUR_TAG_NAMES
    if name == "xml_count":
        quarter = max((value for value in looks.paid if 0.05 <= value <= 1), default=0.125)
        is_historic = quarter == 0.125 and _has_penalty(looks)
        return Recognised(name, quarter / 0.125, is_historic, is_ours)
    steps = sorted(set(looks.paid))
    if len(steps) != 2:
        return None
    weight = (steps[1] - steps[0]) / MAXIMA[name]
    is_historic = steps == [0.0, MAXIMA[name]] and _is_historic(name, looks)
    return Recognised(name, weight, is_historic, is_ours)


def _kind(looks: Looks) -> str | None:
    counted = {tag[0] for text, _ in looks.counted for tag in TAG.finditer(text)}
    if len(counted) >= 3 and not looks.uses_gold:
        return "xml_count"
    both = [one for one in looks.patterns if len(set(TAG.findall(one.text))) > 1]
    if both and not looks.uses_gold and not looks.digits:
        breaks = "\n" in both[0].text or r"\n" in both[0].text
        return "strict_format" if both[0].is_whole and breaks else "soft_format"
    if looks.gold_equals:
        return "correctness"
    if (looks.digits or looks.reads_int) and not looks.uses_gold:
        return "integer"
    return None


def _is_historic(name: str, looks: Looks) -> bool:
    if name in _HISTORIC:
        (first, *others) = looks.patterns
        plain = first.text.replace("\n", r"\n")
        return (
            plain == _HISTORIC[name]
            and first.method == "match"
            and not first.is_dotall
            and (not others)
        )
    ends = {text for text, _ in looks.splits_at}
    return ends == {"<answer>", "</answer>"} and not looks.patterns


def _has_penalty(looks: Looks) -> bool:
    return 0.001 in looks.paid and {text.strip("\n") for text, _ in looks.counted} == set(TAGS)


def _look(one: Function, looks: Looks, reader: Reader, *, is_reward: bool) -> list[Function]:
    """Add what one function shows; returns the script's functions that it names."""
    golds = set(columns_of(one)) if is_reward else set()
    scope, called = _inner_scope(one, reader), []
    gold_names = set(golds)
    for node in _nodes(one.node):
        match node:
            case ast.Constant(value=str() as text) if TAG.search(text):
                looks.texts.append((text, node.lineno))
            case ast.Name(id=name) if isinstance(node.ctx, ast.Load):
                looks.uses_gold |= name in golds
                found = scope.find(name)
                if found is not None and isinstance(found.value, Function):
                    called.append(found.value)
                elif found is not None and isinstance(found.value, str):
                    if TAG.search(found.value):
                        looks.texts.append((found.value, node.lineno))
                elif found is not None and isinstance(found.value, Symbol):
                    top = found.value.dotted.partition(".")[0]
                    looks.uses_foreign |= top not in ("re", "regex", "typing", "math")
            case ast.comprehension(target=target, iter=source):
                gold_names |= _names_bound_to_gold(target, source, gold_names)
            case ast.For(target=target, iter=source):
                gold_names |= _names_bound_to_gold(target, source, gold_names)
            case ast.Call():
                _look_at_call(node, looks, reader, scope)
    for node in _nodes(one.node):
        if isinstance(node, ast.Compare) and isinstance(node.ops[0], ast.Eq | ast.NotEq):
            sides = {part.id for part in ast.walk(node) if isinstance(part, ast.Name)}
            if sides & gold_names:
                looks.gold_equals.append(node.lineno)
        if isinstance(node, ast.Subscript) and _is_gold_of_kwargs(node):
            looks.uses_gold = True
    return called


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
        looks.reads_int |= func.id == "int"
        looks.uses_foreign |= func.id in ("float", "open", "abs")
        return
    if not isinstance(func, ast.Attribute):
        return
    first = reader.value(node.args[0], scope) if node.args else None
    if func.attr == "count" and isinstance(first, str):
        looks.counted.append((first, node.lineno))
    elif func.attr in ("split", "partition", "rpartition") and isinstance(first, str):
        looks.splits_at += [(first, node.lineno)] if TAG.search(first) else []
    elif func.attr in _DIGITS:
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


def _names_bound_to_gold(target: ast.AST, source: ast.AST, golds: set[str]) -> set[str]:
    """Loop variables that stand for golds: of ``for r, a in zip(texts, answer)`` it is ``a``."""
    if isinstance(source, ast.Name) and source.id in golds and isinstance(target, ast.Name):
        return {target.id}
    if not isinstance(source, ast.Call) or not isinstance(target, ast.Tuple):
        return set()
    parts: list[ast.AST] = list(target.elts)
    is_counted = isinstance(source.func, ast.Name) and source.func.id == "enumerate"
    if is_counted and len(parts) == 2 and source.args:
        return _names_bound_to_gold(parts[1], source.args[0], golds)
    return {
        part.id
        for part, one in zip(parts, source.args, strict=False)
        if isinstance(part, ast.Name)
        and any(isinstance(name, ast.Name) and name.id in golds for name in ast.walk(one))
    }


def _is_gold_of_kwargs(node: ast.Subscript) -> bool:
    key = node.slice
    return (
        isinstance(node.value, ast.Name)
        and node.value.id in ("kwargs", "columns", "kw")
        and isinstance(key, ast.Constant)
        and isinstance(key.value, str)
    )


def _nodes(node: ast.AST) -> Iterator[ast.AST]:
    """The nodes of a function's body in order, nested ones included, docstrings left out."""
    body = node.body if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) else [node]
    for statement in body if isinstance(body, list) else [body]:
        is_docstring = isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant)
        if not is_docstring:
            yield from ast.walk(statement)


def _paid(function: Function, reader: Reader) -> list[float]:
    """The numbers that a reward may pay for one completion."""
    found: list[float] = []
    for one in [function, *_helpers(function)]:
        scope = _inner_scope(one, reader)
        for node in _nodes(one.node):
            spots: list[ast.expr] = []
            match node:
                case ast.IfExp():
                    spots = [node.body, node.orelse]
                case ast.Return(value=ast.expr() as value):
                    spots = [value]
                case ast.Call(func=ast.Attribute(attr="append")):
                    spots = list(node.args)
                case ast.AugAssign() | ast.Assign():
                    spots = [*_factors(node.value)]
                case ast.ListComp(elt=ast.BinOp()):
                    spots = [*_factors(node.elt)]
                case ast.BinOp(op=ast.Mult()) if not isinstance(node.left, ast.List):
                    spots = [node.left, node.right]
            for spot in spots:
                value = reader.value(spot, scope)
                if isinstance(value, int | float) and not isinstance(value, bool):
                    found.append(float(value))
    return _with_nothing(found, function)


def _with_nothing(found: list[float], function: Function) -> list[float]:
    """``2.0 * (a == b)`` pays 0 too, though no 0 stands there."""
    multiplies = any(
        isinstance(node, ast.BinOp)
        and isinstance(node.op, ast.Mult)
        and any(isinstance(part, ast.Compare | ast.Call) for part in (node.left, node.right))
        for node in _nodes(function.node)
    )
    return [*found, 0.0] if multiplies else found


def _factors(node: ast.expr) -> Iterator[ast.expr]:
    if isinstance(node, ast.BinOp):
        yield from (node.left, node.right)
    else:
        yield node


def _helpers(function: Function) -> list[Function]:
    """Functions of the script's that it calls and that return a number, as count_xml does."""
    found = []
    for node in _nodes(function.node):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            binding = function.scope.find(node.func.id)
            if binding is not None and isinstance(binding.value, Function):
                found.append(binding.value)
    return found[:MAX_FOLLOWED]
