"""The replies that the page holds for its explorer, and what is said of each.

A run can have more replies than a page can carry. Whole groups are taken, because a reply is read
beside the others of its group: first groups with a rare outcome, spread over the steps, then
others; of an evaluation first the problems that were gained or lost. What is left out stays in the
run's Parquet files, and the page says how many these are.

A row is a list, in the order of :data:`FIELDS`, so that five thousand stay small. Offsets into a
text count UTF-16 units, as a browser's strings do.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa

from abacist.proof.evaluation import Evaluation
from abacist.proof.outcomes import Outcome, outcome_of
from abacist.proof.scorers import lm_eval_flexible
from abacist.records.rollout import REWARD_PREFIX, Rollout, question_of, steps_in
from abacist.task.reply import ANSWER_CLOSE, ANSWER_OPEN, parse_reply
from abacist.task.step_rewards import STEP_OUTCOMES, StepReward, within
from abacist.task.steps import shows_work
from abacist.view.plaintext import cut_middle
from abacist.view.report.attribution import groups_of
from abacist.view.report.reading import Reading

REPLIES_IN_PAGE = 5_000
MOST_CHARACTERS = 12_000  # of one reply in the page; the middle of a longer one is left out
TRAINING = "training"
FIELDS = (
    "run", "source", "step", "group", "member", "problem", "outcome", "reward", "advantage",
    "rewards", "tokens", "stop", "read", "start", "end", "trained", "suspicion", "disagree",
    "change", "text", "steps",
)  # fmt: skip
CHANGES = ("gained", "lost")
SUSPICIONS = (
    "It is right and shows no work.",
    "It is wrong and earns more than a right reply of its group.",
    "It earns full marks for its form and shows no work.",
)
OUTCOMES = tuple(outcome.value for outcome in Outcome)
_ANSWER_BLOCK = re.compile(f"{re.escape(ANSWER_OPEN)}(.*?){re.escape(ANSWER_CLOSE)}", re.DOTALL)


@dataclass
class Explorer:
    """What the page's script gets, as JSON. ``total`` counts all replies, ``kept`` those in it."""

    runs: list[str] = field(default_factory=list)
    sources: list[str] = field(default_factory=list)
    rewards: list[str] = field(default_factory=list)
    problems: list[dict[str, Any]] = field(default_factory=list)
    rows: list[list[Any]] = field(default_factory=list)
    total: int = 0
    _known: dict[tuple[str, str, str | None], int] = field(default_factory=dict)

    @property
    def kept(self) -> int:
        """How many replies are in the page."""
        return len(self.rows)

    def to_json(self) -> dict[str, Any]:
        """For the script: names once, then a list for each reply."""
        return {
            "runs": self.runs, "sources": self.sources, "rewards": self.rewards,
            "problems": self.problems, "outcomes": OUTCOMES,
            "sentences": [outcome.sentence for outcome in Outcome],
            "suspicions": SUSPICIONS, "step_outcomes": STEP_OUTCOMES, 
            "changes": CHANGES, "fields": FIELDS, "rows": self.rows,
        }  # fmt: skip

    def problem(self, problem_id: str | None, question: str, gold: str | None, steps: Any) -> int:
        """The number of a problem. Runs on other data may have other problems under one id."""
        key = (problem_id or "", question, gold)
        if key not in self._known:
            self._known[key] = len(self.problems)
            self.problems.append(
                {"id": problem_id, "question": cut_middle(question, MOST_CHARACTERS),
                 "gold": gold, "difficulty": steps}
            )  # fmt: skip
        return self._known[key]

    def add(
        self,
        run: int,
        source: str,
        replies: Sequence[Mapping[str, Any]],
        change: int | None = None,
    ) -> None:
        """Adds one group, or one problem's replies: dictionaries of a rollout's columns.

        ``change`` is the place in :data:`CHANGES` of what became of the problem.
        """
        if source not in self.sources:
            self.sources.append(source)
        rights = [
            one["reward"] for one in replies if one["is_correct"] and _is_number(one["reward"])
        ]
        for one in replies:
            paid = {
                name.removeprefix(REWARD_PREFIX): value
                for name, value in one.items()
                if name.startswith(REWARD_PREFIX)
            }
            self.rewards += [name for name in paid if name not in self.rewards]
            text = cut_middle(one["completion"], MOST_CHARACTERS)
            start, end = answer_span(text, one["read_answer"])
            gold = one["gold"]
            outcome = outcome_of(one["completion"], gold, one["is_correct"], one["stop_reason"])
            # Of a reply that is not right, the outcome tells what lm-eval's filter says.
            disagree = outcome is Outcome.UNFORMATTED or (
                outcome is Outcome.RIGHT
                and gold is not None
                and not lm_eval_flexible(one["completion"], gold)
            )
            self.rows.append(
                [
                    run, self.sources.index(source), one["step"], one["group"], one["member"],
                    self.problem(one["problem_id"], question_of(one["messages"]), gold,
                                 one["difficulty"]),
                    OUTCOMES.index(outcome.value), _rounded(one["reward"]),
                    _rounded(one["advantage"]),
                    [_rounded(paid.get(name)) for name in self.rewards],
                    one["completion_tokens"], str(one["stop_reason"]),
                    None if one["read_answer"] is None else cut_middle(one["read_answer"], 200),
                    start, end, one["trained"], suspicion_of(one, rights),
                    disagree, change, text,
                    step_spans(text, one["completion"], steps_in(one.get("steps"))),
                ]
            )  # fmt: skip


def collect(readings: Sequence[Reading], limit: int = REPLIES_IN_PAGE) -> Explorer:
    """The replies of these runs that the page holds: at most ``limit``, whole groups."""
    found = Explorer(runs=[one.name for one in readings])
    share = max(1, limit // max(1, len(readings)))
    for number, reading in enumerate(readings):
        evaluated = sum(len(one.rollouts) for one in reading.evaluations.values())
        trained = reading.rollouts.num_rows
        found.total += evaluated + trained
        for_training = max(share - evaluated, share // 2) if trained else 0
        left = share - min(for_training, trained)
        for name, evaluation in reading.evaluations.items():
            replies = left // max(1, len(reading.evaluations))
            for change, group in _problems(evaluation, reading, replies):
                found.add(number, reading.sources.get(name, name), group, change)
        for group in _groups(reading.rollouts, for_training):
            found.add(number, TRAINING, group)
    width = len(found.rewards)
    for row in found.rows:  # rewards that only later rows have
        row[FIELDS.index("rewards")] += [None] * (width - len(row[FIELDS.index("rewards")]))
    return found


def _problems(
    evaluation: Evaluation, reading: Reading, limit: int
) -> Iterator[tuple[int | None, list[dict[str, Any]]]]:
    """Each problem's change and the replies to it: those that changed first, then in order."""
    changed: dict[str, int] = {}
    if reading.comparison is not None:
        accuracy = reading.comparison.accuracy
        changed = dict.fromkeys(accuracy.gained, 0) | dict.fromkeys(accuracy.lost, 1)
    by_problem: dict[str, list[Rollout]] = {}
    for rollout in evaluation.rollouts:
        by_problem.setdefault(rollout.problem_id or "", []).append(rollout)
    order = dict.fromkeys([*(one for one in changed if one in by_problem), *by_problem])
    for problem_id in order:
        replies = by_problem[problem_id]
        limit -= len(replies)
        if limit < 0:
            return
        yield changed.get(problem_id), [as_row(rollout) for rollout in replies]


def _groups(table: pa.Table, limit: int) -> Iterator[list[dict[str, Any]]]:
    """Whole groups of a run's training replies, at most ``limit`` replies, in order of steps."""
    if not table.num_rows or limit <= 0:
        return
    groups = groups_of(table)
    if table.num_rows > limit:
        groups = _chosen(table, groups, limit)
    # Taken at once: a table of many files is slow to look into again and again.
    replies = iter(table.take(pa.array(np.concatenate(groups))).to_pylist())
    for rows in groups:
        yield [{"trained": None, **next(replies)} for _ in rows]


def _chosen(table: pa.Table, groups: list[np.ndarray], limit: int) -> list[np.ndarray]:
    """Groups of every kind, rare kinds first, each kind spread evenly over the steps."""
    columns = ("completion", "gold", "is_correct", "stop_reason")
    outcomes = [
        outcome_of(*values)
        for values in zip(*(table[name].to_pylist() for name in columns), strict=True)
    ]
    kinds: dict[frozenset[Outcome], list[int]] = {}
    for number, rows in enumerate(groups):
        kinds.setdefault(frozenset(outcomes[row] for row in rows), []).append(number)
    size = max(1, round(table.num_rows / len(groups)))
    budget, chosen = max(1, limit // size), set[int]()
    waiting = sorted(kinds.values(), key=len)
    while waiting and budget > 0:
        numbers = waiting.pop(0)
        share = max(1, min(len(numbers), budget // (len(waiting) + 1)))
        places = np.unique(np.linspace(0, len(numbers) - 1, share).astype(int))
        chosen.update(numbers[place] for place in places)
        budget -= len(places)
    return [groups[number] for number in sorted(chosen)]


def as_row(rollout: Rollout) -> dict[str, Any]:
    """A rollout as the columns of its file."""
    rewards = {REWARD_PREFIX + name: value for name, value in rollout.rewards.items()}
    names = (
        "step", "group", "member", "problem_id", "difficulty", "completion", "completion_tokens",
        "stop_reason", "gold", "read_answer", "is_correct", "reward", "advantage", "trained",
        "messages",
    )  # fmt: skip
    return {name: getattr(rollout, name) for name in names} | rewards


def answer_span(text: str, read: str | None) -> tuple[int, int]:
    """Where in ``text`` the answer ``read`` by our rule stands, in UTF-16 units; else (0, 0).

    Nothing is marked in a text that was cut so that it reads otherwise.

    >>> answer_span("<reasoning>\\n2\\n</reasoning>\\n<answer>\\n12\\n</answer>", "12")
    (36, 38)
    """
    answer = parse_reply(text).answer
    if not answer or answer != read:
        return 0, 0
    for block in reversed(list(_ANSWER_BLOCK.finditer(text))):
        if block[1].strip() == answer:
            start = block.start(1) + block[1].index(answer)
            return _utf16(text, start), _utf16(text, start + len(answer))
    return 0, 0


def step_spans(
    text: str, completion: str, steps: Sequence[StepReward] | None
) -> list[list[int]] | None:
    """Of each step where it stands in ``text``, in UTF-16 units, and the place of its outcome in
    :data:`STEP_OUTCOMES`; None where steps were not paid.

    Both offsets are 0 where nothing is to be marked: in a text that was cut, and for a step of a
    stranger's that does not lie in the completion.

    >>> step_spans("😀 1 + 1 = 2", "😀 1 + 1 = 2", [StepReward(2, 11, 1.0), StepReward(5, 99, 0.0)])
    [[3, 12, 0], [0, 0, 1]]
    """
    if steps is None:
        return None
    marked = set(within(steps, len(completion))) if text == completion else set()
    spans, seen, units = [], 0, 0  # characters that were counted, and their units
    for step in steps:
        edges = [0, 0]
        if step in marked:
            marked.remove(step)
            for at, edge in enumerate((step.start, step.end)):
                units += _utf16(text[seen:edge], edge - seen)
                seen, edges[at] = edge, units
        spans.append([*edges, STEP_OUTCOMES.index(step.outcome)])
    return spans


def suspicion_of(reply: Mapping[str, Any], rights: Sequence[float]) -> int | None:
    """The number of what is suspicious about a reply, None if nothing is.

    ``rights`` holds what the right replies of its group earn.
    """
    parsed = parse_reply(reply["completion"])
    works = shows_work(parsed.reasoning)
    if reply["is_correct"]:
        return None if works else 0
    if rights and _is_number(reply["reward"]) and reply["reward"] > min(rights):
        return 1
    return 2 if parsed.strict and not works else None


def _utf16(text: str, index: int) -> int:
    return index + sum(ord(character) > 0xFFFF for character in text[:index])


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _rounded(value: Any) -> float | None:
    return round(float(value), 4) if _is_number(value) else None
