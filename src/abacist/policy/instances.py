"""Whether every module of a live model still computes what its class was written to compute.

Scoring, decoding and the fused layers compute a model's function from its weights, without calling
most of its modules. That is the model's own function only as long as nobody has put a hook on a
module, replaced it or its ``forward``, parametrized its weights, or set an attribute that its
forward reads. So a model is compared, module by module, with one that is built anew from its
config: same classes, same submodules, same parameters, same settings, and no hooks. What differs is
an obstacle, and the model takes the path that calls its modules.

PEFT's LoRA layers are expected, and so is what the libraries attach in the course of an
ordinary training: see ``_HARMLESS_HOOKS`` and :func:`_is_expected_forward`.

:func:`obstacle` is made to be asked anew at every step (milliseconds for 30 layers under LoRA),
since a hook may be added at any time.
"""

from __future__ import annotations

import copy
import importlib.util
import os
import sys
import types
from collections.abc import Callable, Iterator, Mapping
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
from transformers import LlamaForCausalLM, PreTrainedModel, Qwen2ForCausalLM, Qwen3ForCausalLM
from transformers.activations import SiLUActivation

FAMILIES = (LlamaForCausalLM, Qwen2ForCausalLM, Qwen3ForCausalLM)
"""The models that the fast path has been proven on."""

_FORWARD_HOOKS = ("_forward_hooks", "_forward_pre_hooks")
_BACKWARD_HOOKS = ("_backward_hooks", "_backward_pre_hooks")
# They make an output ask for a gradient, or copy it while somebody collects hidden states.
_HARMLESS_HOOKS = {
    ("transformers.modeling_utils", "make_inputs_require_grads"),
    ("peft.peft_model", "make_inputs_require_grad"),
    ("peft.mixed_model", "make_inputs_require_grad"),
    ("transformers.utils.output_capturing", "output_capturing_hook"),
}
_OWN_FORWARDS = "abacist.policy."  # of the modules that define what stands in for a forward
# Settings that say nothing about what a module computes of its weights.
_WITHOUT_EFFECT = {
    *("training", "gradient_checkpointing", "layer_idx", "padding_idx"),
    *("in_features", "out_features", "num_embeddings", "embedding_dim", "norm_type"),
    *("max_seq_len_cached", "original_max_seq_len"),
}
_PACKAGES = tuple(
    os.path.dirname(spec.origin) + os.sep
    for name in ("torch", "transformers", "peft", "accelerate", "trl", "kernels")
    if (spec := importlib.util.find_spec(name)) is not None and spec.origin
)


def base_of(model: Any) -> Any:
    """The transformers model within DDP's and PEFT's wrappers."""
    model = model.module if isinstance(model, DistributedDataParallel) else model
    return model.get_base_model() if isinstance(model, PeftModel) else model


def obstacle(model: Any, *, learns: bool = True) -> str | None:
    """Why ``model`` may compute another function than its classes do, as the end of a sentence.

    None: it is one of :data:`FAMILIES`, plain or under LoRA, and its modules are as built. Where
    ``learns`` is False, only what changes the forward counts, not hooks on gradients.
    """
    hooks = _FORWARD_HOOKS + (_BACKWARD_HOOKS if learns else ())
    if any(getattr(torch_module, f"_global{name}") for name in hooks):
        return "a hook is set on all modules (torch.nn.modules.module)"
    base = base_of(model)
    if type(base) not in FAMILIES:
        names = ", ".join(family.__name__ for family in FAMILIES)
        return f"{type(base).__name__} is not one of {names}"
    outer = model.module if isinstance(model, DistributedDataParallel) else model
    if isinstance(outer, PeftModel):
        if (kind := _other_than_lora(outer)) is not None:
            return f"its adapter is {kind}, not LoRA"
        for wrapper in (outer, outer.base_model):
            if found := _changed(wrapper, _ANY, hooks):
                return f"{type(wrapper).__name__} {found}"
    plan = _plan_of(base)
    if found := _changed_code(base, plan.kinds):
        return found
    if len(base.model.layers) != base.config.num_hidden_layers:
        return f"it has {len(base.model.layers)} layers, and its config says otherwise"
    if (difference := _difference(base, plan, hooks)) is not None:
        path, what = difference
        return f"{path or type(base).__name__} {what}"
    devices = {weight.device for weight in base.parameters()}
    if len(devices) > 1 or any(device.type == "meta" for device in devices):
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
    """Whether ``module`` has hooks or a forward of a stranger's; of classes it knows nothing."""
    return _changed(module, _ANY, _FORWARD_HOOKS + _BACKWARD_HOOKS) is not None


def stand_in(module: nn.Module, forward: Callable[..., Any]) -> None:
    """Give ``module`` a ``forward`` of ours, unless it has a stranger's already."""
    if "forward" not in vars(module) or _is_ours(vars(module)["forward"]):
        module.forward = types.MethodType(forward, module)  # type: ignore[method-assign]


def step_aside(model: nn.Module) -> None:
    """Take every ``forward`` of ours off the modules of ``model``."""
    for module in model.modules():
        if _is_ours(vars(module).get("forward")):
            del module.forward


@dataclass(frozen=True)
class _Plan:
    """A module as it was built: its class, its parts, and what its forward may read."""

    kind: type | None  # None: any
    children: Mapping[str, _Plan]
    repeated: _Plan | None  # what all layers of a list are like
    weights: frozenset[str] | None
    settings: Mapping[str, object]
    methods: frozenset[str]  # that an attribute of an instance could stand before

    @classmethod
    def of(cls, module: nn.Module) -> _Plan:
        """Of a module that nobody has touched yet, and all below it."""
        repeated = cls.of(module[0]) if isinstance(module, nn.ModuleList) else None
        is_model = isinstance(module, PreTrainedModel)  # their settings hold much that is no matter
        return cls(
            kind=type(module),
            children={}
            if repeated
            else {name: cls.of(child) for name, child in module.named_children()},
            repeated=repeated,
            weights=_weights(module),
            settings={
                name: value
                for name, value in vars(module).items()
                if isinstance(value, bool | int | float | str | None)
                and not (is_model or name.startswith("_") or name in _WITHOUT_EFFECT)
            },
            methods=_SWITCHES if is_model else _methods(type(module)),
        )

    @property
    def kinds(self) -> set[type]:
        """The classes of this module and of all below it."""
        below = [*self.children.values(), *([self.repeated] if self.repeated else [])]
        kinds = set().union(*(part.kinds for part in below))
        return kinds if self.kind is None else kinds | {self.kind}


_SWITCHES = frozenset({"__call__", "_call_impl", "_wrapped_call_impl", "_compiled_call_impl"})


def _methods(kind: type) -> frozenset[str]:
    functions = {
        name
        for owner in kind.__mro__
        for name, value in vars(owner).items()
        if isinstance(value, types.FunctionType)
    }
    return frozenset(functions - {"forward"}) | _SWITCHES


def _any_of(kind: type | None) -> _Plan:
    methods = _SWITCHES if kind is None else _methods(kind)
    return _Plan(kind, {}, None, None, {}, methods)


_ANY = _any_of(None)
_LORA = _any_of(LoraLinear)
_WITHIN_LORA = {kind: _any_of(kind) for kind in (nn.Identity, nn.Dropout, nn.Linear)}
_plans: WeakKeyDictionary[Any, _Plan] = WeakKeyDictionary()


def _plan_of(base: Any) -> _Plan:
    """Of a model of one layer, built from the config of ``base`` without memory for weights."""
    if (plan := _plans.get(base)) is None:
        config = copy.deepcopy(base.config)
        config.num_hidden_layers = 1
        if getattr(config, "layer_types", None):
            config.layer_types = config.layer_types[:1]
        config._attn_implementation = "eager"  # which needs nothing that may be missing
        with torch.random.fork_rng(devices=[]), torch.device("meta"):
            plan = _plans[base] = _Plan.of(type(base)(config))
    return plan


def _difference(module: nn.Module, plan: _Plan, hooks: tuple[str, ...]) -> tuple[str, str] | None:
    """The first place below ``module`` that is not as in ``plan``, and what is the matter there."""
    kind = type(module)
    if kind is LoraLinear and plan.kind is nn.Linear:
        return _difference_in_lora(module, plan, hooks)
    if kind is not plan.kind:
        expected = "nothing" if plan.kind is None else plan.kind.__name__
        return "", f"is {kind.__module__}.{kind.__name__}, not a plain {expected}"
    if what := _changed(module, plan, hooks):
        return "", what
    children = module._modules
    if plan.repeated is not None:
        expected_children = dict.fromkeys(children, plan.repeated)
    elif children.keys() == plan.children.keys():
        expected_children = dict(plan.children)
    else:
        odd = ", ".join(sorted(children.keys() ^ plan.children.keys()))
        return "", f"has lost or been given a part: {odd}"
    return _first_below(children, expected_children, hooks)


def _first_below(
    children: Mapping[str, Any], plans: Mapping[str, _Plan], hooks: tuple[str, ...]
) -> tuple[str, str] | None:
    for name, child in children.items():
        if (found := _difference(child, plans[name], hooks)) is not None:
            return f"{name}.{found[0]}".rstrip("."), found[1]
    return None


def _difference_in_lora(
    module: Any, plan: _Plan, hooks: tuple[str, ...]
) -> tuple[str, str] | None:
    """The same of PEFT's layer over a linear one, as :mod:`abacist.policy.products` reads it."""
    if what := _changed(module, _LORA, hooks):
        return "", what
    for name, part in module._modules.items():
        if name == "base_layer":
            found = _difference(part, plan, hooks)
        elif type(part) not in (nn.ModuleDict, nn.ParameterDict):
            found = "", f"is {type(part).__name__}, which LoRA does not have there"
        elif (what := _changed(part, _ANY, hooks)) is not None:
            found = "", what
        else:
            found = None
            for adapter, inner in part._modules.items():
                known = _WITHIN_LORA.get(type(inner))
                if known is None:
                    what = f"is {type(inner).__name__}, which plain LoRA does not have there"
                elif (what := _changed(inner, known, hooks)) is None and name == "lora_A":
                    what = None if inner.bias is None else "has been given a bias"
                elif what is None and name == "lora_B" and inner.bias is not None:
                    what = None if module.lora_bias.get(adapter) else "has been given a bias"
                if what is not None:
                    found = adapter, what
                    break
        if found is not None:
            return f"{name}.{found[0]}".rstrip("."), found[1]
    return None


def _changed(module: nn.Module, plan: _Plan, hooks: tuple[str, ...]) -> str | None:
    """What has been done to ``module`` itself, as a verb and its object; not to those below it."""
    own = module.__dict__
    for name in hooks:
        if own[name] and not all(map(_is_harmless, own[name].values())):
            what = "forward" if "forward" in name else "backward"
            return f"has a {what} hook, which might change what it computes"
    if "forward" in own and not _is_expected_forward(module):
        return "has had its forward replaced"
    if not plan.methods.isdisjoint(own):
        return f"has had its {min(plan.methods & own.keys())} replaced"
    for name, value in plan.settings.items():
        if own.get(name) != value:
            return f"has {name} {own.get(name)!r}, where its config makes it {value!r}"
    weights = own["_parameters"]
    if (
        plan.weights is not None
        and (weights or plan.weights)
        and (has := _weights(module)) != plan.weights
    ):
        return f"has lost or been given a parameter: {', '.join(sorted(has ^ plan.weights))}"
    if _BACKWARD_HOOKS[0] in hooks:
        for name, weight in weights.items():
            if weight is not None and weight.requires_grad and _is_hooked(weight):
                return f"has a hook on the gradient of its {name}"
    return None


def _weights(module: nn.Module) -> frozenset[str]:
    return frozenset(name for name, weight in module._parameters.items() if weight is not None)


def _is_hooked(weight: Any) -> bool:
    return bool(weight._backward_hooks or weight._post_accumulate_grad_hooks)


def _is_harmless(hook: Any) -> bool:
    return (getattr(hook, "__module__", ""), getattr(hook, "__name__", "")) in _HARMLESS_HOOKS


def _is_ours(forward: Any) -> bool:
    function = getattr(forward, "__func__", None)
    return str(getattr(function, "__module__", "")).startswith(_OWN_FORWARDS)


def _is_expected_forward(module: Any) -> bool:
    """Whether the ``forward`` on this instance is ours, or a library's around the class's own.

    TRL adds its fused head to the whole model's and accelerate mixed precision. Placing a model
    puts one of accelerate's around every module, which does nothing where the module's weights and
    its input are at home already.
    """
    forward = vars(module)["forward"]
    if _is_ours(forward):
        return forward.__self__ is module
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


# --- Classes and functions, which anybody may have replaced as well ---


def _modules_at_import() -> Iterator[tuple[type, tuple[Any, Any]]]:
    kinds = {
        *(nn.Linear, nn.Embedding, nn.ModuleList, nn.ModuleDict, nn.Identity, nn.Dropout, nn.SiLU),
        *(SiLUActivation, LoraLinear, LoraModel, PeftModel, PeftModelForCausalLM),
    }
    for family in FAMILIES:
        kinds |= {
            value
            for value in vars(sys.modules[family.__module__]).values()
            if isinstance(value, type) and issubclass(value, nn.Module)
        }
    for kind in kinds:
        yield kind, (kind.__call__, getattr(kind, "forward", None))


def _functions_at_import() -> Iterator[tuple[Any, str, Any]]:
    for family in FAMILIES:
        home = sys.modules[family.__module__]
        for name, value in vars(home).items():
            if isinstance(value, types.FunctionType):
                yield home, name, value
    functional = torch.nn.functional
    for name in ("linear", "silu", "embedding", "scaled_dot_product_attention"):
        yield functional, name, getattr(functional, name)


_KINDS = dict(_modules_at_import())
_FUNCTIONS = list(_functions_at_import())


def _changed_code(base: Any, kinds: set[type]) -> str | None:
    """Which class or function that ``base`` computes with is not its library's own."""
    for kind in kinds | {LoraLinear}:
        now: tuple[Any, Any] = (kind.__call__, getattr(kind, "forward", None))
        if now != _KINDS.get(kind, now) or any(map(_is_foreign, now)):
            return f"{kind.__name__} has had its forward replaced"
    for home, name, function in _FUNCTIONS:
        if home.__name__ in (type(base).__module__, "torch.nn.functional") and (
            getattr(home, name, None) is not function or _is_foreign(function)
        ):
            return f"{home.__name__}.{name} has been replaced"
    return None


def _is_foreign(function: Any) -> bool:
    """Whether ``function``, or its outermost decorator, is written outside of the libraries."""
    code = getattr(function, "__code__", None)  # what is compiled has none
    return code is not None and not code.co_filename.startswith(_PACKAGES)
