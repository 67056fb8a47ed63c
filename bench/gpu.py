"""The same comparison on a CUDA machine, in ten minutes at most: ``python bench/gpu.py``.

THIS BENCH HAS NOT BEEN RUN ON A GPU YET: only its smoke mode, on a CPU. Its vLLM part
has not been run at all. Take its first run as a test of the bench as well.

Random-init models of Qwen2.5-1.5B's and Llama-3.2-1B's shape in bf16, LoRA r16 on all linear
layers, 8 replies of 256 tokens a prompt, against stock TRL with Hugging Face's ``generate`` and,
where it is installed, with vLLM. Every row is decoded to its full budget (stopwatch.py says why
that is fair). Printed and kept after every cell:

* milliseconds for a token of every row, prefill included, and how many times the floor that is: the
  floor is the time in which the weights can be read once at the bandwidth of a plain copy,
  measured here;
* seconds of step, rollout and training (medians), and their ratio to stock;
* the peak of allocated memory over the timed steps, in GiB.

A cell that runs out of memory, or fails otherwise, is recorded as such, and the next one begins.
Cells that could not begin within ``--minutes`` are recorded as not run.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import sys
import time
from dataclasses import asdict
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from abacist.learning.config import load_config
from limits import copy_bytes_per_second
from models import weight_bytes_per_token
from stopwatch import OURS, STOCK, Bench, Setup

VLLM = "stock + vLLM"
MODELS = ("qwen2.5-1.5b", "llama-3.2-1b")
SMOKE_MODELS = ("smoke-qwen", "smoke-llama")
SHOTS_AND_PROMPTS = ((0, 1), (0, 4), (5, 1))  # the most telling first, should time run out
WARM_STEPS, TIMED_STEPS = 1, 2
VLLM_SETTINGS = {
    "use_vllm": True,
    "vllm_mode": "colocate",
    "vllm_gpu_memory_utilization": 0.3,
    # Its log-probabilities belong to the replies that are put aside before training.
    "vllm_importance_sampling_correction": False,
}


def setup_of(kind: str, model: str, shots: int, prompts: int, device: str) -> Setup:
    """One cell for one trainer; ours checkpoints gradients as its general recipe does."""
    checkpointing = True
    if kind == OURS:
        recipe = load_config("any", None, ["--use_cpu", "true"]).training
        checkpointing = bool(recipe.gradient_checkpointing)
    return Setup(
        model,
        shots,
        prompts,
        checkpointing=checkpointing,
        dtype="bfloat16" if device == "cuda" else "float32",
        device=device,
        draws_lengths=False,
        extra=VLLM_SETTINGS if kind == VLLM else {},
    )


def measure(kind: str, setup: Setup, bandwidth: float) -> dict[str, Any]:
    """Warm up and time one trainer in one cell. Raises whatever goes wrong in it."""
    on_cuda = setup.device == "cuda"
    bench = Bench(STOCK if kind == VLLM else kind, setup)
    for number in range(WARM_STEPS):
        bench.step(number)
    if on_cuda:
        torch.cuda.reset_peak_memory_stats()
    times = [bench.step(WARM_STEPS + number) for number in range(TIMED_STEPS)]
    found: dict[str, Any] = {
        f"{part}_seconds": statistics.median(getattr(one, f"{part}_seconds") for one in times)
        for part in ("step", "rollout", "training")
    }
    decoded = times[-1].decoded_tokens
    floor = weight_bytes_per_token(bench.trainer.model) / bandwidth * 1e3
    token = found["rollout_seconds"] / decoded * 1e3
    return found | {
        "setup": asdict(setup),
        "prompt_tokens": times[-1].prompt_tokens,
        "decoded_tokens": decoded,
        "token_milliseconds": token,
        "floor_milliseconds": floor,
        "times_the_floor": token / floor,
        "peak_gibibytes": torch.cuda.max_memory_allocated() / 2**30 if on_cuda else None,
    }


def guarded(kind: str, setup: Setup, bandwidth: float) -> dict[str, Any]:
    """:func:`measure`, with a failure as its result instead of an end of everything."""
    try:
        return measure(kind, setup, bandwidth)
    except torch.OutOfMemoryError as error:
        return {"setup": asdict(setup), "failed": "out of memory", "error": str(error)[:500]}
    except Exception as error:
        # A machine that is lent for minutes should still give the other cells.
        return {"setup": asdict(setup), "failed": type(error).__name__, "error": str(error)[:2000]}
    finally:
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def line(name: str, found: dict[str, Any], stock: dict[str, Any] | None) -> str:
    """One result in words."""
    if "failed" in found:
        return f"{name:<34} {found['failed']}: {found.get('error', '')[:120]}"
    peak = found["peak_gibibytes"]
    shown = (
        f"{name:<34} step {found['step_seconds']:7.2f} s, "
        f"rollout {found['rollout_seconds']:7.2f} s, training {found['training_seconds']:6.2f} s, "
        f"{found['token_milliseconds']:6.2f} ms a token "
        f"({found['times_the_floor']:.1f} × the floor)"
    )
    shown += f", peak {peak:.1f} GiB" if peak is not None else ""
    if stock and "failed" not in stock:
        ratio = stock["step_seconds"] / found["step_seconds"]
        shown += f"; stock takes {ratio:.2f} × as long"
    return shown


def main() -> None:
    """Measure cell by cell until done or out of time; 1 as exit code if a cell failed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=MODELS)
    parser.add_argument("--minutes", type=float, default=9.0, help="no cell begins later")
    parser.add_argument("--no-vllm", action="store_true")
    parser.add_argument("--output", type=Path, default=Path("runs/bench-gpu.json"))
    parser.add_argument("--smoke", action="store_true", help="on the CPU, at toy sizes")
    options = parser.parse_args()
    started = time.monotonic()
    if not options.smoke and not torch.cuda.is_available():
        raise SystemExit("There is no CUDA device here. --smoke runs the same code on the CPU.")
    device = "cpu" if options.smoke else "cuda"
    kinds = [STOCK, OURS]
    if device == "cuda" and not options.no_vllm and find_spec("vllm") is not None:
        kinds.append(VLLM)
    bandwidth = copy_bytes_per_second(device)
    document: dict[str, Any] = {
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu (smoke)",
        "copy_gigabytes_per_second": bandwidth / 1e9,
        "versions": {name: version(name) for name in ("torch", "trl", "transformers", "peft")},
        "vllm": version("vllm") if VLLM in kinds else None,
        "cells": {},
    }
    print(f"{document['device']}, copy {bandwidth / 1e9:.0f} GB/s, {document['versions']}")
    cells = document["cells"]
    for shots, prompts in SHOTS_AND_PROMPTS[: 1 if options.smoke else None]:
        for model in SMOKE_MODELS if options.smoke else options.models:
            for kind in kinds:
                name = f"{model}/{shots}/{prompts} {kind}"
                setup = setup_of(kind, model, shots, prompts, device)
                if time.monotonic() - started > 60 * options.minutes:
                    cells[name] = {"setup": asdict(setup), "failed": "not run", "error": "no time"}
                else:
                    cells[name] = guarded(kind, setup, bandwidth)
                options.output.parent.mkdir(parents=True, exist_ok=True)
                options.output.write_text(json.dumps(document, indent=1), encoding="utf-8")
                stock = None if kind == STOCK else cells.get(f"{model}/{shots}/{prompts} {STOCK}")
                print(line(name, cells[name], stock), flush=True)
    sys.exit(any("failed" in one for one in cells.values()))


if __name__ == "__main__":
    main()
