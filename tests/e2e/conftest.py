"""What several end-to-end tests stand on."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator

import pytest
from filelock import FileLock

import emulated_gpu
from imported import Imported

Run = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture(scope="session")
def on_gpu(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Imported]:
    """Python that has imported everything on the emulated GPU.

    All processes of the suite compile it once.
    """
    if emulated_gpu.compiler() is None or sys.platform != "linux":
        pytest.skip("the emulated GPU is compiled: it needs Linux and a C++ compiler")
    folder = tmp_path_factory.getbasetemp()
    folder = (folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder) / "emulated-gpu"
    with FileLock(f"{folder}.lock"):
        emulated_gpu.build(folder)
    python = Imported(
        [sys.executable, emulated_gpu.__file__], env=os.environ | {"EMULATED_GPU": str(folder)}
    )
    yield python
    python.close()


@pytest.fixture(scope="session")
def run_on_gpu(on_gpu: Imported, imported: Imported) -> Run:
    """``run_on_gpu(*arguments of Python, cpu=False, **environment)``, on the emulated GPU."""

    def run(*command: str, cpu: bool = False, **variables: str) -> subprocess.CompletedProcess[str]:
        python = imported if cpu else on_gpu
        no_kernels = {"ABACIST_KERNELS": "0"}  # which the GPU has not got either
        return python.run(*command, env=python.env | no_kernels | {"COLUMNS": "200"} | variables)

    return run
