"""What a run will cost and what it has to learn from, before it is begun: ``--dry_run``.

:func:`plan` assembles the run as ``learning.train`` does, asks the untrained policy a sample of
the training problems, takes a few real steps with a stopwatch, and adds everything up. Nothing
of it is kept: the trainer works in a temporary folder that is removed, and the weights it moved are
those in memory.
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from abacist.learning.config import Config
from abacist.learning.dryrun import advice
from abacist.learning.dryrun.activations import measure_forward
from abacist.learning.dryrun.burst import Burst, run_burst
from abacist.learning.dryrun.memory import Memory, plan_memory
from abacist.learning.dryrun.probe import PROBE_SAMPLES, Probe, ask
from abacist.learning.dryrun.schedule import run_seconds, total_steps
from abacist.learning.dryrun.solverates import GROUP_SIZES
from abacist.learning.judge import VERDICT_SAMPLES, Judge
from abacist.learning.task import Task
from abacist.learning.tracking import Silent, Watcher, told_of
from abacist.learning.train import (
    load_parts,
    make_trainer,
    place,
    refuse_several_processes,
)
from abacist.policy.loading import Policy, quiet_libraries
from abacist.records.rundir import RunDir

PROBE_PROBLEMS = 32


@dataclass(frozen=True)
class Plan:
    """Everything a dry run found out. ``seconds`` sums up the whole run by part; empty where no
    step could be taken, because memory does not suffice."""

    model: str
    steps: int
    problems_per_step: int
    num_generations: int
    budget_tokens: int
    longest_prompt_tokens: int
    memory: Memory
    burst: Burst | None
    seconds: dict[str, float]
    checkpoint_bytes: int
    probe: Probe
    recommendations: tuple[advice.Recommendation, ...] = ()
    warnings: tuple[str, ...] = ()

    @property
    def fits(self) -> bool:
        """Whether the run is expected to have enough memory: measured where it could be, on a
        GPU, else predicted."""
        if self.burst is None:
            return False
        return self.memory.fits or self.memory.device.startswith("cuda")

    def to_json(self) -> dict[str, Any]:
        """The plan for a machine: bytes, seconds, shares with their intervals."""
        probe, memory = self.probe, self.memory
        return {
            "model": self.model,
            "fits": self.fits,
            "steps": self.steps,
            "problems_per_step": self.problems_per_step,
            "num_generations": self.num_generations,
            "memory": {
                "device": memory.device,
                "available_bytes": memory.available_bytes,
                "rollout_bytes": memory.rollout_bytes,
                "training_bytes": memory.training_bytes,
                "loaded_bytes": memory.loaded_bytes,
                "parts": [asdict(part) for part in memory.parts],
            },
            "burst": self.burst and {**asdict(self.burst), "step_seconds": self.burst.step_seconds},
            "seconds": {**self.seconds, "total": sum(self.seconds.values())},
            "checkpoint_bytes": self.checkpoint_bytes,
            "probe": {
                "problems": len(probe.rates.solved),
                "samples": probe.rates.samples,
                "solved_histogram": probe.rates.histogram(),
                "mixed_observed": probe.rates.observed_mixed().to_json(),
                "mixed_predicted": {
                    str(size): probe.rates.predicted_mixed(size).to_json() for size in GROUP_SIZES
                },
                "reward_varies": probe.varied.to_json(),
                "figures": {name: found.to_json() for name, found in probe.figures.items()},
                "rewards": {name: found.to_json() for name, found in probe.rewards.items()},
                "completion_tokens": {
                    "p50": probe.length(0.5),
                    "p99": probe.length(0.99),
                    "budget": self.budget_tokens,
                    "truncated_fraction": probe.truncated_fraction,
                },
            },
            "recommendations": [asdict(one) for one in self.recommendations],
            "warnings": list(self.warnings),
        }


def plan(
    config: Config, watcher: Watcher | None = None, *, num_problems: int = PROBE_PROBLEMS
) -> Plan:
    """Plan the run that ``config`` describes, without leaving anything behind.

    ``num_problems`` training problems are asked, each several times. Raises AbacistError for
    whatever would stop the run itself before its first step.
    """
    watcher = watcher or Silent()
    refuse_several_processes()
    quiet_libraries()
    RunDir.check(**place(config))
    task, rewards, policy = load_parts(config, watcher)
    with tempfile.TemporaryDirectory(prefix="abacist-plan-") as folder:
        run = RunDir(Path(folder) / "run")
        run.path.mkdir()
        trial = _trial_of(config, run.path)
        trainer = make_trainer(
            trial, task, policy, rewards, run, Judge(trial, task, run, Silent()), Silent()
        )
        for line in trainer.paths():
            watcher.note(f"  {line}")
        asked = min(num_problems, len(task.train))
        watcher.stage(f"Asking {asked} training problems, {PROBE_SAMPLES} times each")
        probe = ask(config, task, policy, trainer, num_problems, told_of(watcher, "sampled"))
        watcher.stage("Measuring memory and a few steps")
        prompt_tokens = _longest_prompt_tokens(task, policy)
        eval_rows = min(config.script.eval_batch_size, len(task.heldout) * VERDICT_SAMPLES)
        forward = measure_forward(trainer, prompt_tokens, config.max_completion_tokens)
        memory = plan_memory(trainer, forward, prompt_tokens, eval_rows)
        burst = None
        # Where too little memory would end the process, a run that does not fit is not tried.
        if memory.fits or memory.device.startswith("cuda"):
            trainer.watch_step = watcher.within_step
            burst = _tried(lambda: run_burst(trainer, partial(_tell, watcher, "steps")))
        steps = total_steps(config, len(task.train))
        checkpoint_bytes = _checkpoint_bytes(trainer)
        found = Plan(
            model=policy.name,
            steps=steps,
            problems_per_step=config.problems_per_step,
            num_generations=trainer.num_generations,
            budget_tokens=config.max_completion_tokens,
            longest_prompt_tokens=prompt_tokens,
            memory=memory,
            burst=burst,
            seconds=run_seconds(config, task, steps, burst, probe, checkpoint_bytes),
            checkpoint_bytes=checkpoint_bytes,
            probe=probe,
        )
        return replace(
            found,
            recommendations=tuple(
                advice.recommend(found, config, trainer, forward, policy.context_tokens)
            ),
            warnings=tuple(advice.warn(found, config)),
        )


def _trial_of(config: Config, folder: Path) -> Config:
    """The configuration for the few steps: nothing is evaluated, saved or reported."""
    training = copy.copy(config.training)
    training.output_dir = str(folder)
    training.eval_strategy = training.save_strategy = "no"
    training.do_eval = training.load_best_model_at_end = training.push_to_hub = False
    training.report_to = []
    training.keep_rollouts = False
    training.resume_from_checkpoint = None
    return Config(
        config.recipe, training, config.model, config.script, config.settings, config.sources
    )


def _tell(watcher: Watcher, label: str, done: int, total: int) -> None:
    watcher.progress(done, total, label)


def _tried(measure: Callable[[], Burst]) -> Burst | None:
    """The burst, or None if memory ran out in it."""
    try:
        return measure()
    except (torch.OutOfMemoryError, MemoryError):
        return None
    except RuntimeError as error:
        if "can't allocate" in str(error) or "out of memory" in str(error):
            return None
        raise


def _checkpoint_bytes(trainer: Any) -> int:
    """Weights that are trained, and the optimizer's two moments of them."""
    trained = [p for p in trainer.model.parameters() if p.requires_grad]
    return 3 * sum(weight.numel() * weight.element_size() for weight in trained)


def _longest_prompt_tokens(task: Task, policy: Policy) -> int:
    return max(len(policy.chat.encode(row["prompt"])) for row in task.rows(task.train))
