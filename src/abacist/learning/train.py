"""Assembles and runs a training. Read it from top to bottom.

:func:`train` loads the task, the policy and the rewards, makes the trainer, measures the held-out
problems, trains, saves, measures the same problems again and compares. Whatever can be refused is
refused before anything is measured, and before anything is written. The optimizer step itself is
``abacist.learning.trainer.GRPOTrainer`` and, under it, TRL's.
"""

from __future__ import annotations

import json
import sys
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import transformers
from datasets import Dataset
from peft import LoraConfig

from abacist.errors import EngineLost, UsageError
from abacist.learning import (
    fastpath,
    gradient_checkpointing,
    peers,
    process_supervision,
    processes,
    vllm_engine,
)
from abacist.learning.config import Config, refuse_paying_nothing
from abacist.learning.enough_memory import refuse_too_large
from abacist.learning.estimate.estimate import FirstStep, tell_estimate
from abacist.learning.health.guard import Guard, refuse_broken_weights
from abacist.learning.heldout import HeldoutEvaluation
from abacist.learning.openings import NotesTraining
from abacist.learning.resume import resuming
from abacist.learning.resume.resumable import keeps_checkpoints
from abacist.learning.resume.resuming import Run
from abacist.learning.resume.stopping import StopNow, StopRequests
from abacist.learning.resume.training_state import random_state, set_random_state
from abacist.learning.rewards import load_rewards, refuse_hackable
from abacist.learning.seen import seen_in
from abacist.learning.setup_checks import (
    LORA,
    refuse_shards,
    refuse_unmatched_targets,
    setting_up,
    try_out,
)
from abacist.learning.task import Task, check_fit, load_task, split_lines
from abacist.learning.trackers.run_identity import RunIdentity
from abacist.learning.trackers.shielded import Trackers
from abacist.learning.tracking import MetricsLog, Silent, Watcher, refuse_incomplete
from abacist.learning.trainer import GRPOTrainer
from abacist.policy import families, quantization
from abacist.policy.choices import choose_device, explain_matmul_precision, float32_matmul_precision
from abacist.policy.families import FastPart
from abacist.policy.kernels import build
from abacist.policy.loading import Policy, load_policy, quiet_libraries
from abacist.policy.source import find
from abacist.proof.comparison.compare import compare
from abacist.records.openings import KEEPS_OPENINGS
from abacist.records.provenance import build_manifest
from abacist.records.rundir import RunDir, write_aside
from abacist.task.prompts import save_shots


def train(config: Config, watcher: Watcher | None = None) -> Run:
    """Train by ``config`` and judge the result on held-out problems.

    Leaves a run directory with config, manifest, metrics, rollouts, evaluations and the trained
    adapter or model. Raises AbacistError for anything a person can mend; nothing that existed
    before is overwritten. ``config`` is left as it was.
    """
    watcher = watcher or Silent()
    refuse_incomplete(watcher)
    if not processes.is_main():
        watcher = Silent()
    config = config.copy()
    several = processes.count() > 1
    is_resumed = config.training.resume_from_checkpoint is not None
    stops = StopRequests(
        config.script.max_hours, processes.agreed if several else None, is_resumed=is_resumed
    )
    quiet_libraries()
    if is_resumed and resuming.is_finished(config):
        return resuming.finished(config, watcher)
    with ExitStack() as held:
        others = held.enter_context(peers.watched())
        # Refused or locked before anything is loaded. The place of a new run is left as it is
        # until all that the run needs is known to be there.
        run = held.enter_context(_open(config, watcher))
        if others is not None:
            others.hint = f"Nothing saved is lost: {processes.command_to_resume(run.path)}"
        held.enter_context(float32_matmul_precision(config.model.float32_matmul_precision))
        # Before the rewards are loaded: those of a control change the settings.
        differences = resuming.differing(config, run) if is_resumed else {}
        task, rewards, policy = load_parts(config, watcher)
        trackers = held.enter_context(trackers_of(config, run, watcher))
        held.enter_context(stops)
        try:
            return _train_in(
                run, config, task, policy, rewards, differences, stops, trackers, watcher
            )
        except StopNow as stop:
            if stop.signal_number is not None:
                raise resuming.interrupted(stop, stops.where, run) from None
            stopped = f"{stop.reason} {resuming.where_stopped(stop, stops.where)}"
            return Run(run.path, None, None, None, None, None, stopped)
        except EngineLost as lost:
            if keeps_checkpoints(config.training):
                lost.hint += f"\n  Go on with:  {processes.command_to_resume(run.path)}"
            raise


def _open(config: Config, watcher: Watcher) -> RunDir:
    """The run, new or resumed. The main process locks it and tells the others where it is."""
    held: list[RunDir] = []

    def opened() -> Path:
        if config.training.resume_from_checkpoint is not None:
            held.append(resuming.open_run(config, watcher))
        else:
            held.append(RunDir.reserve(**place(config)))
        return held[0].path

    path = processes.from_main(opened)
    return held[0] if held else RunDir(path)


def load_parts(config: Config, watcher: Watcher) -> tuple[Task, list[Any], Policy]:
    """What a run is made of, checked, before anything is written: task, rewards and policy."""
    _refuse_no_model(config)
    if (held := config.model.quantization) is not None:
        device, _ = choose_device(config.device)
        quantization.refuse_missing(held.on(device), f"--load_in_{held.bits}bit")
    named = f"recipe {config.recipe}" if config.recipe else "no recipe"
    watcher.stage(f"Loading ({named})")
    for line in config.lines():
        watcher.note(f"  {line}")
    task = load_task(config)
    for line in split_lines(config, task):
        watcher.note(f"  {line}")
    rewards = load_rewards(config, watcher)
    refuse_hackable(config, task.train, rewards, watcher)
    if process_supervision.weight_of(config.training):
        watcher.note(f"  {_paid_steps(config, task)}")
    if config.training.trust_remote_code:
        watcher.note("  warning: --trust_remote_code lets the model's own code run on this machine")
    server = vllm_engine.look_for(config, watcher)
    refuse_too_large(config)
    policy = load_trainable(config)
    refuse_broken_weights(policy.model, config.model.model_name_or_path)
    precision = explain_matmul_precision(config.model.float32_matmul_precision, policy.model)
    for choice in [*policy.choices, *([precision] if precision else [])]:
        watcher.note(f"  {choice.what}: {choice.value} ({choice.why})")
    check_fit(config, task, policy, server)
    return task, rewards, policy


def _refuse_no_model(config: Config) -> None:
    """Raise UsageError where a recipe leaves the model open and nobody names one: the default, the
    built-in model, is not what such a recipe is for."""
    if "" in config.sources.values() and "model_name_or_path" not in config.settings:
        raise UsageError(
            f"the recipe {config.recipe or 'that the file extends'} is for any model, and none is "
            "named",
            "Give --model_name_or_path MODEL, or model_name_or_path in the file of --config.",
        )


def _paid_steps(config: Config, task: Task) -> str:
    """What says which steps are right, as a line. Raises DataError where nothing does, unless only
    the recipe asked for it, which is written for GSM8K: steps are not paid then."""
    showing, tried = process_supervision.showing_steps(task.train)
    if config.is_brought_along("step_reward_weight") and 2 * showing < tried:
        why = f"{showing} of {tried} worked solutions show equations"
        config.leave_out("step_reward_weight", why)
        refuse_paying_nothing(config)
        return config.notes[-1]
    process_supervision.refuse_without_equations(showing, tried)
    return f"steps are paid by the worked solutions: {showing} of {tried} show equations"


def place(config: Config) -> dict[str, Any]:
    """Where a run that begins is kept, as ``RunDir.reserve`` and ``RunDir.check`` take it."""
    output_dir = config.training.output_dir
    return {
        "output_dir": Path(output_dir) if "output_dir" in config.settings and output_dir else None,
        "name": config.name,
        "overwrite": config.script.overwrite,
    }


def _train_in(
    run: RunDir,
    config: Config,
    task: Task,
    policy: Policy,
    rewards: list[Any],
    differences: dict[str, tuple[Any, Any]],
    stops: StopRequests,
    trackers: Trackers,
    watcher: Watcher,
) -> Run:
    is_resumed = config.training.resume_from_checkpoint is not None
    config.training.output_dir = str(run.path)
    data = data_to_keep(config, run)
    made_of = (
        build_manifest(
            seed=config.training.seed,
            argv=sys.argv,
            problems=[*task.train, *task.selection, *task.heldout],
            source=config.script.dataset_name,
        )
        | {"trust_remote_code": config.training.trust_remote_code}
        | {"control": config.script.control}
        | {"dtype": str(policy.model.dtype).removeprefix("torch.")}
        | {"recipe": config.recipe, "task": task.to_json(), KEEPS_OPENINGS: True}
        | {"processes": processes.count()}
        | resuming.fingerprints(policy.model, rewards)
    )
    made_of["versions"]["CPU kernels"] = build.description()
    processes.refuse_differing(
        {
            "settings": config.settings,
            **{part: made_of[part] for part in ("data", "model", "versions")},
            "rewards": {f"reward {at}": one for at, one in enumerate(made_of["rewards"], start=1)},
        }
    )
    if is_resumed:
        made_of = resuming.checked_resumption(config, run, made_of, differences, watcher)
    heldout = HeldoutEvaluation(config, task, run, watcher)
    trainer = make_trainer(policy, rewards, heldout)
    looks = config.training.eval_strategy != "no"
    refuse_shards(trainer, len(task.heldout) + looks * len(task.selection))
    if processes.is_main():
        if is_resumed:
            resuming.note_resumption(run, made_of, watcher)
        else:
            run.clear()
            run.write_manifest(made_of)
            if data is not None:
                write_aside(run.data_path, data)
        write_aside(run.config_path, config.to_yaml().encode())
        seen_in(task, policy.folder).write(run.path)
        if task.shots:
            save_shots(run.shots_path, task.shots)
    processes.wait_for_all()
    watcher.note(f"  this run is kept in {run.path}")

    known = resuming.measured_before(config, run, task) if is_resumed else None
    if any(processes.agreed(known is None)):
        known = None
    if checkpointing := gradient_checkpointing.decide(config, task, policy, trainer):
        watcher.note(f"  {checkpointing}")
    paths = trainer.fast_path_report()
    cost = tell_estimate(
        config, task, policy, trainer, watcher, **resuming.what_is_left(config, run, known)
    )
    share = cost.share_of_measuring() if cost else ""
    # The trainer has seeded the generators, and training begins where it left them.
    seeded = random_state()
    before, sampled_before = known or heldout.measure(policy, "before", share, step=0)
    set_random_state(seeded)
    watcher.stage(f"Training: {len(task.train)} problems, groups of {trainer.num_generations}")
    for line in paths:
        watcher.note(f"  {line}")
    trainer.watch_step = watcher.within_step
    trainer.watch_replies = watcher.replies if watcher.wants_replies else None
    if cost:
        trainer.add_callback(FirstStep(cost, watcher, heldout.measured_seconds))
    guard = Guard.of(config, policy.model, watcher)
    trackers.attach(trainer)
    guard.attach(trainer)
    if processes.is_main():
        trainer.add_callback(NotesTraining(run.path, len(task.train)))
    trainer.stops, trainer.say = stops, lambda text: watcher.note(f"  {text}")
    trainer.train(resuming.checkpoint_to_resume(config, run, watcher) if is_resumed else None)
    guard.check()
    with stops.deferred():
        trainer.save_model()
        trainer.save_state()
    stops.end_of_training()
    steps, after, sampled_after = trainer.state.global_step, None, None
    if task.heldout:
        with trainer.whole_model() as model:
            trained = replace(policy, model=model)
            after, sampled_after = heldout.measure(trained, "after", share, step=steps)
    comparison = None
    if before and after:
        comparison = compare(before, after, control=config.script.control)
    if processes.is_main():
        if comparison:
            write_aside(
                run.evals_dir / "verdict.json",
                json.dumps(comparison.to_json(), indent=2, sort_keys=True).encode(),
            )
            trackers.verdict(comparison)
        run.write_manifest(run.read_manifest() | {"finished": True})
    return Run(run.path, before, after, sampled_before, sampled_after, comparison)


def data_to_keep(config: Config, run: RunDir) -> bytes | None:
    """The text of ``data.jsonl``, which ``config`` then names; None where the data lies elsewhere.

    That is data given in Python, and, where a run is overwritten by its own config, what it kept.
    """
    if config.data is None:
        is_its_own = Path(config.script.dataset_name) == run.data_path.absolute()
        return run.data_path.read_bytes() if is_its_own and run.data_path.is_file() else None
    config.script.dataset_name = str(run.data_path.absolute())
    config.settings["dataset_name"] = config.script.dataset_name
    return "".join(f"{line}\n" for line in config.data).encode()


def trackers_of(config: Config, run: RunDir, watcher: Watcher) -> Trackers:
    """The trackers that ``config`` asks for, to be attached to the trainer of ``run``."""
    identity = RunIdentity(
        run,
        project=config.settings.get("project"),
        name=config.training.run_name,
        is_resumed=config.training.resume_from_checkpoint is not None,
    )
    wanted = list(config.training.report_to or []) if processes.is_main() else []
    keeps = config.training.log_completions
    return Trackers(wanted, identity, watcher.note, log_completions=keeps)


def load_trainable(config: Config) -> Policy:
    """The policy, in a new LoRA adapter unless it is one itself or all weights are to learn.

    Raises ModelError for a model that cannot be had, UsageError for a LoRA that does not fit it.
    """
    model, training = config.model, config.training
    lora = None
    name, trust = model.model_name_or_path, training.trust_remote_code
    found = find(name, revision=model.model_revision, trust_remote_code=trust)
    targets = model.lora_target_modules or ["all-linear"]
    if model.use_peft and not found.is_adapter:
        lora = LoraConfig(
            task_type="CAUSAL_LM",
            r=model.lora_r,
            lora_alpha=model.lora_alpha,
            lora_dropout=model.lora_dropout,
            target_modules="all-linear" if targets == ["all-linear"] else targets,
            use_rslora=model.use_rslora,
            use_dora=model.use_dora,
        )
    with setting_up(config, *LORA), processes.loading_in_all():
        policy = load_policy(
            model.model_name_or_path,
            dtype=resuming.dtype_begun_in(config),
            device=config.device,
            attn_implementation=model.attn_implementation,
            revision=model.model_revision,
            trust_remote_code=trust,
            quantization=model.quantization,
            lora=lora,
            trainable=True,
            seed=training.seed,
        )
    if lora is not None:
        refuse_unmatched_targets(policy.model, targets)
    return policy


def make_trainer(policy: Policy, rewards: list[Any], heldout: HeldoutEvaluation) -> GRPOTrainer:
    """Our trainer around the policy, its LoRA, the rewards and everything that listens.

    Raises UsageError for whatever TRL, transformers or torch would refuse, now or at the first
    step, with the flag and their own words.
    """
    config, task, run, watcher = heldout.config, heldout.task, heldout.run, heldout.watcher
    training = config.training
    given = training.chat_template_kwargs
    template: dict[str, Any] = given if isinstance(given, dict) else {}
    training.chat_template_kwargs = policy.chat.chat_template_kwargs | template
    if training.use_vllm:
        vllm_engine.settle(training, policy.chat.stop_ids)
    # Attached, or not, by whoever trains: TRL would write before the run is begun.
    training.report_to, training.log_completions = [], False
    training.run_name = training.run_name or run.run_id
    is_known = families.unsupported_reason(policy.model, FastPart.SCORING) is None
    if is_known and training.ddp_find_unused_parameters is None:
        # A forward of these families uses every weight: DDP need not look for one that is not used.
        training.ddp_find_unused_parameters = False
    if not task.selection:  # a recipe may ask for measurements that a flag left nothing for
        training.eval_strategy = transformers.IntervalStrategy.NO
    selection = Dataset.from_list(task.rows(task.selection)) if task.selection else None
    # TRL rounds an adapter on a quantised base to bfloat16, where GRPO's small steps are lost.
    is_quantized = getattr(policy.model, "is_quantized", False)
    adapter = [(w, w.data) for w in policy.model.parameters() if w.requires_grad and is_quantized]
    with setting_up(config):
        trainer = GRPOTrainer(
            model=policy.model,
            reward_funcs=rewards,
            args=training,
            train_dataset=Dataset.from_list(
                task.rows(task.train, solutions=process_supervision.weight_of(training) > 0)
            ),
            eval_dataset=selection,
            processing_class=policy.chat.tokenizer,
            evaluator=lambda model: heldout.selection(
                replace(policy, model=model), trainer.state.global_step
            ),
            callbacks=[MetricsLog(run.metrics_path, run.timings_path, watcher)],
        )
    for weight, in_float32 in adapter:
        weight.data = in_float32
    if config.model.dtype == "auto" and (line := fastpath.hold_in_float32(trainer)) is not None:
        watcher.note(f"  {line}")
    try_out(trainer, config)
    # The watcher shows progress, and metrics.jsonl keeps it; transformers would print it again.
    trainer.remove_callback(transformers.PrinterCallback)
    return trainer
