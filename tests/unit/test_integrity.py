"""A model whose modules were hooked, replaced or set otherwise takes TRL's path, with the reason;
what PEFT, TRL, transformers and accelerate attach in an ordinary training does not send it there.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.hooks import AlignDevicesHook, ModelHook, add_hook_to_module
from accelerate.state import AcceleratorState
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from torch import nn
from torch.nn.modules import module as torch_module
from torch.nn.utils import parametrize
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama import modeling_llama
from transformers.models.qwen2 import modeling_qwen2
from trl.trainer.utils import add_fused_lm_head

from abacist.learning import fastpath
from abacist.learning.trainer import GRPOTrainer
from abacist.policy.families import FastPart, unsupported_reason
from abacist.policy.model_parts import base_of
from unit.test_fastpath import distance, gradients, make, scored

FAMILIES = ("llama", "qwen2")
Undo = Callable[[], None]


def model_of(family: str, lora: bool = True) -> Any:
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        family, hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, intermediate_size=48, vocab_size=64,
    )  # fmt: skip
    base = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")
    if not lora:
        return base
    targets = ["q_proj", "v_proj", "o_proj", "up_proj", "down_proj"]  # the others stay plain
    return get_peft_model(base, LoraConfig(r=2, target_modules=targets)).train()


def scoring_reason(model: Any) -> str | None:
    return unsupported_reason(model, FastPart.SCORING)


def decoding_reason(model: Any) -> str | None:
    return unsupported_reason(model, FastPart.DECODING)


def half_more(found: Any) -> Any:
    return tuple(map(half_more, found)) if isinstance(found, tuple) else found * 1.5


class HalfMore(nn.Module):
    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return weight * 1.5


# --- Every way of changing a module: each gives the way back, or None where it cannot be done ---


def hook_output(module: Any) -> Undo:
    return module.register_forward_hook(lambda m, args, out: half_more(out)).remove


def hook_input(module: Any) -> Undo:
    return module.register_forward_pre_hook(lambda m, args: None).remove


def hook_gradient(module: Any) -> Undo:
    return module.register_full_backward_hook(lambda m, gave, got: None).remove


def hook_gradient_before(module: Any) -> Undo:
    return module.register_full_backward_pre_hook(lambda m, got: None).remove


def replace_forward(module: Any) -> Undo | None:
    before, mine = module.forward, "forward" in vars(module)
    module.forward = lambda *args, **kwargs: half_more(before(*args, **kwargs))
    return lambda: setattr(module, "forward", before) if mine else delattr(module, "forward")


def wrap_forward_in_disguise(module: Any) -> Undo | None:
    before, mine = module.forward, "forward" in vars(module)

    @functools.wraps(before)
    def forward(*args: Any, **kwargs: Any) -> Any:
        return half_more(before(*args, **kwargs))

    module.forward = forward
    return lambda: setattr(module, "forward", before) if mine else delattr(module, "forward")


def replace_by_another_class(module: Any) -> Undo:
    before = type(module)
    module.__class__ = type(before.__name__, (before,), {})
    return lambda: setattr(module, "__class__", before)


def compile_call(module: Any) -> Undo:
    module._compiled_call_impl = module._call_impl
    return lambda: delattr(module, "_compiled_call_impl")


def parametrize_weight(module: Any) -> Undo | None:
    if module._parameters.get("weight") is None:
        return None
    parametrize.register_parametrization(module, "weight", HalfMore(), unsafe=True)
    return lambda: parametrize.remove_parametrizations(module, "weight", leave_parametrized=False)


def add_bias(module: Any) -> Undo | None:
    weights = module._parameters
    if "weight" not in weights or weights.get("bias") is not None:
        return None
    had = "bias" in weights
    module.bias = nn.Parameter(torch.ones(len(module.weight)))
    return lambda: setattr(module, "bias", None) if had else delattr(module, "bias")


def take_weight_away(module: Any) -> Undo | None:
    if (weight := module._parameters.get("weight")) is None:
        return None
    del module.weight
    module.weight = weight.detach() * 1.5  # as old-style weight normalisation does
    return lambda: (delattr(module, "weight"), module.register_parameter("weight", weight))[0]


def hook_weight(module: Any) -> Undo | None:
    weight = module._parameters.get("weight")
    if weight is None or not weight.requires_grad:
        return None
    return weight.register_hook(lambda grad: grad * 1.5).remove


def watch_weight(module: Any) -> Undo | None:
    weight = module._parameters.get("weight")
    if weight is None or not weight.requires_grad:
        return None
    return weight.register_post_accumulate_grad_hook(lambda weight: None).remove


def add_part(module: Any) -> Undo | None:
    if isinstance(module, nn.ParameterDict):
        return None  # whose parts are parameters
    module.add_module("stranger", nn.Hardshrink())
    return lambda: module._modules.pop("stranger")


def set_otherwise(module: Any) -> Undo | None:
    names = ("scaling", "is_causal", "variance_epsilon", "attention_dropout")
    name = next((one for one in names if isinstance(vars(module).get(one), float | bool)), None)
    if name is None:
        return None
    before = getattr(module, name)
    setattr(module, name, False if before is True else before + 0.5)
    return lambda: setattr(module, name, before)


WAYS = (
    hook_output, hook_input, hook_gradient, hook_gradient_before, replace_forward,
    wrap_forward_in_disguise, replace_by_another_class, compile_call, parametrize_weight, add_bias,
    take_weight_away, hook_weight, watch_weight, add_part, set_otherwise,
)  # fmt: skip
OF_GRADIENTS = (hook_gradient, hook_gradient_before, hook_weight, watch_weight)


@pytest.fixture(scope="module", params=FAMILIES)
def ordinary(request: pytest.FixtureRequest) -> Any:
    """As it stands in the middle of a training on the fast path."""
    model = model_of(request.param)
    model.enable_input_require_grads()
    return model


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
def test_whatever_is_done_to_any_module_is_found_and_named_and_found_no_more_when_undone(
    way: Callable[[Any], Undo | None], ordinary: Any
) -> None:
    assert scoring_reason(ordinary) is None and decoding_reason(ordinary) is None
    base, tried = base_of(ordinary), 0
    places = [(f"model.layers.1.{name}", m) for name, m in base.model.layers[1].named_modules()]
    outer = ("lm_head", "model", "model.norm", "model.rotary_emb", "model.embed_tokens")
    places += [(name, base.get_submodule(name)) for name in outer]
    places += [
        ("LlamaForCausalLM", base),
        ("PeftModel", ordinary),
        ("LoraModel", ordinary.base_model),
    ]
    for name, module in places:
        if way in (replace_by_another_class, add_part) and not name.startswith("model.layers"):
            continue  # PEFT and transformers look their own classes up
        if (undo := way(module)) is None:
            continue
        tried += 1
        try:
            for part, found in (("scoring", scoring_reason), ("decoding", decoding_reason)):
                if part == "decoding" and way in OF_GRADIENTS:
                    assert found(ordinary) is None, name  # it computes no gradients
                    continue
                said = found(ordinary)
                assert said is not None, f"{way.__name__} on {name} went unseen by {part}"
                assert (
                    name.strip(".") in said
                    or "For" in name
                    or "M" in name
                    or (name in ("lm_head", "model.embed_tokens"))
                ), said
        finally:
            undo()
        assert scoring_reason(ordinary) is None, f"{way.__name__} on {name} was undone"
    assert tried >= (2 if way is set_otherwise else 4)


# --- The same on a trainer: what it learns is what stock TRL learns of the changed model ---


def layer_of(model: Any) -> Any:
    return base_of(model).model.layers[1]


def scaled_gradient(module: Any) -> Undo:
    hook = module.register_full_backward_hook(lambda m, gave, got: (gave[0] * 1.5, *gave[1:]))
    return hook.remove


def replaced_part(parent: Any, name: str, part: nn.Module) -> Undo:
    before = getattr(parent, name)
    setattr(parent, name, part)
    return lambda: setattr(parent, name, before)


def on_every_module(model: Any) -> Undo:
    def hook(module: Any, args: Any, out: Any) -> Any:
        return out * 1.5 if "RMSNorm" in type(module).__name__ else None

    return torch_module.register_module_forward_hook(hook).remove


def function_in(home: Any, name: str, function: Callable[..., Any]) -> Undo:
    before = getattr(home, name)
    setattr(home, name, functools.wraps(before)(lambda *a, **k: function(before(*a, **k))))
    return lambda: setattr(home, name, before)


def attention_replaced(model: Any) -> Undo:
    before = ALL_ATTENTION_FUNCTIONS["sdpa"]
    ALL_ATTENTION_FUNCTIONS["sdpa"] = lambda *a, **k: (before(*a, **k)[0] * 1.5, None)
    return lambda: ALL_ATTENTION_FUNCTIONS.__setitem__("sdpa", before)


def family_of(model: Any) -> Any:
    return modeling_llama if "Llama" in type(base_of(model)).__name__ else modeling_qwen2


def mlp_of_the_class(model: Any) -> Undo:
    return function_in(type(layer_of(model).mlp), "forward", lambda out: out * 1.5)


CHANGES: dict[str, tuple[Callable[[Any], Any], str]] = {
    "a hook on a linear under LoRA": (lambda m: hook_output(layer_of(m).mlp.up_proj), "up_proj"),
    "a hook within LoRA": (lambda m: hook_output(layer_of(m).mlp.up_proj.lora_A.default), "lora_A"),
    "a hook on gradients": (lambda m: scaled_gradient(layer_of(m).mlp.up_proj), "backward hook"),
    "a forward replaced": (lambda m: replace_forward(layer_of(m).self_attn.q_proj), "q_proj"),
    "a norm's forward": (lambda m: replace_forward(base_of(m).model.norm), "model.norm"),
    "another activation": (
        lambda m: replaced_part(layer_of(m).mlp, "act_fn", nn.ReLU()),
        "act_fn is torch",
    ),
    "weights parametrized": (
        lambda m: parametrize_weight(layer_of(m).mlp.down_proj.base_layer),
        "ParametrizedLinear",
    ),
    "another scale": (lambda m: set_otherwise(layer_of(m).self_attn), "scaling"),
    "a bias": (lambda m: add_bias(layer_of(m).self_attn.o_proj.base_layer), "bias"),
    "a hook on a weight": (
        lambda m: hook_weight(layer_of(m).self_attn.q_proj.lora_B.default),
        "gradient",
    ),
    "a hook on all modules": (on_every_module, "all modules"),
    "a class's forward": (mlp_of_the_class, "MLP has had its forward replaced"),
    "a function of the family": (
        lambda m: function_in(family_of(m), "rotate_half", lambda x: x * 1.5),
        "rotate_half",
    ),
    "attention plugged into PyTorch": (
        lambda m: function_in(F, "scaled_dot_product_attention", lambda x: x * 1.5),
        "scaled_dot_product_attention",
    ),
    "attention plugged into transformers": (attention_replaced, "'sdpa'"),
}


@pytest.fixture(scope="module", params=["llama-3.2-instruct", "qwen2.5-instruct"])
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """Ours and stock TRL's trainer of one model, and a batch to learn from."""
    import trl

    import lookalikes

    root = tmp_path_factory.mktemp("pair")
    folder = lookalikes.build(request.param, root / "model", size=32)
    ours, stock = (make(kind, folder, root / "run") for kind in (GRPOTrainer, trl.GRPOTrainer))
    inputs = {k: v for k, v in scored(ours).items() if v is not None}
    yield ours, stock, inputs


@pytest.mark.parametrize("change", CHANGES)
def test_what_is_learned_of_a_changed_model_is_what_stock_trl_learns_of_it(
    change: str, pair: Any
) -> None:
    ours, stock, inputs = pair
    do, reason = CHANGES[change]
    before = gradients(ours, inputs)
    assert fastpath.unsupported_reason(ours, FastPart.SCORING) is None
    with ExitStack() as undo:
        for trainer in (ours, stock):
            undo.callback(do(trainer.model))
        theirs, found = gradients(stock, inputs), gradients(ours, inputs)
        line = next(line for line in ours.fast_path_report() if line.startswith("training"))
        assert "TRL's path" in line and reason in line
    assert distance(found, theirs) < 1e-5
    shared = {name: theirs[name] for name in before if name in theirs}
    assert distance({n: before[n] for n in shared}, shared) > 1e-4  # the change does matter
    assert distance(gradients(ours, inputs), before) < 1e-6
    assert fastpath.unsupported_reason(ours, FastPart.SCORING) is None


# --- What belongs to an ordinary training, and its neighbours that do not ---


def captured_states(model: Any) -> None:
    model(torch.tensor([[1, 2, 3]]), output_hidden_states=True, output_attentions=False)


def placed(model: Any, **options: Any) -> None:
    for module in base_of(model).modules():
        add_hook_to_module(module, AlignDevicesHook(**{"execution_device": "cpu", **options}))


def mixed_precision(model: Any) -> None:
    kept = dict(AcceleratorState._shared_state)
    AcceleratorState._shared_state.clear()
    try:
        Accelerator(cpu=True, mixed_precision="bf16").prepare_model(model)
    finally:
        AcceleratorState._shared_state.clear()
        AcceleratorState._shared_state.update(kept)
    assert "autocast" in str(model.forward.__func__.__wrapped__.model_forward.__code__)


ORDINARY: dict[str, Callable[[Any], Any]] = {
    "inputs that ask for gradients": lambda m: m.enable_input_require_grads(),
    "checkpointing": lambda m: m.gradient_checkpointing_enable({"use_reentrant": False}),
    "hidden states asked for once": captured_states,
    "mixed precision": mixed_precision,
    "TRL's fused head": lambda m: add_fused_lm_head(base_of(m)),
    "placed on the device where it is": placed,
    "evaluation mode": lambda m: m.eval(),
    "another padding token": lambda m: setattr(base_of(m).config, "pad_token_id", 3),
}


@pytest.mark.parametrize("lora", [True, False])
@pytest.mark.parametrize("what", ORDINARY)
def test_what_libraries_attach_in_an_ordinary_training_is_no_obstacle(
    what: str, lora: bool
) -> None:
    model = model_of("qwen2", lora).train()
    ORDINARY[what](model)
    assert scoring_reason(model) is None and decoding_reason(model) is None
    if what != "mixed precision":  # whose wrapper cannot be copied
        assert scoring_reason(copy.deepcopy(model)) is None


def named_like_a_library(model: Any) -> None:
    def make_inputs_require_grads(module: Any, args: Any, output: Any) -> Any:
        return output * 1.5

    model.get_input_embeddings().register_forward_hook(make_inputs_require_grads)


def fused_head_over_a_replaced_forward(model: Any) -> None:
    replace_forward(base_of(model))
    add_fused_lm_head(base_of(model))


class Doubling(ModelHook):
    def post_forward(self, module: Any, output: Any) -> Any:
        return half_more(output)


STRANGE: dict[str, Callable[[Any], Any]] = {
    "a hook named like a library's": named_like_a_library,
    "weights that accelerate keeps elsewhere": lambda m: placed(m, offload=True),
    "another hook of accelerate's": lambda m: add_hook_to_module(layer_of(m).mlp, Doubling()),
    "TRL's fused head over a replaced forward": fused_head_over_a_replaced_forward,
    "a layer taken out": lambda m: base_of(m).model.layers.__delitem__(0),
    "an embedding that renorms": lambda m: setattr(m.get_input_embeddings(), "max_norm", 0.1),
    "a weight on no device": lambda m: layer_of(m).mlp.gate_proj.to("meta"),
}


@pytest.mark.parametrize("what", STRANGE)
def test_the_neighbours_of_what_is_ordinary_are_seen(what: str) -> None:
    model = model_of("llama")
    STRANGE[what](model)
    assert scoring_reason(model) is not None and decoding_reason(model) is not None


def test_an_adapter_of_prompts_is_named() -> None:
    model = get_peft_model(
        model_of("llama", lora=False),
        PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
    )
    for found in (scoring_reason, decoding_reason):
        assert "PROMPT_TUNING" in str(found(model))


def test_a_model_of_another_family_is_never_taken_for_one_of_ours(tmp_path: Path) -> None:
    class Own(modeling_qwen2.Qwen2ForCausalLM):
        pass

    config = AutoConfig.for_model(
        "qwen2", hidden_size=32, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, intermediate_size=48, vocab_size=64,
    )  # fmt: skip
    assert "Own is not" in str(scoring_reason(Own(config)))


def test_a_vocabulary_may_grow_with_its_config_and_a_head_may_not_grow_alone() -> None:
    model = model_of(FAMILIES[0])
    base = base_of(model)
    assert unsupported_reason(model, FastPart.SCORING) is None
    base.resize_token_embeddings(base.config.vocab_size + 5)
    assert unsupported_reason(model, FastPart.SCORING) is None
    rows, width = base.lm_head.weight.shape
    base.lm_head = nn.Linear(width, rows + 7, bias=False)
    assert "more tokens than its embedding" in str(unsupported_reason(model, FastPart.DECODING))


def test_heads_that_were_pruned_in_one_layer_are_not_taken_for_those_of_the_first() -> None:
    model = model_of(FAMILIES[0], lora=False)
    attention = layer_of(model).self_attn
    attention.q_proj = nn.Linear(32, attention.head_dim, bias=False)
    attention.o_proj = nn.Linear(attention.head_dim, 32, bias=False)
    assert "layer 1 has other attention heads" in str(unsupported_reason(model, FastPart.DECODING))
