"""From keywords to a configuration: what :func:`abacist.train` takes, by the names of the flags.

A keyword is a flag without its dashes, so it goes through the same parser and is refused with the
same words, once it is a plain value. Three things only Python can give: functions as rewards, data
that stands in no file, and a :class:`Run` as the model. Of functions and data the configuration
holds the names under which the run keeps them (:func:`abacist.task.custom_rewards.name_of`,
``data.jsonl``).
"""

from __future__ import annotations

import difflib
import json
import os
from collections.abc import Callable, Iterable, Mapping, Set
from typing import Any

from abacist.errors import DataError, UsageError
from abacist.learning.config import Config, flags_of, known_settings, load_config
from abacist.learning.limits import RETIRED
from abacist.learning.resume.resuming import Run
from abacist.task import given
from abacist.task.custom_rewards import listed, name_of, plain_name, refuse_wrong_signature
from abacist.task.plain import plain
from abacist.task.rewards import REWARD_SETS, is_built_in

# Settings that Python gives in other forms, which are read on their own.
_NOT_PLAIN = ("reward_funcs", "dataset_name")
_WHAT_TO_GIVE = "Give texts, numbers, and lists and dicts of them."
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
    if isinstance(source, os.PathLike):
        settings["dataset_name"] = os.fspath(source)
    elif source is not None and not isinstance(source, str):
        if settings.get("resume_from_checkpoint") is not None:
            raise UsageError(
                "a run is resumed with the data it was begun with", "Leave out dataset."
            )
        lines = given.lines_of(source)
        if not lines:
            raise DataError("The data: there are no rows in it.", "Give at least three.")
        settings["dataset_name"] = given.NAME
    config = load_config(name, file, flags_of(settings))
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
        if name == "model_name_or_path":
            value = model_name(value, "train")
        elif name not in _NOT_PLAIN:
            value = _plain(key, value, is_list=lists.get(name, False))
        if isinstance(value, str):
            _refuse_broken_text(key, value)
        settings[name] = value
    return settings


def _refuse_broken_text(key: str, text: str) -> None:
    """Raise UsageError for half of a surrogate pair, as in the name of a file that is no UTF-8."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise UsageError(f"{key} is no UTF-8: {ascii(text)[:200]}", "Rename that file.") from None


def model_name(model: object, function: str) -> str:
    """A model as the name that finds it; a run is named by its directory.

    Raises UsageError for anything else, such as a model in memory.
    """
    if isinstance(model, Run):
        return str(model.path)
    if not isinstance(model, str | os.PathLike):
        raise UsageError(
            f"{function}() was given a {type(model).__name__} as the model",
            "Give a run, a folder, a Hub id or 'tiny'. Save a model in memory first, with its "
            "tokenizer: model.save_pretrained(folder), tokenizer.save_pretrained(folder).",
        )
    return os.fspath(model)


def _plain(key: str, value: Any, *, is_list: bool) -> Any:
    """A value of Python's as YAML would hold it."""
    if isinstance(value, Set):
        if key != "lora_target_modules":
            raise UsageError(f"{key} is a {type(value).__name__}, without an order", "Give a list.")
        value = sorted(value, key=str)
    value = plain(value.path if isinstance(value, Run) else value)
    if isinstance(value, list) and not is_list:
        raise UsageError(f"{key} takes one value, and was given a list of {len(value)}")
    if value == [] and key != "report_to":
        raise UsageError(f"{key} is empty", "Leave it out, or give at least one value.")
    try:
        json.dumps(value)
    except (TypeError, ValueError, RecursionError) as error:
        raise UsageError(f"{key} cannot be kept with the run: {error}", _WHAT_TO_GIVE) from None
    return value


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
    if not isinstance(config, str | None):
        raise UsageError(f"config is a {type(config).__name__}", "Name a YAML file of settings.")
    if isinstance(recipe, os.PathLike) or str(recipe).endswith((".yaml", ".yml")):
        if config is not None:
            raise UsageError("two configs were named", f"Give {recipe} or config, not both.")
        return None, os.fspath(recipe)  # type: ignore[arg-type]
    return (None if recipe is None else str(recipe)), config


def _reward_names(rewards: Any, functions: dict[str, Callable[..., Any]]) -> list[str]:
    """A name for each reward; ``functions`` gets those that are functions of the user's."""
    names: list[str] = []
    for reward in listed(rewards):
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
    if not is_built_in(reward):
        return None
    name = str(reward.__name__)
    return f"gist.{name}" if reward in REWARD_SETS["gist"] else name
