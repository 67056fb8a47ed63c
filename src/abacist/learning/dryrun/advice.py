"""What a dry run recommends, with its reason and the flag to paste, and what it warns of.

The rules are few and stated where they are applied; docs/scaling.md says what they rest on.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peft import PeftModel

from abacist.learning.config import Config
from abacist.learning.dryrun.activations import Forward
from abacist.learning.dryrun.memory import SAFE_FRACTION, Memory, with_micro_batch
from abacist.learning.dryrun.solverates import GROUP_SIZES

if TYPE_CHECKING:
    from abacist.learning.dryrun.plan import Plan

GIB = 2**30

ENOUGH_MIXED = 0.5  # of the groups: from here on more replies to a problem buy little
ROOMY_FRACTION = 0.7  # of the memory: what may be spent on speed
TRUNCATED_AT_MOST = 0.05
SPARE_LENGTH = 1.5  # times the longest of 99 replies in 100, because replies grow while learning
# Where published GRPO runs on models of 0.5 to 1.5 billion weights agree.
LORA_RATES, FULL_RATES = (1e-5, 1.7e-4), (1e-6, 1.7e-5)
LEAST_WEIGHTS_OF_THE_BANDS = 10**8


@dataclass(frozen=True)
class Recommendation:
    """``flags`` are ready to be pasted; empty where the setting is fine as it is."""

    setting: str
    now: str
    flags: str
    reason: str


def recommend(
    plan: Plan, config: Config, trainer: Any, forward: Forward, context_tokens: int
) -> list[Recommendation]:
    """One recommendation for each setting that a dry run can judge."""
    checkpointing = _checkpointing(plan, trainer, forward)
    use_checkpointing = trainer.args.gradient_checkpointing
    if checkpointing.flags:
        use_checkpointing = not use_checkpointing
    return [
        _group_size(plan, config),
        _budget(plan, context_tokens),
        _learning_rate(config, trainer.model),
        _micro_batch(plan, config, trainer, forward, bool(use_checkpointing)),
        checkpointing,
    ]


def warn(plan: Plan, config: Config) -> list[str]:
    """What would make the run fail, or teach nothing, each with a way out."""
    return [*_memory_warnings(plan), *_signal_warnings(plan), *_disk_warnings(plan, config)]


def _group_size(plan: Plan, config: Config) -> Recommendation:
    size, rates = plan.num_generations, plan.probe.rates
    shares = {other: rates.predicted_mixed(other).value for other in {*GROUP_SIZES, size}}
    now, most = shares[size], max(GROUP_SIZES)

    def keep(reason: str) -> Recommendation:
        return Recommendation("num_generations", str(size), "", reason)

    if plan.probe.truncated_fraction > 0.5:
        return keep("not to be judged while most replies are cut off")
    if now >= ENOUGH_MIXED:
        return keep(f"{now:.0%} of the groups will be mixed")
    if shares[most] < ENOUGH_MIXED / 2:
        return keep(
            f"{now:.0%} of the groups will be mixed, and {shares[most]:.0%} even of {most}: "
            "other problems help, more replies do not"
        )
    larger = [other for other in GROUP_SIZES if other > size]
    better = next((other for other in larger if shares[other] >= ENOUGH_MIXED), most)
    if better <= size:
        return keep(f"{now:.0%} of the groups will be mixed, and larger ones gain little")
    training = config.training
    flags = f"--num_generations {better}"
    if int(training.generation_batch_size or 0) % better:
        factor = -(-better // size)
        flags += f" --gradient_accumulation_steps {training.gradient_accumulation_steps * factor}"
    reason = f"{shares[better]:.0%} of the groups will be mixed, not {now:.0%}"
    return Recommendation("num_generations", str(size), flags, reason)


def _budget(plan: Plan, context_tokens: int) -> Recommendation:
    budget, probe = plan.budget_tokens, plan.probe
    long = probe.length(0.99)
    flags, reason = "", f"99 in 100 replies need at most {long}"
    wanted = _rounded_up(SPARE_LENGTH * long)
    if probe.truncated_fraction > TRUNCATED_AT_MOST:
        room = context_tokens - plan.longest_prompt_tokens
        reason = f"{probe.truncated_fraction:.0%} of the replies are cut off"
        if min(2 * budget, room) > budget:
            flags = f"--max_completion_length {min(2 * budget, room)}"
        else:
            reason += ", and the model's context has no more room"
    elif wanted <= 0.75 * budget:
        flags = f"--max_completion_length {wanted}"
        reason += ": half as much again is room enough, and saves memory"
    return Recommendation("max_completion_length", str(budget), flags, reason)


def _rounded_up(tokens: float) -> int:
    return max(16, -(-int(tokens) // 16) * 16)


def _learning_rate(config: Config, model: Any) -> Recommendation:
    rate = config.training.learning_rate
    is_lora = isinstance(model, PeftModel)
    low, high = LORA_RATES if is_lora else FULL_RATES
    kind = "LoRA" if is_lora else "all weights"
    flags = ""
    if sum(p.numel() for p in model.parameters()) < LEAST_WEIGHTS_OF_THE_BANDS:
        reason = "published bands are for far larger models; the recipe's own is what was measured"
    elif low <= rate <= high:
        reason = f"within what published runs use for {kind}, {low:g} to {high:g}"
    else:
        reason = f"published runs use {low:g} to {high:g} for {kind}"
        flags = f"--learning_rate {4 * low:g}"
    return Recommendation("learning_rate", f"{rate:g}", flags, reason)


def _checkpointing(plan: Plan, trainer: Any, forward: Forward) -> Recommendation:
    rows, is_on = (
        trainer.args.per_device_train_batch_size,
        bool(trainer.args.gradient_checkpointing),
    )
    with_, without = (
        with_micro_batch(plan.memory, trainer, forward, rows, one).training_bytes
        for one in (True, False)
    )
    there = plan.memory.available_bytes
    flags, now = "", "on" if is_on else "off"
    sizes = f"training takes {_gib(without)} without it, {_gib(with_)} with it"
    if is_on and without <= ROOMY_FRACTION * there:
        flags, reason = "--gradient_checkpointing false", f"{sizes}: without it a step is faster"
    elif is_on:
        reason = f"{sizes}, and there are {_gib(there)}"
    elif without > SAFE_FRACTION * there and with_ < without:
        flags, reason = "--gradient_checkpointing true", f"{sizes}, and there are {_gib(there)}"
    else:
        reason = f"training takes {_gib(without)}, and there are {_gib(there)}"
    return Recommendation("gradient_checkpointing", now, flags, reason)


def _micro_batch(
    plan: Plan, config: Config, trainer: Any, forward: Forward, checkpointing: bool
) -> Recommendation:
    args, there = trainer.args, plan.memory.available_bytes
    rows, size = args.per_device_train_batch_size, trainer.num_generations
    in_all = rows * args.gradient_accumulation_steps

    def memory(number: int) -> Memory:
        return with_micro_batch(plan.memory, trainer, forward, number, checkpointing)

    def flags(number: int) -> str:
        return (
            f"--per_device_train_batch_size {number} "
            f"--gradient_accumulation_steps {in_all // number}"
        )

    divisors = [number for number in range(1, in_all + 1) if in_all % number == 0]
    safe = [n for n in divisors if memory(n).training_bytes <= SAFE_FRACTION * there]
    roomy = [
        n for n in safe
        if n % size == 0 and memory(n).training_bytes <= ROOMY_FRACTION * there
    ]  # fmt: skip
    if rows not in safe:
        reason = f"{rows} replies at once need {_gib(memory(rows).training_bytes)}"
        if safe:
            reason += f", {safe[-1]} need {_gib(memory(safe[-1]).training_bytes)}"
            return Recommendation(_MICRO, str(rows), flags(safe[-1]), reason)
        return Recommendation(_MICRO, str(rows), "", f"{reason}, and one is too much already")
    # A CPU gains nothing from more rows at once; a GPU is idle without them.
    if roomy and roomy[-1] > rows and plan.memory.device != "cpu":
        reason = f"{roomy[-1]} fit as well ({_gib(memory(roomy[-1]).training_bytes)}): fewer passes"
        return Recommendation(_MICRO, str(rows), flags(roomy[-1]), reason)
    return Recommendation(_MICRO, str(rows), "", "fits, and more at once would gain little")


_MICRO = "per_device_train_batch_size"


def _memory_warnings(plan: Plan) -> Iterator[str]:
    memory = plan.memory
    phase = "rollout" if memory.rollout_bytes > memory.training_bytes else "training"
    if plan.burst is None:
        how = "ran out in the trial" if memory.fits else "is predicted to run out"
        yield (
            f"Memory {how}: the {phase} needs about {_gib(memory.peak_bytes)}, and there are "
            f"{_gib(memory.available_bytes)}. See the flags below"
            + (
                ", lower --max_completion_length, or write fewer replies at once "
                "(--gradient_accumulation_steps, --eval_batch_size)."
                if phase == "rollout"
                else "."
            )
        )
    elif not memory.fits:
        yield (
            f"Memory is tight: {_gib(memory.peak_bytes)} predicted for the {phase}, "
            f"{_gib(memory.available_bytes)} there, though the trial steps went well."
        )


def _signal_warnings(plan: Plan) -> Iterator[str]:
    probe = plan.probe
    replies, figures = len(probe.lengths), probe.figures
    if probe.truncated_fraction == 1:
        yield (
            f"All {replies} replies were cut off at {plan.budget_tokens} tokens: none ended by "
            "itself. Raise --max_completion_length, or take a model whose chat template it knows."
        )
    if figures["strict"].value == 0:
        yield (
            f"The format was never seen in {replies} replies, so a reward for it alone stays at 0. "
            "Show it (--num_shots 1), or take an instruct model."
        )
    if probe.rates.mean == 0:
        loose = figures["any_format"].value
        yield f"None of {replies} replies was right" + (
            f", but {loose:.0%} hold the right number in another form: the format comes first."
            if loose
            else ": the problems are too hard for this model. Take easier ones, or a larger model."
        )
    elif probe.rates.mean >= 0.98:
        yield (
            f"{probe.rates.mean:.0%} of the replies are right already: there is little to learn. "
            "Take harder problems."
        )
    if probe.varied.value == 0:
        yield (
            "In every group all replies earn the same reward, so the gradient is 0. "
            "Raise --temperature or --num_generations, or change --reward_funcs."
        )


def _disk_warnings(plan: Plan, config: Config) -> Iterator[str]:
    kept = (config.training.save_total_limit or 1) + 1
    wanted = kept * plan.checkpoint_bytes
    place = Path.cwd()
    if "output_dir" in config.settings and config.training.output_dir:
        place = Path(config.training.output_dir)
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    if wanted > free:
        yield (
            f"{kept} checkpoints take {_gib(wanted)}, and {place} has {_gib(free)} free. "
            "Choose another --output_dir, or lower --save_total_limit."
        )


def _gib(count: float) -> str:
    """Bytes as GiB, with as many digits as matter."""
    size = count / GIB
    digits = 0 if size >= 100 else 1 if size >= 1 else 2
    return f"{size:.{digits}f} GiB"
