"""Text is UTF-8 on every machine: whoever reads or writes it as text names the encoding.

Without a name Python takes the machine's own (cp1252 on many a Windows), and a run made there
could not be read elsewhere. Read from the source by ``ast``.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SOURCES = [
    path
    for name in ("src", "tests", "bench", "tools")
    for path in sorted((ROOT / name).rglob("*.py"))
]

# How a call is named, and at which place it takes its mode.
MODE_AT = {
    "open": 1, "io.open": 1, "codecs.open": 1, "os.fdopen": 1, "gzip.open": 1, "bz2.open": 1,
    "lzma.open": 1, "NamedTemporaryFile": 0, "TemporaryFile": 0, "SpooledTemporaryFile": 1,
}  # fmt: skip
# What the mode is where none is given: temporary files and gzip's kin are binary.
IS_TEXT_UNASKED = {"open", "io.open", "codecs.open", "os.fdopen"}
RUNS_A_PROGRAM = {"run", "Popen", "check_output"}
MODE = re.compile(r"[rwaxbtU+]+")


def name_of(call: ast.Call) -> str:
    name = ast.unparse(call.func)
    return name.removeprefix("tempfile.").removeprefix("pathlib.")


def mode_of(call: ast.Call, at: int) -> str | None:
    """The mode a call gives, "" for one that is no plain text, None for none."""
    given = [keyword.value for keyword in call.keywords if keyword.arg == "mode"] + call.args[at:]
    if not given:
        return None
    mode = given[0]
    return mode.value if isinstance(mode, ast.Constant) and isinstance(mode.value, str) else ""


def is_text(call: ast.Call) -> bool:
    """Whether the call reads or writes text, or starts a program whose output is text."""
    name, last = name_of(call), name_of(call).rpartition(".")[2]
    if last in ("read_text", "write_text"):
        return True
    if name in MODE_AT:
        mode = mode_of(call, MODE_AT[name])
        if mode is None:
            return name in IS_TEXT_UNASKED
        reads_text = name in IS_TEXT_UNASKED or not name.endswith(".open") or "t" in mode
        return "b" not in mode and reads_text and mode != ""
    if last == "open":  # Path.open("w") or Path.open(); RunDir.open(path) is another thing
        mode = mode_of(call, 0)
        return not call.args if mode is None else bool(MODE.fullmatch(mode)) and "b" not in mode
    if last in RUNS_A_PROGRAM and name.startswith("subprocess."):
        wanted = {k.arg for k in call.keywords if ast.unparse(k.value) == "True"}
        return bool(wanted & {"text", "universal_newlines"})
    return False


def nameless(source: str) -> Iterator[int]:
    """The lines of calls that handle text and name no encoding."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call) and is_text(node):
            given = {keyword.arg for keyword in node.keywords}
            last = name_of(node).rpartition(".")[2]
            # Path.read_text("utf-8") and Path.write_text(text, "utf-8") name it too.
            place = {"read_text": 0, "write_text": 1}.get(last)
            by_place = place is not None and len(node.args) > place
            if not (given & {"encoding", None}) and not by_place:
                yield node.lineno


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_text_is_read_and_written_with_its_encoding_named(path: Path) -> None:
    lines = list(nameless(path.read_text(encoding="utf-8")))
    assert not lines, f"{path}: name the encoding (utf-8) in lines {lines}"


@pytest.mark.parametrize(
    "call",
    [
        "path.read_text()", "(a / 'b').write_text(text)", "open(path)", "open(path, 'a+')",
        "open(path, mode='w')", "path.open()", "path.open('w')", "path.open(mode='x')",
        "io.open(path)", "gzip.open(path, 'rt')", "os.fdopen(number, 'w')",
        "tempfile.NamedTemporaryFile('w')", "path.read_text(errors='replace')",
        "subprocess.run(command, text=True)",
    ],
)  # fmt: skip
def test_a_call_without_its_encoding_is_found(call: str) -> None:
    assert list(nameless(call)) == [1]


@pytest.mark.parametrize(
    "call",
    [
        "path.read_text(encoding='utf-8')", "path.write_text(text, 'utf-8')", "open(path, 'rb')",
        "open(path, 'w', encoding='utf-8')", "path.open('wb')", "RunDir.open(path)",
        "gzip.open(path)", "gzip.open(path, 'rb')", "tempfile.NamedTemporaryFile()",
        "EvaluationFolder.open(path, asked)", "path.read_bytes()", "subprocess.run(command)",
        "subprocess.run(command, text=True, encoding='utf-8')", "open(path, **options)",
    ],
)  # fmt: skip
def test_a_call_in_binary_or_with_its_encoding_is_not(call: str) -> None:
    assert list(nameless(call)) == []
