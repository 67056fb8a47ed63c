"""What every result offers a person: text, a plot, tables for pandas. Bound by the package's root.

The results of training, evaluation, comparison, audit and asking hold data and know nothing of how
they are shown. The methods that ``abacist`` gives them call what is here.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from abacist.errors import UsageError
from abacist.learning.resume.resuming import Run
from abacist.proof.ask import Answers
from abacist.proof.comparison.compare import Comparison
from abacist.proof.evaluation import Evaluation
from abacist.records.rollout import (
    REWARD_PREFIX,
    Rollout,
    question_of,
    read_rollouts,
    storable,
)
from abacist.records.rundir import RunDir, read_json_lines
from abacist.task.audit.findings import Finding
from abacist.task.plain import is_whole, plain
from abacist.view.curves import comparison_plot, training_plot
from abacist.view.notebook import Result, result_page
from abacist.view.plot import Plot
from abacist.view.sheet import WIDTH, as_text

if TYPE_CHECKING:
    import pandas as pd

NARROWEST = 20
METRICS, ROLLOUTS, PROBLEMS = "metrics", "rollouts", "problems"


def result_text(result: Result, width: int = WIDTH) -> str:
    """The whole result as plain text of at most ``width`` columns, as a command prints it.

    Raises UsageError for a width that holds no line.
    """
    width = plain(width)
    if not is_whole(width) or width < NARROWEST:
        raise UsageError(f"width is {width!r}, not a whole number of at least {NARROWEST}")
    return as_text(result_page(result), width)


def result_plot(result: Result) -> Plot:
    """The plot of a result. Raises UsageError for one that has none."""
    if isinstance(result, Run):
        from abacist.view.report.reading import read

        return training_plot(read(result.path))
    if isinstance(result, Evaluation):
        from abacist.view.charts import difficulty_plot

        return difficulty_plot(result, result.sampled)
    if isinstance(result, Comparison):
        return comparison_plot(result)
    raise UsageError(
        f"there is no plot of {result!r}", "text() and to_pandas() show what it holds."
    )


def result_frame(result: Result, what: str | None = None) -> pd.DataFrame:
    """The result as a pandas table; ``what`` chooses among those of a run."""
    import pandas as pd

    if what is not None and not isinstance(result, Run):
        raise UsageError(f"{type(result).__name__} is one table", "Leave the argument out.")
    rows: list[dict[str, Any]]
    if isinstance(result, Run):
        rows = _run_rows(result, what or METRICS)
    elif isinstance(result, Evaluation):
        rows = [_reply(rollout) for rollout in result.rollouts]
    elif isinstance(result, Answers):
        rows = [_reply(rollout) for rollout in result.replies]
    elif isinstance(result, Comparison):
        rows = _problem_rows(result)
    else:
        rows = [_finding(one) for one in result.findings]
    # Half a surrogate pair has no place in a table's text, as it has none in Parquet.
    return pd.DataFrame([{key: storable(value) for key, value in row.items()} for row in rows])


def _finding(finding: Finding) -> dict[str, Any]:
    return {
        "kind": str(finding.kind.value),
        "severity": str(finding.severity.value),
        "rewards": ", ".join(finding.rewards),
        "what": finding.kind.sentence,
        "evidence": finding.evidence,
    }


def _run_rows(run: Run, what: str) -> list[dict[str, Any]]:
    folder = RunDir(run.path)
    if what == METRICS:
        rows: dict[Any, dict[str, Any]] = {}
        if folder.metrics_path.exists():
            for row in read_json_lines(folder.metrics_path)[0]:
                rows.setdefault(row.get("step"), {}).update(row)
        return list(rows.values())
    if what == ROLLOUTS:
        if not folder.rollouts_dir.is_dir():
            return []
        return [_rollout(rollout) for rollout in read_rollouts(folder.rollouts_dir)]
    if what == PROBLEMS:
        if run.comparison is None:
            raise UsageError(f"{run.path}: has no verdict, so no problem has a before and an after")
        return _problem_rows(run.comparison)
    raise UsageError(
        f"a run has no table {what!r}", f"It has {METRICS!r}, {ROLLOUTS!r} and {PROBLEMS!r}."
    )


def _reply(rollout: Rollout) -> dict[str, Any]:
    """A reply outside training: what was asked, what was written, what it is worth."""
    return {
        "problem_id": rollout.problem_id,
        "difficulty": rollout.difficulty,
        "member": rollout.member,
        "question": question_of(rollout.messages),
        "gold": rollout.gold,
        "read_answer": rollout.read_answer,
        "is_correct": rollout.is_correct,
        "completion": rollout.completion,
        "completion_tokens": rollout.completion_tokens,
        "stop_reason": str(rollout.stop_reason.value),
        **{REWARD_PREFIX + name: value for name, value in rollout.rewards.items()},
        "reward": rollout.reward,
    }


def _rollout(rollout: Rollout) -> dict[str, Any]:
    place = {"step": rollout.step, "group": rollout.group}
    steps = None if rollout.steps is None else [step._asdict() for step in rollout.steps]
    last = {"advantage": rollout.advantage, "trained": rollout.trained, "steps": steps}
    return {**place, **_reply(rollout), **last}


def _problem_rows(comparison: Comparison) -> list[dict[str, Any]]:
    """A row for each problem: the share of right replies on both sides, and the first replies."""
    pair = comparison.accuracy
    outcomes = {
        **dict.fromkeys(pair.gained, "gained"), **dict.fromkeys(pair.lost, "lost"),
        **dict.fromkeys(pair.both, "right both times"),
        **dict.fromkeys(pair.neither, "wrong both times"),
    }  # fmt: skip
    sides = [_first_replies(side) for side in (comparison.before, comparison.after)]
    rights = [_right_shares(side) for side in (comparison.before, comparison.after)]
    return [
        {
            "problem_id": problem.problem_id,
            "difficulty": problem.difficulty,
            "question": problem.question,
            "gold": problem.answer,
            "outcome": outcomes.get(problem.problem_id),
            "before": rights[0][problem.problem_id],
            "after": rights[1][problem.problem_id],
            "answer_before": sides[0][problem.problem_id].read_answer,
            "answer_after": sides[1][problem.problem_id].read_answer,
            "reply_before": sides[0][problem.problem_id].completion,
            "reply_after": sides[1][problem.problem_id].completion,
        }
        for problem in comparison.before.problems
    ]


def _first_replies(evaluation: Evaluation) -> dict[str, Rollout]:
    first: dict[str, Rollout] = {}
    for rollout in evaluation.rollouts:
        first.setdefault(str(rollout.problem_id), rollout)
    return first


def _right_shares(evaluation: Evaluation) -> dict[str, float]:
    counts: dict[str, int] = {}
    for rollout in evaluation.rollouts:
        key = str(rollout.problem_id)
        counts[key] = counts.get(key, 0) + bool(rollout.is_correct)
    return {key: count / evaluation.settings.num_samples for key, count in counts.items()}
