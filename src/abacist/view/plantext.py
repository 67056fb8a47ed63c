"""The plan of a run on one screen: memory, time, what there is to learn, what to change.

Lines of plain text, at most 96 columns wide.
"""

from __future__ import annotations

import textwrap
from collections.abc import Iterator

from abacist.learning.dryrun.memory import Memory, gib
from abacist.learning.dryrun.plan import Plan
from abacist.learning.dryrun.probe import GROUP_SIZES
from abacist.view.pace import duration
from abacist.view.plaintext import visible

WIDTH = 96
BAR_COLUMNS = 30
_BOTH = "held throughout"


def plan_text(plan: Plan) -> str:
    """Everything a person decides by, the verdict first, then warnings and flags to paste."""
    parts = (_memory_lines, _time_lines, _signal_lines, _advice_lines)
    blocks = [[_headline(plan)], *([*lines(plan)] for lines in parts)]
    return "\n\n".join("\n".join(block) for block in blocks if block)


def _headline(plan: Plan) -> str:
    name = visible(plan.model)
    name = name if len(name) <= 40 else f"…{name[-39:]}"
    if not plan.fits:
        return f"{name}: this run does not fit into memory as it is set."
    total = duration(sum(plan.seconds.values()))
    return (
        f"{name}: {plan.steps:,} steps of {plan.problems_per_step} problems × "
        f"{plan.num_generations} replies, about {total} in all."
    )


def _memory_lines(plan: Plan) -> Iterator[str]:
    memory = plan.memory
    yield (
        f"Memory on {memory.device}, predicted for replies that all use the whole budget "
        f"({gib(memory.available_bytes)} available)"
    )
    shared = sum(part.bytes for part in memory.parts if part.phase == "both")
    yield _memory_line(_BOTH, shared, memory, "both")
    yield _memory_line("rollout, at its peak", memory.rollout_bytes, memory, "rollout")
    yield _memory_line("training, at its peak", memory.training_bytes, memory, "training")
    if plan.burst is not None and plan.burst.growth_bytes is not None:
        yield _folded(
            "measured in the trial steps, above the loaded model and with the replies they had: "
            f"rollout {gib(plan.burst.rollout_growth_bytes or 0)}, "
            f"training {gib(plan.burst.training_growth_bytes or 0)}"
        )


def _memory_line(label: str, total: int, memory: Memory, phase: str) -> str:
    parts = sorted((p for p in memory.parts if p.phase == phase), key=lambda p: -p.bytes)
    listed = ", ".join(f"{part.name} {gib(part.bytes)}" for part in parts)
    return _folded(f"{label:<22} {gib(total):>9}  {listed}", hang=36)


def _time_lines(plan: Plan) -> Iterator[str]:
    burst = plan.burst
    if burst is None:
        return
    warm = "after one to warm up" if burst.is_warm else "cold, so rather too long"
    steps = "1 step" if burst.steps == 1 else f"{burst.steps} steps"
    yield f"Time, measured on {steps}, {warm}"
    yield (
        f"  a step {_seconds(burst.step_seconds)}: rollout {_seconds(burst.rollout_seconds)} "
        f"({burst.rollout_tokens_per_second:,.0f} tokens/s), training "
        f"{_seconds(burst.training_seconds)} ({burst.training_tokens_per_second:,.0f} tokens/s)"
    )
    listed = ", ".join(
        f"{name} {duration(seconds)}" for name, seconds in plan.seconds.items() if seconds >= 0.5
    )
    yield _folded(f"the run: {listed}")
    if plan.within_hours:
        yield _folded(plan.within_hours)


def _signal_lines(plan: Plan) -> Iterator[str]:
    probe, budget = plan.probe, plan.budget_tokens
    rates = probe.rates
    yield (
        f"What there is to learn: {len(rates.solved)} training problems, {rates.samples} sampled "
        "replies to each, untrained"
    )
    counts = rates.histogram()
    for right, problems in enumerate(counts):
        bar = "█" * round(BAR_COLUMNS * problems / max(counts))
        label = f"{right} of {rates.samples} right"
        yield f"  {label:<14} {problems:>4}  {bar}".rstrip()
    shares = ", ".join(
        f"{size}: {share.value:.0%} [{share.low:.0%}, {share.high:.0%}]"
        for size in GROUP_SIZES
        for share in [rates.predicted_mixed(size)]
    )
    yield _folded(f"groups that will be mixed, by size: {shares}")
    found = probe.figures
    yield _folded(
        f"right {found['correct'].value:.0%}, in any format {found['any_format'].value:.0%}, "
        f"strict format {found['strict'].value:.0%}; groups whose rewards differ "
        f"{probe.varied.value:.0%}"
    )
    paid = ", ".join(f"{visible(name)} {mean.value:.2f}" for name, mean in probe.rewards.items())
    yield _folded(f"mean rewards: {paid}")
    yield _folded(
        f"tokens a reply: half at most {probe.length(0.5)}, 99 in 100 at most "
        f"{probe.length(0.99)}, budget {budget}; cut off {probe.truncated_fraction:.0%}"
    )


def _advice_lines(plan: Plan) -> Iterator[str]:
    for warning in plan.warnings:
        yield _folded(f"Warning: {visible(warning)}", hang=2, indent=0)
    changed = [one for one in plan.recommendations if one.flags]
    kept = [one for one in plan.recommendations if not one.flags]
    if changed:
        yield "Better, by these measurements"
    for one in changed:
        yield f"  {one.flags}"
        yield _folded(f"{one.setting} is {one.now}: {one.reason}", hang=6, indent=6)
    if kept:
        yield "Keep"
    for one in kept:
        yield _folded(f"{one.setting} {one.now}: {one.reason}", hang=6)


def _folded(text: str, hang: int = 4, indent: int = 2) -> str:
    first, others = " " * indent, " " * hang
    return textwrap.fill(
        text, WIDTH, initial_indent=first, subsequent_indent=others, break_on_hyphens=False
    )


def _seconds(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds < 10 else duration(seconds)
