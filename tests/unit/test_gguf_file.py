"""A GGUF file says of a model what llama.cpp needs to know, and nothing is left unsaid."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import pre_tokenizers
from transformers import AutoTokenizer

from abacist.delivery import gguf_file
from abacist.delivery.gguf_file import pre_tokenizer, refuse_unmapped, starts_with_bos, write_gguf
from abacist.errors import ModelError
from abacist.policy.loading import Policy, load_policy

gguf = pytest.importorskip("gguf", reason="gguf, which the extra export brings, is not here")

FAMILIES = {"llama-3.2-instruct": "llama-bpe", "qwen2.5-instruct": "qwen2"}
Lookalike = Callable[[str], Path]


def nothing(done: int, total: int) -> None:
    pass


def policy_of(lookalike: Lookalike, kind: str) -> Policy:
    return load_policy(str(lookalike(kind)), dtype="float32")


def written(policy: Policy, path: Path, dtype: str = "float32") -> Any:
    write_gguf(policy.model, policy.chat, path, dtype=dtype, name="a test", tell=nothing)
    return gguf.GGUFReader(path)


@pytest.mark.parametrize("kind", FAMILIES)
def test_every_weight_stands_in_the_file_once(
    kind: str, lookalike: Lookalike, tmp_path: Path
) -> None:
    policy = policy_of(lookalike, kind)
    found = {tensor.name: tensor for tensor in written(policy, tmp_path / "m.gguf").tensors}
    ours = {name for name in policy.model.state_dict() if name != "lm_head.weight"}
    extra = {"rope_freqs.weight"} & set(found)
    assert len(found) == len(ours) + len(extra) and "output.weight" not in found
    assert bool(extra) == kind.startswith("llama")  # whose rotary frequencies are scaled
    embedding = found["token_embd.weight"].data
    ours_embedding = policy.model.get_input_embeddings().weight.detach().numpy()
    assert np.array_equal(embedding, ours_embedding)


@pytest.mark.parametrize("kind", FAMILIES)
def test_tokens_stops_and_splitting_are_the_tokenizers(
    kind: str, lookalike: Lookalike, tmp_path: Path
) -> None:
    policy = policy_of(lookalike, kind)
    fields = written(policy, tmp_path / "m.gguf").fields
    tokens = fields["tokenizer.ggml.tokens"].contents()
    tokenizer = policy.chat.tokenizer
    assert len(tokens) == policy.model.get_input_embeddings().weight.shape[0]
    assert all(tokens[number] == text for text, number in tokenizer.get_vocab().items())
    assert fields["tokenizer.ggml.pre"].contents() == FAMILIES[kind]
    stops = [
        fields[f"tokenizer.ggml.{name}_token_id"].contents()
        for name in ("eos", "eot", "eom")
        if f"tokenizer.ggml.{name}_token_id" in fields
    ]
    assert tuple(stops) == policy.chat.stop_ids[:3]
    assert fields["tokenizer.chat_template"].contents() == tokenizer.get_chat_template()
    adds = fields["tokenizer.ggml.add_bos_token"].contents()
    assert adds == starts_with_bos(tokenizer) == kind.startswith("llama")
    types = fields["tokenizer.ggml.token_type"].contents()
    assert types[policy.chat.stop_ids[0]] == 3 and types[10] == 1


def test_scaled_rotary_frequencies_are_kept_as_their_quotients(
    lookalike: Lookalike, tmp_path: Path
) -> None:
    policy = policy_of(lookalike, "llama-3.2-instruct")
    reader = written(policy, tmp_path / "m.gguf")
    (factors,) = (t.data for t in reader.tensors if t.name == "rope_freqs.weight")
    theta, size = 500000.0, len(factors)
    plain = theta ** -(np.arange(size) / size)
    used = policy.model.model.rotary_emb.inv_freq.numpy()
    np.testing.assert_allclose(plain / factors, used, rtol=1e-5)
    assert factors.max() == pytest.approx(32.0) and factors.min() == pytest.approx(1.0)


def test_neighbours_in_a_llama_query_matrix_are_pairs_that_are_turned_together() -> None:
    weight = torch.arange(2 * 8 * 3).view(16, 3)  # two heads of eight numbers
    found = gguf_file._interleaved(weight, heads=2)
    assert torch.equal(found[0], weight[0]) and torch.equal(found[1], weight[4])
    assert torch.equal(found[8], weight[8]) and torch.equal(found[9], weight[12])
    assert sorted(found.flatten().tolist()) == weight.flatten().tolist()


@pytest.mark.parametrize(
    ("dtype", "most"), [("float16", 1 / 2048), ("bfloat16", 1 / 256), ("q8_0", None)]
)
def test_numbers_are_rounded_to_the_nearest(
    dtype: str, most: float | None, lookalike: Lookalike, tmp_path: Path
) -> None:
    policy = policy_of(lookalike, "qwen2.5-instruct")
    with torch.no_grad():  # so that they are not what the file stores in any case
        for weight in policy.model.parameters():
            weight.mul_(1.2345)
    tensors = {t.name: t for t in written(policy, tmp_path / "m.gguf", dtype).tensors}
    name, ours = "blk.0.ffn_down.weight", policy.model.model.layers[0].mlp.down_proj.weight
    values = ours.detach().numpy()
    back = gguf.dequantize(tensors[name].data, tensors[name].tensor_type)
    if most is not None:
        assert np.all(np.abs(back - values) <= most * np.abs(values) + 1e-7)
        assert np.abs(back - values).max() > 0
    else:
        blocks = values.reshape(-1, 32)
        step = np.abs(blocks).max(axis=1, keepdims=True) / 127
        assert np.all(np.abs(back.reshape(-1, 32) - blocks) <= 0.6 * step)  # a scale is float16
    norm = tensors["output_norm.weight"]
    assert norm.tensor_type == gguf.GGMLQuantizationType.F32


def test_rows_that_cannot_be_cut_into_blocks_are_float16(
    lookalike: Lookalike, tmp_path: Path
) -> None:
    import lookalikes

    folder = lookalikes.build("qwen2.5-instruct", tmp_path / "narrow", size=48)
    policy = load_policy(str(folder), dtype="float32")
    found = {t.name: t.tensor_type for t in written(policy, tmp_path / "m.gguf", "q8_0").tensors}
    assert found["token_embd.weight"] == gguf.GGMLQuantizationType.F16
    assert found["blk.0.ffn_down.weight"] == gguf.GGMLQuantizationType.Q8_0  # 96 is 3 blocks


def test_a_weight_beyond_float16_is_refused_by_its_name(
    lookalike: Lookalike, tmp_path: Path
) -> None:
    policy = policy_of(lookalike, "qwen2.5-instruct")
    with torch.no_grad():
        policy.model.model.layers[1].mlp.up_proj.weight[3, 4] = 70000.0
    with pytest.raises(ModelError, match=r"layers\.1\.mlp\.up_proj.*7e\+04"):
        written(policy, tmp_path / "m.gguf", "float16")
    assert written(policy, tmp_path / "m.gguf", "bfloat16")


def test_what_has_no_mapping_is_refused_by_what_it_has(lookalike: Lookalike) -> None:
    from transformers import MistralConfig, MistralForCausalLM

    policy = policy_of(lookalike, "qwen2.5-instruct")
    tokenizer = policy.chat.tokenizer
    small = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16}
    other = MistralForCausalLM(MistralConfig(vocab_size=100, **small, **heads))
    with pytest.raises(ModelError, match="MistralForCausalLM"):
        refuse_unmapped(other, tokenizer)
    policy.model.config.use_sliding_window = True
    with pytest.raises(ModelError, match="sliding window"):
        refuse_unmapped(policy.model, tokenizer)
    policy.model.config.use_sliding_window = False
    refuse_unmapped(policy.model, tokenizer)
    policy.model.model.rotary_emb.inv_freq.mul_(0.5)
    with pytest.raises(ModelError, match="rotary"):
        refuse_unmapped(policy.model, tokenizer)


def test_a_way_to_split_text_without_a_name_is_refused(lookalike: Lookalike) -> None:
    tokenizer = AutoTokenizer.from_pretrained(lookalike("qwen2.5-instruct"))
    assert pre_tokenizer(tokenizer) == "qwen2"
    plain = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.backend_tokenizer.pre_tokenizer = plain
    assert pre_tokenizer(tokenizer) == "gpt-2"
    digits = pre_tokenizers.Digits(individual_digits=True)
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, plain])
    assert pre_tokenizer(tokenizer) == "smollm"
    threes = pre_tokenizers.Digits(individual_digits=False)
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence([threes, plain])
    assert pre_tokenizer(tokenizer) is None
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    assert pre_tokenizer(tokenizer) is None
