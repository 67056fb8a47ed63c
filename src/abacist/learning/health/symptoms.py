"""The rules by which a run is judged ill: one short function each, and what to do about it.

A rule speaks of a stretch of steps (``course.py``), and compares it with the opening where a
change is the fault. Thresholds were chosen so that healthy runs of the built-in model and a control
run on random rewards are told apart. ``RULES`` is the table that ``pathologies.Watch``
goes through.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from abacist.learning.health.course import Course, Facts, Row, Said, usual_norm

Rule = Callable[[Course], "Said | None"]

FORMATS = (
    *("strict_format", "soft_format", "xml_count"),
    *("strict_format_reward_func", "soft_format_reward_func", "xmlcount_reward_func"),
)
LARGEST_ENGINE_DIFFERENCE = 0.1  # nats; rounding in bfloat16 costs about a hundredth
LARGEST_KL = 1.0  # nats a token
LARGE_MODEL = 100e6  # parameters; below it models bear, and need, higher rates
LORA_RATES = (1e-5, 1e-3, 1e-2)  # lowest, highest, highest for a small model
FULL_RATES = (1e-7, 5e-5, 2e-4)


def no_signal(course: Course) -> Said | None:
    """GRPO learns from differences within a group: where there are none, nothing moves."""
    silent = course.now("frac_reward_zero_std")
    if not course.is_long_enough or silent is None or silent < 0.95 or course.is_solved():
        return None
    reward = course.now("reward")
    if reward is None:
        return Said(
            f"in {course.stretch()} no reward applied to any reply (all were None or NaN), so the "
            "advantages are zero and the weights do not move.",
            "A reward returns None where it does not apply. See what each is given "
            "(rollouts/*.parquet), and why it declines: a column that is missing, an answer that "
            "cannot be read.",
        )
    remedy = (
        "Read some replies (rollouts/*.parquet). If none can earn anything, show the format with "
        "--num_shots, allow longer replies, or pay for partial success; if all earn the same, "
        "give harder problems."
        if reward <= 0.0
        else "If the problems are too easy or too hard, choose others or sample them by solve rate "
        "(--problem_sampling solve_rate); more replies a problem (--num_generations) and a "
        "temperature of 1 make groups differ."
    )
    return Said(
        f"in {course.stretch()} {silent:.0%} of the groups had no two replies of different reward "
        f"(mean {reward:.3g}), so their advantages are zero and the weights do not move.",
        remedy,
    )


def dead_reward(course: Course) -> Said | None:
    """A reward that never varied teaches nothing; one that fell to 0 for good has collapsed."""
    if not course.is_long_enough:
        return None
    dead: dict[str, list[str]] = {}
    for name in course.constant:
        now = course.now(f"rewards/{name}/mean")
        spread = course.now(f"rewards/{name}/std") or 0.0
        paid = "nothing at all (None)" if now is None else f"{now:.3g}"
        if name not in course.varied:
            dead.setdefault(f"paid {paid} to every reply so far", []).append(f"'{name}'")
        elif now == 0.0 and spread == 0.0:
            dead.setdefault(f"paid 0 to every reply of {course.stretch()}", []).append(f"'{name}'")
    if not dead:
        return None
    return Said(
        "; ".join(f"{', '.join(names)} {what}" for what, names in dead.items()) + ".",
        "A reward that does not vary teaches nothing. Try it on replies you know (`abacist audit`, "
        "or by hand), and see what it is given: rollouts/*.parquet holds every reply.",
    )


def never_stops(course: Course) -> Said | None:
    """No reply has ever ended by itself: template and stop token do not belong together."""
    if not course.is_long_enough or course.has_stopped:
        return None
    return Said(
        f"no reply has ended by itself in {course.step} steps: the model does not write its stop "
        "token, or writes one that does not count.",
        "The chat template or the stop token is wrong for this model (a base model has none of "
        "its own): take the instruct version or show examples with --num_shots. Else the budget is "
        "far too small: raise --max_completion_length.",
    )


def cut_replies(course: Course) -> Said | None:
    """Replies cut at the budget cannot hold an answer."""
    cut = course.now("completions/clipped_ratio")
    if not course.is_long_enough or cut is None or cut < 0.5 or not course.has_stopped:
        return None
    tokens = course.facts.max_completion_length
    budget = f" of {tokens} tokens" if tokens else ""
    return Said(
        f"in {course.stretch()} {cut:.0%} of the replies were cut off at the budget{budget}.",
        "Raise --max_completion_length; if replies grew to that length, lower the learning rate or "
        "pay for brevity.",
    )


def format_only(course: Course) -> Said | None:
    """The format is learned first; when the answers never follow, only the format is learned."""
    long_enough = course.step >= course.opening_steps + 3 * course.patience_steps
    if not long_enough or course.goal() == "reward" or course.is_solved() or course.has_improved():
        return None
    risen = []
    for name in FORMATS:
        then, now = course.then(f"rewards/{name}/mean"), course.now(f"rewards/{name}/mean")
        spread = course.then(f"rewards/{name}/std") or 0.0
        if then is not None and now is not None and now - then > max(0.05, 0.5 * spread):
            risen.append(f"{name} {then:.2f} → {now:.2f}")
    if not risen:
        return None
    then, now = course.then(course.goal()) or 0.0, course.now(course.goal()) or 0.0
    return Said(
        f"the format is being learned ({', '.join(risen)}) and the answers are not "
        f"(correctness {then:.2f} → {now:.2f}).",
        "Give correctness more weight (--reward_weights) or leave the format rewards out once they "
        "are won; try problems the model solves sometimes, and more replies to each.",
    )


def length(course: Course) -> Said | None:
    """Replies that shrink to nothing, or grow without getting better."""
    then, now = course.then("completions/mean_length"), course.now("completions/mean_length")
    if not course.has_changed_since_opening or not then or now is None or course.has_improved():
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


def entropy(course: Course) -> Said | None:
    """A policy that has stopped exploring before it succeeded, or that has turned to noise."""
    then, now = course.then("entropy"), course.now("entropy")
    if not course.has_changed_since_opening or not then or now is None:
        return None
    if course.is_solved() or course.has_improved():
        return None
    if now < 0.1 * then and (course.now("frac_reward_zero_std") or 0.0) >= 0.5:
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


def kl_drift(course: Course) -> Said | None:
    """Far from the reference model, which healthy runs leave by hundredths of a nat."""
    kl = course.now("kl")
    if not course.is_long_enough or kl is None or kl <= LARGEST_KL:
        return None
    return Said(
        f"the policy is {kl:.3g} nats a token away from the model it started from.",
        "Lower the learning rate or raise --beta, and start again from an earlier checkpoint.",
    )


def not_finite(course: Course) -> Said | None:
    """Loss or gradient was NaN or infinite. fp16's scaler meets such steps now and then."""
    unknown = [row for _, row in course.recent if _gone(row, "loss") or _gone(row, "grad_norm")]
    ten = course.patience_steps
    if not course.refused_steps and len(unknown) < (ten if course.facts.fp16 else 1):
        return None
    refused = ", and the step was refused" if course.refused_steps else ""
    return Said(
        f"at step {course.step} the loss or its gradient was not a finite number{refused}.",
        "Lower the learning rate, take bfloat16 or float32 in place of float16, and look for a "
        "reward of extreme size. Weights of a step that was refused are as they were before it.",
    )


def gradient(course: Course) -> Said | None:
    """The gradient, before it is clipped, is many times what it used to be."""
    usual = usual_norm(course.norms)
    if usual is None:
        return None
    latest = sorted(list(course.norms)[-3:])[1]
    if latest <= max(20 * usual, 10 * course.facts.max_grad_norm):
        return None
    return Said(
        f"the gradient norm is {latest:.3g}, where {usual:.3g} was usual.",
        "Lower the learning rate or --max_grad_norm; see whether a reward changed its scale.",
    )


def two_engines(course: Course) -> Said | None:
    """The engine that samples and the model that learns disagree about the same tokens."""
    difference = course.now("sampling/sampling_logp_difference/mean")
    if difference is None or difference <= LARGEST_ENGINE_DIFFERENCE:
        return None
    return Said(
        f"the engine that samples and the model that learns differ by {difference:.3g} nats a "
        f"token, where rounding allows {LARGEST_ENGINE_DIFFERENCE}.",
        "They hold different weights: check that vLLM serves this base model and receives the "
        "adapter, or train without --use_vllm.",
    )


def held_out_fall(course: Course) -> Said | None:
    """What is paid is no longer what is wanted: held-out accuracy has fallen from its best."""
    if course.best_accuracy is None or course.accuracy is None:
        return None
    best, at_step = course.best_accuracy
    if course.accuracy > best - 0.15:
        return None
    return Said(
        f"held-out accuracy has fallen to {course.accuracy:.1%} from {best:.1%} at step {at_step}.",
        f"Go back to the checkpoint nearest step {at_step}; lower the learning rate, and audit "
        "rewards of your own: they may be paying for something else.",
    )


def learning_rate(course: Course) -> Said | None:
    """The rate against the band in which published runs of its kind have learned."""
    return rate_out_of_band(course.facts)


def rate_out_of_band(facts: Facts) -> Said | None:
    """Known before the first step. LoRA wants about ten times the rate of full fine-tuning.

    >>> rate_out_of_band(Facts(learning_rate=4e-5, parameters=1_500_000_000))
    >>> print(rate_out_of_band(Facts(learning_rate=1e-6)).evidence)
    the learning rate of 1e-06 is outside 1e-05 to 0.01, in which LoRA has been seen to learn.
    """
    rate = facts.learning_rate
    if rate is None or math.isnan(rate):
        return None
    kind, rates = ("LoRA", LORA_RATES) if facts.uses_lora else ("full fine-tuning", FULL_RATES)
    is_large = facts.parameters is not None and facts.parameters >= LARGE_MODEL
    lowest, highest = rates[0], rates[1] if is_large else rates[2]
    if lowest <= rate <= highest:
        return None
    return Said(
        f"the learning rate of {rate:g} is outside {lowest:g} to {highest:g}, in which {kind} has "
        "been seen to learn.",
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
