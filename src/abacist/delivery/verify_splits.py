"""Which problems were used for what, and how often the held-out ones were looked at."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from abacist.delivery.bundle import VERDICT_FOLDERS
from abacist.delivery.findings import Check
from abacist.delivery.opened import Opened
from abacist.delivery.verify_openings import check_openings
from abacist.delivery.verify_training import check_steps, named
from abacist.errors import AbacistError, RunError
from abacist.learning.arguments import ScriptArguments
from abacist.learning.task import Task, task_of
from abacist.records.provenance import data_fingerprint
from abacist.records.rollout import question_of
from abacist.records.seen import TRAIN, Seen
from abacist.task.problems import MADE_HERE, Problem

_MOST_PROBLEMS = 1_000_000  # that are made or read to check a stranger's bundle


def check_data(opened: Opened, dataset_name: str | None) -> Check:
    """Load the data again and compare it with the manifest's fingerprint and with every problem.

    Data that is made here is made anew; other data must be at hand (``dataset_name``).
    """
    check = Check("data")
    recorded = str(opened.settings.get("dataset_name", "generated"))
    task = _task_at_hand(opened, recorded, dataset_name, check)
    check.looked_at = "not loaded"
    if task is not None:
        _check_problems(opened, task, recorded, check)
    if steps := check_steps(opened, task, check):
        check.looked_at += f"; {steps:,} steps of replies paid again by their worked solutions"
    return check


def _task_at_hand(
    opened: Opened, recorded: str, dataset_name: str | None, check: Check
) -> Task | None:
    """The data, loaded again; None, and said why, where that cannot be done."""
    if dataset_name is None and recorded not in MADE_HERE:
        check.is_incomplete = True
        check.not_checked.append(
            f"whether questions and golds are those of {recorded}: until then they are whatever "
            "the bundle says (--dataset_name checks it)"
        )
        return None
    try:
        return _task(opened, dataset_name or recorded)
    except AbacistError as error:
        check.is_incomplete = True
        check.not_checked.append(f"the data cannot be loaded here: {named(error, opened)}")
        return None


def _check_problems(opened: Opened, task: Task, recorded: str, check: Check) -> None:
    """Compare the data with the manifest and with every problem of the bundle."""
    sum_in_manifest = (opened.manifest.get("data") or {}).get("sha256")
    problems = [*task.train, *task.selection, *task.heldout]
    if (source := (opened.manifest.get("data") or {}).get("source")) is not None:
        check.same("run/manifest.json", "data.source", source, recorded)
    check.same("run/manifest.json", "data.sha256", sum_in_manifest, data_fingerprint(problems))
    counted = (opened.manifest.get("data") or {}).get("problems")
    check.same("run/manifest.json", "data.problems", counted, len(problems))
    _check_task(opened, task, check)
    _check_seen_is_whole(opened, task, check)
    known = {problem.problem_id: problem for problem in problems}
    count = 0
    for kind in VERDICT_FOLDERS:
        if (evaluation := _evaluation(opened, kind)) is not None:
            file = f"run/evals/{kind}/evaluation.json"
            wanted = task.heldout
            if kind.endswith("-sampled"):
                wanted = wanted[: len(evaluation.problems)]
            asked = [problem.problem_id for problem in evaluation.problems]
            if asked != [problem.problem_id for problem in wanted]:
                check.fault(file, "problems", f"{len(asked):,} held-out problems", "other ones")
            for problem in evaluation.problems:
                _compare(file, problem, known.get(problem.problem_id), check)
                count += 1
    trained = {problem.problem_id: problem for problem in task.train}
    for name in opened.rollout_names():
        for rollout in _rollouts(opened, name):
            found = trained.get(str(rollout.problem_id))
            item = f"group {rollout.group}, problem {rollout.problem_id}"
            if found is None:
                check.fault(name, item, "a training problem", "none of the data")
            else:
                check.same(name, f"{item}, gold", rollout.gold, found.answer)
                question = question_of(rollout.messages)
                check.same(name, f"{item}, question", question, found.question.strip())
    check.looked_at = (
        f"{len(problems):,} problems loaded again: their fingerprint, and every question and gold"
    )
    check.numbers = {"problems": len(problems), "compared": count}


def _check_task(opened: Opened, task: Task, check: Check) -> None:
    """What the manifest says of the task, where it says it; early versions did not."""
    told = opened.manifest.get("task")
    if not isinstance(told, dict):
        return
    for name, value in task.to_json().items():
        if name in told:
            check.same_tree("run/manifest.json", told[name], value, f"task.{name}")


def _task(opened: Opened, dataset_name: str) -> Task:
    names = {one.name for one in fields(ScriptArguments)}
    settings = {key: value for key, value in opened.settings.items() if key in names}
    settings["dataset_name"] = dataset_name
    if opened.has("run/shots.jsonl") and settings.get("shots_file"):
        settings["shots_file"] = str(opened.run.shots_path)
    seed = opened.settings.get("seed", opened.manifest.get("seed"))
    selects = "eval_steps" in opened.settings
    for name, value in settings.items():
        if name.startswith("num_") and isinstance(value, int) and value > _MOST_PROBLEMS:
            raise RunError(f"{name} is {value:,}, more than {_MOST_PROBLEMS:,} problems.")
    try:
        return task_of(ScriptArguments(**settings), seed=int(seed or 0), selects=selects)
    except (TypeError, ValueError) as error:
        raise RunError(f"the settings do not say how ({error}).") from error


def _compare(file: str, claimed: Problem, found: Problem | None, check: Check) -> None:
    item = f"problem {claimed.problem_id[:60]}"
    if found is None:
        check.fault(file, item, "a problem", "none of the data")
        return
    for name in ("question", "answer", "difficulty", "unseen_structure"):
        check.same(file, f"{item}, {name}", getattr(claimed, name), getattr(found, name))


def _check_seen_is_whole(opened: Opened, task: Task, check: Check) -> None:
    """The record of what was seen holds at least this data."""
    seen = Seen.read(opened.run.path) if opened.has("run/seen.json") else None
    if seen is None:
        return
    splits = (task.train, task.selection, task.shots.all)
    wanted = Seen.of(*([problem.question for problem in problems] for problems in splits))
    for kind, keys in wanted.keys.items():
        missing = len(keys - seen.keys.get(kind, frozenset()))
        if missing:
            there = f"{len(seen.keys.get(kind, ())):,} questions"
            check.fault("run/seen.json", kind, there, f"{missing:,} of the data are not among them")


def check_splits(opened: Opened) -> Check:
    """Whether the verdict's problems were new to the model, and how often they were opened."""
    check = Check("splits")
    seen = None
    if opened.has("run/seen.json"):
        try:
            seen = Seen.read(opened.run.path)
        except RunError as error:
            check.fault("run/seen.json", "", "the record of what was seen", named(error, opened))
    verdict: dict[str, Problem] = {}
    for kind in VERDICT_FOLDERS:
        if (evaluation := _evaluation(opened, kind)) is not None:
            verdict |= {problem.question.strip(): problem for problem in evaluation.problems}
    for problem in verdict.values():
        kind_seen = seen.kind_of(problem.question) if seen else None
        if kind_seen is not None:
            item = f"problem {problem.problem_id[:60]}"
            check.fault("run/evals", item, "held out", f"seen by the model ({kind_seen})")
    asked: set[str] = set()
    for name in opened.rollout_names():
        asked |= {question_of(rollout.messages) for rollout in _rollouts(opened, name)}
    for question in sorted(asked):
        if question in verdict:
            item = f"problem {verdict[question].problem_id[:60]}"
            check.fault("run/rollouts", item, "held out", "trained on")
        if seen is not None and seen.is_complete and seen.kind_of(question) != TRAIN:
            claimed = "a training problem that seen.json lacks"
            check.fault("run/seen.json", TRAIN, "complete", f"{claimed}: {question[:60]}")
    if seen is None:
        check.not_checked.append("what the model had seen: the bundle has no seen.json")
    check.looked_at = (
        f"{len(verdict):,} verdict problems and {len(asked):,} training questions: none in both, "
        "none seen before"
        if check.holds
        else f"{len(verdict):,} verdict problems against what was trained on"
    )
    check_openings(opened, check)
    return check


def _evaluation(opened: Opened, kind: str) -> Any:
    try:
        return opened.evaluation(kind)
    except AbacistError:
        return None  # `verify_verdict` says what is wrong with it


def _rollouts(opened: Opened, name: str) -> list[Any]:
    try:
        return opened.rollouts(name)
    except AbacistError:
        return []  # `verify_training` says what is wrong with it
