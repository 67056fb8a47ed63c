"""The health rules: what can be wrong with a run that does not crash, with evidence and remedy.

A policy-gradient run that learns nothing looks like one that does: steps pass, numbers are logged.
Each rule is a short function of the metrics history. It looks at the latest stretch of steps, and
compares it with the opening where a change is the fault. :class:`Watch` applies :data:`RULES` row
by row: while a run trains (``guard.py``) and, fed from ``metrics.jsonl``, after it has ended
(``abacist doctor RUN``). The thresholds separate healthy runs of the built-in model from a control
run on random rewards.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple

from abacist.learning.health.history import (
    Facts,
    MetricsHistory,
    Row,
    Said,
    reward_names,
    silent_fraction,
    usual_norm,
)
from abacist.task.rewards import built_in

Rule = Callable[[MetricsHistory], "Said | None"]

LARGEST_ENGINE_DIFFERENCE = 0.1  # nats; rounding in bfloat16 costs about a hundredth
LARGEST_KL = 1.0  # nats a token
LARGE_MODEL = 100e6  # parameters; below it models bear, and need, higher rates


class RateBand(NamedTuple):
    """The learning rates at which training of one kind has been seen to learn.

    ``highest_of_small`` bounds models of fewer than :data:`LARGE_MODEL` parameters. ``start`` is
    the rate to begin with where nothing is known.
    """

    kind: str
    lowest: float
    highest: float
    highest_of_small: float
    start: float


#: LoRA wants about ten times the rate of full fine-tuning. The dry run reads this table too.
RATE_BANDS = {
    True: RateBand("LoRA", 1e-5, 1e-3, 1e-2, start=4e-5),
    False: RateBand("full fine-tuning", 1e-7, 5e-5, 2e-4, start=4e-6),
}


def no_signal(history: MetricsHistory) -> Said | None:
    """GRPO learns from differences within a group: where there are none, nothing moves."""
    silent = history.silent()
    if not history.is_long_enough or silent is None or silent < 0.95 or history.is_solved():
        return None
    equal = history.now("frac_reward_zero_std")
    if equal is not None and equal < 0.95:
        gated = history.now("frac_outcome_gated") or 0.0
        why = f"; --outcome_gating silenced {gated:.0%}, all right or all wrong" if gated else ""
        return Said(
            f"in {history.stretch()} {silent:.0%} of the groups taught nothing, although rewards "
            f"differ in {1 - equal:.0%}: replies that were cut off do not count{why}. Advantages "
            "are zero, and the weights do not move.",
            "Choose problems that are solved sometimes (--problem_sampling solve_rate, easier or "
            "harder ones), raise --max_completion_length where replies are cut off, or leave out "
            "--outcome_gating.",
        )
    reward = history.now("reward")
    if reward is None:
        return Said(
            f"in {history.stretch()} no reward applied to any reply (all were None or NaN), so the "
            "advantages are zero and the weights do not move.",
            "A reward returns None where it does not apply. See what each is given "
            "(`abacist show RUN`), and why it declines: a column that is missing, an answer that "
            "cannot be read.",
        )
    remedy = (
        "Read some replies (`abacist show RUN`). If none can earn anything, show the format with "
        "--num_shots, allow longer replies, or pay for partial success; if all earn the same, "
        "give harder problems."
        if reward <= 0.0
        else "If the problems are too easy or too hard, choose others or sample them by solve rate "
        "(--problem_sampling solve_rate); more replies a problem (--num_generations) and a "
        "temperature of 1 make groups differ."
    )
    return Said(
        f"in {history.stretch()} {silent:.0%} of the groups had no two replies of different reward "
        f"(mean {reward:.3g}), so their advantages are zero and the weights do not move.",
        remedy,
    )


def dead_reward(history: MetricsHistory) -> Said | None:
    """A reward that never varied teaches nothing; one that fell to 0 for good has collapsed."""
    if not history.is_long_enough:
        return None
    dead: dict[str, list[str]] = {}
    for name in history.constant:
        now = history.now(f"rewards/{name}/mean")
        spread = history.now(f"rewards/{name}/std") or 0.0
        paid = "nothing at all (None)" if now is None else f"{now:.3g}"
        if name not in history.varied:
            dead.setdefault(f"paid {paid} to every reply so far", []).append(f"'{name}'")
        elif now == 0.0 and spread == 0.0:
            dead.setdefault(f"paid 0 to every reply of {history.stretch()}", []).append(f"'{name}'")
    if not dead:
        return None
    return Said(
        "; ".join(f"{', '.join(names)} {what}" for what, names in dead.items()) + ".",
        "A reward that does not vary teaches nothing. Try it on replies you know (`abacist audit`, "
        "or by hand), and see what it is given: `abacist show RUN` shows every reply.",
    )


def never_stops(history: MetricsHistory) -> Said | None:
    """No reply has ever ended by itself: template and stop token do not belong together."""
    if not history.is_long_enough or history.has_stopped:
        return None
    return Said(
        f"no reply has ended by itself in {history.step} steps: the model does not write its stop "
        "token, or writes one that does not count.",
        "The chat template or the stop token is wrong for this model (a base model has none of "
        "its own): take the instruct version or show examples with --num_shots. Else the budget is "
        "far too small: raise --max_completion_length.",
    )


def cut_replies(history: MetricsHistory) -> Said | None:
    """Many replies are cut off at the budget, before their answer."""
    cut = history.now("completions/clipped_ratio")
    if not history.is_long_enough or cut is None or cut < 0.5 or not history.has_stopped:
        return None
    tokens = history.facts.max_completion_length
    budget = f" of {tokens} tokens" if tokens else ""
    return Said(
        f"in {history.stretch()} {cut:.0%} of the replies were cut off at the budget{budget}.",
        "Raise --max_completion_length; if replies grew to that length, lower the learning rate or "
        "pay for brevity.",
    )


def format_only(history: MetricsHistory) -> Said | None:
    """The format is learned first; when the answers never follow, only the format is learned."""
    long_enough = history.step >= history.opening_steps + 3 * history.patience_steps
    if (
        not long_enough
        or history.goal() == "reward"
        or history.is_solved()
        or history.has_improved()
    ):
        return None
    risen = []
    for name in reward_names(history.recent[-1][1]):
        if (ours := built_in(name)) is None or not ours.is_form_only:
            continue
        then, now = history.then(f"rewards/{name}/mean"), history.now(f"rewards/{name}/mean")
        spread = history.then(f"rewards/{name}/std") or 0.0
        if then is not None and now is not None and now - then > max(0.05, 0.5 * spread):
            risen.append(f"{name} {then:.2f} → {now:.2f}")
    if not risen:
        return None
    then, now = history.then(history.goal()) or 0.0, history.now(history.goal()) or 0.0
    return Said(
        f"the format is being learned ({', '.join(risen)}) and the answers are not "
        f"(correctness {then:.2f} → {now:.2f}).",
        "Give correctness more weight (--reward_weights) or leave the format rewards out once they "
        "are won; try problems the model solves sometimes, and more replies to each.",
    )


def length(history: MetricsHistory) -> Said | None:
    """Replies that shrink to nothing, or grow without getting better."""
    then, now = history.then("completions/mean_length"), history.now("completions/mean_length")
    if not history.has_changed_since_opening or not then or now is None or history.has_improved():
        return None
    if now < 0.4 * then:
        return Said(
            f"replies have collapsed from {then:.0f} to {now:.0f} tokens, and do not earn more.",
            "Something pays for brevity: a length penalty, or a loss that favours short replies "
            "(--loss_type dapo does not). Lower the learning rate, or start from a checkpoint "
            "before the fall.",
        )
    if now > 2 * then:
        return Said(
            f"replies have grown from {then:.0f} to {now:.0f} tokens, and do not earn more.",
            "Something pays for length, or the policy is dissolving: read the last rollouts, lower "
            "the learning rate, or pay for brevity.",
        )
    return None


def entropy(history: MetricsHistory) -> Said | None:
    """A policy that has stopped exploring before it succeeded, or that has turned to noise."""
    then, now = history.then("entropy"), history.now("entropy")
    if not history.has_changed_since_opening or not then or now is None:
        return None
    if history.is_solved() or history.has_improved():
        return None
    if now < 0.1 * then and (history.now("frac_reward_zero_std") or 0.0) >= 0.5:
        return Said(
            f"entropy has collapsed from {then:.3g} to {now:.3g} nats a token without a gain: the "
            "replies to a problem are nearly all alike.",
            "Lower the learning rate, keep --temperature at 1, or hold on to the start with --beta "
            "0.01.",
        )
    if now > 3 * then and now > 1.0:
        return Said(
            f"entropy has risen from {then:.3g} to {now:.3g} nats a token without a gain: the "
            "policy is turning into noise.",
            "Lower the learning rate, and start again from a checkpoint before the rise.",
        )
    return None


def kl_drift(history: MetricsHistory) -> Said | None:
    """The policy is far from the reference model; healthy runs drift by hundredths of a nat."""
    kl = history.now("kl")
    if not history.is_long_enough or kl is None or kl <= LARGEST_KL:
        return None
    return Said(
        f"the policy is {kl:.3g} nats a token away from the model it started from.",
        "Lower the learning rate or raise --beta, and start again from an earlier checkpoint.",
    )


def not_finite(history: MetricsHistory) -> Said | None:
    """Loss or gradient was NaN or infinite. fp16's scaler meets such steps now and then."""
    unknown = [row for _, row in history.recent if _gone(row, "loss") or _gone(row, "grad_norm")]
    ten = history.patience_steps
    if not history.refused_steps and len(unknown) < (ten if history.facts.fp16 else 1):
        return None
    refused = ", and the step was refused" if history.refused_steps else ""
    return Said(
        f"at step {history.step} the loss or its gradient was not a finite number{refused}.",
        "Lower the learning rate, take bfloat16 or float32 in place of float16, and look for a "
        "reward of extreme size. Weights of a step that was refused are as they were before it.",
    )


def gradient(history: MetricsHistory) -> Said | None:
    """The gradient, before it is clipped, is many times what it used to be."""
    usual = usual_norm(history.norms)
    if usual is None:
        return None
    latest = sorted(list(history.norms)[-3:])[1]
    if latest <= max(20 * usual, 10 * history.facts.max_grad_norm):
        return None
    return Said(
        f"the gradient norm is {latest:.3g}, where {usual:.3g} was usual.",
        "Lower the learning rate or --max_grad_norm; see whether a reward changed its scale.",
    )


def two_engines(history: MetricsHistory) -> Said | None:
    """The engine that samples and the model that learns disagree about the same tokens."""
    difference = history.now("sampling/sampling_logp_difference/mean")
    if difference is None or difference <= LARGEST_ENGINE_DIFFERENCE:
        return None
    return Said(
        f"the engine that samples and the model that learns differ by {difference:.3g} nats a "
        f"token, where rounding allows {LARGEST_ENGINE_DIFFERENCE}.",
        "They hold different weights: check that vLLM serves this base model and receives the "
        "adapter, or train without --use_vllm.",
    )


def held_out_fall(history: MetricsHistory) -> Said | None:
    """What is paid is no longer what is wanted: held-out accuracy has fallen from its best."""
    if history.best_accuracy is None or history.accuracy is None:
        return None
    best, at_step = history.best_accuracy
    if history.accuracy > best - 0.15:
        return None
    return Said(
        f"eval_accuracy has fallen to {history.accuracy:.1%} from {best:.1%} at step {at_step}.",
        f"Go back to the checkpoint nearest step {at_step}; lower the learning rate, and audit "
        "rewards of your own: they may be paying for something else.",
    )


def learning_rate(history: MetricsHistory) -> Said | None:
    """The rate against the band in which published runs of its kind have learned."""
    return rate_out_of_band(history.facts)


def rate_band(facts: Facts) -> tuple[RateBand, float]:
    """The band for what is trained, and its upper end for a model of this size."""
    band = RATE_BANDS[facts.uses_lora]
    is_large = facts.parameters is not None and facts.parameters >= LARGE_MODEL
    return band, band.highest if is_large else band.highest_of_small


def rate_out_of_band(facts: Facts) -> Said | None:
    """What is wrong with the learning rate, if anything. It is known before the first step.

    >>> rate_out_of_band(Facts(learning_rate=4e-5, parameters=1_500_000_000))
    >>> print(rate_out_of_band(Facts(learning_rate=1e-6)).evidence)
    the learning rate of 1e-06 is outside 1e-05 to 0.01, in which LoRA has been seen to learn.
    """
    rate = facts.learning_rate
    if rate is None or math.isnan(rate):
        return None
    band, highest = rate_band(facts)
    if band.lowest <= rate <= highest:
        return None
    return Said(
        f"the learning rate of {rate:g} is outside {band.lowest:g} to {highest:g}, in which "
        f"{band.kind} has been seen to learn.",
        "Below it nothing may happen, above it the model may unlearn; set --learning_rate.",
    )


def _gone(row: Row, name: str) -> bool:
    """Whether a metric was logged and was no finite number, which a file holds as null."""
    value = row.get(name, 0.0)
    return value is None or (isinstance(value, float) and not math.isfinite(value))


RULES: dict[str, Rule] = {
    "no signal": no_signal,
    "dead reward": dead_reward,
    "never stops": never_stops,
    "cut replies": cut_replies,
    "format only": format_only,
    "length": length,
    "entropy": entropy,
    "KL drift": kl_drift,
    "not finite": not_finite,
    "gradient": gradient,
    "two engines": two_engines,
    "held-out fall": held_out_fall,
    "learning rate": learning_rate,
}


@dataclass(frozen=True, slots=True)
class Diagnosis:
    """A named fault. It held from ``first_step`` until at least ``last_step``."""

    name: str
    evidence: str
    remedy: str
    first_step: int
    last_step: int

    def __str__(self) -> str:
        return f"{self.name}: {self.evidence}\n  {self.remedy}"


class Watch:
    """Reads a run row by row and says what it finds, each fault once.

    >>> row = {"loss": 0.0, "reward": 0.0, "frac_reward_zero_std": 1.0}
    >>> watch = Watch(Facts(learning_rate=1e-4, problems_per_step=4))
    >>> [d.name for step in range(1, 20) for d in watch.see({**row, "step": step})]
    ['no signal']
    """

    def __init__(self, facts: Facts) -> None:
        self.history = MetricsHistory(facts)
        self.found: dict[str, Diagnosis] = {}
        self.zero_advantage_steps = 0

    def see(self, row: Row) -> list[Diagnosis]:
        """Take in one row of the log; returns the faults that were not known before it."""
        before = self.history.step
        self.history.add(row)
        steps = self.history.step - before
        if steps > 0:
            is_zero = (silent_fraction(row) or 0.0) > 0.999
            self.zero_advantage_steps = self.zero_advantage_steps + steps if is_zero else 0
        elif "eval_accuracy" not in row:
            return []
        new = []
        for name, rule in RULES.items():
            if (said := rule(self.history)) is None:
                continue
            known = self.found.get(name)
            if known is None:
                diagnosis = Diagnosis(name, *said, self.history.step, self.history.step)
                new.append(diagnosis)
                self.found[name] = diagnosis
            else:
                # The first evidence is what was told; the last step says whether it went on.
                self.found[name] = replace(known, last_step=self.history.step)
        return new
