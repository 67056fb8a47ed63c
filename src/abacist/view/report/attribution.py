"""Which reward earned the advantage at each step, and how much of it length alone explains.

A policy-gradient step reinforces what made one reply of a group better than the others. Within a
group, a reply's reward differs from the group's mean by the sum of what each reward differs, so
its part in the squared difference is exact and the parts add up to one:

    share_k = Σ w_k (r_ik − mean_k) (R_i − mean) / Σ (R_i − mean)²

summed over the replies i of a group and, with each group's sum scaled as its advantages were, over
the groups of a step. (Where TRL's ``normalize_then_sum`` divides each reward by its own deviation
within the group, so do the differences here.) A share below 0 means that the reward paid for the
replies that the others held to be the worse ones. Beside them stands ``length``: the squared
correlation of a reply's length with its advantage within its group, which shows whether training
merely pays for short or long replies.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from abacist.records.rollout import REWARD_PREFIX
from abacist.task.rewards import built_in_funcs

LENGTH = "length"


@dataclass(frozen=True, slots=True)
class Attribution:
    """Shares by reward, each a list over ``steps``; None where a step had no difference at all."""

    steps: tuple[int, ...]
    shares: Mapping[str, Sequence[float | None]]
    length: Sequence[float | None]


def weights_of(settings: Mapping[str, Any], rewards: Sequence[str]) -> list[float] | None:
    """The factors of the rewards that a run was paid; None where each counted once.

    A control (``--control``) pays only some of the rewards that its settings name, each with its
    own factor, or a coin instead of them.

    >>> settings = {"reward_funcs": ["default", "mine.py:brief"]}
    >>> settings["reward_weights"] = [1, 1, 2, 3, 4, 5]
    >>> weights_of(settings, ["strict_format", "xml_count", "brief"])
    [2.0, 4.0, 5.0]
    >>> weights_of(settings, ["random_control"])
    """
    given, named = settings.get("reward_weights"), settings.get("reward_funcs")
    if not isinstance(given, list) or not all(isinstance(one, int | float) for one in given):
        return None
    names: list[str] = []
    for name in map(str, named if isinstance(named, list) else []):
        ours = [one.__name__ for one in built_in_funcs(name)]
        names += ours or [re.split(r"[.:]", name)[-1]]
    weights = [float(one) for one in given]
    by_name = dict(zip(names, weights, strict=False)) if len(names) == len(weights) else {}
    if by_name.keys() >= set(rewards):
        return [by_name[name] for name in rewards]
    return weights if len(weights) == len(rewards) else None


def rewards_in(rollouts: pa.Table) -> list[str]:
    """The names of the rewards that a table of rollouts holds, in the order of its columns."""
    columns = (name for name in rollouts.column_names if name.startswith(REWARD_PREFIX))
    return [name.removeprefix(REWARD_PREFIX) for name in columns]


def attribute(
    rollouts: pa.Table, weights: Sequence[float] | None = None, *, normalized: bool = False
) -> Attribution | None:
    """The shares at each step of a table of training rollouts.

    ``weights`` are the factors of the rewards in the order of their columns, all 1 if None;
    ``normalized`` says that each reward was divided by its deviation within the group
    (``normalize_then_sum``). None where these weights do not make up the rewards that were paid.
    """
    names = rewards_in(rollouts)
    if not names or not rollouts.num_rows:
        return Attribution((), {}, ())
    weights = [1.0] * len(names) if weights is None else weights
    if len(weights) != len(names):
        return None
    # N replies, K rewards. A reward that did not apply counts as 0, as in TRL's sum.
    rewards_NK = np.nan_to_num(
        np.column_stack([_floats(rollouts[REWARD_PREFIX + name]) for name in names])
        * np.asarray(weights, float)
    )
    paid_N = _floats(rollouts["reward"])
    known_N = np.isfinite(paid_N)
    if not np.allclose(rewards_NK.sum(axis=1)[known_N], paid_N[known_N], rtol=1e-3, atol=1e-3):
        return None
    advantages_N = np.nan_to_num(_floats(rollouts["advantage"]))
    lengths_N = _floats(rollouts["completion_tokens"])
    step_N = rollouts["step"].to_numpy()
    sums: dict[int, np.ndarray] = {}  # of each step: K parts, their total, length's covariance …
    for rows in groups_of(rollouts):
        apart_NK = rewards_NK[rows] - rewards_NK[rows].mean(axis=0)
        if normalized:
            deviation_K = rewards_NK[rows].std(axis=0)
            apart_NK = apart_NK * np.abs(weights) / np.where(deviation_K > 1e-9, deviation_K, 1.0)
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
    shares: dict[str, list[float | None]] = {name: [] for name in names}
    length: list[float | None] = []
    for step in steps:
        *parts, scale, covariance, spread, squares = sums[step].tolist()
        for name, part in zip(shares, parts, strict=True):
            shares[name].append(part / scale if scale > 0 else None)
        length.append(covariance**2 / (spread * squares) if spread * squares > 0 else None)
    return Attribution(steps, shares, length)


def groups_of(rollouts: pa.Table) -> list[np.ndarray]:
    """The rows of each group, in the order of steps, groups and members.

    Where a step has several generations, early versions counted the groups of each from 0; so rows
    of one number that are about different problems are different groups.
    """
    step_N, group_N, member_N = (rollouts[name].to_numpy() for name in ("step", "group", "member"))
    problems = [one or "" for one in rollouts["problem_id"].to_pylist()]
    problem_N = np.unique(problems, return_inverse=True)[1]
    order = np.lexsort((member_N, problem_N, group_N, step_N))
    keys = np.column_stack([step_N, group_N, problem_N])[order]
    begins = np.flatnonzero(np.r_[True, (np.diff(keys, axis=0) != 0).any(axis=1)])
    return np.split(order, begins[1:])


def _floats(column: pa.ChunkedArray) -> np.ndarray:
    """A column as float64, null as nan."""
    return column.cast(pa.float64()).to_numpy(zero_copy_only=False)
