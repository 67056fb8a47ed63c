"""What can be wrong with a run although it does not crash: each fault by name, with its evidence.

A policy-gradient run that learns nothing looks like one that does: steps pass, numbers are logged.
:class:`Watch` reads only those numbers, so it serves a run while it trains (``guard.py``)
and, fed from ``metrics.jsonl``, after it has ended (``abacist doctor RUN``).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from abacist.learning.health.course import Course, Facts, Row, number
from abacist.learning.health.symptoms import RULES


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
        self.course = Course(facts)
        self.found: dict[str, Diagnosis] = {}
        self.silent_steps = 0

    def see(self, row: Row) -> list[Diagnosis]:
        """Take in one row of the log; returns the faults that were not known before it."""
        before = self.course.step
        self.course.add(row)
        steps = self.course.step - before
        if steps > 0:
            silent = (number(row.get("frac_reward_zero_std")) or 0.0) > 0.999
            self.silent_steps = self.silent_steps + steps if silent else 0
        elif "eval_accuracy" not in row:
            return []
        new = []
        for name, rule in RULES.items():
            if (said := rule(self.course)) is None:
                continue
            known = self.found.get(name)
            if known is None:
                diagnosis = Diagnosis(name, *said, self.course.step, self.course.step)
                new.append(diagnosis)
                self.found[name] = diagnosis
            else:
                # The first evidence is what was told; the last step says whether it went on.
                self.found[name] = replace(known, last_step=self.course.step)
        return new
