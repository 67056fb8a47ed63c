"""What ``abacist doctor RUN`` says of a run: what is there, how far it came, what went wrong.

The training is judged by the rules that watch it live (``learning.health``), so a
run that nobody looked at, or that broke off, is explained afterwards. It only reads, and a file
that cannot be read is a finding, not a failure.
"""

from __future__ import annotations

import shlex
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from abacist.cli.doctor.machine import Finding, State
from abacist.errors import AbacistError, RunError, first_line
from abacist.learning.health.history import Facts
from abacist.learning.health.rules import Diagnosis, Watch
from abacist.learning.resume.checkpoints import checkpoints_of, defect, step_of
from abacist.proof.evaluation import Evaluation
from abacist.records.rollout import StopReason, read_rollouts, rollout_files
from abacist.records.rundir import RunDir, read_json_lines
from abacist.task.reply import parse_reply

# Logged by the trainer at most steps, in this order of interest; the rest stays in the file.
_TELLING = ("step", "reward", "eval_accuracy", "loss", "grad_norm", "completions/clipped_ratio")
# Worth knowing, and nothing that keeps a run from learning.
_MILD = frozenset({"dead reward", "format only", "learning rate"})


def summarise(path: Path) -> Iterator[Finding]:
    """Every finding. Raises RunError if ``path`` is no run at all."""
    run = RunDir.open(path)
    yield _manifest(run)
    settings, finding = _config(run)
    yield finding
    rows, finding = _metrics(run)
    yield finding
    yield from _health(rows, Facts.of(settings, processes=run.read_manifest().get("processes")))
    yield _rollouts(run)
    yield from _replies(run)
    yield from _checkpoints(run)
    yield _model(run, rows, settings)
    yield from _evaluations(run, settings)


def _manifest(run: RunDir) -> Finding:
    manifest = run.read_manifest()
    versions = manifest.get("versions")
    versions = versions if isinstance(versions, dict) else {}
    parts = [
        f"{name} {versions[name]}" for name in ("abacist", "trl", "torch") if versions.get(name)
    ]
    parts.append(f"seed {manifest.get('seed')}")
    data = manifest.get("data")
    if isinstance(data, dict) and data.get("problems") is not None:
        parts.append(f"{data['problems']} problems of {data.get('source') or 'its data set'}")
    return Finding("made by", State.OK, ", ".join(parts))


def _config(run: RunDir) -> tuple[Mapping[str, Any], Finding]:
    try:
        config = run.read_settings()
    except RunError as error:
        return {}, Finding("config", State.MEND, first_line(error))
    model = config.get("model_name_or_path", "?")
    data = config.get("dataset_name", "?")
    return config, Finding("config", State.OK, f"{model} on {data}, {len(config)} settings")


def _metrics(run: RunDir) -> tuple[list[dict[str, Any]], Finding]:
    try:
        rows, damaged = read_json_lines(run.metrics_path)
    except OSError as error:
        return [], Finding("metrics", State.NOTE, f"no metrics: {first_line(error)}")
    last: dict[str, Any] = {}
    for row in rows:
        last.update(row)
    told = [f"{name} {_short(last[name])}" for name in _TELLING if name in last]
    found = f"{len(rows)} lines; last: {', '.join(told) or 'nothing known'}"
    if damaged:
        return rows, Finding("metrics", State.MEND, f"{found}; damaged lines: {damaged}")
    return rows, Finding("metrics", State.OK if rows else State.NOTE, found)


def _health(rows: list[dict[str, Any]], facts: Facts) -> Iterator[Finding]:
    watch = Watch(facts)
    for row in rows:
        try:
            watch.see(row)
        except (TypeError, ValueError, ArithmeticError):  # a stranger's line
            continue
    last = watch.history.step
    for diagnosis in watch.found.values():
        yield Finding(
            diagnosis.name,
            State.NOTE if diagnosis.name in _MILD or diagnosis.last_step < last else State.MEND,
            f"{_when(diagnosis, last)}: {diagnosis.evidence}",
            diagnosis.remedy,
        )
    if last and not watch.found:
        yield Finding("training", State.OK, f"no known fault, at step {last}")


def _when(diagnosis: Diagnosis, last: int) -> str:
    if diagnosis.first_step == last:
        return f"at the last step, {last}"
    end = "the end" if diagnosis.last_step == last else f"step {diagnosis.last_step}, then no more"
    return f"from step {diagnosis.first_step} to {end}; at first"


def _rollouts(run: RunDir) -> Finding:
    import pyarrow as pa
    import pyarrow.parquet as pq

    count, damaged = 0, []
    files = rollout_files(run.rollouts_dir)
    for file in files:
        try:
            count += pq.read_metadata(file).num_rows
        except (pa.ArrowException, OSError):
            damaged.append(file.name)
    found = f"{count:,} replies in {len(files)} files"
    if damaged:
        return Finding("rollouts", State.MEND, f"{found}; damaged: {', '.join(damaged[:5])}")
    return Finding("rollouts", State.OK if files else State.NOTE, found)


def _replies(run: RunDir) -> Iterator[Finding]:
    """How the last replies ended, and what is wrong with most of them."""
    files = rollout_files(run.rollouts_dir)
    try:
        rollouts = read_rollouts(files[-1]) if files else []
    except RunError:  # said above, with its name
        return
    if not rollouts:
        return
    endings = Counter(rollout.stop_reason for rollout in rollouts)
    parts = [f"{count} {_ENDINGS[reason]}" for reason, count in endings.most_common()]
    known = [rollout.is_correct for rollout in rollouts if rollout.is_correct is not None]
    if known:
        parts.append(f"{sum(known)} correct")
    found = f"of the {len(rollouts)} of step {rollouts[0].step}: {', '.join(parts)}"
    replies = (parse_reply(rollout.completion) for rollout in rollouts)
    defects = Counter(flaw.sentence for reply in replies for flaw in reply.defects)
    for sentence, count in defects.most_common(1):
        found += f"; what is wrong with most ({count}): {sentence}"
    yield Finding("replies", State.OK, found)


_ENDINGS = {
    StopReason.STOPPED: "complete",
    StopReason.LENGTH: "cut off",
    StopReason.EMPTY: "empty",
}


def _checkpoints(run: RunDir) -> Iterator[Finding]:
    folders = checkpoints_of(run.path)
    if not folders:
        yield Finding("checkpoints", State.NOTE, "none")
        return
    damaged = {folder: why for folder in folders if (why := defect(folder))}
    sound = ", ".join(str(step_of(folder)) for folder in folders if folder not in damaged)
    if sound:
        yield Finding("checkpoints", State.OK, f"at steps {sound}")
    for folder, why in damaged.items():
        way_on = "Resuming takes the newest sound one." if sound else "There is no sound one left."
        yield Finding("checkpoints", State.MEND, f"{folder.name} is damaged: {why}", way_on)


def _model(run: RunDir, rows: list[dict[str, Any]], settings: Mapping[str, Any]) -> Finding:
    adapter = run.path / "adapter_model.safetensors"
    if files := [adapter] if adapter.is_file() else sorted(run.path.glob("model*.safetensors")):
        if damaged := next((path for path in files if not _is_whole(path)), None):
            how = "Copy it anew from the newest sound checkpoint."
            return Finding("model", State.MEND, f"{damaged.name} is damaged or cut short", how)
        return Finding("model", State.OK, f"a trained {'adapter' if adapter in files else 'model'}")
    steps = [row["step"] for row in rows if isinstance(row.get("step"), int)]
    wanted = settings.get("max_steps")
    of = f" of {wanted}" if isinstance(wanted, int) and wanted > 0 else ""
    again = f"abacist train --resume {shlex.quote(str(run.path))}"
    how = f"Go on with it: {again}. A checkpoint can be asked already."
    return Finding(
        "model", State.NOTE, f"none yet: the training is at step {max(steps, default=0)}{of}", how
    )


def _is_whole(path: Path) -> bool:
    """Whether a safetensors file has a header that its size agrees with; weights are not read."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="np"):
            return True
    except (SafetensorError, OSError):
        return False


def _evaluations(run: RunDir, settings: Mapping[str, Any]) -> Iterator[Finding]:
    """What of the held-out problems was measured, and what of it cannot be read."""
    folders = sorted(path.parent for path in run.evals_dir.rglob("evaluation.json"))
    sound = []
    for folder in folders:
        try:
            Evaluation.load(folder)
        except AbacistError as error:
            yield Finding("evaluations", State.MEND, first_line(error), "Measure it again.")
        else:
            sound.append(folder.relative_to(run.evals_dir).as_posix())
    if sound:
        yield Finding("evaluations", State.OK, ", ".join(sound))
    is_over = run.read_manifest().get("finished") and settings.get("num_heldout_problems") != 0
    if is_over and not folders:
        how = f"abacist eval {shlex.quote(str(run.path))} measures the trained policy."
        yield Finding("evaluations", State.MEND, "none, though the run came to its end", how)


def _short(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)[:40]
