"""Resuming a run of ``abacist train``: which run, whether it may be resumed, and from where.

A resumed run promises to end as if it had never been stopped. That holds only if it is the
same run: what it is made of (settings, data, rewards, weights at the start) is compared with
what the run directory recorded, and any difference is refused unless it is forced.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from abacist.errors import AbacistError, Interrupted, RunError, UsageError
from abacist.learning import processes
from abacist.learning.config import Config, load_config
from abacist.learning.resume import checkpoints
from abacist.learning.resume.reward_code import reward_sum
from abacist.learning.resume.stopping import StopNow
from abacist.learning.resume.training_state import KEPT_LINES, cut_after
from abacist.learning.task import Task
from abacist.learning.tracking import Watcher
from abacist.policy.choices import choose_device
from abacist.proof.comparison.compare import NO_CONTROL, Comparison, change_words, compare
from abacist.proof.evaluate import Evaluation
from abacist.records.provenance import scrub_argv
from abacist.records.rundir import RunDir
from abacist.task.problems import Problem


@dataclass
class Run:
    """A training: its directory, and how it was judged.

    ``before`` and ``after`` are the evaluations of the held-out problems, greedy;
    ``sampled_before`` and ``sampled_after`` those of several sampled replies to some of them;
    ``comparison`` is the verdict. They are None without held-out problems, or where the training
    has not come so far.
    """

    path: Path
    before: Evaluation | None
    after: Evaluation | None
    sampled_before: Evaluation | None
    sampled_after: Evaluation | None
    comparison: Comparison | None
    stopped: str | None = None
    """Why and where training stopped before its end; None if it did not."""

    def __repr__(self) -> str:
        """One line; the results are in the fields."""
        if self.stopped:
            return f"<Run: {self.path}, stopped by {self.stopped}>"
        judged = "no verdict" if self.comparison is None else change_words(self.comparison)
        return f"<Run: {self.path}, {judged}>"


# Settings that change what is kept, shown or told, never what is learned or measured.
NO_DIFFERENCE = {
    "resume_from_checkpoint", "output_dir", "overwrite", "force", "max_hours", "report_to",
    "run_name", "project", "trackio_space_id", "disable_tqdm", "log_level", "logging_steps",
    "logging_first_step", "log_completions", "num_completions_to_print", "save_steps",
    "save_total_limit", "save_strategy", "keep_rollouts", "vllm_canary_steps", "nan_policy",
    "max_silent_steps", "reward_timeout_seconds",
    "gradient_checkpointing",  # to the bit on a CPU; where memory is short it may be needed
}  # fmt: skip
_OPTIMIZERS_OWN = " (even with --force the optimizer keeps its own, from the checkpoint)"
_CONSEQUENCES = {
    "max_steps": " (the learning rate's schedule depends on it)",
    "num_train_epochs": " (the learning rate's schedule depends on it)",
    "weight_decay": _OPTIMIZERS_OWN,
    "adam_beta1": _OPTIMIZERS_OWN,
    "adam_beta2": _OPTIMIZERS_OWN,
    "adam_epsilon": _OPTIMIZERS_OWN,
}
# Schedules whose past does not depend on how long a run is going to be.
_LENGTHLESS = {"constant", "constant_with_warmup", "inverse_sqrt", "reduce_lr_on_plateau", "greedy"}
# How many values of every weight tensor are looked at to tell one model from another.
SAMPLED_VALUES = 64


def load_run(path: str | os.PathLike[str] | Run) -> Run:
    """A training that ``abacist train`` or :func:`abacist.train` made, read from its directory.

    What it has not measured yet is None. A :class:`Run` is read again. Raises RunError if there is
    no run, or it is damaged; UsageError for what names no directory.

    Example::

        run = abacist.load_run("runs/tiny-001")
        run.plot()
    """
    path = path.path if isinstance(path, Run) else path
    if not isinstance(path, str | os.PathLike):
        raise UsageError(
            f"load_run() was given a {type(path).__name__}", "Give the directory of a run."
        )
    run = RunDir.open(Path(path).expanduser())
    found = {
        kind: Evaluation.load(run.evals_dir / kind) if (run.evals_dir / kind).is_dir() else None
        for kind in ("before", "after", "before-sampled", "after-sampled")
    }
    before, after = found["before"], found["after"]
    control = str(run.read_settings().get("control", NO_CONTROL))
    comparison = compare(before, after, control=control) if before and after else None
    return Run(run.path, before, after, found["before-sampled"], found["after-sampled"], comparison)


def is_finished(config: Config) -> bool:
    """Whether ``config`` resumes a run that has reached its end, its verdict included."""
    run = RunDir.open(Path(str(config.training.output_dir)))
    return bool(run.read_manifest().get("finished")) and not differing(config, run)


def finished(config: Config, watcher: Watcher) -> Run:
    """What a finished run found, read again: nothing is done.

    Raises NoCheckpoint if one is to be resumed that the run does not have.
    """
    run = RunDir.open(Path(str(config.training.output_dir)))
    checkpoints.refuse_missing(run.path, config.training.resume_from_checkpoint)
    watcher.note(f"{run.path} is finished already: nothing to resume, and nothing was done")
    flag = "max_steps" if config.training.max_steps > 0 else "num_train_epochs"
    watcher.note(f"To train it longer, give more --{flag}.")
    return load_run(run.path)


def open_run(config: Config, watcher: Watcher) -> RunDir:
    """The run that ``config`` resumes, locked, without what a killed process left half written.

    Raises RunError if it is none, if another process is writing it, if it was begun with other
    settings (see :func:`differing`), or if it is finished and has no checkpoint to go on
    from. A run may be made longer: what that does to its past is said.
    """
    run = RunDir.open(Path(str(config.training.output_dir)))
    run.lock()
    try:
        run.clear_half_written()
        checkpoints.clear_leftovers(run.path)
        _refuse_other_count(run)
        found = differing(config, run)
        if is_longer(found):
            watcher.note(f"  longer than when it was started: {longer_sentence(config, found)}")
        else:
            refuse(_told(found), config, run, watcher)
        if run.read_manifest().get("finished"):
            _refuse_without_checkpoint(config, run)
    except BaseException:
        run.release()
        raise
    return run


def dtype_begun_in(config: Config) -> str:
    """``--dtype``; where it is auto and a run is resumed, the dtype that the run began in.

    What auto chooses on a CPU depends on the kernels, which may have come since.
    """
    asked, training = config.model.dtype, config.training
    if asked != "auto" or training.resume_from_checkpoint is None:
        return str(asked)
    device, _ = choose_device(config.device)
    manifest = RunDir(Path(str(training.output_dir))).read_manifest()
    # Older manifests do not name it. On a CPU it was always float32.
    return str(manifest.get("dtype", "float32" if device.type == "cpu" else "auto"))


def differing(config: Config, run: RunDir) -> dict[str, tuple[Any, Any]]:
    """Settings of ``config`` that the run was not begun with, as ``(then, now)`` by name."""
    if not run.config_path.exists():
        raise RunError(
            f"{run.path}: it has no config.yaml, so it was stopped before it began.",
            "Start it again: abacist train --overwrite, with the same --output_dir.",
        )
    begun = load_config(None, str(run.config_path), [])
    names = (begun.settings.keys() | config.settings.keys()) - NO_DIFFERENCE
    if min(each.training.max_steps for each in (begun, config)) > 0:
        names -= {"num_train_epochs"}  # steps decide
    if config.is_brought_along("step_reward_weight") and not begun.training.step_reward_weight:
        names -= {"step_reward_weight"}  # left out for the data's sake, and will be again
    both = {name: (_effective(begun, name), _effective(config, name)) for name in sorted(names)}
    return {name: (then, now) for name, (then, now) in both.items() if then != now}


def _told(found: Mapping[str, tuple[Any, Any]]) -> list[str]:
    """What :func:`differing` found, as ``name: then → now`` with what that means."""
    return [
        f"{name}: {then} → {now}{_CONSEQUENCES.get(name, '')}"
        for name, (then, now) in found.items()
    ]


def is_longer(found: Mapping[str, tuple[Any, Any]]) -> bool:
    """Whether nothing differs but that the run is to have more steps, or more epochs.

    >>> is_longer({"max_steps": (60, 90)}), is_longer({"max_steps": (90, 60)})
    (True, False)
    >>> is_longer({"max_steps": (-1, 90)}), is_longer({"max_steps": (60, 90), "seed": (0, 1)})
    (False, False)
    """
    if len(found) != 1:
        return False
    ((name, (then, now)),) = found.items()
    return name in ("max_steps", "num_train_epochs") and 0 < then < now


def longer_sentence(config: Config, found: Mapping[str, tuple[Any, Any]]) -> str:
    """What a longer run has to do with the one that would have been begun at that length."""
    ((name, (then, now)),) = found.items()
    training = config.training
    schedule = str(getattr(training.lr_scheduler_type, "value", training.lr_scheduler_type))
    if schedule in _LENGTHLESS and not 0 < training.warmup_steps < 1:
        return (
            f"{name} {then} → {now}. The learning rate ({schedule}) does not depend on it, so the "
            f"run ends as one started with {now} ends."
        )
    return (
        f"{name} {then} → {now}. Up to here the learning rate's schedule ({schedule}) was for "
        f"{then}, from here on it is the one for {now}: the result is not that of a run started "
        f"with {now}. That would take a constant schedule, or a new run."
    )


def _refuse_other_count(run: RunDir) -> None:
    """A run goes on in as many processes: each has a state of its own, and a share of the step."""
    then, now = int(run.read_manifest().get("processes", 1)), processes.count()
    if then != now:
        words = "1 process" if then == 1 else f"{then} processes"
        how = "on one process"
        if then > 1:
            how = f"with --accelerate_config and --num_processes {then}, as it was started"
        raise RunError(
            f"{run.path} was started on {words} and is resumed on {now}: a step would have other "
            "replies, and each process keeps a state of its own.",
            f"Resume it {how}, or begin a new run from its newest checkpoint N:\nabacist train "
            f"--model_name_or_path {run.path}/checkpoint-N",
        )


def _refuse_without_checkpoint(config: Config, run: RunDir) -> None:
    """A finished run that cannot go on is left as it is."""
    wanted = config.training.resume_from_checkpoint
    try:
        if not checkpoints.checkpoints_of(run.path):
            raise RunError("It kept no checkpoint.")
        checkpoints.choose(run.path, wanted, lambda text: None)
    except RunError as error:
        raise RunError(
            f"{run.path} is finished and cannot go on. {error.message}",
            f"Begin a new run with what it learned: abacist train --model_name_or_path {run.path}",
        ) from error


def ingredient_differences(made_of: Mapping[str, Any], begun: Mapping[str, Any]) -> list[str]:
    """What two manifests say of data, rewards and first weights, where it differs."""
    words = {
        "data": "problems changed, or columns that rewards read (compare their source)",
        "rewards": "reward code changed",
        "model": "initial weights changed",
    }
    return [
        f"{name}: {text}"
        for name, text in words.items()
        if name in begun and begun[name] != made_of.get(name)
    ]


def refuse(differences: Sequence[str], config: Config, run: RunDir, watcher: Watcher) -> None:
    """Raise RunError with the list of differences, or say it if ``--force`` was given."""
    if not differences:
        return
    if not config.script.force:
        raise RunError(
            f"{run.path} is not resumed, because these have changed since it was started:\n    "
            + "\n    ".join(differences),
            "Put back what has changed (leave flags out that were not given then; restore data and "
            "reward files), start a new run, or go on regardless with --force:\nthe result is then "
            "no longer that of one configuration.",
        )
    watcher.note("  forced, although these have changed since the run was started:")
    for line in differences:
        watcher.note(f"    {line}")


def fingerprints(model: Any, rewards: Sequence[Any]) -> dict[str, Any]:
    """What tells a changed model or reward apart, for the manifest of a run."""
    return {"model": {"sha256": _weights_sum(model)}, "rewards": list(map(reward_sum, rewards))}


def checked_resumption(
    config: Config,
    run: RunDir,
    made_of: Mapping[str, Any],
    others: Mapping[str, tuple[Any, Any]],
    watcher: Watcher,
) -> dict[str, Any]:
    """Check the ingredients and warn of other versions; the manifest of the run that goes on.

    ``others`` is what :func:`differing` found.
    """
    begun = run.read_manifest()
    found = ingredient_differences(made_of, begun)
    refuse(found, config, run, watcher)
    for package, version in (begun.get("versions") or {}).items():
        now = made_of["versions"].get(package)
        if now != version:
            watcher.note(f"  {package} was {version} and is {now}: the last bits may differ")
    longer = is_longer(others)
    entry = {
        "argv": scrub_argv(made_of["argv"]),
        "forced": [*([] if longer else _told(others)), *found],
    }
    if longer:
        entry["longer"] = _told(others)
    resumed = [*begun.get("resumed", []), entry]
    return begun | {"finished": False, "resumed": resumed}


def note_resumption(run: RunDir, manifest: Mapping[str, Any], watcher: Watcher) -> None:
    """Write what :func:`checked_resumption` gave: from here on the run is not finished.

    The verdict of a run that was is kept beside the one that it will get at its new end.
    """
    run.write_manifest(manifest)
    kept = _keep_verdict(run)
    if kept:
        watcher.note(f"  the verdict at its end so far is kept in {kept}")


def _keep_verdict(run: RunDir) -> Path | None:
    """Move what a run found at its end aside, named after the step; where the verdict is then."""
    verdict, present = run.evals_dir / "verdict.json", checkpoints.checkpoints_of(run.path)
    if not verdict.exists() or not present:
        return None
    step = checkpoints.step_of(present[-1])
    kept = run.evals_dir / f"verdict-step-{step}.json"
    moves = {
        "after": f"after-step-{step}",
        "after-sampled": f"after-step-{step}-sampled",
        verdict.name: kept.name,  # last: it says that there is something to move
    }
    for name, aside in moves.items():
        if (run.evals_dir / name).exists() and not (run.evals_dir / aside).exists():
            os.replace(run.evals_dir / name, run.evals_dir / aside)
    return kept


def checkpoint_to_resume(config: Config, run: RunDir, watcher: Watcher) -> str | None:
    """What to hand to ``Trainer.train``; None to begin anew, because no step was ever saved."""
    wanted = str(config.training.resume_from_checkpoint)
    if checkpoints.checkpoints_of(run.path):
        is_run = Path(wanted).is_dir() and checkpoints.step_of(Path(wanted)) < 0
        return "latest" if is_run else wanted
    if processes.is_main():
        cut_after(run.path, 0, dict.fromkeys(KEPT_LINES, 0))
    watcher.note("  no checkpoint was made yet, so training begins at its first step")
    return None


def measured_before(
    config: Config, run: RunDir, task: Task
) -> tuple[Evaluation, Evaluation | None] | None:
    """The measurements before training, if the run has all that it wants: of these problems, with
    these golds, prompts and budget, since those after it are to be compared with them.

    The second, of sampled replies, is None where none are wanted.
    """
    repeated = task.heldout[: config.script.num_consistency_problems]

    def load(name: str, problems: Sequence[Problem]) -> Evaluation | None:
        found = Evaluation.load(run.evals_dir / name)
        prompts = {row["problem_id"]: row["prompt"] for row in task.rows(problems)}
        is_same = (
            [(one.problem_id, one.answer) for one in found.problems]
            == [(one.problem_id, one.answer) for one in problems]
            and found.settings.max_completion_tokens == config.max_completion_tokens
            and all(reply.messages == prompts[reply.problem_id] for reply in found.rollouts)
        )
        return found if is_same else None

    try:
        greedy = load("before", task.heldout)
        sampled = load("before-sampled", repeated) if repeated else None
    except (AbacistError, OSError):
        return None
    return None if greedy is None or (repeated and sampled is None) else (greedy, sampled)


def what_is_left(
    config: Config, run: RunDir, measured: tuple[Evaluation, Evaluation | None] | None
) -> dict[str, Any]:
    """Where the run stands, for an estimate of the rest: steps done, measurements to be made, and
    how long its replies were, if that is known. ``measured`` as :func:`measured_before` found."""
    left: dict[str, Any] = {"measurements": 1 if measured else 2}
    wanted = config.training.resume_from_checkpoint
    if wanted is not None:
        steps = [checkpoints.step_of(path) for path in checkpoints.checkpoints_of(run.path)]
        named = checkpoints.step_of(Path(str(wanted)))
        left["steps_done"] = named if named >= 0 else max(steps, default=0)
    if measured:
        left["reply_tokens"] = measured[0].figures["completion_tokens"].value
    return left


def interrupted(stop: StopNow, where: str, run: RunDir) -> Interrupted:
    """The error for a run that a signal ended: where it stands, and how it goes on."""
    assert stop.signal_number is not None
    return Interrupted(
        f"stopped by {stop.reason} {where_stopped(stop, where)}",
        f"Go on with:  {processes.command_to_resume(run.path)}",
        stop.signal_number,
    )


def where_stopped(stop: StopNow, otherwise: str) -> str:
    """Where a run stands after a stop, as the end of a sentence; ``otherwise`` outside training."""
    if stop.max_steps == 0:
        return otherwise
    place = f"after step {stop.step} of {stop.max_steps}"
    if stop.checkpoint is None:
        return f"{place}; nothing was saved, since save_strategy is no"
    return f"{place}; its state is in {stop.checkpoint}"


def _effective(config: Config, name: str) -> Any:
    for part in (config.training, config.model, config.script):
        if hasattr(part, name):
            value = getattr(part, name)
            return getattr(value, "value", value)
    return None


def _weights_sum(model: Any) -> str:
    digest = hashlib.sha256()
    for name, weight in sorted(model.named_parameters()):
        digest.update(f"{name} {tuple(weight.shape)} {weight.dtype};".encode())
        flat = weight.detach().reshape(-1)
        places = _spread(len(flat), SAMPLED_VALUES)
        digest.update(flat[places.to(flat.device)].float().cpu().numpy().tobytes())
    return digest.hexdigest()


def _spread(length: int, count: int) -> torch.Tensor:
    """At most ``count`` indices spread over ``length`` elements, first and last included.

    In integers: float32 rounds indices above 2**24 past the end (issue 11).

    >>> _spread(101, 3).tolist(), _spread(2, 3).tolist(), _spread(0, 3).tolist()
    ([0, 50, 100], [0, 1], [])
    """
    if length <= count:
        return torch.arange(length)
    return torch.arange(count) * (length - 1) // (count - 1)
