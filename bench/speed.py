"""How much faster and leaner is a step than stock TRL's? ``make bench``, or run this file.

Each cell is a model, a number of shots and a number of prompts a step. Stock TRL runs as the gist
runs it (a micro-batch is one group, accumulation is the prompts of a step, LoRA r16 on all
linear layers, no KL term), with gradient checkpointing on, TRL's default; ours takes the same
settings and only its own recipe's choice of checkpointing. Both stand in one process and
take turns: stock, ours, stock, then the other way round. The first stock step of a round is
compared with ours, the two stock steps with each other (A/A: what noise alone looks like).
All three of a round have the same batch, and every round, the warm-up too, has another.
How equal work is forced is told in stopwatch.py, what the shares of the machine mean in limits.py.
Memory is how far five steps raise a child process above what it holds when ready (memory.py).

Finished cells are kept in ``--output`` and not run again without ``--again``:

    python bench/speed.py --cells 'tiny/*' '8x512/0/*' --pairs 7
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from fnmatch import fnmatch
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from abacist.learning.config import load_config
from limits import (
    MatrixProducts,
    alone_seconds,
    least_operations,
    operations,
    read_bytes_per_second,
)
from memory import growth
from models import SHAPES, weight_bytes_per_token
from stopwatch import OURS, STOCK, Bench, Setup, StepTime
from table import table

CELLS = [
    f"{model}/{shots}/{prompts}"
    for model in ("tiny", "8x512", "qwen-slice")
    for shots in (0, 5)
    for prompts in (1, 4)
]
PARTS = ("step", "rollout", "training")
WARM_STEPS = 2
MEMORY_STEPS = 5
GENERATIONS = 8


def setup_of(cell: str, kind: str, options: argparse.Namespace) -> Setup:
    """The cell ``MODEL/SHOTS/PROMPTS`` for stock or ours; ``--checkpointing`` is about ours."""
    model, shots, prompts = cell.split("/")
    on = True
    if kind == OURS:
        recipe = load_config(SHAPES[model].recipe, None, ["--use_cpu", "true"]).training
        on = {"recipe": bool(recipe.gradient_checkpointing), "on": True, "off": False}[
            options.checkpointing
        ]
    return Setup(
        model,
        int(shots),
        int(prompts),
        generations=GENERATIONS,
        checkpointing=on,
        equal_batches=options.equal_batches,
    )


def setups_of(cell: str, options: argparse.Namespace) -> dict[str, Setup]:
    """Of both trainers."""
    return {kind: setup_of(cell, kind, options) for kind in (STOCK, OURS)}


def run_cell(cell: str, options: argparse.Namespace) -> dict[str, Any]:
    """Everything about one cell."""
    setups = setups_of(cell, options)
    # First, while this process is small.
    memory = {} if options.no_memory else {kind: _memory(cell, kind, options) for kind in setups}
    benches = {kind: Bench(kind, setup) for kind, setup in setups.items()}
    for bench in benches.values():
        for number in range(WARM_STEPS):
            bench.step(number)
    rounds = [_round(benches, WARM_STEPS + number) for number in range(options.pairs)]
    found = {
        "machine": _machine(options.threads),
        "setups": {kind: asdict(setup) for kind, setup in setups.items()},
        "warm_steps": WARM_STEPS,
        "rounds": [{key: asdict(one) for key, one in times.items()} for times in rounds],
        "ratios": {part: _spread(rounds, part, STOCK, OURS) for part in PARTS},
        "control": {part: _spread(rounds, part, STOCK, "stock again") for part in PARTS},
        "seconds": {
            kind: {part: _median(rounds, kind, part) for part in PARTS} for kind in (STOCK, OURS)
        },
        "decoded_tokens": {kind: _tokens(rounds, kind) for kind in (STOCK, OURS)},
        "prompt_tokens": statistics.fmean(times[OURS].prompt_tokens for times in rounds),
        "memory_growth": memory,
    }
    if not options.no_limits:
        found["limits"] = {kind: _limits(bench, rounds) for kind, bench in benches.items()}
    return found


def _round(benches: dict[str, Bench], number: int) -> dict[str, StepTime]:
    order = [(STOCK, STOCK), (OURS, OURS), ("stock again", STOCK)]
    times = {}
    for name, kind in reversed(order) if number % 2 else order:
        gc.collect()
        times[name] = benches[kind].step(number)
    return times


def _seconds(times: StepTime, part: str) -> float:
    return float(getattr(times, f"{part}_seconds"))


def _median(rounds: Sequence[dict[str, StepTime]], kind: str, part: str) -> float:
    return statistics.median(_seconds(times[kind], part) for times in rounds)


def _tokens(rounds: Sequence[dict[str, StepTime]], kind: str) -> float:
    return statistics.fmean(times[kind].decoded_tokens for times in rounds)


def _spread(
    rounds: Sequence[dict[str, StepTime]], part: str, above: str, below: str
) -> dict[str, float]:
    ratios = [_seconds(times[above], part) / _seconds(times[below], part) for times in rounds]
    return {"median": statistics.median(ratios), "min": min(ratios), "max": max(ratios)}


def _limits(bench: Bench, rounds: Sequence[dict[str, StepTime]]) -> dict[str, float]:
    """What share of the machine's own rates training and rollout reach, in the round whose
    training took the median time."""
    setup, model, kind = bench.setup, bench.trainer.model, bench.kind
    by_time = sorted(range(len(rounds)), key=lambda at: _seconds(rounds[at][kind], "training"))
    at = by_time[len(rounds) // 2]
    times = rounds[at][kind]
    with MatrixProducts(lambda: not bench.clock.in_rollout) as products:
        bench.step(WARM_STEPS + at)
    least = least_operations(
        model,
        times.prompt_tokens,
        statistics.fmean(bench.batch.lengths),
        setup.prompts_per_step,
        setup.generations,
    )
    done = operations(products.counts)
    alone = alone_seconds(products.counts, getattr(torch, setup.dtype), setup.device)
    bandwidth = read_bytes_per_second(setup.device)
    read = weight_bytes_per_token(model) * times.longest_tokens
    return {
        "matrix_share": alone / times.training_seconds,
        "seen_of_least": done / least,
        "training_gflops": done / times.training_seconds / 1e9,
        "alone_gflops": done / max(alone, 1e-12) / 1e9,
        "bandwidth_share": read / bandwidth / times.rollout_seconds,
        "read_gigabytes_per_second": bandwidth / 1e9,
    }


def _memory(cell: str, kind: str, options: argparse.Namespace) -> dict[str, int]:
    command = [sys.executable, __file__, "--memory-of", kind, cell]
    command += ["--threads", str(options.threads), "--checkpointing", options.checkpointing]
    command += ["--equal-batches"] if options.equal_batches else []
    done = subprocess.run(command, capture_output=True, text=True, encoding="utf-8")
    if done.returncode:
        raise SystemExit(f"the memory of {kind} in {cell} could not be measured:\n{done.stderr}")
    found: dict[str, int] = json.loads(done.stdout.splitlines()[-1])
    return found


def _machine(threads: int) -> dict[str, Any]:
    names = ("torch", "trl", "transformers", "peft", "accelerate")
    return {
        "when": time.strftime("%Y-%m-%d %H:%M"),
        "platform": platform.platform(),
        "cores": os.cpu_count(),
        "threads": threads,
        "versions": {name: version(name) for name in names},
    }


def _keep(cell: str, kept: dict[str, Any], options: argparse.Namespace) -> bool:
    """Whether ``cell`` is finished. Raises SystemExit if it is, but with other settings."""
    if cell not in kept or options.again:
        return False
    setups = {kind: asdict(setup) for kind, setup in setups_of(cell, options).items()}
    if kept[cell]["setups"] != setups:
        raise SystemExit(
            f"{options.output} holds {cell} measured with other settings. Give another --output, "
            "or --again to measure it anew."
        )
    return True


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cells", nargs="+", default=["*"], help="names or patterns")
    parser.add_argument("--pairs", type=int, default=5, help="rounds after the warm-up")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--checkpointing", choices=["recipe", "on", "off"], default="recipe",
                        help="ours only; stock keeps TRL's default, on")  # fmt: skip
    parser.add_argument("--equal-batches", "--equal_batches", action="store_true",
                        help="one batch for all steps, as it is in no run")  # fmt: skip
    parser.add_argument("--output", type=Path, default=Path("runs/bench-speed.json"))
    parser.add_argument("--again", action="store_true", help="measure finished cells anew")
    parser.add_argument("--no-memory", action="store_true")
    parser.add_argument("--no-limits", action="store_true")
    parser.add_argument("--smoke", action="store_true", help="one small cell, one pair")
    parser.add_argument("--memory-of", nargs=2, metavar=("KIND", "CELL"), help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    """Measure the cells that are asked for and still missing, and print all there are."""
    options = _options()
    torch.set_num_threads(options.threads)
    if options.memory_of:
        kind, cell = options.memory_of
        bench = Bench(kind, setup_of(cell, kind, options))
        print(json.dumps(asdict(growth(bench, range(MEMORY_STEPS)))))
        return
    wanted = [cell for cell in CELLS if any(fnmatch(cell, one) for one in options.cells)]
    if options.smoke:
        wanted, options.pairs = ["smoke-qwen/0/1"], 1
    if not wanted:
        raise SystemExit(f"no cell matches {options.cells}; there are: {' '.join(CELLS)}")
    kept = json.loads(options.output.read_text(encoding="utf-8")) if options.output.exists() else {}
    for cell in [cell for cell in wanted if not _keep(cell, kept, options)]:
        print(f"{cell} …", file=sys.stderr, flush=True)
        kept[cell] = run_cell(cell, options)
        options.output.parent.mkdir(parents=True, exist_ok=True)
        aside = options.output.with_suffix(".part")
        aside.write_text(json.dumps(kept, indent=1), encoding="utf-8")
        aside.replace(options.output)
        gc.collect()
    cells = {cell: kept[cell] for cell in wanted}
    any_cell = next(iter(cells.values()))
    setup = Setup(**any_cell["setups"][STOCK])
    print(
        f"\nStock TRL ÷ Abacist, medians (min–max) of {len(any_cell['rounds'])} rounds or as kept"
    )
    print(
        f"{setup.dtype}, {setup.generations} replies a prompt, a micro-batch of as many rows, "
        f"LoRA r16 on all linear layers, {any_cell['machine']['threads']} thread(s), "
        f"{'one batch for all steps' if setup.equal_batches else 'every step its own batch'}; "
        + ", ".join(f"{k} {v}" for k, v in any_cell["machine"]["versions"].items())
    )
    print(f"Arrows: stock → ours. All cells are in {options.output}\n\n{table(cells)}")


if __name__ == "__main__":
    main()
