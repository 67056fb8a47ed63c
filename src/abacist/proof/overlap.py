"""Which of an evaluation's problems its model has seen in training, and whether they count."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from abacist.records.seen import EXAMPLE, KINDS, SELECTION, TRAIN, Seen
from abacist.task.problems import Problem

_WORDS = {TRAIN: "to train on", SELECTION: "to follow its progress", EXAMPLE: "as worked examples"}


_INCOMPLETE = (
    "There may be more: the run has no whole record, and its data cannot be read as it was then"
)


@dataclass(frozen=True)
class Overlap:
    """The seen ones among ``looked_at`` problems, as ``kinds``: problem id to kind.

    ``is_left_out`` says whether they were left out of the evaluation; ``is_complete`` is False
    where the run's record of what it has seen may lack some.
    """

    looked_at: int = 0
    kinds: Mapping[str, str] = field(default_factory=dict)
    is_left_out: bool = True
    is_complete: bool = True

    @classmethod
    def of(cls, problems: Iterable[Problem], seen: Seen | None, *, leave_out: bool) -> Overlap:
        """The overlap of ``problems`` with what was seen; None stands for nothing."""
        problems = list(problems)
        seen = seen or Seen()
        kinds = {
            problem.problem_id: kind
            for problem in problems
            if (kind := seen.kind_of(problem.question)) is not None
        }
        return cls(len(problems), kinds, leave_out, seen.is_complete)

    def of_variants(self, seed: int, asked: Sequence[Problem]) -> Overlap:
        """The same of the problems' variants with other numbers (``--perturb seed``): a variant
        of a problem that was seen counts as seen, since all but its numbers was."""
        kinds = {f"{problem_id}~{seed}": kind for problem_id, kind in self.kinds.items()}
        if self.is_left_out:
            return replace(self, kinds=kinds)
        there = {problem.problem_id for problem in asked} & kinds.keys()
        kinds = {problem_id: kinds[problem_id] for problem_id in there}
        return replace(self, looked_at=len(asked), kinds=kinds)

    @property
    def counts(self) -> dict[str, int]:
        """How many of each kind of :data:`abacist.records.seen.KINDS`."""
        found = Counter(self.kinds.values())
        return {kind: found[kind] for kind in KINDS}

    @property
    def sentence(self) -> str:
        """In words, for a person; "" where nothing was seen and nothing is in doubt.

        >>> Overlap(29, {"a": "train", "b": "example"}).sentence
        'of 29 problems, the run has seen 2 (1 to train on, 1 as worked examples); left out'
        """
        if not self.kinds:
            if self.is_complete:
                return ""
            return f"none of these was found in what the run has seen. {_INCOMPLETE}"
        parts = ", ".join(f"{n:,} {_WORDS[kind]}" for kind, n in self.counts.items() if n)
        at_least = "" if self.is_complete else "at least "
        done = "left out" if self.is_left_out else "asked all the same"
        many = f"{at_least}{len(self.kinds):,}"
        said = f"of {self.looked_at:,} problems, the run has seen {many} ({parts}); {done}"
        return said if self.is_complete else f"{said}. {_INCOMPLETE}"

    def to_json(self) -> dict[str, Any]:
        """Counts for machines, without the ids."""
        return {
            "looked_at": self.looked_at,
            "seen": len(self.kinds),
            **self.counts,
            "left_out": self.is_left_out,
            "is_complete": self.is_complete,
        }

    def to_record(self) -> dict[str, Any]:
        """Everything, for :meth:`from_record`."""
        return {**self.to_json(), "kinds": dict(self.kinds)}

    @classmethod
    def from_record(cls, record: Mapping[str, Any] | None) -> Overlap | None:
        """What :meth:`to_record` wrote; None for None. Raises KeyError or TypeError for others."""
        if record is None:
            return None
        kinds = {str(key): str(kind) for key, kind in dict(record["kinds"]).items()}
        whole = record["left_out"], record["is_complete"]
        return cls(int(record["looked_at"]), kinds, *map(bool, whole))
