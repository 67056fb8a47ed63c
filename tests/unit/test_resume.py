"""Exact resume: a sample of tests/soak/resume_matrix.py, and what a plain script may count on."""

from __future__ import annotations

import errno
import json
import os
import pickle
import random
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import transformers
import trl
from datasets import Dataset
from peft import get_peft_model_state_dict
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from abacist.errors import RunError
from abacist.learning.resume import checkpoints, resuming
from abacist.learning.resume.checkpoints import MANIFEST_NAME, checkpoints_of, defect, seal, step_of
from abacist.learning.trainer import GRPOTrainer
from abacist.records.provenance import build_manifest
from abacist.records.rundir import RunDir
from faults import fault
from soak.resume_matrix import (
    BASE,
    Case,
    by_name,
    complete,
    differences,
    length_reward,
    make_trainer,
    resume_from,
    stop_in_step,
)

STEPS = {"max_steps": 6, "max_completion_length": 4}
SAMPLE = (
    ("kl from an adapter", 5),  # inside the second epoch
    ("two steps a generation, two iterations, accumulation", 3),  # completions still to be used
    ("half of the replies, two iterations", 3),
    ("reference sync", 4),
    ("solve rates, accumulation, short epochs", 3),
    ("workers", 4),  # between two epochs
    ("logs by epoch", 4),  # before the epoch's own log and evaluation
)
Lookalike = Callable[[str], Path]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    import lookalikes

    folder = tmp_path_factory.mktemp("model") / "qwen"
    return lookalikes.build("qwen2.5-instruct", folder, size=32)


@pytest.fixture(scope="module")
def whole(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return complete(by_name("lora"), model, tmp_path_factory.mktemp("whole") / "run", **STEPS)


@pytest.mark.parametrize(("name", "step"), SAMPLE)
def test_a_resumed_run_is_the_uninterrupted_one_to_the_last_byte(
    name: str, step: int, model: Path, tmp_path: Path
) -> None:
    case = by_name(name)
    uninterrupted = complete(case, model, tmp_path / "whole" / "run", **STEPS)
    steps = [step_of(path) for path in checkpoints_of(uninterrupted)]
    assert steps == [0, 1, 2, 3, 4, 5, 6]
    resumed = resume_from(case, model, uninterrupted, step, tmp_path / "again" / "run", **STEPS)
    assert differences(uninterrupted, resumed) == []


def test_a_resume_with_another_state_is_told_from_an_exact_one(
    whole: Path, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The comparison itself must be able to fail.
    from abacist.learning.resume import training_state

    monkeypatch.setattr(training_state, "set_random_state", lambda saved: torch.manual_seed(7))
    case = by_name("lora")
    resumed = resume_from(case, model, whole, 2, tmp_path / "run", **STEPS)
    assert {"adapter_model.safetensors", "metrics.jsonl"} <= set(differences(whole, resumed))


def test_every_adapter_comes_out_of_a_checkpoint_as_it_went_in_whichever_ones_transformers_loads(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # transformers before 5.23 passes over the trained adapter where TRL's reference lies beside it.
    case, short = by_name("kl from an adapter"), STEPS | {"max_steps": 2}
    run = complete(case, model, tmp_path / "run", **short)
    again = make_trainer(case, model, tmp_path / "again", **short)
    assert set(again.model.peft_config) == {"default", "ref"}
    with torch.no_grad():
        for name, weight in again.model.named_parameters():
            if "lora_" in name:
                weight.fill_(7.0)
    monkeypatch.setattr(
        transformers.Trainer, "_load_from_checkpoint", lambda self, folder, model=None: None
    )
    again._load_from_checkpoint(str(run / "checkpoint-2"))
    for name, place in (("default", run / "checkpoint-2"), ("ref", run / "checkpoint-2" / "ref")):
        saved = load_file(place / "adapter_model.safetensors")
        loaded = get_peft_model_state_dict(again.model, adapter_name=name)
        assert saved.keys() == loaded.keys()
        assert all(torch.equal(loaded[key], saved[key]) for key in saved)


def test_a_checkpoint_that_lacks_a_trained_weight_is_not_resumed(
    model: Path, tmp_path: Path
) -> None:
    case, short = by_name("lora"), STEPS | {"max_steps": 1}
    checkpoint = complete(case, model, tmp_path / "run", **short) / "checkpoint-1"
    file = checkpoint / "adapter_model.safetensors"
    weights = load_file(file)
    lost = weights.popitem()[0].removesuffix(".weight")
    save_file(weights, file, {"format": "pt"})
    again = make_trainer(case, model, tmp_path / "again", **short)
    with pytest.raises(RunError, match=f"lacks 1 of the weights that are trained, such as {lost}"):
        again._load_from_checkpoint(str(checkpoint))


def test_all_that_was_recorded_after_a_checkpoint_is_cut_and_nothing_before_it(
    tmp_path: Path,
) -> None:
    from abacist.learning.resume.training_state import cut_after

    names = ["step-000001", "step-000002-part1", "step-000003", "step-000003-part2", "step-000010"]
    (tmp_path / "rollouts").mkdir()
    for name in names:
        (tmp_path / "rollouts" / f"{name}.parquet").write_bytes(b"rows")
    for name in ("metrics.jsonl", "timings.jsonl", "mine.jsonl"):
        (tmp_path / name).write_bytes(b"1\n2\n3\n")
    cut_after(tmp_path, 2, {"metrics.jsonl": 4, "timings.jsonl": 99, "mine.jsonl": 0})
    kept = sorted(path.stem for path in (tmp_path / "rollouts").iterdir())
    assert kept == names[:2]
    assert (tmp_path / "metrics.jsonl").read_bytes() == b"1\n2\n"
    assert (tmp_path / "timings.jsonl").read_bytes() == b"1\n2\n3\n"
    assert (tmp_path / "mine.jsonl").read_bytes() == b"1\n2\n3\n"


def test_a_trainer_that_counts_from_step_0_has_a_state_too(model: Path, tmp_path: Path) -> None:
    # transformers before 5.19: the trainer has no first step of its own.
    from abacist.learning.resume.training_state import capture, restore

    trainer = make_trainer(by_name("lora"), model, tmp_path / "run", **STEPS | {"max_steps": 1})
    trainer.train()
    vars(trainer).pop("_initial_global_step", None)
    saved = capture(trainer)
    assert saved["first_step"] == 0
    restore(trainer, saved)
    assert trainer._initial_global_step == 0


@pytest.mark.parametrize("sampling", ["uniform", "solve_rate"])
def test_a_stop_inside_a_step_takes_the_step_back_and_loses_nothing(
    sampling: str, model: Path, tmp_path: Path
) -> None:
    # Epochs of two steps: stopped inside the first and the second, and read on to the third.
    case = Case("stop", {"gradient_accumulation_steps": 2, "problem_sampling": sampling})
    uninterrupted = complete(case, model, tmp_path / "whole" / "run", **STEPS)
    run = tmp_path / "again" / "run"
    stop = stop_in_step(case, model, run, 4, **STEPS)  # the second half of step 2
    assert (stop.step, stop.max_steps, stop.checkpoint) == (1, 6, run / "checkpoint-1")
    assert stop_in_step(case, model, run, 5, **STEPS).step == 3
    trainer = make_trainer(case, model, run, **STEPS)
    trainer.train(resume_from_checkpoint=True)
    trainer.save_model()
    assert differences(uninterrupted, run) == []


def test_the_best_weights_are_those_at_the_end_also_after_a_resume_and_never_damaged_ones(
    model: Path, tmp_path: Path
) -> None:
    accuracies = dict(zip(range(1, 5), (0.2, 0.7, 0.3, 0.5), strict=True))
    case = Case(
        "best",
        {
            "eval_strategy": "steps",
            "eval_steps": 1,
            "metric_for_best_model": "accuracy",
            "load_best_model_at_end": True,
        },
    )

    def trainer_in(run: Path) -> GRPOTrainer:
        trainer = make_trainer(case, model, run, **STEPS | {"max_steps": 4})
        trainer.evaluator = lambda _: {"accuracy": accuracies[trainer.state.global_step]}
        return trainer

    def held(trainer: GRPOTrainer) -> dict[str, torch.Tensor]:
        return get_peft_model_state_dict(trainer.model)

    run = tmp_path / "run"
    run.mkdir()
    whole = trainer_in(run)
    whole.train()
    best, last = (
        load_file(run / f"checkpoint-{step}" / "adapter_model.safetensors") for step in (2, 4)
    )
    assert all(torch.equal(held(whole)[name], weight) for name, weight in best.items())
    assert any(not torch.equal(best[name], weight) for name, weight in last.items())
    assert whole.state.best_model_checkpoint == str(run / "checkpoint-2")

    shutil.rmtree(run / "checkpoint-4")
    moved = run.rename(tmp_path / "moved")  # the best is looked for where the run is now
    resumed = trainer_in(moved)
    resumed.train(resume_from_checkpoint=True)
    assert all(torch.equal(held(resumed)[name], weight) for name, weight in best.items())

    shutil.rmtree(moved / "checkpoint-4")
    (moved / "checkpoint-2" / "adapter_model.safetensors").write_bytes(b"")
    with pytest.raises(RunError, match=r"The best checkpoint is not loaded: .*checkpoint-2"):
        trainer_in(moved).train(resume_from_checkpoint=True)


def plain_trainer(model: Path, run: Path, **settings: Any) -> GRPOTrainer:
    """A script that changed one import of TRL's and nothing else."""
    plain = {key: value for key, value in BASE.items() if key != "keep_rollouts"}
    return GRPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32),
        reward_funcs=[length_reward],
        args=trl.GRPOConfig(output_dir=str(run), **{**plain, "max_steps": 3, **settings}),
        train_dataset=Dataset.from_list([{"prompt": f"{n} + 1?"} for n in range(8)]),
        processing_class=AutoTokenizer.from_pretrained(model, padding_side="left"),
    )


def length_reward_of_text(completions: list[str], **columns: Any) -> list[float]:
    return [len(set(text)) / 10 for text in completions]


def test_a_plain_script_resumes_from_its_newest_sound_checkpoint(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(globals(), "length_reward", length_reward_of_text)
    run = tmp_path / "run"
    trainer = plain_trainer(model, run)
    trainer.train()
    weights = {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}
    (run / "checkpoint-3" / "optimizer.pt").write_bytes(b"")
    shutil.rmtree(run / "checkpoint-2")
    again = plain_trainer(model, run)
    again.train(resume_from_checkpoint=True)
    assert all(torch.equal(tensor, weights[n]) for n, tensor in again.model.state_dict().items())
    assert "checkpoint-3 is passed over" in caplog.text and "optimizer.pt" in caplog.text
    assert "checkpoint-1: step 1 of 3" in caplog.text
    with pytest.raises(RunError, match="no sound checkpoint"):
        plain_trainer(model, tmp_path / "none").train(resume_from_checkpoint=True)


def test_a_script_may_go_on_in_another_folder_whose_records_are_left_alone(
    whole: Path, model: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    run.mkdir()
    mine = "x" * 9000
    (run / "metrics.jsonl").write_text(mine, encoding="utf-8")
    trainer = make_trainer(by_name("lora"), model, run, **STEPS)
    trainer.train(resume_from_checkpoint=str(whole / "checkpoint-4"))
    assert (run / "metrics.jsonl").read_text(encoding="utf-8").startswith(mine)
    assert [step_of(path) for path in checkpoints_of(run)] == [5, 6]
    name = "checkpoint-6/adapter_model.safetensors"
    assert (run / name).read_bytes() == (whole / name).read_bytes()


def test_without_saving_there_is_no_checkpoint_not_even_the_first(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(globals(), "length_reward", length_reward_of_text)
    plain_trainer(model, tmp_path / "run", save_strategy="no", max_steps=1).train()
    assert checkpoints_of(tmp_path / "run") == []


def test_resuming_a_finished_training_makes_no_step(
    whole: Path, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_step(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("a step was made")

    monkeypatch.setattr(GRPOTrainer, "training_step", no_step)
    resumed = resume_from(by_name("lora"), model, whole, 6, tmp_path / "run", **STEPS)
    assert differences(whole, resumed) == []


class Payload:
    """Runs code when it is unpickled by anything but a weights-only loader."""

    def __init__(self, witness: Path) -> None:
        self.witness = witness

    def __reduce__(self) -> Any:
        return Path.touch, (self.witness,)


@fault("checkpoints", "a pickle payload in a file, with the right sums",
       "the file, and that it cannot be loaded; nothing in it is run")  # fmt: skip
@pytest.mark.parametrize("name", ["grpo_state.pt", "optimizer.pt", "scheduler.pt", "rng_state.pth"])
def test_a_pickle_payload_in_a_checkpoint_runs_nothing(
    name: str, whole: Path, model: Path, tmp_path: Path
) -> None:
    witness, run = tmp_path / "it ran", tmp_path / "run"
    payload = pickle.dumps(Payload(witness))
    assert (pickle.loads(payload), witness.exists())[1]
    witness.unlink()
    shutil.copytree(whole / "checkpoint-6", run / "checkpoint-6")
    (run / "checkpoint-6" / name).write_bytes(payload)
    (run / "checkpoint-6" / "training_args.bin").write_bytes(payload)
    (run / "checkpoint-6" / MANIFEST_NAME).unlink()
    seal(run / "checkpoint-6", 6)  # its sums are right: only the loader stands between
    trainer = make_trainer(by_name("lora"), model, run, **STEPS)
    if name == "rng_state.pth":  # TRL's, which is not read
        trainer.train(resume_from_checkpoint=True)
    else:
        with pytest.raises(RunError, match=r"cannot be (read|loaded)"):
            trainer.train(resume_from_checkpoint=True)
    assert not witness.exists()


def _of_the_system(value: Any, place: Any) -> None:
    raise OSError(errno.ENOSPC, "No space left on device", str(place))


def _of_torchs_writer(value: Any, place: Any) -> None:
    if not Path("/dev/full").exists():
        raise RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 64 vs 0")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        real_save(value, "/dev/full")


def _of_safetensors(value: Any, place: Any) -> None:
    raise SafetensorError("Error while serializing: I/O error: No space left (os error 28)")


def _of_a_disk_that_broke(value: Any, place: Any) -> None:
    raise OSError(errno.EIO, "Input/output error", str(place))


real_save = torch.save
FULL = r"(the disk .* is full|PyTorch could not write to .*run)"


@fault("checkpoints", "the disk is full", "which save failed; the checkpoint before it stands")
@pytest.mark.parametrize(
    ("fails", "says"),
    [
        (_of_the_system, r"the disk .* is full"),
        (_of_torchs_writer, FULL),
        (_of_safetensors, r"the disk .* is full"),
        (_of_a_disk_that_broke, r"Input/output error"),
    ],
)
def test_a_full_disk_keeps_the_checkpoint_before_and_says_so(
    fails: Any, says: str, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"

    def save(value: Any, place: Any, *args: Any, **kwargs: Any) -> None:
        if "checkpoint-1" in str(place) and "optimizer" in str(place):
            fails(value, place)
        real_save(value, place, *args, **kwargs)

    monkeypatch.setattr(torch, "save", save)
    run.mkdir()
    with pytest.raises(RunError, match=rf"checkpoint-1 was not saved: {says}") as found:
        make_trainer(by_name("lora"), model, run, **STEPS).train()
    assert "resume" in found.value.hint
    assert [path.name for path in checkpoints_of(run)] == ["checkpoint-0"]
    assert all(defect(path) is None for path in checkpoints_of(run))
    assert not list(run.glob(f"{checkpoints.ASIDE}*"))


def test_a_full_disk_at_the_end_names_the_model_and_an_error_of_another_kind_stays_its_own(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = make_trainer(by_name("lora"), model, tmp_path / "run", **STEPS)
    stock = transformers.Trainer.save_model
    for error, expected in (
        (SafetensorError("Error while serializing: I/O error: No space left on device"), RunError),
        (RuntimeError("[enforce fail at inline_container.cc:862] . file write failed"), RunError),
        (RuntimeError("a mistake in a callback"), RuntimeError),
    ):

        def fails(self: Any, folder: str, _internal_call: bool, error: Exception = error) -> None:
            stock(self, folder, _internal_call)
            raise error

        monkeypatch.setattr(transformers.Trainer, "save_model", fails)
        with pytest.raises(expected, match=r"the trained model was not saved|a mistake"):
            trainer.save_model()
        assert not list((tmp_path / "run").iterdir())


def test_another_learning_rate_at_resume_takes_effect(
    whole: Path, model: Path, tmp_path: Path
) -> None:
    case = by_name("lora")
    resumed = resume_from(
        case, model, whole, 3, tmp_path / "run", **STEPS, learning_rate=BASE["learning_rate"] / 2
    )
    rates = [
        [
            json.loads(line).get("learning_rate")
            for line in (run / "metrics.jsonl").open(encoding="utf-8")
        ]
        for run in (whole, resumed)
    ]
    assert rates[0][:3] == rates[1][:3]
    assert rates[1][3:6] == pytest.approx([rate / 2 for rate in rates[0][3:6]])


PARTS = {
    "data": "problems changed",
    "rewards": "reward code changed",
    "model": "initial weights changed",
}


@pytest.mark.parametrize("changed", [["data"], ["rewards"], ["model"], list(PARTS), []], ids=str)
@pytest.mark.parametrize("force", [False, True])
def test_a_run_made_of_something_else_is_refused_by_what_has_changed_or_forced_and_recorded(
    changed: list[str], force: bool, tmp_path: Path
) -> None:
    begun = build_manifest(seed=0, argv=[]) | {name: {"sha256": name} for name in PARTS}
    run = RunDir(tmp_path)
    run.write_manifest(begun)
    now = begun | {name: {"sha256": "another"} for name in changed}
    config: Any = SimpleNamespace(script=SimpleNamespace(force=force))
    notes: list[str] = []
    watcher: Any = SimpleNamespace(note=notes.append)
    if changed and not force:
        with pytest.raises(RunError, match="is not resumed, because these have changed") as found:
            resuming.checked_resumption(config, run, now, {}, watcher)
        told = found.value.message
    else:
        resumed = resuming.checked_resumption(config, run, now, {}, watcher)["resumed"]
        told = "\n".join(resumed[0]["forced"])
        assert all(any(line in note for note in notes) for line in resumed[0]["forced"])
    assert [name for name, words in PARTS.items() if f"{name}: {words}" in told] == changed


def test_a_resumed_run_joins_its_wandb_run_and_the_next_run_of_the_process_does_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from abacist.learning.resume import training_state

    monkeypatch.delenv("WANDB_RUN_ID", raising=False)
    monkeypatch.delenv("WANDB_RESUME", raising=False)
    with training_state.joined_trackers({"tracker": {"WANDB_RUN_ID": "abc"}}):
        assert os.environ["WANDB_RUN_ID"] == "abc" and os.environ["WANDB_RESUME"] == "allow"
    assert "WANDB_RUN_ID" not in os.environ and "WANDB_RESUME" not in os.environ
    monkeypatch.setenv("WANDB_RUN_ID", "mine")
    with training_state.joined_trackers({"tracker": {"WANDB_RUN_ID": "abc"}}):
        assert os.environ["WANDB_RUN_ID"] == "mine"
    assert os.environ["WANDB_RUN_ID"] == "mine"


def test_the_controller_of_the_entropy_bonus_is_taken_back_with_its_step(
    model: Path, tmp_path: Path
) -> None:
    from abacist.learning.resume.training_state import capture, load_state, restore, save_state

    settings = STEPS | {"max_steps": 1, "use_adaptive_entropy": True, "entropy_coef": 0.1}
    trainer = make_trainer(by_name("lora"), model, tmp_path / "run", **settings)
    trainer.train()
    names = ("entropy_coef", "_last_world_entropy", "_entropy_window_stats")
    before = [getattr(trainer, name) for name in names]
    save_state(capture(trainer), tmp_path / "state.pt")
    for name in names:
        setattr(trainer, name, 77.0)
    restore(trainer, load_state(tmp_path / "state.pt"))
    assert [getattr(trainer, name) for name in names] == before and 77.0 not in before


def test_every_random_generator_comes_back() -> None:
    from abacist.learning.resume.training_state import random_state, set_random_state

    def draw() -> tuple[float, ...]:
        numbers = random.random(), random.gauss(0, 1), np.random.rand(), np.random.randn()
        return (*numbers, torch.rand(1).item())

    saved = random_state()
    first = draw()
    assert draw() != first
    set_random_state(saved)
    assert draw() == first
