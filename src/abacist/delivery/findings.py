"""What a verification finds: a list of checks, each with what it looked at and what is wrong."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

MOST_FAULTS = 200  # kept of one check; all are counted


@dataclass(frozen=True, slots=True)
class Fault:
    """One thing that is not as it is claimed: where, what was claimed, and what was found."""

    file: str
    item: str
    claimed: str
    found: str

    def __str__(self) -> str:
        where = f"{self.file}, {self.item}" if self.item else self.file
        return f"{where}: claimed {self.claimed}, found {self.found}"


@dataclass
class Check:
    """One part of a verification.

    ``looked_at`` says in words what was checked, ``not_checked`` what could not be and why,
    ``notes`` what a reader should know; ``numbers`` are the counts behind the words.
    ``is_incomplete``: evidence that belongs to the bundle was not at hand.
    """

    name: str
    looked_at: str = ""
    faults: list[Fault] = field(default_factory=list)
    num_faults: int = 0
    not_checked: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    numbers: dict[str, Any] = field(default_factory=dict)
    is_incomplete: bool = False

    @property
    def holds(self) -> bool:
        """Whether nothing of what was checked is wrong."""
        return self.num_faults == 0

    def fault(self, file: str, item: str, claimed: object, found: object) -> None:
        """Note a fault."""
        self.num_faults += 1
        if len(self.faults) < MOST_FAULTS:
            self.faults.append(Fault(file, item, shown(claimed), shown(found)))

    def same(
        self, file: str, item: str, claimed: object, found: object, *, is_exact: bool = False
    ) -> None:
        """Note a fault unless both are the same; numbers may differ by rounding in float32, with
        ``is_exact`` by rounding in float64."""
        if not (alike(claimed, found, 1e-6, 1e-12) if is_exact else alike(claimed, found)):
            self.fault(file, item, claimed, found)

    def same_tree(self, file: str, claimed: object, found: object, item: str = "") -> None:
        """:meth:`same` for nested JSON, value by value; each fault names its place."""
        if isinstance(claimed, Mapping) and isinstance(found, Mapping):
            for key in [*claimed, *(key for key in found if key not in claimed)]:
                place = f"{item}.{key}" if item else str(key)
                if key not in claimed or key not in found:
                    there = claimed.get(key, "nothing") if key in claimed else "nothing"
                    self.fault(file, place, there, found.get(key, "nothing"))
                else:
                    self.same_tree(file, claimed[key], found[key], place)
        elif _is_list(claimed) and _is_list(found) and len(claimed) == len(found):  # type: ignore
            for at, (one, other) in enumerate(zip(claimed, found, strict=True)):  # type: ignore
                self.same_tree(file, one, other, f"{item}[{at}]")
        else:
            self.same(file, item, claimed, found, is_exact=True)

    def to_json(self) -> dict[str, Any]:
        """All of it; of the faults the first :data:`MOST_FAULTS`."""
        return {**asdict(self), "holds": self.holds}


def alike(claimed: object, found: object, relative: float = 1e-4, absolute: float = 1e-5) -> bool:
    """Whether two values agree; floats up to rounding in float32.

    >>> alike(0.3333333, 1 / 3), alike(True, 1), alike(0.31, 0.32), alike(None, 0.0)
    (True, False, False, False)
    """
    if isinstance(claimed, bool) or isinstance(found, bool):
        return claimed is found
    if isinstance(claimed, int | float) and isinstance(found, int | float):
        if isinstance(claimed, int) and isinstance(found, int):
            return claimed == found
        if math.isnan(claimed) or math.isnan(found):
            return math.isnan(claimed) and math.isnan(found)
        return math.isclose(claimed, found, rel_tol=relative, abs_tol=absolute)
    return bool(claimed == found)


def shown(value: object, most: int = 120) -> str:
    """A value in one line, for a message.

    >>> shown(0.30000000000000004), shown("a\\nb"), shown(None)
    ('0.3', "'a\\\\nb'", 'nothing')
    """
    if value is None:
        return "nothing"
    if isinstance(value, float):
        return f"{value:.7g}"
    # What is claimed in words is said without quotes by the callers, as one short plain string.
    text = value if isinstance(value, str) and _is_plain(value) else repr(value)
    return text if len(text) <= most else f"{text[: most * 2 // 3]} … {text[-most // 3 :]}"


def _is_plain(text: str) -> bool:
    return text.isprintable() and bool(text)


def _is_list(value: object) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str)
