"""The settings of a run or a recipe: flat YAML, a setting a line, read strictly.

Such a file may come from a stranger, and what it says becomes flags. So it holds what a line of
settings can hold and nothing else: no name twice, no part that refers to another, no tag.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from abacist.errors import RunError

_MOST_BYTES = 2**20


@dataclass(frozen=True)
class Settings:
    """The values by their names, and the line of each, counted from 1."""

    values: dict[str, Any]
    lines: Mapping[str, int]


def parse_settings(text: str) -> Settings:
    """What a file of settings says; nothing for an empty one.

    A value is a text, a number, a date, true, false or null, a list of those, or a mapping that
    JSON can hold. Raises ValueError, with a line, for anything else.

    >>> parse_settings("max_steps: 3\\nreward_weights: [1, 0.2]").values
    {'max_steps': 3, 'reward_weights': [1, 0.2]}
    >>> parse_settings("max_steps: 3\\nmax_steps: 4")
    Traceback (most recent call last):
    ...
    ValueError: max_steps stands there twice, in lines 1 and 2
    """
    import yaml  # a message about a run's folder needs none

    if len(text) > _MOST_BYTES:
        raise ValueError(f"{len(text):,} characters, and settings are no megabyte")
    try:
        events = list(yaml.parse(text, Loader=yaml.SafeLoader))
        aliases = [event for event in events if isinstance(event, yaml.AliasEvent)]
        tags = [tag for event in events if (tag := getattr(event, "tag", None)) is not None]
        if not aliases and not tags:  # walked, it could be endless
            node = yaml.compose(text, Loader=yaml.SafeLoader)
            values = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # 2024-13-01 looks like a date
        raise ValueError(f"not YAML ({error})") from error
    if aliases:
        raise ValueError(f"*{aliases[0].anchor} refers to another part of the file")
    if tags:
        raise ValueError(f"the tag {tags[0][:60]} is no part of a setting")
    if values is None:
        return Settings({}, {})
    if not isinstance(values, dict) or not isinstance(node, yaml.MappingNode):
        raise ValueError("it holds no settings")
    lines = _lines_of_keys(node)
    for key, line in lines.items():
        if key not in values:
            raise ValueError(f"line {line}: {key[:60]} is no name of a setting")
        if not _is_plain(values[key]):
            raise ValueError(f"line {line}: {key} is neither a text, a number nor a list of those")
    return Settings(values, lines)


def _lines_of_keys(node: Any) -> dict[str, int]:
    """The line of each key of a YAML mapping. Raises ValueError if one stands there twice, in it
    or in a mapping that it holds."""
    lines: dict[str, int] = {}
    for key_node, value_node in node.value:
        line, key = key_node.start_mark.line + 1, str(key_node.value)
        if key in lines:
            raise ValueError(f"{key[:60]} stands there twice, in lines {lines[key]} and {line}")
        lines[key] = line
        if value_node.id == "mapping":
            _lines_of_keys(value_node)
    return lines


def read_settings(path: Path) -> dict[str, Any]:
    """The settings in a run's ``config.yaml``. Raises RunError if damaged, or if it has none."""
    hint = "The run is damaged."
    try:
        settings = parse_settings(path.read_text(encoding="utf-8")).values
    except (OSError, ValueError) as error:
        raise RunError(f"{path}: cannot be read ({error}).", hint) from error
    if not settings:
        raise RunError(f"{path}: holds no settings.", hint)
    return settings


def _is_plain(value: Any) -> bool:
    """Whether a value can be typed as a flag: a scalar, a list of scalars, or JSON's mapping."""
    import json

    if isinstance(value, list):
        return all(not isinstance(item, list | dict) and _is_plain(item) for item in value)
    if isinstance(value, dict):
        try:
            json.dumps(value)
        except (TypeError, ValueError, RecursionError):  # a date
            return False
    try:
        str(value)
    except ValueError:  # 0xfff… of thousands of digits
        return False
    return not isinstance(value, set | tuple | bytes)
