"""``abacist.GRPOTrainer``: TRL's trainer for a script that changes one import, and rollouts that
say what was computed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import trl
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer

from abacist.learning.arguments import GRPOConfig
from abacist.learning.trainer import GRPOTrainer
from abacist.records.rollout import Rollout, read_rollouts
from lookalikes import build

TINY_BATCH: dict[str, Any] = {
    "bf16": False,
    "use_cpu": True,
    "num_generations": 4,
    "per_device_train_batch_size": 8,
    "max_completion_length": 8,
    "max_steps": 2,
    "learning_rate": 1e-2,
    "logging_steps": 1,
    "save_strategy": "no",
    "disable_tqdm": True,
    "seed": 3,
}
ROWS = [
    {"prompt": [{"role": "user", "content": f"{'1 + ' * n}1?"}], "answer": str(n + 1)}
    for n in range(8)  # prompts of different lengths
]


def length_reward(prompts: Any, completions: Any, **columns: Any) -> list[float]:
    return [len(one[0]["content"]) / 10 for one in completions]


def none_reward(prompts: Any, completions: Any, **columns: Any) -> list[float | None]:
    return [None if index % 2 else 1.0 for index, _ in enumerate(completions)]


def trained(kind: type, config: Any, folder: Path, **more: Any) -> Any:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
    given = {"reward_funcs": [length_reward, none_reward]} | more
    trainer = kind(
        model=model,
        args=config,
        train_dataset=Dataset.from_list(ROWS),
        processing_class=tokenizer,
        **given,
    )
    trainer.train()
    return trainer


def test_without_the_fast_path_it_is_trl_to_the_last_bit(tmp_path: Path) -> None:
    folder = build("qwen2.5-instruct", tmp_path / "model")
    weights, logs = [], []
    for kind in (trl.GRPOTrainer, GRPOTrainer):
        config = GRPOConfig(
            output_dir=str(tmp_path / kind.__module__), use_fast_path=False, **TINY_BATCH
        )
        trainer = trained(kind, config, folder)
        weights.append(trainer.model.state_dict())
        logs.append([row.get("reward") for row in trainer.state.log_history])
        assert not (Path(config.output_dir) / "rollouts").exists()
    assert logs[0] == logs[1]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_rollouts_hold_the_rewards_and_the_advantages_of_their_group(tmp_path: Path) -> None:
    folder = build("qwen2.5-instruct", tmp_path / "model")
    config = GRPOConfig(output_dir=str(tmp_path / "run"), keep_rollouts=True, **TINY_BATCH)
    encode = trained(GRPOTrainer, config, folder).processing_class.apply_chat_template
    rollouts = read_rollouts(tmp_path / "run" / "rollouts")
    assert [r.step for r in rollouts] == [1] * 8 + [2] * 8
    assert len({r.prompt_tokens for r in rollouts}) > 1
    groups: dict[tuple[int, int], list[Any]] = {}
    for rollout in rollouts:
        groups.setdefault((rollout.step, rollout.group), []).append(rollout)
    assert len(groups) == 4
    for members in groups.values():
        assert [m.member for m in members] == [0, 1, 2, 3]
        assert len({m.gold for m in members}) == 1 and len({str(m.messages) for m in members}) == 1
        # The paper's advantage: (r - mean(r)) / std(r), within the group (TRL adds 1e-4).
        rewards = torch.tensor([m.reward for m in members])
        wanted = (rewards - rewards.mean()) / (rewards.std() + 1e-4)
        assert torch.allclose(torch.tensor([m.advantage for m in members]), wanted, atol=1e-5)
    for index, rollout in enumerate(rollouts):
        assert rollout.rewards["length_reward"] == pytest.approx(len(rollout.completion) / 10)
        assert rollout.rewards["none_reward"] == (None if index % 2 else 1.0)
        assert rollout.completion_tokens == len(rollout.completion_ids) <= 8
        ids = encode(rollout.messages, add_generation_prompt=True, return_dict=False)
        assert rollout.prompt_tokens == len(ids)


def test_who_watches_is_told_the_replies_of_each_step_also_where_none_are_kept(
    tmp_path: Path,
) -> None:
    told: list[tuple[int, list[Rollout]]] = []

    class Watched(GRPOTrainer):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            self.watch_replies = lambda step, rollouts: told.append((step, list(rollouts)))

    folder = build("qwen2.5-instruct", tmp_path / "model")
    trained(Watched, GRPOConfig(output_dir=str(tmp_path / "run"), **TINY_BATCH), folder)
    assert [(step, len(rollouts)) for step, rollouts in told] == [(1, 8), (2, 8)]
    assert all(one.step == step for step, rollouts in told for one in rollouts)
    assert all(one.reward is not None for _, rollouts in told for one in rollouts)
    assert not (tmp_path / "run" / "rollouts").exists()


def logging_reward(prompts: Any, completions: Any, log_metric: Any, **columns: Any) -> list[float]:
    log_metric("longest", torch.tensor(max(len(one[0]["content"]) for one in completions)))
    return [0.0] * len(completions)


def naming_reward(prompts: Any, completions: Any, log_metric: Any, **columns: Any) -> list[float]:
    log_metric("longest", "the third")
    return [0.0] * len(completions)


def test_a_metric_that_a_reward_logs_is_a_number_or_refused_where_it_is_logged(
    tmp_path: Path,
) -> None:
    folder = build("qwen2.5-instruct", tmp_path / "model")
    config = GRPOConfig(output_dir=str(tmp_path / "run"), **TINY_BATCH)
    done = trained(GRPOTrainer, config, folder, reward_funcs=logging_reward)
    logged = [entry["longest"] for entry in done.state.log_history if "longest" in entry]
    assert logged and all(isinstance(value, float) and value > 0 for value in logged)
    with pytest.raises(TypeError, match=r"log_metric\('longest', 'the third'\) takes a number"):
        trained(GRPOTrainer, config, folder, reward_funcs=naming_reward)


def test_no_rollout_is_lost_when_a_step_takes_several_generations(tmp_path: Path) -> None:
    folder = build("qwen2.5-instruct", tmp_path / "model")
    config = GRPOConfig(
        output_dir=str(tmp_path / "run"), keep_rollouts=True, gradient_accumulation_steps=2,
        steps_per_generation=1, **TINY_BATCH,
    )  # fmt: skip
    trained(GRPOTrainer, config, folder)
    rollouts = read_rollouts(tmp_path / "run" / "rollouts")
    assert [r.step for r in rollouts] == [1] * 16 + [2] * 16
    groups: dict[tuple[int, int], list[Rollout]] = {}
    for one in rollouts:
        groups.setdefault((one.step, one.group), []).append(one)
    assert list(groups) == [(step, group) for step in (1, 2) for group in range(4)]
    for members in groups.values():  # (step, group) is one group of one prompt
        assert [one.member for one in members] == [0, 1, 2, 3]
        assert len({str(one.messages) for one in members}) == 1


def test_generations_of_a_step_are_numbered_from_1_also_after_an_epochs_last_short_step(
    tmp_path: Path,
) -> None:
    folder = build("qwen2.5-instruct", tmp_path / "model")
    settings = TINY_BATCH | {"max_steps": -1, "num_train_epochs": 2}  # 4 generations an epoch
    config = GRPOConfig(
        output_dir=str(tmp_path / "run"), keep_rollouts=True, gradient_accumulation_steps=3,
        steps_per_generation=1, **settings,
    )  # fmt: skip
    trained(GRPOTrainer, config, folder)
    files = {file.stem: read_rollouts(file) for file in (tmp_path / "run/rollouts").iterdir()}
    parts = {1: 3, 2: 1, 3: 3, 4: 1}
    assert {name: sorted({one.group for one in rows}) for name, rows in files.items()} == {
        f"step-{step:06d}-part{part + 1}": [2 * part, 2 * part + 1]
        for step, count in parts.items()
        for part in range(count)
    }


class Timed(GRPOTrainer):
    """Each of its generations takes a second, whatever the clock says."""

    def _generate_and_score_completions(self, inputs: Any) -> dict[str, Any]:
        before, output = self._rollout_seconds, super()._generate_and_score_completions(inputs)
        if self.model.training:
            assert self._rollout_seconds > before
            self._rollout_seconds = before + 1.0
        return output


@pytest.mark.parametrize(
    ("accumulated", "per_generation", "expected"),
    [(1, 1, [1, 1, 1, 1]), (2, 1, [2, 2, 2, 2]), (1, 2, [1, 0, 1, 0])],
    ids=["a generation a step", "two a step", "one for two steps"],
)
def test_the_time_of_rollouts_is_counted_once_a_step_as_step_time_is(
    tmp_path: Path, accumulated: int, per_generation: int, expected: list[int]
) -> None:
    folder = build("qwen2.5-instruct", tmp_path / "model")
    settings = TINY_BATCH | {"max_steps": 4, "per_device_train_batch_size": 4}
    for logged_every, seconds in ((1, expected), (4, [sum(expected) / 4])):
        config = GRPOConfig(
            output_dir=str(tmp_path / "run"), keep_rollouts=True,
            gradient_accumulation_steps=accumulated, steps_per_generation=per_generation,
            **settings | {"logging_steps": logged_every},
        )  # fmt: skip
        trainer = trained(Timed, config, folder)
        logs = [row for row in trainer.state.log_history if "step_time" in row]
        assert [row["rollout_time"] for row in logs] == seconds


def test_an_evaluator_replaces_trls_evaluation_and_is_logged(tmp_path: Path) -> None:
    folder = build("qwen2.5-instruct", tmp_path / "model")
    config = GRPOConfig(
        output_dir=str(tmp_path / "run"), eval_strategy="steps", eval_steps=1,
        per_device_eval_batch_size=4, **TINY_BATCH,
    )  # fmt: skip
    asked = []

    def evaluator(model: Any) -> dict[str, float]:
        asked.append(model)
        return {"accuracy": 0.25}

    trainer = trained(
        GRPOTrainer, config, folder, evaluator=evaluator, eval_dataset=Dataset.from_list(ROWS[:2])
    )
    assert len(asked) == 2 and asked[0] is trainer.model
    assert [r["eval_accuracy"] for r in trainer.state.log_history if "eval_accuracy" in r] == [
        0.25,
        0.25,
    ]


def test_plain_text_prompts_of_a_strangers_data_are_kept_too(tmp_path: Path) -> None:
    folder = build("llama-3.2-instruct", tmp_path / "model")
    config = GRPOConfig(output_dir=str(tmp_path / "run"), keep_rollouts=True, **TINY_BATCH)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
    trainer = GRPOTrainer(
        model=model,
        reward_funcs=lambda completions, **columns: [float(len(c)) for c in completions],
        args=config,
        train_dataset=Dataset.from_list([{"prompt": f"{n} + 1 ="} for n in range(8)]),
        processing_class=tokenizer,
    )
    trainer.train()
    rollout = read_rollouts(tmp_path / "run" / "rollouts")[0]
    assert rollout.messages[0]["role"] == "user" and rollout.gold is None
    assert rollout.is_correct is None and rollout.problem_id is None


@pytest.mark.parametrize("fails", [False, True])
def test_a_draft_card_that_fails_is_a_warning_and_never_the_end_of_a_training(
    fails: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    if fails:

        def raises(*args: Any, **kwargs: Any) -> None:
            raise NameError("name 'wandb' is not defined\nand more")

        monkeypatch.setattr(trl.trainer.base_trainer, "generate_model_card", raises)
    config = TINY_BATCH | {"output_dir": str(tmp_path / "run"), "max_steps": 1}
    config |= {"save_strategy": "steps", "save_steps": 1}
    with caplog.at_level("WARNING"):
        trained(
            GRPOTrainer, trl.GRPOConfig(**config), build("qwen2.5-instruct", tmp_path / "model")
        )
    assert (tmp_path / "run" / "checkpoint-1" / "model.safetensors").is_file()
    assert (tmp_path / "run" / "README.md").is_file() is not fails
    assert ("card was not written: name 'wandb'" in caplog.text) == fails
    assert "and more" not in caplog.text


def test_an_evaluation_between_two_logs_takes_nothing_from_the_training_metrics(
    tmp_path: Path,
) -> None:
    folder = build("qwen2.5-instruct", tmp_path / "model")
    logs = []
    for often in (100, 1):  # never, and after every step
        config = GRPOConfig(
            output_dir=str(tmp_path / str(often)), eval_strategy="steps", eval_steps=often,
            per_device_eval_batch_size=4, **TINY_BATCH | {"logging_steps": 2, "max_steps": 2},
        )  # fmt: skip
        trainer = trained(
            GRPOTrainer, config, folder, evaluator=lambda model: {"accuracy": 0.25},
            eval_dataset=Dataset.from_list(ROWS[:2]),
        )  # fmt: skip
        rows = trainer.state.log_history
        assert all("reward" not in row for row in rows if "eval_accuracy" in row)
        logs.append(next(row for row in rows if "reward" in row))
    same = ("loss", "reward", "entropy", "completions/mean_length", "num_tokens", "grad_norm")
    assert [logs[0][name] for name in same] == [logs[1][name] for name in same]
