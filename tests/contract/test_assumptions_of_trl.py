"""What ``abacist.learning`` assumes of TRL 1.16: the private methods it overrides, the order they
are called in, and the attributes it reads. If this fails, TRL has moved."""

from __future__ import annotations

import importlib.metadata
import inspect

import pytest
import trl

from abacist.learning.arguments import GRPOConfig, ModelConfig
from abacist.learning.trainer import GRPOTrainer

OVERRIDDEN = {
    "_generate": ["prompts"],
    "_calculate_rewards": ["inputs", "prompts", "completions", "completion_ids_list"],
    "_generate_and_score_completions": ["inputs"],
    "_get_train_sampler": ["dataset"],
    "evaluate": None,
}


def test_the_installed_minor_is_the_tested_one() -> None:
    assert importlib.metadata.version("trl").split(".")[:2] == ["1", "16"]


@pytest.mark.parametrize("name", OVERRIDDEN)
def test_every_overridden_method_exists_with_the_parameters_we_pass_on(name: str) -> None:
    theirs = getattr(trl.GRPOTrainer, name)
    wanted = OVERRIDDEN[name]
    if wanted is not None:
        assert list(inspect.signature(theirs).parameters)[1:] == wanted
    assert getattr(GRPOTrainer, name) is not theirs


def test_rewards_are_computed_once_inside_generate_and_score() -> None:
    source = inspect.getsource(trl.GRPOTrainer._generate_and_score_completions)
    assert source.count("self._calculate_rewards(") == 1 and source.count("self._generate(") == 1
    assert '"advantages": advantages' in source


def test_groups_are_torn_apart_only_after_we_have_seen_them() -> None:
    source = inspect.getsource(trl.GRPOTrainer._prepare_inputs)
    assert source.index("_generate_and_score_completions") < source.index("shuffle_sequence_dict")


def test_generate_returns_the_prompt_ids_first() -> None:
    source = inspect.getsource(trl.GRPOTrainer._generate)
    assert "return prompt_ids, completion_ids," in source


def test_every_name_that_trl_has_means_here_what_it_means_there() -> None:
    ours = {f for f in ModelConfig.__dataclass_fields__}
    theirs = {f for f in trl.ModelConfig.__dataclass_fields__}
    assert ours - theirs == {"device", "float32_matmul_precision"}  # PyTorch's words
    assert issubclass(GRPOConfig, trl.GRPOConfig)


def test_what_our_config_adds_changes_nothing_by_default() -> None:
    added = set(GRPOConfig.__dataclass_fields__) - set(trl.GRPOConfig.__dataclass_fields__)
    assert added == {
        "keep_rollouts", "outcome_gating", "problem_sampling", "step_reward_weight",
        "train_replies", "use_fast_path", "vllm_canary_steps",
    }  # fmt: skip
    assert GRPOConfig.__dataclass_fields__["train_replies"].default is None
    assert not GRPOConfig.__dataclass_fields__["outcome_gating"].default
    assert GRPOConfig.__dataclass_fields__["step_reward_weight"].default == 0
    assert not GRPOConfig.__dataclass_fields__["keep_rollouts"].default
    assert GRPOConfig.__dataclass_fields__["problem_sampling"].default == "uniform"


def test_one_batch_of_the_loader_is_one_generation_batch_in_our_order() -> None:
    source = inspect.getsource(trl.GRPOTrainer.get_train_dataloader)
    assert "sampler_fn=self._get_train_sampler" in source
    assert "self._train_batch_size * self.args.steps_per_generation" in source
