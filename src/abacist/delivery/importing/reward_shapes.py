"""The one shape in which a reward of a script is taken for one of ours.

What is paid for a completion must be ``X if COND else Y`` or ``X * COND``, with X above Y, and COND
one condition: the reply's text equals the gold, is digits, or matches a pattern. The tag count has
a shape of its own. Whatever is not read completely is the script's own.
"""

from __future__ import annotations

import ast
import copy
import re
from collections.abc import Sequence
from dataclasses import dataclass

from abacist.delivery.importing.matching import match_of
from abacist.delivery.importing.reader import Reader
from abacist.delivery.importing.values import Function
from abacist.task.reply import TAGS

MAX_NODES = 2_000  # of an expression whose names are written out
MAX_INLINED = 5

TAG = re.compile(r"</?([A-Za-z][\w-]{0,40})>")
DIGITS = {"isdigit", "isnumeric", "isdecimal"}
_REPLY = "REPLY"
_COLUMN = "COLUMN "  # no name of a script has a space
_SAME_TEXT = {"strip", "lstrip", "rstrip", "removeprefix", "removesuffix", "replace"}
_PARTS = {"split", "rsplit", "partition", "rpartition"}
# What may stand between the tags of a pattern: more asks for more than the layout.
_BETWEEN = re.compile(
    r"(?:\\[sSnAZ]|\[\\s\\S\]|\[\\S\\s\]|\[\\s\]|\[\^<\]|\(\?s\)|\(\?:|[.*+?()^$\s])*"
)
_PENALTY = 0.001
_QUARTER = 0.125
_HISTORIC_TEXT = f"{_REPLY}.split('<answer>')[-1].split('</answer>')[0].strip()"
_HISTORIC_PATTERNS = {
    "strict_format": r"^<reasoning>\n.*?\n</reasoning>\n<answer>\n.*?\n</answer>\n$",
    "soft_format": r"<reasoning>.*?</reasoning>\s*<answer>.*?</answer>",
}
_HISTORIC_COUNTS = [
    ("<reasoning>\n", None),
    ("\n</reasoning>\n", None),
    ("\n<answer>\n", ("\n</answer>\n", 0, _PENALTY)),
    ("\n</answer>", ("\n</answer>", 1, _PENALTY)),
]
MAXIMA = {"correctness": 2.0, "integer": 0.5, "strict_format": 0.5, "soft_format": 0.5}


@dataclass(frozen=True)
class Shape:
    """Which of ours a reward is, the factor of its pay, the line of its condition, and whether it
    is the gist's own function, letter for letter in what it does."""

    name: str
    weight: float
    line: int
    is_historic: bool
    has_penalty: bool = False


class _NotOurs(Exception):
    """The text does anything that the shapes do not have."""


@dataclass
class _Each:
    """A list by its element: one expression for every completion."""

    element: ast.expr


_Env = dict[str, "ast.expr | _Each | None"]  # None: a value that cannot be written out


def shape_of(function: Function, columns: Sequence[str], reader: Reader) -> Shape | None:
    """Which of ours a reward function is, or None for one of the script's own."""
    try:
        return _Shapes(function, reader).of(columns)
    except _NotOurs:
        return None


class _Shapes:
    def __init__(self, function: Function, reader: Reader) -> None:
        self.function = function
        self.reader = reader
        self.inlined = 0

    def of(self, columns: Sequence[str]) -> Shape | None:
        node = self.function.node
        env: _Env = {one.arg: None for one in ast.walk(node.args) if isinstance(one, ast.arg)}
        env |= {name: _Each(_name(_COLUMN + name)) for name in columns}
        env["completions"] = _Each(_name(_REPLY))
        if isinstance(node, ast.Lambda):
            return self.paid(*self.element(node.body, env))
        pay: tuple[ast.expr, _Env] | None = None
        sums: set[str] = set()
        body = [one for one in node.body if not _is_silent(one)]
        for at, statement in enumerate(body):
            match statement:
                case ast.Assign(targets=[ast.Name(id=name)], value=ast.List(elts=[])):
                    sums.add(name)
                case ast.AnnAssign(target=ast.Name(id=name), value=ast.List(elts=[])):
                    sums.add(name)
                case ast.Assign() | ast.AnnAssign():
                    self.assign(statement, env)
                case ast.For(orelse=[]) if pay is None:
                    inner = dict(env)
                    self.bind(statement.target, statement.iter, inner)
                    pay = self.loop(statement.body, inner, sums), inner
                case ast.Return(value=ast.Name(id=name)) if pay and name in sums:
                    return self.paid(*pay) if at == len(body) - 1 else None
                case ast.Return(value=ast.expr() as value) if pay is None:
                    return self.paid(*self.element(value, env)) if at == len(body) - 1 else None
                case _:
                    raise _NotOurs
        return None

    # --- statements -------------------------------------------------------------------------------

    def assign(self, node: ast.Assign | ast.AnnAssign, env: _Env) -> None:
        targets = node.targets if isinstance(node, ast.Assign) else [node.target]
        if len(targets) != 1 or not isinstance(targets[0], ast.Name) or node.value is None:
            raise _NotOurs
        try:
            env[targets[0].id] = self.each_or_one(node.value, env)
        except _NotOurs:
            env[targets[0].id] = None  # only what is paid must be read

    def each_or_one(self, value: ast.expr, env: _Env) -> ast.expr | _Each:
        if isinstance(value, ast.ListComp):
            element, inner = self.element(value, env)
            return _Each(self.written_out(element, inner))
        if isinstance(value, ast.Name) and isinstance(env.get(value.id), _Each):
            return env[value.id]  # type: ignore[return-value]
        return self.written_out(value, env)

    def loop(self, body: list[ast.stmt], env: _Env, sums: set[str]) -> ast.expr:
        """What a loop appends for a completion."""
        pay: ast.expr | None = None
        for statement in body:
            if _is_silent(statement):
                continue
            if pay is not None:
                raise _NotOurs
            match statement:
                case ast.Assign() | ast.AnnAssign():
                    self.assign(statement, env)
                case ast.Expr():
                    pay = _appended([statement], sums)
                case ast.If():
                    first = _appended(statement.body, sums)
                    second = _appended(statement.orelse, sums)
                    pay = ast.copy_location(ast.IfExp(statement.test, first, second), statement)
                case _:
                    raise _NotOurs
        if pay is None:
            raise _NotOurs
        return pay

    def element(self, node: ast.expr, env: _Env) -> tuple[ast.expr, _Env]:
        """The element of a list comprehension, and the names in it."""
        if not isinstance(node, ast.ListComp) or len(node.generators) != 1:
            raise _NotOurs
        (one,) = node.generators
        if one.ifs or one.is_async:
            raise _NotOurs
        inner = dict(env)
        self.bind(one.target, one.iter, inner)
        return node.elt, inner

    def bind(self, target: ast.expr, source: ast.expr, env: _Env) -> None:
        """Bind the loop's names to the elements of what it goes through."""
        match source:
            case ast.Call(func=ast.Name(id="zip"), args=args) if isinstance(target, ast.Tuple):
                if len(args) != len(target.elts):
                    raise _NotOurs
                elements = [self.each(one, env) for one in args]
                for part, element in zip(target.elts, elements, strict=True):
                    if not isinstance(part, ast.Name):
                        raise _NotOurs
                    env[part.id] = element
            case ast.Call(func=ast.Name(id="enumerate"), args=[inner]) if (
                isinstance(target, ast.Tuple) and len(target.elts) == 2
            ):
                if not isinstance(target.elts[0], ast.Name):
                    raise _NotOurs
                self.bind(target.elts[1], inner, env)
                env[target.elts[0].id] = None
            case _ if isinstance(target, ast.Name):
                element = self.each(source, env)
                env[target.id] = element
            case _:
                raise _NotOurs

    def each(self, source: ast.expr, env: _Env) -> ast.expr | None:
        if isinstance(source, ast.Name) and source.id in env and env[source.id] is None:
            return None  # the prompts, say: known to be a list, and not what is paid for
        found = self.each_or_one(source, env)
        if not isinstance(found, _Each):
            raise _NotOurs
        return found.element

    # --- expressions ------------------------------------------------------------------------------

    def written_out(self, node: ast.expr, env: _Env) -> ast.expr:
        """``node`` with what its names stand for in their place."""
        changed: ast.expr = _WrittenOut(self, env).visit(copy.deepcopy(node))
        if sum(1 for _ in ast.walk(changed)) > MAX_NODES:
            raise _NotOurs
        return changed

    def helper(self, name: str, env: _Env) -> Function | None:
        if name in env:
            return None
        found = self.function.scope.find(name)
        value = found.value if found is not None else None
        return value if isinstance(value, Function) else None

    def inline(self, helper: Function, args: list[ast.expr]) -> ast.expr | None:
        """What a helper of straight lines returns, or None for any other helper."""
        node = helper.node
        parameters = [one.arg for one in (*node.args.posonlyargs, *node.args.args)]
        if len(parameters) != len(args) or self.inlined >= MAX_INLINED or node.args.kwonlyargs:
            return None
        env: _Env = dict(zip(parameters, args, strict=True))
        self.inlined += 1
        try:
            if isinstance(node, ast.Lambda):
                return self.written_out(node.body, env)
            for statement in node.body:
                if isinstance(statement, ast.Return) and statement.value is not None:
                    return self.written_out(statement.value, env)
                if isinstance(statement, ast.Assign | ast.AnnAssign):
                    self.assign(statement, env)
                elif not _is_silent(statement):
                    return None
            return None
        except _NotOurs:
            return None
        finally:
            self.inlined -= 1

    # --- what is paid -----------------------------------------------------------------------------

    def paid(self, pay: ast.expr, env: _Env) -> Shape | None:
        match pay:
            case ast.IfExp(test=test, body=first, orelse=second):
                high, low = self.number(first, env), self.number(second, env)
            case ast.BinOp(op=ast.Mult(), left=left, right=right):
                is_left = isinstance(right, ast.Compare | ast.Call)
                test, factor = (right, left) if is_left else (left, right)
                high, low = self.number(factor, env), 0.0
            case ast.Call(func=ast.Name(id=name), args=[one], keywords=[]):
                helper = self.helper(name, env)
                if helper is None or not _is_reply(self.written_out(one, env)):
                    return None
                return self.tag_count(helper)
            case _:
                return None
        if not high > low:
            return None
        line = getattr(test, "lineno", self.function.node.lineno)
        found = self.condition(self.written_out(test, env))
        if found is None:
            return None
        name, is_historic = found
        most = MAXIMA[name]
        return Shape(name, (high - low) / most, line, is_historic and (high, low) == (most, 0.0))

    def number(self, node: ast.expr, env: _Env) -> float:
        value = self.reader.value(self.written_out(node, env), self.function.scope)
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise _NotOurs
        return float(value)

    def condition(self, test: ast.expr) -> tuple[str, bool] | None:
        """The name of ours that a condition belongs to, and whether it is the gist's."""
        match test:
            case ast.Call(func=ast.Name(id="bool"), args=[inner], keywords=[]):
                return self.condition(inner)
            case ast.Compare(left=left, ops=[ast.IsNot()], comparators=[ast.Constant(value=None)]):
                return self.layout(left)
            case ast.Compare(left=left, ops=[ast.Eq()], comparators=[right]):
                for text, gold in ((left, right), (right, left)):
                    if _is_gold(gold) and self.is_text(text):
                        plain = isinstance(gold, ast.Name) and ast.unparse(text) == _HISTORIC_TEXT
                        return "correctness", plain
                return None
            case ast.Call(func=ast.Attribute(value=text, attr=attr), args=[], keywords=[]) if (
                attr in DIGITS
            ):
                is_historic = attr == "isdigit" and ast.unparse(text) == _HISTORIC_TEXT
                return ("integer", is_historic) if self.is_text(text) else None
        return self.layout(test)

    def layout(self, node: ast.expr) -> tuple[str, bool] | None:
        """A match of a pattern that asks for both parts in their order, and for nothing else."""
        found = match_of(node, self.reader, self.function) if isinstance(node, ast.Call) else None
        if found is None or found.method not in ("match", "search", "fullmatch"):
            return None
        if found.on is None or not _is_reply(found.on):
            return None
        tags = [one[0] for one in TAG.finditer(found.text)]
        names = [one.strip("</>") for one in tags]
        if len(tags) != 4 or names[0] != names[1] or names[2] != names[3] or names[0] == names[2]:
            return None
        if [one.startswith("</") for one in tags] != [False, True, False, True]:
            return None
        if "reasoning" in names[2:] or "answer" in names[:2]:
            return None
        if not _BETWEEN.fullmatch(TAG.sub("", found.text)):
            return None
        breaks = "\n" in found.text or r"\n" in found.text
        name = "strict_format" if found.is_whole and breaks else "soft_format"
        plain = found.text.replace("\n", r"\n")
        is_historic = (
            plain == _HISTORIC_PATTERNS[name]
            and found.method == "match"
            and not found.flags
            and isinstance(found.on, ast.Name)
        )
        return name, is_historic

    def is_text(self, node: ast.expr) -> bool:
        """Whether it is a text that is cut out of the reply, or the reply."""
        match node:
            case ast.Name():
                return node.id == _REPLY
            case ast.Call(func=ast.Attribute(value=owner, attr="group"), keywords=[]):
                on = match_of(owner, self.reader, self.function)
                return on is not None and on.on is not None and self.is_text(on.on)
            case ast.Call(func=ast.Attribute(value=owner, attr=attr), args=args, keywords=[]):
                plain = all(isinstance(one, ast.Constant) for one in args)
                return attr in _SAME_TEXT and plain and self.is_text(owner)
            case ast.Subscript(value=ast.Call() as call, slice=at) if _whole(at) is not None:
                func = call.func
                if not isinstance(func, ast.Attribute):
                    return False
                if func.attr in _PARTS:
                    return self.is_text(func.value)
                found = match_of(call, self.reader, self.function)
                return found is not None and found.on is not None and self.is_text(found.on)
            case ast.Call(func=ast.Name(id=name), args=args, keywords=[]):
                helper = self.helper(name, {})
                return (
                    helper is not None
                    and bool(args)
                    and all(self.is_text(one) for one in args)
                    and _gives_text(helper)
                )
        return False

    # --- tags counted -----------------------------------------------------------------------------

    def tag_count(self, helper: Function) -> Shape | None:
        """``if text.count(TAG) == 1: total += QUARTER`` for each tag, with or without the gist's
        penalty for what follows the last."""
        node = helper.node
        if isinstance(node, ast.Lambda) or len(node.args.args) != 1:
            return None
        text = node.args.args[0].arg
        body = [one for one in node.body if not _is_silent(one)]
        if len(body) < 3:
            return None
        match body[0]:
            case ast.Assign(targets=[ast.Name(id=total)], value=ast.Constant(value=0 | 0.0)):
                pass
            case _:
                return None
        match body[-1]:
            case ast.Return(value=ast.Name(id=name)) if name == total:
                pass
            case _:
                return None
        scope = helper.scope
        quarters: set[float] = set()
        counted: list[tuple[str, tuple[str, int, float] | None]] = []
        for statement in body[1:-1]:
            match statement:
                case ast.If(
                    test=ast.Compare(
                        left=ast.Call(
                            func=ast.Attribute(value=ast.Name(id=owner), attr="count"),
                            args=[tag_node],
                            keywords=[],
                        ),
                        ops=[ast.Eq()],
                        comparators=[ast.Constant(value=1)],
                    ),
                    body=[
                        ast.AugAssign(target=ast.Name(id=into), op=ast.Add(), value=quarter_node),
                        *rest,
                    ],
                    orelse=[],
                ) if owner == text and into == total and len(rest) <= 1:
                    tag = self.reader.value(tag_node, scope)
                    quarter = self.reader.value(quarter_node, scope)
                case _:
                    return None
            if not isinstance(tag, str) or not TAG.fullmatch(tag.strip("\n")):
                return None
            if isinstance(quarter, bool) or not isinstance(quarter, int | float):
                return None
            penalty = self.penalty(rest[0], text, total, helper) if rest else None
            if rest and penalty is None:
                return None
            quarters.add(float(quarter))
            counted.append((tag, penalty))
        tags = {tag.strip("\n") for tag, _ in counted}
        if len(quarters) != 1 or min(quarters) <= 0 or len(tags) < 3 or len(tags) != len(counted):
            return None
        (quarter,) = quarters
        is_historic = quarter == _QUARTER and counted == _HISTORIC_COUNTS and tags == set(TAGS)
        has_penalty = any(penalty for _, penalty in counted)
        line = body[1].lineno
        return Shape("xml_count", quarter / _QUARTER, line, is_historic, has_penalty)

    def penalty(
        self, node: ast.stmt, text: str, total: str, helper: Function
    ) -> tuple[str, int, float] | None:
        """``total -= (len(text.split(TAG)[-1]) - 1) * 0.001``: the tag, the 1 and the 0.001."""
        match node:
            case ast.AugAssign(
                target=ast.Name(id=into),
                op=ast.Sub(),
                value=ast.BinOp(left=length, op=ast.Mult(), right=factor_node),
            ) if into == total:
                pass
            case _:
                return None
        less = 0
        match length:
            case ast.BinOp(left=inner, op=ast.Sub(), right=ast.Constant(value=int() as less)):
                length = inner
        match length:
            case ast.Call(
                func=ast.Name(id="len"),
                args=[
                    ast.Subscript(
                        value=ast.Call(
                            func=ast.Attribute(value=ast.Name(id=owner), attr="split"),
                            args=[tag_node],
                        ),
                        slice=at,
                    )
                ],
            ) if owner == text and _whole(at) == -1:
                pass
            case _:
                return None
        tag = self.reader.value(tag_node, helper.scope)
        factor = self.reader.value(factor_node, helper.scope)
        if not isinstance(tag, str) or not isinstance(factor, float) or factor <= 0:
            return None
        return tag, int(less), factor


class _WrittenOut(ast.NodeTransformer):
    """Puts what names stand for in their place; ``completion[0]["content"]`` becomes the reply."""

    def __init__(self, shapes: _Shapes, env: _Env) -> None:
        self.shapes = shapes
        self.env = env

    def visit_Name(self, node: ast.Name) -> ast.expr:
        if node.id not in self.env:
            return node
        found = self.env[node.id]
        if not isinstance(found, ast.expr):
            raise _NotOurs
        return copy.deepcopy(found)

    def visit_Subscript(self, node: ast.Subscript) -> ast.expr:
        self.generic_visit(node)
        match node:
            case ast.Subscript(
                value=ast.Subscript(value=ast.Name(id=name), slice=at),
                slice=ast.Constant(value="content"),
            ) if name == _REPLY and _whole(at) in (0, -1):
                return ast.copy_location(_name(_REPLY), node)
        return node

    def visit_Call(self, node: ast.Call) -> ast.expr:
        if isinstance(node.func, ast.Name) and not node.keywords:
            helper = self.shapes.helper(node.func.id, self.env)
            if helper is not None:
                node.args = [self.visit(one) for one in node.args]
                return self.shapes.inline(helper, node.args) or node
        self.generic_visit(node)
        return node

    def _refuse(self, node: ast.AST) -> ast.expr:
        raise _NotOurs

    visit_Lambda = visit_ListComp = visit_SetComp = visit_DictComp = _refuse
    visit_GeneratorExp = visit_NamedExpr = visit_Await = visit_Yield = visit_YieldFrom = _refuse


def _name(text: str) -> ast.Name:
    return ast.Name(text, ast.Load(), lineno=0, col_offset=0)


def _is_silent(node: ast.stmt) -> bool:
    """A docstring, an import, a pass or a print: nothing of it is paid."""
    match node:
        case ast.Expr(value=ast.Constant()) | ast.Pass() | ast.Import() | ast.ImportFrom():
            return True
        case ast.Expr(value=ast.Call(func=ast.Name(id="print"))):
            return True
        case ast.If(body=body, orelse=[]):
            return all(_is_silent(one) for one in body)
    return False


def _appended(body: list[ast.stmt], sums: set[str]) -> ast.expr:
    match [one for one in body if not _is_silent(one)]:
        case [
            ast.Expr(
                value=ast.Call(
                    func=ast.Attribute(value=ast.Name(id=name), attr="append"), args=[paid]
                )
            )
        ] if name in sums:
            return paid
    raise _NotOurs


def _is_gold(node: ast.expr) -> bool:
    """A column as it stands, stripped, or made a text."""
    match node:
        case ast.Name(id=name):
            return name.startswith(_COLUMN)
        case ast.Call(func=ast.Attribute(value=inner, attr="strip"), args=[], keywords=[]):
            return _is_gold(inner)
        case ast.Call(func=ast.Name(id="str"), args=[inner], keywords=[]):
            return _is_gold(inner)
    return False


def _is_reply(node: ast.expr) -> bool:
    match node:
        case ast.Name(id=name):
            return name == _REPLY
        case ast.Call(func=ast.Attribute(value=inner, attr="strip"), args=[], keywords=[]):
            return _is_reply(inner)
    return False


def _whole(node: ast.expr) -> int | None:
    match node:
        case ast.Constant(value=int() as value) if not isinstance(value, bool):
            return value
        case ast.UnaryOp(op=ast.USub(), operand=ast.Constant(value=int() as value)):
            return -value
    return None


def _gives_text(helper: Function) -> bool:
    """Whether no return of a helper is a number or a truth."""
    node = helper.node
    returns = (
        [node.body]
        if isinstance(node, ast.Lambda)
        else [one.value for one in ast.walk(node) if isinstance(one, ast.Return)]
    )
    for value in returns:
        match value:
            case ast.Compare() | ast.BoolOp() | ast.UnaryOp():
                return False
            case ast.Constant(value=int() | float()):
                return False
            case ast.Call(func=ast.Name(id=name)) if name != "str":
                return False
            case ast.Call(func=ast.Attribute(attr="lower" | "upper" | "casefold")):
                return False
    return True
