"""Whether every module of a live model still computes what its class was written to compute.

Scoring, decoding and the fused layers compute a model's function from its weights, without calling
most of its modules. That is the model's own function only as long as nobody has put a hook on a
module, replaced it or its ``forward``, parametrized its weights, or set an attribute that its
forward reads. So a model is compared, module by module, with one that is built anew from its
config: same classes, same submodules, same parameters, same settings, and no hooks.

PEFT's LoRA layers are expected, and so is what the libraries attach in an ordinary training: see
``_HARMLESS_HOOKS`` and :func:`_is_expected_forward`.

:func:`difference` is made to be called at every step (milliseconds for 30 layers under LoRA), since
a hook may be added at any time. It is one condition of ``policy.families.unsupported_reason``.
"""

from __future__ import annotations

import copy
import functools
import importlib.util
import os
import sys
import types
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from accelerate.hooks import AlignDevicesHook
from peft import LoraConfig, LoraModel, PeftModel, PeftModelForCausalLM
from peft.tuners.lora.layer import Linear as LoraLinear
from torch import nn
from torch.nn.modules import module as torch_module
from torch.nn.parallel import DistributedDataParallel
from transformers import PreTrainedModel
from transformers.activations import SiLUActivation
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from abacist.policy import mxint8, quantization
from abacist.policy.model_parts import base_of

_FORWARD_HOOKS = ("_forward_hooks", "_forward_pre_hooks")
_BACKWARD_HOOKS = ("_backward_hooks", "_backward_pre_hooks")
# They make an output ask for a gradient, or copy it while somebody collects hidden states.
_HARMLESS_HOOKS = {
    ("transformers.modeling_utils", "make_inputs_require_grads"),
    ("peft.peft_model", "make_inputs_require_grad"),
    ("peft.mixed_model", "make_inputs_require_grad"),
    ("transformers.utils.output_capturing", "output_capturing_hook"),
}
# Settings that say nothing about what a module computes of its weights.
_WITHOUT_EFFECT = {
    *("training", "gradient_checkpointing", "layer_idx", "padding_idx"),
    *("in_features", "out_features", "num_embeddings", "embedding_dim", "norm_type"),
    *("max_seq_len_cached", "original_max_seq_len"),
}
_PACKAGES = tuple(
    os.path.dirname(spec.origin) + os.sep
    for name in ("torch", "transformers", "peft", "accelerate", "trl", "kernels", "bitsandbytes")
    if (spec := importlib.util.find_spec(name)) is not None and spec.origin
)


class LibraryCode:
    """The classes and functions that ``causal_lms`` compute with, as they are when this is made.

    Make it at import, before a script can replace any of them.
    """

    def __init__(self, causal_lms: Iterable[type]) -> None:
        homes = [sys.modules[causal_lm.__module__] for causal_lm in causal_lms]
        kinds: set[type] = {
            *(nn.Linear, nn.Embedding, nn.ModuleList, nn.ModuleDict, nn.Identity, nn.Dropout),
            *(nn.SiLU, SiLUActivation, LoraLinear, LoraModel, PeftModel, PeftModelForCausalLM),
        }
        self._functions: list[tuple[Any, str, Any]] = [
            (torch.nn.functional, name, getattr(torch.nn.functional, name))
            for name in ("linear", "silu", "embedding", "scaled_dot_product_attention")
        ]
        for home in homes:
            for name, value in vars(home).items():
                if isinstance(value, types.FunctionType):
                    self._functions.append((home, name, value))
                elif isinstance(value, type) and issubclass(value, nn.Module):
                    kinds.add(value)
        self._forwards = {kind: _forward_of(kind) for kind in kinds}

    def replaced(self, base: Any, kinds: set[type]) -> str | None:
        """Which class or function that ``base`` computes with is not its library's own."""
        quantized = {
            kind for kind in (quantization.linear_4bit(), quantization.lora_4bit()) if kind
        }
        for kind in kinds | {LoraLinear} | quantized:
            now = _forward_of(kind)
            if now != self._forwards.get(kind, now) or any(map(_is_foreign, now)):
                return f"{kind.__name__} has had its forward replaced"
        for home, name, function in self._functions:
            if home.__name__ in (type(base).__module__, "torch.nn.functional") and (
                getattr(home, name, None) is not function or _is_foreign(function)
            ):
                return f"{home.__name__}.{name} has been replaced"
        return None


def _forward_of(kind: type) -> tuple[Any, Any]:
    return kind.__call__, getattr(kind, "forward", None)


def difference(model: Any, code: LibraryCode, *, learns: bool = True) -> str | None:
    """Why ``model`` may compute another function than its classes do, as the end of a sentence.

    None: it is plain or under LoRA, and its modules are as built. Where ``learns`` is False, only
    what changes the forward counts, not hooks on gradients.
    """
    hooks = _FORWARD_HOOKS + (_BACKWARD_HOOKS if learns else ())
    if any(getattr(torch_module, f"_global{name}") for name in hooks):
        return "a hook is set on all modules (torch.nn.modules.module)"
    base = base_of(model)
    outer = model.module if isinstance(model, DistributedDataParallel) else model
    if isinstance(outer, PeftModel):
        if (kind := _other_than_lora(outer)) is not None:
            return f"its adapter is {kind}, not LoRA"
        for wrapper in (outer, outer.base_model):
            if not _is_bare(wrapper, learns) and (found := _changed(wrapper, learns)):
                return f"{type(wrapper).__name__} {found}"
    plan = _plan_of(base)
    if found := code.replaced(base, plan.kinds):
        return found
    implementation = base.config._attn_implementation or "eager"
    if implementation != "eager" and not _is_librarys_attention(implementation):
        return f"its attention, '{implementation}', is not transformers' own"
    if len(base.model.layers) != base.config.num_hidden_layers:
        return f"it has {len(base.model.layers)} layers, and its config says otherwise"
    search = _Search(learns)
    if (where := search.first(base, plan)) is not None:
        path, what = where
        return f"{path or type(base).__name__} {what}"
    if len(search.devices) > 1 or any(device.type == "meta" for device in search.devices):
        return "its weights are spread over several devices"
    return None


def _other_than_lora(model: PeftModel) -> str | None:
    """What else the adapter is, or an adapter beside it; prompts that are learned, for example."""
    for config in model.peft_config.values():
        if not isinstance(config, LoraConfig):
            return getattr(config.peft_type, "value", str(config.peft_type))
    wrappers = type(model), type(model.base_model)
    if wrappers[0] not in (PeftModel, PeftModelForCausalLM) or wrappers[1] is not LoraModel:
        return f"{wrappers[0].__name__} around {wrappers[1].__name__}"
    return None


def is_changed(module: nn.Module) -> bool:
    """Whether ``module`` itself has hooks or a replaced forward; its class is not looked at."""
    return not _is_bare(module, learns=True) and _changed(module, learns=True) is not None


@dataclass(frozen=True)
class _Plan:
    """A module as it was built: its class, its parts, and what its forward may read."""

    kind: type
    children: Mapping[str, _Plan]
    weights: frozenset[str]
    settings: Mapping[str, object]

    @classmethod
    def of(cls, module: nn.Module) -> _Plan:
        """Of a module that nobody has touched yet, and all below it."""
        is_model = isinstance(module, PreTrainedModel)  # most of its settings do not matter
        return cls(
            kind=type(module),
            children={name: cls.of(child) for name, child in module.named_children()},
            weights=_weights(module),
            settings={
                name: value
                for name, value in vars(module).items()
                if isinstance(value, bool | int | float | str | None)
                and not (is_model or name.startswith("_") or name in _WITHOUT_EFFECT)
            },
        )

    @functools.cached_property
    def kinds(self) -> set[type]:
        """The classes of this module and of all below it."""
        return {self.kind}.union(*(part.kinds for part in self.children.values()))


def _weights(module: nn.Module) -> frozenset[str]:
    return frozenset(name for name, weight in module._parameters.items() if weight is not None)


_plans: WeakKeyDictionary[Any, _Plan] = WeakKeyDictionary()


def _plan_of(base: Any) -> _Plan:
    """Of a model built from the config of ``base`` without memory for weights."""
    if (plan := _plans.get(base)) is None:
        config = copy.deepcopy(base.config)
        config._attn_implementation = "eager"  # which needs nothing that may be missing
        with torch.random.fork_rng(devices=[]), torch.device("meta"):
            plan = _plans[base] = _Plan.of(type(base)(config))
    return plan


_Found = tuple[str, str] | None  # a place below a module, and what is the matter there


class _Search:
    """Of the first place in a model that is not as planned."""

    def __init__(self, learns: bool) -> None:
        self.learns = learns
        self.devices: set[torch.device] = set()

    def first(self, module: nn.Module | None, plan: _Plan) -> _Found:
        """The first place in ``module`` that differs from ``plan``."""
        kind = type(module)
        if kind in (LoraLinear, quantization.lora_4bit()) and plan.kind is nn.Linear:
            return self._first_in_lora(module, plan)
        in_few_bits = kind in (quantization.linear_4bit(), mxint8.Linear)
        if module is None or not (kind is plan.kind or (in_few_bits and plan.kind is nn.Linear)):
            return "", f"is {kind.__module__}.{kind.__name__}, not a plain {plan.kind.__name__}"
        if what := self._own(module, plan.weights):
            return "", what
        for name, value in plan.settings.items():
            if (now := module.__dict__.get(name)) != value:
                return "", f"has {name} {now!r}, where its config makes it {value!r}"
        children = module._modules
        if children.keys() != plan.children.keys():
            odd = ", ".join(sorted(children.keys() ^ plan.children.keys()))
            return "", f"has lost or been given a part: {odd}"
        for name, child in children.items():
            if found := self.first(child, plan.children[name]):
                return _below(name, found)
        return None

    def _first_in_lora(self, layer: Any, plan: _Plan) -> _Found:
        """The same of PEFT's layer over a linear one, as ``scoring.linears`` reads it."""
        if what := self._own(layer, _NONE):
            return "", what
        if layer.lora_variant or any(layer.use_dora.values()):
            return "", "has a variant of LoRA (DoRA or another)"
        if not _LORA_METHODS.isdisjoint(layer.__dict__):
            return "", f"has had its {min(_LORA_METHODS & layer.__dict__.keys())} replaced"
        for name, part in layer._modules.items():
            if name == "base_layer":
                found = self.first(part, plan)
            elif type(part) not in (nn.ModuleDict, nn.ParameterDict):
                found = "", f"is {type(part).__name__}, which LoRA does not have there"
            elif not _is_bare(part, self.learns) and (what := _changed(part, self.learns)):
                found = "", what
            else:
                found = self._first_in_adapters(layer, name, part)
            if found:
                return _below(name, found)
        return None

    def _first_in_adapters(self, layer: Any, name: str, part: nn.Module) -> _Found:
        """In what ``layer`` has of each adapter under ``name``."""
        for adapter, inner in part._modules.items():
            kind, what = type(inner), None
            if inner is not None and inner._modules:
                what = "has been given a part"
            elif kind is nn.Linear:
                has_bias = name == "lora_B" and layer.lora_bias.get(adapter)
                what = self._own(inner, _WEIGHT_AND_BIAS if has_bias else _WEIGHT)
            elif kind is nn.Identity or kind is nn.Dropout:
                what = self._own(inner, _NONE)
            else:
                what = f"is {kind.__name__}, which plain LoRA does not have there"
            if what:
                return adapter, what
        return None

    def _own(self, module: Any, expected: frozenset[str]) -> str | None:
        """What has been done to ``module`` itself or to its weights, not to modules below it."""
        learns = self.learns
        if not _is_bare(module, learns) and (what := _changed(module, learns)):
            return what
        weights = module._parameters
        if not weights and not expected:
            return None
        for name, weight in weights.items():
            if weight is None:
                continue
            self.devices.add(weight.device)
            if name not in expected:
                return f"has been given a parameter, {name}"
            if (
                learns
                and weight.requires_grad
                and (weight._backward_hooks or weight._post_accumulate_grad_hooks)
            ):
                return f"has a hook on the gradient of its {name}"
        for name in expected:
            if weights.get(name) is None:
                return f"has lost its parameter {name}"
        return None


_NONE: frozenset[str] = frozenset()
_WEIGHT, _WEIGHT_AND_BIAS = frozenset({"weight"}), frozenset({"weight", "bias"})
_LORA_METHODS = frozenset(
    name
    for owner in LoraLinear.__mro__
    for name, value in vars(owner).items()
    if isinstance(value, types.FunctionType) and name != "forward"
)


def _below(name: str, found: tuple[str, str]) -> tuple[str, str]:
    return f"{name}.{found[0]}".rstrip("."), found[1]


def _is_bare(module: Any, learns: bool) -> bool:
    """Whether nobody has attached anything at all to ``module``; quick, for it is asked often."""
    own = module.__dict__
    return not (
        own["_forward_hooks"]
        or own["_forward_pre_hooks"]
        or (learns and (own["_backward_hooks"] or own["_backward_pre_hooks"]))
        or "forward" in own
        or "_call_impl" in own
        or "_compiled_call_impl" in own
    )


def _changed(module: nn.Module, learns: bool) -> str | None:
    """What has been attached to ``module`` that may change what it computes."""
    own = module.__dict__
    for name in _FORWARD_HOOKS + (_BACKWARD_HOOKS if learns else ()):
        if not all(map(_is_harmless, own[name].values())):
            what = "forward" if "forward" in name else "backward"
            return f"has a {what} hook, which might change what it computes"
    if "forward" in own and not _is_expected_forward(module):
        return "has had its forward replaced"
    if "_call_impl" in own or own.get("_compiled_call_impl") is not None:
        return "has had its call replaced or compiled"
    return None


def _is_harmless(hook: Any) -> bool:
    return (getattr(hook, "__module__", ""), getattr(hook, "__name__", "")) in _HARMLESS_HOOKS


def _is_expected_forward(module: Any) -> bool:
    """Whether the ``forward`` on this instance is a library's around the class's own.

    TRL adds its fused head to the whole model's and accelerate mixed precision. Placing a model
    puts one of accelerate's around every module, which does nothing where the module's weights and
    its input are on that device already.
    """
    forward = vars(module)["forward"]
    if (hook := vars(module).get("_hf_hook")) is not None:
        before = vars(module).get("_old_forward")
        return (
            type(hook) is AlignDevicesHook
            and not hook.offload
            and _is_at_home(module, hook.execution_device)
            and getattr(before, "__func__", None) is type(module).forward
        )
    if not isinstance(module, PreTrainedModel | PeftModel):
        return False
    inner = getattr(forward, "__func__", forward)
    while inner is not type(module).forward:
        if inner is None or _is_foreign(inner):
            return False
        inner = _within(inner)
    return True


def _within(function: Any) -> Any:
    """What ``function`` is put around, as TRL and as decorators keep it; None: nothing."""
    code = getattr(function, "__code__", None)
    if code is not None and "original_forward" in code.co_freevars:  # TRL's fused head
        place = code.co_freevars.index("original_forward")
        function = function.__closure__[place].cell_contents
        return getattr(function, "__func__", function)
    return getattr(function, "__wrapped__", None)


def _is_at_home(module: nn.Module, device: Any) -> bool:
    """Whether all weights of ``module`` lie where accelerate would bring its inputs."""
    if device is None:
        return True
    home = torch.device(device)
    for weight in module.parameters():
        if weight.device.type != home.type or (weight.device.index or 0) != (home.index or 0):
            return False
    return True


def _is_librarys_attention(implementation: str) -> bool:
    registered = ALL_ATTENTION_FUNCTIONS.get(implementation)
    return registered is not None and not _is_foreign(registered)


def _is_foreign(function: Any) -> bool:
    """Whether ``function``, or its outermost decorator, is written outside of the libraries."""
    code = getattr(function, "__code__", None)  # what is compiled has none
    return code is not None and not code.co_filename.startswith(_PACKAGES)
