"""What the tests on a GPU stand on: ``make gpu`` runs them, and without a CUDA device they skip.

They take the shapes of the two recipes' models with random weights. ``GPU_TEST_SHAPES=small`` takes
toy ones, so that the tests themselves can be tried on the emulated GPU (tests/emulated_gpu.py).
"""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model

IS_SMALL = os.environ.get("GPU_TEST_SHAPES") == "small"
RECIPES = {"qwen2.5-1.5b": "smoke-qwen", "llama-3.2-1b": "smoke-llama"}

# Read when CUDA is first used: cuBLAS is deterministic with it.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
sys.path.append(str(Path(__file__).parents[2] / "bench"))  # behind tools, which has a gpu.py too

MakeModel = Callable[[torch.dtype], Any]


@pytest.fixture(autouse=True)
def on_a_gpu() -> None:
    if not torch.cuda.is_available():
        pytest.skip("PyTorch sees no CUDA device")


@pytest.fixture(params=RECIPES)
def recipe(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


@pytest.fixture
def shape(recipe: str) -> str:
    """The name in bench/models.py of what ``recipe`` trains."""
    return RECIPES[recipe] if IS_SMALL else recipe


@pytest.fixture
def make_model(shape: str) -> MakeModel:
    """``make_model(dtype)``: the random model, the same numbers in any dtype, on the device.

    It has a LoRA adapter on every linear layer that does something.
    """

    def made(dtype: torch.dtype) -> Any:
        from models import build_model

        gc.collect()  # the one before it, of gigabytes, may hang in a cycle
        base = build_model(shape, dtype=torch.bfloat16, device="cuda").to(dtype)
        lora = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
        model = get_peft_model(base, lora)
        draw = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for name, weight in model.named_parameters():
                if "lora_" in name:
                    drawn = torch.empty(weight.shape).uniform_(-0.02, 0.02, generator=draw)
                    weight.copy_(drawn.bfloat16())
        return model

    return made
