"""Counts of a recipe that follow a count given beside it, so that one flag means what it says.

A recipe's numbers fit one another: a batch holds whole groups, a warm-up ends within the run, a
verdict is a part of the run's work. A person who changes one of them changes one flag. What
follows is shown with its reason among the settings, is saved, and never overrides a setting that
was given: only a recipe's own numbers, and defaults, follow.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from abacist.learning.arguments import ScriptArguments

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

    ``recipe`` holds the recipe's settings, ``given`` those of a config file and of flags.

    >>> recipe = {"num_generations": 8, "per_device_train_batch_size": 64}
    >>> followers(recipe, {"num_generations": 4})
    {'per_device_train_batch_size': (32, 'num_generations')}
    """
    return _batch_of_groups(recipe, given) | _parts_of_a_run(recipe, given)


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
