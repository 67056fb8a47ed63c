"""Values that mean nothing are refused when the configuration is read, with the flag's name."""

from __future__ import annotations

import inspect
import math
from pathlib import Path

import pytest
import trl
from hypothesis import given
from hypothesis import strategies as st

from abacist.errors import UsageError
from abacist.learning.arguments import GRPOConfig, ModelConfig, ScriptArguments
from abacist.learning.config import load_config
from abacist.learning.limits import CHOICES, LIMITS, TRACKERS, Limit, refuse_out_of_range, trackers

WRONG = [
    ("learning_rate", -1), ("beta", -1), ("seed", -1), ("lora_r", 0), ("lora_dropout", 1.5),
    ("lora_dropout", 1.0), ("temperature", 0.0), ("temperature", -0.5), ("epsilon", -0.2),
    ("num_generations", 1), ("max_completion_length", 0), ("top_p", 2.0), ("top_p", 0.0),
    ("eval_steps", 0), ("save_steps", 0), ("logging_steps", 0), ("max_grad_norm", -1.0),
    ("max_steps", 0), ("max_steps", -2), ("seed", 2**32), ("num_train_problems", 0),
    ("num_consistency_problems", -1), ("learning_rate", float("nan")),
    ("weight_decay", float("inf")), ("adam_beta2", 1.0), ("eval_batch_size", 0),
    ("max_hours", -1.0), ("loss_type", "gpro"), ("importance_sampling_level", "tokens"),
    ("scale_rewards", "std"), ("num_iterations", 0), ("data_seed", -3),
]  # fmt: skip
RIGHT = [
    ("learning_rate", 0), ("beta", 0), ("lora_dropout", 0), ("top_p", 1.0), ("max_steps", -1),
    ("max_steps", 1), ("seed", 2**32 - 1), ("max_grad_norm", 0), ("num_heldout_problems", 0),
    ("eval_steps", 0.1), ("loss_type", "grpo"), ("scale_rewards", "False"), ("epsilon_high", None),
    ("temperature", 1e-6), ("warmup_steps", 0.1), ("num_train_epochs", 0.5),
]  # fmt: skip


@pytest.mark.parametrize(("name", "value"), WRONG)
def test_a_value_that_means_nothing_is_refused_by_the_name_of_its_flag(
    name: str, value: object
) -> None:
    with pytest.raises(UsageError) as error:
        refuse_out_of_range({name: value}, {name: "flag"})
    assert error.value.message.startswith(f"--{name} {value} is ")
    with pytest.raises(UsageError, match=rf"{name} \(my\.yaml\)"):
        refuse_out_of_range({name: value}, {name: "my.yaml"})


@pytest.mark.parametrize(("name", "value"), RIGHT)
def test_a_value_at_the_edge_of_what_means_something_is_taken(name: str, value: object) -> None:
    refuse_out_of_range({name: value}, {name: "flag"})


def test_the_table_names_settings_that_exist_and_their_defaults_are_within_it() -> None:
    defaults: dict[str, object] = {}
    for kind in (GRPOConfig, ModelConfig, ScriptArguments):
        for name, field in kind.__dataclass_fields__.items():
            defaults[name] = field.default
    for name in (*LIMITS, *CHOICES):
        assert name in defaults, name
    refuse_out_of_range({k: v for k, v in defaults.items() if k in {*LIMITS, *CHOICES}}, {})


def test_the_choices_are_those_that_trl_compares_with() -> None:
    source = inspect.getsource(trl.GRPOTrainer)
    for name, choices in CHOICES.items():
        for choice in choices:
            if choice.lower() not in ("true", "false"):
                assert f'"{choice}"' in source, (name, choice)


@given(st.floats(allow_nan=True, allow_infinity=True))
def test_no_limit_holds_for_what_is_no_finite_number(value: float) -> None:
    held = [limit for limit in LIMITS.values() if limit.holds(value)]
    assert not held or math.isfinite(value)


def test_a_limit_is_told_in_words() -> None:
    assert str(Limit(above=0, at_most=1)) == "above 0 and at most 1"
    assert str(Limit(at_least=1, also=(-1,))) == "at least 1, or -1"


def test_weights_of_rewards_are_finite_and_stop_strings_need_another_engine() -> None:
    with pytest.raises(UsageError, match="reward_weights nan"):
        refuse_out_of_range({"reward_weights": [1.0, float("nan")]}, {})
    with pytest.raises(UsageError, match="beyond 1e\\+06"):
        refuse_out_of_range({"reward_weights": [1.0, -1e308]}, {})
    with pytest.raises(UsageError, match="are all 0: nothing is paid"):
        refuse_out_of_range({"reward_weights": [0.0, 0.0]}, {})
    refuse_out_of_range({"reward_weights": [0.0, 0.0], "step_reward_weight": 1.0}, {})
    stops = {"generation_kwargs": {"stop_strings": ["</answer>"]}}
    with pytest.raises(UsageError, match="--generation_kwargs holds stop_strings"):
        refuse_out_of_range(stops, {})
    refuse_out_of_range(stops | {"use_vllm": True}, {})
    refuse_out_of_range({"generation_kwargs": {"num_beams": 1}}, {})


@pytest.mark.parametrize(
    ("written", "read"),
    [
        (["wandb", "tensorboard"], ["wandb", "tensorboard"]),
        (["wandb,tensorboard"], ["wandb", "tensorboard"]),
        (["wandb, trackio", "wandb"], ["wandb", "trackio"]),
        (["all"], list(TRACKERS)),
        (["none"], []),
        ([], []),
    ],
)
def test_trackers_are_a_list_with_spaces_or_commas(written: list[str], read: list[str]) -> None:
    assert trackers(written, {}) == read


@pytest.mark.parametrize(
    ("written", "said"),
    [
        ("wanbd", "Did you mean wandb"),
        ("wandb,tensorbord", "tensorbord is none of"),
        ("mlflow", "mlflow is none of"),
        ("none,wandb", "contradicts itself"),
    ],
)
def test_a_tracker_that_is_none_is_refused(written: str, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        trackers(written, {"report_to": "flag"})


def test_lists_on_the_command_line_reach_the_trainer_and_the_adapter(tmp_path: Path) -> None:
    flags = ["--report_to", "wandb", "tensorboard", "--lora_target_modules", "q_proj,v_proj"]
    config = load_config("tiny", None, flags)
    assert config.training.report_to == ["wandb", "tensorboard"]
    assert config.model.lora_target_modules == ["q_proj", "v_proj"]
    saved = tmp_path / "config.yaml"
    saved.write_text(config.to_yaml(), encoding="utf-8")
    again = load_config(None, str(saved), [])
    assert again.training.report_to == config.training.report_to and again.model == config.model
    for spelled in (["--report_to", "none"], ["--report_to=wandb"]):
        load_config("tiny", None, spelled)
