"""``--train_replies K``: learn from the K replies of each group with the largest advantages.

A reply whose advantage is small changes the policy little, and costs as much as any other. CPPO
(arXiv 2503.22342) leaves out those with the smallest absolute advantages and fills their places
from other groups; PODS (arXiv 2504.13818) keeps the subset of a group whose rewards vary most. Here
the rule is CPPO's:

1. of each group of G, the K replies with the largest \\|advantage\\|;
2. a group whose rewards are all equal teaches nothing and gets none; its places go to the
   next largest of other groups, until P·K replies of P groups are chosen or none is left that
   teaches anything;
3. equal advantages are drawn by lot, from the run's seed and the micro-step, so that a resumed run
   draws the same.

The rest is left out as TRL leaves out truncated completions (``mask_truncated_completions``): their
completion mask is 0. They take no forward on our path, and count in no normalisation of the loss,
so that the gradient is TRL's own of a batch that holds only the chosen replies. All replies count
in the rewards that are logged, and all are kept in ``rollouts/``, with the column ``trained``.

Shapes: N completions of a generation batch (of all processes, or of this one), G of a group.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from abacist.errors import UsageError
from abacist.learning import processes

TRAINED_FRACTION = "trained_fraction"
"""In a generation batch: chosen replies as a fraction of all, [], over all processes."""

# These divide by a number of completions; dapo, cispo and vespo by num_items_in_batch.
_PER_ROW = {"grpo", "dr_grpo", "luspo", "sapo"}
ROUNDING = 4e-7  # of a sum of a few numbers in float32, as a fraction of their absolute values
_SAME = 1e-4  # advantages that differ by less, as a fraction of the largest, differ by rounding


def wanted(args: Any) -> int | None:
    """K, or None for all replies. A plain ``trl.GRPOConfig`` has no such field."""
    count: int | None = getattr(args, "train_replies", None)
    return count


def refuse_contradictions(args: Any, named: str, *, has_auxiliary_loss: bool = False) -> None:
    """Raise UsageError where ``train_replies`` of ``args`` cannot be meant.

    A KL term and an entropy bonus act on every reply. On the chosen ones alone they would be
    something else: a KL divergence, for example, estimated from the most extreme replies.
    """
    if (count := wanted(args)) is None:
        return
    size = int(args.num_generations or 0)
    if count < 1:
        raise UsageError(f"{named} {count} is not at least 1", "Leave it out to train on all.")
    if count > size:
        raise UsageError(
            f"{named} {count} is more than the {size} replies of a group (--num_generations)",
            f"Give at most {size}, or leave it out to train on all.",
        )
    needs_all = {
        f"--beta {args.beta:g}: its KL term": args.beta != 0,
        f"--entropy_coef {args.entropy_coef:g}: its bonus": args.entropy_coef != 0,
        "--use_adaptive_entropy: its bonus": args.use_adaptive_entropy,
        f"--top_entropy_quantile {args.top_entropy_quantile:g}: its quantile": (
            args.top_entropy_quantile < 1.0
        ),
        "a router of experts: its auxiliary loss": has_auxiliary_loss,
    }
    for setting, applies in needs_all.items():
        if applies:
            raise UsageError(
                f"{named} {count} does not go with {setting} is taken over all replies",
                "Leave out one of the two.",
            )


def in_words(count: int, size: int, is_ours: bool) -> str:
    """What is trained, as a line at the start of a run."""
    line = f"training on {count} of {size} replies a group: those with the largest advantages"
    return line if is_ours else f"{line} (TRL's path takes as long as for all)"


def choose(
    advantages: Tensor, teaches: Tensor, size: int, count: int, generator: torch.Generator
) -> Tensor:
    """Which completions [N] are trained on: min(N / ``size`` · ``count``, those that teach).

    ``advantages`` [N] and ``teaches`` [N] are of whole groups of ``size``, one after another. Of
    what does not teach, nothing is chosen.
    """
    sizes = torch.where(teaches, advantages.abs().double().cpu(), torch.zeros(()).double())
    # By rounding, +a and -a of one group may differ in the last digit; that must not decide.
    sizes = (sizes / (sizes.max().clamp(min=1e-30) * _SAME)).round()
    lots = torch.randperm(len(sizes), generator=generator)
    # By size, and those of one size by lot: a stable sort of what the lots have put in order.
    order = lots[sizes[lots].argsort(descending=True, stable=True)]
    order = order[teaches[order]]
    seen: dict[int, int] = {}
    first: list[int] = []
    later: list[int] = []
    for row in order.tolist():
        place = seen[row // size] = seen.get(row // size, 0) + 1
        (first if place <= count else later).append(row)
    places = len(sizes) // size * count
    chosen = torch.zeros(len(sizes), dtype=torch.bool)
    chosen[first + later[: places - len(first)]] = True
    return chosen


def leave_out_others(trainer: Any, batch: dict[str, Any]) -> Tensor | None:
    """Choose replies of a generation batch, and leave the others out of it, in place.

    Returns which of this process's completions [N] are trained on. Where no reply teaches anything
    all advantages become 0, and the completions stay, so that their entropy can be logged.
    """
    count = wanted(trainer.args)
    if count is None:
        return None
    accelerator, advantages = trainer.accelerator, batch["advantages"]
    everyones = accelerator.gather(sizes_of(advantages)).cpu()
    has_tokens = accelerator.gather(batch["completion_mask"].any(dim=1)).cpu()
    teaches = (everyones != 0) & has_tokens
    # Micro-steps, not steps: several generation batches may belong to one optimizer step. PyTorch
    # takes the low 32 bits of a seed only, so both numbers are mixed into these.
    draw = random.Random(f"{trainer.args.seed}/{trainer._step}")
    generator = torch.Generator().manual_seed(draw.getrandbits(32))
    chosen = choose(everyones, teaches, trainer.num_generations, count, generator)
    mine = chosen[processes.own_rows(accelerator, len(advantages))].to(advantages.device)
    trainer._metrics["train"]["trained_replies"].append(float(chosen.sum()))
    if not bool(chosen.any()):
        batch["advantages"] = torch.zeros_like(advantages)
        batch[TRAINED_FRACTION] = torch.ones((), device=advantages.device)
        return mine
    fraction = chosen.float().mean()
    batch["completion_mask"] = batch["completion_mask"] * mine[:, None].int()
    batch["advantages"] = advantages * (mine if advantages.dim() == 1 else mine[:, None])
    if "old_per_token_logps" in batch:  # our forward gives 0 for what is left out: a ratio of 1
        old = batch["old_per_token_logps"]
        batch["old_per_token_logps"] = old.masked_fill(~mine[:, None], 0.0)
    batch["num_items_in_batch"] = accelerator.gather(loss_mask(batch).sum()).sum()
    batch[TRAINED_FRACTION] = fraction.to(advantages.device)
    return mine


def sizes_of(advantages: Tensor) -> Tensor:
    """How large the advantages of each completion are, [N]: of [N] themselves; of [N, T], which are
    0 outside of it, the root of the mean square over the tokens that have one."""
    if advantages.dim() == 1:
        return advantages.abs()
    return advantages.square().sum(dim=1).div((advantages != 0).sum(dim=1).clamp(min=1)).sqrt()


def has_equal_rewards(trainer: Any, size: int) -> Tensor:
    """Which completions [N], of all processes, are in a group in which no two rewards differ."""
    weighted = trainer._rewards.cpu().double() * trainer.reward_weights.cpu().double()
    ways = [weighted]
    if trainer.multi_objective_aggregation != "sum_then_normalize":  # each reward counts by itself
        ways = list(weighted.split(1, dim=1))
    equal = torch.stack([groups_with_equal_rewards(each, size) for each in ways]).all(dim=0)
    return equal.repeat_interleave(size)


def groups_with_equal_rewards(weighted: Tensor, size: int) -> Tensor:
    """Groups [N / ``size``] in which the sums of weighted rewards [N, K] are equal.

    NaN is a reward that did not apply; a completion with nothing else has no reward, and a group in
    which fewer than two have one counts as equal. Sums count as equal where rounding in float32 can
    be all of their difference.
    """
    weighted = weighted.double()
    sums = weighted.nansum(dim=1).masked_fill(weighted.isnan().all(dim=1), torch.nan)
    groups = sums.view(-1, size)
    most = groups.nan_to_num(nan=-torch.inf).amax(dim=1)
    least = groups.nan_to_num(nan=torch.inf).amin(dim=1)
    added = weighted.abs().nansum(dim=1).view(-1, size).amax(dim=1)
    return most - least <= ROUNDING * added


def silence(trainer: Any, advantages: Tensor) -> None:
    """Set the advantages [N] of groups whose rewards are equal to exactly 0, in place.

    TRL leaves there what rounding makes of 0: the mean of eight times 0.3 is not 0.3 in float32.
    Divided by a deviation that is rounding as well, that is 3e-4 for all eight, and near 1 for
    rewards of thousands: replies are trained on, and pushed one way, for nothing they did.
    """
    equal = has_equal_rewards(trainer, trainer.num_generations)
    mine = processes.own_rows(trainer.accelerator, len(advantages))
    advantages[equal[mine].to(advantages.device)] = 0.0


def count_silent(trainer: Any, batch: Mapping[str, Any]) -> None:
    """Log ``frac_zero_advantage``: the share of groups, of all processes, that teach nothing.

    Of such a group no token that is trained on has an advantage: rewards are equal, outcome gating
    has silenced it, the replies that differ were cut off, and no steps were paid either.
    """
    teaches = (sizes_of(batch["advantages"]) != 0) & batch["completion_mask"].any(dim=1)
    groups = trainer.accelerator.gather(teaches).view(-1, trainer.num_generations).any(dim=1)
    silent = 1.0 - groups.float().mean().item()
    trainer._metrics["train"]["frac_zero_advantage"].append(silent)


def chosen_first(trainer: Any, batch: dict[str, Any]) -> dict[str, Any]:
    """The generation batch with the chosen replies of each optimizer step before the others.

    Groups are in a random order and stay together. The first micro-batches of a step then are full,
    and later ones empty: the prompts that rows share are computed in fewer forwards.
    """
    rows = len(batch["advantages"])
    size = trainer.num_generations
    numbers = torch.arange(rows)
    groups = torch.randperm(-(-rows // size))
    numbers = numbers[groups[numbers // size].argsort(stable=True)]
    is_chosen = batch["completion_mask"].any(dim=1).cpu()[numbers]
    windows = _windows(trainer.args)
    others = iter(numbers[~is_chosen].tolist())
    index: list[int] = []
    for window in numbers[is_chosen].tensor_split(windows):
        index += window.tolist()
        index += [next(others) for _ in range(rows // windows - len(window))]
    return reordered(batch, torch.tensor(index))


def reordered(batch: dict[str, Any], order: Tensor) -> dict[str, Any]:
    """The generation batch with its completions in another order; ``order`` names all of them."""
    return {
        key: value[order.to(value.device)]
        if isinstance(value, Tensor) and value.dim() and value.shape[0] == len(order)
        else value
        for key, value in batch.items()
    }


def _windows(args: Any) -> int:
    """Parts of a generation batch that get equally many replies: the optimizer steps it serves."""
    batches, of_step = args.steps_per_generation, args.gradient_accumulation_steps
    if of_step % batches == 0:
        return 1
    return int(batches // of_step if batches % of_step == 0 else batches)


def normalised(loss: Tensor, trainer: Any, inputs: dict[str, Any]) -> Tensor:
    """TRL's loss of a micro-batch, so scaled that what is left out does not count in it.

    TRL divides by the completions of a micro-batch (grpo, dr_grpo, sapo, luspo), by its tokens
    (bnpo), or by the tokens of the generation batch (the others, which need nothing). What is
    returned adds up, over the micro-batches of a generation, to TRL's loss of the chosen replies in
    one batch.
    """
    if TRAINED_FRACTION not in inputs:
        return loss
    if trainer.loss_type in _PER_ROW:
        return loss / inputs[TRAINED_FRACTION]
    if trainer.loss_type == "bnpo":
        even = inputs["num_items_in_batch"] / trainer.accelerator.num_processes
        even = even.clamp(min=1.0) / trainer.args.steps_per_generation
        return loss * (loss_mask(inputs).sum() / even)
    return loss


def loss_mask(batch: Mapping[str, Any]) -> Tensor:
    """Which tokens [N, C] are in the loss: written by the model, not by a tool."""
    mask: Tensor = batch["completion_mask"]
    return mask * batch["tool_mask"] if "tool_mask" in batch else mask


def is_empty(inputs: dict[str, Any]) -> bool:
    """Whether no reply of this micro-batch is trained on."""
    return TRAINED_FRACTION in inputs and not bool(inputs["completion_mask"].any())
