"""What stock TRL learns in the time that a run of ours took, from the same base.

    python bench/equal_time.py RUN [--threads 2] [--dtype bfloat16] [--no_checkpointing]

RUN is a finished run of ``abacist train`` with a verdict, made on this machine with as many
threads. Stock is the script anyone would write: ``trl.GRPOTrainer`` with RUN's model, LoRA, worked
examples, problems, rewards, seed and hyperparameters. What TRL does not have is left out: problems
come in shuffled epochs. Its weights and autocast are ``--dtype``. Without gradient checkpointing,
TRL's default, it is faster and takes much more memory: ``--no_checkpointing``. It trains until
RUN's seconds of training are over and ends with the step it is in. Then RUN's held-out problems are
answered by both, greedily, by the same engine.

Seconds are those of the optimizer steps, rollouts included; loading, checkpoints and measuring
count for neither. What stock has learned is kept in ``--output_dir``.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
import transformers

from abacist.learning.config import Config, load_config
from abacist.learning.task import Task, load_task
from abacist.learning.train import load_trainable
from abacist.policy.choices import float32_matmul_precision
from abacist.policy.loading import load_policy, quiet_libraries
from abacist.proof.comparison.compare import Comparison, compare
from abacist.proof.comparison.sides import AFTER, BEFORE, load_side
from abacist.proof.evaluate import evaluate
from abacist.proof.evaluation import Evaluation
from abacist.records.rundir import read_json_lines
from time_to_accuracy import make_trainer


class Clock(transformers.TrainerCallback):
    """Ends a training after the first step that ends past ``seconds``."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self.step_seconds: list[float] = []
        self._began = 0.0

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._began = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.step_seconds.append(time.perf_counter() - self._began)
        print(f"stock, step {state.global_step}: {self.step_seconds[-1]:.0f} s", flush=True)
        control.should_training_stop |= sum(self.step_seconds) >= self.seconds


def configure(run: Path, output: Path, dtype: str, *, checkpointing: bool) -> Config:
    """The settings of ``run``, for stock."""
    flags = ["--output_dir", str(output), "--dtype", dtype]
    flags += ["--gradient_checkpointing", str(checkpointing).lower()]
    flags += ["--bf16", str(dtype == "bfloat16").lower(), "--use_cpu", "true"]
    flags += ["--save_strategy", "no", "--eval_strategy", "no"]
    return load_config(None, str(run / "config.yaml"), flags)


def train_stock(config: Config, task: Task, clock: Clock) -> Path:
    """Where the adapter is that stock ``trl.GRPOTrainer`` has learned."""
    trainer = make_trainer(load_trainable(config), config, task, clock, is_ours=False)
    trainer.train()
    trainer.save_model()
    return Path(trainer.args.output_dir)


def measure(adapter: Path, task: Task, like: Config) -> Evaluation:
    """The held-out problems, answered by ``adapter`` as a run with the settings ``like`` did."""
    policy = load_policy(str(adapter), dtype=str(like.model.dtype))
    with float32_matmul_precision(like.model.float32_matmul_precision):
        return evaluate(
            policy,
            task.heldout,
            system_prompt=task.system_prompt,
            shots=task.shots,
            max_completion_tokens=like.max_completion_tokens,
            batch_size=like.script.eval_batch_size,
            rewards=[],
            conditions={"arithmetic": policy.arithmetic},
        )


def line(name: str, comparison: Comparison) -> str:
    """One row of the table: how many are right, and the change with its interval."""
    found = comparison.accuracy
    change = found.change
    return (
        f"{name:28} {found.before.value:6.1%} → {found.after.value:6.1%}  "
        f"{100 * change.value:+.1f} points [{100 * change.low:+.1f}, {100 * change.high:+.1f}]"
    )


def main() -> None:
    """Train stock for as long as RUN took, measure, and print the three comparisons."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"])
    parser.add_argument("--no_checkpointing", action="store_true")
    parser.add_argument("--seconds", type=float, help="instead of RUN's")
    parser.add_argument("--output_dir", type=Path, default=Path("runs/bench-equal-time"))
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    quiet_libraries()
    timings, _ = read_json_lines(options.run / "timings.jsonl")
    ours_seconds = [row["step_time"] for row in timings if "step_time" in row]
    seconds = options.seconds or sum(ours_seconds)
    checkpointing = not options.no_checkpointing
    config = configure(options.run, options.output_dir, options.dtype, checkpointing=checkpointing)
    task = load_task(config)
    clock = Clock(seconds)
    adapter = train_stock(config, task, clock)
    like = load_config(None, str(options.run / "config.yaml"), ["--output_dir", "unused"])
    before, after = (load_side(str(options.run), when).evaluation for when in (BEFORE, AFTER))
    stock = measure(adapter, task, like)
    stock.save(options.output_dir / "after")
    kept = {"ours_seconds": ours_seconds, "stock_seconds": clock.step_seconds}
    (options.output_dir / "seconds.json").write_text(json.dumps(kept), encoding="utf-8")
    print(f"{len(task.heldout)} held-out problems, {options.threads} thread(s)")
    print(f"ours: {len(ours_seconds)} steps in {sum(ours_seconds):.0f} s")
    took = sum(clock.step_seconds)
    print(f"stock, {options.dtype}: {len(clock.step_seconds)} steps in {took:.0f} s")
    print(line("base → ours", compare(before, after)))
    print(line("base → stock", compare(before, stock)))
    print(line("stock → ours", compare(stock, after)))


if __name__ == "__main__":
    main()
