"""What can these rewards be made to pay for? Asked before a GPU hour is spent.

:func:`audit` runs a reward set, ours or a user's own, over every gold rendered in every
legitimate form, over rewritings that keep its value and that change it (``renderings``), and over
replies that try to be paid without solving anything (``hacks``). What they earned goes into a
``ledger``, from which ``judgement`` reads findings; ``conditions`` adds those on length and time.

Nothing is assumed of a reward but TRL's calling convention: which rewards pay for the answer is
seen from what they pay (``calibration``).
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any

from abacist.errors import DataError, UsageError
from abacist.task.audit.calibration import Calibration, calibrate
from abacist.task.audit.conditions import (
    LENGTHS_CHARS,
    SHORTER_LENGTHS_CHARS,
    length_findings,
    mishap_findings,
    shape_findings,
    stress_findings,
)
from abacist.task.audit.findings import Audit, Earned, Finding, Kind, Severity
from abacist.task.audit.gold_findings import gold_findings
from abacist.task.audit.hacks import blind, lists, workless
from abacist.task.audit.judgement import Bench, findings
from abacist.task.audit.ledger import Ledger
from abacist.task.audit.renderings import (
    Role,
    Variant,
    can_be_rewritten,
    edge_problems,
    layouts,
    rewritten,
    wrong_solutions,
)
from abacist.task.audit.trial import COLUMNS, Trial
from abacist.task.custom_rewards import listed
from abacist.task.gist import gist_gold
from abacist.task.given import GivenData
from abacist.task.plain import is_number, plain
from abacist.task.problems import Problem, draw, load_problems, whole_split
from abacist.task.rewards import (
    REWARD_SETS,
    is_built_in,
    load_reward_funcs,
    refuse_unusable_weights,
)

NUM_CALIBRATION_PROBLEMS = 24
NUM_LENGTH_PROBLEMS = 100
NUM_HACKED_PROBLEMS = 1_000  # hacks hardly depend on the problem
NUM_REPLIES_NEEDED = 2_000  # below that many an audit is not worth its name
Progress = Callable[[int, int, str], None]


def audit(
    rewards: str | Callable[..., Any] | Sequence[str | Callable[..., Any]],
    problems: str | os.PathLike[str] | GivenData,
    weights: Sequence[float] | None = None,
    *,
    max_seconds: float = 300.0,
    thorough: bool = True,
    on_progress: Progress | None = None,
) -> Audit:
    """What the reward set pays for, tried on ``problems`` and a few made-up ones.

    Example::

        found = abacist.audit(["default", my_reward], "openai/gsm8k")
        found.sound, found.findings

    ``rewards`` are functions or names, as for ``--reward_funcs``, or a single one. ``problems`` are
    what :func:`abacist.load_problems` takes, and all of it is tried: rows, a data set, the name of
    one; problems are taken as they are. After ``max_seconds`` the problems that are left are not
    tried, and the audit says so. ``thorough=False`` stresses with shorter texts.
    ``on_progress(done, total, label)`` is told how far it is.

    A reward that raises, hangs or wants a column that is not there is a finding, and so are golds
    that no reply can match. Raises RewardError for a name that means no reward, UsageError for
    weights that are not a number for each, DataError without problems whose gold is a number.
    """
    funcs = [
        func
        for one in listed(rewards)
        for func in (load_reward_funcs([one]) if isinstance(one, str) else [one])
    ]
    if not is_number(max_seconds) or not max_seconds > 0:
        raise UsageError(f"max_seconds is {max_seconds!r}, not a number above 0")
    factors = [1.0] * len(funcs) if weights is None else _weights(weights, len(funcs))
    inspection = _Inspection(funcs, factors, _problems(problems), thorough)
    return inspection.run(max_seconds, on_progress)


def _weights(weights: object, needed: int) -> list[float]:
    weights = plain(weights)
    if is_number(weights):
        weights = [weights]
    if not isinstance(weights, list) or not all(map(is_number, weights)):
        raise UsageError(f"--reward_weights {weights!r} are not numbers", "Give one for each.")
    if len(weights) != needed:
        raise UsageError(
            f"--reward_weights: {len(weights)} given, {needed} needed.",
            "Give --reward_weights one number for each.",
        )
    refuse_unusable_weights(weights)
    return weights


def _problems(given: str | os.PathLike[str] | GivenData) -> list[Problem]:
    """The problems that are given, or all of the data that holds them."""
    if isinstance(given, Iterator):
        given = list(given)
    if isinstance(given, list | tuple) and all(isinstance(one, Problem) for one in given):
        problems = [*given]
    else:
        problems = load_problems(given, split=whole_split(given))
    if not problems:
        raise DataError("There are no problems to audit the rewards on.", "Give at least one.")
    return problems


class _Inspection:
    def __init__(
        self,
        funcs: Sequence[Callable[..., Any]],
        weights: Sequence[float],
        problems: Sequence[Problem],
        thorough: bool,
    ) -> None:
        self.thorough = thorough
        limit_seconds = 10.0 if thorough else 4.0  # of one call, for one problem
        others = dict.fromkeys(name for problem in problems for name in problem.columns)
        columns = (*COLUMNS, *(name for name in others if name not in COLUMNS))
        self.all_trials = [  # ours are known to end, and arming the watchdog takes time
            Trial(func, 0.0 if is_built_in(func) else limit_seconds, columns) for func in funcs
        ]
        self.all_weights = tuple(map(float, weights))
        self.remarks: list[str] = []
        matched, self.findings = gold_findings(problems)
        usable = [problem for problem in matched if can_be_rewritten(problem)]
        if not usable:
            raise DataError("No gold of these problems can be rewritten.", "Give shorter numbers.")
        if len(usable) < len(matched):
            self.remarks.append(
                f"Left out: {len(matched) - len(usable):,} of the problems, whose golds have more "
                "than 1,000 digits."
            )
        self.problems = draw(usable, seed=0, purpose="audit")
        self.edges = self._edge_problems(problems[0], others)
        if any(func in REWARD_SETS["gist"] for func in funcs):
            # The historic rewards expect golds that were cleaned when the data was read.
            self.problems = [_cleaned(problem) for problem in self.problems]
            self.edges = [_cleaned(problem) for problem in self.edges]
        self.keep_usable()

    def _edge_problems(self, example: Problem, columns: Iterable[str]) -> list[Problem]:
        """The made-up problems, with the columns of ``example``; none if a reward reads those."""
        about_question = {
            name
            for name, value in example.columns.items()
            if isinstance(value, str) and value.strip() == example.question
        }
        others = set(columns) - about_question
        if readers := [trial.name for trial in self.all_trials if others & trial.named_columns]:
            self.remarks.append(
                f"The made-up problems are left out: they do not have the columns that "
                f"{', '.join(readers)} reads."
            )
            return []
        return [
            replace(
                edge, columns={**example.columns, **dict.fromkeys(about_question, edge.question)}
            )
            for edge in edge_problems()
        ]

    def keep_usable(self) -> None:
        """Go on with the rewards that can be called."""
        kept = [
            (trial, weight)
            for trial, weight in zip(self.all_trials, self.all_weights, strict=True)
            if trial.is_usable
        ]
        self.trials = [trial for trial, _ in kept]
        self.weights = [weight for _, weight in kept]

    def run(self, max_seconds: float, on_progress: Progress | None) -> Audit:
        deadline = time.monotonic() + max_seconds
        sample = self.problems[:NUM_CALIBRATION_PROBLEMS]
        self._drop_too_slow(sample[0], max_seconds)
        self._drop_undetermined(sample[:4])
        calibration = calibrate(sample, self.pay)
        ledger: Ledger | None = None
        while ledger is None:  # again where a reward hung too often, without it
            calibration = calibration.of_usable([trial.is_usable for trial in self.trials])
            self.keep_usable()
            ledger = self._fill(calibration, deadline, on_progress)
        if self.trials:
            names = [trial.name for trial in self.trials]
            is_whole = len(self.trials) == len(self.all_trials)
            bench = Bench(ledger, names, calibration.answer_rewards, calibration.home,
                          calibration.wrong, is_whole)  # fmt: skip
            self.findings += findings(bench)
            self._try_limits()
            earned = _earned(bench)
        else:
            names, earned = [], []
        for trial in self.all_trials:
            self.findings += mishap_findings(trial)
        order = list(Severity)
        return Audit(
            rewards=tuple(trial.name for trial in self.all_trials),
            weights=self.all_weights,
            num_problems=ledger.num_problems,
            num_problems_given=len(self.problems),
            num_replies=ledger.num_replies,
            home=calibration.home,
            answer_rewards=tuple(names[number] for number in sorted(calibration.answer_rewards)),
            nominal_maximum=ledger.nominal if names else 0.0,
            reachable_maximum=ledger.most_total if names else 0.0,
            earned=tuple(earned),
            findings=tuple(sorted(self.findings, key=lambda one: order.index(one.severity))),
            remarks=tuple(self.remarks),
        )

    def pay(self, problem: Problem, variants: Sequence[Variant]) -> list[list[float | None]]:
        """The weighted pay of each reward (first index) for each variant."""
        return [
            [None if paid is None else paid * weight for paid in trial.pay(problem, variants)]
            for trial, weight in zip(self.trials, self.weights, strict=True)
        ]

    def _drop_too_slow(self, problem: Problem, max_seconds: float) -> None:
        """A reward that asks a model over the network, say, cannot be tried on every reply."""
        variants = list(layouts(problem))
        for trial in self.trials:
            if not trial.limit_seconds:
                continue  # one of ours
            start = time.monotonic()
            trial.pay(problem, variants)
            seconds_each = (time.monotonic() - start) / len(variants)
            if trial.is_usable and seconds_each * NUM_REPLIES_NEEDED > max_seconds:
                trial.is_usable = False
                self.remarks.append(
                    f"“{trial.name}” takes {seconds_each:.2g} s a reply, too long to be tried in "
                    f"{max_seconds:g} s: it is left out."
                )
        self.keep_usable()

    def _drop_undetermined(self, sample: Sequence[Problem]) -> None:
        """A reward that pays by chance proves nothing: name it and leave it out."""
        for problem in sample:
            variants = list(layouts(problem))
            first, second = self.pay(problem, variants), self.pay(problem, variants)
            for trial, once, again in zip(self.trials, first, second, strict=True):
                if trial.is_usable and once != again:
                    trial.is_usable = False
                    self.findings.append(
                        Finding.of(
                            Kind.NOT_DETERMINISTIC,
                            "the same replies, put to it twice, earned differently; it is left out "
                            "of everything else here",
                            trial.name,
                        )
                    )
            self.keep_usable()

    def _fill(
        self, calibration: Calibration, deadline: float, on_progress: Progress | None
    ) -> Ledger | None:
        """The ledger of all problems there is time for; None if a reward gave up on the way."""
        ledger = Ledger(len(self.trials), calibration.honest)
        ledger.bars = calibration.bars
        if not self.trials:
            return ledger
        # Real golds first, for the examples that findings show.
        everything = [*self.problems[:4], *self.edges, *self.problems[4:]]
        for done, problem in enumerate(everything):
            if done > 4 + len(self.edges) and time.monotonic() > deadline:
                self.remarks.append(
                    f"Time ran out after {ledger.num_problems:,} of {len(self.problems):,} "
                    "problems, drawn at random."
                )
                break
            variants = _variants(problem, calibration, with_hacks=done < NUM_HACKED_PROBLEMS)
            pays = self.pay(problem, variants)
            if not all(trial.is_usable for trial in self.trials):
                return None
            ledger.add(variants, pays, is_edge=problem in self.edges)
            if on_progress and (done % 50 == 49 or done + 1 == len(everything)):
                on_progress(done + 1, len(everything), "problems audited")
        return ledger

    def _try_limits(self) -> None:
        lengths = LENGTHS_CHARS if self.thorough else SHORTER_LENGTHS_CHARS
        count = NUM_LENGTH_PROBLEMS if self.thorough else 10
        self.findings += length_findings(self.trials, self.weights, self.problems[:count])
        for trial in self.trials:
            self.findings += stress_findings(trial, self.problems[0], lengths)
            self.findings += shape_findings(trial, self.problems[0])


def _variants(problem: Problem, calibration: Calibration, *, with_hacks: bool) -> list[Variant]:
    """Everything that depends on the gold; hacks and strangers' layouts on the first problems."""
    variants = [
        *layouts(problem),
        *wrong_solutions(problem),
        *rewritten(problem, calibration.home),
        *workless(problem),
    ]
    if with_hacks:
        return [*variants, *blind(problem), *lists(problem)]
    needed = (calibration.honest, calibration.wrong)
    return [
        variant
        for variant in variants
        if variant.role not in (Role.OTHER_LAYOUT, Role.WRONG) or variant.name in needed
    ]


def _cleaned(problem: Problem) -> Problem:
    return replace(problem, answer=gist_gold(problem.answer))


def _earned(bench: Bench) -> list[Earned]:
    """The lines of the audit's table."""
    ledger = bench.ledger
    rows = {
        "a right solution": bench.honest,
        "a right solution, best layout": ledger.of(Role.LAYOUT, Role.OTHER_LAYOUT)[0],
        "a wrong solution": ledger.rows[bench.wrong],
        "right without work, best": ledger.of(Role.WORKLESS)[0],
        "a list with the right one, best": ledger.of(Role.LIST)[0],
        "without the answer, best": ledger.of(Role.BLIND)[0],
    }
    return [Earned.of(label, row, list(bench.names)) for label, row in rows.items()]
