"""The verdict in one sentence, and the figures it is made of.

It says "learned" only where the paired interval and the exact test agree.
"""

from __future__ import annotations

import math

from abacist.proof.comparison.change import SIGN_FLIP, Paired
from abacist.proof.comparison.compare import NO_CONTROL, Comparison
from abacist.proof.statistics import SMALLEST_P, Interval

TINY_P = 1e-20
CHANCE = " Chance alone can make a difference like this."


def headline(comparison: Comparison, asked: str = "problems it never saw") -> str:
    """The verdict in one sentence, and a second where the first could be taken for more."""
    accuracy = comparison.accuracy
    said = {"learned": "Learned", "worse": "Got worse", "unproven": "No proven change"}
    control = f"Control, {comparison.control} rewards. " if comparison.control != NO_CONTROL else ""
    return change_sentence(f"{control}{said[judgement(accuracy)]}", accuracy, asked)


def change_sentence(said: str, paired: Paired, asked: str) -> str:
    """What changed in accuracy, after the judgement ``said``; and whether it may be chance."""
    sentence = (
        f"{said}: {percent(paired.before)} → {percent(paired.after)} correct on "
        f"{paired.change.n:,} {asked}, {points(paired.change.value)} points "
        f"{bracket(paired.change)}, {p_words(paired)}; "
        f"gained {len(paired.gained)}, lost {len(paired.lost)}."
    )
    if judgement(paired) == "unproven" and paired.gained + paired.lost:
        sentence += CHANCE
    return sentence


def judgement(paired: Paired) -> str:
    """``"learned"`` or ``"worse"`` where interval and test agree on it, else ``"unproven"``."""
    if paired.is_better:
        return "learned"
    return "worse" if paired.is_worse else "unproven"


def p_words(paired: Paired) -> str:
    """The p-value as ``"p=0.031"``, bounded where it would be printed as zero, or where the test
    that draws can find no smaller one."""
    if paired.test == SIGN_FLIP and paired.p_value <= SMALLEST_P:
        return f"p≤{SMALLEST_P:.0e}"
    if paired.p_value < TINY_P:
        return f"p<{TINY_P:.0e}"
    digits = 2
    # 0.0498 is proven and 0.0501 is not: neither is printed as 0.05.
    while float(f"{paired.p_value:.{digits}g}") == 0.05 != paired.p_value and digits < 9:
        digits += 1
    return f"p={paired.p_value:.{digits}g}"


def percent(interval: Interval) -> str:
    """The value as ``"34.2 %"``."""
    return f"{100 * interval.value:.1f} %" if math.isfinite(interval.value) else "-"


def points(share: float) -> str:
    """A difference of shares in percentage points, signed: ``"+43.8"``."""
    return f"{100 * share:+.1f}" if math.isfinite(share) else "-"


def bracket(interval: Interval) -> str:
    """The bounds in percentage points: ``"[+38.1, +49.5]"``."""
    return f"[{points(interval.low)}, {points(interval.high)}]"
