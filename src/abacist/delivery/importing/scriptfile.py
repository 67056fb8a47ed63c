"""The Python text of a script or notebook, and where each of its lines stands.

Nothing is executed. Lines that only a notebook understands (``%pip``, ``!nvidia-smi``, cells in
another language) are blanked, so that line numbers stay what they are.
"""

from __future__ import annotations

import ast
import json
import re
import warnings
from dataclasses import dataclass, field
from pathlib import Path

from abacist.errors import DataError

MAX_SCRIPT_CHARS = 1_000_000
MAX_FILE_BYTES = 64_000_000  # a notebook keeps its pictures
MAX_MODULES = 20

# Cells in these are no Python; other cell magics (%%capture, %%time) stand above Python.
_OTHER_LANGUAGES = re.compile(
    r"%%(bash|sh|script|html|javascript|js|latex|markdown|perl|ruby|sql|svg|writefile|cmd)\b"
)
_MAGIC_LINE = re.compile(r"(\s*)([!%].*|\?.*|[\w.]+\?{1,2}\s*)")
_MAGIC_VALUE = re.compile(r"(\s*\w+\s*=\s*)[!%].*")
_PRINT_STATEMENT = re.compile(r"\s*print\s+[^\s(=]")


@dataclass(frozen=True)
class Module:
    """A module beside the script. Its lines are counted on from ``start``."""

    path: Path
    tree: ast.Module
    start: int


@dataclass(frozen=True)
class ScriptFile:
    """The text of a script with its syntax tree."""

    path: Path
    text: str
    tree: ast.Module
    #: for a notebook, the first line of each code cell in ``text``
    cell_starts: list[int] = field(default_factory=list)
    #: modules beside the script that it imports, by name; their lines go on where the last ends
    modules: dict[str, Module] = field(default_factory=dict)

    def module_of(self, line: int) -> Module | None:
        """The module beside the script that holds a line; None for the script's own."""
        found = [one for one in self.modules.values() if one.start <= line]
        return max(found, key=lambda one: one.start, default=None)

    def where(self, line: int | None) -> str:
        """A line as a person finds it: ``line 12``, or ``cell 3, line 2`` of a notebook."""
        if line is None:
            return "the script"
        if (module := self.module_of(line)) is not None:
            return f"{module.path.name}, line {line - module.start + 1}"
        cell = sum(start <= line for start in self.cell_starts)
        if not cell:
            return f"line {line}"
        return f"code cell {cell}, line {line - self.cell_starts[cell - 1] + 1}"

    def snippet(self, node: ast.AST) -> str:
        """The source of a node on one line, cut short."""
        text = " ".join((ast.get_source_segment(self.text, node) or "").split())
        return text if len(text) <= 60 else text[:57] + "…"


def read_script(path: Path) -> ScriptFile:
    """Read a ``.py`` script or an ``.ipynb`` notebook.

    Raises DataError, with the line, for a file that cannot be read, is no text, is too large, is no
    notebook, or is not Python 3.
    """
    try:
        if path.is_dir():
            raise DataError(f"{path} is a folder.", "Name the script in it.")
        size = path.stat().st_size
        if size > MAX_FILE_BYTES:
            raise DataError(f"{path} holds {size:,} bytes: no script is that large.", "Check it.")
        data = path.read_bytes()
    except OSError as error:
        raise DataError(
            f"{path} cannot be read: {error.strerror}.", "Name a .py or .ipynb file."
        ) from error
    except ValueError as error:  # a null byte in the name
        raise DataError(
            f"{str(path)!r} is no path: {error}.", "Name a .py or .ipynb file."
        ) from None
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise DataError(
            f"{path}, line {line}: this is no UTF-8 text.", "Save it as UTF-8, if it is a script."
        ) from error
    if path.suffix.lower() == ".ipynb" or text.lstrip().startswith('{"cells"'):
        return _with_modules(_notebook(path, text))
    return _with_modules(script_of(text, path))


def _with_modules(script: ScriptFile) -> ScriptFile:
    """The script, with the modules beside it that it and they import."""
    waiting: list[ast.Module] = [script.tree]
    start = script.text.count("\n") + 2
    while waiting and len(script.modules) < MAX_MODULES:
        for name in _imported(waiting.pop(0)):
            path = script.path.parent.joinpath(*name.split(".")).with_suffix(".py")
            if name in script.modules or path == script.path:
                continue
            try:
                if not path.is_file() or path.stat().st_size > MAX_SCRIPT_CHARS:
                    continue
                text = path.read_text(encoding="utf-8-sig")
                tree = _parsed(text.replace("\r\n", "\n"))
            except (OSError, ValueError, SyntaxError):
                continue  # what it holds stays a name, and is told as one
            ast.increment_lineno(tree, start - 1)
            script.modules[name] = Module(path, tree, start)
            start += text.count("\n") + 1
            waiting.append(tree)
    return script


def _imported(tree: ast.Module) -> list[str]:
    """The modules that a text imports, by the names under which they would stand beside it."""
    names: list[str] = []
    for node in ast.walk(tree):
        match node:
            case ast.Import():
                names += [alias.name for alias in node.names]
            case ast.ImportFrom(module=str() as module) if node.level < 2:
                names += [module, *(f"{module}.{alias.name}" for alias in node.names)]
            case ast.ImportFrom() if node.level == 1:
                names += [alias.name for alias in node.names]
    return [name for name in dict.fromkeys(names) if name and name != "*"]


def script_of(text: str, path: Path, cell_starts: list[int] | None = None) -> ScriptFile:
    """Parse the text of a script. Raises DataError, with the line, for what is not Python 3."""
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    if len(text) > MAX_SCRIPT_CHARS:
        raise DataError(
            f"{path} holds {len(text):,} characters of code: no script is that long.",
            "Cut it to the part that trains.",
        )
    starts = cell_starts or []
    try:
        return ScriptFile(path, text, _parsed(text), starts)
    except SyntaxError:
        plain = _without_magics(text)
    try:
        return ScriptFile(path, plain, _parsed(plain), starts)
    except SyntaxError as error:
        raise _not_python(error, ScriptFile(path, plain, ast.Module([], []), starts)) from None


def _parsed(text: str) -> ast.Module:
    """The tree. SyntaxError for whatever keeps Python from parsing the text."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # "\d" in a text that is no raw one, say
            return ast.parse(text)
    except (ValueError, RecursionError, MemoryError) as error:  # a null byte, deep nesting
        what = "it is nested too deeply" if not isinstance(error, ValueError) else str(error)
        raise SyntaxError(what) from error


def _not_python(error: SyntaxError, script: ScriptFile) -> DataError:
    where = script.where(error.lineno) if error.lineno else "somewhere"
    lines = script.text.split("\n")
    line = lines[error.lineno - 1] if error.lineno and error.lineno <= len(lines) else ""
    hint = "It must be a script that Python 3 can parse."
    if _PRINT_STATEMENT.match(line) or ("print" in (error.msg or "") and "parenthes" in error.msg):
        hint = "This is Python 2. `python -m lib2to3 -w` of a Python before 3.13 converts it."
    return DataError(f"{script.path}, {where}: {error.msg}.", hint)


def _without_magics(text: str) -> str:
    """``text`` with the lines blanked that are IPython's, and those that they go on in.

    >>> _without_magics("%pip install trl\\nif x:\\n    !ls\\nfiles = !ls")
    'pass\\nif x:\\n    pass\\nfiles = None'
    >>> _without_magics("!pip install \\\\\\n    trl\\nx = 1")
    'pass\\n\\nx = 1'
    """
    lines: list[str] = []
    goes_on = False
    for line in text.split("\n"):
        if goes_on:
            goes_on = line.endswith("\\")
            lines.append("")
            continue
        if magic := _MAGIC_LINE.fullmatch(line) or _MAGIC_VALUE.fullmatch(line):
            goes_on = line.endswith("\\")
            line = magic[1] + ("None" if "=" in magic[1] else "pass")
        lines.append(line)
    return "\n".join(lines)


def _notebook(path: Path, text: str) -> ScriptFile:
    try:
        document = json.loads(text)
        cells = document["cells"] if "cells" in document else document["worksheets"][0]["cells"]
        code = [_source_of(cell) for cell in cells if cell.get("cell_type") == "code"]
    except (ValueError, KeyError, IndexError, TypeError, AttributeError, RecursionError) as error:
        raise DataError(
            f"{path} is no Jupyter notebook: {type(error).__name__}.",
            "Save it again, or export it as a Python script.",
        ) from error
    starts, parts, line = [], [], 1
    for source in code:
        if _OTHER_LANGUAGES.match(source.lstrip()):
            source = "\n" * source.count("\n")
        starts.append(line)
        parts.append(source)
        line += source.count("\n") + 1
    return script_of("\n".join(parts), path, starts)


def _source_of(cell: dict[str, object]) -> str:
    source = cell.get("source", cell.get("input", ""))
    joined = "".join(map(str, source)) if isinstance(source, list) else str(source)
    return joined.replace("\r\n", "\n").replace("\r", "\n")
