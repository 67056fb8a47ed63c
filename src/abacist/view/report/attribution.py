"""Which reward earned the advantage at each step, and how much of it length alone explains.

A policy-gradient step reinforces what made one reply of a group better than the others. Within a
group, a reply's reward differs from the group's mean by the sum of what each reward differs, so
its part in the squared difference is exact and the parts add up to one:

    share_k = Σ w_k (r_ik − mean_k) (R_i − mean) / Σ (R_i − mean)²

summed over the replies i of a group and, with each group's sum scaled as its advantages were, over
the groups of a step. A share below 0 means that the reward paid for the replies that the others
held to be the worse ones. Beside them stands ``length``: the squared correlation of a reply's
length with its advantage within its group, which shows whether training merely pays for short or
long replies.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from abacist.records.rollout import REWARD_PREFIX

LENGTH = "length"


@dataclass(frozen=True, slots=True)
class Attribution:
    """Shares by reward, each a list over ``steps``; None where a step had no difference at all."""

    steps: tuple[int, ...]
    shares: Mapping[str, Sequence[float | None]]
    length: Sequence[float | None]


def attribute(rollouts: pa.Table, weights: Sequence[float] | None = None) -> Attribution:
    """The shares at each step of a table of training rollouts.

    ``weights`` are the factors of the rewards in the order of their columns; all 1 if None or if
    their number does not fit.
    """
    names = [name for name in rollouts.column_names if name.startswith(REWARD_PREFIX)]
    if not names or not rollouts.num_rows:
        return Attribution((), {}, ())
    if weights is None or len(weights) != len(names):
        weights = [1.0] * len(names)
    # N replies, K rewards. A reward that did not apply counts as 0, as in TRL's sum.
    rewards_NK = np.nan_to_num(
        np.column_stack([_floats(rollouts[name]) for name in names]) * np.asarray(weights)
    )
    advantages_N = np.nan_to_num(_floats(rollouts["advantage"]))
    lengths_N = _floats(rollouts["completion_tokens"])
    step_N, group_N = (rollouts[name].to_numpy() for name in ("step", "group"))
    order = np.lexsort((group_N, step_N))
    begins = np.flatnonzero(
        np.r_[True, (np.diff(step_N[order]) != 0) | (np.diff(group_N[order]) != 0)]
    )
    sums: dict[int, np.ndarray] = {}  # of each step: K parts, their total, length's covariance …
    for rows in np.split(order, begins[1:]):
        apart_NK = rewards_NK[rows] - rewards_NK[rows].mean(axis=0)
        apart_N = apart_NK.sum(axis=1)
        total = float(apart_N @ apart_N)
        scale = float(advantages_N[rows] @ advantages_N[rows])
        away_N = lengths_N[rows] - lengths_N[rows].mean()
        here = np.zeros(len(names) + 4)
        if total > 1e-12 and scale > 0:
            # Advantages divided by the group's deviation weigh every group alike, others do not.
            here[:-4] = apart_NK.T @ apart_N * (scale / total)
            here[-4:] = (
                scale, away_N @ advantages_N[rows], away_N @ away_N,
                advantages_N[rows] @ advantages_N[rows],
            )  # fmt: skip
        number = int(step_N[rows[0]])
        sums[number] = sums.get(number, np.zeros_like(here)) + here
    steps = tuple(sorted(sums))
    shares: dict[str, list[float | None]] = {name.removeprefix(REWARD_PREFIX): [] for name in names}
    length: list[float | None] = []
    for step in steps:
        *parts, scale, covariance, spread, squares = sums[step].tolist()
        for name, part in zip(shares, parts, strict=True):
            shares[name].append(part / scale if scale > 0 else None)
        length.append(covariance**2 / (spread * squares) if spread * squares > 0 else None)
    return Attribution(steps, shares, length)


def _floats(column: pa.ChunkedArray) -> np.ndarray:
    """A column as float64, null as nan."""
    return column.cast(pa.float64()).to_numpy(zero_copy_only=False)
