"""What every kind of reply earned, summed over the problems of an audit."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from abacist.task.audit.renderings import Role, Variant

EPSILON = 1e-9


@dataclass
class Row:
    """One kind of reply. Means are over problems; a reward that does not apply counts as 0."""

    name: str
    role: Role
    num_rewards: int
    num_problems: int = 0  # real ones, whose pay is summed
    num_replies: int = 0  # made-up edge cases too, as in num_paid
    total: float = 0.0
    difference: float = 0.0  # to the honest solution of the same problem, summed
    difference_squared: float = 0.0

    def __post_init__(self) -> None:
        self.rewards = [0.0] * self.num_rewards  # sums, weighted
        self.num_paid = [0] * self.num_rewards  # on how many problems each reward was paid
        self.paid_answers: list[list[str]] = [[] for _ in self.rewards]  # a few, for each reward
        self.unpaid_answers: list[list[str]] = [[] for _ in self.rewards]

    @property
    def mean(self) -> float:
        """The mean total."""
        return self.total / max(1, self.num_problems)

    def reward_mean(self, number: int) -> float:
        return self.rewards[number] / max(1, self.num_problems)

    @property
    def advantage(self) -> float:
        """By how much it earns more than the honest solution, on average."""
        return self.difference / max(1, self.num_problems)

    @property
    def is_better(self) -> bool:
        """It earns more than the honest solution, by more than four standard errors."""
        if self.num_problems < 2 or self.advantage <= EPSILON:
            return False
        variance = self.difference_squared / self.num_problems - self.advantage**2
        return self.advantage > 4 * math.sqrt(max(0.0, variance) / self.num_problems)

    @property
    def is_as_good(self) -> bool:
        return self.num_problems > 0 and self.advantage >= -EPSILON


_MAX_EXAMPLES = 4


class Ledger:
    """The rows of all kinds of replies, and the most that was ever paid."""

    def __init__(self, num_rewards: int, honest: str) -> None:
        self.num_rewards = num_rewards
        self.honest = honest
        self.rows: dict[str, Row] = {}
        # From here on a reward counts as paid; set once the calibration has seen what it pays.
        self.bars = [math.inf] * num_rewards
        self.most = [-math.inf] * num_rewards
        self.least = [math.inf] * num_rewards
        self.most_total = -math.inf
        self.num_problems = self.num_replies = 0

    def add(
        self,
        variants: Sequence[Variant],
        pays: Sequence[Sequence[float | None]],
        *,
        is_edge: bool = False,
    ) -> None:
        """Book what each reward (first index of ``pays``) gave for each variant of a problem."""
        self.num_problems += not is_edge
        self.num_replies += len(variants)
        totals = [sum(paid or 0.0 for paid in reply) for reply in zip(*pays, strict=True)]
        if not is_edge:
            self.most_total = max(self.most_total, *totals)
        honest = next(
            total
            for variant, total in zip(variants, totals, strict=True)
            if variant.name == self.honest
        )
        for reward, paid in enumerate(pays):
            known = [each for each in paid if each is not None]
            if known:
                self.most[reward] = max(self.most[reward], *known)
                self.least[reward] = min(self.least[reward], *known)
        for at, (variant, total) in enumerate(zip(variants, totals, strict=True)):
            row = self.rows.get(variant.name)
            if row is None:
                row = self.rows[variant.name] = Row(variant.name, variant.role, self.num_rewards)
            self._book(row, variant.answer, [paid[at] for paid in pays], is_edge)
            if not is_edge:
                row.num_problems += 1
                row.total += total
                row.difference += total - honest
                row.difference_squared += (total - honest) ** 2

    def _book(self, row: Row, answer: str, paid: Sequence[float | None], is_edge: bool) -> None:
        row.num_replies += 1
        for reward, value in enumerate(paid):
            is_paid = value is not None and value > self.bars[reward]
            row.num_paid[reward] += is_paid
            examples = (row.paid_answers if is_paid else row.unpaid_answers)[reward]
            if len(examples) < _MAX_EXAMPLES and answer not in examples:
                examples.append(answer)
            if not is_edge:
                row.rewards[reward] += value or 0.0

    def of(self, *roles: Role) -> list[Row]:
        """The rows with these roles, best mean total first."""
        rows = (row for row in self.rows.values() if row.role in roles and row.num_replies)
        return sorted(rows, key=lambda row: -row.mean)

    @property
    def nominal(self) -> float:
        """The sum of the most that each reward was seen to pay."""
        return sum(most for most in self.most if math.isfinite(most))
