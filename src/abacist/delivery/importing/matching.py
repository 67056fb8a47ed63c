"""The patterns that a reward of a script matches: by ``re``, or compiled before."""

from __future__ import annotations

import ast
import re
from dataclasses import dataclass

from abacist.delivery.importing.reader import Reader
from abacist.delivery.importing.values import Function, Made

MAX_PATTERN_CHARACTERS = 2_000


@dataclass
class Match:
    """A pattern that is matched: text, method, flags, and the expression it is matched on."""

    text: str
    method: str
    flags: str
    on: ast.expr | None

    @property
    def is_dotall(self) -> bool:
        """Whether its dots match line breaks."""
        return (
            bool(re.search(r"\b(DOTALL|S)\b", self.flags))
            or "(?s" in self.text
            or "[\\s\\S]" in self.text
        )

    @property
    def is_whole(self) -> bool:
        """Whether it must match the whole reply."""
        begins = self.text.startswith(("^", r"\A")) or self.method in ("match", "fullmatch")
        return self.method == "fullmatch" or (begins and self.text.endswith(("$", r"\Z")))


def match_of(node: ast.expr, reader: Reader, function: Function) -> Match | None:
    """The pattern that a call matches, by ``re`` or compiled, and what it is matched on."""
    if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
        return None
    owner = reader.value(node.func.value, function.scope)
    if isinstance(owner, Made) and owner.name == "compile" and owner.args:
        text, flags, args = owner.args[0], _flags(owner.node, 1), node.args
    else:
        named = ast.unparse(node.func.value)
        if named not in ("re", "regex") or not node.args:
            return None
        text, flags, args = (
            reader.value(node.args[0], function.scope),
            _flags(node, 2),
            node.args[1:],
        )
    if not isinstance(text, str) or len(text) >= MAX_PATTERN_CHARACTERS:
        return None
    return Match(text, node.func.attr, flags, args[0] if args else None)


def _flags(call: ast.AST, first: int) -> str:
    if not isinstance(call, ast.Call):
        return ""
    given = [*call.args[first:], *(one.value for one in call.keywords if one.arg == "flags")]
    return " ".join(ast.unparse(one) for one in given)
