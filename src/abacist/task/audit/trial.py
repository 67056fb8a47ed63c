"""Call a reward as TRL does, on any text, and come back: with numbers, or with what went wrong.

A user's reward may raise on one text in a thousand, hang on another, or want a column that the data
lacks. Each of these becomes a :class:`Mishap` that names the sample; the audit goes on without it.
The time limit is :mod:`abacist.task.watchdog`'s.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from abacist.errors import RewardError
from abacist.task.audit.renderings import Variant
from abacist.task.custom_rewards import call_reward, checked
from abacist.task.problems import Problem
from abacist.task.watchdog import TimeIsUp

# What `abacist train` hands to rewards of every problem; the data's other columns come beside.
COLUMNS = ("answer", "problem_id", "difficulty")
_GIVEN = {"prompts", "completions", "completion_ids", "trainer_state", "log_extra", "log_metric"}
_CHARS_PER_TOKEN = 4
_MAX_KEPT = 20  # mishaps that are kept; all are counted
_MAX_HUNG = 3  # after so many replies without end a reward is not called again


class MishapKind(StrEnum):
    """How a call went wrong."""

    FAILED = "raised, or returned what is no list of rewards"
    HUNG = "did not return in time"
    NO_COLUMN = "needs a column that is not there"


@dataclass(frozen=True, slots=True)
class Mishap:
    """One call that went wrong; ``sample`` names the reply, ``message`` says the rest."""

    kind: MishapKind
    sample: str
    message: str


@dataclass
class Trial:
    """A reward under audit; ``is_usable`` until it hangs too often, or from the start cannot be."""

    func: Callable[..., Any]
    limit_seconds: float
    columns: Sequence[str] = COLUMNS
    mishaps: list[Mishap] = field(default_factory=list)
    num_failed: int = 0
    num_hung: int = 0
    is_usable: bool = True

    def __post_init__(self) -> None:
        self.func = copy.copy(checked(self.func))  # the caller's keeps its own time limit
        self.name = str(self.func.__name__)
        if missing := self._missing_columns():
            said = " and ".join(f"`{column}`" for column in missing)
            self._note(Mishap(MishapKind.NO_COLUMN, "", f"wants the column {said}"))
            self.is_usable = False

    @property
    def named_columns(self) -> set[str]:
        """The names in its signature."""
        return {parameter.name for parameter in self._parameters()}

    def _parameters(self) -> list[inspect.Parameter]:
        try:
            return list(inspect.signature(self.func.func).parameters.values())  # type: ignore[attr-defined]
        except (TypeError, ValueError):  # some built-ins do not tell theirs
            return []

    def _missing_columns(self) -> list[str]:
        return [
            parameter.name
            for parameter in self._parameters()
            if parameter.default is parameter.empty
            and parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)
            and parameter.name not in _GIVEN.union(self.columns)
        ]

    def pay(self, problem: Problem, variants: Sequence[Variant]) -> list[float | None]:
        """The reward of each reply to a problem; None where it does not apply or fails."""
        try:
            return self.call(problem, [as_message(variant.text) for variant in variants])
        except RewardError as error:
            if len(variants) == 1:
                self._note(_mishap(error, variants[0].name))
                return [None]
            together = _mishap(error, "all replies to a problem at once")
        paid: list[float | None] = []
        failed_before = self.num_failed
        for variant in variants:
            paid += self.pay(problem, [variant]) if self.is_usable else [None]
        if self.num_failed == failed_before and together.kind is MishapKind.FAILED:
            self._note(together)  # only on several at once, which is how TRL calls it
            self.is_usable = False
        elif self.num_failed - failed_before == len(variants):
            self.is_usable = False
        return paid

    def call(self, problem: Problem, completions: list[Any]) -> list[float | None]:
        """One call, of any shape of completion. Raises RewardError, also when out of time."""
        count = len(completions)
        columns = {**problem.columns, **{column: getattr(problem, column) for column in COLUMNS}}
        given = {column: [value] * count for column, value in columns.items()}
        prompts = [[{"role": "user", "content": problem.question}]] * count
        ids = [[0] * _num_tokens(each) for each in completions]
        # A single reply is quicker than a batch.
        self.func.timeout_seconds = self.limit_seconds / (4 if count == 1 else 1)  # type: ignore[attr-defined]
        try:
            return call_reward(self.func, prompts, completions, ids, given)
        except SystemExit as stop:
            raise RewardError(f"The reward '{self.name}' left the program ({stop.code}).") from stop

    def _note(self, mishap: Mishap) -> None:
        self.num_failed += 1
        self.num_hung += mishap.kind is MishapKind.HUNG
        self.is_usable = self.is_usable and self.num_hung < _MAX_HUNG
        if len(self.mishaps) < _MAX_KEPT:
            self.mishaps.append(mishap)


def is_out_of_time(error: RewardError) -> bool:
    """Whether the reward was stopped by the watchdog."""
    return isinstance(error.__context__, TimeIsUp)


def _mishap(error: RewardError, name: str) -> Mishap:
    kind = MishapKind.HUNG if is_out_of_time(error) else MishapKind.FAILED
    return Mishap(kind, name, error.message)


def as_message(text: str) -> list[dict[str, str]]:
    """A completion as TRL hands it over for a conversational prompt."""
    return [{"role": "assistant", "content": text}]


def _num_tokens(completion: Any) -> int:
    text = completion[0].get("content") if isinstance(completion, list) and completion else ""
    return len(text) // _CHARS_PER_TOKEN + 1 if isinstance(text, str) else 1
