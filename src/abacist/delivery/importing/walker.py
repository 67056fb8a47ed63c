"""What calls and comprehensions ask of the reader that walks the script."""

from __future__ import annotations

import ast
from contextlib import AbstractContextManager
from typing import Any, Protocol

from abacist.delivery.importing.values import Made, Scope


class Walker(Protocol):
    """A reader, as far as the parts of it that stand in files of their own see it."""

    made: list[Made]
    returned: list[list[Any]]

    def value(self, node: ast.expr, scope: Scope) -> Any:
        """What an expression stands for."""

    def is_true(self, node: ast.expr, scope: Scope) -> bool | None:
        """A test: true, false, or None for unknown."""

    def walk(self, body: list[ast.stmt], scope: Scope) -> list[Any] | None:
        """Walk statements; ``[value]`` where they return."""

    def bind(self, target: ast.expr, value: Any, node: ast.AST, scope: Scope) -> None:
        """Bind what stands left of an ``=``."""

    def resolved(self, value: Any) -> Any:
        """What a name of a module beside the script stands for; anything else as it is."""

    def attribute(self, owner: Any, name: str, node: ast.expr) -> Any:
        """What ``owner.name`` stands for."""

    def set_attribute(self, owner: Any, name: Any, value: Any, line: int) -> None:
        """``owner.name = value``."""

    def deeper(self) -> AbstractContextManager[bool]:
        """Inside of a function: whether calls are nested too deeply."""
