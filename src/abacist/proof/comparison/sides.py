"""One side of a comparison, as a person names it: a run, or a folder with an evaluation.

A run holds two evaluations of its own, before and after its training; which is meant depends on
what it is compared with, so the caller says it. What the run recorded about itself (its seed, its
settings, whether it was a control) comes along, because it decides what the result may be called.
"""

from __future__ import annotations

import shlex
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from abacist.errors import RunError
from abacist.proof.comparison.compare import NO_CONTROL, known_control
from abacist.proof.evaluation import SAMPLED, Evaluation
from abacist.proof.unfinished import SAMPLED_FOLDER
from abacist.records.rundir import RunDir
from abacist.task.sources import shown

BEFORE, AFTER = "before", "after"
# Settings in which runs of one method may differ.
_SEED_SETTINGS = frozenset({"seed", "data_seed", "run_name", "report_to", "save_steps"})
_CONTROL_SETTINGS = _SEED_SETTINGS | {"control", "reward_funcs", "reward_weights"}


@dataclass(frozen=True)
class Side:
    """One side of a comparison: its evaluation, what to call it, and the run it is of, if any.

    ``settings`` are those of the run's ``config.yaml``, empty for an evaluation that is of none;
    ``folder`` is where the evaluation is kept.
    """

    name: str
    evaluation: Evaluation
    run: Path | None = None
    settings: dict[str, Any] = field(default_factory=dict)
    folder: Path | None = None

    @property
    def control(self) -> str:
        """The placebo its policy was trained on, "none" for real rewards and for no training."""
        return known_control(self.settings.get("control", NO_CONTROL))


def load_side(path: str, when: str = AFTER, *, sampled: bool = False) -> Side:
    """The evaluation that ``path`` names.

    A run gives its evaluation ``when`` ("before" or "after" training), the sampled one if
    ``sampled``. Raises RunError if there is nothing to compare.
    """
    folder = Path(path).expanduser().resolve()  # "." has a name and parents too
    if (folder / "evaluation.json").is_file():
        return _of_evaluation(path, folder, sampled)
    if not folder.is_dir():
        raise RunError(f"{path}: there is no such folder.", _WHAT_TO_NAME)
    if not (folder / "manifest.json").is_file():
        raise RunError(f"{path}: holds neither a run nor an evaluation.", _WHAT_TO_NAME)
    found = RunDir.open(folder)
    kept = found.evals_dir / (f"{when}-sampled" if sampled else when)
    if not (kept / "evaluation.json").is_file():
        raise RunError(
            f"{path}: this run has no evaluation {when} training"
            f"{' of sampled replies' if sampled else ''}.",
            "Its training has not come to its end, no problems were held out, or it was removed. "
            f"`abacist doctor {shlex.quote(path)}` says what is there.",
        )
    name = f"{path}, {when} training" + (", sampled" if sampled else "")
    settings = found.read_settings() if when == AFTER else {}
    return Side(name, Evaluation.load(kept), folder, settings, kept)


def _of_evaluation(path: str, folder: Path, sampled: bool) -> Side:
    # `abacist eval` keeps sampled replies below the greedy ones, a training beside them.
    places = [folder, folder / SAMPLED_FOLDER, folder.with_name(f"{folder.name}-{SAMPLED_FOLDER}")]
    for place in places if sampled else places[:1]:
        if (place / "evaluation.json").is_file():
            evaluation = Evaluation.load(place)
            if not sampled or evaluation.settings.kind == SAMPLED:
                break
    else:
        raise RunError(f"{path}: holds no sampled replies.", "Leave out --sampled.")
    run = folder.parent.parent
    is_of_run = folder.parent.name == "evals" and (run / "manifest.json").is_file()
    if not is_of_run or not folder.name.startswith(AFTER):
        return Side(path, evaluation, folder=place)
    return Side(path, evaluation, run, RunDir.open(run).read_settings(), place)


def other_settings(first: Side, second: Side, *, of_control: bool = False) -> str:
    """In which settings two runs differ that should be alike but for their seed (or, with
    ``of_control``, but for what they were paid); "" where they do not, or a side is of no run."""
    ignored = _CONTROL_SETTINGS if of_control else _SEED_SETTINGS
    names = sorted((first.settings.keys() & second.settings.keys()) - ignored)
    return "; ".join(
        f"{name}: {shown(first.settings[name])} and {shown(second.settings[name])}"
        for name in names
        if first.settings[name] != second.settings[name]
    )


_WHAT_TO_NAME = (
    "Name a run (such as runs/tiny-001) or a folder that holds evaluation.json "
    "(such as runs/tiny-001/evals/before)."
)
