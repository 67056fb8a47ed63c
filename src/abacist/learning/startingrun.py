"""A run's directory as the model to train: its settings and its prompt go on with it.

A model that learned under one system text and some worked examples has learned that prompt too.
So a run that is trained further brings its ``config.yaml``, as a config file would, or, where a
recipe or a file is named, its prompt, under that.
"""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any

import yaml

from abacist.errors import RunError, UsageError
from abacist.records.rundir import RunDir

PROMPT_SETTINGS = ("system_prompt", "num_shots", "shots_file")
# What belongs to one run, or to the model that it began with.
_NOT_TAKEN_OVER = ("run_name", "model_name_or_path", "model_revision", "max_hours", "max_steps")


def run_of(model: Any) -> RunDir | None:
    """The run that ``model`` is the directory of, or a checkpoint in; None for other models."""
    if not isinstance(model, str) or not model:
        return None
    path = Path(model).expanduser()
    run = RunDir(path.parent if path.name.startswith("checkpoint-") else path)
    try:
        run.read_manifest()
    except RunError:
        return None
    return run if run.config_path.is_file() else None


def settings_of(run: RunDir, known: Collection[str]) -> dict[str, Any]:
    """The settings of ``run`` for a run that begins with what it learned; its prompt exactly.

    Raises UsageError if they cannot be read.
    """
    try:
        settings = yaml.safe_load(run.config_path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UsageError(
            f"cannot read {run.config_path}: {error}",
            "Name the settings with a recipe or --config.",
        ) from error
    if not isinstance(settings, dict):
        raise UsageError(f"{run.config_path} holds no settings", "The run is damaged.")
    kept = {
        key: value for key, value in settings.items() if key in known and key not in _NOT_TAKEN_OVER
    }
    if run.shots_path.is_file() and kept.get("num_shots") != "gist":
        # Drawn once: with other data or another seed the draw would be another.
        kept["shots_file"] = str(run.shots_path.resolve())
        kept.pop("num_shots", None)
    return kept


def prompt_of(run: RunDir, known: Collection[str]) -> dict[str, Any]:
    """Of :func:`settings_of` what makes up the prompt."""
    settings = settings_of(run, known)
    return {key: settings[key] for key in PROMPT_SETTINGS if key in settings}
