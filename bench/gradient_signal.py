"""How much of a group's gradient is signal, and what step rewards make of it.

    python bench/gradient_signal.py RUN [--steps 1 8] [--first_layer 16] [--groups 96]

Takes the replies that RUN sampled in its first steps, when its policy was nearly its base, and
computes for each group the gradient of a new LoRA adapter on that base: once by the outcome (1
for a right answer, less the group's mean: the gradient of accuracy itself), once by the steps
(``--step_reward_weight``). Of n gradients g the squared mean is the mean of g_i · g_j over i ≠ j,
which chance does not raise, and their noise the mean of g_i · g_i (McCandlish et al. 2018, arXiv
1812.06162). Printed are, with 95 % intervals by a bootstrap over groups:

- signal: the squared mean as a fraction of the noise of one group. 1 / signal is the number of
  groups, all in one step, whose mean gradient is as much signal as noise.
- toward accuracy: how far the mean gradient of a scheme goes along that of the outcome, as a
  fraction of both noises. What teaches more has more of it.

Only the layers from ``--first_layer`` on are looked at: the memory holds every gradient.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from abacist.learning.config import Config, load_config
from abacist.learning.process_supervision import (
    CompletionText,
    by_token,
    reference_of,
    step_advantages,
)
from abacist.learning.task import load_task
from abacist.learning.train import load_trainable
from abacist.policy.choices import float32_matmul_precision
from abacist.policy.loading import Policy, quiet_libraries
from abacist.policy.scoring.score import score
from abacist.records.rollout import Rollout, StopReason, read_rollouts
from abacist.task.step_rewards import step_rewards

OUTCOME, STEPS = SCHEMES = ("outcome", "steps")
RESAMPLED = 2_000


def groups_of(run: Path, first: int, last: int, count: int) -> list[list[Rollout]]:
    """The groups of the steps from ``first`` to ``last``, at most ``count``."""
    rollouts: list[Rollout] = []
    for step in range(first, last + 1):
        rollouts += read_rollouts(run / "rollouts" / f"step-{step:06d}.parquet")
    groups = groupby(rollouts, key=lambda one: (one.step, one.group))
    return [list(members) for _, members in groups][:count]


def advantages_of(group: list[Rollout], solution: str, decode: Callable[..., str]) -> list[Tensor]:
    """For each scheme what each token is paid, [G, T]; replies that were cut off get nothing."""
    width = max(len(one.completion_ids) for one in group)
    kept = [one.stop_reason is not StopReason.LENGTH for one in group]
    right = torch.tensor([float(bool(one.is_correct)) for one in group])
    by_outcome = (right - right.mean())[:, None].repeat(1, width)
    steps = [
        step_rewards(
            one.completion,
            solution,
            is_correct=one.is_correct,
            is_cut=one.stop_reason is StopReason.LENGTH,
        )
        for one in group
    ]
    texts = [CompletionText(one.completion_ids, decode) for one in group]
    advantages = step_advantages([[step.reward for step in of_reply] for of_reply in steps])
    by_step = by_token(texts, steps, advantages, width)
    lengths = torch.tensor(
        [one.completion_tokens * is_kept for one, is_kept in zip(group, kept, strict=True)]
    )
    written = torch.arange(width) < lengths[:, None]
    return [by_outcome * written, by_step * written]


def gradients_of(
    policy: Policy,
    weights: list[Tensor],
    group: list[Rollout],
    paid: list[Tensor],
    temperature: float,
) -> list[Tensor]:
    """The gradient [D] of each scheme, of the sum over the tokens of a group."""
    prompt = policy.chat.encode([dict(turn) for turn in group[0].messages])
    width = paid[0].shape[1]
    ids = torch.zeros(len(group), len(prompt) + width, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, one in enumerate(group):
        text = torch.tensor([*prompt, *one.completion_ids])
        ids[row, : len(text)], mask[row, : len(text)] = text, 1
    logps, _ = score(policy.model, ids, mask, width, temperature=temperature)
    found = []
    for at, advantages in enumerate(paid):
        is_last = at == len(paid) - 1
        grads = torch.autograd.grad((advantages * logps).sum(), weights, retain_graph=not is_last)
        found.append(torch.cat([grad.flatten() for grad in grads]))
    return found


def of_pairs(products: np.ndarray, chosen: np.ndarray) -> float:
    """The mean of g_i · h_j over pairs of different groups among ``chosen``."""
    block = products[np.ix_(chosen, chosen)]
    differs = chosen[:, None] != chosen[None, :]
    return float(block[differs].mean())


def measured(ours: np.ndarray, other: np.ndarray, across: np.ndarray) -> tuple[float, float, float]:
    """Signal along another scheme as a fraction of both noises, with its 95 % interval.

    ``ours``, ``other`` and ``across`` are the products [n, n] within a scheme, within the other
    and between them.
    """
    noise = float(np.sqrt(np.diag(ours).mean() * np.diag(other).mean()))
    draw, count = np.random.default_rng(0), len(ours)
    found = of_pairs(across, np.arange(count)) / noise
    resampled = (draw.integers(0, count, count) for _ in range(RESAMPLED))
    again = [of_pairs(across, each) / noise for each in resampled if len(set(each)) > 1]
    low, high = np.quantile(again, [0.025, 0.975])
    return found, float(low), float(high)


def trainable_from(config: Config, first_layer: int) -> tuple[Policy, list[Tensor]]:
    """The base in a new adapter, and the factors B of its layers from ``first_layer`` on. Those
    are 0, so that the other factors have no gradient yet."""
    policy = load_trainable(config)
    weights = []
    for name, weight in policy.model.named_parameters():
        layer = name.partition("layers.")[2].partition(".")[0]
        is_looked_at = "lora_" in name and layer.isdigit() and int(layer) >= first_layer
        weight.requires_grad_(is_looked_at)
        if is_looked_at and "lora_B" in name:
            weights.append(weight)
    policy.model.train()
    return policy, weights


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("run", type=Path)
    parser.add_argument("--steps", type=int, nargs=2, default=(1, 8), metavar=("FIRST", "LAST"))
    parser.add_argument("--first_layer", type=int, default=16)
    parser.add_argument("--groups", type=int, default=96)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    quiet_libraries()
    config = load_config(None, str(options.run / "config.yaml"), [])
    task: Any = load_task(config)
    solutions = {one.problem_id: reference_of(one) for one in task.train}
    groups = groups_of(options.run, *options.steps, options.groups)
    policy, weights = trainable_from(config, options.first_layer)
    print(f"{sum(each.numel() for each in weights):,} weights, {len(groups)} groups", flush=True)
    found: list[list[Tensor]] = []
    began = time.perf_counter()
    with float32_matmul_precision(config.model.float32_matmul_precision):
        for number, group in enumerate(groups, start=1):
            solution = solutions[str(group[0].problem_id)]
            paid = advantages_of(group, solution, policy.chat.tokenizer.decode)
            found.append(gradients_of(policy, weights, group, paid, config.training.temperature))
            if number % 8 == 0:
                seconds = time.perf_counter() - began
                left = seconds / number * (len(groups) - number)
                print(f"group {number} of {len(groups)} | {left:.0f} s left", flush=True)
    by_scheme = [torch.stack(gradients) for gradients in zip(*found, strict=True)]  # [n, D]
    products = [[(a @ b.T).double().numpy() for b in by_scheme] for a in by_scheme]
    print("| scheme | signal of one group | toward accuracy |\n|---|---|---|")
    for at, name in enumerate(SCHEMES):
        own = measured(products[at][at], products[at][at], products[at][at])
        along = measured(products[at][at], products[0][0], products[at][0])
        cells = [f"{value:.4f} [{low:.4f}, {high:.4f}]" for value, low, high in (own, along)]
        print(f"| {name} | {cells[0]} | {cells[1]} |")


if __name__ == "__main__":
    main()
