"""One step of each recipe in the memory that it promises: ``python bench/recipe_memory.py``.

THIS HAS NOT BEEN RUN ON A GPU YET, only at toy sizes on one that is emulated.

The recipes ask for a GPU of 24 GB. PyTorch's allocator is held to that on a larger one, and each
recipe trains one step as it stands: its own batch, budget and decision on gradient checkpointing,
by ``abacist.train``, with the evaluations before and after. The weights are random, in the
published shape (models.py): hardly a reply ends by itself, so they take the whole budget. A coin
pays (``--control random``): hardly a group is without a signal, so they are trained on.

Kept are the peaks of allocated and of reserved memory, and what the device holds outside PyTorch's
allocator (CUDA's own, the libraries', other processes'), which the limit does not count. Whatever
does not fit fails, with PyTorch's message.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

import abacist
from abacist.learning.tracking import Silent
from abacist.records.rollout import read_rollouts
from models import build_model, build_tokenizer

# What stands for each recipe's model in the smoke mode; else it is the shape of the same name.
RECIPES = {"qwen2.5-1.5b": "smoke-qwen", "llama-3.2-1b": "smoke-llama"}
PROMISED_GIBIBYTES = 24.0
HELDOUT_PROBLEMS = 100  # as many as an evaluation has in work at a time
SMOKE = {"gradient_accumulation_steps": 2, "max_completion_length": 24, "num_heldout_problems": 4,
         "num_train_problems": 64}  # fmt: skip
GIBIBYTE = 2**30


class Notes(Silent):
    """Keeps what a run says of itself: its dtype, its paths, its gradient checkpointing."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def note(self, text: str) -> None:
        self.lines.append(text.strip())


def save_model(shape: str, folder: Path) -> Path:
    """The random model of ``SHAPES[shape]`` with its tokenizer in ``folder``, in bfloat16."""
    model = build_model(shape, dtype=torch.bfloat16, device="cuda")
    model.save_pretrained(folder)
    build_tokenizer(shape).save_pretrained(folder)
    return folder


def take_step(
    recipe: str, model: Path, run: Path, watcher: Notes, **flags: Any
) -> list[dict[str, Any]]:
    """Train ``recipe`` for one step on ``model``; the lines of the run's ``metrics.jsonl``."""
    settings: dict[str, Any] = {
        "model": model,
        "dataset": "generated",
        "output_dir": run,
        "max_steps": 1,
        "control": "random",
        "num_selection_problems": 0,
        "num_heldout_problems": HELDOUT_PROBLEMS,
    }
    abacist.train(recipe, watcher=watcher, **settings | flags)
    lines = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def measure(recipe: str, shape: str, **flags: Any) -> dict[str, Any]:
    """The peaks of one step, or how it failed."""
    notes = Notes()
    began = time.monotonic()
    try:
        with tempfile.TemporaryDirectory() as place:
            model, run = save_model(shape, Path(place, "model")), Path(place, "run")
            gc.collect()
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            take_step(recipe, model, run, notes, **flags)
            rollouts = read_rollouts(run / "rollouts")
    except torch.OutOfMemoryError as error:
        return {"failed": "out of memory", "error": str(error)[:2000], "notes": notes.lines}
    except Exception as error:  # the other recipe is measured all the same
        said = str(error)[:2000]
        return {"failed": type(error).__name__, "error": said, "notes": notes.lines}
    finally:
        gc.collect()
        torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info()
    return {
        "peak_allocated_gibibytes": torch.cuda.max_memory_allocated() / GIBIBYTE,
        "peak_reserved_gibibytes": torch.cuda.max_memory_reserved() / GIBIBYTE,
        "outside_gibibytes": (total - free - torch.cuda.memory_reserved()) / GIBIBYTE,
        "seconds": time.monotonic() - began,
        "replies": len(rollouts),
        "prompt_tokens": statistics.mean(one.prompt_tokens for one in rollouts),
        "completion_tokens": statistics.mean(one.completion_tokens for one in rollouts),
        "notes": notes.lines,
    }


def line(recipe: str, found: dict[str, Any], gibibytes: float) -> str:
    """One result in words."""
    if "failed" in found:
        return f"{recipe}: {found['failed']} within {gibibytes:g} GiB: {found['error']}"
    return (
        f"{recipe}: peak {found['peak_allocated_gibibytes']:.2f} GiB allocated, "
        f"{found['peak_reserved_gibibytes']:.2f} reserved of {gibibytes:g} GiB, and "
        f"{found['outside_gibibytes']:.2f} outside; {found['replies']} replies of "
        f"{found['completion_tokens']:.0f} tokens to prompts of {found['prompt_tokens']:.0f}, "
        f"{found['seconds']:.0f} s in all"
    )


def main() -> None:
    """Measure both recipes; 1 as exit code if one did not fit or failed otherwise."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--gibibytes", type=float, default=PROMISED_GIBIBYTES)
    parser.add_argument("--output", type=Path, default=Path("runs/recipe-memory.json"))
    parser.add_argument("--smoke", action="store_true", help="at toy sizes")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("There is no CUDA device here, whose memory could be measured.")
    total = torch.cuda.mem_get_info()[1] / GIBIBYTE
    torch.cuda.set_per_process_memory_fraction(min(1.0, options.gibibytes / total))
    document: dict[str, Any] = {
        "device": torch.cuda.get_device_name(),
        "device_gibibytes": total,
        "limit_gibibytes": min(total, options.gibibytes),
        "versions": {name: version(name) for name in ("torch", "trl", "transformers", "peft")},
        "recipes": {},
    }
    for recipe, toy in RECIPES.items():
        found = measure(recipe, toy, **SMOKE) if options.smoke else measure(recipe, recipe)
        document["recipes"][recipe] = found
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.write_text(json.dumps(document, indent=1), encoding="utf-8")
        print(line(recipe, found, document["limit_gibibytes"]), flush=True)
    sys.exit(any("failed" in found for found in document["recipes"].values()))


if __name__ == "__main__":
    main()
