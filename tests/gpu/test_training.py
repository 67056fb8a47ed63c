"""A step of each recipe on a GPU, and an exact resume there."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.nn.attention import SDPBackend, sdpa_kernel

import lookalikes
from soak.resume_matrix import by_name, complete, differences, resume_from

pytestmark = pytest.mark.gpu

# Long enough for graphs to be recorded.
TWO_STEPS = {"use_cpu": False, "max_steps": 2, "max_completion_length": 24}


def test_a_recipe_takes_a_step_on_our_paths_and_every_layer_learns(
    recipe: str, shape: str, tmp_path: Path
) -> None:
    import recipe_memory

    model = recipe_memory.save_model(shape, tmp_path / "model")
    notes = recipe_memory.Notes()
    first, *_ = recipe_memory.take_step(
        *(recipe, model, tmp_path / "run", notes),
        num_heldout_problems=4,
        num_train_problems=64,
        gradient_accumulation_steps=2,
        max_completion_length=24,
        warmup_steps=0,
    )
    assert first["grad_norm"] > 0 and first["completions/mean_length"] > 20
    said = "\n".join(notes.lines)
    assert "dtype: bfloat16" in said
    assert "rollouts: our engine, by CUDA graphs" in said
    assert "training: each prompt computed once for its group" in said
    weights = load_file(tmp_path / "run" / "adapter_model.safetensors")
    raised = {name: weight for name, weight in weights.items() if "lora_B" in name}
    assert raised
    for name, weight in raised.items():  # they begin at 0
        assert weight.isfinite().all() and weight.any(), name


def test_two_steps_are_one_and_a_resumed_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = by_name("lora")
    model = lookalikes.build("qwen2.5-instruct", tmp_path / "model", size=32)
    was_deterministic = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        with sdpa_kernel(SDPBackend.MATH):
            whole = complete(case, model, tmp_path / "whole" / "run", **TWO_STEPS)
            again = complete(case, model, tmp_path / "again" / "run", **TWO_STEPS)
            if differing := differences(whole, again):
                pytest.skip(f"the same run twice differs here without a resume: {differing}")
            resumed = resume_from(case, model, whole, 1, tmp_path / "resumed" / "run", **TWO_STEPS)
    finally:
        torch.use_deterministic_algorithms(was_deterministic)
    assert differences(whole, resumed) == []
