"""What is published is what was tested: the wheel, the sdist, and what they say they need."""

from __future__ import annotations

import importlib.metadata
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

import ranges

ROOT = Path(__file__).parents[2]
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))[
    "project"
]
PINNED = {
    pin.name.lower().replace("_", "-"): next(iter(pin.specifier)).version
    for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    if line and not line.startswith("#")
    for pin in [Requirement(line)]
}
DECLARED = [
    Requirement(text)
    for part in (PROJECT["dependencies"], *PROJECT["optional-dependencies"].values())
    for text in part
]


def tracked() -> set[str]:
    """The files of the checkout that belong to the project, hidden ones left out."""
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    listed = ["git", "-C", str(ROOT), "ls-files", "-z", "--cached", "--others"]
    told = subprocess.run([*listed, "--exclude-standard"], capture_output=True, check=True)
    names = told.stdout.decode().split("\0")
    return {name for name in names if name and name[0] != "." and (ROOT / name).is_file()}


def build(source: Path, kind: str, into: Path) -> Path:
    """Build in ``source`` with the installed setuptools, offline; returns the archive."""
    code = f"import setuptools.build_meta as b; b.build_{kind}({str(into)!r})"
    before = set(into.iterdir())
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=source,
        capture_output=True,
        text=True,
        encoding="utf-8",
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    (made,) = set(into.iterdir()) - before
    return made


def contents(wheel: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(wheel) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A wheel and an sdist, made from a copy of the checkout."""
    copy, into = tmp_path_factory.mktemp("checkout"), tmp_path_factory.mktemp("dist")
    for name in tracked():
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / name, copy / name)
    return build(copy, "wheel", into), build(copy, "sdist", into)


def test_the_wheel_holds_every_file_of_the_package_and_nothing_else(
    built: tuple[Path, Path],
) -> None:
    wheel = contents(built[0])
    package = {name: data for name, data in wheel.items() if ".dist-info/" not in name}
    source = {
        name.removeprefix("src/"): (ROOT / name).read_bytes()
        for name in tracked()
        if name.startswith("src/")
    }
    assert sorted(package) == sorted(source)
    assert package == source
    assert "abacist/py.typed" in package and "abacist/policy/tiny/model.safetensors" in package


def test_the_wheel_is_for_every_machine_and_brings_the_command(built: tuple[Path, Path]) -> None:
    wheel = contents(built[0])
    (points,) = (data for name, data in wheel.items() if name.endswith("/entry_points.txt"))
    assert built[0].name.endswith("-py3-none-any.whl")
    assert b"abacist = abacist.cli.main:main" in points
    assert any(name.endswith("/licenses/LICENSE") for name in wheel)


def test_the_sdist_holds_every_tracked_file(built: tuple[Path, Path]) -> None:
    with tarfile.open(built[1]) as archive:
        held = {member.name.partition("/")[2] for member in archive if member.isfile()}
    assert tracked() - held == set()


def test_a_wheel_made_from_the_sdist_holds_the_same(
    built: tuple[Path, Path], tmp_path: Path
) -> None:
    unpacked, into = tmp_path / "unpacked", tmp_path / "dist"
    into.mkdir()
    with tarfile.open(built[1]) as archive:
        archive.extractall(unpacked, filter="data")
    (source,) = unpacked.iterdir()
    assert contents(build(source, "wheel", into)) == contents(built[0])


def test_every_declared_dependency_has_one_lower_bound() -> None:
    without = {"types-pyyaml", "types-psutil"}  # stubs, dated
    bounds = {r.name: ranges.lower_bound(r) for r in DECLARED if r.name.lower() not in without}
    assert all(Version(bound) for bound in bounds.values())


def test_the_versions_of_constraints_are_within_the_declared_ranges() -> None:
    for requirement in DECLARED:
        pinned = PINNED.get(requirement.name.lower().replace("_", "-"))
        assert pinned is None or requirement.specifier.contains(pinned), requirement


def test_no_lower_bound_is_below_what_the_core_packages_ask_for() -> None:
    """As installed here; another release may ask for more, which `make ranges` finds."""
    core = {r.name.lower(): r for r in map(Requirement, PROJECT["dependencies"])}
    for name in ("trl", "peft", "accelerate"):
        for needed in map(Requirement, importlib.metadata.requires(name) or ()):
            ours = core.get(needed.name.lower())
            if ours is None or needed.marker is not None:
                continue
            assert needed.specifier.contains(ranges.lower_bound(ours)), f"{name}: {needed}"
