"""Help is instant: asking for it, or importing the package, loads nothing heavy.

Each case runs in a process of its own, because ``sys.modules`` here is long since full.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

import abacist

SOURCE = Path(abacist.__file__).resolve().parents[1]
HEAVY = ("torch", "transformers", "trl", "peft", "datasets", "numpy", "pyarrow", "scipy", "wandb")

COMMANDS = [
    [],
    ["--help"],
    ["--version"],
    ["train", "--help"],
    ["ask", "--help"],
    ["report", "--help"],
    ["audit", "--help"],
    ["doctor", "--help"],
    ["show", "--help"],
]


def heavy_modules_after(code: str) -> list[str]:
    """Run ``code`` in a fresh interpreter; which heavy packages were loaded by it?"""
    report = f"import sys; print(sorted(set({HEAVY!r}) & set(sys.modules)), file=sys.stderr)"
    done = subprocess.run(
        [sys.executable, "-c", f"{code}\n{report}"],
        env={**os.environ, "PYTHONPATH": str(SOURCE)},
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
        encoding="utf-8",
    )
    return list(filter(None, done.stderr.strip().splitlines()[-1].strip("[]").split(", ")))


@pytest.mark.parametrize("argv", COMMANDS, ids=" ".join)
def test_help_loads_nothing_heavy(argv: list[str]) -> None:
    code = f"from abacist.cli.main import main\nassert main({argv!r}) == 0"
    assert heavy_modules_after(code) == []


def test_importing_the_package_loads_nothing_heavy() -> None:
    assert heavy_modules_after("import abacist; dir(abacist)") == []


def test_the_pure_names_load_no_torch() -> None:
    code = "from abacist import parse_reply, same_answer, correctness, xml_count, Problem"
    assert "'torch'" not in heavy_modules_after(code)


@pytest.mark.parametrize("name", sorted(set(abacist.__all__) - {"__version__"}))
def test_every_public_name_has_a_home(name: str) -> None:
    home = abacist._HOME[name]
    assert importlib.util.find_spec(home) is not None, f"abacist.{name} should be in {home}"


def test_the_lists_of_public_names_agree() -> None:
    assert set(abacist.__all__) == set(abacist._HOME) | {"__version__"}
    assert abacist.__all__ == sorted(abacist.__all__)
    assert set(abacist.__all__) <= set(dir(abacist))


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = abacist.nonsense


def test_showing_replies_loads_no_torch_and_no_pandas(tmp_path: Path) -> None:
    from abacist.records.rollout import Rollout, StopReason, write_rollouts

    rows = [Rollout("r", 1, "train", 0, 0, [], "12", [1], 1, 1, StopReason.STOPPED)]
    write_rollouts(tmp_path / "rollouts" / "step-000001.parquet", rows)
    code = (
        "from abacist.cli.main import main\n"
        "for flags in ([], ['--group'], ['--json'], ['--text', '1'], ['--seed', '1']):\n"
        f"    assert main(['show', {str(tmp_path)!r}, *flags]) == 0\n"
        "import sys; assert 'pandas' not in sys.modules"
    )
    assert set(heavy_modules_after(code)) <= {"'pyarrow'", "'numpy'"}
