"""A completion as a trace of Trackio, the same from a training and from a run's files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any


def trace(
    trackio: Any,
    messages: Sequence[Mapping[str, str]],
    completion: str,
    rewards: Mapping[str, float | None],
    metadata: Mapping[str, Any],
) -> Any:
    """The prompt and the reply as messages of a ``trackio.Trace``.

    Its metadata are ``rewards/<name>`` for each reward, then ``metadata``; what is None is left
    out. A column that a reward logs under such a name does not replace the reward.
    """
    named = {f"rewards/{name}": value for name, value in rewards.items()}
    return trackio.Trace(
        messages=[*map(dict, messages), {"role": "assistant", "content": completion}],
        metadata={k: v for k, v in {**named, **metadata, **named}.items() if v is not None},
    )
