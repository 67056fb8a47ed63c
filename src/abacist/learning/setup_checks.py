"""Errors of TRL, transformers, PEFT and torch while a run is assembled, with the flag named.

Each of these libraries checks its part of a configuration when it uses it. Their errors become
ours, with their own words. :func:`try_out` brings forward what they would only find at the first
step. Used around the assembly of a run and nowhere in the training loop.
"""

from __future__ import annotations

import inspect
import os
import re
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from textwrap import shorten
from typing import Any

import torch
import transformers
from accelerate import DistributedType
from torch.utils.checkpoint import checkpoint

from abacist.errors import AbacistError, UsageError
from abacist.learning import fastpath
from abacist.learning.arguments import GRPOConfig, ModelConfig, ScriptArguments
from abacist.learning.config import Config
from abacist.learning.heldout import SELECTION_METRICS
from abacist.learning.limits import named
from abacist.policy.families import FastPart

_NAMES = {one.name for kind in (GRPOConfig, ModelConfig, ScriptArguments) for one in fields(kind)}
_OURS = Path(__file__).parents[1]
_LONGEST_MESSAGE_CHARS = 400
_OTHER_NAMES = {"target_modules": "lora_target_modules", "dropout": "lora_dropout"}
LORA = ("lora_target_modules", "lora_r", "lora_alpha", "lora_dropout", "use_dora", "use_rslora")
OPTIMIZER = ("optim", "optim_args", "optim_target_modules")
SCHEDULE = ("lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps")
SAMPLING = ("generation_kwargs", "cache_implementation")


@contextmanager
def setting_up(config: Config, *about: str) -> Iterator[None]:
    """Raises UsageError for what another library raises inside; the flags it names are named.

    ``about`` are the settings that this part of the work is about, for a message that names
    none. Errors of ours, of the system (a full disk, no memory), and faults in our own code
    pass through.
    """
    try:
        yield
    except (AbacistError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        text = " ".join(str(error).split()) or type(error).__name__
        is_of_the_system = isinstance(error, OSError) and error.errno is not None
        if is_of_the_system or "can't allocate" in text or _is_ours(error):
            raise
        flags = (
            _flags_in(text, config) or _flags_with_a_value_in(text, config)
            or _flags_set(about, config)
        )  # fmt: skip
        what = " and ".join(flags) or "one of the settings"
        raise UsageError(
            f"{what} cannot be used: {shorten(text, _LONGEST_MESSAGE_CHARS, placeholder=' …')}",
            "abacist train --help_all says what each setting takes.",
        ) from error


def try_out(trainer: Any, config: Config) -> None:
    """Have made, once, what TRL would make when its training begins. Nothing of it is kept.

    Raises UsageError for an optimizer, a schedule or a way of sampling that cannot be had, and for
    a metric that is never measured.
    """
    training = config.training
    if trainer.optimizer is None and not _hooks_itself_in(str(training.optim)):
        try:
            with setting_up(config, *OPTIMIZER):
                trainer.create_optimizer()
            with setting_up(config, *SCHEDULE):
                steps = max(1, int(training.max_steps))
                trainer.create_scheduler(num_training_steps=steps, optimizer=trainer.optimizer)
        finally:
            trainer.optimizer = trainer.lr_scheduler = None
            trainer._created_lr_scheduler = False
    generation = getattr(trainer, "generation_config", None)  # vLLM has its own
    if generation is not None:
        with setting_up(config, *SAMPLING):
            generation.validate()
        known = vars(transformers.GenerationConfig())
        _refuse_unknown_keys(config, "generation_kwargs", training.generation_kwargs, known)
    if training.use_liger_kernel and not transformers.utils.is_liger_kernel_available():
        raise UsageError(
            f"{_as_set('use_liger_kernel', config)} cannot be used: liger-kernel is not installed",
            "Install it, or leave this out.",
        )
    checkpointing = [*inspect.signature(checkpoint).parameters, "every_n_layers", "offload"]
    kwargs = training.gradient_checkpointing_kwargs
    _refuse_unknown_keys(config, "gradient_checkpointing_kwargs", kwargs, checkpointing)
    metric = training.metric_for_best_model
    measured = [f"eval_{name}" for name in SELECTION_METRICS]
    if metric is not None and f"eval_{metric.removeprefix('eval_')}" not in measured:
        raise UsageError(
            f"--metric_for_best_model {metric} is not measured here",
            f"What --eval_steps measures: {', '.join(SELECTION_METRICS)}.",
        )


def refuse_shards(trainer: Any, num_measured: int) -> None:
    """Raises UsageError where held-out problems would be put to a model that lies in shards, and
    where accelerate was told to shard and does not: on CPUs it replicates, without a word."""
    is_asked = os.environ.get("ACCELERATE_USE_FSDP", "").lower() == "true"
    if is_asked and trainer.accelerator.distributed_type != DistributedType.FSDP:
        raise UsageError(
            "FSDP was asked for, and accelerate shards on accelerators only",
            "On CPUs: --accelerate_config multi_cpu, a whole model in each process.",
        )
    plugin = getattr(trainer.accelerator.state, "deepspeed_plugin", None)
    is_sharded = trainer.is_fsdp_enabled or (plugin is not None and plugin.zero_stage == 3)
    is_gathered = trainer.whole is not None and (
        fastpath.unsupported_reason(trainer, FastPart.DECODING) is None
    )
    if is_sharded and num_measured and not is_gathered:
        kind = "FSDP" if trainer.is_fsdp_enabled else "ZeRO-3"
        raise UsageError(
            f"{kind} shards the weights over the processes, and Abacist cannot measure it",
            "Train without: --num_heldout_problems 0 --eval_strategy no. Then measure what was "
            "trained: abacist eval RUN.",
        )


def _refuse_unknown_keys(config: Config, name: str, given: Any, known: Collection[str]) -> None:
    unknown = sorted(set(given or {}) - set(known))
    if unknown:
        raise UsageError(
            f"{_as_set(name, config)}: unknown argument {', '.join(unknown)}",
            f"Known arguments: {', '.join(sorted(one for one in known if one[0] != '_'))}.",
        )


def refuse_unmatched_targets(model: Any, targets: list[str]) -> None:
    """Raises UsageError for a name in --lora_target_modules that no module has.

    PEFT adapts what it finds and says nothing of a name that is misspelt beside a right one.
    """
    modules = [name for name, _ in model.named_modules()]
    linear = (torch.nn.Linear, torch.nn.Embedding)
    ends = sorted(
        {
            name.split(".")[-2] if name.endswith("base_layer") else name.split(".")[-1]
            for name, module in model.named_modules()
            if isinstance(module, linear) and "lora_" not in name
        }
    )
    for target in targets:
        if target != "all-linear" and not any(
            f".{name}".endswith(f".{target}") for name in modules
        ):
            raise UsageError(
                f"--lora_target_modules {target}: the model has no such module",
                f"There are: {', '.join(ends)}; all-linear takes every linear layer.",
            )


def _hooks_itself_in(optimizer: str) -> bool:
    """Whether making an optimizer changes the model, so that it must be made once only."""
    return "layerwise" in optimizer or "lomo" in optimizer


def _is_ours(error: Exception) -> bool:
    """Whether it was raised by our own code, and so is a bug and nothing a person can mend."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return trace is not None and Path(trace.tb_frame.f_code.co_filename).is_relative_to(_OURS)


def _flags_in(text: str, config: Config) -> list[str]:
    """The settings that a message names, at most three, those that were set first."""
    words = [_OTHER_NAMES.get(word, word) for word in re.findall(r"[a-z][a-z0-9_]+", text)]
    # A word such as "seed" or "beta" stands for a setting only where it was set.
    found = [
        word
        for word in dict.fromkeys(words)
        if word in _NAMES and ("_" in word or word in config.settings)
    ]
    is_set = [word for word in found if word in config.settings]
    return [_as_set(word, config) for word in (is_set or found)[:3]]


def _flags_set(names: Sequence[str], config: Config) -> list[str]:
    """Those of ``names`` that a person has set; a recipe's own where nobody has set any."""
    is_set = [name for name in names if name in config.settings]
    by_hand = [name for name in is_set if config.sources.get(name)]
    return [_as_set(name, config) for name in by_hand or is_set]


def _flags_with_a_value_in(text: str, config: Config) -> list[str]:
    """The settings set by hand to a word that a message quotes."""
    words = set(re.findall(r"['\"`]([\w.-]+)['\"`]", text.lower()))
    return [
        _as_set(name, config)
        for name, value in config.settings.items()
        if isinstance(value, str) and value.lower() in words and config.sources.get(name)
    ]


def _as_set(name: str, config: Config) -> str:
    flag, value = named(name, config.sources), config.settings.get(name)
    if value is None or value is True:
        return flag
    return f"{flag} {' '.join(map(str, value)) if isinstance(value, list) else value}"
