"""Settings that nobody typed: those that follow a given one, and those of the model's own run.

**Followers.** The numbers of a recipe, or of a run, belong together: a batch holds whole groups, a
warm-up ends within the run, the verdict is a part of the run's work. When a person changes one of
them, others follow. What follows is shown with its reason among the settings, is saved, and never
overrides a setting that was given: only what was brought along (by a recipe, or by the run that is
trained further) and defaults follow.

**A run as the model to train.** A model that learned under one system text and some worked examples
has learned that prompt too. So a run that is trained further brings its ``config.yaml``, as a
config file would, or, where a recipe or a file is named, its prompt, under that.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

from abacist.errors import RunError, UsageError
from abacist.learning.arguments import ScriptArguments
from abacist.records.provenance import EXPORT_FORMAT, EXPORT_NAME
from abacist.records.rundir import RunDir
from abacist.records.seen import read_object
from abacist.task.custom_rewards import RewardFunc
from abacist.task.rewards import built_in_funcs

PROMPT_SETTINGS = ("system_prompt", "num_shots", "shots_file")
# What belongs to one run, or to the model that it began with.
_NOT_TAKEN_OVER = ("run_name", "model_name_or_path", "model_revision", "max_hours")


def run_to_continue(model: Any) -> RunDir | None:
    """The run that ``model`` is the directory of, a checkpoint in, or an export of; else None."""
    if not isinstance(model, str) or not model:
        return None
    path = Path(model).expanduser()
    run = RunDir(path.parent if path.name.startswith("checkpoint-") else path)
    if read_object(run.path / EXPORT_NAME).get("format") != EXPORT_FORMAT:
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
        settings = run.read_settings()
    except RunError as error:
        raise UsageError(error.message, "Name the settings with a recipe or --config.") from error
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


_BATCH = (
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "generation_batch_size",
    "steps_per_generation",
)
LONGEST_WARMUP_FRACTION = 1 / 4
# Fewer would not show anything; intervals are wide enough with these.
FEWEST_HELDOUT_PROBLEMS = 50
FEWEST_CONSISTENCY_PROBLEMS = 20


def followers(recipe: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, tuple[Any, str]]:
    """New values of what follows, each with the setting that it follows.

    ``recipe`` holds the settings of the recipe or of the run that is trained further, ``given``
    those of a config file and of flags.

    >>> recipe = {"num_generations": 8, "per_device_train_batch_size": 64}
    >>> followers(recipe, {"num_generations": 4})
    {'per_device_train_batch_size': (32, 'num_generations')}
    """
    return (
        _batch_of_groups(recipe, given)
        | _trained_of_a_group(recipe, given)
        | _weights_of_rewards(recipe, given)
        | _parts_of_a_run(recipe, given)
    )


def _trained_of_a_group(
    recipe: Mapping[str, Any], given: Mapping[str, Any]
) -> dict[str, tuple[Any, str]]:
    """The same share of a group as in the recipe, where groups have another size."""
    before, now = recipe.get("num_generations"), given.get("num_generations")
    count = recipe.get("train_replies")
    if not count or not before or not now or before == now or "train_replies" in given:
        return {}
    return {"train_replies": (max(1, int(count) * int(now) // int(before)), "num_generations")}


def _batch_of_groups(
    recipe: Mapping[str, Any], given: Mapping[str, Any]
) -> dict[str, tuple[Any, str]]:
    """As many problems a step as in the recipe, in groups of another size."""
    before, now = recipe.get("num_generations"), given.get("num_generations")
    if not before or not now or before == now or any(name in given for name in _BATCH):
        return {}
    # First the number of forward passes: the memory that one takes then stays as it was.
    for name in ("gradient_accumulation_steps", "per_device_train_batch_size"):
        scaled, rest = divmod(int(recipe.get(name, 1)) * int(now), int(before))
        if rest == 0 and scaled >= 1:
            return {name: (scaled, "num_generations")}
    return {}


def _weights_of_rewards(
    recipe: Mapping[str, Any], given: Mapping[str, Any]
) -> dict[str, tuple[Any, str]]:
    """The recipe's for its own rewards, 1 for others; None if all are others."""
    weights, names = recipe.get("reward_weights"), recipe.get("reward_funcs")
    if not weights or not names or "reward_weights" in given or "reward_funcs" not in given:
        return {}
    of_rewards = dict(zip(_rewards(names), weights, strict=False))  # a run's may be edited
    rewards = _rewards(given["reward_funcs"])
    if of_rewards.keys().isdisjoint(rewards):
        return {"reward_weights": (None, "reward_funcs")}
    followed = [of_rewards.get(reward, 1.0) for reward in rewards]
    return {"reward_weights": (followed, "reward_funcs")}


def _rewards(names: Iterable[str]) -> list[RewardFunc | str]:
    """Those that ``names`` stand for, in order; a person's own by name, unread."""
    return [reward for name in names for reward in built_in_funcs(name) or (name,)]


def _parts_of_a_run(
    recipe: Mapping[str, Any], given: Mapping[str, Any]
) -> dict[str, tuple[Any, str]]:
    """Warm-up and measurements of a run that is shorter than the recipe's."""
    before, now = int(recipe.get("max_steps", 0)), int(given.get("max_steps", 0))
    if not 0 < now < before:
        return {}
    found: dict[str, tuple[Any, str]] = {}
    warmup = recipe.get("warmup_steps", 0)
    longest = int(now * LONGEST_WARMUP_FRACTION)
    if warmup >= 1 and warmup > longest and "warmup_steps" not in given:
        found["warmup_steps"] = (float(longest), "max_steps")  # as the parser reads it
    for name, fewest in (
        ("num_heldout_problems", FEWEST_HELDOUT_PROBLEMS),
        ("num_consistency_problems", FEWEST_CONSISTENCY_PROBLEMS),
    ):
        usual = int(recipe.get(name, getattr(ScriptArguments, name)))
        wanted = max(fewest, round(usual * now / before))
        if wanted < usual and name not in given:
            found[name] = (wanted, "max_steps")
    return found
