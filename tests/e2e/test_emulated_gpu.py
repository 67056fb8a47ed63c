"""What a run does on a CUDA device, shown on one that is emulated (tests/emulated_gpu.py)."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from abacist.records.rollout import read_rollouts
from adapters import paid_apart, untrained

pytestmark = pytest.mark.e2e

SHORT = ["--num_heldout_problems", "2", "--num_consistency_problems", "1"]
SHORT += ["--num_selection_problems", "0", "--num_train_problems", "16"]
FEW = ["--per_device_train_batch_size", "8", "--num_generations", "4", "--max_completion_length"]
Run = Callable[..., "subprocess.CompletedProcess[str]"]

BEHAVES_LIKE_A_GPU = """
import torch

x = torch.ones(4, device="cuda")
assert type(x) is torch.Tensor and x.is_cuda and str(x.device) == "cuda:0"


def refuses(words, action):
    try:
        action()
    except (RuntimeError, TypeError) as error:
        assert words in str(error), error
    else:
        raise AssertionError(f"should have been refused: {words}")


refuses("same device", lambda: x + torch.ones(4))
refuses("same device", lambda: torch.ones(3, 4) @ x)
refuses("to numpy", lambda: x.numpy())
assert (x + torch.tensor(1.0)).tolist() == [2.0] * 4  # scalars may come from the CPU

weight = torch.nn.Parameter(torch.eye(4).cuda())
(x @ weight).sum().backward()
assert weight.grad.is_cuda and weight.grad.tolist() == [[1.0] * 4] * 4
with torch.autocast("cuda", dtype=torch.bfloat16):
    assert (x[None] @ weight).dtype == torch.bfloat16

graph, seen = torch.cuda.CUDAGraph(), torch.zeros(4, device="cuda")
with torch.cuda.graph(graph):
    doubled = x * 2
    seen += doubled
    refuses("capturing", lambda: doubled.sum().item())
    refuses("capturing", lambda: torch.ones(4).cuda())
seen.zero_()
x.fill_(5)
graph.replay()
graph.replay()
assert seen.tolist() == [20.0] * 4, seen
"""


def test_the_emulated_gpu_refuses_what_a_gpu_refuses_and_replays_what_it_captured(
    run_on_gpu: Run, tmp_path: Path
) -> None:
    program = tmp_path / "program.py"
    program.write_text(BEHAVES_LIKE_A_GPU, encoding="utf-8")
    done = run_on_gpu(str(program))
    assert done.returncode == 0, done.stderr


def metrics(folder: Path) -> list[dict[str, float]]:
    return [
        json.loads(line)
        for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    ]


def test_a_run_on_a_gpu_is_the_run_on_a_cpu_to_rounding(run_on_gpu: Run, tmp_path: Path) -> None:
    for place in ("cpu", "gpu"):
        done = run_on_gpu(
            *("-m", "abacist", "train", "--output_dir", str(tmp_path / place), "--bf16", "false"),
            *("--max_steps", "2", *SHORT, *FEW, "48"),
            cpu=place == "cpu",
        )
        assert done.returncode == 0, done.stdout + done.stderr
        assert ("device: cuda:0" in done.stdout) == (place == "gpu")
    cpu, gpu = ([r.completion for r in read_rollouts(tmp_path / place / "rollouts")]
                for place in ("cpu", "gpu"))  # fmt: skip
    assert cpu == gpu and len(cpu) == 16
    for on_cpu, on_gpu in zip(metrics(tmp_path / "cpu"), metrics(tmp_path / "gpu"), strict=True):
        assert on_gpu == pytest.approx(on_cpu, rel=1e-4, abs=1e-6)
        assert on_cpu.get("grad_norm", 1.0) > 0


@pytest.mark.parametrize(
    "recipe, kind, flags",
    [
        ("qwen2.5-1.5b", "qwen2.5-instruct", ["--beta", "0.04", "--num_iterations", "2"]),
        ("llama-3.2-1b-base-fewshot", "llama-3.2-base", []),
    ],
)
def test_a_recipe_trains_in_bfloat16_on_a_gpu(
    run_on_gpu: Run, lookalike: Callable[[str], Path], tmp_path: Path, recipe: str, kind: str,
    flags: list[str],
) -> None:  # fmt: skip
    done = run_on_gpu(
        *("-m", "abacist", "train", recipe, "--model_name_or_path", str(lookalike(kind))),
        *("--dataset_name", "generated", "--output_dir", str(tmp_path / "run")),
        *("--max_steps", "2", "--warmup_steps", "0", *SHORT, *FEW, "16", *flags),
        *("--gradient_accumulation_steps", "2"),
        *("--reward_funcs", paid_apart(tmp_path), "--allow_hackable_rewards"),
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "dtype: bfloat16" in done.stdout
    assert (tmp_path / "run" / "evals" / "verdict.json").exists()
    assert untrained(tmp_path / "run") == []


def test_replayed_graphs_write_what_a_cpu_writes(run_on_gpu: Run) -> None:
    done = run_on_gpu(str(Path(__file__).with_name("graphs_on_gpu.py")))
    assert done.returncode == 0, done.stdout + done.stderr
