"""Paths in settings, made to mean the same in every working directory.

A run keeps its settings, and is resumed, evaluated and asked from wherever its user stands then. So
a name that is a file or folder here is kept as an absolute path; a Hub id, a built-in name and a
path that does not exist (its error should show what was typed) stay as they are.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from abacist.policy.source import BUILT_IN
from abacist.records.rundir import RunDir
from abacist.task.custom_rewards import absolute_reward
from abacist.task.problems import MADE_HERE
from abacist.task.prompts import BUILT_IN_SHOTS
from abacist.task.rewards import is_built_in_name

# Settings whose value may be a path, each with the names that are none.
_MAY_BE_PATHS: dict[str, tuple[str, ...]] = {
    "dataset_name": MADE_HERE,
    "shots_file": tuple(BUILT_IN_SHOTS),
    "model_name_or_path": (BUILT_IN,),
    "deepspeed": (),
    "accelerator_config": (),
    "fsdp_config": (),
}


def with_data_beside(settings: Mapping[str, Any], run: Path) -> dict[str, Any]:
    """``settings`` of the folder ``run``; if it has moved with data of its own, naming that."""
    kept, named = RunDir(run).data_path, Path(str(settings.get("dataset_name", "")))
    if named.name == kept.name and not named.exists() and kept.is_file():
        return {**settings, "dataset_name": str(kept)}
    return dict(settings)


def with_absolute_paths(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings with absolute paths, rewards of the user's own included."""
    settings = dict(settings)
    for name, others in _MAY_BE_PATHS.items():
        value = settings.get(name)
        if isinstance(value, str) and value and value not in others:
            settings[name] = _absolute(value)
    if isinstance(rewards := settings.get("reward_funcs"), list):
        settings["reward_funcs"] = [
            name if is_built_in_name(name) else absolute_reward(name) for name in rewards
        ]
    return settings


def _absolute(value: str) -> str:
    path = Path(value).expanduser()
    try:
        return os.path.abspath(path) if path.exists() else value
    except (OSError, ValueError):  # JSON where a path may stand, or a null byte
        return value
