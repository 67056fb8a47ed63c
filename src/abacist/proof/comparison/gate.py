"""Is B better than A? The comparison as a gate before a release: data, notes, and the sure gain.

Each function compares sides and returns the data; ``abacist compare`` draws the
page. ``sure_gain`` is the lowest that the gain in accuracy is believed to be, as a share. It is
None where the test speaks against a gain, or where a control does as well.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

from abacist.proof.comparison.alike import other_circumstances
from abacist.proof.comparison.compare import NO_CONTROL, Comparison, compare
from abacist.proof.comparison.seeds import SeedsComparison, combine
from abacist.proof.comparison.sides import Side, other_settings


@dataclass(frozen=True)
class ControlGate:
    """A control run beside the real one: its own gain over A, and what B gains over it."""

    name: str
    gain: Comparison
    beyond: Comparison
    notes: list[str]

    def to_json(self) -> dict[str, Any]:
        """Both comparisons as objects."""
        real = self.beyond.to_json()
        return {"name": self.name, "gain": self.gain.to_json(), "real_minus_control": real}


@dataclass(frozen=True)
class PairGate:
    """B against A, perhaps with a control beside it; ``notes`` for the reader to weigh."""

    found: Comparison
    control: ControlGate | None
    notes: list[str]

    @property
    def sure_gain(self) -> float | None:
        """Of B over A, and over the control if there is one."""
        return least_gain(self.found, *([self.control.beyond] if self.control else []))


@dataclass(frozen=True)
class SeedsGate:
    """One method with several seeds, each against its base."""

    found: SeedsComparison
    notes: list[str]

    @property
    def sure_gain(self) -> float:
        """For new problems and new seeds."""
        return self.found.combined.low


def pair_gate(
    a: Side, b: Side, control: Side | None = None, *, allow_different: Collection[str] = ()
) -> PairGate:
    """Set B against A. Raises AbacistError as :func:`compare` does."""
    found = compare(a.evaluation, b.evaluation, control=b.control, allow_different=allow_different)
    beside = None if control is None else _control_gate(a, b, control, allow_different)
    notes = other_circumstances(a.evaluation, b.evaluation)
    return PairGate(found, beside, notes + (beside.notes if beside else []))


def _control_gate(a: Side, b: Side, c: Side, allowed: Collection[str]) -> ControlGate:
    gain = compare(a.evaluation, c.evaluation, control=c.control, allow_different=allowed)
    beyond = compare(c.evaluation, b.evaluation, control=b.control, allow_different=allowed)
    notes = []
    if c.control == NO_CONTROL:
        notes.append(f"{c.name} was not trained as a control (--control random or format).")
    if apart := other_settings(b, c, of_control=True):
        notes.append(f"run and control differ in more than their rewards: {apart}.")
    return ControlGate(c.name, gain, beyond, notes)


def seeds_gate(
    befores: Sequence[Side], afters: Sequence[Side], *, allow_different: Collection[str] = ()
) -> SeedsGate:
    """Set each run of one method against its base, and combine them."""
    comparisons = [
        compare(a.evaluation, b.evaluation, control=b.control, allow_different=allow_different)
        for a, b in zip(befores, afters, strict=True)
    ]
    first = afters[0]
    found = combine([one.name for one in afters], comparisons, allow_different=allow_different)
    notes = [
        f"{other.name} differs from {first.name} in more than its seed: {apart}."
        for other in afters[1:]
        if (apart := other_settings(first, other))
    ]
    seeds = [side.settings.get("seed") for side in afters if side.settings]
    if len(set(seeds)) < len(seeds):
        notes.append(f"some runs have the same seed: {', '.join(map(str, seeds))}.")
    return SeedsGate(found, notes)


def least_gain(*found: Comparison) -> float | None:
    """The lowest that every one of these gains is believed to be; None unless all are gains."""
    if not all(one.accuracy.is_better for one in found):
        return None
    return min(one.accuracy.change.low for one in found)
