"""A model in FSDP2's shards is read whole, as it is now, and is sharded afterwards as before."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    apply_activation_checkpointing,
)
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

from abacist.learning import processes
from abacist.learning.health.guard import Guard
from abacist.learning.health.history import Facts
from abacist.learning.tracking import Silent
from abacist.policy.decoding.engine import Engine
from abacist.policy.families import FastPart, unsupported_reason
from abacist.policy.model_parts import base_of
from abacist.policy.shards import WholeModel

SIZES: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.3,
}
PROMPTS = [[5, 6, 7], [8, 9]]


@pytest.fixture(autouse=True)
def group(tmp_path: Path) -> Iterator[None]:
    """A process group of this process alone: shards are whole, and DTensors all the same."""
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1
    )
    yield
    gc.collect()
    torch.distributed.destroy_process_group()


def llama_with_tied_weights() -> Any:
    return LlamaForCausalLM(LlamaConfig(**SIZES, tie_word_embeddings=True))


def qwen2_with_lora() -> Any:
    base: Any = Qwen2ForCausalLM(Qwen2Config(**SIZES))
    lora = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
    return get_peft_model(base, lora)


MODELS = [llama_with_tied_weights, qwen2_with_lora]


def made(kind: Callable[[], Any]) -> tuple[Any, WholeModel]:
    """A model in shards, layer by layer, and what was made of it while it was whole."""
    torch.manual_seed(0)
    model = kind().eval()
    whole = WholeModel(model, torch.device("cpu"))
    for layer in base_of(model).model.layers:
        fully_shard(layer)
    fully_shard(model)
    assert all(isinstance(weight, DTensor) for weight in model.parameters())
    return model, whole


def greedy(model: Any) -> list[list[list[int]]]:
    return Engine(model, stop_ids=[95], pad_id=0).complete(PROMPTS, 1, 12, None)


@pytest.mark.parametrize("kind", MODELS)
def test_what_is_gathered_writes_what_the_model_would_have_written(kind: Any) -> None:
    torch.manual_seed(0)
    expected = greedy(kind().eval())
    model, whole = made(kind)
    assert unsupported_reason(model, FastPart.DECODING) is not None
    assert unsupported_reason(whole.plain, FastPart.DECODING) is None
    with whole.gathered(model) as plain:
        assert greedy(plain) == expected
        assert not any(isinstance(weight, DTensor) for weight in plain.parameters())


@pytest.mark.parametrize("kind", MODELS)
def test_weights_are_those_of_now_and_not_of_the_last_time(kind: Any) -> None:
    model, whole = made(kind)
    with whole.gathered(model) as plain:
        before = {name: weight.clone() for name, weight in plain.named_parameters()}
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(1.0)
    with whole.gathered(model) as plain:
        for name, weight in plain.named_parameters():
            assert torch.equal(weight, before[name] + 1.0), name


@pytest.mark.parametrize("kind", MODELS)
def test_no_memory_is_held_before_and_after(kind: Any) -> None:
    model, whole = made(kind)
    with pytest.raises(RuntimeError, match="while it is gathered"), whole.gathered(model):
        raise RuntimeError("while it is gathered")
    tensors = [*whole.plain.parameters(), *whole.plain.buffers()]
    assert len(tensors) > 10
    assert {one.untyped_storage().nbytes() // one.element_size() for one in tensors} == {1}


def test_weights_that_two_modules_share_are_gathered_once() -> None:
    model, whole = made(llama_with_tied_weights)
    with whole.gathered(model) as plain:
        assert plain.lm_head.weight is plain.model.embed_tokens.weight
    assert whole.plain.lm_head.weight is whole.plain.model.embed_tokens.weight


def test_master_weights_in_float32_are_gathered_in_the_dtype_that_was_loaded() -> None:
    torch.manual_seed(0)
    model: Any = llama_with_tied_weights().to(torch.bfloat16)
    whole = WholeModel(model, torch.device("cpu"))
    model.float()  # as accelerate holds weights that are trained in mixed precision
    fully_shard(model)
    with whole.gathered(model) as plain:
        assert {weight.dtype for weight in plain.parameters()} == {torch.bfloat16}


def test_wrappers_that_accelerate_puts_around_layers_change_no_name() -> None:
    torch.manual_seed(0)
    model = llama_with_tied_weights().eval()
    expected, whole = greedy(model), WholeModel(model, torch.device("cpu"))
    layer = type(model.model.layers[0])
    apply_activation_checkpointing(model, check_fn=lambda module: isinstance(module, layer))
    fully_shard(model)
    assert any("_checkpoint_wrapped_module" in name for name, _ in model.named_parameters())
    with whole.gathered(model) as plain:
        assert greedy(plain) == expected


@pytest.mark.parametrize("where", ["here", "in another process", "nowhere"])
def test_a_gradient_that_is_broken_in_one_shard_is_refused_by_all(
    where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model: Any = torch.nn.Linear(2, 2)
    fully_shard(model)
    model(torch.ones(1, 2)).sum().backward()
    if where == "here":
        model.weight.grad.to_local()[0, 0] = torch.nan
    elsewhere = where == "in another process"
    monkeypatch.setattr(
        processes, "agreed", lambda *numbers: tuple(one or elsewhere for one in numbers)
    )
    guard = Guard(Facts.of({}, 6, 1), Silent())
    args, state = SimpleNamespace(fp16=False), SimpleNamespace(global_step=4)
    guard.on_pre_optimizer_step(args, state, None, model=model)
    assert (guard.fault is None) == (where == "nowhere")
    assert (model.weight.grad is None) == (where != "nowhere")
