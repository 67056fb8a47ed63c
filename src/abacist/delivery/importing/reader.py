"""Walks a script and keeps what it calls: a reader, not an interpreter.

Statements are walked in order, functions of the script's own are followed where they are called,
and arithmetic on constants is done. Nothing of the script runs, and the work is bounded.
"""

from __future__ import annotations

import ast
import builtins
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from abacist.delivery.importing.branches import Containers, as_if, as_read, comprehension
from abacist.delivery.importing.calls import call, follow
from abacist.delivery.importing.known_calls import binary, compared, joined, of_list
from abacist.delivery.importing.values import (
    MAX_DEPTH,
    MAX_ITEMS,
    PLAIN,
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
    done,
    either,
    elements,
    is_plain,
    one_of_returned,
    pads_widely,
    unknown_of,
)
from abacist.errors import DataError

MAX_VISITS = 300_000
MAX_ROUNDS = 64


class Reader:
    """Walks a module; :attr:`made` then holds every call of something foreign, in order.

    ``beside`` are the modules that stand beside the script, by their names. They are read where
    the script imports something of them.
    """

    def __init__(self, tree: ast.Module, beside: Mapping[str, ast.Module] | None = None) -> None:
        self.module = Scope()
        self.made: list[Made] = []
        self.functions: list[Function] = []
        #: for each function that is walked, what it returned under conditions
        self.returned: list[list[Any]] = [[]]
        self.taken: set[int] = set()
        self.skipped: list[ast.AST] = []
        self.beside = beside or {}
        self._modules: dict[str, Scope] = {}
        self._visits = 0
        self._depth = 0
        self.walk(tree.body, self.module)

    def follow(self, function: Function, *args: Any, **kwargs: Any) -> Any:
        """What a function of the script's returns for these arguments."""
        return follow(self, function, list(args), kwargs, function.node)

    def skipped_nodes(self) -> set[int]:
        """The nodes (by id) of branches that no condition of the script leads to."""
        never = [one for one in self.skipped if id(one) not in self.taken]
        return {id(node) for one in never for node in ast.walk(one)}

    @contextmanager
    def deeper(self) -> Iterator[bool]:
        """Inside of a function: whether calls are nested too deeply."""
        self._depth += 3
        self.returned.append([])
        try:
            yield self._depth > MAX_DEPTH
        finally:
            self._depth -= 3
            self.returned.pop()

    # --- modules beside the script --------------------------------------------------------------

    def resolved(self, value: Any) -> Any:
        """What a name of a module beside the script stands for; anything else as it is."""
        if not isinstance(value, Symbol):
            return value
        module, _, name = value.dotted.lstrip(".").rpartition(".")
        if module in self.beside:
            found = self._names_of(module).get(name)
            return value if found is None else found.value
        if any(module.startswith(f"{one}.") for one in self.beside):
            owner = self.resolved(Symbol(module))
            if isinstance(owner, Class | Instance):
                return self.attribute(owner, name, ast.Name(name, lineno=0))
        return value

    def _names_of(self, module: str) -> dict[str, Binding]:
        if module not in self._modules:
            scope = self._modules[module] = Scope()
            scope.names["__name__"] = Binding(module, self.beside[module])
            with self.deeper() as is_too_deep:
                if not is_too_deep:
                    self.walk(self.beside[module].body, scope)
        return self._modules[module].names

    def _imported(self, dotted: str) -> Any:
        """A name of another module. A function stays a name, to be imported by it."""
        found = self.resolved(Symbol(dotted))
        return Symbol(dotted) if isinstance(found, Function) else found

    # --- statements ---------------------------------------------------------------------------

    def walk(self, body: list[ast.stmt], scope: Scope) -> list[Any] | None:
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
                module = f"{'.' * node.level}{node.module or ''}"
                for alias in node.names:
                    found = self._imported(f"{module}.{alias.name}")
                    scope.names[alias.asname or alias.name] = Binding(found, node)
                    if alias.name == "*" and module.lstrip(".") in self.beside:
                        names = self._names_of(module.lstrip("."))
                        for name in (one for one in names if not one.startswith("_")):
                            found = self._imported(f"{module}.{name}")
                            scope.names[name] = Binding(found, node)
            case ast.Assign():
                value = self.value(node.value, scope)
                for target in node.targets:
                    self.bind(target, value, node.value, scope)
            case ast.AnnAssign(value=ast.expr() as expression):
                self.bind(node.target, self.value(expression, scope), expression, scope)
            case ast.AugAssign():
                self._augment(node, scope)
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
                        self.bind(item.optional_vars, value, item.context_expr, scope)
                return self.walk(node.body, scope)
            case ast.Try():
                returned = self.walk(node.body, scope)
                if returned is None:
                    returned = self.walk(node.orelse, scope)
                self.walk(node.finalbody, scope)
                return returned
            case ast.For() | ast.AsyncFor():
                return self._for(node, scope)
            case ast.While():
                self._some_rounds(node, scope)
            case ast.Delete():
                for target in node.targets:
                    self._delete(target, scope)
            case ast.Match():
                return self._statement(as_if(node), scope)
            case _:
                pass
        return None

    def _augment(self, node: ast.AugAssign, scope: Scope) -> None:
        """``x += y``; a list or dict is changed in place."""
        read = as_read(node.target)
        owner = self.value(read, scope)
        if isinstance(owner, list) and isinstance(node.op, ast.Add):
            of_list(owner, "extend", [self.value(node.value, scope)], node.lineno)
        elif isinstance(owner, Table) and isinstance(node.op, ast.BitOr):
            owner.take(self.value(node.value, scope), node.lineno)
        else:
            sum_ = ast.copy_location(ast.BinOp(read, node.op, node.value), node)
            self.bind(node.target, self.value(sum_, scope), node.value, scope)

    def _for(self, node: ast.For | ast.AsyncFor, scope: Scope) -> list[Any] | None:
        items = elements(value := self.value(node.iter, scope))
        jumps = (ast.Break, ast.Continue)
        if (
            items is None
            or len(items) > MAX_ROUNDS
            or any(isinstance(one, jumps) for part in node.body for one in ast.walk(part))
        ):
            self.bind(node.target, unknown_of(node.lineno, value), node.iter, scope)
            self._some_rounds(node, scope)
            return None
        for one in items:
            self.bind(node.target, one, node.iter, scope)
            if (returned := self.walk(node.body, scope)) is not None:
                return returned
        return self.walk(node.orelse, scope)

    def _some_rounds(self, node: ast.For | ast.AsyncFor | ast.While, scope: Scope) -> None:
        """A loop of which the text does not tell how often it runs."""
        held = Containers(node.body, scope)
        self.walk(node.body, scope)
        held.join(held.before, node.lineno, lists=False)
        self._forget(node.body, scope)

    def _delete(self, target: ast.expr, scope: Scope) -> None:
        match target:
            case ast.Name(id=name):
                scope.names[name] = Binding(Unknown(target.lineno, "is deleted"), target)
            case ast.Subscript():
                owner, key = self.value(target.value, scope), self.value(target.slice, scope)
                if isinstance(owner, Table) and isinstance(key, PLAIN):
                    owner.pop(key, None)
                elif isinstance(owner, Table):
                    owner.take(key, target.lineno)
                elif isinstance(owner, list):
                    owner[:] = [Unknown(target.lineno)]

    def _if(self, node: ast.If, scope: Scope) -> list[Any] | None:
        test = self.is_true(node.test, scope)
        if test is not None:
            taken, rest = (node.body, node.orelse) if test else (node.orelse, node.body)
            self.taken |= {id(one) for one in taken}
            self.skipped += rest
            return self.walk(taken, scope)
        self.taken |= {id(one) for one in (*node.body, *node.orelse)}
        # Either may be taken: what both leave alike is known.
        before = dict(scope.names)
        held = Containers([*node.body, *node.orelse], scope)
        first = self.walk(node.body, scope)
        after_body, scope.names = scope.names, dict(before)
        contents = held.put_back()
        second = self.walk(node.orelse, scope)
        held.join(contents, node.lineno)
        for name in {*after_body, *scope.names}:
            one, other = after_body.get(name), scope.names.get(name)
            if one is None or other is None:
                # Only one branch binds it, so whatever is used afterwards is that.
                scope.names[name] = one or other  # type: ignore[assignment]
            elif one is not other:
                line = getattr(one.node, "lineno", node.lineno)
                scope.names[name] = Binding(either(line, one.value, other.value), one.node)
        if first is not None and second is not None:
            return [one_of_returned(node.lineno, first[0], second[0])]
        if first is not None or second is not None:  # the other goes on, and what follows is read
            self.returned[-1] += first or second or []
        return None

    def _forget(self, body: list[ast.stmt], scope: Scope) -> None:
        """A value that a loop makes of the one before is not known after it."""
        for inner in (node for statement in body for node in ast.walk(statement)):
            self._count(inner)
            match inner:
                case ast.AugAssign(target=target):
                    self.bind(target, Unknown(inner.lineno), inner, scope)
                case ast.Assign(targets=[ast.Name(id=name) as target], value=value) if any(
                    isinstance(one, ast.Name) and one.id == name for one in ast.walk(value)
                ):
                    found = scope.find(name)
                    if found is not None and isinstance(found.value, PLAIN):
                        self.bind(target, Unknown(inner.lineno), inner, scope)

    def _class(self, node: ast.ClassDef, scope: Scope) -> Class:
        bases = [self.value(base, scope) for base in node.bases]
        fields = Table()
        for base in bases:
            if isinstance(base, Class):
                fields.update(base.fields)
                fields.lines |= base.fields.lines
        methods = {
            name: one for base in bases if isinstance(base, Class)
            for name, one in base.methods.items()
        }  # fmt: skip
        inner = Scope(outer=scope)
        for statement in node.body:
            self._count(statement)
            if isinstance(statement, ast.FunctionDef):
                methods[statement.name] = Function(statement, scope, node.name)
                self.functions.append(methods[statement.name])
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
        return Class(node, bases, fields, methods)

    def _field_default(self, made: Made) -> Any:
        factory = made.kwargs.get("default_factory")
        if isinstance(factory, Function):
            return self.follow(factory)
        return made.kwargs.get("default", Unknown(made.line))

    def bind(self, target: ast.expr, value: Any, node: ast.AST, scope: Scope) -> None:
        """Bind what stands left of an ``=``."""
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
                    self.bind(one, part, node, scope)
            case ast.Attribute():
                self.set_attribute(
                    self.value(target.value, scope), target.attr, value, target.lineno
                )
            case ast.Subscript():
                owner, key = self.value(target.value, scope), self.value(target.slice, scope)
                if isinstance(owner, Table):
                    key = key if isinstance(key, PLAIN) else REST
                    owner.take({key: value}, target.lineno)
                elif isinstance(owner, list):
                    if isinstance(key, int) and -len(owner) <= key < len(owner):
                        owner[key] = value
                    else:
                        owner[:] = [Unknown(target.lineno)]
            case _:
                pass

    def set_attribute(self, owner: Any, name: Any, value: Any, line: int) -> None:
        """``owner.name = value``; of a name that is not known, any attribute may be it."""
        if not isinstance(name, str):
            name, value = REST, unknown_of(line, name, value)
        if isinstance(owner, Made):
            owner.kwargs[name] = value
            owner.lines[name] = line
        elif isinstance(owner, Instance | Class):
            owner.fields[name] = value
            owner.fields.lines[name] = line

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
                return self.attribute(self.value(node.value, scope), node.attr, node)
            case ast.Call():
                return call(self, node, scope)
            case ast.Lambda():
                return Function(node, scope)
            case ast.List() | ast.Tuple() | ast.Set():
                return self._items(node.elts, scope)
            case ast.Dict():
                return self._dict(node, scope)
            case ast.JoinedStr():
                return joined([self.value(part, scope) for part in node.values], node)
            case ast.FormattedValue():
                inner = self.value(node.value, scope)
                spec = "" if node.format_spec is None else self.value(node.format_spec, scope)
                if isinstance(inner, Made) and not spec and node.conversion == -1:
                    return inner
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
                test = self.is_true(node.test, scope)
                if test is not None:
                    taken, rest = (node.body, node.orelse) if test else (node.orelse, node.body)
                    self.taken.add(id(taken))
                    self.skipped.append(rest)
                    return self.value(taken, scope)
                first, second = self.value(node.body, scope), self.value(node.orelse, scope)
                return either(node.lineno, first, second)
            case ast.ListComp() | ast.GeneratorExp() | ast.DictComp():
                return comprehension(self, node, scope)
            case ast.Subscript():
                return self._index(node, scope)
            case ast.Starred() | ast.Await():
                return self.value(node.value, scope)
            case ast.NamedExpr():
                value = self.value(node.value, scope)
                self.bind(node.target, value, node.value, scope)
                return value
            case _:
                return Unknown(node.lineno)

    def _items(self, nodes: list[ast.expr], scope: Scope) -> Any:
        items: list[Any] = []
        for one in nodes:
            value = self.value(one, scope)
            starred = elements(value) if isinstance(one, ast.Starred) else None
            if starred is not None:
                items += starred
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
                table.take(value, value_node.lineno)
                continue
            key = self.value(key_node, scope)
            table[key if isinstance(key, PLAIN) else REST] = value
            table.lines[key if isinstance(key, PLAIN) else REST] = value_node.lineno
        return table

    def attribute(self, owner: Any, name: str, node: ast.expr) -> Any:
        """What ``owner.name`` stands for."""
        match owner:
            case Symbol():
                return self._imported(f"{owner.dotted}.{name}")
            case Instance() | Class():
                kind = owner.kind if isinstance(owner, Instance) else owner
                method = kind.methods.get(name) if kind is not None else None
                if name in owner.fields or method is None:
                    return owner.fields.look_up(
                        name, node.lineno, Unknown(node.lineno, "is not defined here")
                    )
                return self._method(owner, method)
            case Made():
                if name in owner.kwargs:
                    return owner.kwargs[name]
                return Made(f".{name}", f".{name}", [], {}, node, owner)
        return owner if isinstance(owner, Unknown) else Unknown(node.lineno)

    def _method(self, owner: Instance | Class, method: Function) -> Any:
        """A method bound as its decorators say; a property is what it gives."""
        marks = {ast.unparse(one) for one in getattr(method.node, "decorator_list", ())}
        if "staticmethod" in marks:
            return method
        if "classmethod" in marks:
            kind = owner.kind if isinstance(owner, Instance) else owner
            return replace(method, owner=kind)
        if not isinstance(owner, Instance):
            return method
        bound = replace(method, owner=owner)
        return self.follow(bound) if marks & {"property", "cached_property"} else bound

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
        if isinstance(owner, Table) and isinstance(key, PLAIN):
            return owner.look_up(key, node.lineno, Unknown(node.lineno))
        if isinstance(owner, list | tuple | str):
            return done(lambda: owner[key], node.lineno)
        return owner if isinstance(owner, Unknown) else Unknown(node.lineno)

    def _binary(self, node: ast.BinOp, scope: Scope) -> Any:
        left, right = self.value(node.left, scope), self.value(node.right, scope)
        if isinstance(node.op, ast.Add) and isinstance(left, list) and isinstance(right, list):
            return [*left, *right] if len(left) + len(right) <= MAX_ITEMS else Unknown(node.lineno)
        if isinstance(node.op, ast.BitOr) and Table in (type(left), type(right)):
            table = Table()
            for one in (left, right):
                table.take(one, node.lineno)
            return table
        if isinstance(node.op, ast.Add) and Made in (type(left), type(right)):
            return joined([left, right], node)
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

    def is_true(self, node: ast.expr, scope: Scope) -> bool | None:
        """A test: true, false, or None for unknown. A script is read as one that is run."""
        match node:
            case ast.Compare(left=ast.Name(id="__name__")) if scope.find("__name__") is None:
                return True
            case ast.Name(id="TYPE_CHECKING"):
                return False
        value = self.value(node, scope)
        return bool(value) if is_plain(value) else None

    # --- bounds -------------------------------------------------------------------------------

    def _count(self, node: ast.AST) -> None:
        self._visits += 1
        if self._visits > MAX_VISITS or self._depth > 2 * MAX_DEPTH:
            raise DataError(
                f"The script is too tangled to be read (at line {getattr(node, 'lineno', '?')}).",
                "Cut it to the part that trains.",
            )
