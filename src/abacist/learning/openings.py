"""Who opens a split of a run's problems notes it in the run's record (`records.openings`)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from abacist.errors import RunError
from abacist.learning.tracking import Watcher
from abacist.records.openings import (
    FINAL,
    OPENINGS_NAME,
    TRAINING,
    Opening,
    note_opening,
    read_openings,
    run_that_owns,
    verdict_keys,
)
from abacist.records.secrets import without_secrets
from abacist.records.seen import question_key, read_object
from abacist.task.problems import Problem


class NotesTraining(TrainerCallback):
    """Notes that the training split is opened, each time that steps begin."""

    def __init__(self, run: Path, num_problems: int) -> None:
        self.run, self.num_problems = run, num_problems

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Note it, with the step that the weights come from."""
        step = state.global_step
        if step < state.max_steps:
            place = f"checkpoint-{step}"
            note_opening(self.run, Opening("train", TRAINING, self.num_problems, place, step))


def note_asked(
    model: str,
    problems: Sequence[Problem],
    watcher: Watcher,
    *,
    split: str,
    purpose: str,
    data: str | None = None,
    folder: Path | None = None,
    is_resumed: bool = False,
) -> None:
    """Note that ``problems`` are about to be put to ``model``, if it is of a run.

    ``data`` names other data than the run's own, ``folder`` is where the result is kept. What is
    resumed, and is in the record already, is no new opening. A record that cannot be written (a
    run on a disk that is only read) is said.
    """
    place = Path(model).expanduser()
    run = run_that_owns(place) if place.is_dir() else None
    if run is None:
        return
    weights = place.resolve().relative_to(run).as_posix()
    evaluation = None
    if folder is not None and folder.resolve().is_relative_to(run):
        evaluation = folder.resolve().relative_to(run).as_posix()
    verdict = verdict_keys(run)
    step = read_object(place / "trainer_state.json").get("global_step")
    opening = Opening(
        split,
        purpose,
        len(problems),
        FINAL if weights == "." else weights,
        step if type(step) is int else None,
        sum(question_key(problem.question) in verdict for problem in problems),
        evaluation,
        None if data is None else without_secrets(_last(data)),
    )
    try:
        if is_resumed:
            known, _ = read_openings(run / OPENINGS_NAME)
            if any(one.evaluation == evaluation for one in known if evaluation):
                return
        note_opening(run, opening)
    except (RunError, OSError) as error:
        said = error.message if isinstance(error, RunError) else str(error)
        watcher.note(f"Warning: {said}")


def _last(data: str) -> str:
    """A data set by its name, a file by the last part of its path."""
    path = Path(data).expanduser()
    return path.name if path.is_absolute() or path.exists() else data
