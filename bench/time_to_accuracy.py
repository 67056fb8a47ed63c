"""Wall time from the same base to the same held-out accuracy: stock TRL against ours.

Both arms start from the built-in model with the same LoRA, problems, rewards, seed and the
hyperparameters of our recipe ``tiny``. Stock is the script anyone would write: ``trl.GRPOTrainer``
with these numbers. Ours is what ``abacist train`` runs, rollout files included; ``--ours-flags``
adds settings to it alone (problem sampling, say). Every ``--every`` steps the clock stops, the
same fresh problems are answered greedily, and the clock goes on: imports, loading and
measuring count for neither. An arm ends once it has reached the highest target.

The gist's own learning rate (5e-6) is reported apart, for stock, first seed only: with it nothing
is learned in this time, so a ratio to it would flatter us.

    python bench/time_to_accuracy.py --seeds 0 1 2 --targets 0.5 0.6
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
import transformers
import trl
from datasets import Dataset

import abacist
from abacist.learning.arguments import GRPOConfig
from abacist.learning.config import Config, load_config
from abacist.learning.task import Task, load_task
from abacist.learning.train import load_trainable
from abacist.policy.loading import Policy, quiet_libraries
from abacist.proof.evaluate import evaluate
from abacist.task.problems import Problem, load_problems
from abacist.task.rewards import load_reward_funcs

# Used nowhere else: neither training nor any other bench sees these problems.
FRESH_SEED = 20261123
GIST_LEARNING_RATE = 5e-6


@dataclass
class Point:
    """The accuracy after ``step`` steps and so many seconds of training."""

    step: int
    seconds: float
    accuracy: float


class _Referee(transformers.TrainerCallback):
    """Keeps the clock, measures while it stands, ends the run at the highest target."""

    def __init__(self, policy: Policy, problems: list[Problem], every: int, enough: float) -> None:
        self.policy, self.problems, self.every, self.enough = policy, problems, every, enough
        self.points: list[Point] = []
        self.seconds = self.started = 0.0

    def measure(self, model: Any, step: int) -> float:
        measured = evaluate(
            replace(self.policy, model=model), self.problems, max_completion_tokens=96,
            batch_size=100, system_prompt=None,
        )  # fmt: skip
        self.points.append(Point(step, self.seconds, measured.accuracy.value))
        return measured.accuracy.value

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.measure(kwargs["model"], 0)
        self.started = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step % self.every and state.global_step < state.max_steps:
            return
        self.seconds += time.perf_counter() - self.started
        accuracy = self.measure(kwargs["model"], state.global_step)
        control.should_training_stop |= accuracy >= self.enough
        self.started = time.perf_counter()


def run(name: str, config: Config, task: Task, fresh: list[Problem], options: Any) -> list[Point]:
    """Train one arm and return its curve."""
    policy = load_trainable(config)
    referee = _Referee(policy, fresh, options.every, max(options.targets))
    is_ours = name.startswith("ours")
    trainer = make_trainer(policy, config, task, referee, is_ours=is_ours)
    print(f"{name} …", file=sys.stderr, flush=True)
    with contextlib.redirect_stdout(sys.stderr):
        trainer.train()
    return referee.points


def make_trainer(
    policy: Policy,
    config: Config,
    task: Task,
    callback: transformers.TrainerCallback,
    *,
    is_ours: bool,
) -> Any:
    """Our trainer, or TRL's with the same numbers: the script anyone would write."""
    arguments: Any = config.training if is_ours else plain(config.training)
    arguments.chat_template_kwargs = policy.chat.chat_template_kwargs
    trainer_class: Any = abacist.GRPOTrainer if is_ours else trl.GRPOTrainer
    trainer = trainer_class(
        model=policy.model,
        reward_funcs=load_reward_funcs(config.script.reward_funcs),
        args=arguments,
        train_dataset=Dataset.from_list(task.rows(task.train)),
        processing_class=policy.chat.tokenizer,
        callbacks=[callback],
    )
    trainer.remove_callback(transformers.PrinterCallback)
    return trainer


def plain(training: GRPOConfig) -> trl.GRPOConfig:
    """TRL's own configuration with the numbers of ours."""
    given = {one.name: getattr(training, one.name) for one in fields(trl.GRPOConfig) if one.init}
    # Derived from each other when a configuration is made: either may be given.
    given["generation_batch_size"] = None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return trl.GRPOConfig(**given)


def configure(seed: int, steps: int, folder: str, more: Sequence[str] = ()) -> Config:
    """Recipe ``tiny``, without saving and without evaluation of its own."""
    flags = ["--seed", str(seed), "--max_steps", str(steps), "--output_dir", folder]
    flags += ["--save_strategy", "no", "--eval_strategy", "no", "--num_heldout_problems", "0"]
    return load_config("tiny", None, [*flags, "--use_cpu", "true", *more])


def reached(points: Sequence[Point], target: float) -> Point | None:
    """The first measurement at or above ``target``."""
    return next((point for point in points if point.accuracy >= target), None)


def report(curves: dict[str, list[Point]], seeds: Sequence[int], targets: Sequence[float]) -> None:
    """One line a seed and target, then the median ratio."""
    for target in targets:
        ratios = []
        for seed in seeds:
            stock, ours = (reached(curves[f"{kind} {seed}"], target) for kind in ("stock", "ours"))
            if stock and ours and ours.seconds:
                ratios.append(stock.seconds / ours.seconds)
                told = f"{ratios[-1]:.2f} × less time"
            else:
                told = "no ratio"
            shown = (
                f"{kind}: {f'{at.seconds:.1f} s, step {at.step}' if at else 'not reached'}"
                for kind, at in (("stock", stock), ("ours", ours))
            )
            print(f"accuracy {target:.0%}, seed {seed}: {'; '.join(shown)}; {told}")
        if ratios:
            print(f"accuracy {target:.0%}: median {statistics.median(ratios):.2f} × less time")


def main() -> None:
    """Run both arms for every seed, print the ratios, keep the curves."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--targets", type=float, nargs="+", default=[0.5, 0.6])
    parser.add_argument("--steps", type=int, default=60, help="at most; also the schedule's length")
    parser.add_argument("--every", type=int, default=2, help="steps between measurements")
    parser.add_argument("--problems", type=int, default=200)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--no-gist", action="store_true", help="leave the gist's rate out")
    parser.add_argument("--output", type=Path, default=Path("runs/bench-time-to-accuracy.json"))
    parser.add_argument("--smoke", action="store_true", help="two short steps")
    parser.add_argument("--ours-flags", nargs=argparse.REMAINDER, default=[])
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    quiet_libraries()
    warnings.filterwarnings("ignore", category=FutureWarning)
    small: list[str] = []
    if options.smoke:
        options.seeds, options.steps, options.every, options.problems = [0], 2, 1, 6
        options.targets = [0.01, 1.0]
        small = ["--per_device_train_batch_size", "8", "--num_train_problems", "20"]
    fresh = load_problems("generated", split="heldout", limit=options.problems, seed=FRESH_SEED)
    curves: dict[str, list[Point]] = {}
    with tempfile.TemporaryDirectory() as folder:
        arms = [
            (f"{kind} {seed}", seed, options.ours_flags if kind == "ours" else [])
            for number, seed in enumerate(options.seeds)
            # Alternating, so that a machine that slows down does not favour one side.
            for kind in (("stock", "ours") if number % 2 == 0 else ("ours", "stock"))
        ]
        gist_rate = ["--learning_rate", str(GIST_LEARNING_RATE)]
        if not options.no_gist:
            arms.append((f"gist rate {options.seeds[0]}", options.seeds[0], gist_rate))
        for name, seed, more in arms:
            where = str(Path(folder) / name.replace(" ", "-"))
            config = configure(seed, options.steps, where, [*small, *more])
            curves[name] = run(name, config, load_task(config), fresh, options)
            kept = {one: [vars(point) for point in points] for one, points in curves.items()}
            options.output.parent.mkdir(parents=True, exist_ok=True)
            options.output.write_text(json.dumps(kept, indent=1), encoding="utf-8")
    print(f"{options.problems} fresh problems, {options.threads} thread(s), recipe tiny")
    report(curves, options.seeds, options.targets)
    for name, points in curves.items():
        if name.startswith("gist rate"):
            last = points[-1]
            print(
                f"apart, stock at the gist's rate of {GIST_LEARNING_RATE}: {points[0].accuracy:.1%}"
                f" → {last.accuracy:.1%} after {last.step} steps, {last.seconds:.1f} s"
            )


if __name__ == "__main__":
    main()
