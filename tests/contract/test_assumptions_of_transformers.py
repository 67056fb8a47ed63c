"""What policy/ assumes of transformers, huggingface_hub, peft and trl, each on a look-alike.

A failure here after an update names the assumption that no longer holds, and where we lean on it.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError
from peft import PrefixTuningConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, BatchEncoding, GenerationConfig
from transformers.modeling_flash_attention_utils import FLASH_ATTN_KERNEL_FALLBACK
from transformers.trainer_utils import align_special_tokens
from trl import GRPOConfig, GRPOTrainer

import lookalikes
from abacist.policy.loading import Policy, default_lora, load_policy, prefix_is_lost

Fold = Callable[[str], Path]
KINDS = lookalikes.KINDS

PROMPTS = [
    [{"role": "user", "content": "What is 5 + 7?"}],
    [
        {"role": "system", "content": "Be brief. "},
        {"role": "user", "content": "What is 1 + 1?"},
        {"role": "assistant", "content": "<reasoning>\n1 + 1 = 2\n</reasoning>\n"},
        {"role": "user", "content": "Tom has 12 coins and gets 150 more. How many has he?"},
    ],
]


@pytest.fixture(scope="module", params=KINDS)
def policy(request: pytest.FixtureRequest, lookalike: Fold) -> Policy:
    return load_policy(str(lookalike(request.param)), device="cpu", trainable=True)


@pytest.fixture(scope="module")
def trainer(policy: Policy, tmp_path_factory: pytest.TempPathFactory) -> GRPOTrainer:
    """Stock TRL around our policy, as learning/train.py puts it together."""
    return GRPOTrainer(
        model=policy.model,
        processing_class=policy.chat.tokenizer,
        reward_funcs=lambda completions, **columns: [0.0] * len(completions),
        train_dataset=Dataset.from_dict({"prompt": PROMPTS}),
        args=GRPOConfig(
            output_dir=str(tmp_path_factory.mktemp("run")),
            use_cpu=True,
            bf16=False,
            per_device_train_batch_size=2,
            num_generations=2,
            chat_template_kwargs=policy.chat.chat_template_kwargs,
        ),
    )


# peft and transformers (loading.py: prefix_is_lost)


def test_a_learned_prefix_changes_what_is_generated_just_where_it_is_not_refused(
    lookalike: Fold,
) -> None:
    model = AutoModelForCausalLM.from_pretrained(lookalike("qwen2.5-instruct")).eval()
    ids = torch.tensor([[10, 11, 12, 13]])
    asked = {"input_ids": ids, "max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    before = model.generate(**asked)
    config = PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    learned = get_peft_model(model, config).eval()
    torch.manual_seed(3)
    for weight in learned.prompt_encoder.parameters():
        torch.nn.init.normal_(weight, std=3.0)
    assert prefix_is_lost(config) == torch.equal(learned.generate(**asked), before)


# trl (chat.py: encode, stop_ids, pad_id, decode)


def test_trl_encodes_a_prompt_to_the_very_ids_of_our_chat(
    policy: Policy, trainer: GRPOTrainer
) -> None:
    prompt_ids, _, _ = trainer._tokenize_prompts(PROMPTS)
    assert prompt_ids == [policy.chat.encode(messages) for messages in PROMPTS]


def test_trl_stops_at_every_stop_token_of_our_chat(policy: Policy, trainer: GRPOTrainer) -> None:
    stop_ids = set(policy.chat.stop_ids)
    assert set(trainer.eos_token_ids) == stop_ids
    assert set(trainer.generation_config.eos_token_id) == stop_ids
    assert set(trainer.model.generation_config.eos_token_id) == stop_ids


def test_trl_keeps_our_pad_token_and_none_of_the_checkpoints_sampling_defaults(
    policy: Policy, trainer: GRPOTrainer
) -> None:
    config = trainer.generation_config
    assert trainer._tokenizer.pad_token_id == config.pad_token_id == policy.chat.pad_id
    assert (config.repetition_penalty, config.temperature, config.top_p) == (1.0, 1.0, 1.0)


def test_trl_decodes_completions_as_our_chat_does(policy: Policy, trainer: GRPOTrainer) -> None:
    beyond = policy.model.config.vocab_size - 1
    text = policy.chat.tokenizer("It is 5 , so 12 .\n", add_special_tokens=False)["input_ids"]
    for ids in (text, [*text, *policy.chat.stop_ids], [beyond, *text], [beyond], []):
        [decoded] = trainer.processing_class.batch_decode([ids], skip_special_tokens=True)
        assert decoded == policy.chat.decode(ids)


def test_the_trainer_takes_no_stop_token_away_when_it_aligns_special_tokens(
    policy: Policy,
) -> None:
    align_special_tokens(policy.model, policy.chat.tokenizer)
    assert set(policy.model.generation_config.eos_token_id) == set(policy.chat.stop_ids)
    assert policy.model.generation_config.pad_token_id == policy.chat.pad_id


# transformers (chat.py, generation.py, choices.py)


@pytest.mark.parametrize("kind", KINDS)
def test_a_chat_template_gives_a_batch_encoding_without_a_second_bos(
    kind: str, lookalike: Fold
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(lookalike(kind))
    if tokenizer.chat_template is None:
        return
    encoded = tokenizer.apply_chat_template(PROMPTS[0], add_generation_prompt=True)
    assert isinstance(encoded, BatchEncoding)
    assert encoded["input_ids"].count(tokenizer.bos_token_id) == (tokenizer.bos_token is not None)


def test_generate_fills_what_is_left_open_from_the_models_own_config(lookalike: Fold) -> None:
    """Why Chat.apply_to and decoding put a neutral config on the model."""
    model = AutoModelForCausalLM.from_pretrained(lookalike("qwen2.5-instruct"))
    prepared, _ = model._prepare_generation_config(GenerationConfig(do_sample=True))
    assert prepared.repetition_penalty == 1.1
    model.generation_config = GenerationConfig()
    prepared, _ = model._prepare_generation_config(GenerationConfig(do_sample=True))
    assert prepared.repetition_penalty == 1.0


def test_a_greedy_search_obeys_our_logits_processor(policy: Policy) -> None:
    """Why a sampler can stand in a greedy generate (generation.py)."""

    def only_five(input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        return torch.full_like(scores, -torch.inf).index_fill(1, torch.tensor([5]), 0.0)

    config = GenerationConfig(max_new_tokens=3, do_sample=False)
    output = policy.model.generate(
        input_ids=torch.tensor([[7, 8]]),
        attention_mask=torch.ones(1, 2, dtype=torch.long),
        generation_config=config,
        logits_processor=[only_five],
    )
    assert output.tolist() == [[7, 8, 5, 5, 5]]


def test_flash_attention_2_falls_back_to_a_build_from_the_hub() -> None:
    assert FLASH_ATTN_KERNEL_FALLBACK["flash_attention_2"].startswith("kernels-community/")


@pytest.mark.parametrize("kind", KINDS)
def test_a_tied_head_is_not_reported_missing(kind: str, lookalike: Fold) -> None:
    model, report = AutoModelForCausalLM.from_pretrained(
        lookalike(kind), output_loading_info=True, use_safetensors=True
    )
    assert not report["missing_keys"] and not report["unexpected_keys"]
    assert model.lm_head.weight is model.get_input_embeddings().weight


# huggingface_hub (source.py)


def test_a_gated_repository_is_a_special_case_of_one_not_found() -> None:
    assert issubclass(GatedRepoError, RepositoryNotFoundError)


# peft (loading.py)


def test_an_adapter_takes_its_bases_name_from_where_the_model_was_loaded(lookalike: Fold) -> None:
    folder = str(lookalike("qwen2.5-instruct"))
    model = AutoModelForCausalLM.from_pretrained(folder)
    model.config._name_or_path = "another"
    wrapped = get_peft_model(model, default_lora(r=4))
    assert wrapped.peft_config["default"].base_model_name_or_path == folder


def test_all_linear_leaves_the_head_out_and_a_new_adapter_changes_nothing(
    lookalike: Fold,
) -> None:
    plain = AutoModelForCausalLM.from_pretrained(lookalike("llama-3.2-base"))
    ids = torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        before = plain(ids).logits
        wrapped = get_peft_model(plain, default_lora(r=4)).eval()
        assert torch.equal(wrapped(ids).logits, before)
    assert not any("lm_head.lora" in name for name, _ in wrapped.named_parameters())
