"""Replies depend on prompt, seed and sample, not on the batch; the model comes back as it was."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft import PrefixTuningConfig, PromptEncoderConfig, PromptTuningConfig, get_peft_model
from transformers import GenerationConfig

from abacist.errors import ModelError
from abacist.policy.decoding import generation
from abacist.policy.decoding.generation import Completion, generate, write
from abacist.policy.decoding.network import DecodingNetwork
from abacist.policy.decoding.progress import Decoded
from abacist.policy.decoding.token_sampling import Sampling
from abacist.policy.families import FastPart
from abacist.policy.loading import Policy, default_lora, load_policy, prefix_is_lost
from abacist.records.rollout import StopReason

Fold = Callable[[str], Path]
BUDGET_TOKENS = 10

# Ragged on purpose: from a short question to one several times as long.
PROMPTS = [
    [{"role": "user", "content": f"What is {number} + 7?" + " Think again." * (number % 5)}]
    for number in (11, 2, 33, 4, 50, 1)
]


@pytest.fixture(scope="module", params=["qwen2.5-instruct", "llama-3.2-instruct"])
def network(request: pytest.FixtureRequest, lookalike: Fold) -> Policy:
    return load_policy(str(lookalike(request.param)), dtype="float32", device="cpu")


@pytest.fixture(params=["engine", "transformers"])
def policy(
    request: pytest.FixtureRequest, network: Policy, monkeypatch: pytest.MonkeyPatch
) -> Policy:
    """Every promise holds for both ways of writing a reply."""
    if request.param == "transformers":
        monkeypatch.setattr(generation, "unsupported_reason", lambda *_: "the test forbids it")
    return network


def ids_of(completions: list[list[Completion]]) -> list[list[list[int]]]:
    return [[completion.ids for completion in samples] for samples in completions]


def test_greedy_replies_are_the_same_at_any_batch_size_and_in_any_company(policy: Policy) -> None:
    whole = generate(policy, PROMPTS, max_completion_tokens=BUDGET_TOKENS)
    for batch_size in (1, 2, 5):
        again = generate(
            policy, PROMPTS, max_completion_tokens=BUDGET_TOKENS, batch_size=batch_size
        )
        assert again == whole
    subset = generate(policy, PROMPTS[3:1:-1], max_completion_tokens=BUDGET_TOKENS)
    assert subset == whole[3:1:-1]


def test_greedy_replies_are_the_most_likely_tokens_read_without_cache_or_padding(
    policy: Policy,
) -> None:
    [[completion]] = generate(policy, PROMPTS[:1], max_completion_tokens=BUDGET_TOKENS)
    ids = policy.chat.encode(PROMPTS[0])
    for token in completion.ids:
        with torch.no_grad():
            assert policy.model(torch.tensor([ids])).logits[0, -1].argmax() == token
        ids.append(token)


def test_sampled_replies_are_the_same_at_any_batch_size_and_in_any_company(policy: Policy) -> None:
    def sampled(prompts: list, **options: int) -> list[list[list[int]]]:
        return ids_of(
            generate(
                policy,
                prompts,
                max_completion_tokens=BUDGET_TOKENS,
                temperature=1.0,
                num_samples=3,
                **options,
            )
        )

    whole = sampled(PROMPTS, seed=5)
    assert sampled(PROMPTS, seed=5, batch_size=2) == whole
    assert sampled(PROMPTS[4:2:-1], seed=5) == whole[4:2:-1]
    assert sampled(PROMPTS, seed=6) != whole
    assert all(len({tuple(ids) for ids in samples}) == 3 for samples in whole)
    first, second = sampled([PROMPTS[0], PROMPTS[0]], seed=5)
    assert first == whole[0] and second != first, "a repeated prompt must get numbers of its own"


def test_without_a_seed_the_global_generator_decides(policy: Policy) -> None:
    def drawn() -> list[list[list[int]]]:
        return ids_of(
            generate(policy, PROMPTS[:1], max_completion_tokens=BUDGET_TOKENS, temperature=1.0)
        )

    torch.manual_seed(3)
    first, second = drawn(), drawn()
    torch.manual_seed(3)
    assert drawn() == first != second


def test_a_reply_ends_behind_its_first_stop_token(policy: Policy) -> None:
    whole = generate(policy, PROMPTS, max_completion_tokens=BUDGET_TOKENS)
    stop = whole[0][0].ids[3]
    chat = replace(policy.chat, stop_ids=(stop,))
    stopped = generate(replace(policy, chat=chat), PROMPTS, max_completion_tokens=BUDGET_TOKENS)
    for [before], [after] in zip(whole, stopped, strict=True):
        if stop in before.ids:
            assert after.ids == before.ids[: before.ids.index(stop) + 1]
            assert after.stop_reason in (StopReason.STOPPED, StopReason.EMPTY)
        else:
            assert after == before
            assert after.stop_reason is StopReason.LENGTH
    assert stopped[0][0].stop_reason is StopReason.STOPPED


def test_the_checkpoints_own_sampling_defaults_take_no_part(policy: Policy) -> None:
    expected = generate(policy, PROMPTS, max_completion_tokens=BUDGET_TOKENS)
    kept = policy.model.generation_config
    theirs = GenerationConfig(
        repetition_penalty=5.0, no_repeat_ngram_size=1, bad_words_ids=[[expected[0][0].ids[0]]]
    )
    policy.model.generation_config = theirs
    try:
        assert generate(policy, PROMPTS, max_completion_tokens=BUDGET_TOKENS) == expected
        assert policy.model.generation_config is theirs
    finally:
        policy.model.generation_config = kept


def test_a_prefill_opens_the_text_but_is_not_among_the_ids(policy: Policy) -> None:
    [[completion]] = generate(
        policy, PROMPTS[:1], max_completion_tokens=BUDGET_TOKENS, prefill="<reasoning>\n"
    )
    assert completion.text == "<reasoning>\n" + policy.chat.decode(completion.ids)
    prompt = policy.chat.encode(PROMPTS[0], prefill="<reasoning>\n")
    with torch.no_grad():
        assert policy.model(torch.tensor([prompt])).logits[0, -1].argmax() == completion.ids[0]


@pytest.mark.parametrize("use_engine", [True, False])
def test_progress_is_told_of_every_token_and_ends_with_what_was_written(
    network: Policy, use_engine: bool
) -> None:
    seen: list[Decoded] = []
    prompt_ids = [network.chat.encode(prompt) for prompt in PROMPTS]
    written = write(
        network,
        prompt_ids,
        2,
        6,
        Sampling(),
        batch_size=5,
        seed=3,
        progress=seen.append,
        use_engine=use_engine,
    )
    assert {found.replies for found in seen} == {len(written)} == {12}
    assert {found.budget_tokens for found in seen} == {6}
    first, last = seen[0], seen[-1]
    assert first.written_tokens == 0 and first.expected_tokens == 12 * 6
    assert last.ended == 12 and last.open == 0
    # A row may write on behind its stop until it leaves.
    assert sum(map(len, written)) <= last.ended_tokens <= 12 * 6
    ended = [found.ended for found in seen]
    assert ended == sorted(ended) and len(seen) >= 3 * 6
    for found in seen:
        assert found.ended + found.open <= 12 and found.oldest_tokens <= 6
        assert found.written_tokens <= found.expected_tokens <= 12 * 6


@pytest.mark.parametrize("use_engine", [True, False])
def test_each_prompts_completions_are_told_of_once_all_have_ended(
    network: Policy, use_engine: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not use_engine:
        monkeypatch.setattr(generation, "unsupported_reason", lambda *_: "the test forbids it")
    told: dict[int, list[Completion]] = {}
    found = generate(
        network,
        PROMPTS,
        max_completion_tokens=6,
        temperature=1.0,
        num_samples=2,
        batch_size=3,  # fewer than the rows: some end before others begin
        seed=3,
        ended=told.__setitem__,
    )
    assert [told[number] for number in range(len(PROMPTS))] == found


def test_both_ways_of_writing_write_the_same(
    network: Policy, monkeypatch: pytest.MonkeyPatch
) -> None:
    def both() -> list[list[list[Completion]]]:
        return [
            generate(network, PROMPTS, max_completion_tokens=BUDGET_TOKENS, seed=8, **options)
            for options in (
                {},
                {"temperature": 1.0, "num_samples": 2},
                {"temperature": 0.7, "top_k": 20, "top_p": 0.9},
            )
        ]

    ours = both()
    monkeypatch.setattr(generation, "unsupported_reason", lambda *_: "the test forbids it")
    assert ours == both()


@pytest.mark.parametrize("kind", [PromptTuningConfig, PrefixTuningConfig, PromptEncoderConfig])
def test_what_an_adapter_learned_to_put_before_the_text_does_not_depend_on_the_batch(
    kind: type, network: Policy
) -> None:
    torch.manual_seed(3)
    config = kind(task_type="CAUSAL_LM", num_virtual_tokens=5)
    if prefix_is_lost(config):
        pytest.skip("PEFT's prefix has no effect with this transformers, and is refused")
    model = get_peft_model(copy.deepcopy(network.model), config).eval()
    for weight in model.prompt_encoder.parameters():
        torch.nn.init.normal_(weight, std=3.0)  # enough for its place to matter
    learned = replace(network, model=model)
    assert generation.unsupported_reason(model, FastPart.DECODING) is not None
    assert learned.context_tokens == network.context_tokens - 5
    whole = generate(learned, PROMPTS, max_completion_tokens=BUDGET_TOKENS)
    assert whole != generate(network, PROMPTS, max_completion_tokens=BUDGET_TOKENS)
    for number in (0, 2, 5):
        alone = generate(learned, PROMPTS[number : number + 1], max_completion_tokens=BUDGET_TOKENS)
        assert alone == whole[number : number + 1]
    assert generate(learned, PROMPTS, max_completion_tokens=4, batch_size=2) == generate(
        learned, PROMPTS, max_completion_tokens=4
    )
    seen: list[Decoded] = []
    generate(learned, PROMPTS, max_completion_tokens=2, progress=seen.append)
    ended = [decoded.ended for decoded in seen]
    assert ended[-1] == 6 and ended == sorted(ended)


def test_prompts_of_any_length_share_a_batch_where_no_prompt_was_learned() -> None:
    lengths = [3, 9, 3, 5, 9, 3]
    assert [*generation._batches(lengths, 4, alike=False)] == [[1, 4, 3, 0], [2, 5]]
    assert [*generation._batches(lengths, 2, alike=True)] == [[1, 4], [3], [0, 2], [5]]


def test_no_prompts_give_no_completions(policy: Policy) -> None:
    assert generate(policy, [], max_completion_tokens=4) == []


def test_a_prompt_that_leaves_no_room_is_named(policy: Policy) -> None:
    with pytest.raises(ModelError, match=r"Prompt 1 has .* context of"):
        generate(
            policy,
            [PROMPTS[0], [{"role": "user", "content": "1 + " * policy.context_tokens}]],
            max_completion_tokens=4,
        )
    with pytest.raises(ModelError, match="no tokens"):
        generate(policy, PROMPTS, max_completion_tokens=0)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_scores_that_are_no_numbers_are_refused(policy: Policy, temperature: float) -> None:
    broken = replace(policy, model=copy.deepcopy(policy.model))
    with torch.no_grad():
        broken.model.model.layers[1].mlp.up_proj.weight[0] = torch.nan
    with pytest.raises(ModelError, match=r"NaN or infinite in 2 of 2.*up_proj"):
        generate(broken, PROMPTS[:2], max_completion_tokens=3, temperature=temperature, seed=1)


def test_a_model_in_training_comes_back_in_training_and_still_learns(lookalike: Fold) -> None:
    policy = load_policy(str(lookalike("llama-3.2-instruct")), lora=default_lora(r=4))
    policy.model.enable_input_require_grads()
    policy.model.gradient_checkpointing_enable()
    policy.model.config.use_cache = False
    configs = (policy.model.generation_config, policy.model.get_base_model().generation_config)
    replies = generate(policy, PROMPTS[:2], max_completion_tokens=4)
    assert policy.model.training and policy.model.config.use_cache is False
    assert policy.model.generation_config is configs[0]
    assert policy.model.get_base_model().generation_config is configs[1]
    assert replies == generate(
        load_policy(str(lookalike("llama-3.2-instruct"))), PROMPTS[:2], max_completion_tokens=4
    ), "a fresh adapter changes nothing"
    ids = torch.tensor([policy.chat.encode(PROMPTS[0])])
    policy.model(input_ids=ids, labels=ids).loss.backward()
    assert all(w.grad is not None for w in policy.model.parameters() if w.requires_grad)


def test_training_mode_returns_even_when_generation_fails(
    policy: Policy, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: object, **kwargs: object) -> None:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(policy.model, "generate", fail)
    monkeypatch.setattr(DecodingNetwork, "forward", fail)
    policy.model.train()
    try:
        with pytest.raises(RuntimeError, match="out of memory"):
            generate(policy, PROMPTS, max_completion_tokens=4)
        assert policy.model.training
    finally:
        policy.model.eval()


def test_an_adapter_speaks_through_generation(lookalike: Fold) -> None:
    policy = load_policy(str(lookalike("qwen2.5-instruct")), lora=default_lora(r=4))
    before = generate(policy, PROMPTS[:2], max_completion_tokens=6)
    with torch.no_grad():
        for name, weight in policy.model.named_parameters():
            if "lora_B" in name:
                weight.fill_(0.5)
    assert generate(policy, PROMPTS[:2], max_completion_tokens=6) != before
