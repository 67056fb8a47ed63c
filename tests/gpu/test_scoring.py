"""Our forward on a GPU, by its own kernels, against stock TRL's in twice the precision."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from trl.trainer.utils import add_fused_lm_head

from abacist.policy.families import FastPart, unsupported_reason
from abacist.policy.model_parts import base_of
from abacist.policy.scoring.attention_backend import QWEN_1_5B_HEADS, choose_backend
from unit.test_scoring import TEMPERATURE, batch_of, distance, gradients, ours, stock

pytestmark = pytest.mark.gpu


def found_by(path: Any, model: Any, batch: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probabilities and gradients, computed as the recipe computes them."""
    half = base_of(model).dtype == torch.bfloat16
    with torch.autocast("cuda", torch.bfloat16, enabled=half):
        logps, _ = path(model, *batch)
    return logps.detach(), gradients(model, logps)


@pytest.mark.parametrize(
    ("dtype", "above", "most", "rows"),
    [
        (torch.float32, torch.float64, 1e-4, "groups"),
        (torch.bfloat16, torch.float32, 0.3, "few-shot"),
    ],
    ids=["float32", "bfloat16"],
)
def test_values_and_gradients_are_as_exact_as_those_of_stock_trl(
    dtype: torch.dtype, above: torch.dtype, most: float, rows: str, make_model: Any
) -> None:
    ids, mask, width = batch_of(rows)
    batch = (ids.cuda(), mask.cuda(), width)

    def ready(dtype: torch.dtype) -> Any:
        model = make_model(dtype).train()
        add_fused_lm_head(base_of(model), temperature=TEMPERATURE, outputs=("log_probs", "entropy"))
        return model

    exact = found_by(stock, ready(above), batch)
    model = ready(dtype)
    assert unsupported_reason(model, FastPart.SCORING) is None
    theirs, mine = found_by(stock, model, batch), found_by(ours, model, batch)
    for right, of_stock, of_ours in zip(exact, theirs, mine, strict=True):
        allowed = distance(of_stock, right)
        assert 0 < allowed < most, "or it could not be said who is nearer"
        assert distance(of_ours, right) < 2 * allowed


@pytest.mark.parametrize("implementation", ["sdpa", "flash_attention_2"])
def test_a_flash_kernel_for_variable_lengths_is_right_here_and_chosen(implementation: str) -> None:
    if implementation != "sdpa":
        pytest.importorskip("flash_attn", reason="FlashAttention 2 is not installed")
    if torch.cuda.get_device_name() == "an emulated GPU":
        pytest.skip("the emulated GPU has no flash kernels")
    device = torch.device("cuda", 0)
    if torch.cuda.get_device_capability(device) < (8, 0):
        pytest.skip("this GPU is older than Ampere")
    # A kernel is chosen only if its values and gradients are right in a trial.
    found = choose_backend(implementation, device, torch.bfloat16, QWEN_1_5B_HEADS)
    wanted = "PyTorch's flash kernel" if implementation == "sdpa" else "FlashAttention's kernel"
    assert found.varlen is not None and found.choice.value.startswith(wanted), found.choice
