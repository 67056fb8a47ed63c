"""The real models there are, and ``abacist`` as a command that is timed and watched."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from offline import OFFLINE

SOURCE = Path(__file__).parents[2] / "src"


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
        encoding="utf-8",
    )
