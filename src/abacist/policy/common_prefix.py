"""What all prompts of a batch begin with, which decoding and scoring compute once."""

from __future__ import annotations

from collections.abc import Sequence


def common_prefix_tokens(prompts: Sequence[tuple[int, ...]]) -> int:
    """How many tokens all of several ``prompts`` begin with, leaving each at least one more.

    >>> common_prefix_tokens([(1, 2, 3, 4), (1, 2, 5), (1, 2, 3)])
    2
    """
    if len(prompts) < 2:
        return 0
    # What the first and the last in sorted order share, all between them share too.
    pairs = zip(min(prompts), max(prompts), strict=False)
    shortest = min(map(len, prompts))
    return next((at for at, (one, other) in enumerate(pairs) if one != other), shortest - 1)
