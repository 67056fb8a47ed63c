"""A reward function of a script's own, taken out of it with all that it needs.

The functions go into a file that holds nothing else: importing it loads no model and starts no
training, as importing the script would. What a function needs and the text does not tell (the
tokenizer, an open file, a model) keeps it from being taken out, and is named.
"""

from __future__ import annotations

import ast
import builtins
import copy
from dataclasses import dataclass, field

from abacist.delivery.importing.constants import (
    bindings_of,
    changed_at,
    free_names,
    is_safe,
    literal,
    runs_when_defined,
)
from abacist.delivery.importing.scriptfile import ScriptFile
from abacist.delivery.importing.values import (
    Binding,
    Class,
    Function,
    Instance,
    Made,
    Symbol,
    Unknown,
    is_plain,
)
from abacist.task.rewards import is_built_in_name

MAX_PARTS = 200
ADAPTER = "as_in_script"


class CannotTake(Exception):
    """Why a function cannot be taken out; ``line`` is where what is missing is bound."""

    def __init__(self, why: str, line: int) -> None:
        super().__init__(why)
        self.line = line


@dataclass
class RewardFile:
    """The module that is written beside the configuration, piece by piece."""

    script: ScriptFile
    #: what the names of the module stand for, when all of it has been read
    module_names: dict[str, Binding]
    imports: list[str] = field(default_factory=list)
    parts: dict[str, str] = field(default_factory=dict)
    #: rewards that are handed something else than they ask for, by name
    adapted: dict[str, str] = field(default_factory=dict)
    names: dict[tuple[int, int], str] = field(default_factory=dict)
    packages: set[str] = field(default_factory=set)

    def take(self, function: Function, adapter: str = "", arguments: str = "") -> str:
        """Add a reward; returns the name to call it by. Raises CannotTake, with nothing added.

        Where there is an ``adapter``, a function, its name stands for what that makes of it.
        """
        before = self._contents()
        try:
            name = self._function(function, is_reward=True)
            if adapter:
                self._part(ADAPTER, adapter, function.node.lineno)
                self.adapted[name] = f"{name} = {ADAPTER}({name}, {arguments})\n"
            self._check(function.node.lineno)
            return name
        except CannotTake:
            self.imports, self.parts, self.adapted, self.names, self.packages = before
            raise

    def _contents(
        self,
    ) -> tuple[list[str], dict[str, str], dict[str, str], dict[tuple[int, int], str], set[str]]:
        return (list(self.imports), dict(self.parts), dict(self.adapted), dict(self.names),
                set(self.packages))  # fmt: skip

    def text(self) -> str:
        """The module, or "" where nothing was taken."""
        if not self.parts:
            return ""
        head = (
            f'"""Rewards taken from {_plain(self.script.path.name)} by `abacist import-gist`."""\n'
        )
        parts = [*self.parts.values(), *(["".join(self.adapted.values())] if self.adapted else [])]
        imports = "\n".join(sorted(set(self.imports), key=_future_first))
        return "\n".join([head, *([imports, ""] if imports else []), "\n\n".join(parts), ""])

    def _check(self, line: int) -> None:
        """Every name is bound, and Python compiles it."""
        try:
            compile(self.text(), "rewards.py", "exec", dont_inherit=True)
            missing = {one for one in free_names(self.text()) if not hasattr(builtins, one)}
        except (SyntaxError, ValueError, RecursionError) as error:
            raise CannotTake(f"what it needs is no module ({error})", line) from None
        if missing:
            raise CannotTake(f"it needs `{min(missing)}`, which cannot be taken out", line)

    def _function(self, function: Function, *, is_reward: bool = False) -> str:
        key = (id(function.node), id(function.scope))  # each call of a factory makes another
        if key in self.names:
            return self.names[key]
        name = function.name
        if is_reward and (is_built_in_name(name) or name in self.parts):
            name = f"script_{name}"
        if name in self.parts:
            raise CannotTake(f"another {name} is needed too", function.node.lineno)
        if what := runs_when_defined(function.node, self.module_names):
            raise CannotTake(what, function.node.lineno)
        self.names[key] = name
        if len(self.names) > MAX_PARTS:
            raise CannotTake("it needs too much of the script", function.node.lineno)
        self._needs(function)
        self.parts[name] = self._source(function, name, is_reward=is_reward)
        return name

    def _source(self, function: Function, name: str, *, is_reward: bool) -> str:
        node = function.node
        if isinstance(node, ast.Lambda):
            arguments = ast.unparse(_taking_columns(node.args) if is_reward else node.args)
            return f"def {name}({arguments}):\n    return {ast.unparse(node.body)}\n"
        is_changed = name != node.name or (is_reward and node.args.kwarg is None)
        first = node.decorator_list[0].lineno if node.decorator_list else node.lineno
        lines = self.script.text.split("\n")[first - 1 : node.end_lineno]
        if not is_changed and not node.col_offset:
            return "\n".join(line.rstrip() for line in lines) + "\n"  # its comments too
        changed = copy.deepcopy(node)
        changed.name = name
        if is_reward:
            changed.args = _taking_columns(changed.args)
        return ast.unparse(changed) + "\n"

    def _needs(self, function: Function) -> None:
        """Add what the function's free names stand for."""
        for name, line in _free_names(function.node):
            found = function.scope.find(name)
            if found is None:
                if not hasattr(builtins, name):
                    raise CannotTake(f"`{name}` is not defined in the script", line)
            else:
                self._binding(name, found, line)

    def _binding(self, name: str, found: Binding, line: int) -> None:
        value = found.value
        if isinstance(found.node, ast.Import | ast.ImportFrom) and isinstance(value, Symbol):
            self._import(name, found.node, line)
        elif isinstance(value, Function):
            made = self._function(value)
            if made != name and not value.is_lambda:
                raise CannotTake(f"`{name}` is another name of `{made}`", line)
            if value.is_lambda:
                self._part(name, f"{name} = {made}\n", line)
        elif isinstance(value, Class):
            self._class(name, value, line)
        elif isinstance(value, Unknown | Instance):
            where = getattr(found.node, "lineno", line)
            raise CannotTake(f"it needs `{name}`, which {_why(value)}", where)
        else:
            self._constant(name, found, line)

    def _constant(self, name: str, found: Binding, line: int) -> None:
        """A value as the script writes it, unless the script may change it afterwards."""
        is_module = self.module_names.get(name) is found
        binders, uncertain = bindings_of(name, self.script.tree, is_module=is_module)
        if uncertain is not None:
            raise CannotTake(f"it needs `{name}`, whose value depends on what runs", uncertain)
        if (text := literal(found.value)) is not None:
            self._part(name, f"{name} = {text}\n", line)
            return
        node = found.node
        where = getattr(node, "lineno", line)
        if not is_module or len(binders) != 1 or not _binds_alone(binders[0], node):
            raise CannotTake(f"it needs `{name}`, which only a run of the script makes", where)
        taken = {one for one, _ in self.names}
        if (at := changed_at(name, self.script.tree, taken)) is not None:
            raise CannotTake(f"it needs `{name}`, which the script may change", at)
        is_known = is_plain(found.value)
        if not is_known and not isinstance(found.value, Made | Symbol):
            raise CannotTake(f"it needs `{name}`, which only a run of the script makes", where)
        if not isinstance(node, ast.expr) or not is_safe(
            node, self.module_names, is_known=is_known
        ):
            raise CannotTake(f"it needs `{name}`, which only a run of the script makes", where)
        for inner, at in _free_names(ast.Lambda(_no_arguments(), node)):
            if inner not in self.module_names or inner == name:
                continue
            others, _ = bindings_of(inner, self.script.tree, is_module=True)
            if len(others) > 1:
                raise CannotTake(f"it needs `{inner}`, which stands for several values", at)
            self._binding(inner, self.module_names[inner], at)
        self._part(name, f"{name} = {ast.unparse(node)}\n", line)

    def _part(self, name: str, text: str, line: int) -> None:
        if self.parts.setdefault(name, text) != text:
            raise CannotTake(f"`{name}` stands for several values", line)

    def _class(self, name: str, value: Class, line: int) -> None:
        raise CannotTake(f"it needs the class `{name}`", value.node.lineno)

    def _import(self, name: str, node: ast.Import | ast.ImportFrom, line: int) -> None:
        for alias in node.names:
            bound = alias.asname or (
                alias.name.partition(".")[0] if isinstance(node, ast.Import) else alias.name
            )
            if bound != name:
                continue
            if isinstance(node, ast.ImportFrom) and node.level:
                raise CannotTake(f"it needs `{name}` of the package that it is in", node.lineno)
            top = (node.module if isinstance(node, ast.ImportFrom) else alias.name) or ""
            self.packages.add(top.partition(".")[0])
            renamed = f" as {alias.asname}" if alias.asname else ""
            self.imports.append(
                f"import {alias.name}{renamed}"
                if isinstance(node, ast.Import)
                else f"from {node.module} import {alias.name}{renamed}"
            )
            return


def _why(value: object) -> str:
    return str(getattr(value, "why", "only a run of the script makes"))


def _plain(name: str) -> str:
    """A file name that can stand in a docstring."""
    return "".join(one if one.isalnum() or one in "-_. " else "?" for one in name)


def _future_first(line: str) -> tuple[bool, str]:
    return not line.startswith("from __future__"), line


def _no_arguments() -> ast.arguments:
    return ast.arguments([], [], None, [], [], None, [])


def _taking_columns(given: ast.arguments) -> ast.arguments:
    """The parameters, with one that takes the columns which TRL hands to every reward."""
    if given.kwarg is not None:
        return given
    changed = copy.deepcopy(given)
    changed.kwarg = ast.arg("columns")
    return changed


def _binds_alone(statement: ast.AST, value: ast.AST) -> bool:
    """Whether a statement is ``NAME = VALUE`` of this value."""
    match statement:
        case ast.Assign(targets=[ast.Name()]) | ast.AnnAssign(target=ast.Name()):
            return statement.value is value
    return False


def _free_names(node: ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda) -> list[tuple[str, int]]:
    """Names that a function reads and does not bind itself, with the first line of each."""
    try:
        names = free_names(ast.unparse(node))
    except (SyntaxError, RecursionError) as error:
        raise CannotTake(f"it does not stand by itself ({error})", node.lineno) from None
    lines: dict[str, int] = {}
    for one in ast.walk(node):
        if isinstance(one, ast.Name) and one.id in names:
            lines.setdefault(one.id, one.lineno)
    return [
        (name, lines.get(name, 0)) for name in sorted(names, key=lambda n: (lines.get(n, 0), n))
    ]
