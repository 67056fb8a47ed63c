"""Load the policy: a model, its chat, and the choices made for it.

:func:`load_policy` loads everything that can be named as a model: the built-in ``tiny``, a Hub id,
a folder, or a PEFT adapter, whose base is found by the name that the adapter recorded.
"""

from __future__ import annotations

import contextlib
import inspect
import logging
import os
import sys
import warnings
from dataclasses import dataclass, fields
from pathlib import Path
from textwrap import shorten
from typing import Any

import huggingface_hub
import torch
import transformers
from peft import (
    LoraConfig,
    PeftConfig,
    PeftModel,
    PeftType,
    get_peft_model,
    get_peft_model_state_dict,
)
from safetensors import SafetensorError, safe_open
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedModel,
)

from abacist.errors import ModelError
from abacist.policy import families, mxint8, quantization
from abacist.policy.chat import Chat
from abacist.policy.choices import Choice, choose_attention, choose_device, choose_dtype
from abacist.policy.kernels import build
from abacist.policy.quantization import Quantization, hold_as_loaded
from abacist.policy.source import (
    BUILT_IN,
    Source,
    find,
    is_built_in,
    read_json,
    stored_tensors,
)


@dataclass
class Policy:
    """A model ready to generate, and to be trained if it was loaded as trainable."""

    model: PreTrainedModel | PeftModel
    chat: Chat
    choices: list[Choice]
    name: str
    base_name: str
    folder: Path
    """Where the model, or the adapter, was loaded from."""

    @property
    def device(self) -> torch.device:
        return self.model.device

    @property
    def context_tokens(self) -> int:
        """The longest prompt plus completion that the model supports; ``sys.maxsize`` for any."""
        config = self.model.config.get_text_config()
        # BLOOM and Mamba name none, MPT calls it so, XLNet's is -1.
        named = ("max_position_embeddings", "max_seq_len")
        found = [int(getattr(config, name, None) or 0) for name in named]
        positions = next((count for count in found if count > 0), sys.maxsize)
        if isinstance(self.model, PeftModel) and self.model.active_peft_config.is_prompt_learning:
            positions -= int(self.model.active_peft_config.num_virtual_tokens or 0)
        return positions

    @property
    def arithmetic(self) -> str:
        """What replies are computed in now, in words: dtype, device, attention, products."""
        is_ours = families.unsupported_reason(self.model, families.FastPart.DECODING) is None
        chosen = next((one.value for one in self.choices if one.what == "attention"), "")
        attention = "our engine's" if is_ours else chosen
        dtype = str(self.model.dtype).removeprefix("torch.")
        products = torch.get_float32_matmul_precision()
        rounded = "" if products == "highest" else f", float32_matmul_precision {products}"
        return f"{dtype} on {self.device}, {attention} attention{rounded}"


def load_chat(model: str, *, trust_remote_code: bool = False) -> Chat:
    """The chat of ``model`` alone, as :func:`load_policy` settles it, without loading any weights.

    Raises :class:`ModelError` as that does.
    """
    found = find(model, trust_remote_code=trust_remote_code)
    base = _base_of(found, trust_remote_code) if found.is_adapter else found
    if (base.folder / "generation_config.json").is_file():
        generation = GenerationConfig.from_pretrained(base.folder, local_files_only=True)
    else:  # as transformers does when it loads the weights
        config = AutoConfig.from_pretrained(
            base.folder, local_files_only=True, trust_remote_code=trust_remote_code
        )
        generation = GenerationConfig.from_model_config(config)
    tokenizer = _load_tokenizer(found if found.has_tokenizer else base, trust_remote_code)
    return Chat.guard(tokenizer, generation_config=generation)


# PEFT, of what an adapter on a quantised base records of it.
_OF_OUR_RECORD = rf"Unexpected keyword arguments \['{quantization.RECORD}'\]"


def quiet_libraries() -> None:
    """Silence the warnings and loading bars of transformers. Errors and download bars stay."""
    # About renamed attributes that PEFT and TRL still use, which users cannot change.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"transformers\.")
    warnings.filterwarnings("ignore", message=_OF_OUR_RECORD)
    # Of every 8-bit layer, and of kernels that it would fetch from the Hub.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    huggingface_hub.utils.enable_progress_bars()  # turned off too by the line above


def default_lora(*, r: int = 16, alpha: int = 32, dropout: float = 0.0) -> LoraConfig:
    """LoRA on every linear layer except the head, by default without dropout."""
    return LoraConfig(
        r=r,
        lora_alpha=alpha,
        lora_dropout=dropout,
        target_modules="all-linear",
        task_type="CAUSAL_LM",
    )


def load_policy(
    model: str,
    *,
    dtype: str = "auto",
    device: str = "auto",
    attn_implementation: str = "auto",
    quantization: Quantization | None = None,
    dequantized: bool = False,
    lora: LoraConfig | None = None,
    trainable: bool = False,
    trust_remote_code: bool = False,
    revision: str | None = None,
    seed: int = 0,
) -> Policy:
    """Load ``model`` and settle its chat.

    ``lora`` wraps a base model in a new adapter, initialised from ``seed`` alone and always
    trainable. ``trainable`` without ``lora`` trains the whole model or, if ``model`` is an adapter,
    that adapter.

    ``quantization`` holds the base in few bits; an adapter that learned on such a base gets it
    again by itself. ``dequantized`` rounds the base in the same way and holds it in ``dtype``, so
    that an adapter can be merged into it.

    Raises :class:`ModelError` if there is no such model, if it cannot be reached or loaded, or if a
    requested choice is not available on this machine.
    """
    found = find(model, revision=revision, trust_remote_code=trust_remote_code)
    base = _base_of(found, trust_remote_code) if found.is_adapter else found
    if found.is_adapter and lora is not None:
        raise ModelError(
            f"'{model}' is already an adapter, and a second one cannot be added.",
            "Leave out the LoRA settings to train it further, or merge it first.",
        )
    where, device_choice = choose_device(device)
    held = _quantization_of(found, quantization, where)
    full = trainable and lora is None and not found.is_adapter
    kind = class_of(base, trust_remote_code)
    if held is not None and full:
        raise ModelError(
            f"The weights of '{model}' cannot be trained in {held}.", "Train an adapter on them."
        )
    # Our kernels do not widen what bitsandbytes holds.
    by_bitsandbytes = held is not None and not held.is_ours
    widened = None if by_bitsandbytes else kind
    number, dtype_choice = dtype_of(base, widened, dtype, where, trains_all_weights=full)
    attention, attention_choice = choose_attention(attn_implementation, where, number, kind)

    options: dict[str, Any] = {"dtype": number, "attn_implementation": attention}
    if held is not None and by_bitsandbytes:
        options |= {"quantization_config": held.config(number), "device_map": {"": where}}
    if held is not None and held.is_ours:
        # As it is stored: rounded to another dtype before, it would be another base.
        options["dtype"] = "auto"
    network: Any = _load_network(base, trust_remote_code=trust_remote_code, **options)
    hold_as_loaded(network)
    why_held = "asked for" if quantization is not None else "the adapter learned on it so"
    if held is not None and held.is_ours:
        if dequantized or where.type != "cpu" or build.library() is None:
            mxint8.round_weights(network, number)
            why_held += f"; rounded so, but held in {str(number).removeprefix('torch.')}"
        else:
            mxint8.hold_in_blocks(network, number)
    elif held is not None and dequantized:
        network = network.dequantize(dtype=number)
    chat = Chat.guard(
        _load_tokenizer(found if found.has_tokenizer else base, trust_remote_code),
        generation_config=network.generation_config,
    )
    # Still on the CPU, so that a seed gives the same adapter on every machine.
    if found.is_adapter:
        network = _load_adapter(network, found, base, trainable, held)
    elif lora is not None:
        lora.revision = revision
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            network = get_peft_model(network, _PortableLora.of(lora, base.portable_name, held))
    if isinstance(network, PeftModel) or base.name != BUILT_IN:
        # Model cards show this name, and TRL loads a reference model by it (full fine-tuning with
        # beta > 0). The built-in keeps its folder, because its name is not on the Hub.
        is_ours = base.name == BUILT_IN
        network.config._name_or_path = BUILT_IN if is_ours else base.portable_name
    try:
        if not by_bitsandbytes:  # else it was loaded there
            network = network.to(where)
    except torch.OutOfMemoryError as error:
        raise ModelError(
            f"'{model}' in {dtype_choice.value} does not fit into the memory of {where}.",
            "Use a smaller model, --dtype bfloat16, or --device cpu.",
        ) from error
    chat.apply_to(network)
    trains = trainable or lora is not None
    network.train(trains)
    if not trains:
        network.requires_grad_(False)
    if dtype == "auto" and where.type == "cpu" and number == torch.bfloat16:
        why = families.not_widened_reason(network, trains=trains)
        if why is not None:  # only a loaded model shows all that a fast part may not support
            network.float()
            dtype_choice = Choice("dtype", "float32", f"exact on a CPU; held so because {why}")
    elif dtype == "bfloat16" and where.type == "cpu":
        dtype_choice = _explained_bfloat16(network, base, trains)
    choices = [device_choice, dtype_choice, attention_choice]
    if held is not None:
        choices.append(Choice("base", str(held), why_held))
    choices.append(_trained_part(network, trains))
    return Policy(network, chat, choices, model, base.name, found.folder)


def _explained_bfloat16(network: Any, base: Source, trains: bool) -> Choice:
    """What bfloat16 means on a CPU, where it was asked for."""
    rounded = _rounded_by_bfloat16(base.folder)
    lost = f"{len(rounded)} of its tensors, stored in more bits, are rounded" if rounded else ""
    why = families.not_widened_reason(network, trains=trains)
    how = f"computed in bfloat16, because {why}" if why else "our kernels compute in float32"
    return Choice("dtype", "bfloat16", "; ".join(filter(None, ("asked for", how, lost))))


_MORE_BITS = ("F64", "F32", "F16")


def _rounded_by_bfloat16(folder: Path) -> list[str]:
    """The tensors of the model in ``folder`` that are stored in more bits than bfloat16 has."""
    found = []
    with contextlib.suppress(SafetensorError, OSError):  # loading says what is wrong with a file
        for name, dtype, _ in stored_tensors(folder):
            # Frequencies of the rotary embedding, which old checkpoints hold, are no weights.
            if dtype in _MORE_BITS and not name.endswith("inv_freq"):
                found.append(name)
    return found


def dtype_of(
    base: Source, kind: type | None, asked: str, device: torch.device, *, trains_all_weights: bool
) -> tuple[torch.dtype, Choice]:
    """The dtype to load the weights of ``base`` in; ``kind`` is its class, see :func:`class_of`."""
    widened = families.may_be_widened(kind) and not _rounded_by_bfloat16(base.folder)
    return choose_dtype(asked, device, trains_all_weights=trains_all_weights, widened=widened)


class _PortableLora(LoraConfig):
    """LoRA that refers to its base by folder in memory, and by its portable name once saved.

    PEFT looks up the base whenever an adapter is saved: on the Hub, over the network, if it is a
    name; immediately, if it is a folder. The saved file must still have a name that others can use.
    """

    portable_name: str  # not a dataclass field, so that it is not saved itself
    quantization: Quantization | None

    @classmethod
    def of(
        cls, lora: LoraConfig, portable_name: str, quantization: Quantization | None
    ) -> _PortableLora:
        given = {field.name: getattr(lora, field.name) for field in fields(lora) if field.init}
        config = cls(**given)
        config.base_model_name_or_path = None  # PEFT fills in the folder the base came from
        config.portable_name, config.quantization = portable_name, quantization
        return config

    def to_dict(self) -> dict[str, Any]:
        saved = {**super().to_dict(), "base_model_name_or_path": self.portable_name}
        if self.quantization is not None:
            saved[quantization.RECORD] = self.quantization.record()
        # PEFT writes sets in hash order, which changes between runs. Equal adapters, equal files.
        return {k: sorted(v) if isinstance(v, set) else v for k, v in saved.items()}


def _quantization_of(
    found: Source, asked: Quantization | None, device: torch.device
) -> Quantization | None:
    """How the base is to be held; None: as its files have it.

    Raises ModelError if that needs bitsandbytes, which is not there.
    """
    held = None if asked is None else asked.on(device)
    if held is None and found.is_adapter:
        held = quantization.recorded(read_json(found.folder / "adapter_config.json"))
    if held is not None:
        name = f"Loading '{found.name}'" if asked else f"The adapter '{found.name}'"
        quantization.refuse_missing(held, name)
    return held


def _base_of(adapter: Source, trust_remote_code: bool) -> Source:
    config = read_json(adapter.folder / "adapter_config.json")
    name = config.get("base_model_name_or_path")
    if not name or not isinstance(name, str):
        raise ModelError(
            f"The adapter '{adapter.name}' does not say which model it belongs to.",
            f"Set base_model_name_or_path in {adapter.folder / 'adapter_config.json'}.",
        )
    if is_built_in(name):
        name = BUILT_IN
    revision = config.get("revision")
    try:
        base = find(
            name,
            revision=revision if isinstance(revision, str) else None,
            trust_remote_code=trust_remote_code,
        )
    except ModelError as error:
        raise ModelError(
            f"The adapter '{adapter.name}' needs its base model '{name}'. {error.message}",
            error.hint,
        ) from error
    if base.is_adapter:
        raise ModelError(
            f"The adapter '{adapter.name}' is based on another adapter, '{name}'.",
            "Merge that one into its base first.",
        )
    return base


def class_of(source: Source, trust_remote_code: bool) -> type | None:
    """The model's class, if it is one of transformers' own; else None."""
    try:
        config = AutoConfig.from_pretrained(
            source.folder, local_files_only=True, trust_remote_code=trust_remote_code
        )
    except Exception:  # loading will report what is wrong with it
        return None
    found = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    return found if isinstance(found, type) else None


def _load_network(source: Source, **options: Any) -> Any:
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            str(source.folder),
            use_safetensors=True,
            local_files_only=True,
            output_loading_info=True,
            **options,
        )
    except Exception as error:
        raise _unloadable(source, error) from error
    network, report = loaded
    if missing := sorted(report["missing_keys"]):
        raise ModelError(
            f"{source} lacks {len(missing)} of its weights (such as {missing[0]}), which "
            "would be left random.",
            "Fetch it again; weights and config.json do not belong together.",
        )
    return network


def _load_tokenizer(source: Source, trust_remote_code: bool) -> Any:
    if not source.has_tokenizer:
        raise ModelError(
            f"'{source.name}' has no tokenizer: no tokenizer.json in {source.folder}.",
            "Copy the tokenizer files of the model it was made from into that folder.",
        )
    try:
        return AutoTokenizer.from_pretrained(
            source.folder, local_files_only=True, trust_remote_code=trust_remote_code
        )
    except Exception as error:
        raise _unloadable(source, error) from error


def _load_adapter(
    network: PreTrainedModel,
    adapter: Source,
    base: Source,
    trainable: bool,
    held: Quantization | None,
) -> PeftModel:
    try:
        config = PeftConfig.from_pretrained(str(adapter.folder))
        _refuse_lost_prefix(config, adapter)
        if type(config) is LoraConfig:  # not AdaLoRA's, which is derived from it
            config = _PortableLora.of(config, base.portable_name, held)
            config.base_model_name_or_path = str(base.folder)
        config.inference_mode = not trainable
        wrapped = PeftModel.from_pretrained(
            network, adapter.folder, config=config, is_trainable=trainable
        )
        with safe_open(adapter.folder / "adapter_model.safetensors", "pt") as stored:
            missing = sorted(get_peft_model_state_dict(wrapped).keys() - set(stored.keys()))
    except ModelError:
        raise
    except Exception as error:
        raise _unloadable(adapter, error) from error
    if missing:
        raise ModelError(
            f"The adapter '{adapter.name}' lacks {len(missing)} of its weights, such as "
            f"{missing[0]}.",
            "The copy is damaged, or the adapter belongs to another base model.",
        )
    return wrapped


def prefix_is_lost(config: PeftConfig) -> bool:
    """Whether what such an adapter learned has no effect on transformers' ``generate``.

    PEFT 0.21 gives a learned prefix to the model as ``past_key_values``. From transformers 5.24 on
    ``generate`` has its own, empty cache beside it, as ``cache``, and the model takes that one.
    """
    known = inspect.signature(transformers.GenerationMixin.prepare_inputs_for_generation).parameters
    kinds = (PeftType.PREFIX_TUNING, PeftType.CARTRIDGE)
    return config.peft_type in kinds and "past_key_values" not in known


def _refuse_lost_prefix(config: PeftConfig, adapter: Source) -> None:
    if prefix_is_lost(config):
        raise ModelError(
            f"The adapter '{adapter.name}' is a learned prefix, which transformers "
            f"{transformers.__version__} passes over when it generates: PEFT hands it over by a "
            "name that is no longer read.",
            "Install 'transformers<5.24' to use it.",
        )


def _unloadable(source: Source, error: Exception) -> ModelError:
    """The error for a folder with the right files that cannot be loaded."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    reason = shorten(" ".join(lines[:2]), 250, placeholder=" …").rstrip(".")
    hint = "It must be a causal language model in the Hugging Face layout."
    if isinstance(error, SafetensorError):
        reason, hint = f"its weights are damaged ({reason})", "Fetch the model again."
    elif "size mismatch" in str(error) or "ignore_mismatched_sizes" in str(error):
        reason = "its weights have other shapes than its config, or its base model, requires"
        hint = "Check that they belong together."
    elif "attention" in str(error) and "attn_implementation" in str(error):
        reason = "it does not support the attention that was asked for"
        hint = "Use --attn_implementation auto (or eager, which every model supports)."
    elif "trust_remote_code" in str(error):
        reason = "it needs code of its own to be loaded"
        hint = "Read that code, then allow it with --trust_remote_code."
    elif "does not recognize this architecture" in str(error):
        reason = "this version of transformers does not know its architecture"
        hint = "Update transformers, or choose another model."
    elif "Unrecognized configuration class" in str(error):
        reason = "it is not a causal language model"
    elif isinstance(error, ImportError):
        hint = "Install what is missing, or choose another model."
    return ModelError(f"{source} cannot be loaded: {reason}.", hint)


def _trained_part(network: torch.nn.Module, trains: bool) -> Choice:
    total = quantization.num_weights(network.parameters()) - mxint8.num_exponents(network)
    if not trains:
        return Choice("weights", f"{total:,}", "none of them trained")
    moving = sum(weight.numel() for weight in network.parameters() if weight.requires_grad)
    part = "adapter" if moving < total else "full fine-tuning"
    return Choice("weights", f"{total:,}", f"{moving:,} of them trained ({part})")
