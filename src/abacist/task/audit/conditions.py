"""How rewards behave at the limits: with length, on long texts, on messages without text.

Everything here looks at one reward, or the set, on few problems and much text.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from abacist.errors import RewardError
from abacist.task.audit.findings import Finding, Kind
from abacist.task.audit.hacks import STRESS, padded, stress
from abacist.task.audit.renderings import Role, Variant, gold_value, numeral, reasoning_of
from abacist.task.audit.trial import MishapKind, Trial, as_message, is_out_of_time
from abacist.task.problems import Problem

GROUP_SIZE = 8
TRL_EPSILON = 1e-4  # TRL adds it to the standard deviation of a group
LENGTHS_CHARS = (1_000, 10_000, 100_000)
SHORTER_LENGTHS_CHARS = (500, 4_000, 16_000)
MAX_GROWTH = 1.6  # exponent of time in length: 1 is linear, 2 quadratic
_NO_TEXT: dict[str, Any] = {
    "None": None,
    "[]": [],
    "content None": [{"role": "assistant", "content": None}],
    "content parts": [{"role": "assistant", "content": [{"type": "text", "text": "7"}]}],
}


class Advantages(NamedTuple):
    """The least and the most advantage that length alone earns in a group, averaged."""

    least: float
    most: float


def length_advantages(
    trials: Sequence[Trial], weights: Sequence[float], problems: Sequence[Problem], *, right: bool
) -> Advantages:
    """Advantages, by TRL's formula, in groups of 8 that differ in nothing but their length."""
    least, most = [], []
    for problem in problems:
        value = gold_value(problem)
        answer = numeral(value if right else value + 1)
        replies = [
            Variant("padding", Role.LAYOUT, padded(reasoning_of(problem), answer, size), answer)
            for size in range(GROUP_SIZE)
        ]
        totals = [0.0] * GROUP_SIZE
        for trial, weight in zip(trials, weights, strict=True):
            paid = zip(totals, trial.pay(problem, replies), strict=True)
            totals = [total + weight * (each or 0.0) for total, each in paid]
        mean, spread = statistics.fmean(totals), statistics.stdev(totals)
        advantages = [(total - mean) / (spread + TRL_EPSILON) for total in totals]
        least.append(min(advantages))
        most.append(max(advantages))
    return Advantages(statistics.fmean(least or [0.0]), statistics.fmean(most or [0.0]))


def length_findings(
    trials: Sequence[Trial], weights: Sequence[float], problems: Sequence[Problem]
) -> Iterator[Finding]:
    """Does length alone tell the members of a group apart, where all are wrong or all right?"""
    said = []
    for name, right in (("all-wrong", False), ("all-right", True)):
        found = length_advantages(trials, weights, problems, right=right)
        if found.most - found.least > 0.02:
            said.append(f"from {found.least:+.2f} to {found.most:+.2f} in {name} groups")
    if said:
        yield Finding.of(
            Kind.LENGTH_LEAK,
            f"advantages {' and '.join(said)} of {GROUP_SIZE} replies that differ only in length",
        )


def stress_findings(trial: Trial, problem: Problem, lengths: Sequence[int]) -> Iterator[Finding]:
    """Does its pay, or its time, run away as a reply gets longer?"""
    bounds: dict[str, str] = {}
    slow: tuple[float, str] | None = None
    for name in STRESS:
        paid, seconds = [], []
        for length in lengths:
            completion = as_message(stress(name, length))
            try:
                pay, took = _timed(trial, completion, problem)
            except RewardError as error:
                if is_out_of_time(error):
                    limit = trial.limit_seconds / 4
                    slow = (limit, f"more than {limit:g} s for {length:,} characters of {name}")
                else:
                    said = f"{length:,} characters of {name}: {error.message}"
                    yield Finding.of(Kind.FAILS, said, trial.name)
                break
            paid.append(pay or 0.0)
            seconds.append(took)
        else:
            if _runs_away(paid, lengths):
                where = "below" if paid[-1] < paid[0] else "above"
                said = f"{paid[-1]:,.4g} for {lengths[-1]:,} characters of {name}"
                bounds.setdefault(where, said)
            if (growth := _growth(seconds, lengths)) > MAX_GROWTH and seconds[-1] > 0.1:
                said = (
                    f"{seconds[-1]:.2g} s for {lengths[-1]:,} characters of {name}, growing with "
                    f"the length to the power of {growth:.1f}"
                )
                slow = max(slow or (0.0, ""), (seconds[-1], said))
        if slow and slow[0] >= trial.limit_seconds / 4:
            break  # it will not get better
    for where, said in bounds.items():
        yield Finding.of(Kind.UNBOUNDED, f"without bound {where}: {said}", trial.name)
    if slow:
        yield Finding.of(Kind.SLOW, slow[1], trial.name)


def _timed(trial: Trial, completion: Any, problem: Problem) -> tuple[float | None, float]:
    """The pay and the CPU seconds: the best of two calls, of four where they are short.

    A busy machine makes a call look slower, never faster. Growth is a ratio, so a short call
    measured too slow hides it as surely as a long one feigns it.
    """
    best = math.inf
    for attempt in range(4):
        start = time.process_time()
        pay = trial.call(problem, [completion])[0]
        best = min(best, time.process_time() - start)
        if attempt and best > 0.05:
            break
    return pay, best


def _growth(seconds: Sequence[float], lengths: Sequence[int]) -> float:
    """The power of the length with which time grew over the last step."""
    if min(seconds[-2:]) <= 0:
        return 0.0
    return math.log(seconds[-1] / seconds[-2]) / math.log(lengths[-1] / lengths[-2])


def _runs_away(paid: Sequence[float], lengths: Sequence[int]) -> bool:
    early, late = paid[1] - paid[0], paid[2] - paid[1]
    in_step = (lengths[2] - lengths[1]) / (lengths[1] - lengths[0])
    return early * late > 0 and abs(late) > max(0.5, 0.5 * in_step * abs(early))


def shape_findings(trial: Trial, problem: Problem) -> Iterator[Finding]:
    """Does it raise on a message that holds no text, or holds it in parts?"""
    failed = []
    for name, completion in _NO_TEXT.items():
        try:
            trial.call(problem, [completion])
        except RewardError as error:
            failed.append((name, error.message))
    if failed:
        names = ", ".join(name for name, _ in failed)
        yield Finding.of(Kind.FRAGILE, f"on {names}: {failed[0][1]}", trial.name)


def mishap_findings(trial: Trial) -> Iterator[Finding]:
    """What went wrong when it was called on ordinary text, once for each way."""
    kinds = {
        MishapKind.FAILED: Kind.FAILS,
        MishapKind.HUNG: Kind.HANGS,
        MishapKind.NO_COLUMN: Kind.NO_COLUMN,
    }
    for mishap_kind, kind in kinds.items():
        mishaps = [mishap for mishap in trial.mishaps if mishap.kind is mishap_kind]
        if not mishaps:
            continue
        evidence = mishaps[0].message
        if mishap_kind is MishapKind.NO_COLUMN:
            evidence = f"'{trial.name}' {evidence}; there are {', '.join(trial.columns)}"
        else:
            evidence = f"the reply '{mishaps[0].sample}': {evidence}"
            if trial.num_failed > 1:
                evidence += f" ({trial.num_failed:,} replies in all)"
        yield Finding.of(kind, evidence, trial.name)
