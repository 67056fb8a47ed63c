"""The package is layered as CONTRIBUTING says: imports run one way, files stay small and say why.

Read from the source by ``ast``, so lazy imports inside functions count like any other, and
so do those under ``TYPE_CHECKING``: what needs a name for its types leans on it too.
"""

from __future__ import annotations

import ast
import re
import sys
import tomllib
from itertools import pairwise
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "src" / "abacist"
MODULES = sorted(PACKAGE.rglob("*.py"))

# A layer may import only those before it.
LAYERS = (
    "errors", "task", "records", "policy", "proof", "learning", "view", "delivery", "cli",
)  # fmt: skip
LAYER = {name: number for number, name in enumerate(LAYERS)}
LIGHT_LAYERS = ("errors", "task", "records")
HEAVY = {"torch", "transformers", "trl", "peft", "numpy", "datasets", "accelerate", "pandas"}
# datasets reads the Hub in task/problems, lazily; it is the layer's one heavy guest.
ALLOWED_GUESTS = {("task", "datasets")}
LINES_AT_MOST = 600
# The name to import, where it is not the name to install.
DISTRIBUTION = {"yaml": "pyyaml", "flash_attn": "flash-attn", "llama_cpp": "llama-cpp-python"}


def name_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts[1:])


def layer_of(path: Path) -> str:
    """The folder a module stands in; "errors" for errors.py; "" for the package's own files."""
    first = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    return first if first in LAYER else ""


def imports_of(path: Path) -> list[tuple[int, str]]:
    """Every module a file imports, with the line; relative imports made absolute."""
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                above = path.relative_to(ROOT / "src").parts[: -node.level]
                base = ".".join((*above, *filter(None, [base])))
            # `from abacist import task` leans on abacist.task
            found += (
                [(node.lineno, f"abacist.{alias.name}") for alias in node.names]
                if base == "abacist"
                else [(node.lineno, base)]
            )
    return found


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_imports_run_one_way(path: Path) -> None:
    here = layer_of(path)
    if not here:
        return  # abacist/__init__.py, __main__.py and api.py open onto the whole package
    for line, module in imports_of(path):
        there = module.split(".")[1] if module.startswith("abacist.") else here
        if there in LAYER and there != here:
            assert LAYER[there] < LAYER[here], (
                f"{path}:{line}: {here} may not import {module}: {there} is not below it"
            )


@pytest.mark.parametrize(
    "path", [path for path in MODULES if layer_of(path) in LIGHT_LAYERS], ids=name_of
)
def test_the_light_layers_import_no_tensors(path: Path) -> None:
    here = layer_of(path)
    for line, module in imports_of(path):
        top = module.split(".")[0]
        assert top not in HEAVY or (here, top) in ALLOWED_GUESTS, (
            f"{path}:{line}: {here} imports {module}"
        )


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_every_module_says_what_it_is_for_and_stays_readable(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert ast.get_docstring(ast.parse(text)), f"{path} has no docstring"
    assert text.count("\n") <= LINES_AT_MOST, f"{path} is longer than {LINES_AT_MOST} lines"


def test_every_folder_is_a_layer_of_the_design() -> None:
    strangers = {
        path.relative_to(PACKAGE).as_posix()
        for path in MODULES
        if not layer_of(path) and path.name not in ("__init__.py", "__main__.py", "api.py")
    }
    assert not strangers, f"these stand in no layer: {sorted(strangers)}"


def test_no_basename_stands_twice_within_a_layer() -> None:
    """A name in a message, a traceback or a search means one file."""
    seen: dict[tuple[str, str], Path] = {}
    for path in MODULES:
        if path.name not in ("__init__.py", "__main__.py", "api.py"):
            other = seen.setdefault((layer_of(path), path.name), path)
            assert other is path, f"{other} and {path} have one name"


def test_the_layers_are_those_that_contributing_draws() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    assert " < ".join(LAYERS) in text
    folders = {path.parent.name for path in PACKAGE.glob("*/__init__.py")}
    assert folders == set(LAYERS) - {"errors"}
    for name in re.findall(r"`((?:src|tests)/[\w./]+)`", text):
        assert (ROOT / name).exists(), f"CONTRIBUTING.md names {name}"


def test_the_way_to_the_optimizer_step_is_as_short_as_contributing_says() -> None:
    from abacist.learning.trainer import GRPOTrainer

    classes = [kind.__module__ for kind in GRPOTrainer.__mro__ if "abacist." in kind.__module__]
    way = ["abacist.cli.train", "abacist.learning.train", *dict.fromkeys(classes)]
    assert len(way) <= 6
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    (told,) = re.findall(r"From `abacist train` to the optimizer.*?\n\n", text, re.DOTALL)
    files = re.findall(r"`([\w/]+)\.py`", told)
    assert [f"abacist.{name.replace('/', '.')}" for name in files] == way
    for here, there in pairwise(way):
        path = ROOT / "src" / f"{here.replace('.', '/')}.py"
        assert there in [module for _, module in imports_of(path)], f"{here} leads to {there}"


def test_folders_are_not_facades() -> None:
    """Only abacist/__init__.py gives names away; a folder's __init__ is a line of prose."""
    for path in PACKAGE.glob("*/**/__init__.py"):
        body = ast.parse(path.read_text(encoding="utf-8")).body
        assert len(body) == 1, f"{path} holds more than its docstring"


def test_everything_imported_is_declared() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    requirements = project["dependencies"] + [
        line for extra in project["optional-dependencies"].values() for line in extra
    ]
    declared = {re.split(r"[^\w.-]", line)[0].lower() for line in requirements}
    for path in MODULES:
        for line, module in imports_of(path):
            top = module.split(".")[0]
            if top in sys.stdlib_module_names or top in ("abacist", "__future__"):
                continue
            name = DISTRIBUTION.get(top, top).lower()
            assert name in declared, f"{path}:{line} imports {top}, which pyproject.toml lacks"


def test_pins_lie_inside_the_ranges_and_name_no_place() -> None:
    from packaging.requirements import Requirement

    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    pins = {}
    for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines():
        if line and not line.startswith("#"):
            name, version = line.split("==")
            pins[name.lower()] = version
    for text in project["dependencies"] + project["optional-dependencies"]["dev"]:
        requirement = Requirement(text)
        assert requirement.name.lower() in pins, f"constraints.txt does not pin {requirement.name}"
        assert pins[requirement.name.lower()] in requirement.specifier
    for name in ("pyproject.toml", "constraints.txt", "Makefile"):
        text = (ROOT / name).read_text(encoding="utf-8")
        assert not re.search(r"https?://|file:|--index|--find-links|/work/|/opt/|/root/", text)


def modules_imported(path: Path) -> set[str]:
    """The package's modules that a file imports; ``from folder import module`` is the module."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= (names & NAMES) or {node.module}
    return (found & NAMES) - {name_of(path)}


NAMES = {name_of(path) for path in MODULES}


def test_no_modules_import_each_other_in_a_circle() -> None:
    imports = {name_of(path): modules_imported(path) for path in MODULES}
    done: set[str] = set()

    def visit(name: str, way: tuple[str, ...]) -> None:
        assert name not in way, " → ".join((*way[way.index(name) :], name))
        if name not in done:
            for other in sorted(imports[name]):
                visit(other, (*way, name))
            done.add(name)

    for name in sorted(imports):
        visit(name, ())
