"""Walks a script and keeps what it calls: a reader, not an interpreter.

Statements are walked in order, functions of the script's own are followed where they are called,
and arithmetic on constants is done. Nothing of the script runs, and the work is bounded.
"""

from __future__ import annotations

import ast
import builtins
from typing import Any

from abacist.delivery.importing.known_calls import binary, compared, of_method, of_symbol
from abacist.delivery.importing.values import (
    MAX_DEPTH,
    MAX_ITEMS,
    MAX_TEXT,
    PLAIN,
    Binding,
    Class,
    Function,
    Instance,
    Made,
    Scope,
    Symbol,
    Table,
    Unknown,
    done,
    is_plain,
    pads_widely,
    unknown_of,
)
from abacist.errors import DataError

MAX_VISITS = 300_000
_PARSERS = ("HfArgumentParser", "TrlParser")


class Reader:
    """Walks a module; :attr:`made` then holds every call of something foreign, in order."""

    def __init__(self, tree: ast.Module) -> None:
        self.module = Scope()
        self.made: list[Made] = []
        self.functions: list[Function] = []
        self.classes: list[Class] = []
        self.called: set[int] = set()
        self._visits = 0
        self._depth = 0
        self._block(tree.body, self.module)

    def follow(self, function: Function, *args: Any) -> Any:
        """What a function of the script's returns for these arguments."""
        return self._follow(function, list(args), {}, function.node)

    # --- statements ---------------------------------------------------------------------------

    def _block(self, body: list[ast.stmt], scope: Scope) -> list[Any] | None:
        """Walk statements; ``[value]`` where they return."""
        self._depth += 1
        try:
            for statement in body:
                self._count(statement)
                if (returned := self._statement(statement, scope)) is not None:
                    return returned
            return None
        finally:
            self._depth -= 1

    def _statement(self, node: ast.stmt, scope: Scope) -> list[Any] | None:
        match node:
            case ast.FunctionDef() | ast.AsyncFunctionDef():
                function = Function(node, scope)
                self.functions.append(function)
                scope.names[node.name] = Binding(function, node)
            case ast.ClassDef():
                scope.names[node.name] = Binding(self._class(node, scope), node)
            case ast.Import():
                for alias in node.names:
                    name = alias.asname or alias.name.partition(".")[0]
                    dotted = alias.name if alias.asname else name
                    scope.names[name] = Binding(Symbol(dotted), node)
            case ast.ImportFrom():
                for alias in node.names:
                    dotted = f"{'.' * node.level}{node.module or ''}.{alias.name}"
                    scope.names[alias.asname or alias.name] = Binding(Symbol(dotted), node)
            case ast.Assign():
                value = self.value(node.value, scope)
                for target in node.targets:
                    self._bind(target, value, node.value, scope)
            case ast.AnnAssign(value=ast.expr() as expression):
                self._bind(node.target, self.value(expression, scope), expression, scope)
            case ast.AugAssign():
                sum_ = ast.BinOp(_as_read(node.target), node.op, node.value)
                ast.copy_location(sum_, node)
                self._bind(node.target, self.value(sum_, scope), node.value, scope)
            case ast.Expr():
                self.value(node.value, scope)
            case ast.Return():
                return [None if node.value is None else self.value(node.value, scope)]
            case ast.If():
                return self._if(node, scope)
            case ast.With() | ast.AsyncWith():
                for item in node.items:
                    value = self.value(item.context_expr, scope)
                    if item.optional_vars is not None:
                        self._bind(item.optional_vars, value, item.context_expr, scope)
                return self._block(node.body, scope)
            case ast.Try():
                returned = self._block(node.body, scope)
                if returned is None:
                    returned = self._block(node.orelse, scope)
                self._block(node.finalbody, scope)
                return returned
            case ast.For() | ast.AsyncFor():
                self.value(node.iter, scope)
                self._bind(node.target, Unknown(node.lineno), node.iter, scope)
                self._block(node.body, scope)
                self._forget(node.body, scope)
            case ast.While():
                self._block(node.body, scope)
                self._forget(node.body, scope)
            case _:
                pass
        return None

    def _if(self, node: ast.If, scope: Scope) -> list[Any] | None:
        test = self._is_true(node.test, scope)
        if test is True:
            return self._block(node.body, scope)
        if test is False:
            return self._block(node.orelse, scope)
        # Either may be taken: what both leave alike is known.
        before = dict(scope.names)
        first = self._block(node.body, scope)
        after_body, scope.names = scope.names, dict(before)
        second = self._block(node.orelse, scope)
        for name in {*after_body, *scope.names}:
            one, other = after_body.get(name), scope.names.get(name)
            if one is None or other is None:
                # Only one branch binds it, so whatever is used afterwards is that.
                scope.names[name] = one or other  # type: ignore[assignment]
            elif one is not other and not (
                is_plain(one.value) and is_plain(other.value) and one.value == other.value
            ):
                line = getattr(one.node, "lineno", node.lineno)
                scope.names[name] = Binding(
                    Unknown(line, "depends on a condition that is known when the script runs"),
                    one.node,
                )
        if first is None or second is None:
            return None  # one branch goes on, and what follows is read
        return first if first[0] is not None else second

    def _forget(self, body: list[ast.stmt], scope: Scope) -> None:
        """A number that a loop changes is not known after it."""
        for inner in (node for statement in body for node in ast.walk(statement)):
            self._count(inner)
            if isinstance(inner, ast.AugAssign) and isinstance(inner.target, ast.Name):
                scope.names[inner.target.id] = Binding(Unknown(inner.lineno), inner)

    def _class(self, node: ast.ClassDef, scope: Scope) -> Class:
        bases = [self.value(base, scope) for base in node.bases]
        fields = Table()
        for base in bases:
            if isinstance(base, Class):
                fields.update(base.fields)
                fields.lines |= base.fields.lines
        inner = Scope(outer=scope)
        for statement in node.body:
            self._count(statement)
            if isinstance(statement, ast.FunctionDef):
                self.functions.append(Function(statement, inner))
            target: ast.expr | None = None
            if isinstance(statement, ast.AnnAssign) and statement.value is not None:
                target, expression = statement.target, statement.value
            elif isinstance(statement, ast.Assign):
                target, expression = statement.targets[0], statement.value
            if isinstance(target, ast.Name):
                value = self.value(expression, inner)
                if isinstance(value, Made) and value.name == "field":
                    value = self._field_default(value)
                inner.names[target.id] = Binding(value, expression)
                fields[target.id] = value
                fields.lines[target.id] = statement.lineno
        made = Class(node, bases, fields)
        self.classes.append(made)
        return made

    def _field_default(self, made: Made) -> Any:
        factory = made.kwargs.get("default_factory")
        if isinstance(factory, Function):
            return self._follow(factory, [], {}, made.node)
        return made.kwargs.get("default", Unknown(made.line))

    def _bind(self, target: ast.expr, value: Any, node: ast.AST, scope: Scope) -> None:
        match target:
            case ast.Name():
                scope.names[target.id] = Binding(value, node)
            case ast.Tuple() | ast.List():
                values = value if isinstance(value, list | tuple) else None
                if values is None or len(values) != len(target.elts):
                    values = [
                        Made("[]", "[]", [at], {}, node, value)
                        if isinstance(value, Made)
                        else Unknown(target.lineno)
                        for at in range(len(target.elts))
                    ]
                for one, part in zip(target.elts, values, strict=True):
                    self._bind(one, part, node, scope)
            case ast.Attribute():
                owner = self.value(target.value, scope)
                if isinstance(owner, Made):
                    owner.kwargs[target.attr] = value
                    owner.lines[target.attr] = target.lineno
                elif isinstance(owner, Instance | Class):
                    owner.fields[target.attr] = value
                    owner.fields.lines[target.attr] = target.lineno
            case ast.Subscript():
                owner, key = self.value(target.value, scope), self.value(target.slice, scope)
                if isinstance(owner, dict) and isinstance(key, PLAIN):
                    owner[key] = value
                    if isinstance(owner, Table):
                        owner.lines[key] = target.lineno
            case _:
                pass

    # --- expressions --------------------------------------------------------------------------

    def value(self, node: ast.expr, scope: Scope) -> Any:
        """What an expression stands for."""
        self._count(node)
        self._depth += 1
        try:
            if self._depth > MAX_DEPTH:
                return Unknown(node.lineno, "is nested too deeply")
            return self._value(node, scope)
        finally:
            self._depth -= 1

    def _value(self, node: ast.expr, scope: Scope) -> Any:
        match node:
            case ast.Constant():
                return node.value if isinstance(node.value, PLAIN) else Unknown(node.lineno)
            case ast.Name():
                found = scope.find(node.id)
                if found is not None:
                    return found.value
                known = hasattr(builtins, node.id)
                return Symbol(node.id) if known else Unknown(node.lineno, "is not defined here")
            case ast.Attribute():
                return self._attribute(self.value(node.value, scope), node)
            case ast.Call():
                return self._call(node, scope)
            case ast.Lambda():
                return Function(node, scope)
            case ast.List() | ast.Tuple() | ast.Set():
                return self._items(node.elts, scope)
            case ast.Dict():
                return self._dict(node, scope)
            case ast.JoinedStr():
                parts = [self.value(part, scope) for part in node.values]
                if all(isinstance(part, str) for part in parts):
                    if sum(map(len, parts)) > MAX_TEXT:
                        return Unknown(node.lineno, "is too large")
                    return "".join(parts)
                return self._joined(parts, node)
            case ast.FormattedValue():
                inner = self.value(node.value, scope)
                spec = "" if node.format_spec is None else self.value(node.format_spec, scope)
                if not isinstance(inner, PLAIN) or not isinstance(spec, str) or len(spec) > 20:
                    return inner if isinstance(inner, Unknown) else Unknown(node.lineno)
                if pads_widely(spec):  # "{:1000000000}"
                    return Unknown(node.lineno)
                inner = repr(inner) if node.conversion == 114 else inner
                return done(lambda: format(inner, spec), node.lineno)
            case ast.BinOp():
                return self._binary(node, scope)
            case ast.UnaryOp():
                return self._unary(node, scope)
            case ast.BoolOp():
                return self._bool(node, scope)
            case ast.Compare() if len(node.ops) == 1:
                left = self.value(node.left, scope)
                right = self.value(node.comparators[0], scope)
                return compared(node.ops[0], left, right, node.lineno)
            case ast.IfExp():
                test = self._is_true(node.test, scope)
                first, second = self.value(node.body, scope), self.value(node.orelse, scope)
                if test is None:
                    alike = is_plain(first) and is_plain(second) and first == second
                    why = "depends on a condition that is known when the script runs"
                    return first if alike else Unknown(node.lineno, why)
                return first if test else second
            case ast.Subscript():
                return self._index(node, scope)
            case ast.Starred() | ast.Await():
                return self.value(node.value, scope)
            case ast.NamedExpr():
                value = self.value(node.value, scope)
                self._bind(node.target, value, node.value, scope)
                return value
            case _:
                return Unknown(node.lineno)

    def _joined(self, parts: list[Any], node: ast.expr) -> Any:
        """A text with values in it that are foreign: its pieces, as a Made called ``text``."""
        unknown = next((one for one in parts if isinstance(one, Unknown)), None)
        return unknown or Made("text", "text", parts[:MAX_ITEMS], {}, node)

    def _items(self, elements: list[ast.expr], scope: Scope) -> Any:
        items: list[Any] = []
        for one in elements:
            value = self.value(one, scope)
            if isinstance(one, ast.Starred) and isinstance(value, list | tuple):
                items += value
            elif isinstance(one, ast.Starred):
                return Unknown(one.lineno)
            else:
                items.append(value)
            if len(items) > MAX_ITEMS:
                return Unknown(one.lineno, "is too long")
        return items

    def _dict(self, node: ast.Dict, scope: Scope) -> Any:
        table = Table()
        for key_node, value_node in zip(node.keys, node.values, strict=True):
            value = self.value(value_node, scope)
            if key_node is None:
                if not isinstance(value, dict):
                    return Unknown(value_node.lineno)
                table.update(value)
                table.lines |= getattr(value, "lines", {})
                continue
            key = self.value(key_node, scope)
            if not isinstance(key, PLAIN):
                return Unknown(value_node.lineno)
            table[key] = value
            table.lines[key] = value_node.lineno
        return table

    def _attribute(self, owner: Any, node: ast.Attribute) -> Any:
        if isinstance(owner, Symbol):
            return Symbol(f"{owner.dotted}.{node.attr}")
        if isinstance(owner, Instance | Class):
            return owner.fields.get(node.attr, Unknown(node.lineno, "is not defined here"))
        if isinstance(owner, Made):
            if node.attr in owner.kwargs:
                return owner.kwargs[node.attr]
            return Made(f".{node.attr}", f".{node.attr}", [], {}, node, owner)
        return owner if isinstance(owner, Unknown) else Unknown(node.lineno)

    def _index(self, node: ast.Subscript, scope: Scope) -> Any:
        owner = self.value(node.value, scope)
        if isinstance(node.slice, ast.Slice):
            ends = [
                None if end is None else self.value(end, scope)
                for end in (node.slice.lower, node.slice.upper, node.slice.step)
            ]
            if not all(end is None or isinstance(end, int) for end in ends):
                return Unknown(node.lineno)
            key: Any = slice(*ends)
        else:
            key = self.value(node.slice, scope)
            if not isinstance(key, PLAIN):
                return Unknown(node.lineno)
        if isinstance(owner, Made):
            return Made("[]", "[]", [key], {}, node, owner)
        if isinstance(owner, Symbol) and owner.dotted.endswith("environ"):
            return Unknown(node.lineno, "comes from the environment")
        if isinstance(owner, Symbol) and owner.dotted == "sys.argv":
            return Unknown(node.lineno, "comes from the command line")
        if isinstance(owner, dict | list | tuple | str):
            return done(lambda: owner[key], node.lineno)
        return owner if isinstance(owner, Unknown) else Unknown(node.lineno)

    def _binary(self, node: ast.BinOp, scope: Scope) -> Any:
        left, right = self.value(node.left, scope), self.value(node.right, scope)
        if isinstance(node.op, ast.Add) and isinstance(left, list) and isinstance(right, list):
            return [*left, *right] if len(left) + len(right) <= MAX_ITEMS else Unknown(node.lineno)
        if isinstance(node.op, ast.BitOr) and isinstance(left, dict) and isinstance(right, dict):
            table = Table({**left, **right})
            table.lines = getattr(left, "lines", {}) | getattr(right, "lines", {})
            return table
        if isinstance(node.op, ast.Add) and Made in (type(left), type(right)):
            return self._joined([left, right], node)
        return binary(node.op, left, right, node.lineno)

    def _unary(self, node: ast.UnaryOp, scope: Scope) -> Any:
        value = self.value(node.operand, scope)
        if not isinstance(value, PLAIN):
            return unknown_of(node.lineno, value)
        if isinstance(node.op, ast.Not):
            return not value
        if isinstance(node.op, ast.USub) and isinstance(value, int | float):
            return -value
        return value if isinstance(node.op, ast.UAdd) else Unknown(node.lineno)

    def _bool(self, node: ast.BoolOp, scope: Scope) -> Any:
        """``a or b`` of constants; of ``unknown or constant`` the constant is no more than likely,
        so it is not known."""
        value: Any = None
        is_and = isinstance(node.op, ast.And)
        for one in node.values:
            value = self.value(one, scope)
            if not is_plain(value) or bool(value) is not is_and:
                return value if is_plain(value) else unknown_of(node.lineno, value)
        return value

    def _is_true(self, node: ast.expr, scope: Scope) -> bool | None:
        """A test: true, false, or None for unknown. A script is read as one that is run."""
        match node:
            case ast.Compare(left=ast.Name(id="__name__")):
                return True
            case ast.Name(id="TYPE_CHECKING"):
                return False
        value = self.value(node, scope)
        return bool(value) if is_plain(value) else None

    # --- calls --------------------------------------------------------------------------------

    def _call(self, node: ast.Call, scope: Scope) -> Any:
        receiver: Any = None
        if isinstance(node.func, ast.Attribute):
            receiver = self.value(node.func.value, scope)
            name = node.func.attr
            if isinstance(receiver, Symbol):
                called: Any = Symbol(f"{receiver.dotted}.{name}")
            elif isinstance(receiver, Class | Instance):
                called = receiver.fields.get(name)
            else:
                called = None
        else:
            called = self.value(node.func, scope)
            name = node.func.id if isinstance(node.func, ast.Name) else ""
        args, kwargs, lines = self._arguments(node, scope)
        if isinstance(called, Function):
            self.called.add(id(called.node))
            return self._follow(called, args, kwargs, node)
        if isinstance(called, Class):
            return self._instance(called, args, kwargs, lines, node)
        if isinstance(called, Symbol):
            known = of_symbol(called, args, kwargs, node)
            if known is not None:
                return known[0]
            name, dotted = called.last, called.dotted
        elif isinstance(receiver, Made) and receiver.name in _PARSERS and name.startswith("parse"):
            return self._parsed(receiver, node)
        elif (known := of_method(receiver, name, args, kwargs, lines, node)) is not None:
            return known[0]
        else:
            dotted = name
        made = Made(name, dotted, args, kwargs, node, receiver, lines)
        self.made.append(made)
        return made

    def _arguments(
        self, node: ast.Call, scope: Scope
    ) -> tuple[list[Any], dict[str, Any], dict[str, int]]:
        args: list[Any] = []
        for one in node.args:
            value = self.value(one, scope)
            if isinstance(one, ast.Starred) and isinstance(value, list | tuple):
                args += value[:MAX_ITEMS]
            else:
                args.append(value)
        kwargs: dict[str, Any] = {}
        lines: dict[str, int] = {}
        for keyword in node.keywords:
            value = self.value(keyword.value, scope)
            if keyword.arg is not None:
                kwargs[keyword.arg] = value
                lines[keyword.arg] = keyword.value.lineno
                continue
            spread = value.fields if isinstance(value, Instance) else value
            if isinstance(spread, dict):
                kwargs |= {str(key): one for key, one in spread.items()}
                own = getattr(spread, "lines", {})
                lines |= {str(key): own.get(key, keyword.value.lineno) for key in spread}
            else:
                kwargs["**"] = Unknown(keyword.value.lineno)
                lines["**"] = keyword.value.lineno
        return args, kwargs, lines

    def _instance(
        self,
        kind: Class,
        args: list[Any],
        kwargs: dict[str, Any],
        lines: dict[str, int],
        node: ast.Call,
    ) -> Any:
        foreign = next((base for base in kind.bases if isinstance(base, Symbol)), None)
        if foreign is not None and foreign.dotted not in ("object", "abc.ABC", "typing.NamedTuple"):
            # A subclass of a foreign class is that class, with other defaults.
            made = Made(
                foreign.last, foreign.dotted, args, {**kind.fields, **kwargs}, node, kind,
                {**kind.fields.lines, **lines},
            )  # fmt: skip
            self.made.append(made)
            return made
        fields = Table(kind.fields)
        fields.lines = dict(kind.fields.lines)
        fields.update({**dict(zip(kind.fields, args, strict=False)), **kwargs})
        fields.lines |= lines
        return Instance(fields, kind, node)

    def _parsed(self, parser: Made, node: ast.Call) -> Any:
        """What TRL's and transformers' parsers give when nothing is typed: the defaults."""
        kinds = parser.args[0] if parser.args else parser.kwargs.get("dataclass_types")
        kinds = kinds if isinstance(kinds, list | tuple) else [kinds]
        found: list[Any] = []
        for kind in kinds:
            if isinstance(kind, Class):
                found.append(self._instance(kind, [], {}, {}, node))
            elif isinstance(kind, Symbol):
                made = Made(kind.last, kind.dotted, [], {"**": Unknown(
                    node.lineno, "comes from the command line")}, node, parser)  # fmt: skip
                self.made.append(made)
                found.append(made)
            else:
                found.append(Unknown(node.lineno))
        return found

    def _follow(
        self, function: Function, args: list[Any], kwargs: dict[str, Any], call: ast.AST
    ) -> Any:
        """Walk the body of the script's own function with these arguments."""
        node = function.node
        self._depth += 3
        try:
            if self._depth > MAX_DEPTH:
                return Unknown(getattr(call, "lineno", 0), "is nested too deeply")
            scope = Scope(outer=function.scope)
            parameters = [*node.args.posonlyargs, *node.args.args]
            for parameter in (*parameters, *node.args.kwonlyargs):
                scope.names[parameter.arg] = Binding(Unknown(node.lineno), node)
            defaults = node.args.defaults
            for parameter, default in zip(
                parameters[len(parameters) - len(defaults) :], defaults, strict=True
            ):
                value = self.value(default, function.scope)
                scope.names[parameter.arg] = Binding(value, default)
            for parameter, one in zip(node.args.kwonlyargs, node.args.kw_defaults, strict=True):
                if one is not None:
                    scope.names[parameter.arg] = Binding(self.value(one, function.scope), one)
            for parameter, value in zip(parameters, args, strict=False):
                scope.names[parameter.arg] = Binding(value, call)
            names = {one.arg for one in (*parameters, *node.args.kwonlyargs)}
            for name, value in kwargs.items():
                if name in names:
                    scope.names[name] = Binding(value, call)
            if node.args.kwarg is not None:
                rest = {name: value for name, value in kwargs.items() if name not in names}
                scope.names[node.args.kwarg.arg] = Binding(Table(rest), call)
            if isinstance(node, ast.Lambda):
                return self.value(node.body, scope)
            returned = self._block(node.body, scope)
            return None if returned is None else returned[0]
        finally:
            self._depth -= 3

    # --- bounds -------------------------------------------------------------------------------

    def _count(self, node: ast.AST) -> None:
        self._visits += 1
        if self._visits > MAX_VISITS or self._depth > 2 * MAX_DEPTH:
            raise DataError(
                f"The script is too tangled to be read (at line {getattr(node, 'lineno', '?')}).",
                "Cut it to the part that trains.",
            )


def _as_read(target: ast.expr) -> ast.expr:
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
