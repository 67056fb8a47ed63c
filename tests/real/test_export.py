"""A run of a real model leaves in every form, and is the same policy in each."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from real.models import Abacist

PROBLEMS, BUDGET_TOKENS = 4, 32
BOTH = ("model", "qwen")  # the smallest there is, and the smallest of Qwen2's architecture


@pytest.fixture(scope="module", params=[(m, w) for m in BOTH for w in ("lora", "full")],
                ids=lambda pair: "-".join(pair))  # fmt: skip
def run(
    request: pytest.FixtureRequest,
    abacist: Abacist,
    data: list[str],
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Path]:
    """A step of training with an adapter, or of all weights, where memory and time allow."""
    which, way = request.param
    model: Path = request.getfixturevalue(which)
    if which == "qwen" and model == request.getfixturevalue("model"):
        pytest.skip("the smallest model is of Qwen2's architecture itself")
    folder = tmp_path_factory.mktemp("export") / way
    how = ["--learning_rate", "1e-3"] if way == "lora" else ["--no_use_peft"]
    how += [] if way == "lora" else ["--learning_rate", "1e-5"]
    abacist("train", "any", "--model_name_or_path", model, *data, "--num_shots", 1, *how,
            "--max_steps", 1, "--warmup_steps", 0, "--num_generations", 2,
            "--per_device_train_batch_size", 4, "--gradient_accumulation_steps", 1,
            "--max_completion_length", BUDGET_TOKENS, "--num_train_problems", 8,
            "--num_selection_problems", 0, "--num_heldout_problems", PROBLEMS,
            "--num_consistency_problems", 0, "--output_dir", folder)  # fmt: skip
    yield folder
    shutil.rmtree(folder)


def exported(abacist: Abacist, run: Path, to: str, dtype: str) -> Any:
    found = abacist("export", run, "--to", to, "--dtype", dtype, "--num_problems", PROBLEMS,
                    "--overwrite", "--json").json  # fmt: skip
    for proof in found["proofs"]:
        agreement = proof["agreement"]
        print(to, dtype, proof["reader"], f"{found['size_bytes'] / 1e6:.0f} MB:", agreement)
    return found


@pytest.mark.parametrize("to", ["merged", "gguf"])
def test_a_float32_export_writes_the_same_tokens(abacist: Abacist, run: Path, to: str) -> None:
    found = exported(abacist, run, to, "float32")
    for proof in found["proofs"]:
        agreement = proof["agreement"]
        assert agreement["equal_replies"] + agreement["tied_replies"] == PROBLEMS
        assert agreement["largest_logp_difference"] <= 1e-4
    has_runtime = bool(os.environ.get("ABACIST_LLAMACPP_PYTHON"))
    assert len(found["proofs"]) == 1 + (to == "gguf" and has_runtime)


@pytest.mark.parametrize(("to", "dtype"), [("merged", "auto"), ("gguf", "q8_0")])
def test_fewer_bits_stay_within_their_bounds(
    abacist: Abacist, run: Path, to: str, dtype: str
) -> None:
    for proof in exported(abacist, run, to, dtype)["proofs"]:
        assert proof["fault"] is None and proof["accuracy"]["test"].startswith("McNemar")


def test_peft_loads_the_run_by_itself(run: Path) -> None:
    from peft import AutoPeftModelForCausalLM
    from transformers import AutoModelForCausalLM

    is_adapter = (run / "adapter_config.json").exists()
    loader = AutoPeftModelForCausalLM if is_adapter else AutoModelForCausalLM
    assert loader.from_pretrained(run).get_input_embeddings() is not None
