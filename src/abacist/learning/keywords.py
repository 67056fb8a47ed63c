"""From keywords to a configuration: what :func:`abacist.train` takes, by the names of the flags.

A keyword is a flag without its dashes, so it goes through the same parser and is refused with the
same words. Three things only Python can give: functions as rewards, data that stands in no file,
and a :class:`Run` as the model. Of functions and data the configuration holds the names under which
the run keeps them (:func:`abacist.task.custom_rewards.name_of`, ``data.jsonl``).
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from enum import Enum
from pathlib import Path
from typing import Any

from abacist.errors import DataError, RewardError, UsageError
from abacist.learning.config import Config, flags_of, known_settings, load_config
from abacist.learning.limits import RETIRED
from abacist.learning.resume.resuming import Run
from abacist.task import given
from abacist.task.custom_rewards import name_of, plain_name, refuse_wrong_signature
from abacist.task.rewards import REWARD_SETS, is_built_in

ALIASES = {
    "model": "model_name_or_path",
    "dataset": "dataset_name",
    "resume": "resume_from_checkpoint",
}


def config_of(recipe: object, keywords: Mapping[str, Any]) -> Config:
    """The checked configuration of one call.

    ``recipe`` is the name of a recipe, a YAML file of settings, or None. A keyword that is None
    counts as not given. Raises UsageError as :func:`load_config` does, RewardError for a function
    that cannot be called as a reward, DataError for data that is no table.
    """
    settings = _settings(keywords)
    name, file = _recipe_or_file(recipe, settings.pop("config", None))
    functions: dict[str, Callable[..., Any]] = {}
    if "reward_funcs" in settings:
        settings["reward_funcs"] = _reward_names(settings["reward_funcs"], functions)
    lines = None
    source = settings.get("dataset_name")
    if source is not None and not isinstance(source, str | os.PathLike):
        if settings.get("resume_from_checkpoint") is not None:
            raise UsageError(
                "a run is resumed with the data it was begun with", "Leave out dataset."
            )
        lines = given.lines_of(source)
        if not lines:
            raise DataError("The data: there are no rows in it.", "Give at least three.")
        settings["dataset_name"] = given.NAME
    plain = {key: _plain(key, value) for key, value in settings.items()}
    config = load_config(name, file, flags_of(plain))
    config.functions, config.data = functions, lines
    return config


def _settings(keywords: Mapping[str, Any]) -> dict[str, Any]:
    """The keywords that are given, by the names of the settings."""
    settings: dict[str, Any] = {}
    lists = known_settings()
    known = {*lists, "config"}
    for key, value in keywords.items():
        name = ALIASES.get(key, key)
        if name not in known:
            raise UsageError(unknown_keyword("train", key, known | set(ALIASES)))
        if value is None:
            continue
        if name in settings:
            raise UsageError(f"{key} and {name} are one setting", "Give one of them.")
        if isinstance(value, Run):
            value = value.path
        is_list = isinstance(value, list | tuple) and name != "dataset_name"
        if is_list and not lists.get(name):
            raise UsageError(f"{key} takes one value, and {len(value)} were given")
        settings[name] = value
    return settings


def unknown_keyword(function: str, key: str, known: Iterable[str]) -> str:
    """One line, because a traceback ends in it.

    >>> unknown_keyword("train", "lerning_rate", ["learning_rate"])
    "train() has no keyword 'lerning_rate'; did you mean learning_rate?"
    """
    if function == "train" and key in RETIRED:
        return f"train() has no keyword {key!r}: {RETIRED[key].replace('--', '')}"
    close = difflib.get_close_matches(key.lower(), sorted(known), n=1)
    guess = f"; did you mean {close[0]}?" if close else f"; help(abacist.{function}) lists them"
    return f"{function}() has no keyword {key!r}{guess}"


def _recipe_or_file(recipe: object, config: object) -> tuple[str | None, str | None]:
    if recipe is not None and not isinstance(recipe, str | os.PathLike):
        raise UsageError(
            f"the first argument of train() is a {type(recipe).__name__}, not a recipe",
            "Name a recipe or a YAML file; a model is given as model=….",
        )
    if isinstance(recipe, os.PathLike) or str(recipe).endswith((".yaml", ".yml")):
        if config is not None:
            raise UsageError("two configs were named", f"Give {recipe} or config, not both.")
        return None, os.fspath(recipe)  # type: ignore[arg-type]
    return (None if recipe is None else str(recipe)), None if config is None else str(config)


def _reward_names(rewards: Any, functions: dict[str, Callable[..., Any]]) -> list[str]:
    """A name for each reward; ``functions`` gets those that are functions of the user's."""
    if isinstance(rewards, str) or callable(rewards):
        rewards = [rewards]
    if not isinstance(rewards, Sequence):
        raise RewardError(
            f"reward_funcs is a {type(rewards).__name__}.",
            "Give a list of names and functions: reward_funcs=['default', my_reward].",
        )
    names: list[str] = []
    for reward in rewards:
        if isinstance(reward, str):
            names.append(reward)
            continue
        name = _name_of(reward)
        if name is None:
            name = name_of(reward)
            if plain_name(reward) == "lambda":
                number = sum(one.startswith("<function lambda") for one in names)
                name = "<function lambda>" if not number else f"<function lambda_{number + 1}>"
            refuse_wrong_signature(reward, plain_name(reward))
            functions[name] = reward
        names.append(name)
    return names


def _name_of(reward: Any) -> str | None:
    """The name that chooses a reward of ours; None for a user's own."""
    if not callable(reward):
        raise RewardError(
            f"A reward is a {type(reward).__name__}, not a function or its name.",
            "A reward is `def f(prompts, completions, **columns) -> list[float]`.",
        )
    if not is_built_in(reward):
        return None
    name = str(reward.__name__)
    return f"gist.{name}" if reward in REWARD_SETS["gist"] else name


def _plain(name: str, value: Any) -> Any:
    """A value of Python's as YAML would hold it."""
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, list | tuple | set | frozenset):
        return [_plain(name, one) for one in value]
    return str(value).removeprefix("torch.") if name == "dtype" else value
