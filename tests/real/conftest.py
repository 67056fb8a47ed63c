"""``make real``: real models, by the real command line. Only that target collects this folder.

What to bring stands in :data:`BRING`. The story runs on the smallest model there; what is said of a
family's template is asserted on every model of it.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from offline import OFFLINE

BRING = """\
make real needs real models, and found none in {place}.
  REAL_MODELS=FOLDER   a folder with one folder for each model in the Hugging Face layout:
                       config.json, tokenizer files with the chat template, *.safetensors.
                       Small instruct models do (SmolLM2-135M, Qwen2.5-0.5B); the story runs on
                       the smallest of them, the templates of all are looked at.
  REAL_GSM8K=FOLDER    optional: GSM8K as train.jsonl and test.jsonl, or any other folder or file
                       that --dataset_name takes. Without it problems are generated."""
SOURCE = Path(__file__).parents[2] / "src"


def pytest_sessionstart(session: pytest.Session) -> None:
    if not real_models():
        place = os.environ.get("REAL_MODELS")
        place = f"REAL_MODELS={place}" if place else "REAL_MODELS, which is not set"
        pytest.exit(BRING.format(place=place), returncode=1)


def real_models() -> list[Path]:
    """The folders of the models there are, the smallest first."""
    place = os.environ.get("REAL_MODELS", "")
    if not place:
        return []
    folders = [path.parent for path in Path(place).expanduser().glob("*/config.json")]
    return sorted(folders, key=weights_bytes)


def weights_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def config_of(folder: Path) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((folder / "config.json").read_text("utf-8"))
    return config


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Whoever asks for ``folder`` is run on every model."""
    if "folder" in metafunc.fixturenames:
        metafunc.parametrize("folder", real_models(), ids=lambda path: path.name, scope="session")


@pytest.fixture(scope="session")
def model() -> Path:
    """The smallest model: the story is told with it."""
    return real_models()[0]


@pytest.fixture(scope="session")
def qwen() -> Path:
    """The smallest model of Qwen2's architecture."""
    found = [path for path in real_models() if config_of(path)["model_type"] == "qwen2"]
    if not found:
        pytest.skip("REAL_MODELS holds no model of Qwen2's architecture")
    return found[0]


@pytest.fixture(scope="session")
def data() -> list[str]:
    """The flags that name the problems."""
    return ["--dataset_name", os.environ.get("REAL_GSM8K", "generated")]


@dataclass(frozen=True)
class Done:
    """How a command ended, what it said, and what it took."""

    code: int
    out: str
    err: str
    seconds: float
    peak_bytes: int

    @property
    def json(self) -> Any:
        return json.loads(self.out)


Abacist = Callable[..., Done]


def start(*arguments: object, **environment: str) -> subprocess.Popen[str]:
    """``abacist`` with ``arguments``, in a process of its own, without network."""
    path = os.pathsep.join([str(SOURCE), os.environ.get("PYTHONPATH", "")])
    return subprocess.Popen(
        [sys.executable, "-m", "abacist", *map(str, arguments)],
        env={**os.environ, **OFFLINE, "PYTHONPATH": path, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.fixture(scope="session")
def abacist() -> Abacist:
    """``abacist(*arguments, code=0, **environment)``: run it to its end, which must be ``code``."""

    def run(*arguments: object, code: int = 0, **environment: str) -> Done:
        began = time.monotonic()
        process = start(*arguments, **environment)
        said: list[str] = []
        assert process.stdout is not None and process.stderr is not None
        reader = threading.Thread(target=lambda: said.append(process.stderr.read()))
        reader.start()
        out = process.stdout.read()
        reader.join()
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        unit = 1 if sys.platform == "darwin" else 1024
        seconds = time.monotonic() - began
        print(f"\n{seconds:.0f} s, {usage.ru_maxrss * unit / 2**30:.2f} GiB:", *arguments)
        done = Done(process.returncode, out, said[0], seconds, usage.ru_maxrss * unit)
        assert done.code == code, f"{arguments}: {done.err[-3000:]}\n{done.out[-3000:]}"
        assert "Traceback" not in done.err and "bug in Abacist" not in done.err
        return done

    return run
