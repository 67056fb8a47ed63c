"""What a name of a script may stand for in a file that is imported: a value, and nothing that runs.

A file of rewards is imported by ``abacist train``. So what is copied into it calls nothing but what
makes a value, and a value that the script changes after it was made is not copied at all.
"""

from __future__ import annotations

import ast
import builtins
import symtable
from collections.abc import Iterator, Mapping

from abacist.delivery.importing.values import PLAIN, Binding, Symbol

# Calls that are safe where a module is imported: they make a value and do nothing else.
SAFE_CALLS = {
    "re.compile", "regex.compile", "set", "frozenset", "dict", "tuple", "list", "float", "int",
    "str", "fractions.Fraction", "decimal.Decimal", "collections.Counter",
}  # fmt: skip
_SAFE_NODES = (
    ast.Constant, ast.Name, ast.Attribute, ast.List, ast.Tuple, ast.Set, ast.Dict, ast.BinOp,
    ast.UnaryOp, ast.Subscript, ast.Slice, ast.JoinedStr, ast.FormattedValue, ast.Starred,
    ast.Call, ast.keyword, ast.operator, ast.unaryop, ast.expr_context,
)  # fmt: skip
_ANNOTATION_NODES = (
    ast.Constant, ast.Name, ast.Attribute, ast.Subscript, ast.Tuple, ast.List, ast.BinOp,
    ast.BitOr, ast.expr_context,
)  # fmt: skip
_GROWING = (ast.Pow, ast.LShift, ast.Mult)  # a few characters that ask for gigabytes
# Methods and functions that read what they are given.
_READING = {
    "get", "keys", "values", "items", "index", "count", "copy", "union", "intersection",
    "difference", "issubset", "issuperset", "isdisjoint", "most_common", "total",
    "match", "search", "fullmatch", "findall", "finditer", "sub", "split", "join",
}  # fmt: skip
_READERS = {
    "len", "sum", "sorted", "any", "all", "min", "max", "set", "frozenset", "list", "tuple", "dict",
    "enumerate", "zip", "reversed", "str", "repr", "print", "isinstance", "join",
}  # fmt: skip
_FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)
_UNCERTAIN = (ast.For, ast.AsyncFor, ast.While, ast.Try, ast.With, ast.AsyncWith)


def is_safe(node: ast.AST, names: Mapping[str, Binding], *, is_known: bool) -> bool:
    """Whether an expression only makes a value. ``is_known``: its size is known to be small."""
    for one in ast.walk(node):
        if not isinstance(one, _SAFE_NODES):
            return False
        if isinstance(one, ast.Call) and _dotted(one.func, names) not in SAFE_CALLS:
            return False
        if isinstance(one, ast.Attribute) and _dotted(one, names) is None:
            return False
        if isinstance(one, _GROWING) and not is_known:
            return False
    return True


def runs_when_defined(
    function: ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda, names: Mapping[str, Binding]
) -> str | None:
    """What of a function is called where it is defined, or None."""
    defaults = [*function.args.defaults, *(one for one in function.args.kw_defaults if one)]
    if not all(is_safe(one, names, is_known=False) for one in defaults):
        return "a default value of it is computed where it is defined"
    if isinstance(function, ast.Lambda):
        return None
    if function.decorator_list:
        return f"its decorator `{ast.unparse(function.decorator_list[0])}` runs where it is defined"
    notes = [one.annotation for one in ast.walk(function.args) if isinstance(one, ast.arg)]
    for note in (*notes, function.returns):
        if note is not None and not all(
            isinstance(one, _ANNOTATION_NODES) for one in ast.walk(note)
        ):
            return "an annotation of it is computed where it is defined"
    if getattr(function, "type_params", None):
        return "it has type parameters"
    return None


def _dotted(node: ast.expr, names: Mapping[str, Binding]) -> str | None:
    """``re.compile`` of an imported ``re``, ``set`` of Python's own; None for what is neither."""
    if isinstance(node, ast.Name):
        found = names.get(node.id)
        if found is None:
            return node.id if hasattr(builtins, node.id) else None
        is_import = isinstance(found.node, ast.Import | ast.ImportFrom)
        return found.value.dotted if is_import and isinstance(found.value, Symbol) else None
    if isinstance(node, ast.Attribute):
        owner = _dotted(node.value, names)
        return None if owner is None or hasattr(builtins, owner) else f"{owner}.{node.attr}"
    return None


def literal(value: object) -> str | None:
    """A constant as Python reads it back, infinities included; None for anything else."""
    if isinstance(value, float) and (value != value or value in (float("inf"), float("-inf"))):
        return f'float("{value}")'
    return repr(value) if isinstance(value, PLAIN) else None


def bindings_of(name: str, tree: ast.AST, *, is_module: bool) -> tuple[list[ast.AST], int | None]:
    """The statements that bind a name, and the line of one that makes its value uncertain: in a
    loop, in a ``try``, by ``del`` or by ``global``."""
    found: list[ast.AST] = []
    uncertain: int | None = None
    for node, above in _with_parents(tree):
        inner = [one for one in above if isinstance(one, _FUNCTIONS)]
        match node:
            case ast.Global(names=declared) if name in declared:
                return found, node.lineno
            case ast.Name(id=bound, ctx=ast.Store() | ast.Del()) if bound == name:
                pass
            case _:
                continue
        if is_module and inner:
            continue
        if any(isinstance(one, ast.comprehension) for one in above):
            continue
        if isinstance(node.ctx, ast.Del) or any(isinstance(one, _UNCERTAIN) for one in above):
            uncertain = node.lineno
        found.append(next(one for one in reversed(above) if isinstance(one, ast.stmt)))
    return found, uncertain


def changed_at(name: str, tree: ast.AST, taken: set[int]) -> int | None:
    """The line that may change the container a name stands for, or None.

    Functions in ``taken`` (ids of nodes) go into the file too, and may do what they like.
    """
    for node, above in _with_parents(tree):
        if not isinstance(node, ast.Name) or node.id != name or not isinstance(node.ctx, ast.Load):
            continue
        if any(id(one) in taken for one in above):
            continue
        at, parent = node, above[-1]
        match parent:
            case ast.Attribute(attr=attr):
                if attr not in _READING:
                    return node.lineno
            case ast.Subscript() if parent.value is at:
                if not isinstance(parent.ctx, ast.Load):
                    return node.lineno
                # What it holds may be a container too: W["a"].append(1), W["a"]["b"] = 1
                if isinstance(above[-2], ast.Attribute) and above[-2].attr not in _READING:
                    return node.lineno
                if isinstance(above[-2], ast.Subscript | ast.Attribute) and not isinstance(
                    above[-2].ctx, ast.Load
                ):
                    return node.lineno
            case ast.Call(func=func) if func is not at:
                called = func.id if isinstance(func, ast.Name) else getattr(func, "attr", "")
                if called not in _READERS and called not in _READING:
                    return node.lineno
            case ast.Compare() | ast.BinOp() | ast.Starred() | ast.comprehension():
                pass
            case ast.If() | ast.IfExp() | ast.BoolOp() | ast.UnaryOp() | ast.FormattedValue():
                pass
            case _:
                return node.lineno  # another name for it, say
    return None


def _with_parents(tree: ast.AST) -> Iterator[tuple[ast.AST, list[ast.AST]]]:
    """Every node, with those that it stands in."""
    waiting: list[tuple[ast.AST, list[ast.AST]]] = [(tree, [])]
    while waiting:
        node, above = waiting.pop()
        yield node, above
        inner = [*above, node]
        waiting += [(child, inner) for child in ast.iter_child_nodes(node)]


def free_names(source: str) -> set[str]:
    """Names that a piece of a module reads and does not bind, Python's own among them.

    Raises SyntaxError for a piece that does not stand by itself.
    """
    top = symtable.symtable(source, "rewards.py", "exec")
    read: set[str] = set()
    bound = {one.get_name() for one in top.get_symbols() if one.is_assigned() or one.is_imported()}
    bound |= {child.get_name() for child in top.get_children()}
    waiting = [top]
    while waiting:
        table = waiting.pop()
        waiting += table.get_children()
        for one in table.get_symbols():
            is_top = table is top and one.is_referenced()
            if is_top or (table is not top and one.is_global()):
                read.add(one.get_name())
    return read - bound
