"""A run's completions as traces in Trackio, where they can be searched and read step by step."""

from __future__ import annotations

import importlib.util
import random
from collections.abc import Callable
from itertools import groupby
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from abacist.errors import RunError, UsageError, first_line
from abacist.learning.trackers.trace import trace
from abacist.records.rollout import Rollout, read_rollouts, rollout_files
from abacist.records.rundir import RunDir
from abacist.view.rollouts import outcomes_words

MOST_TRACES = 2_000
_SEED = 0
_EXPORT_OF = "abacist_rollouts_of"  # in the configuration of a run that this module made


def log_traces(run_dir: Path, project: str, say: Callable[[str], None] | None = None) -> int:
    """Log the completions of a training to Trackio's ``project``; how many were logged.

    They become the Trackio run ``<run>-rollouts``, each at its step: the prompt and the reply as
    messages; rewards, advantage, gold and the answer that was read as metadata. Of more than
    :data:`MOST_TRACES` a sample is logged, always the same one, which is said. An earlier export of
    the same run is replaced. Raises RunError if ``run_dir`` is no run or its rollouts are damaged,
    UsageError if Trackio is missing, older than its traces or busy with another run, or if there is
    nothing to log.
    """
    run = RunDir.open(run_dir)
    trackio = _trackio()
    paths = rollout_files(run.rollouts_dir)
    if not paths:
        raise UsageError(
            f"{run_dir} keeps no rollouts, so there is nothing to log",
            "Train with --keep_rollouts.",
        )
    # A file at a time: rollouts of a long run are gigabytes.
    counts = [_count(path) for path in paths]
    total = sum(counts)
    wanted = set(random.Random(_SEED).sample(range(total), min(total, MOST_TRACES)))
    if say and total > MOST_TRACES:
        say(f"{total:,} completions: {MOST_TRACES:,} of them, drawn at random, become traces")
    name = f"{run.run_id}-rollouts"
    origin = str(run.path.resolve())
    config = {_EXPORT_OF: origin, "completions": total, "traces": len(wanted)}
    try:
        _delete_earlier(trackio, project, name, origin)
        trackio.init(
            project=project, name=name, config=config, embed=False, auto_log_cpu=False,
            auto_log_gpu=False,
        )  # fmt: skip
    except (ValueError, OSError) as error:
        raise UsageError(
            f"Trackio cannot log to project {project!r}: {first_line(error)}"
        ) from error
    try:
        first = 0
        for path, count in zip(paths, counts, strict=True):
            chosen = [index for index in range(count) if first + index in wanted]
            first += count
            if not chosen:
                continue
            rollouts = read_rollouts(path)
            some = [rollouts[index] for index in chosen]
            for step, of_step in groupby(some, key=lambda rollout: rollout.step):
                trackio.log({"completions": [_trace(trackio, one) for one in of_step]}, step=step)
    finally:
        trackio.finish()
    return len(wanted)


def _trackio() -> Any:
    if importlib.util.find_spec("trackio") is None:
        raise UsageError("Trackio is not installed", "pip install 'abacist[trackio]'")
    import trackio

    if not hasattr(trackio, "Trace"):
        raise UsageError(
            f"Trackio {trackio.__version__} has no traces", "pip install --upgrade trackio"
        )
    if trackio.context_vars.current_run.get() is not None:
        # Trackio would end it: a process has one run at a time.
        raise UsageError("a Trackio run is open in this process", "trackio.finish() ends it.")
    return trackio


def _count(path: Path) -> int:
    try:
        return int(pq.read_metadata(path).num_rows)
    except (pa.ArrowException, OSError) as error:
        raise RunError(f"{path}: not a readable rollout file ({error}).") from error


def _delete_earlier(trackio: Any, project: str, name: str, origin: str) -> None:
    """Remove what an earlier export of this run left. Nobody else's run is touched."""
    if not hasattr(trackio, "Api"):
        return
    for run in list(trackio.Api().runs(project)):
        if run.name == name and (run.config or {}).get(_EXPORT_OF) == origin:
            run.delete()


def _trace(trackio: Any, rollout: Rollout) -> Any:
    about = {
        "step": rollout.step,
        "problem_id": rollout.problem_id,
        "difficulty": rollout.difficulty,
        "group": rollout.group,
        "member": rollout.member,
        "gold": rollout.gold,
        "read_answer": rollout.read_answer,
        "is_correct": rollout.is_correct,
        "stop_reason": rollout.stop_reason.value,
        "completion_tokens": rollout.completion_tokens,
        "reward": rollout.reward,
        "advantage": rollout.advantage,
        "trained": rollout.trained,
        "steps": None
        if rollout.steps is None
        else outcomes_words(step.outcome for step in rollout.steps),
    }
    return trace(trackio, rollout.messages, rollout.completion, rollout.rewards, about)
