"""When each split was opened: by the run's own record, and by the dates of its files.

The record (`records.openings`) was written at the time, a line an opening, each with the hash of
the one before. It is held against everything else that knows of an opening: the metrics, the
verdict's evaluations, and the list of the run's evaluations that was made when it was bundled.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any

from abacist.delivery.bundle import VERDICT_FOLDERS, order_faults, training_seconds
from abacist.delivery.findings import Check
from abacist.delivery.opened import Opened
from abacist.errors import AbacistError
from abacist.records.openings import (
    AFTER,
    BEFORE,
    KEEPS_OPENINGS,
    OPENINGS_NAME,
    SELECTION,
    TRAINING,
    Opening,
    asked_of_the_trained,
    opened_once,
    openings_in_words,
    read_openings,
)

FILES = "opened.json"
RECORD = f"run/{OPENINGS_NAME}"
_SPLIT_FOR = {BEFORE: "heldout", AFTER: "heldout", SELECTION: "selection", TRAINING: "train"}
_CLOCK_SECONDS = 2  # times are whole seconds


def check_openings(opened: Opened, check: Check) -> None:
    """Both records, held against one another and against the rest of the bundle."""
    files = opened.document(FILES) if opened.has(FILES) else None
    if not isinstance(files, list) or not all(isinstance(entry, dict) for entry in files):
        check.fault(FILES, "", "the record of when each split was opened", "none")
        return
    steps = [row["step"] for row in opened.lines("run/metrics.jsonl") if "eval_accuracy" in row]
    _check_files(opened, files, steps, check)
    is_kept = opened.manifest.get(KEEPS_OPENINGS) is True
    openings: list[Opening] = []
    if opened.has(RECORD):
        openings, faults = read_openings(opened.folder / RECORD)
        for number, claimed, found in faults:
            check.fault(RECORD, f"line {number}", claimed, found)
        _check_lines(opened, openings, check)
        if is_kept:
            _check_nothing_lacks(opened, openings, files, steps, check)
    elif is_kept:
        check.fault(RECORD, "", "the record that the manifest names", "no such file")
    check.numbers |= {"opened": files, "selection_steps": steps}
    if openings and is_kept:
        is_once, whose = opened_once(openings), "by the record kept at the time, "
        check.numbers["openings"] = len(openings)
        check.notes.append(whose + openings_in_words(openings))
    else:
        is_once = _is_once(files)
        check.notes.append(_by_files(files, steps))
        check.not_checked.append(
            "what was noted when each split was opened: the run began before Abacist kept such a "
            "record" + (f", and has one of {len(openings):,} later openings" if openings else "")
        )
        if asked_of_the_trained(openings):
            check.notes.append("by that later record, " + openings_in_words(openings))
    check.numbers["opened_once"] = is_once


def _check_lines(opened: Opened, openings: Sequence[Opening], check: Check) -> None:
    """What each line says, against the replies, the metrics and the clock."""
    counts = {f"evals/{kind}": _count(opened, kind) for kind in VERDICT_FOLDERS}
    steps = {row.get("step") for row in opened.lines("run/metrics.jsonl") if "eval_accuracy" in row}
    # A run that was stopped or resumed measured steps whose log was cut.
    is_cut = not opened.manifest.get("finished") or bool(opened.manifest.get("resumed"))
    last = max(steps | {0}, key=lambda step: step if isinstance(step, int) else 0)
    tomorrow = datetime.now(UTC) + timedelta(days=1)
    for number, one in enumerate(openings, start=1):
        item = f"line {number}"
        if (split := _SPLIT_FOR.get(one.purpose)) is not None:
            check.same(RECORD, f"{item}, split", one.split, split)
        if one.of_the_verdict > one.problems:
            check.fault(RECORD, f"{item}, of_the_verdict", one.of_the_verdict, one.problems)
        if datetime.fromisoformat(one.time) > tomorrow:
            check.fault(RECORD, f"{item}, time", one.time, "a day to come")
        is_of_end = one.purpose == BEFORE or (one.purpose == AFTER and _is_last(one, openings))
        if is_of_end and (count := counts.get(str(one.evaluation))) is not None:
            check.same(RECORD, f"{item}, problems", one.problems, count)
            check.same(RECORD, f"{item}, of_the_verdict", one.of_the_verdict, count)
        if one.purpose == SELECTION and one.step not in steps and not is_cut:
            found = "no such measurement in metrics.jsonl"
            check.fault(RECORD, f"{item}, step", one.step, f"{found}, whose last is {last}")
    _check_times(opened, openings, check)


def _check_times(opened: Opened, openings: Sequence[Opening], check: Check) -> None:
    """Lines are in the order of their writing, and training lies between the measurements."""
    times = [datetime.fromisoformat(one.time) for one in openings]
    for number in range(1, len(times)):
        if times[number] < times[number - 1]:
            earlier, later = openings[number - 1].time, openings[number].time
            check.notes.append(
                f"{RECORD}: line {number + 1} ({later}) is dated before the line above it "
                f"({earlier}): a clock was set back, or the run went on on another machine"
            )
            return
    if opened.manifest.get("resumed"):
        return  # of steps that were made again only one time is kept
    before = next(
        (t for t, one in zip(times, openings, strict=True) if one.purpose == BEFORE), None
    )
    after = next((t for t, one in zip(times, openings, strict=True) if one.purpose == AFTER), None)
    seconds = training_seconds(opened.run.timings_path)
    if before and after and (after - before).total_seconds() < seconds - _CLOCK_SECONDS:
        passed = f"{(after - before).total_seconds():.0f} s between {BEFORE} and {AFTER}"
        check.fault(RECORD, "times", passed, f"{seconds:.0f} s of training")


def _check_nothing_lacks(
    opened: Opened,
    openings: Sequence[Opening],
    files: Sequence[Mapping[str, Any]],
    steps: Sequence[Any],
    check: Check,
) -> None:
    """Every opening that something else tells of has its line."""
    noted = {(one.evaluation, one.step) for one in openings} | {
        (one.evaluation, None) for one in openings
    }
    for kind in VERDICT_FOLDERS:
        if _count(opened, kind) is not None and (f"evals/{kind}", None) not in noted:
            check.fault(RECORD, f"evals/{kind}", "every opening", "no line of this one")
    for entry in files:
        folder = str(entry.get("by"))
        if not folder.startswith("evals/") or folder.removeprefix("evals/") in VERDICT_FOLDERS:
            continue
        # The verdict at an earlier end was moved; sampled replies lie in their evaluation.
        moved = re.fullmatch(r"(evals/after)-step-(\d{1,9})(-sampled)?", folder)
        place = (moved[1] + (moved[3] or ""), int(moved[2])) if moved else (folder, None)
        if place not in noted and (folder.rpartition("/")[0], None) not in noted:
            check.fault(RECORD, folder, "every opening", "no line of this one")
    measured = {one.step for one in openings if one.purpose == SELECTION}
    for step in steps:
        if step not in measured:
            found = "no line of this one"
            check.fault(RECORD, f"selection after step {step}", "every opening", found)
    if opened.lines("run/metrics.jsonl") and not any(one.purpose == TRAINING for one in openings):
        check.fault(RECORD, "training", "every opening", "no line of this one")


def _is_last(one: Opening, openings: Sequence[Opening]) -> bool:
    """Whether no later measurement was kept in its place."""
    return one.step == max(other.step or 0 for other in openings if other.purpose == AFTER)


def _count(opened: Opened, kind: str) -> int | None:
    try:
        evaluation = opened.evaluation(kind)
    except AbacistError:
        return None  # `verify_verdict` says what is wrong with it
    return None if evaluation is None else len(evaluation.problems)


def _check_files(
    opened: Opened, files: Sequence[Mapping[str, Any]], steps: Sequence[Any], check: Check
) -> None:
    """The list made when it was bundled: its counts, its dates and their order."""
    for what, claimed, found in order_faults(files, opened.run.timings_path):
        check.fault(FILES, f"{what}, date", claimed, found)
    for entry in files:
        if (date := entry.get("date")) is not None:
            when = datetime.fromisoformat(str(date))
            if when > datetime.now(UTC) + timedelta(days=1):
                check.fault(FILES, f"{entry.get('by')}, date", date, "a day to come")
    by = {entry.get("by"): entry for entry in files}
    for kind in VERDICT_FOLDERS:
        if (count := _count(opened, kind)) is not None:
            problems = by.get(f"evals/{kind}", {}).get("problems")
            check.same(FILES, f"evals/{kind}, problems", problems, count)
    told = [entry.get("step") for entry in files if entry.get("by") == "metrics.jsonl"]
    check.same(FILES, "selection, steps", told, list(steps))


def _others(files: Sequence[Mapping[str, Any]]) -> list[str]:
    """The evaluations beside the verdict's own that asked its problems."""
    ours = {f"evals/{kind}" for kind in VERDICT_FOLDERS}
    named = (entry for entry in files if entry.get("of_the_verdict"))
    return sorted(str(entry.get("by")) for entry in named if entry.get("by") not in ours)


def _is_once(files: Sequence[Mapping[str, Any]]) -> bool:
    return any(entry.get("by") == "evals/after" for entry in files) and not _others(files)


def _by_files(files: Sequence[Mapping[str, Any]], steps: Sequence[Any]) -> str:
    """What the files that are there, and their dates, say of how often splits were opened."""
    after = [entry for entry in files if entry.get("by") == "evals/after"]
    if not after:
        return "the trained model was never measured on the held-out problems"
    whose = "by the evaluations that the run's folder holds, the held-out problems were "
    if _is_once(files):
        date = f", on {after[0]['date']}" if after[0].get("date") else ""
        text = f"{whose}put to the trained model once, after training{date}"
    else:
        others = _others(files)
        times = "time" if len(others) == 1 else "times"
        text = f"{whose}opened {len(others)} more {times}: {', '.join(others)[:200]}"
    if steps:
        times = "once" if len(steps) == 1 else f"{len(steps)} times"
        text += f"; the selection split was measured {times} during training"
    return text
