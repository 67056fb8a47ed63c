"""What a run will cost and what it has to learn from, before it begins: ``--dry_run``.

:func:`plan` assembles the run as ``learning.train`` does, asks the untrained policy a sample of
the training problems, takes a few real steps with a stopwatch, and adds everything up. Nothing
of it is kept: the trainer works in a temporary folder that is removed, and the weights it moved are
those in memory. :func:`recommend` names settings to change, each with its reason and the flag to
paste, and :func:`warn` what would make the run fail or teach nothing. docs/scaling.md says what
their rules rest on.
"""

from __future__ import annotations

import copy
import math
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel

from abacist.errors import UsageError
from abacist.learning import gradient_checkpointing, processes
from abacist.learning.config import Config
from abacist.learning.dryrun.burst import Burst, run_burst
from abacist.learning.dryrun.memory import (
    ROOMY_FRACTION,
    SAFE_FRACTION,
    Forward,
    Memory,
    gib,
    measure_forward,
    plan_memory,
    trained_bytes,
    with_micro_batch,
)
from abacist.learning.dryrun.probe import GROUP_SIZES, PROBE_SAMPLES, Probe, ask
from abacist.learning.estimate.cost import occasions, steps_within, total_steps
from abacist.learning.health.history import Facts
from abacist.learning.health.rules import rate_band, rate_out_of_band
from abacist.learning.heldout import VERDICT_SAMPLES, HeldoutEvaluation
from abacist.learning.task import Task
from abacist.learning.tracking import Silent, Watcher, refuse_incomplete, told_of
from abacist.learning.train import load_parts, make_trainer, place
from abacist.policy.choices import float32_matmul_precision
from abacist.policy.loading import quiet_libraries
from abacist.records.rundir import RunDir

PROBE_PROBLEMS = 32
DISK_BYTES_PER_SECOND = 200e6  # assumed, not measured: a dry run writes nothing

ENOUGH_MIXED = 0.5  # of the groups: from here on more replies to a problem buy little
TRUNCATED_AT_MOST = 0.05
SPARE_LENGTH = 1.5  # times the longest of 99 replies in 100, because replies grow while learning


@dataclass(frozen=True)
class Recommendation:
    """``flags`` are ready to be pasted; empty where the setting is fine as it is."""

    setting: str
    now: str
    flags: str
    reason: str


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
    within_hours: str | None = None
    """How many of the steps --max_hours suffices for; None where it is not set, or not known."""
    recommendations: tuple[Recommendation, ...] = ()
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
            "within_hours": self.within_hours,
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


def _refuse_several_processes() -> None:
    if processes.count() > 1:
        raise UsageError(
            "--dry_run plans one process, and a launcher has started several",
            "Plan without it: memory is that of each process, and so are seconds a micro-batch.",
        )


def plan(
    config: Config, watcher: Watcher | None = None, *, num_problems: int = PROBE_PROBLEMS
) -> Plan:
    """Plan the run that ``config`` describes, without leaving anything behind.

    ``num_problems`` training problems are asked, each several times. Raises AbacistError for
    whatever would stop the run itself before its first step.
    """
    watcher = watcher or Silent()
    refuse_incomplete(watcher)
    config = config.copy()
    _refuse_several_processes()
    quiet_libraries()
    RunDir.check(**place(config))
    with float32_matmul_precision(config.model.float32_matmul_precision):
        return _planned(config, watcher, num_problems)


def _planned(config: Config, watcher: Watcher, num_problems: int) -> Plan:
    task, rewards, policy = load_parts(config, watcher)
    with tempfile.TemporaryDirectory(prefix="abacist-plan-") as folder:
        run = RunDir(Path(folder) / "run")
        run.path.mkdir()
        trial = _trial_of(config, run.path)
        heldout = HeldoutEvaluation(trial, task, run, Silent())
        trainer = make_trainer(policy, rewards, heldout)
        checkpointing = gradient_checkpointing.decide(trial, task, policy, trainer)
        for line in [*trainer.fast_path_report(), *([checkpointing] if checkpointing else [])]:
            watcher.note(f"  {line}")
        asked = min(num_problems, len(task.train))
        watcher.stage(f"Asking {asked} training problems, {PROBE_SAMPLES} times each")
        probe = ask(config, task, policy, trainer, num_problems, told_of(watcher, "sampled"))
        watcher.stage("Measuring memory and a few steps")
        prompt_tokens = max(len(policy.chat.encode(row["prompt"])) for row in task.rows(task.train))
        eval_rows = min(config.script.eval_batch_size, len(task.heldout) * VERDICT_SAMPLES)
        forward = measure_forward(trainer, prompt_tokens, config.max_completion_tokens)
        memory = plan_memory(trainer, forward, prompt_tokens, eval_rows)
        burst = None
        # Where too little memory would end the process, a run that does not fit is not tried.
        if memory.fits or memory.device.startswith("cuda"):
            trainer.watch_step = watcher.within_step
            burst = _tried(trainer, watcher)
        steps = total_steps(config, len(task.train))
        # Weights that are trained, and the optimizer's two moments of them.
        checkpoint_bytes = 3 * trained_bytes(trainer.model)
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
            within_hours=_within_hours(found, config),
            recommendations=tuple(
                recommend(found, config, trainer, forward, policy.context_tokens)
            ),
            warnings=tuple(warn(found, config)),
        )


def run_seconds(
    config: Config, task: Task, steps: int, burst: Burst | None, probe: Probe, checkpoint_bytes: int
) -> dict[str, float]:
    """The whole run by part; nothing where no step was taken.

    A greedy reply is taken to last as long as a sampled one.
    """
    if burst is None:
        return {}
    training = config.training
    epochs = training.num_train_epochs
    sampled = VERDICT_SAMPLES * min(config.script.num_consistency_problems, len(task.heldout))
    verdict_replies = 2 * (len(task.heldout) + sampled)
    looks = occasions(training.eval_strategy, training.eval_steps, steps, epochs)
    saves = 1 + occasions(training.save_strategy, training.save_steps, steps, epochs)
    return {
        "rollouts": steps * burst.rollout_seconds,
        "training": steps * burst.training_seconds,
        "verdict, before and after": verdict_replies * probe.reply_seconds,
        "selection problems": looks * len(task.selection) * probe.reply_seconds,
        "checkpoints": saves * checkpoint_bytes / DISK_BYTES_PER_SECOND,
    }


def _within_hours(plan: Plan, config: Config) -> str | None:
    hours, training = config.script.max_hours, config.training
    if hours is None or plan.burst is None:
        return None
    rollout_every = int(training.steps_per_generation or 1) * training.num_iterations
    rollouts_a_step = training.gradient_accumulation_steps / rollout_every
    verdict = plan.seconds["verdict, before and after"] / 2
    return steps_within(
        hours,
        step_seconds=(sum(plan.seconds.values()) - 2 * verdict) / max(1, plan.steps),
        before_seconds=verdict,
        after_seconds=verdict,
        steps=plan.steps,
        replies=rollouts_a_step * plan.problems_per_step * plan.num_generations,
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
    return replace(config, training=training)


def _tried(trainer: Any, watcher: Watcher) -> Burst | None:
    """The burst, or None if memory ran out in it."""
    try:
        return run_burst(trainer, lambda done, total: watcher.progress(done, total, "steps"))
    except (torch.OutOfMemoryError, MemoryError):
        return None
    except RuntimeError as error:
        if "can't allocate" in str(error) or "out of memory" in str(error):
            return None
        raise


def recommend(
    plan: Plan, config: Config, trainer: Any, forward: Forward, context_tokens: int
) -> list[Recommendation]:
    """One recommendation for each setting that a dry run can judge."""
    checkpointing = _checkpointing(plan, config, trainer, forward)
    use_checkpointing = trainer.args.gradient_checkpointing
    if checkpointing.flags:
        use_checkpointing = not use_checkpointing
    return [
        _group_size(plan, config),
        _budget(plan, context_tokens),
        _learning_rate(config, trainer.model),
        _micro_batch(plan, config, trainer, forward, bool(use_checkpointing)),
        checkpointing,
    ]


def warn(plan: Plan, config: Config) -> list[str]:
    """What would make the run fail, or teach nothing, each with a remedy."""
    return [*_memory_warnings(plan), *_signal_warnings(plan), *_disk_warnings(plan, config)]


def _group_size(plan: Plan, config: Config) -> Recommendation:
    size, rates = plan.num_generations, plan.probe.rates
    shares = {other: rates.predicted_mixed(other).value for other in {*GROUP_SIZES, size}}
    now, most = shares[size], max(GROUP_SIZES)

    def keep(reason: str) -> Recommendation:
        return Recommendation("num_generations", str(size), "", reason)

    if plan.probe.truncated_fraction > 0.5:
        return keep("not to be judged while most replies are cut off")
    if now >= ENOUGH_MIXED:
        return keep(f"{now:.0%} of the groups will be mixed")
    if shares[most] < ENOUGH_MIXED / 2:
        return keep(
            f"{now:.0%} of the groups will be mixed, and {shares[most]:.0%} even of {most}: "
            "other problems help, more replies do not"
        )
    larger = [other for other in GROUP_SIZES if other > size]
    better = next((other for other in larger if shares[other] >= ENOUGH_MIXED), most)
    if better <= size:
        return keep(f"{now:.0%} of the groups will be mixed, and larger ones gain little")
    training = config.training
    flags = f"--num_generations {better}"
    if int(training.generation_batch_size or 0) % better:
        factor = -(-better // size)
        flags += f" --gradient_accumulation_steps {training.gradient_accumulation_steps * factor}"
    reason = f"{shares[better]:.0%} of the groups will be mixed, not {now:.0%}"
    return Recommendation("num_generations", str(size), flags, reason)


def _budget(plan: Plan, context_tokens: int) -> Recommendation:
    budget, probe = plan.budget_tokens, plan.probe
    long = probe.length(0.99)
    flags, reason = "", f"99 % of the replies have at most {long} tokens"
    wanted = max(16, math.ceil(SPARE_LENGTH * long / 16) * 16)
    if probe.truncated_fraction > TRUNCATED_AT_MOST:
        room = context_tokens - plan.longest_prompt_tokens
        reason = f"{probe.truncated_fraction:.0%} of the replies are cut off"
        if min(2 * budget, room) > budget:
            flags = f"--max_completion_length {min(2 * budget, room)}"
        else:
            reason += ", and the model's context has no more room"
    elif wanted <= 0.75 * budget:
        flags = f"--max_completion_length {wanted}"
        reason += ": 1.5 times as many are enough, and take less memory"
    return Recommendation("max_completion_length", str(budget), flags, reason)


def _learning_rate(config: Config, model: Any) -> Recommendation:
    rate = config.training.learning_rate
    facts = Facts(
        learning_rate=rate,
        uses_lora=isinstance(model, PeftModel),
        parameters=sum(weight.numel() for weight in model.parameters()),
    )
    band, highest = rate_band(facts)
    reason = f"{band.kind} has been seen to learn from {band.lowest:g} to {highest:g}"
    flags = f"--learning_rate {band.start:g}" if rate_out_of_band(facts) else ""
    return Recommendation("learning_rate", f"{rate:g}", flags, reason)


def _checkpointing(plan: Plan, config: Config, trainer: Any, forward: Forward) -> Recommendation:
    rows = trainer.args.per_device_train_batch_size
    is_on = bool(trainer.args.gradient_checkpointing)
    with_, without = (
        with_micro_batch(plan.memory, trainer, forward, rows, one).training_bytes
        for one in (True, False)
    )
    there = plan.memory.available_bytes
    flags, now = "", "on" if is_on else "off"
    sizes = f"training takes {gib(without)} without it, {gib(with_)} with it"
    if config.chooses_checkpointing:
        now, reason = "auto", f"{sizes}, {gib(there)} are available: {now}"
    elif is_on and without <= ROOMY_FRACTION * there:
        flags, reason = "--gradient_checkpointing false", f"{sizes}: without it a step is faster"
    elif is_on:
        reason = f"{sizes}; {gib(there)} are available"
    elif without > SAFE_FRACTION * there and with_ < without:
        flags, reason = "--gradient_checkpointing true", f"{sizes}; {gib(there)} are available"
    else:
        reason = f"training takes {gib(without)}; {gib(there)} are available"
    return Recommendation("gradient_checkpointing", now, flags, reason)


def _micro_batch(
    plan: Plan, config: Config, trainer: Any, forward: Forward, checkpointing: bool
) -> Recommendation:
    args, there = trainer.args, plan.memory.available_bytes
    rows, size = args.per_device_train_batch_size, trainer.num_generations
    in_all = rows * args.gradient_accumulation_steps

    def memory(number: int) -> Memory:
        return with_micro_batch(plan.memory, trainer, forward, number, checkpointing)

    def flags(number: int) -> str:
        return f"--{_MICRO} {number} --gradient_accumulation_steps {in_all // number}"

    divisors = [number for number in range(1, in_all + 1) if in_all % number == 0]
    safe = [n for n in divisors if memory(n).training_bytes <= SAFE_FRACTION * there]
    roomy = [
        n for n in safe
        if n % size == 0 and memory(n).training_bytes <= ROOMY_FRACTION * there
    ]  # fmt: skip
    if rows not in safe:
        reason = f"{rows} replies at once need {gib(memory(rows).training_bytes)}"
        if safe:
            reason += f", {safe[-1]} need {gib(memory(safe[-1]).training_bytes)}"
            return Recommendation(_MICRO, str(rows), flags(safe[-1]), reason)
        return Recommendation(_MICRO, str(rows), "", f"{reason}, and one is too much already")
    # A CPU gains nothing from more rows at once; a GPU is idle without them.
    if roomy and roomy[-1] > rows and plan.memory.device != "cpu":
        reason = f"{roomy[-1]} fit as well ({gib(memory(roomy[-1]).training_bytes)}): fewer passes"
        return Recommendation(_MICRO, str(rows), flags(roomy[-1]), reason)
    return Recommendation(_MICRO, str(rows), "", "fits, and more at once would gain little")


_MICRO = "per_device_train_batch_size"


def _memory_warnings(plan: Plan) -> Iterator[str]:
    memory = plan.memory
    phase = "rollout" if memory.rollout_bytes > memory.training_bytes else "training"
    if plan.burst is None:
        how = "ran out in the trial" if memory.fits else "is predicted to run out"
        yield (
            f"Memory {how}: the {phase} needs about {gib(memory.peak_bytes)}, and "
            f"{gib(memory.available_bytes)} are available. See the flags below"
            + (
                ", lower --max_completion_length, or write fewer replies at once "
                "(--gradient_accumulation_steps, --eval_batch_size)."
                if phase == "rollout"
                else "."
            )
        )
    elif not memory.fits:
        yield (
            f"Memory is tight: {gib(memory.peak_bytes)} predicted for the {phase}, "
            f"{gib(memory.available_bytes)} available, though the trial steps went well."
        )


def _signal_warnings(plan: Plan) -> Iterator[str]:
    probe = plan.probe
    replies, figures = len(probe.lengths), probe.figures
    if probe.truncated_fraction == 1:
        yield (
            f"All {replies} replies were cut off at {plan.budget_tokens} tokens: none ended by "
            "itself. Raise --max_completion_length, or use a model trained on its chat template."
        )
    if figures["strict"].value == 0:
        yield (
            f"The format was never seen in {replies} replies, so a reward for it alone stays at 0. "
            "Show it (--num_shots 1), or take an instruct model."
        )
    if probe.rates.mean == 0:
        loose = figures["any_format"].value
        yield f"None of {replies} replies was right" + (
            f", but {loose:.0%} hold the right number in another form: the format comes first."
            if loose
            else ": the problems are too hard for this model. Take easier ones, or a larger model."
        )
    elif probe.rates.mean >= 0.98:
        yield (
            f"{probe.rates.mean:.0%} of the replies are right already: there is little to learn. "
            "Take harder problems."
        )
    if probe.varied.value == 0:
        yield (
            "In every group all replies earn the same reward, so the gradient is 0. "
            "Raise --temperature or --num_generations, or change --reward_funcs."
        )


def _disk_warnings(plan: Plan, config: Config) -> Iterator[str]:
    kept = (config.training.save_total_limit or 1) + 1
    wanted = kept * plan.checkpoint_bytes
    place = Path.cwd()
    if "output_dir" in config.settings and config.training.output_dir:
        place = Path(config.training.output_dir)
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    if wanted > free:
        yield (
            f"{kept} checkpoints take {gib(wanted)}, and {place} has {gib(free)} free. "
            "Choose another --output_dir, or lower --save_total_limit."
        )
