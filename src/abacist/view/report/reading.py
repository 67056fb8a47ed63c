"""What a report is made from: everything that a run, or what is left of it, still tells.

A run that was killed, has no step, or lies half damaged on a disk still deserves its page. So
nothing here raises because a part is missing or cannot be read: the part is left out, and
:attr:`Reading.remarks` says so in words. Only a folder that holds nothing of a training or an
evaluation is refused.
"""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa

from abacist.errors import AbacistError, RunError, first_line
from abacist.learning.health.history import Facts, silent_fraction
from abacist.learning.health.rules import Diagnosis, Watch
from abacist.proof.comparison.compare import NO_CONTROL, Comparison, compare
from abacist.proof.comparison.sides import AFTER, BEFORE
from abacist.proof.evaluation import Evaluation
from abacist.proof.unfinished import SAMPLED_FOLDER
from abacist.records.openings import KEEPS_OPENINGS, Opening, read_openings
from abacist.records.rollout import read_sound_rollouts, rollout_schema
from abacist.records.rundir import RunDir, read_json_lines

RUN, SCRIPT, EVALUATION = "run", "script", "evaluation"
LARGEST_NUMBER = 1e100  # beyond, the sums and differences of a chart overflow
# All that the page shows of a reply; token ids are most of a file's bytes, and are not shown.
COLUMNS = frozenset(
    {
        "run_id", "step", "split", "problem_id", "difficulty", "group", "member", "messages",
        "completion", "completion_tokens", "stop_reason", "gold", "read_answer", "is_correct",
        "reward", "advantage", "trained", "steps",
    }
)  # fmt: skip


@dataclass(frozen=True)
class Reading:
    """One run, or one evaluation, as far as it can be read.

    ``steps`` holds the logged metrics of each training step by number, ``measured`` those of the
    measurements in between; ``seconds`` the clock readings of each step. ``kind`` is ``"run"`` for
    a run of ``abacist train``, ``"script"`` for the folder of somebody's own trainer script, and
    ``"evaluation"`` for what ``abacist eval`` kept.
    """

    path: Path
    kind: str
    manifest: Mapping[str, Any] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)
    steps: Mapping[int, Mapping[str, Any]] = field(default_factory=dict)
    measured: Mapping[int, Mapping[str, Any]] = field(default_factory=dict)
    seconds: Mapping[int, Mapping[str, float]] = field(default_factory=dict)
    rollouts: pa.Table = field(default_factory=lambda: rollout_schema([]).empty_table())
    evaluations: Mapping[str, Evaluation] = field(default_factory=dict)
    comparison: Comparison | None = None
    diagnoses: tuple[Diagnosis, ...] = ()
    openings: tuple[Opening, ...] = ()  # each time a split was opened; none before this was noted
    remarks: tuple[str, ...] = ()
    # What a reader calls the evaluations, by their key; a comparison of two runs says it otherwise.
    sources: Mapping[str, str] = field(
        default_factory=lambda: {
            f"{BEFORE}-sampled": "before, sampled", f"{AFTER}-sampled": "after, sampled",
        }
    )  # fmt: skip

    label: str = ""  # what to call it instead of :attr:`name`, where two are called alike

    @property
    def name(self) -> str:
        """What to call it: its folder, and the run that folder belongs to."""
        if self.label:
            return self.label
        path = self.path.resolve()
        return "/".join(path.parts[-2:]) if self.kind == EVALUATION else path.name

    @property
    def last_step(self) -> int:
        """The last step that is known to have been made; 0 before the first."""
        return max(self.steps, default=0)

    @property
    def max_steps(self) -> int | None:
        """How many steps it was to make, if that is known."""
        return _max_steps(self.settings)

    def seconds_of(self, name: str) -> dict[int, float]:
        """Seconds by logged step: of all the steps since the one logged before.

        TRL logs the mean of a step where it does not log every step (``--logging_steps``);
        measurements are logged as they are.
        """
        found: dict[int, float] = {}
        before = 0
        for step in sorted({*self.steps, *self.seconds}):
            value = self.seconds.get(step, {}).get(name)
            if value is not None:
                found[step] = value * (1 if name.startswith("eval_") else max(step - before, 1))
            if step in self.steps:
                before = step
        return found

    def metric(self, name: str) -> list[tuple[int, float]]:
        """A logged metric by step, where it is a number."""
        return _points(self.steps, name)

    def silent_groups(self) -> list[tuple[int, float]]:
        """The share of groups from which nothing could be learned, by step."""
        shares = ((step, silent_fraction(row)) for step, row in sorted(self.steps.items()))
        return [(step, share) for step, share in shares if share is not None]

    def measurement(self, name: str) -> list[tuple[int, float]]:
        """A metric of the measurements between steps."""
        return _points(self.measured, name)


def read(path: Path) -> Reading:
    """Everything that ``path`` still tells.

    Raises RunError if it is no folder, or holds nothing of a training or an evaluation.
    """
    if not path.is_dir():
        raise RunError(f"{path}: no such run directory.", "Runs are kept below runs/.")
    if (path / "evaluation.json").is_file():
        evaluations = {AFTER: Evaluation.load(path)}
        remarks: list[str] = []
        if (path / SAMPLED_FOLDER / "evaluation.json").is_file():
            try:
                evaluations[f"{AFTER}-sampled"] = Evaluation.load(path / SAMPLED_FOLDER)
            except RunError as error:
                remarks.append(f"The sampled replies are left out: {error.message}")
        sources = {AFTER: "greedy", f"{AFTER}-sampled": "sampled"}
        return Reading(
            path, EVALUATION, evaluations=evaluations, sources=sources, remarks=tuple(remarks)
        )
    run = RunDir(path)
    remarks = []
    manifest, kind = _manifest(run, remarks)
    settings = _settings(run, kind, remarks)
    steps, measured = _metrics(run, kind, remarks)
    rollouts = _rollouts(run, remarks)
    evaluations = _evaluations(run, remarks)
    if kind == SCRIPT and not steps and not rollouts.num_rows and not evaluations:
        raise RunError(
            f"{path}: holds no run: no manifest.json, no trainer_state.json, no rollouts.",
            "Name the output directory of a training, such as runs/tiny-001.",
        )
    control = str(settings.get("control", NO_CONTROL))
    openings = _openings(run, manifest, remarks)
    facts = Facts.of(settings, processes=manifest.get("processes"))
    return Reading(
        path, kind, manifest, settings, steps, measured, _seconds(run), rollouts, evaluations,
        _comparison(evaluations, control, remarks), _diagnoses(steps, measured, facts), openings,
        tuple([*_state(run, kind, manifest, settings, steps), *remarks]),
    )  # fmt: skip


def _manifest(run: RunDir, remarks: list[str]) -> tuple[dict[str, Any], str]:
    if not run.manifest_path.exists():
        return {}, SCRIPT
    try:
        return run.read_manifest(), RUN
    except RunError as error:
        remarks.append(f"Not read: {error.message}")
        return {}, RUN


def _settings(run: RunDir, kind: str, remarks: list[str]) -> dict[str, Any]:
    if kind == SCRIPT and not run.config_path.exists():
        return {}
    try:
        return run.read_settings()
    except RunError as error:
        remarks.append(f"Not read: {error.message}")
        return {}


def _metrics(
    run: RunDir, kind: str, remarks: list[str]
) -> tuple[dict[int, dict[str, Any]], dict[int, dict[str, Any]]]:
    """The rows of steps and of measurements, by step; a line written twice counts once, the later
    one, since a resumed run logs its steps again."""
    rows: list[dict[str, Any]] = []
    if run.metrics_path.exists():
        try:
            rows, damaged = read_json_lines(run.metrics_path)
        except OSError as error:
            remarks.append(f"Not read: {run.metrics_path.name} ({first_line(error)}).")
        else:
            if damaged:
                lines = "line is" if damaged == 1 else "lines are"
                remarks.append(f"{damaged} {lines} damaged in {run.metrics_path.name}.")
    elif (log := _trainer_log(run.path)) is not None:
        rows = log
    elif kind == RUN:
        remarks.append("There is no metrics.jsonl: no step was logged.")
    steps: dict[int, dict[str, Any]] = {}
    measured: dict[int, dict[str, Any]] = {}
    for row in rows:
        number = _number(row.get("step"))
        if number is None or number < 0:
            continue
        into = steps if "loss" in row or "reward" in row else measured
        into.setdefault(int(number), {}).update(row)
    return dict(sorted(steps.items())), dict(sorted(measured.items()))


def _trainer_log(path: Path) -> list[dict[str, Any]] | None:
    """The log that transformers keeps, of the state that came furthest; None if there is none."""
    logs = []
    for state in (path / "trainer_state.json", *path.glob("checkpoint-*/trainer_state.json")):
        with contextlib.suppress(OSError, ValueError, RecursionError, AttributeError):
            log = json.loads(state.read_text(encoding="utf-8")).get("log_history")
            if isinstance(log, list):
                rows = [row for row in log if isinstance(row, dict)]
                logs.append((max((_number(row.get("step")) or 0 for row in rows), default=0), rows))
    return max(logs, key=lambda log: log[0])[1] if logs else None


def _seconds(run: RunDir) -> dict[int, dict[str, float]]:
    seconds: dict[int, dict[str, float]] = {}
    with contextlib.suppress(OSError):
        for row in read_json_lines(run.timings_path)[0]:
            step = _number(row.get("step"))
            found = {name: _number(value) for name, value in row.items() if name != "step"}
            if step is not None:
                known = {name: value for name, value in found.items() if value is not None}
                seconds.setdefault(int(step), {}).update(known)
    return dict(sorted(seconds.items()))


def _rollouts(run: RunDir, remarks: list[str]) -> pa.Table:
    empty = rollout_schema([]).empty_table()
    try:
        table, damaged = read_sound_rollouts(run.rollouts_dir, COLUMNS)
    except (RunError, OSError) as error:
        remarks.append(f"The rollouts are left out: {first_line(error)}")
        return empty
    for name, why in list(damaged.items())[:3]:
        remarks.append(f"rollouts/{name} is left out: {why.partition(': ')[2] or why}")
    if len(damaged) > 3:
        remarks.append(f"Further damaged rollout files, left out: {len(damaged) - 3}.")
    return table


def _evaluations(run: RunDir, remarks: list[str]) -> dict[str, Evaluation]:
    found = {}
    for name in (BEFORE, AFTER, f"{BEFORE}-sampled", f"{AFTER}-sampled"):
        folder = run.evals_dir / name
        if not (folder / "evaluation.json").exists():
            continue
        try:
            found[name] = Evaluation.load(folder)
        except AbacistError as error:
            remarks.append(f"The evaluation {name!r} is left out: {error.message}")
    return found


def _openings(run: RunDir, manifest: Mapping[str, Any], remarks: list[str]) -> tuple[Opening, ...]:
    """The record of when each split was opened, if the run has one from its beginning."""
    if not manifest.get(KEEPS_OPENINGS):
        return ()
    try:
        found, faults = read_openings(run.openings_path)
    except OSError as error:
        found, faults = [], [(1, "an opening", first_line(error))]
    if not found and not faults:
        remarks.append(f"{run.openings_path.name} is gone: when splits were opened is not known.")
    if faults:
        number, _, what = faults[0]
        remarks.append(f"{run.openings_path.name} was changed, line {number}: {what}.")
    return tuple(found)


def _comparison(
    evaluations: Mapping[str, Evaluation], control: str, remarks: list[str]
) -> Comparison | None:
    before, after = evaluations.get(BEFORE), evaluations.get(AFTER)
    if before is None or after is None:
        return None
    try:
        return compare(before, after, control=control)
    except AbacistError as error:
        remarks.append(f"Before and after cannot be compared: {error.message}")
        return None


def _diagnoses(
    steps: Mapping[int, Mapping[str, Any]],
    measured: Mapping[int, Mapping[str, Any]],
    facts: Facts,
) -> tuple[Diagnosis, ...]:
    """What the rules that watch a training find in its log."""
    watch = Watch(facts)
    for row in sorted([*steps.values(), *measured.values()], key=lambda row: row["step"]):
        with contextlib.suppress(TypeError, ValueError, ArithmeticError):  # a stranger's line
            watch.see(row)
    return tuple(watch.found.values())


def _state(
    run: RunDir,
    kind: str,
    manifest: Mapping[str, Any],
    settings: Mapping[str, Any],
    steps: Mapping[int, Any],
) -> list[str]:
    """How far it came, where that is not the end."""
    if kind == SCRIPT:
        return [
            "This folder was written by a trainer script and not by abacist train: it holds the "
            "trainer's log, and no verdict."
        ]
    is_measured = (run.evals_dir / AFTER).exists()
    if manifest.get("finished"):
        return [] if is_measured else ["No problems were held out: there is no verdict."]
    if is_measured or not manifest:  # it came to its end, or nobody knows
        return []
    if not steps:
        return ["No step has been logged yet."]
    wanted = _max_steps(settings)
    of = f" of {wanted}" if wanted else ""
    return [
        f"The training is at step {max(steps)}{of} and has not come to its end, so there is no "
        "verdict yet."
    ]


def _points(rows: Mapping[int, Mapping[str, Any]], name: str) -> list[tuple[int, float]]:
    found = ((step, _number(row.get(name))) for step, row in rows.items())
    return [(step, value) for step, value in found if value is not None]


def _max_steps(settings: Mapping[str, Any]) -> int | None:
    wanted = _number(settings.get("max_steps"))
    return int(wanted) if wanted is not None and wanted > 0 else None


def _number(value: object) -> float | None:
    """A value as a float that can be drawn, or None."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    with contextlib.suppress(OverflowError):
        number = float(value)
        if math.isfinite(number) and abs(number) < LARGEST_NUMBER:
            return number
    return None
