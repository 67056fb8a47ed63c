"""``train_replies``: the replies with the largest advantages are chosen, and the gradient is stock
TRL's of a batch that holds only these."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow.parquet
import pytest
import torch
import trl
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer

from abacist.errors import UsageError
from abacist.learning import fast_trainer, reply_selection
from abacist.learning.arguments import GRPOConfig
from abacist.learning.config import load_config
from abacist.learning.trainer import GRPOTrainer
from abacist.records.rollout import read_rollouts

Lookalike = Callable[[str], Path]
G, PROBLEMS, BUDGET = 4, 4, 10
SHOT = [
    {"role": "user", "content": "Ada has 3 pens and finds 4. How many pens has Ada?"},
    {"role": "assistant", "content": "<reasoning>\n3+4=7\n</reasoning>\n<answer>\n7\n</answer>"},
]


def chosen(
    advantages: list[float], size: int, count: int, seed: int = 0, teaches: list[bool] | None = None
) -> list[int]:
    values = torch.tensor(advantages)
    found = reply_selection.choose(
        values,
        values != 0 if teaches is None else torch.tensor(teaches),
        size,
        count,
        torch.Generator().manual_seed(seed),
    )
    return [row for row, is_chosen in enumerate(found.tolist()) if is_chosen]


def test_each_group_gives_those_with_the_largest_advantages_of_either_sign() -> None:
    assert chosen([0.1, -2.0, 1.0, 0.9, 3.0, 0.2, -0.1, -4.0], 4, 2) == [1, 2, 4, 7]


def test_places_of_a_silent_group_go_to_the_next_largest_of_all_others() -> None:
    advantages = [0.0] * 4 + [0.1, 2.0, 1.0, 0.9] + [3.0, -0.2, 0.3, 4.0]
    assert chosen(advantages, 4, 2) == [5, 6, 7, 8, 10, 11]  # 0.9 and 0.3, not 0.2 and 0.1


def test_what_teaches_nothing_is_not_chosen_however_large_rounding_made_it() -> None:
    advantages, teaches = [6e-4] * 4 + [1.0, -1.0, 1e-5, 0.0], [False] * 4 + [True] * 3 + [False]
    assert chosen(advantages, 4, 2, teaches=teaches) == [4, 5, 6]
    assert chosen([0.0] * 8, 4, 2) == []


def test_equal_advantages_are_drawn_by_lot_and_one_seed_draws_the_same() -> None:
    half = 1.0 / 3
    advantages = [half, -half * (1 + 1e-7), half, -half * (1 + 1e-7), half, -half, half, -half]
    draws = [tuple(chosen(advantages, 8, 4, seed)) for seed in range(400)]
    assert draws == [tuple(chosen(advantages, 8, 4, seed)) for seed in range(400)]
    for row in range(8):  # each is in half of the draws, give or take five standard deviations
        assert 150 < sum(row in draw for draw in draws) < 250


def lots(step: int, seed: int = 3, process: int = 0) -> list[bool]:
    """Which replies of two groups of 4, all with advantages of one size, a trainer takes."""
    advantages = torch.tensor([1.0, -1.0] * 4)
    mine = slice(4 * process, 4 * process + 4)
    trainer: Any = SimpleNamespace(
        args=SimpleNamespace(train_replies=2, seed=seed),
        accelerator=SimpleNamespace(
            process_index=process,
            gather=lambda each: advantages if each.is_floating_point() else torch.ones(8).bool(),
        ),
        num_generations=4,
        multi_objective_aggregation="sum_then_normalize",
        reward_weights=torch.ones(1),
        _rewards=advantages[:, None],
        _metrics={"train": defaultdict(list)},
        _step=step,
    )
    batch = {"advantages": advantages[mine], "completion_mask": torch.ones(4, 3).int()}
    found = reply_selection.leave_out_others(trainer, batch)
    assert found is not None
    assert (batch["completion_mask"].bool() == found[:, None]).all()
    return list(found.tolist())


def test_lots_are_drawn_from_the_seed_and_the_micro_step_and_nothing_else() -> None:
    first = [lots(step) for step in range(200)]
    torch.manual_seed(99)  # a resumed run stands elsewhere
    assert [lots(step) for step in range(200)] == first
    assert [lots(step, seed=4) for step in range(200)] != first
    for row in range(4):  # each is in half of the draws, give or take five standard deviations
        assert 65 < sum(draw[row] for draw in first) < 135
    # Of two processes each takes its own part of the same draw.
    assert all(sum(lots(step) + lots(step, process=1)) == 4 for step in range(20))


@given(
    st.lists(st.sampled_from([0.0, 0.5, -0.5, 1.0, -2.0]), min_size=12, max_size=12),
    st.integers(1, 4),
    st.integers(0, 9),
)
def test_as_many_as_there_are_places_and_never_a_smaller_one_before_a_larger(
    advantages: list[float], count: int, seed: int
) -> None:
    found = chosen(advantages, 4, count, seed)
    assert len(found) == min(3 * count, sum(value != 0 for value in advantages))
    for group in range(3):
        rows = range(4 * group, 4 * group + 4)
        inside = [abs(advantages[row]) for row in rows if row in found]
        outside = [abs(advantages[row]) for row in rows if row not in found]
        assert len(inside) >= min(count, sum(advantages[row] != 0 for row in rows))
        assert not inside or not outside or min(inside) >= max(outside)


def paid(prompts: Any, completions: Any, completion_ids: Any, **columns: Any) -> list[float]:
    """Ties, different sizes, and one group in four that is paid alike by a number like 0.7."""
    return [
        0.7 if "21" in str(prompt[-1]) else float(sum(ids) % 5)
        for prompt, ids in zip(prompts, completion_ids, strict=True)
    ]


def make(
    kind: type, folder: Path, output: Path, *, shots: int = 0, config: type = GRPOConfig,
    **settings: Any,
) -> Any:  # fmt: skip
    given_settings: dict[str, Any] = {
        "output_dir": str(output), "bf16": False, "use_cpu": True, "num_generations": G,
        "per_device_train_batch_size": G * PROBLEMS, "max_completion_length": BUDGET,
        "learning_rate": 0.1, "optim": "sgd", "lr_scheduler_type": "constant",
        "max_grad_norm": 0.0, "max_steps": 1, "logging_steps": 1, "save_strategy": "no",
        "disable_tqdm": True, "gradient_checkpointing": False, **settings,
    }  # fmt: skip
    questions = [f"How much is {n} and {7 * n}?" for n in range(8)]
    torch.manual_seed(0)
    trainer = kind(
        model=AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32),
        reward_funcs=[paid],
        args=config(**given_settings),
        train_dataset=Dataset.from_list(
            [{"prompt": [*SHOT * shots, {"role": "user", "content": q}]} for q in questions]
        ),
        processing_class=AutoTokenizer.from_pretrained(folder, padding_side="left"),
        peft_config=LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False),
    )
    calls = iter(range(100))

    def fixed(prompt_ids: Any, *args: Any, **kwargs: Any) -> Any:
        draw = torch.Generator().manual_seed(next(calls))
        lengths = torch.randint(2, BUDGET + 1, (len(prompt_ids),), generator=draw).tolist()
        written = [torch.randint(20, 200, (n,), generator=draw).tolist() for n in lengths]
        stop = trainer.eos_token_ids[0]
        return [[*ids, stop] if row % 2 else ids for row, ids in enumerate(written)], None

    trainer._generate_single_turn = fixed
    trainer.model.train()
    return trainer


def rows_of(trainer: Any) -> list[Any]:
    return [row for row in list(trainer.train_dataset)[:PROBLEMS] for _ in range(G)]


def gradient(trainer: Any, batches: list[dict[str, Any]]) -> torch.Tensor:
    """Of all micro-batches, as the trainer itself adds them up."""
    trainer.model.zero_grad()
    trainer.current_gradient_accumulation_steps = trainer.args.gradient_accumulation_steps
    for batch in batches:
        trainer.compute_loss(trainer.model, dict(batch)).backward()
    return torch.cat([p.grad.flatten() for p in trainer.model.parameters() if p.grad is not None])


def only(batch: dict[str, Any], rows: torch.Tensor) -> dict[str, Any]:
    """Those rows of a generation batch, as TRL would have made a batch of them."""
    small = {
        key: value[rows] if isinstance(value, torch.Tensor) and value.dim() else value
        for key, value in batch.items()
    }
    return small | {"num_items_in_batch": small["completion_mask"].sum()}


LOSSES = ("dapo", "grpo", "bnpo", "dr_grpo", "cispo", "sapo", "luspo", "vespo")


@pytest.mark.parametrize("loss_type", LOSSES)
@pytest.mark.parametrize(
    ("micro_batches", "is_fast"), [(1, True), (2, True), (8, True), (4, False)]
)
def test_the_gradient_is_stock_trls_of_a_batch_of_the_chosen_rows(
    loss_type: str, micro_batches: int, is_fast: bool, lookalike: Lookalike, tmp_path: Path
) -> None:
    folder = lookalike("qwen2.5-instruct")
    more = {"importance_sampling_level": "sequence"} if loss_type == "luspo" else {}
    stock = make(trl.GRPOTrainer, folder, tmp_path, config=trl.GRPOConfig,
                 loss_type=loss_type, **more)  # fmt: skip
    whole = dict(stock._generate_and_score_completions(rows_of(stock)))
    ours = make(
        GRPOTrainer, folder, tmp_path, loss_type=loss_type, train_replies=3, use_fast_path=is_fast,
        per_device_train_batch_size=G * PROBLEMS // micro_batches,
        gradient_accumulation_steps=micro_batches, **more,
    )  # fmt: skip
    ours._prepare_inputs(rows_of(ours))
    counts = [int(batch["completion_mask"].any(dim=1).sum()) for batch in ours._buffered_inputs]
    assert sum(counts) == 12
    if is_fast and micro_batches == 8:
        assert counts == [2] * 6 + [0] * 2
    if is_fast and micro_batches == 2:
        assert counts == [8, 4]
    mask = torch.cat([batch["completion_mask"] for batch in ours._buffered_inputs])
    kept = torch.cat([batch["completion_ids"] for batch in ours._buffered_inputs])[mask.any(dim=1)]
    rows = torch.tensor(
        [row for row, ids in enumerate(whole["completion_ids"]) if (kept == ids).all(dim=1).any()]
    )
    assert len(rows) == 12
    expected = gradient_of_stock(stock, only(whole, rows))
    found = gradient(ours, ours._buffered_inputs)
    assert float((found - expected).abs().max() / expected.abs().max()) < 1e-5
    full = gradient_of_stock(stock, whole)
    assert float((full - expected).abs().max() / expected.abs().max()) > 1e-2  # could be told


def gradient_of_stock(stock: Any, batch: dict[str, Any]) -> torch.Tensor:
    stock.model.zero_grad()
    stock.current_gradient_accumulation_steps = 1
    stock.compute_loss(stock.model, dict(batch)).backward()
    return torch.cat([p.grad.flatten() for p in stock.model.parameters() if p.grad is not None])


@pytest.mark.parametrize("loss_type", ["grpo", "bnpo", "dapo"])
def test_a_second_iteration_over_old_log_probabilities_is_stock_trls_too(
    loss_type: str, lookalike: Lookalike, tmp_path: Path
) -> None:
    folder = lookalike("qwen2.5-instruct")
    stock = make(trl.GRPOTrainer, folder, tmp_path, config=trl.GRPOConfig, loss_type=loss_type,
                 num_iterations=2)  # fmt: skip
    whole = dict(stock._generate_and_score_completions(rows_of(stock)))
    ours = make(
        GRPOTrainer, folder, tmp_path, loss_type=loss_type, train_replies=2, num_iterations=2,
        per_device_train_batch_size=8, gradient_accumulation_steps=2,
    )  # fmt: skip
    ours._prepare_inputs(rows_of(ours))
    kept = torch.cat(
        [b["completion_ids"][b["completion_mask"].any(dim=1)] for b in ours._buffered_inputs]
    )
    rows = torch.tensor(
        [row for row, ids in enumerate(whole["completion_ids"]) if (kept == ids).all(dim=1).any()]
    )
    for trainer in (stock, ours):
        torch.manual_seed(1)
        with torch.no_grad():  # the policy has moved on
            for weight in trainer.model.parameters():
                if weight.requires_grad:
                    weight.add_(0.02 * torch.randn(weight.shape))
    expected = gradient_of_stock(stock, only(whole, rows))
    found = gradient(ours, ours._buffered_inputs)
    assert float((found - expected).abs().max() / expected.abs().max()) < 1e-5


def trained(trainer: Any) -> torch.Tensor:
    trainer.train()
    return torch.cat([p.detach().flatten() for p in trainer.model.parameters() if p.requires_grad])


@pytest.mark.parametrize("settings", [
    {"gradient_accumulation_steps": 4},
    {"gradient_accumulation_steps": 8, "steps_per_generation": 4, "shots": 2},
    {"gradient_accumulation_steps": 2, "steps_per_generation": 4, "max_steps": 4},
    {"gradient_accumulation_steps": 4, "num_iterations": 2, "max_steps": 4},
], ids=str)  # fmt: skip
def test_a_training_ends_at_the_weights_of_trls_path_and_forwards_no_other_row(
    settings: dict[str, Any], lookalike: Lookalike, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = lookalike("qwen2.5-instruct")
    settings = {
        "per_device_train_batch_size": G,
        "loss_type": "grpo",
        "max_steps": 2,
        "learning_rate": 0.01,
        **settings,
    }
    forwarded: list[int] = []
    score = fast_trainer.score

    def counted(model: Any, ids: Any, mask: Any, width: int, **options: Any) -> Any:
        skip = options["skip_rows"]
        if torch.is_grad_enabled():
            forwarded.append(len(ids) if skip is None else int((~skip).sum()))
        return score(model, ids, mask, width, **options)

    monkeypatch.setattr(fast_trainer, "score", counted)
    ours = make(GRPOTrainer, folder, tmp_path / "ours", train_replies=2, keep_rollouts=True,
                **settings)  # fmt: skip
    moved = trained(ours)
    generations = {path.name for path in (tmp_path / "ours" / "rollouts").iterdir()}
    assert sum(forwarded) == 8 * len(generations) * ours.num_iterations
    log = ours.state.log_history[0]
    assert log["trained_replies"] == 8.0 and log["entropy"] > 0
    theirs = make(GRPOTrainer, folder, tmp_path / "theirs", train_replies=2, use_fast_path=False,
                  **settings)  # fmt: skip
    if ours.args.steps_per_generation <= ours.args.gradient_accumulation_steps:
        apart = (trained(theirs) - moved).abs().max()
        assert float(apart) < 1e-5
    assert sum(forwarded) == 8 * len(generations) * ours.num_iterations  # none of theirs


def test_all_replies_are_kept_with_whether_they_were_trained_on(
    lookalike: Lookalike, tmp_path: Path
) -> None:
    folder = lookalike("qwen2.5-instruct")
    runs = {}
    for count in (None, 2):
        output = tmp_path / str(count)
        make(GRPOTrainer, folder, output, train_replies=count, keep_rollouts=True).train()
        runs[count] = output / "rollouts" / "step-000001.parquet"
    some = read_rollouts(runs[2])
    assert len(some) == G * PROBLEMS and sum(bool(one.trained) for one in some) == 8
    assert [one.advantage for one in some] == [one.advantage for one in read_rollouts(runs[None])]
    for group in range(PROBLEMS):
        members = [one for one in some if one.group == group]
        if len({one.reward for one in members}) == 1:
            assert not any(one.trained for one in members)
    # Of a run that trains on all the file is as it always was.
    assert "trained" not in pyarrow.parquet.read_schema(runs[None]).names
    assert {one.trained for one in read_rollouts(runs[None])} == {None}
    assert {one.trained for one in read_rollouts(runs[None].parent)} == {None}


def test_where_nothing_teaches_anything_the_step_is_as_without_the_choice(
    lookalike: Lookalike, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(globals(), "paid", lambda completions, **columns: [0.7] * len(completions))
    logs = []
    for count in (None, 2):
        trainer = make(GRPOTrainer, lookalike("qwen2.5-instruct"), tmp_path, train_replies=count,
                       loss_type="grpo", per_device_train_batch_size=8,
                       gradient_accumulation_steps=2)  # fmt: skip
        trainer.train()
        logs.append(trainer.state.log_history[0])
    assert logs[1].pop("trained_replies") == 0 and logs[1]["grad_norm"] == 0
    for name in ("loss", "entropy", "reward", "completions/mean_length"):
        assert logs[1][name] == pytest.approx(logs[0][name], abs=1e-6), name


@pytest.mark.parametrize(("flags", "message"), [
    (["--train_replies", "9"], r"--train_replies 9 is more than the 8 replies of a group"),
    (["--train_replies", "0"], r"--train_replies 0 is not at least 1"),
    (["--train_replies", "-4"], r"--train_replies -4 is not at least 1"),
    (["--train_replies", "4", "--beta", "0.04"], r"--train_replies 4 does not go with --beta 0.04"),
    (["--train_replies", "4", "--entropy_coef", "0.01"], r"does not go with --entropy_coef 0.01"),
    (["--train_replies", "4", "--top_entropy_quantile", "0.2"], r"--top_entropy_quantile 0.2"),
    (["--train_replies", "4", "--use_adaptive_entropy", "true"], r"--use_adaptive_entropy"),
])  # fmt: skip
def test_what_cannot_be_meant_is_refused_by_its_flag(flags: list[str], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        load_config(None, None, flags)


def test_what_can_be_meant_is_taken_and_follows_the_size_of_a_group(tmp_path: Path) -> None:
    assert load_config(None, None, ["--train_replies", "8"]).training.train_replies == 8
    assert load_config(None, None, []).training.train_replies is None
    file = tmp_path / "mine.yaml"
    file.write_text("num_generations: 8\ntrain_replies: 9\n", encoding="utf-8")
    with pytest.raises(UsageError, match=r"train_replies \(mine.yaml\) 9 is more than the 8"):
        load_config(None, str(file), [])


def test_a_script_is_refused_too_and_the_run_says_on_what_it_trains(
    lookalike: Lookalike, tmp_path: Path
) -> None:
    folder = lookalike("qwen2.5-instruct")
    with pytest.raises(UsageError, match="train_replies 5 is more than the 4 replies"):
        make(GRPOTrainer, folder, tmp_path, train_replies=5)
    line = "training on 2 of 4 replies a group: those with the largest advantages"
    assert make(GRPOTrainer, folder, tmp_path, train_replies=2).fast_path_report()[-1] == line
    slow = make(GRPOTrainer, folder, tmp_path, train_replies=2, use_fast_path=False)
    assert slow.fast_path_report()[-1] == f"{line} (TRL's path takes as long as for all)"
    on_all = make(GRPOTrainer, folder, tmp_path).fast_path_report()
    assert not any("training on" in line for line in on_all)
