"""tools/ranges.py: what each end installs, and what is said when one of them fails."""

from __future__ import annotations

import importlib.metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement

import ranges
from ranges import Outcome

CORE = [requirement.name for requirement in ranges.core_dependencies()]


def test_the_lowest_end_holds_every_core_dependency_at_its_bound_and_torch_as_it_is_here() -> None:
    pins = dict(line.split("==") for line in ranges.constraints("lowest").splitlines())
    assert sorted(pins) == sorted(CORE)
    assert pins["torch"] == importlib.metadata.version("torch")
    assert pins["trl"] == "1.16" and pins["numpy"] == "2"


def test_the_newest_end_binds_nothing_but_torch() -> None:
    assert ranges.constraints("newest") == f"torch=={importlib.metadata.version('torch')}\n"


@pytest.mark.parametrize("declared", ["rich", "rich<16", "rich==14", "rich>=14,>=15"])
def test_a_dependency_without_one_lower_bound_is_refused(declared: str) -> None:
    with pytest.raises(ValueError, match=r"one lower bound"):
        ranges.lower_bound(Requirement(declared))


@pytest.mark.parametrize(
    ("typed", "ends", "given"),
    [
        (["--"], ["lowest", "newest"], ["tests/unit", "tests/contract"]),
        (["--ends", "lowest", "--", "-x", "tests/contract"], ["lowest"], ["-x", "tests/contract"]),
    ],
)
def test_the_named_ends_get_what_stands_after_two_dashes_and_one_failure_fails_it_all(
    typed: list[str],
    ends: list[str],
    given: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    tried: list[tuple[str, list[str]]] = []

    def stand_in(end: str, folder: Path, arguments: list[str]) -> Outcome:
        tried.append((end, arguments))
        passed = end != "lowest"
        found = dict.fromkeys(CORE, f"1.{len(tried)}")
        return Outcome(end, found, "3 passed", passed, folder / f"{end}.log", 1.0)

    monkeypatch.setattr(ranges, "try_end", stand_in)
    assert ranges.main(["--folder", str(tmp_path / "made"), *typed]) == 1
    assert tried == [(end, given) for end in ends]
    told = capsys.readouterr().out
    assert f"lowest: FAILED: 3 passed ({tmp_path / 'made' / 'lowest.log'})" in told
    assert ("newest: ok: 3 passed" in told) is ("newest" in ends)
    assert all(f"\n{requirement}  " in told for requirement in ranges.core_dependencies())
