"""Does a gain depend on how many worked examples stand in the prompt?

Training under one prompt can teach a model to follow that prompt. So base and trained policy are
asked the problems of the run's own verdict again, greedily, with other numbers of examples, all
else as it was. What has been measured is kept in ``evals/shots-N`` of the run, reply by reply, and
not measured twice.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from abacist.errors import AbacistError
from abacist.learning.config import Config, load_config
from abacist.learning.rewards import reported_rewards
from abacist.learning.task import load_task
from abacist.learning.tracking import Watcher, told_of
from abacist.policy.choices import float32_matmul_precision
from abacist.policy.loading import load_policy
from abacist.proof.comparison.alike import refuse_unlike
from abacist.proof.comparison.compare import Comparison, compare
from abacist.proof.comparison.sides import AFTER, BEFORE, load_side
from abacist.proof.evaluate import Evaluation, evaluate
from abacist.proof.evaluation import GREEDY
from abacist.proof.unfinished import EvaluationFolder, asked_in, says_how_to_go_on
from abacist.records.provenance import data_fingerprint
from abacist.records.rundir import RunDir
from abacist.task.custom_rewards import RewardFunc
from abacist.task.prompts import GIST, Shots, system_text


def measure_shots(
    path: Path, counts: Sequence[int], watcher: Watcher
) -> tuple[dict[int, Comparison], int]:
    """Base against trained policy at each number of worked examples, and the number trained with.

    Raises RunError for no run, an unfinished one, or one that is being written; ModelError if the
    examples do not fit the model's context; DataError if there are too few to show; Interrupted
    for Ctrl-C and SIGTERM, with the replies so far kept for the next call.
    """
    run = RunDir.open(path)
    own = {when: load_side(str(path), when).evaluation for when in (BEFORE, AFTER)}
    config = load_config(None, str(run.config_path), [])
    found = {
        (count, when): kept
        for count in counts
        for when in own
        if (kept := _kept(run, config, own[when], count, when)) is not None
    }
    if len(found) < len(own) * len(counts):
        run.lock()
        try:
            rewards = reported_rewards(config.settings, watcher.note, brought_in=run.path)
            # These figures stand beside the verdict, so they are measured in its precision.
            with float32_matmul_precision(config.model.float32_matmul_precision):
                for when in own:
                    if missing := [count for count in counts if (count, when) not in found]:
                        found |= _measure(run, config, own[when], missing, when, rewards, watcher)
        finally:
            run.release()
    control = config.script.control
    compared = {
        count: compare(found[count, BEFORE], found[count, AFTER], control=control)
        for count in counts
    }
    return compared, own[BEFORE].settings.num_shots


def _kept(run: RunDir, config: Config, own: Evaluation, count: int, when: str) -> Evaluation | None:
    """What was measured already: by the run itself, or by an earlier call."""
    if own.settings.num_shots == count and config.script.num_shots != GIST:
        return own
    folder = _folder(run, count, when)
    if not (folder / "evaluation.json").is_file():
        return None
    evaluation = Evaluation.load(folder)
    try:
        refuse_unlike(own, evaluation, allow_different=("shots",))
    except AbacistError:  # of another verdict: measured anew
        return None
    return evaluation


def _measure(
    run: RunDir,
    config: Config,
    own: Evaluation,
    counts: list[int],
    when: str,
    rewards: tuple[list[RewardFunc], list[float] | None],
    watcher: Watcher,
) -> dict[tuple[int, str], Evaluation]:
    name = config.model.model_name_or_path if when == BEFORE else str(run.path)
    watcher.stage(f"Measuring {'the base' if when == BEFORE else 'the trained policy'}: {name}")
    policy = load_policy(
        name,
        dtype=config.model.dtype,
        device=config.device,
        attn_implementation=config.model.attn_implementation,
        revision=config.model.model_revision if when == BEFORE else None,
        quantization=config.model.quantization if when == BEFORE else None,
    )
    measured = {}
    for count in counts:
        shots = _shots(config, count)
        asked = {
            "model": name,
            "problems": data_fingerprint(own.problems),
            "shots": data_fingerprint(shots.all),
            "max_completion_length": own.settings.max_completion_tokens,
            "date": policy.chat.date_string,
            **{choice.what: choice.value for choice in policy.choices},
        }
        place = _folder(run, count, when)
        # What stands there and asked otherwise is of another verdict, or of another machine.
        overwrite = asked_in(place) != asked
        with (
            EvaluationFolder.open(place, asked, overwrite=overwrite) as folder,
            says_how_to_go_on(folder, len(own.problems)),
        ):
            evaluation = evaluate(
                policy,
                own.problems,
                system_prompt=system_text(config.script.system_prompt),
                shots=shots,
                max_completion_tokens=own.settings.max_completion_tokens,
                batch_size=config.script.eval_batch_size,
                progress=told_of(watcher, f"{when} training, {count} shots"),
                rewards=rewards[0],
                reward_weights=rewards[1],
                run_id=run.run_id,
                conditions={"arithmetic": policy.arithmetic},
                parts=folder.parts(GREEDY),
            )
            evaluation.save(place)
            folder.finish()
        measured[count, when] = evaluation
    return measured


def _shots(config: Config, count: int) -> Shots:
    """The examples the run itself would have had with so many shots."""
    script = config.script
    chosen, script.num_shots = script.num_shots, str(count)
    try:
        return load_task(config).shots
    finally:
        script.num_shots = chosen


def _folder(run: RunDir, count: int, when: str) -> Path:
    return run.evals_dir / f"shots-{count}" / when
