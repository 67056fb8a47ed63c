"""What a model has seen in training: read from the run that it is, lies in, or was trained from.

A run's ``seen.json`` (:mod:`abacist.records.seen`) is the answer. A run made before there was one
is reconstructed: its settings load its data again, and the manifest's fingerprint says whether they
are unchanged; where they are not, its rollouts and worked examples show which problems were drawn.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from abacist.errors import AbacistError, DataError, RunError
from abacist.proof.comparison.sides import AFTER, BEFORE, Side
from abacist.proof.overlap import Overlap
from abacist.proof.unfinished import SAMPLED_FOLDER
from abacist.records.provenance import data_fingerprint
from abacist.records.rollout import question_of
from abacist.records.rundir import RunDir
from abacist.records.seen import Seen, question_key, read_object, run_of

if TYPE_CHECKING:
    from abacist.learning.task import Task

_OF_A_VERDICT = [when + kind for when in (BEFORE, AFTER) for kind in ("", f"-{SAMPLED_FOLDER}")]


def seen_in(task: Task, began_from: Path) -> Seen:
    """What a run of ``task`` sees, including what its first model ``began_from`` had seen."""
    seen, before = _of_task(task), seen_by(began_from)
    return seen if before is None else seen | before


def _of_task(task: Task, *, is_complete: bool = True) -> Seen:
    splits = (task.train, task.selection, task.shots.all)
    questions = ([problem.question for problem in problems] for problems in splits)
    return Seen.of(*questions, is_complete=is_complete)


def seen_by(model: Path) -> Seen | None:
    """What the model in the folder ``model`` has seen; None if it is of no run.

    A run, one of its checkpoints and any folder inside it (a merged copy, say) count as the run;
    so does a folder that holds a copy of ``seen.json``, wherever it is. An adapter has also seen
    what its base has, if that is a folder. Raises RunError for a damaged record.
    """
    found: Seen | None = None
    waiting, known = [model], set()
    while waiting:
        folder = waiting.pop().expanduser().resolve()
        if folder in known or not folder.is_dir():
            continue
        known.add(folder)
        if base := read_object(folder / "adapter_config.json").get("base_model_name_or_path"):
            waiting.append(Path(str(base)))
        owner = run_of(folder)
        if owner is None:
            continue
        seen = Seen.read(owner)
        if seen is None:
            seen = _reconstructed(RunDir(owner))
            waiting += _began_from(owner)
        found = seen if found is None else found | seen
    return found


def without_seen(sides: Sequence[Side]) -> tuple[list[Side], str]:
    """The sides of a comparison without the problems that any of them has seen, and a sentence.

    The sentence is "" where nothing was seen. A problem that one side's evaluation left out as
    seen goes from every side, so a base asked everything is compared on what is new to both.
    Raises DataError if nothing is left.
    """
    seen: dict[str, set[str]] = {}
    for side in sides:
        for problem_id in _seen_on(side):
            seen.setdefault(problem_id, set()).add(side.name)
    everything = {problem.problem_id for side in sides for problem in side.evaluation.problems}
    dropped = seen.keys() & everything
    if not dropped:
        return list(sides), ""
    names = sorted({name for problem_id in dropped for name in seen[problem_id]})
    told = f"{', '.join(names)}: {len(dropped):,} of {len(everything):,} problems seen in training"
    if dropped == everything:
        raise DataError(
            f"Nothing new is left to compare on. {told}.",
            "Evaluate both on problems that neither was trained on, or include these problems with "
            "--include_seen.",
        )
    kept = [replace(side, evaluation=side.evaluation.without(dropped)) for side in sides]
    return kept, f"{told}; left out of every side (--include_seen keeps them)"


def _seen_on(side: Side) -> Iterable[str]:
    """Ids of the problems that this side has seen, also of those it was not asked."""
    overlap = side.evaluation.overlap
    if overlap is not None:
        return overlap.kinds
    folder = side.folder
    if folder is None or (folder.parent.name == "evals" and folder.name in _OF_A_VERDICT):
        return ()  # a verdict is of problems that were held out
    return Overlap.of(side.evaluation.problems, seen_by(folder), leave_out=True).kinds


def _reconstructed(run: RunDir) -> Seen:
    """What a run without a record has seen, as far as it can be found."""
    reloaded = _reloaded(run)
    if reloaded is not None and reloaded.is_complete:
        return reloaded
    drawn = Seen.of(_questions_drawn(run), (), _shown_examples(run), is_complete=False)
    return drawn if reloaded is None else drawn | reloaded


def _reloaded(run: RunDir) -> Seen | None:
    """From the data that the run's settings name; None if it is gone, complete if unchanged."""
    from abacist.learning.config import load_config
    from abacist.learning.task import load_task

    # What the settings say of the machine does not matter here, and may not fit this one.
    anywhere = ["--use_cpu", "true", "--bf16", "false", "--fp16", "false"]
    try:
        config = load_config(None, str(run.config_path), anywhere)
        manifest = run.read_manifest()
        if "seed" not in config.settings:
            config.training.seed = int(manifest.get("seed") or 0)
        task = load_task(config)
    except AbacistError:  # gone, moved, or no longer readable
        return None
    used = data_fingerprint([*task.train, *task.selection, *task.heldout])
    recorded = (manifest.get("data") or {}).get("sha256")
    return _of_task(task, is_complete=used == recorded)


def _questions_drawn(run: RunDir) -> Iterator[str]:
    """The questions of the run's training rollouts, each once."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    told: set[str] = set()
    for path in sorted(run.rollouts_dir.glob("*.parquet")):
        try:
            with pq.ParquetFile(path) as file:
                batches = file.iter_batches(columns=["messages"])
                conversations = [turns for batch in batches for turns in batch[0].to_pylist()]
        except (pa.ArrowException, OSError, KeyError) as error:
            raise RunError(
                f"{path}: not a readable rollout file ({error}).",
                "Remove that file: Abacist then no longer knows that the run saw its problems.",
            ) from error
        for turns in conversations:
            question = question_of(turns)
            if (key := question_key(question)) not in told:
                told.add(key)
                yield question


def _shown_examples(run: RunDir) -> list[str]:
    from abacist.task.prompts import load_shots

    if not run.shots_path.is_file():
        return []
    try:
        shots = load_shots(run.shots_path)
    except AbacistError:
        return []
    return [shot.question for shot in shots.all]


def _began_from(run: Path) -> list[Path]:
    """The folder of the model that a run without a record began from, if it was one."""
    try:
        name = RunDir(run).read_settings().get("model_name_or_path")
    except RunError:
        return []
    return [Path(name)] if isinstance(name, str) and name else []
