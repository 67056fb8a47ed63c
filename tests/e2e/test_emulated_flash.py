"""Scoring on a CUDA device, shown on one that is emulated, by stand-ins for its flash kernels."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

pytestmark = pytest.mark.e2e

Run = Callable[..., "subprocess.CompletedProcess[str]"]

SCORES = """
import sys
from functools import partial

import torch
from torch.nn.attention import varlen
from transformers import AutoModelForCausalLM

import flashkernels
from abacist.policy.scoring import attention_backend
from abacist.policy.scoring.attention_backend import AttentionBackend
from abacist.policy.scoring.score import attention_choice, score
from abacist.policy.source import BUILT_IN_FOLDER

calls = flashkernels.Calls()
if sys.argv[1] == "stand-in":
    varlen.varlen_attn = flashkernels.varlen_attn(calls)
model = AutoModelForCausalLM.from_pretrained(BUILT_IN_FOLDER, dtype=torch.float32).cuda().train()
model.gradient_checkpointing_enable({"use_reentrant": False})
ids = torch.randint(5, 100, (6, 40), generator=torch.Generator().manual_seed(0)).cuda()
ids[:3, :20], ids[3:, :20] = ids[0, :20], ids[3, :20]


def read():
    model.zero_grad()
    with torch.autocast("cuda", dtype=torch.bfloat16):
        logps, _ = score(model, ids, torch.ones_like(ids), 20, temperature=1.0)
    logps.mean().backward()
    gradient = torch.cat([weight.grad.flatten().cpu() for weight in model.parameters()])
    return logps.detach().cpu(), gradient


found = read()
with torch.autocast("cuda", dtype=torch.bfloat16):
    print(attention_choice(model))
print("calls", len(calls))
AttentionBackend.on = lambda _, packing: partial(attention_backend._attend, packing)
for ours, padded in zip(found, read(), strict=True):
    off = float((ours - padded).norm() / padded.norm())
    assert off < 0.02, off
print(attention_choice(model))
"""


@pytest.mark.parametrize("kernel", ["stand-in", "the real one, which is not there"])
def test_scoring_takes_a_flash_kernel_in_half_precision_and_says_which(
    kernel: str, run_on_gpu: Run, tmp_path: Path
) -> None:
    program = tmp_path / "program.py"
    program.write_text(SCORES, encoding="utf-8")
    done = run_on_gpu(str(program), kernel)
    assert done.returncode == 0, done.stderr
    half, calls, single = done.stdout.splitlines()
    if kernel == "stand-in":
        assert "PyTorch's flash kernel for variable lengths" in half
        assert calls == "calls 9"  # the trial, and four layers forward and once more in backward
    else:
        assert "over padded branches" in half and "is not used: it failed" in half
        assert calls == "calls 0"
    assert "flash kernels compute in bfloat16 or float16, not float32" in single
