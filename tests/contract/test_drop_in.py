"""Swapping one import changes nothing that a script can see: ``abacist.GRPOTrainer`` with a plain
``trl.GRPOConfig`` trains to TRL's weights and logs TRL's numbers under TRL's names.

One freedom is taken: which step a completion goes to, where one generation serves several, is
random in both and differs, because ours keeps groups whole (``fastpath.whole_groups``).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import trl
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationMixin

from abacist.learning.trainer import GRPOTrainer

Lookalike = Callable[[str], Path]
G, BUDGET = 4, 8


def long_or_short(completions: Any, completion_ids: Any, **columns: Any) -> list[float]:
    return [len(ids) % 5 / 4 for ids in completion_ids]


def sometimes(prompts: Any, completions: Any, completion_ids: Any, **columns: Any) -> list[Any]:
    return [None if sum(ids) % 3 == 0 else float(ids[0] % 2) for ids in completion_ids]


async def later(completions: Any, completion_ids: Any, **columns: Any) -> list[float]:
    return [float(ids[-1] % 2) for ids in completion_ids]


def by_column(completions: Any, wanted: Any, **columns: Any) -> list[float]:
    return [float(one) for one in wanted]


# What a script may ask of the trainer: settings, and what is given beside them.
ASKED: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "nothing special": ({}, {}),
    "all weights": ({}, {"lora": False}),
    "plain-text prompts": ({}, {"plain": True}),
    "two rewards, one not always applicable": (
        {"reward_weights": [0.7, 0.3]}, {"rewards": [long_or_short, sometimes]}),
    "a coroutine as reward": ({}, {"rewards": [later]}),
    "a reward that reads a column": ({}, {"rewards": [by_column, long_or_short]}),
    "advantages not divided": ({"scale_rewards": "none"}, {}),
    "advantages divided by the batch": ({"scale_rewards": "batch"}, {}),
    "two updates from one generation": ({"num_iterations": 2}, {}),
    "micro-batches": (
        {"per_device_train_batch_size": G, "gradient_accumulation_steps": 3}, {}),
    "less than a group at once": (
        {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4}, {}),
    "a KL term": ({"beta": 0.2}, {}),
    "a reference that follows": (
        {"beta": 0.2, "sync_ref_model": True, "ref_model_sync_steps": 1}, {"lora": False}),
    "two-sided clipping": ({"epsilon_high": 0.3, "delta": 1.5, "num_iterations": 2}, {}),
    "no shuffling": ({"shuffle_dataset": False}, {}),
    "truncated completions masked": ({"mask_truncated_completions": True}, {}),
    "an entropy bonus": ({"entropy_coef": 0.01}, {}),
    "evaluation": ({"eval_strategy": "steps", "eval_steps": 1,
                    "per_device_eval_batch_size": G}, {"evaluates": True}),
}  # fmt: skip


def trained(kind: type, folder: Path, output: Path, asked: str) -> tuple[list[Any], torch.Tensor]:
    """The log and the trained weights of a few steps on completions that only a counter decides."""
    settings, given = ASKED[asked]
    config: dict[str, Any] = {
        "output_dir": str(output), "bf16": False, "use_cpu": True, "num_generations": G,
        "per_device_train_batch_size": 2 * G, "max_completion_length": BUDGET, "max_steps": 2,
        "learning_rate": 0.05, "optim": "sgd", "lr_scheduler_type": "constant",
        "logging_steps": 1, "save_strategy": "no", "disable_tqdm": True, **settings,
    }  # fmt: skip
    questions = [f"How much is {n} and {7 * n + 1}?" for n in range(9)]
    plain = given.get("plain", False)
    rows = Dataset.from_list(
        [
            {"prompt": text if plain else [{"role": "user", "content": text}], "wanted": at % 2}
            for at, text in enumerate(questions)
        ]
    )
    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
    torch.manual_seed(0)
    trainer = kind(
        model=AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32),
        reward_funcs=given.get("rewards", [long_or_short]),
        args=trl.GRPOConfig(**config),
        train_dataset=rows,
        eval_dataset=rows.select(range(2)) if given.get("evaluates") else None,
        processing_class=tokenizer,
        peft_config=LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
        if given.get("lora", True)
        else None,
    )
    calls = itertools.count()

    def fixed(prompt_ids: Any, *args: Any, **kwargs: Any) -> Any:
        draw = torch.Generator().manual_seed(next(calls))
        stop = trainer.eos_token_ids[0]
        lengths = torch.randint(2, BUDGET, (len(prompt_ids),), generator=draw).tolist()
        written = [torch.randint(20, 200, (n,), generator=draw).tolist() for n in lengths]
        return [[*ids, stop] if row % 3 else ids for row, ids in enumerate(written)], None

    trainer._generate_single_turn = fixed
    trainer.train()
    model = trainer.accelerator.unwrap_model(trainer.model)
    learned = [p.detach().flatten() for p in model.parameters() if p.requires_grad]
    return trainer.state.log_history, torch.cat(learned)


def is_timing(name: str) -> bool:
    return name.endswith(("_time", "_runtime", "_per_second")) or name.startswith("profiling/")


@pytest.mark.parametrize("asked", ASKED)
def test_a_script_that_swaps_the_import_sees_trls_weights_and_trls_log(
    asked: str, lookalike: Lookalike, tmp_path: Path
) -> None:
    folder = lookalike("qwen2.5-instruct")
    (their_log, theirs), (our_log, ours) = (
        trained(kind, folder, tmp_path / kind.__module__, asked)
        for kind in (trl.GRPOTrainer, GRPOTrainer)
    )
    assert float((ours - theirs).abs().max()) < 1e-5
    assert len(our_log) == len(their_log)
    for our_row, their_row in zip(our_log, their_log, strict=True):
        assert {n for n in our_row if not is_timing(n)} == {
            n for n in their_row if not is_timing(n)
        }
        for name, value in their_row.items():
            # Over silent completions, which are not read, entropy is the mean of the others.
            if is_timing(name) or name == "entropy" or not isinstance(value, float):
                continue
            if math.isnan(value):
                assert math.isnan(our_row[name]), name
            else:
                assert our_row[name] == pytest.approx(value, rel=2e-4, abs=2e-6), name


@pytest.mark.parametrize("lora", [True, False])
@pytest.mark.parametrize("where", ["on the model", "on transformers' class"])
def test_a_script_that_replaces_generate_has_its_completions_scored(
    where: str, lora: bool, lookalike: Lookalike, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[list[int]] = []

    def generate(*args: Any, input_ids: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        return torch.cat([input_ids, torch.tensor([[30, 31, 32]] * len(input_ids))], dim=1)

    def reward(completion_ids: Any, **columns: Any) -> list[float]:
        seen.extend(completion_ids)
        return [0.0] * len(completion_ids)

    model = AutoModelForCausalLM.from_pretrained(lookalike("qwen2.5-instruct"))
    monkeypatch.setattr(model if where == "on the model" else GenerationMixin, "generate", generate)
    GRPOTrainer(
        model=model,
        reward_funcs=reward,
        args=trl.GRPOConfig(
            output_dir=str(tmp_path), bf16=False, use_cpu=True, max_steps=1, save_strategy="no",
            per_device_train_batch_size=G, num_generations=G, max_completion_length=BUDGET,
        ),
        train_dataset=Dataset.from_dict({"prompt": ["One and one?", "Two and two?"]}),
        processing_class=AutoTokenizer.from_pretrained(lookalike("qwen2.5-instruct")),
        peft_config=LoraConfig(r=4, target_modules="all-linear") if lora else None,
    ).train()  # fmt: skip
    assert seen == [[30, 31, 32]] * G
