"""CONTRIBUTING's page "The life of a step" names functions that exist, in calls that are made."""

from __future__ import annotations

import importlib
import inspect
import re
from pathlib import Path
from typing import Any

import pytest

PAGE = Path(__file__).parents[2] / "CONTRIBUTING.md"
_, _, _rest = PAGE.read_text(encoding="utf-8").partition("## The life of a step\n")
LIFE, _, _ = _rest.partition("\n## ")
NAMES = sorted(set(re.findall(r"[a-z_]+(?:\.\w+){2,}", " ".join(re.findall(r"`[^`]+`", LIFE)))))
CALLS = re.findall(r"`([\w.]+) → ([\w.]+)`", LIFE)


def found(name: str) -> Any:
    """What ``abacist.<name>`` is: the longest part that is a module, then its attributes."""
    parts = f"abacist.{name}".split(".")
    for end in range(len(parts), 1, -1):
        try:
            value = importlib.import_module(".".join(parts[:end]))
        except ModuleNotFoundError:
            continue
        for part in parts[end:]:
            value = getattr(value, part)
        return value
    raise AssertionError(f"there is no abacist.{name}")


@pytest.mark.parametrize("name", NAMES)
def test_every_name_of_the_page_is_one_of_the_code(name: str) -> None:
    assert callable(found(name))


@pytest.mark.parametrize(("caller", "callee"), CALLS, ids=[" calls ".join(call) for call in CALLS])
def test_every_call_of_the_page_is_made(caller: str, callee: str) -> None:
    *_, owner, function = callee.split(".")
    source = inspect.getsource(found(caller))
    for name in {function, owner} if function == "of" else {function}:
        assert re.search(rf"\b{name}\b", source), name


def test_the_page_names_the_whole_way() -> None:
    assert len(CALLS) > 12
