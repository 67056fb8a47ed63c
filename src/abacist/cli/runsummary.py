"""What ``abacist doctor RUN`` says of a run: what is there, how far it came, what is damaged.

It only reads, and a file that cannot be read is a finding, not a failure.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from abacist.cli.machine import Finding, State
from abacist.records.rundir import RunDir

# Logged by the trainer at most steps, in this order of interest; the rest stays in the file.
_TELLING = ("step", "reward", "eval_accuracy", "loss", "grad_norm", "completions/clipped_ratio")


def summarise(path: Path) -> Iterator[Finding]:
    """Every finding. Raises RunError if ``path`` is no run at all."""
    run = RunDir.open(path)
    yield _manifest(run)
    yield _config(run)
    yield _metrics(run)
    yield _rollouts(run)
    yield _checkpoints(run)
    yield _model(run)


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


def _config(run: RunDir) -> Finding:
    import yaml

    try:
        config = yaml.safe_load(run.config_path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        return Finding("config", State.MEND, f"config.yaml cannot be read: {_first_line(error)}")
    if not isinstance(config, dict):
        return Finding("config", State.MEND, "config.yaml holds no settings")
    model = config.get("model_name_or_path", "?")
    data = config.get("dataset_name", "?")
    return Finding("config", State.OK, f"{model} on {data}, {len(config)} settings")


def _metrics(run: RunDir) -> Finding:
    try:
        lines = run.metrics_path.read_text(encoding="utf-8", errors="replace").split("\n")
    except OSError as error:
        return Finding("metrics", State.NOTE, f"no metrics: {_first_line(error)}")
    rows: list[dict[str, Any]] = []
    damaged = 0
    for line in filter(str.strip, lines):
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            row = None
        if isinstance(row, dict):
            rows.append(row)
        else:
            damaged += 1
    last: dict[str, Any] = {}
    for row in rows:
        last.update(row)
    told = [f"{name} {_short(last[name])}" for name in _TELLING if name in last]
    found = f"{len(rows)} lines; last: {', '.join(told) or 'nothing known'}"
    if damaged:
        return Finding("metrics", State.MEND, f"{found}; {damaged} damaged lines")
    return Finding("metrics", State.OK if rows else State.NOTE, found)


def _rollouts(run: RunDir) -> Finding:
    import pyarrow as pa
    import pyarrow.parquet as pq

    count, damaged = 0, []
    files = sorted(run.rollouts_dir.glob("*.parquet"))
    for file in files:
        try:
            count += pq.read_metadata(file).num_rows
        except (pa.ArrowException, OSError):
            damaged.append(file.name)
    found = f"{count:,} replies in {len(files)} files"
    if damaged:
        return Finding("rollouts", State.MEND, f"{found}; damaged: {', '.join(damaged[:5])}")
    return Finding("rollouts", State.OK if files else State.NOTE, found)


def _checkpoints(run: RunDir) -> Finding:
    steps = sorted(
        int(number)
        for folder in run.path.glob("checkpoint-*")
        if (number := folder.name.removeprefix("checkpoint-")).isdecimal()
    )
    if not steps:
        return Finding("checkpoints", State.NOTE, "none")
    return Finding("checkpoints", State.OK, f"at steps {', '.join(map(str, steps))}")


def _model(run: RunDir) -> Finding:
    if (run.path / "adapter_model.safetensors").is_file():
        return Finding("model", State.OK, "a trained adapter")
    if any(run.path.glob("model*.safetensors")):
        return Finding("model", State.OK, "a trained model")
    how = "The training has not come to its end; a checkpoint can be asked in its place."
    return Finding("model", State.NOTE, "none yet", how)


def _short(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)[:40]


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).split("\n")[0][:200]
