"""A policy's replies to a set of problems, and the figures derived from them.

An :class:`Evaluation` is the problems and one :class:`~abacist.records.rollout.Rollout` per
reply. Figures are derived from those two and not stored, so a loaded evaluation and a fresh one
agree. Nothing is dropped: a reply that never stops or says nothing
counts as wrong.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from abacist.errors import RunError
from abacist.proof.attempts import majority_at_each, pass_at_each
from abacist.proof.metrics import (
    ANSWER_SIZES,
    SHARES,
    Mark,
    Row,
    answer_size_label,
    consistency,
    keeps_answer,
    mark_of,
    mean_tokens,
    rows,
    share,
    steps_label,
    structure_label,
)
from abacist.proof.native import right_in_own_form
from abacist.proof.overlap import Overlap
from abacist.proof.statistics import Interval, clustered_mean
from abacist.records.rollout import (
    REWARD_PREFIX,
    Rollout,
    StopReason,
    read_rollouts,
    write_rollouts,
)
from abacist.records.rundir import write_json
from abacist.records.typed import typed
from abacist.task.problems import Problem

FORMAT_VERSION = 1
GREEDY, SAMPLED = "greedy", "sampled"


@dataclass(frozen=True, slots=True)
class Settings:
    """How the replies were asked for. ``num_shots`` counts the worked examples in the prompt.

    With ``native_prompt`` the prompt is the model's own (:mod:`abacist.proof.native`), not ours.
    """

    max_completion_tokens: int
    num_samples: int = 1
    temperature: float = 0.0
    system_prompt: str | None = None
    num_shots: int = 0
    prefill: str = ""
    seed: int = 0
    native_prompt: bool = False

    @property
    def kind(self) -> str:
        """``"greedy"`` or ``"sampled"``."""
        return SAMPLED if self.temperature > 0 else GREEDY


@dataclass(frozen=True)
class Evaluation:
    """What a policy replied to a set of problems, and what that shows.

    ``rollouts`` holds ``settings.num_samples`` replies to each problem, in the problems' order.
    Every figure is an :class:`Interval`; those over replies are clustered by problem.
    ``conditions`` says in words what else a number depends on (model, data, dtype, date …).
    ``overlap`` says which problems the model had seen in training; None where nobody looked.
    ``path`` is the folder that it is kept in, and ``sampled`` the evaluation of several sampled
    replies to each problem that was made beside it, where there are such.
    """

    problems: tuple[Problem, ...]
    rollouts: tuple[Rollout, ...]
    settings: Settings
    conditions: Mapping[str, str] = field(default_factory=dict)
    overlap: Overlap | None = None
    path: Path | None = field(default=None, compare=False)
    sampled: Evaluation | None = field(default=None, compare=False)

    def __post_init__(self) -> None:
        """Under its native prompt a model is right if it is so in the form which that asks for."""
        if self.settings.native_prompt:
            judged = (
                None if r.gold is None else right_in_own_form(r.completion, r.gold)
                for r in self.rollouts
            )
            kept = zip(self.rollouts, judged, strict=True)
            rollouts = tuple(replace(reply, is_correct=right) for reply, right in kept)
            object.__setattr__(self, "rollouts", rollouts)

    def __repr__(self) -> str:
        """One line; the replies are in ``rollouts``, every figure in ``figures``."""
        problems, replies = len(self.problems), len(self.rollouts)
        right = sum(bool(rollout.is_correct) for rollout in self.rollouts)
        share = f", {100 * right / replies:.1f} % correct" if replies else ""
        return (
            f"<Evaluation: {problems:,} problems, {replies:,} {self.settings.kind} replies{share}>"
        )

    def without(self, problem_ids: Collection[str]) -> Evaluation:
        """The same evaluation without these problems and their replies."""
        return replace(
            self,
            problems=tuple(p for p in self.problems if p.problem_id not in problem_ids),
            rollouts=tuple(r for r in self.rollouts if r.problem_id not in problem_ids),
            sampled=self.sampled and self.sampled.without(problem_ids),
        )

    @cached_property
    def marks(self) -> tuple[Mark, ...]:
        """One mark per rollout, in the same order."""
        is_native = self.settings.native_prompt
        return tuple(mark_of(rollout, is_native=is_native) for rollout in self.rollouts)

    @cached_property
    def figures(self) -> dict[str, Interval]:
        """Every figure by name: the measures of ``metrics.SHARES``, ``format_consistency`` and
        ``answer_consistency`` where problems have several replies, ``completion_tokens``, and
        each reward as ``reward_<name>``.
        """
        figures = {measure: share(self.marks, measure) for measure in SHARES}
        if self.format_consistency and self.answer_consistency:
            figures["format_consistency"] = self.format_consistency
            figures["answer_consistency"] = self.answer_consistency
        figures["completion_tokens"] = mean_tokens(self.marks)
        return figures | {REWARD_PREFIX + name: mean for name, mean in self.rewards.items()}

    @property
    def accuracy(self) -> Interval:
        """The share of replies whose answer is right, by our rule or in their native form."""
        return self.figures["correct"]

    @property
    def format_consistency(self) -> Interval | None:
        """The share of problems whose replies are all strict; None with one reply to each."""
        return consistency(self.marks)

    @property
    def answer_consistency(self) -> Interval | None:
        """The share of problems whose replies all say the same; None with one reply to each."""
        return consistency(self.marks, keeps_answer)

    @cached_property
    def attempts(self) -> dict[str, Interval]:
        """``pass@k`` and ``majority@k`` by name, for k = 1, 2, 4 … and all replies to a problem.

        Empty with one reply to each problem.
        """
        if self.settings.num_samples == 1:
            return {}
        golds = {problem.problem_id: problem.answer for problem in self.problems}
        return pass_at_each(self.marks) | majority_at_each(self.marks, golds)

    @cached_property
    def own_form_accuracy(self) -> Interval | None:
        """The share of replies right in the form their native prompt asks for; None for ours."""
        return self.accuracy if self.settings.native_prompt else None

    @property
    def counts(self) -> dict[str, int]:
        """What is easily overlooked, counted; all of it stays in every figure."""
        reasons = [rollout.stop_reason for rollout in self.rollouts]
        return {
            "problems": len(self.problems),
            "problems_without_gold": sum(not problem.answer for problem in self.problems),
            "replies": len(self.rollouts),
            "replies_never_stopped": reasons.count(StopReason.LENGTH),
            "replies_empty": sum(not rollout.completion.strip() for rollout in self.rollouts),
            "replies_without_answer": sum(mark.number is None for mark in self.marks),
        }

    @cached_property
    def rewards(self) -> dict[str, Interval]:
        """The mean of each reward, over the replies to which it applied."""
        names = dict.fromkeys(name for rollout in self.rollouts for name in rollout.rewards)
        return {name: self._mean_reward(name) for name in names}

    def _mean_reward(self, name: str) -> Interval:
        paid = [(r.rewards.get(name), r.problem_id) for r in self.rollouts]
        known = [(value, problem_id) for value, problem_id in paid if value is not None]
        return clustered_mean([value for value, _ in known], [owner for _, owner in known])

    def by_difficulty(self) -> list[Row]:
        """A row for each number of solution steps, fewest first."""
        ordered = sorted(self.problems, key=lambda problem: problem.difficulty)
        return rows(ordered, self.marks, steps_label)

    def by_answer_size(self) -> list[Row]:
        """A row for each magnitude of the right answer, smallest first."""
        ordered = sorted(self.problems, key=lambda one: ANSWER_SIZES.index(answer_size_label(one)))
        return rows(ordered, self.marks, answer_size_label)

    def by_structure(self) -> list[Row]:
        """A row for seen and one for unseen structures; none where structures are unknown."""
        ordered = sorted(self.problems, key=lambda problem: bool(problem.unseen_structure))
        return rows(ordered, self.marks, structure_label)

    def to_json(self) -> dict[str, Any]:
        """Settings, every figure with its interval, and the tables; without the replies."""
        own_form = self.own_form_accuracy
        return {
            "kind": self.settings.kind,
            "settings": asdict(self.settings),
            "conditions": dict(self.conditions),
            "counts": self.counts,
            "seen": self.overlap and self.overlap.to_json(),
            "problems": len(self.problems),
            "replies": len(self.rollouts),
            "figures": {name: found.to_json() for name, found in self.figures.items()},
            "attempts": {name: found.to_json() for name, found in self.attempts.items()},
            "own_form": own_form and own_form.to_json(),
            "by_difficulty": [row.to_json() for row in self.by_difficulty()],
            "by_answer_size": [row.to_json() for row in self.by_answer_size()],
            "by_structure": [row.to_json() for row in self.by_structure()],
        }

    def save(self, folder: Path) -> None:
        """Keeps the evaluation as ``rollouts.parquet`` and ``evaluation.json`` in ``folder``.

        The JSON holds the figures for a reader and the problems for :meth:`load`. It is written
        last, so where it is, the replies are too.
        """
        write_rollouts(folder / "rollouts.parquet", self.rollouts)
        # Columns are for rewards, and need not be JSON.
        problems = [asdict(replace(problem, columns={})) for problem in self.problems]
        for fields in problems:
            del fields["columns"]
        document = {"format_version": FORMAT_VERSION, "evaluation": self.to_json()}
        overlap = self.overlap and self.overlap.to_record()
        write_json(
            folder / "evaluation.json", {**document, "problems": problems, "overlap": overlap}
        )

    @classmethod
    def load(cls, folder: Path) -> Evaluation:
        """Reads back what :meth:`save` kept. Raises RunError if it is missing or damaged."""
        path = folder / "evaluation.json"
        try:
            document = json.loads(path.read_text(encoding="utf-8"))
            if document["format_version"] != FORMAT_VERSION:
                raise RunError(
                    f"{path}: an evaluation of format {document['format_version']}, this Abacist "
                    f"reads format {FORMAT_VERSION}.",
                    "Use the Abacist that wrote it, or a newer one.",
                )
            settings = typed(Settings, document["evaluation"]["settings"])
            told = dict(document["evaluation"].get("conditions", {}))
            conditions = {str(name): str(value) for name, value in told.items()}
            problems = tuple(typed(Problem, fields) for fields in document["problems"])
            overlap = Overlap.from_record(document.get("overlap"))
        except FileNotFoundError:
            raise RunError(
                f"{folder}: no evaluation is kept there.",
                "Give a folder that holds evaluation.json, such as runs/NAME/evals/before.",
            ) from None
        except (OSError, ValueError, TypeError, KeyError, RecursionError) as error:
            hint = "Restore the file from a copy, or evaluate again."
            raise RunError(f"{path}: damaged ({error}).", hint) from error
        rollouts = tuple(read_rollouts(folder / "rollouts.parquet"))
        count = settings.num_samples
        is_whole = count >= 1 and len(problems) * count == len(rollouts)
        if not is_whole or any(
            rollout.problem_id != problems[at // count].problem_id
            for at, rollout in enumerate(rollouts)
        ):
            raise RunError(
                f"{folder}: rollouts.parquet does not hold the replies evaluation.json tells of.",
                "Evaluate again, or restore both files from one evaluation.",
            )
        return cls(problems, rollouts, settings, conditions, overlap)
