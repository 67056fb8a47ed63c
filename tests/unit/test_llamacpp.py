"""llama.cpp is asked in a process of its own; here a stand-in answers for it."""

from __future__ import annotations

import os
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch

from abacist.delivery import llamacpp
from abacist.delivery.llamacpp import Runtime, find_runtime
from abacist.errors import ModelError, UsageError

VOCABULARY, STOP = 11, 2
STAND_IN = f'''
import numpy as np
__version__ = "0.0.stand-in"

class Llama:
    """After token t it writes 3 t + 1 (mod {VOCABULARY})."""
    def __init__(self, model_path, n_ctx, **options):
        assert options["type_k"] == options["type_v"] == 0 and options["logits_all"]
        if open(model_path, "rb").read() == b"damaged":
            raise ValueError("Failed to load model from file")
        self.scores, self.n_tokens = np.zeros((n_ctx, {VOCABULARY}), np.float32), 0
    def reset(self):
        self.n_tokens = 0
    def eval(self, ids):
        for token in ids:
            row = np.linspace(0, 1, {VOCABULARY}); row[(3 * token + 1) % {VOCABULARY}] = 9
            self.scores[self.n_tokens] = row
            self.n_tokens += 1
    def tokenize(self, text, add_bos, special):
        return [len(word) for word in text.decode().split()]
'''


@pytest.fixture
def runtime(tmp_path: Path) -> Runtime:
    place = tmp_path / "site"
    place.mkdir()
    (place / "llama_cpp.py").write_text(STAND_IN, encoding="utf-8")
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\nPYTHONPATH={place} exec {sys.executable} "$@"\n', "utf-8")
    python.chmod(0o755)
    found = find_runtime(str(python))
    assert found is not None and found.version.endswith("0.0.stand-in)")
    return found


def chain(first: int, count: int) -> list[int]:
    """What the stand-in writes after ``first``."""
    ids = [(3 * first + 1) % VOCABULARY]
    while len(ids) < count:
        ids.append((3 * ids[-1] + 1) % VOCABULARY)
    return ids


def test_replies_are_read_and_one_that_it_would_not_write_is_written_anew(
    runtime: Runtime, tmp_path: Path
) -> None:
    (tmp_path / "m.gguf").write_bytes(b"fine")
    own = chain(5, 5)  # 5 -> 5: it says the same for ever
    assert own == [5] * 5
    other = chain(3, 4)
    changed = [*other[:2], (other[2] + 1) % VOCABULARY, other[3]]
    told: list[int] = []
    reads, written, prompts = llamacpp.read(
        runtime,
        tmp_path / "m.gguf",
        [([1, 5], own), ([4, 4, 3], changed)],
        ["a bb ccc", "dddd"],
        [torch.arange(3).repeat(5, 1), torch.arange(3).repeat(4, 1)],
        stop_ids=[STOP],
        budget_tokens=6,
        tell=lambda done, total: told.append(done),
    )
    assert reads[0].best_C.tolist() == own and reads[0].logps_CK.shape == (5, 3)
    assert torch.all(reads[0].written_C > -0.01)
    assert 0 not in written  # that one it writes itself
    assert written[1][:3] == other[:3] and (written[1][-1] == STOP or len(written[1]) == 6)
    assert prompts == [[1, 2, 3], [4]] and told == [1, 2]
    row = np.linspace(0, 1, VOCABULARY)
    row[5] = 9
    by_hand = row - np.log(np.exp(row).sum())
    np.testing.assert_allclose(reads[0].logps_CK[0].numpy(), by_hand[:3], atol=1e-6)


def test_a_file_that_it_cannot_load_is_said_in_its_words(runtime: Runtime, tmp_path: Path) -> None:
    (tmp_path / "m.gguf").write_bytes(b"damaged")
    with pytest.raises(ModelError, match="Failed to load model"):
        llamacpp.read(
            runtime, tmp_path / "m.gguf", [([1], [2])], ["a"], [torch.zeros(1, 2).long()],
            stop_ids=[2], budget_tokens=2, tell=lambda done, total: None,
        )  # fmt: skip


@pytest.mark.parametrize("python", ["/no/such/python", sys.executable])
def test_a_python_without_it_is_refused_where_it_was_named(
    python: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", os.devnull)
    if python == sys.executable and find_spec("llama_cpp") is not None:
        pytest.skip("this Python has llama-cpp-python")
    with pytest.raises(UsageError, match="does not run llama-cpp-python"):
        find_runtime(python)


def test_without_one_nothing_is_asked_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(llamacpp.VARIABLE, raising=False)
    monkeypatch.setattr(llamacpp, "find_spec", lambda name: None)
    assert find_runtime(None) is None
