"""What an audit can find: kinds with a sentence each, and the audit that holds the findings."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from enum import StrEnum
from typing import Any

from abacist.task.audit.ledger import Row
from abacist.task.sentence_enum import SentenceEnum


class Severity(StrEnum):
    """How much a finding matters; the worst first."""

    UNSOUND = "unsound"  # training on it would teach the wrong thing, or crash
    WARNING = "warning"


class Kind(SentenceEnum):
    """What is wrong."""

    HACKABLE = "hackable", "A reply that solves nothing earns what an honest right solution does."
    NO_COLUMN = "no_column", "A reward needs a column that the problems do not have."
    UNMATCHED_GOLD = "unmatched_gold", "No reply can match these golds: the problems teach nothing."
    LONG_GOLD = "long_gold", "Golds have so many decimals that hardly any reply will match them."
    FAILS = "fails", "A reward raises, or returns no usable number."
    HANGS = "hangs", "A reward does not return in time."
    NOTHING_FOR_THE_ANSWER = "nothing_for_the_answer", "Nothing here pays for the answer."
    NEVER_PAID = "never_paid", "A reward pays the same for every reply, so it teaches nothing."
    UNPAID_LAYOUT = "unpaid_layout", "A reward is never paid for the layout that is asked for."
    EXCLUSION = "exclusion", "Two rewards exclude one another."
    UNREACHABLE = "unreachable", "The rewards add up to more than any reply can earn."
    HONEST_BELOW_MOST = (
        "honest_below_most",
        "A right solution in the requested layout earns less than another reply.",
    )
    WRONG_HACK = "wrong_hack", "A reply without work earns more than an honest attempt gone wrong."
    WORKLESS = "workless", "A right answer earns more without its work."
    LISTED = "listed", "A list of numbers is paid, because the right one is among them."
    TAGLESS = "tagless", "An answer is paid that stands in no layout at all."
    FALSE_NEGATIVE = "false_negative", "The right number is not paid when it is written otherwise."
    FALSE_POSITIVE = "false_positive", "An answer is paid that is not the right number."
    MISSED_INTEGER = "missed_integer", "A reward for plain numbers passes some of them over."
    NOT_A_NUMBER = "not_a_number", "A reward takes something for a number that is none."
    LENGTH_LEAK = "length_leak", "Length alone earns an advantage."
    UNBOUNDED = "unbounded", "A reward has no bound."
    SLOW = "slow", "The time a reward takes grows faster than the reply."
    FRAGILE = "fragile", "A reward raises when a message holds no plain text."
    NOT_DETERMINISTIC = "not_deterministic", "A reward pays differently for the same reply."


_UNSOUND = {Kind.HACKABLE, Kind.NO_COLUMN, Kind.FAILS, Kind.HANGS}


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that is wrong: with which rewards, and what shows it."""

    kind: Kind
    rewards: tuple[str, ...]  # empty: the set as a whole
    evidence: str
    severity: Severity

    @classmethod
    def of(cls, kind: Kind, evidence: str, *rewards: str) -> Finding:
        severity = Severity.UNSOUND if kind in _UNSOUND else Severity.WARNING
        return cls(kind, rewards, evidence, severity)

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "sentence": self.kind.sentence}


@dataclass(frozen=True, slots=True)
class Earned:
    """What one kind of reply earned on average: in all, and from each reward (weighted)."""

    label: str
    reply: str
    total: float
    rewards: dict[str, float]

    @classmethod
    def of(cls, label: str, row: Row, names: list[str]) -> Earned:
        paid = {name: row.reward_mean(number) for number, name in enumerate(names)}
        return cls(label, row.name, row.mean, paid)


@dataclass(frozen=True, slots=True)
class Audit:
    """What a reward set can be made to pay for.

    ``nominal_maximum`` adds up the most each reward paid; ``reachable_maximum`` is the most that
    one reply earned. ``home`` is the layout in which the rewards look for the answer.
    """

    rewards: tuple[str, ...]
    weights: tuple[float, ...]
    num_problems: int
    num_problems_given: int
    num_replies: int
    home: str
    answer_rewards: tuple[str, ...]
    nominal_maximum: float
    reachable_maximum: float
    earned: tuple[Earned, ...]
    findings: tuple[Finding, ...]
    remarks: tuple[str, ...]

    def __repr__(self) -> str:
        """One line; what was found is in ``findings``, what each kind of reply earned in
        ``earned``."""
        verdict = "sound" if self.sound else "not sound"
        found = f"{len(self.findings)} finding{'s' * (len(self.findings) != 1)}"
        rewards = f"{len(self.rewards)} reward{'s' * (len(self.rewards) != 1)}"
        return (
            f"<Audit: {verdict}, {found}, {rewards}, "
            f"{self.num_replies:,} replies to {self.num_problems:,} problems>"
        )

    @property
    def hackable(self) -> bool:
        """A reply that solves nothing earns at least what an honest right solution does."""
        return any(finding.kind is Kind.HACKABLE for finding in self.findings)

    @property
    def sound(self) -> bool:
        """Nothing was found that makes training on these rewards wrong or impossible."""
        return all(finding.severity is not Severity.UNSOUND for finding in self.findings)

    def summary(self) -> str:
        """The verdict in one line."""
        if not self.sound:
            worst = next(each for each in self.findings if each.severity is Severity.UNSOUND)
            verdict = f"not sound: {worst.evidence}"
        elif self.findings:
            verdict = f"sound, with {len(self.findings)} warnings"
            if len(self.findings) == 1:
                verdict = f"sound, with a warning: {self.findings[0].evidence}"
        else:
            verdict = "sound: nothing was found"
        return verdict

    def to_json(self) -> dict[str, Any]:
        return {
            **asdict(self),
            "findings": [finding.to_json() for finding in self.findings],
            "hackable": self.hackable,
            "sound": self.sound,
            "summary": self.summary(),
        }
