"""Adapters that do something, a reward that cannot fall silent, and what was learned from it.

A look-alike writes noise, which our own rewards all pay alike: every advantage is 0, and a training
that moves no weight would go unnoticed.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

EVERY_OTHER = """
def every_other(completions, **columns):
    return [float(place % 2) for place, _ in enumerate(completions)]
"""


def paid_apart(folder: Path) -> str:
    """For ``--reward_funcs``: pays every other reply, so that no group is paid alike."""
    module = folder / "paid_apart.py"
    module.write_text(EVERY_OTHER, encoding="utf-8")
    return f"{module}:every_other"


def untrained(folder: Path) -> list[str]:
    """The LoRA weights in ``folder`` that still are what they begin as: B is 0 before training."""
    adapter = load_file(folder / "adapter_model.safetensors")
    starting = {name: weight for name, weight in adapter.items() if "lora_B" in name}
    assert starting, "there is no LoRA"
    return [name for name, weight in starting.items() if not weight.any()]


def stir(model: Any) -> None:
    """Give B of every LoRA layer small random weights, so that the adapter does something."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                weight.copy_(torch.randn(weight.shape, generator=generator) * 0.02)
