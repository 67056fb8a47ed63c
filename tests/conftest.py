"""What every test may count on: no network, no surprise of the machine it runs on."""

from __future__ import annotations

import functools
import gc
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import HealthCheck, settings

from imported import Imported
from offline import OFFLINE

if TYPE_CHECKING:
    from abacist.delivery.bundle import Bundle

# What says how to print: a terminal, a notebook, a service of continuous integration.
PRINTING = {
    "CI", "CLICOLOR", "CLICOLOR_FORCE", "COLORTERM", "COLUMNS", "FORCE_COLOR", "GIT_PAGER",
    "JPY_PARENT_PID", "LINES", "NO_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE",
}  # fmt: skip

# Timings belong to the machine, not to the code; and a run must be the same twice.
settings.register_profile(
    "abacist",
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
    derandomize=True,
    max_examples=60,
)
settings.load_profile("abacist")

# What the machine wants printed, and where it reports to, is none of a test's business.
for _name in list(os.environ):
    if _name in PRINTING or _name.startswith(("WANDB_", "TRACKIO_")):
        del os.environ[_name]
# Set before transformers, datasets or tokenizers are first imported: they read these once.
os.environ.update(OFFLINE)
# Where it is anyway: a test that gives a process another home needs no kernels of its own.
os.environ.setdefault("XDG_CACHE_HOME", os.path.expanduser("~/.cache"))


def pytest_collection_finish() -> None:
    """What is imported by now stays: it is not looked through whenever garbage is collected.

    Every training ends with such a collection, which took as long as two steps of a small model.
    """
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def imports_of_its_own(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A module that a test writes and imports is not found by the tests after it."""
    path, known = list(sys.path), set(sys.modules)
    yield
    sys.path[:] = path
    written = str(tmp_path_factory.getbasetemp())
    for name in set(sys.modules) - known:
        if (getattr(sys.modules[name], "__file__", None) or "").startswith(written):
            del sys.modules[name]


@pytest.fixture(scope="session", autouse=True)
def runs_end_with_empty_charts() -> Iterator[None]:
    """See tests/empty_charts.py."""
    import empty_charts

    with pytest.MonkeyPatch.context() as patch:
        empty_charts.leave_charts_empty(patch)
        yield


@pytest.fixture(scope="session", autouse=True)
def problems_are_made_once() -> Iterator[None]:
    """A seed gives the same problems whenever it is asked, and the thousands of a run take seconds.

    What makes them is tried as it is (test_wordproblems.py).
    """
    from abacist.task import wordproblems

    make, made = wordproblems.generate, dict[tuple[int, str], list[dict[str, object]]]()

    def generate(count: int, *, seed: int, split: str = "train") -> list[dict[str, object]]:
        known = made.get((seed, split), [])
        if len(known) < count:
            known = made[seed, split] = make(count, seed=seed, split=split)
        return [dict(record) for record in known[:count]]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(wordproblems, "generate", generate)
        yield


@pytest.fixture(scope="session")
def lookalike(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of a look-alike model by kind (tests/lookalikes.py), built once: read only."""
    import lookalikes

    @functools.cache
    def folder_of(kind: str) -> Path:
        return lookalikes.build(kind, tmp_path_factory.mktemp("lookalikes") / kind)

    return folder_of


@pytest.fixture(scope="session")
def imported() -> Iterator[Imported]:
    """Starts Python that has imported everything already (tests/imported.py)."""
    python = Imported()
    yield python
    python.close()


@pytest.fixture(scope="session")
def short_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of two steps with the built-in model (tests/bundles.py): read only."""
    import bundles

    return bundles.short_run(tmp_path_factory.mktemp("short") / "tiny-001")


@pytest.fixture(scope="session")
def short_bundle(short_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """The bundle of ``short_run``: read only."""
    from abacist.delivery.bundle import bundle

    return bundle(short_run, tmp_path_factory.mktemp("bundled") / "tiny-001.bundle.zip")
