"""The canary lets rounding pass and stops a run whose sampling engine holds another model."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import TrainerState

from abacist.errors import ModelError
from abacist.learning import canary, reply_selection
from abacist.learning.arguments import GRPOConfig
from abacist.learning.fast_trainer import FastTrainer
from abacist.learning.trainer import GRPOTrainer


def trainer_of(processes: int = 1, **sampling: Any) -> Any:
    """One that samples from the whole distribution, among so many processes that are alike."""
    whole = {"top_p": 1.0, "top_k": 0, "min_p": None, "repetition_penalty": 1.0}
    accelerator = SimpleNamespace(reduce=lambda found, reduction: found * processes)
    return SimpleNamespace(accelerator=accelerator, **{**whole, **sampling})


TRAINER = trainer_of()


def output(difference: float, **more: Any) -> dict[str, Any]:
    theirs = torch.full((2, 3), -1.0)
    theirs[0, 0] = torch.nan  # a token vLLM gave no number for
    return {
        "prompt_ids": torch.ones(2, 2, dtype=torch.long),
        "prompt_mask": torch.ones(2, 2, dtype=torch.long),
        "completion_ids": torch.ones(2, 3, dtype=torch.long),
        "completion_mask": torch.tensor([[1, 1, 1], [1, 1, 0]]),
        "sampling_per_token_logps": theirs,
        "old_per_token_logps": torch.full((2, 3), -1.0 + difference),
        **more,
    }


@pytest.mark.parametrize("difference", [0.0, 0.02, -0.05])
def test_rounding_passes(difference: float) -> None:
    canary.check(TRAINER, output(difference), step=1)


@pytest.mark.parametrize("difference", [0.5, -0.5, float("nan")])
def test_another_model_stops_the_run_by_step_and_size(difference: float) -> None:
    with pytest.raises(ModelError, match="At step 7 vLLM"):
        canary.check(TRAINER, output(difference), step=7)


def test_padding_is_not_compared() -> None:
    found = output(0.0)
    found["old_per_token_logps"][1, 2] = 99.0
    canary.check(TRAINER, found, step=1)


def test_without_old_log_probabilities_the_model_is_asked() -> None:
    asked = []

    def score(model: Any, ids: torch.Tensor, mask: torch.Tensor, kept: int, batch_size: int) -> Any:
        asked.append((ids.shape, kept, batch_size))
        return torch.full((2, 3), -1.0), None, None

    trainer = trainer_of(
        model=None,
        args=SimpleNamespace(per_device_train_batch_size=2),
        _get_per_token_logps_and_entropies=score,
    )
    canary.check(trainer, output(0.0, old_per_token_logps=None), step=1)
    assert asked == [(torch.Size([2, 5]), 3, 2)]


def test_where_vllm_reported_nothing_nothing_is_compared() -> None:
    canary.check(TRAINER, output(9.0, sampling_per_token_logps=None), step=1)


def test_tokens_of_tools_and_replies_that_are_all_left_out_say_nothing() -> None:
    found = output(0.0, tool_mask=torch.tensor([[1, 0, 1], [1, 1, 1]]))
    found["old_per_token_logps"][0, 1] = 99.0
    canary.check(TRAINER, found, step=1)
    canary.check(TRAINER, output(9.0, completion_mask=torch.zeros(2, 3).long()), step=1)


@pytest.mark.parametrize(
    "sampling", [{"top_p": 0.8}, {"top_k": 20}, {"min_p": 0.1}, {"repetition_penalty": 1.1}]
)
def test_where_sampling_changes_the_distribution_nothing_is_compared(
    sampling: dict[str, float],
) -> None:
    canary.check(trainer_of(**sampling), output(0.5), step=1)
    with pytest.raises(ModelError):
        canary.check(trainer_of(top_k=None, min_p=0.0), output(0.5), step=1)


def test_a_process_whose_own_tokens_agree_stops_with_the_others() -> None:
    trainer = trainer_of()
    trainer.accelerator.reduce = lambda found, reduction: found + torch.tensor([9.0, 1.0])
    with pytest.raises(ModelError, match="vLLM"):
        canary.check(trainer, output(0.0), step=1)


@pytest.mark.parametrize(
    ("use_vllm", "every", "checked"),
    [(True, 2, [1, 3, 5]), (True, 1, [1, 2, 3, 4, 5]), (True, 0, []), (False, 2, [])],
)
def test_the_trainer_compares_every_so_many_steps_where_vllm_samples(
    use_vllm: bool, every: int, checked: list[int], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    made = output(0.0, advantages=torch.zeros(2))
    monkeypatch.setattr(FastTrainer, "_generate_and_score_completions", lambda *_: made)
    seen: list[int] = []

    def check(trainer: Any, output: Any, step: int) -> None:
        assert output is made
        seen.append(step)

    monkeypatch.setattr(canary, "check", check)
    for name in ("silence", "count_silent"):  # it has no rewards
        monkeypatch.setattr(reply_selection, name, lambda *_: None)
    trainer = GRPOTrainer.__new__(GRPOTrainer)
    trainer.model = torch.nn.Linear(1, 1)
    trainer.args = GRPOConfig(output_dir=str(tmp_path), vllm_canary_steps=every, use_cpu=True)
    trainer.use_vllm, trainer._scored, trainer.gates_by_outcome = use_vllm, None, False
    trainer._fusion = SimpleNamespace(position=(0, 1))  # a step begins
    for step in range(5):
        trainer.state = TrainerState(global_step=step)
        trainer._generate_and_score_completions([])
    assert seen == checked
