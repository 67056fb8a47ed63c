"""What several end-to-end tests stand on."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable

import pytest
from filelock import FileLock

import emulated_gpu
from offline import OFFLINE

Run = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture(scope="session")
def run_on_gpu(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """``run_on_gpu(*arguments of Python, cpu=False, **environment)``, on the emulated GPU.

    All processes of the suite compile it once.
    """
    if emulated_gpu.compiler() is None or sys.platform != "linux":
        pytest.skip("the emulated GPU is compiled: it needs Linux and a C++ compiler")
    folder = tmp_path_factory.getbasetemp()
    folder = (folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder) / "emulated-gpu"
    with FileLock(f"{folder}.lock"):
        emulated_gpu.build(folder)

    def run(*command: str, cpu: bool = False, **variables: str) -> subprocess.CompletedProcess[str]:
        program = [sys.executable] if cpu else [sys.executable, emulated_gpu.__file__]
        return subprocess.run(
            [*program, *command],
            env={
                **os.environ,
                **OFFLINE,
                "EMULATED_GPU": str(folder),
                "ABACIST_KERNELS": "0",  # which the GPU has not got either
                "COLUMNS": "200",
                **variables,
            },
            capture_output=True,
            text=True,
            encoding="utf-8",
        )

    return run
