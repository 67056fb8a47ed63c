"""See what a reward set pays for: which rewards look at the answer, in which layout, from what on.

Nothing of this is declared anywhere; it shows in what right and wrong solutions earn.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from abacist.task.audit.hacks import workless
from abacist.task.audit.ledger import EPSILON
from abacist.task.audit.renderings import (
    ASKED,
    HOMES,
    WRONG,
    Variant,
    layouts,
    slips,
    wrong_solutions,
)
from abacist.task.problems import Problem

TELLS_APART_FRACTION = 0.8  # of the problems on which an answer reward pays more for right
Pay = Callable[[Problem, Sequence[Variant]], "list[list[float | None]]"]


@dataclass(frozen=True, slots=True)
class Calibration:
    """What was seen: ``honest`` and ``wrong`` name the kinds of reply that all is compared with.

    ``answer_rewards`` are the indices of the rewards that tell right from wrong by the answer; each
    is paid from its entry in ``bars`` upwards.
    """

    home: str
    honest: str
    wrong: str
    answer_rewards: frozenset[int]
    bars: list[float]

    def of_usable(self, is_usable: Sequence[bool]) -> Calibration:
        """The same without the rewards that turned out to be unusable."""
        kept = [number for number, usable in enumerate(is_usable) if usable]
        answer_rewards = (at for at, number in enumerate(kept) if number in self.answer_rewards)
        bars = [self.bars[number] for number in kept]
        return Calibration(self.home, self.honest, self.wrong, frozenset(answer_rewards), bars)


def calibrate(sample: Sequence[Problem], pay: Pay) -> Calibration:
    """Pay right and wrong solutions to the sample in every layout, and see.

    The home is the layout in which right earns the most more than wrong; ours, if it is one of
    several equals. Where no reward looks at the answer, the best-paid right solution is the honest
    one: nothing can be expected of an honest writer but to take what is offered for the form.
    """
    pays: dict[str, list[list[float]]] = {}  # by kind of reply, then reward: one for each problem
    most: list[float] = []
    for problem in sample:
        variants = [*layouts(problem), *wrong_solutions(problem), *slips(problem),
                    *workless(problem)]  # fmt: skip
        paid = [[each or 0.0 for each in one] for one in pay(problem, variants)]
        most = [max(one) for one in (zip(most, map(max, paid), strict=True) if most else paid)]
        for at, variant in enumerate(variants):
            booked = pays.setdefault(variant.name, [[] for _ in paid])
            for number, one in enumerate(paid):
                booked[number].append(one[at])
    numbers = range(len(most))

    def mean(name: str, number: int) -> float:
        return sum(pays[name][number]) / len(sample)

    def total(name: str) -> float:
        return round(sum(mean(name, number) for number in numbers), 6)

    def tells_apart(home: str, number: int) -> bool:
        pairs = zip(pays[home][number], pays[_wrong(home)][number], strict=True)
        higher = sum(right > wrong + EPSILON for right, wrong in pairs)
        return higher >= TELLS_APART_FRACTION * len(sample) and not judges_work(home, number)

    def judges_work(home: str, number: int) -> bool:
        """Is it paid for true work whatever the answer, and not for the answer without work?"""
        bare = "a dash for reasoning" if home == ASKED else f"a dash, then {home}"
        without_work = max(mean(bare, number), mean(f"slip without work, {home}", number))
        return mean(f"slip, {home}", number) >= mean(home, number) - EPSILON > without_work

    told = {home: frozenset(n for n in numbers if tells_apart(home, n)) for home in HOMES}
    gain = {
        home: round(sum(mean(home, n) - mean(_wrong(home), n) for n in told[home]), 6)
        for home in HOMES
    }
    home = max(HOMES, key=lambda name: (gain[name], total(name)))  # the first of equals: ours
    honest = home if told[home] else max((each.name for each in layouts(sample[0])), key=total)
    bars = [
        (mean(home, number) + mean(_wrong(home), number)) / 2
        if number in told[home]
        else most[number] / 2
        for number in numbers
    ]
    return Calibration(home, honest, _wrong(home), told[home], bars)


def _wrong(home: str) -> str:
    return WRONG if home == ASKED else f"wrong, {home}"
