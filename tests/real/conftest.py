"""``make real``: real models, by the real command line. Only that target collects this folder.

What to bring stands in :data:`BRING`. The story runs on the smallest model there; what is said of a
family's template is asserted on every model of it.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from pathlib import Path

import pytest

from real.models import Abacist, Done, config_of, real_models, start

BRING = """\
make real needs real models, and found none in {place}.
  REAL_MODELS=FOLDER   a folder with one folder for each model in the Hugging Face layout:
                       config.json, tokenizer files with the chat template, *.safetensors.
                       Small instruct models do (SmolLM2-135M, Qwen2.5-0.5B); the story runs on
                       the smallest of them, the templates of all are looked at.
  REAL_GSM8K=FOLDER    optional: GSM8K as train.jsonl and test.jsonl, or any other folder or file
                       that --dataset_name takes. Without it problems are generated."""


def pytest_sessionstart(session: pytest.Session) -> None:
    if not real_models():
        place = os.environ.get("REAL_MODELS")
        place = f"REAL_MODELS={place}" if place else "REAL_MODELS, which is not set"
        pytest.exit(BRING.format(place=place), returncode=1)


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
    return ["--dataset_name", os.path.expanduser(os.environ.get("REAL_GSM8K", "generated"))]


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
