"""llama.cpp's own runtime, asked about a GGUF file: in a process of its own, where there is one.

llama-cpp-python is compiled for minutes, so it is nobody's dependency: it is used where this Python
has it, or where ``--llamacpp_python`` (or ``ABACIST_LLAMACPP_PYTHON``) names another that has.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from abacist.delivery.same_policy import Read
from abacist.errors import ModelError, UsageError

VARIABLE = "ABACIST_LLAMACPP_PYTHON"
PROGRAM = Path(__file__).with_name("llamacpp_program.py")
NOT_TRIED = (
    "Not read by llama.cpp itself: llama-cpp-python is not installed here (pip install "
    "llama-cpp-python, or name a Python that has it with --llamacpp_python)."
)
_SAY_VERSION = "import llama_cpp; print(llama_cpp.__version__)"


@dataclass(frozen=True)
class Runtime:
    """A Python that has llama-cpp-python, and its version in words."""

    python: str
    version: str


def find_runtime(named: str | None) -> Runtime | None:
    """The Python that was named, by flag or environment, or this one if it has llama-cpp-python.

    Raises UsageError if one was named that cannot be used; None if none was named and there is
    none here.
    """
    named = named or os.environ.get(VARIABLE) or None
    if named is None and find_spec("llama_cpp") is None:
        return None
    python = named or sys.executable
    try:
        done = subprocess.run(
            [python, "-c", _SAY_VERSION],
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
            encoding="utf-8",
            errors="replace",
        )
        said, complaint = done.stdout.strip(), done.stderr.strip()
    except (OSError, subprocess.SubprocessError) as error:
        said, complaint = "", str(error)
    if not said:
        if named is None:
            return None  # installed, and broken: as good as not there
        reason = complaint.splitlines()[-1] if complaint else "it says nothing"
        raise UsageError(
            f"{python} does not run llama-cpp-python: {reason}",
            "Name a Python with `import llama_cpp`, or leave --llamacpp_python out.",
        )
    return Runtime(python, f"llama.cpp (llama-cpp-python {said.splitlines()[-1]})")


def read(
    runtime: Runtime,
    gguf: Path,
    rows: Sequence[tuple[list[int], list[int]]],
    prompt_texts: Sequence[str],
    kept: Sequence[Tensor],
    *,
    stop_ids: list[int],
    budget_tokens: int,
    tell: Callable[[int, int], None],
) -> tuple[list[Read], dict[int, list[int]], list[list[int]]]:
    """What llama.cpp makes of replies, given as token ids of prompt and reply.

    Returns a :class:`Read` for each reply, at the tokens ``kept`` [C, K] of each; its own greedy
    replies by number, where they are others; and the ids that its tokenizer makes of
    ``prompt_texts``. Raises ModelError if it cannot load the file or fails.
    """
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        np.save(folder / "kept.npy", torch.cat(list(kept)).numpy())
        request = {
            "gguf": str(gguf.resolve()),
            "kept_tokens": str(folder / "kept.npy"),
            "threads": torch.get_num_threads(),
            "stop_ids": stop_ids,
            "budget_tokens": budget_tokens,
            "rows": [
                {"prompt_ids": prompt, "reply_ids": reply, "prompt_text": text}
                for (prompt, reply), text in zip(rows, prompt_texts, strict=True)
            ],
        }
        (folder / "request.json").write_text(json.dumps(request), encoding="utf-8")
        _run(runtime, folder, len(rows), tell)
        with np.load(folder / "result.npz") as result:
            logps, best, written = result["logps"], result["best"], result["written"]
            own = json.loads(str(result["own"]))
            prompts = json.loads(str(result["prompts"]))
    found, at = [], 0
    for tokens_CK in kept:
        part = slice(at, at + len(tokens_CK))
        found.append(
            Read(
                tokens_CK,
                torch.from_numpy(logps[part]),
                torch.from_numpy(best[part]),
                torch.from_numpy(written[part]),
            )
        )
        at += len(tokens_CK)
    return found, {n: ids for n, ids in enumerate(own) if ids is not None}, prompts


def _run(runtime: Runtime, folder: Path, total: int, tell: Callable[[int, int], None]) -> None:
    with (folder / "said.txt").open("w+", encoding="utf-8", errors="replace") as said:
        process = subprocess.Popen(
            [
                runtime.python,
                str(PROGRAM),
                str(folder / "request.json"),
                str(folder / "result.npz"),
            ],
            stdout=subprocess.PIPE,
            stderr=said,
            text=True,
            encoding="utf-8",
            errors="replace",
        )
        try:
            assert process.stdout is not None
            done = 0
            for line in process.stdout:
                if line.startswith("reply "):
                    done += 1
                    tell(done, total)
            code = process.wait()
        finally:  # also at Ctrl-C
            if process.poll() is None:
                process.kill()
                process.wait()
        if code != 0:
            said.seek(0)
            lines = said.read().strip().splitlines() or [f"exit code {code}"]
            raise ModelError(
                f"{runtime.version} cannot read the file: {lines[-1][:300]}",
                "Leave --llamacpp_python out to export without this check, or update "
                "llama-cpp-python.",
            )
