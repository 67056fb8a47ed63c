"""A model that this machine's memory cannot hold is refused before it is loaded, with numbers and
the flag that fits."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from abacist.errors import ModelError
from abacist.learning import enough_memory, train
from abacist.learning.config import load_config
from abacist.learning.dryrun import memory
from abacist.learning.enough_memory import refuse_too_large
from abacist.learning.tracking import Silent

WEIGHTS = 1_716_000  # of the built-in model, about


def refused(monkeypatch: pytest.MonkeyPatch, there: int, *flags: str) -> ModelError | None:
    monkeypatch.setattr(memory, "available_bytes", lambda *args: there)
    try:
        refuse_too_large(load_config("tiny", None, ["--device", "cpu", *flags]))
    except ModelError as error:
        return error
    return None


def test_what_fits_is_left_alone_and_what_does_not_is_told_in_numbers(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert refused(monkeypatch, 8 * WEIGHTS) is None
    assert refused(monkeypatch, 5 * WEIGHTS, "--dtype", "bfloat16") is None
    error = refused(monkeypatch, 3 * WEIGHTS)
    assert error is not None
    assert "'tiny' does not fit: its 0.0018 billion weights take 7 MiB in float32" in error.message
    assert "and 5 MiB of memory are available" in error.message
    assert error.hint.startswith("--dtype bfloat16 holds them in 3 MiB")
    assert refused(monkeypatch, 3 * WEIGHTS, "--dtype", "bfloat16") is None  # as it said


def test_each_process_of_a_machine_needs_a_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    error = refused(monkeypatch, 8 * WEIGHTS)
    assert error is not None and "available to each of 4 processes." in error.message
    assert refused(monkeypatch, 17 * WEIGHTS) is None


def test_all_weights_need_gradients_and_moments_and_an_adapter_does_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    error = refused(monkeypatch, 10 * WEIGHTS, "--no_use_peft")
    assert error is not None and "with gradients and the optimizer's state" in error.message
    assert error.hint.startswith("--use_peft trains an adapter")
    assert refused(monkeypatch, 10 * WEIGHTS) is None
    assert refused(monkeypatch, 17 * WEIGHTS, "--no_use_peft") is None
    assert refused(monkeypatch, 10 * WEIGHTS, "--no_use_peft", "--optim", "sgd") is None


def test_where_no_flag_helps_a_smaller_model_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    for flags in ([], ["--no_use_peft"], ["--dtype", "bfloat16"]):
        error = refused(monkeypatch, WEIGHTS, *flags)
        assert error is not None and "smollm2-135m" in error.hint


def test_a_run_is_refused_before_its_model_is_loaded(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(memory, "available_bytes", lambda *args: WEIGHTS)
    monkeypatch.setattr(train, "load_trainable", lambda config: pytest.fail("was loaded"))
    flags = [
        "--device", "cpu", "--output_dir", str(tmp_path / "run"), "--num_heldout_problems", "4",
        "--num_train_problems", "8", "--num_selection_problems", "0",
    ]  # fmt: skip
    with pytest.raises(ModelError, match="does not fit"):
        train.train(load_config("tiny", None, flags), Silent())
    assert not (tmp_path / "run").exists()


def test_damaged_weights_are_left_to_loading(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"nothing")
    assert enough_memory._weights_in(tmp_path) == 0


@pytest.mark.parametrize(("share", "there"), [(1.0, 70), (0.24, 24), (0.8, 70)])
def test_on_a_gpu_a_process_has_no_more_than_the_share_it_was_given(
    share: float, there: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in (
        ("mem_get_info", (60, 100)),
        ("memory_reserved", 10),
        ("get_per_process_memory_fraction", share),
    ):
        monkeypatch.setattr(torch.cuda, name, lambda device, value=value: value)
    assert memory.available_bytes(torch.device("cuda")) == there
