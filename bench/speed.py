"""How much faster and leaner is a step than stock TRL's? ``make bench``, or run this file.

Each cell is a model, a number of shots and a number of prompts a step. Stock TRL runs as the gist
runs it (a micro-batch is one group, accumulation is the prompts of a step, LoRA r16 on all
linear layers, no KL term), with gradient checkpointing on, TRL's default; ours takes the same
settings and only its own recipe's choice of checkpointing. Both stand in one process and
take turns: stock, ours, stock, then the other way round. The first stock step of a round is
compared with ours, the two stock steps with each other (A/A: what noise alone looks like).
How equal work is forced is told in stopwatch.py, what the shares of the machine mean in limits.py.
Peak memory is the growth of a child process's resident memory during two steps.

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
from collections.abc import Callable, Sequence
from dataclasses import asdict
from fnmatch import fnmatch
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from abacist.learning.config import load_config
from limits import MatrixProducts, alone_seconds, copy_bytes_per_second, operations
from models import SHAPES, weight_bytes_per_token
from stopwatch import OURS, STOCK, Bench, Setup, StepTime, peak_growth_bytes

CELLS = [
    f"{model}/{shots}/{prompts}"
    for model in ("tiny", "8x512", "qwen-slice")
    for shots in (0, 5)
    for prompts in (1, 4)
]
PARTS = ("step", "rollout", "training")
WARM_STEPS = 2
PEAK_STEPS = 2
GENERATIONS = 8


def setup_of(cell: str, kind: str, checkpointing: str) -> Setup:
    """The cell ``MODEL/SHOTS/PROMPTS`` for stock or ours; ``checkpointing`` is about ours."""
    model, shots, prompts = cell.split("/")
    on = True
    if kind == OURS:
        recipe = load_config(SHAPES[model].recipe, None, ["--use_cpu", "true"]).training
        on = {"recipe": bool(recipe.gradient_checkpointing), "on": True, "off": False}[
            checkpointing
        ]
    return Setup(model, int(shots), int(prompts), generations=GENERATIONS, checkpointing=on)


def run_cell(cell: str, options: argparse.Namespace) -> dict[str, Any]:
    """Everything about one cell."""
    setups = {kind: setup_of(cell, kind, options.checkpointing) for kind in (STOCK, OURS)}
    # First, while this process is small.
    peaks = {} if options.no_memory else {kind: _peak(cell, kind, options) for kind in setups}
    benches = {kind: Bench(kind, setup) for kind, setup in setups.items()}
    for bench in benches.values():
        for _ in range(WARM_STEPS):
            bench.step()
    rounds = [_round(benches, number % 2 == 1) for number in range(options.pairs)]
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
        "prompt_tokens": rounds[0][OURS].prompt_tokens,
        "peak_growth_bytes": peaks,
    }
    if not options.no_limits:
        found["limits"] = {kind: _limits(bench, found, kind) for kind, bench in benches.items()}
    return found


def _round(benches: dict[str, Bench], backwards: bool) -> dict[str, StepTime]:
    order = [(STOCK, STOCK), (OURS, OURS), ("stock again", STOCK)]
    times = {}
    for name, kind in reversed(order) if backwards else order:
        gc.collect()
        times[name] = benches[kind].step()
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


def _limits(bench: Bench, found: dict[str, Any], kind: str) -> dict[str, float]:
    """What share of the machine's own rates training and rollout reach."""
    setup, seconds = bench.setup, found["seconds"][kind]
    with MatrixProducts(lambda: not bench.clock.in_rollout) as products:
        bench.step()
    alone = alone_seconds(products.counts, getattr(torch, setup.dtype), setup.device)
    bandwidth = copy_bytes_per_second(setup.device)
    read = weight_bytes_per_token(bench.trainer.model) * found["decoded_tokens"][kind]
    return {
        "matrix_share": alone / seconds["training"],
        "training_gflops": operations(products.counts) / seconds["training"] / 1e9,
        "mm_gflops": operations(products.counts) / max(alone, 1e-12) / 1e9,
        "bandwidth_share": read / bandwidth / seconds["rollout"],
        "copy_gigabytes_per_second": bandwidth / 1e9,
    }


def _peak(cell: str, kind: str, options: argparse.Namespace) -> int:
    command = [sys.executable, __file__, "--peak", kind, cell, "--threads", str(options.threads)]
    command += ["--checkpointing", options.checkpointing]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"the memory of {kind} in {cell} could not be measured:\n{done.stderr}")
    return int(done.stdout.split()[-1])


def _machine(threads: int) -> dict[str, Any]:
    names = ("torch", "trl", "transformers", "peft", "accelerate")
    return {
        "when": time.strftime("%Y-%m-%d %H:%M"),
        "platform": platform.platform(),
        "cores": os.cpu_count(),
        "threads": threads,
        "versions": {name: version(name) for name in names},
    }


def table(cells: dict[str, Any]) -> str:
    """All measured cells as Markdown, one row each."""
    columns: dict[str, Callable[[dict[str, Any]], str]] = {
        "prompt, reply tokens": lambda c: (
            f"{c['prompt_tokens']:.0f}, {c['decoded_tokens'][OURS]:.0f}"
        ),
        "step s": lambda c: f"{c['seconds'][STOCK]['step']:.2f} → {c['seconds'][OURS]['step']:.2f}",
        "step": lambda c: _times(c["ratios"]["step"]),
        "rollout": lambda c: _times(c["ratios"]["rollout"]),
        "training": lambda c: _times(c["ratios"]["training"]),
        "A/A step": lambda c: _times(c["control"]["step"]),
        "memory growth MB": _growth,
        "checkpointing": lambda c: " → ".join(
            "on" if c["setups"][kind]["checkpointing"] else "off" for kind in (STOCK, OURS)
        ),
        "of mm rate": lambda c: _share(c, "matrix_share"),
        "of bandwidth": lambda c: _share(c, "bandwidth_share"),
    }
    lines = ["| model/shots/prompts | " + " | ".join(columns) + " |", "|---" * 11 + "|"]
    for name, cell in cells.items():
        lines.append(f"| {name} | " + " | ".join(show(cell) for show in columns.values()) + " |")
    return "\n".join(lines)


def _times(spread: dict[str, float]) -> str:
    return f"{spread['median']:.2f} × ({spread['min']:.2f}–{spread['max']:.2f})"


def _growth(cell: dict[str, Any]) -> str:
    peaks = cell["peak_growth_bytes"]
    if not peaks:
        return "–"
    stock, ours = (peaks[kind] / 1e6 for kind in (STOCK, OURS))
    return f"{stock:.0f} → {ours:.0f}" + (f" ({stock / ours:.1f} ×)" if ours > 0 else "")


def _share(cell: dict[str, Any], name: str) -> str:
    limits = cell.get("limits")
    return f"{limits[STOCK][name]:.0%} → {limits[OURS][name]:.0%}" if limits else "–"


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cells", nargs="+", default=["*"], help="names or patterns")
    parser.add_argument("--pairs", type=int, default=5, help="rounds after the warm-up")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--checkpointing", choices=["recipe", "on", "off"], default="recipe",
                        help="ours only; stock keeps TRL's default, on")  # fmt: skip
    parser.add_argument("--output", type=Path, default=Path("runs/bench-speed.json"))
    parser.add_argument("--again", action="store_true", help="measure finished cells anew")
    parser.add_argument("--no-memory", action="store_true")
    parser.add_argument("--no-limits", action="store_true")
    parser.add_argument("--smoke", action="store_true", help="one small cell, one pair")
    parser.add_argument("--peak", nargs=2, metavar=("KIND", "CELL"), help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    """Measure the cells that are asked for and still missing, and print all there are."""
    options = _options()
    torch.set_num_threads(options.threads)
    if options.peak:
        kind, cell = options.peak
        bench = Bench(kind, setup_of(cell, kind, options.checkpointing))
        print(peak_growth_bytes(bench, PEAK_STEPS))
        return
    wanted = [cell for cell in CELLS if any(fnmatch(cell, one) for one in options.cells)]
    if options.smoke:
        wanted, options.pairs = ["smoke-qwen/0/1"], 1
    if not wanted:
        raise SystemExit(f"no cell matches {options.cells}; there are: {' '.join(CELLS)}")
    kept = json.loads(options.output.read_text()) if options.output.exists() else {}
    for cell in wanted:
        if cell in kept and not options.again:
            continue
        print(f"{cell} …", file=sys.stderr, flush=True)
        kept[cell] = run_cell(cell, options)
        options.output.parent.mkdir(parents=True, exist_ok=True)
        aside = options.output.with_suffix(".part")
        aside.write_text(json.dumps(kept, indent=1))
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
        f"LoRA r16 on all linear layers, {any_cell['machine']['threads']} thread(s); "
        + ", ".join(f"{k} {v}" for k, v in any_cell["machine"]["versions"].items())
    )
    print(f"Arrows: stock → ours. All cells are in {options.output}\n\n{table(cells)}")


if __name__ == "__main__":
    main()
