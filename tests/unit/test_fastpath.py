"""The fast path computes what TRL computes: the same gradients on the same completions, the same
weights after ten steps; and where it would not, TRL's own path is taken and said once."""

from __future__ import annotations

import copy
import itertools
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import trl
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer

from abacist.learning import fastpath
from abacist.learning.trainer import GRPOTrainer
from abacist.policy.families import FastPart
from abacist.policy.kernels import build
from abacist.policy.model_parts import base_of

Lookalike = Callable[[str], Path]
G, PROBLEMS, BUDGET = 4, 4, 10
SHOT = [
    {"role": "user", "content": "Ada has 3 pens and finds 4. How many pens has Ada?"},
    {"role": "assistant", "content": "<reasoning>\n3+4=7\n</reasoning>\n<answer>\n7\n</answer>"},
]


def paid(prompts: Any, completions: Any, completion_ids: Any, **columns: Any) -> list[float]:
    """A reward with ties, so that some groups carry a signal and some do not."""
    return [float(sum(ids) % 3 == 0) if sum(ids[:1]) % 4 else 1.0 for ids in completion_ids]


def make(
    kind: type,
    folder: Path,
    output: Path,
    *,
    shots: int = 0,
    lora: bool = True,
    dtype: torch.dtype = torch.float32,
    **config: Any,
) -> Any:
    rows = [
        {
            "prompt": [
                *SHOT * shots,
                {"role": "user", "content": f"How much is {n} and {7 * n + 1}?"},
            ]
        }
        for n in range(8)
    ]
    settings: dict[str, Any] = {
        "output_dir": str(output),
        "bf16": False,
        "use_cpu": True,
        "num_generations": G,
        "per_device_train_batch_size": G * PROBLEMS,
        "max_completion_length": BUDGET,
        "learning_rate": 0.1,
        "optim": "sgd",
        "lr_scheduler_type": "constant",
        "max_grad_norm": 0.0,
        "max_steps": 1,
        "logging_steps": 1,
        "save_strategy": "no",
        "disable_tqdm": True,
        "gradient_checkpointing": False,
        **config,
    }
    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
    if "Llama" in str(type(tokenizer)) or tokenizer.pad_token is None:
        tokenizer.pad_token = "<|finetune_right_pad_id|>"
    torch.manual_seed(0)
    trainer = kind(
        model=AutoModelForCausalLM.from_pretrained(folder, dtype=dtype),
        reward_funcs=[paid],
        args=trl.GRPOConfig(**settings),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        peft_config=LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
        if lora
        else None,
    )
    return trainer


def fix_completions(trainer: Any) -> None:
    """Completions that depend on a counter alone, whoever trains."""
    calls = itertools.count()

    def fixed(prompt_ids: Any, *args: Any, **kwargs: Any) -> Any:
        draw = torch.Generator().manual_seed(next(calls))
        lengths = torch.randint(2, BUDGET + 1, (len(prompt_ids),), generator=draw).tolist()
        written = [torch.randint(20, 200, (n,), generator=draw).tolist() for n in lengths]
        stop = trainer.eos_token_ids[0]  # every other completion ends by itself
        return [[*ids, stop] if row % 2 else ids for row, ids in enumerate(written)], None

    trainer._generate_single_turn = fixed


def gradients(trainer: Any, inputs: dict[str, Any]) -> dict[str, torch.Tensor]:
    trainer.model.zero_grad()
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = trainer.args.gradient_accumulation_steps
    trainer.compute_loss(trainer.model, dict(inputs)).backward()
    return {n: p.grad.clone() for n, p in trainer.model.named_parameters() if p.grad is not None}


def scored(trainer: Any) -> dict[str, Any]:
    fix_completions(trainer)
    trainer.model.train()
    rows = [row for row in list(trainer.train_dataset)[:PROBLEMS] for _ in range(G)]
    return dict(trainer._generate_and_score_completions(rows))


def distance(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> float:
    """Largest difference as a share of the largest gradient."""
    assert ours.keys() == theirs.keys()
    scale = max(float(g.abs().max()) for g in theirs.values())
    return max(float((ours[n] - theirs[n]).abs().max()) for n in theirs) / scale


CASES = [
    *((kind, {"loss_type": loss}, 0) for kind in ("qwen2.5-instruct", "llama-3.2-instruct")
      for loss in ("dapo", "grpo", "dr_grpo", "bnpo", "cispo", "sapo")),
    ("qwen2.5-instruct", {"beta": 0.1}, 0),
    ("llama-3.2-instruct", {"beta": 0.1, "loss_type": "grpo"}, 2),
    ("qwen2.5-instruct", {}, 3),
    ("llama-3.2-instruct", {}, 3),
    ("qwen2.5-instruct", {"gradient_checkpointing": True}, 1),
    ("llama-3.2-instruct", {"temperature": 0.7}, 0),
    ("qwen2.5-instruct", {"num_iterations": 2, "loss_type": "grpo"}, 0),
    ("qwen2.5-instruct", {"importance_sampling_level": "sequence", "loss_type": "grpo"}, 0),
    ("qwen2.5-instruct", {"entropy_coef": 0.1}, 0),
    ("qwen2.5-instruct", {"top_entropy_quantile": 0.5}, 0),
    ("qwen2.5-instruct", {"mask_truncated_completions": True}, 0),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "config", "shots"), CASES, ids=[str(case) for case in CASES])
def test_gradients_and_metrics_are_trls_on_the_same_completions(
    kind: str, config: dict[str, Any], shots: int, lookalike: Lookalike, tmp_path: Path
) -> None:
    found, metrics = [], []
    for trainer_kind in (trl.GRPOTrainer, GRPOTrainer):
        trainer = make(trainer_kind, lookalike(kind), tmp_path, shots=shots, **config)
        inputs = scored(trainer)
        inputs = {k: v for k, v in inputs.items() if v is not None}
        found.append(gradients(trainer, inputs))
        metrics.append({k: v[-1] for k, v in trainer._metrics["train"].items()})
    if trainer_kind is GRPOTrainer:
        why = fastpath.unsupported_reason(trainer, FastPart.SCORING)
        assert (why is None) is ("entropy_coef" not in config)
    assert distance(found[1], found[0]) < 1e-5
    for name in ("reward", "completions/mean_length", "kl"):
        if name in metrics[0]:
            assert metrics[1][name] == pytest.approx(metrics[0][name], rel=1e-4, abs=1e-6), name


def test_the_comparison_would_notice_a_wrong_gradient(lookalike: Lookalike, tmp_path: Path) -> None:
    ours = make(GRPOTrainer, lookalike("qwen2.5-instruct"), tmp_path)
    inputs = scored(ours)
    right = gradients(ours, inputs)
    inputs["completion_ids"] = inputs["completion_ids"].clone()
    inputs["completion_ids"][:, 0] += 1
    assert distance(gradients(ours, inputs), right) > 1e-3


@pytest.mark.parametrize("accumulation", [1, 2, 4, 8])
@pytest.mark.parametrize("kind", ["qwen2.5-instruct", "llama-3.2-instruct"])
def test_ten_sgd_steps_on_fixed_completions_end_at_trls_weights(
    kind: str, accumulation: int, lookalike: Lookalike, tmp_path: Path
) -> None:
    weights = []
    for trainer_kind in (trl.GRPOTrainer, GRPOTrainer):
        trainer = make(
            trainer_kind, lookalike(kind), tmp_path,
            max_steps=10, learning_rate=0.01,
            per_device_train_batch_size=G * PROBLEMS // accumulation,
            gradient_accumulation_steps=accumulation,
        )  # fmt: skip
        start = copy.deepcopy(trainer.model.state_dict())
        fix_completions(trainer)
        trainer.train()
        weights.append(trainer.model.state_dict())
    moved = max(float((weights[0][n] - start[n]).abs().max()) for n in start)
    apart = max(float((weights[0][n] - weights[1][n]).abs().max()) for n in start)
    assert moved > 1e-3 and apart < 1e-5


def test_groups_stay_whole_and_every_row_keeps_its_columns() -> None:
    rows = torch.arange(24)
    batch = {
        "completion_ids": rows[:, None],
        "advantages": rows.float(),
        "num_items_in_batch": torch.tensor(7),
    }
    torch.manual_seed(0)
    whole = fastpath.whole_groups(batch, 4)
    assert sorted(whole["advantages"].tolist()) == rows.tolist()
    assert torch.equal(whole["completion_ids"][:, 0].float(), whole["advantages"])
    for group in whole["completion_ids"].view(-1, 4):
        assert len({int(row) // 4 for row in group}) == 1
    assert int(whole["num_items_in_batch"]) == 7
    assert not torch.equal(whole["advantages"], batch["advantages"])


def test_zero_advantage_rows_are_left_out_only_where_that_is_exact(
    lookalike: Lookalike, tmp_path: Path
) -> None:
    folder = lookalike("qwen2.5-instruct")
    trainer = make(GRPOTrainer, folder, tmp_path)
    inputs = scored(trainer)
    inputs["advantages"][:G] = 0
    assert fastpath.zero_advantage_rows(trainer, inputs)[:G].all()  # type: ignore[index]
    inputs["advantages"][:] = 0
    assert int((~fastpath.zero_advantage_rows(trainer, inputs)).sum()) == 1  # type: ignore[operator]
    # The one that is kept for its entropy has tokens: the first was cut off, and is masked whole.
    cut_off = inputs["completion_mask"].clone()
    cut_off[0] = 0
    kept = ~fastpath.zero_advantage_rows(trainer, {**inputs, "completion_mask": cut_off})  # type: ignore[operator]
    assert int(kept.sum()) == 1 and bool(cut_off[kept].any())
    # So it is where the only rows with an advantage are masked.
    inputs["advantages"][:2] = 1.0
    cut_off[:2] = 0
    kept = ~fastpath.zero_advantage_rows(trainer, {**inputs, "completion_mask": cut_off})  # type: ignore[operator]
    assert int(kept.sum()) == 1 and bool(cut_off[kept].any())
    for config in ({"beta": 0.1}, {"entropy_coef": 0.1}, {"top_entropy_quantile": 0.5}):
        other = make(GRPOTrainer, folder, tmp_path, **config)
        assert fastpath.zero_advantage_rows(other, inputs) is None, config


def test_trls_path_is_taken_and_said_once_where_ours_is_not_proven(
    lookalike: Lookalike, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        trainer = make(
            GRPOTrainer, lookalike("qwen2.5-instruct"), tmp_path,
            max_steps=2, generation_kwargs={"no_repeat_ngram_size": 3}, num_iterations=1,
        )  # fmt: skip
        trainer.train()
    said = [
        record.getMessage() for record in caplog.records if "TRL's own path" in record.getMessage()
    ]
    assert len(said) == 1 and "generation_kwargs" in said[0]


def test_our_rollouts_are_used_and_stay_within_the_budget(
    lookalike: Lookalike, tmp_path: Path
) -> None:
    trainer = make(GRPOTrainer, lookalike("llama-3.2-instruct"), tmp_path, max_steps=2)
    trainer.train()
    for part in (FastPart.DECODING, FastPart.SCORING):
        assert fastpath.unsupported_reason(trainer, part) is None
    assert trainer.state.log_history[0]["completions/max_length"] <= BUDGET


PATHS: list[tuple[dict[str, Any], list[str]]] = [
    (
        {"gradient_accumulation_steps": 2, "per_device_train_batch_size": G * PROBLEMS // 2},
        ["fused layers: used", "fused LoRA products: used", "micro-batch fusion: used"],
    ),
    (
        {"lora": False},
        [
            "fused layers: not used (of layer 0, its base weights are trained)",
            "fused LoRA products: not used (the model has no LoRA adapter)",
            "micro-batch fusion: not used (an optimizer step has one micro-batch)",
        ],
    ),
    (
        {"entropy_coef": 0.1},
        ["training: TRL's path (the entropy bonus needs the entropy's gradient)"],
    ),
]


@pytest.mark.parametrize(("config", "said"), PATHS)
def test_every_part_that_is_not_used_is_said_with_its_reason(
    config: dict[str, Any], said: list[str], lookalike: Lookalike, tmp_path: Path
) -> None:
    lines = make(GRPOTrainer, lookalike("qwen2.5-instruct"), tmp_path, **config).fast_path_report()
    assert lines[-len(said) :] == said
    assert [line.partition(":")[0] for line in lines[:2]] == ["rollouts", "CPU kernels"]


def test_without_kernels_the_reason_is_theirs(
    lookalike: Lookalike, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(build, "unsupported_reason", lambda: "there is no compiler")
    lines = make(GRPOTrainer, lookalike("qwen2.5-instruct"), tmp_path).fast_path_report()
    assert "CPU kernels: not used (there is no compiler)" in lines


def after_ten_adamw_steps(
    kind: type, folder: Path, output: Path, dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    """The adapter after ten steps on fixed completions, in double precision."""
    trainer = make(
        kind, folder, output, dtype=dtype, max_steps=10, optim="adamw_torch", learning_rate=1e-3
    )
    fix_completions(trainer)
    trainer.train()
    weights = trainer.model.state_dict()
    return torch.cat([x.double().flatten() for name, x in weights.items() if "lora" in name])


@pytest.mark.parametrize("kind", ["qwen2.5-instruct", "llama-3.2-instruct"])
def test_under_adamw_ours_is_as_near_to_exact_arithmetic_as_trl_and_nearer_to_trl(
    kind: str, lookalike: Lookalike, tmp_path: Path
) -> None:
    folder = lookalike(kind)
    exact = after_ten_adamw_steps(trl.GRPOTrainer, folder, tmp_path, torch.float64)
    stock = after_ten_adamw_steps(trl.GRPOTrainer, folder, tmp_path)
    ours = after_ten_adamw_steps(GRPOTrainer, folder, tmp_path)
    # Means, not norms: AdamW divides by the gradient's own size, so that a weight whose gradient is
    # nothing but rounding moves by as much as any other, in either trainer.
    stocks_error = float((stock - exact).abs().mean())
    assert float((ours - exact).abs().mean()) < 1.25 * stocks_error
    assert 0 < float((ours - stock).abs().mean()) < stocks_error < 1e-7


@pytest.mark.parametrize(
    ("of_model", "of_trainer", "named"),
    [
        ({"suppress_tokens": [5]}, {}, "suppress_tokens"),
        ({"min_p": 0.5}, {}, "min_p 0.5"),
        ({}, {"no_repeat_ngram_size": 2}, "no_repeat_ngram_size"),
        ({}, {"top_k": 1}, "top_k 1"),
        ({}, {"top_k": None}, "top_k None"),
        ({"top_k": 20, "top_p": 0.8, "repetition_penalty": 1.1, "temperature": 0.7}, {}, None),
        (
            {"num_beams": 1, "no_repeat_ngram_size": 0, "max_length": 99, "use_cache": True},
            {},
            None,
        ),
    ],
)
def test_what_generate_would_obey_and_our_engine_does_not_know_is_left_to_generate(
    of_model: dict[str, Any], of_trainer: dict[str, Any], named: str | None,
    lookalike: Lookalike, tmp_path: Path,
) -> None:  # fmt: skip
    trainer = make(GRPOTrainer, lookalike("qwen2.5-instruct"), tmp_path)
    for config, settings in (
        (base_of(trainer.model).generation_config, of_model),
        (trainer.generation_config, of_trainer),
    ):
        for name, value in settings.items():
            setattr(config, name, value)
    found = fastpath.unsupported_reason(trainer, FastPart.DECODING)
    assert (found is None) if named is None else f"generate() would read {named}" in str(found)


@pytest.mark.parametrize(
    ("settings", "whole"),
    [({}, True), ({"loss_type": "bnpo"}, False), ({"top_entropy_quantile": 0.2}, False)],
)
def test_groups_share_a_micro_batch_only_where_a_loss_does_not_depend_on_its_company(
    settings: dict[str, Any], whole: bool, lookalike: Lookalike, tmp_path: Path
) -> None:
    trainer = make(
        GRPOTrainer, lookalike("qwen2.5-instruct"), tmp_path, per_device_train_batch_size=G,
        gradient_accumulation_steps=PROBLEMS, **settings,
    )  # fmt: skip
    fix_completions(trainer)
    trainer.model.train()
    rows = [row for row in list(trainer.train_dataset)[:PROBLEMS] for _ in range(G)]
    trainer._prepare_inputs(rows)
    prompts = [part["prompt_ids"] for part in trainer._buffered_inputs]
    alike = [bool((ids == ids[:1]).all()) for ids in prompts]
    assert all(alike) if whole else not all(alike)


def test_the_entropy_that_is_logged_is_of_the_tokens_that_the_model_wrote(
    lookalike: Lookalike, tmp_path: Path
) -> None:
    trainer = make(GRPOTrainer, lookalike("qwen2.5-instruct"), tmp_path)
    inputs = scored(trainer)
    inputs["advantages"][:] = 0  # those are not computed
    inputs["advantages"][:G] = 1
    tools = torch.ones_like(inputs["completion_mask"])
    tools[:, ::2] = 0
    inputs["tool_mask"] = tools
    gradients(trainer, inputs)
    (logged,) = trainer._metrics["train"]["entropy"]
    ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1)[:G]
    mask = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1)[:G]
    _, entropies, _ = trainer._get_per_token_logps_and_entropies(
        trainer.model, ids, mask, tools.shape[1], compute_entropy=True
    )
    own = (inputs["completion_mask"] * tools)[:G].bool()
    assert logged == pytest.approx(float(entropies[own].mean()), rel=1e-5)
