"""What libraries refuse while a run is assembled, as errors that name the flag.

TRL, transformers, PEFT and torch check much of a configuration, each when it comes to it. Here
their objections become ours, with their own words; :func:`try_out` brings forward what they would
only find at the first step. Used around the assembly of a run and nowhere in the training loop.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from textwrap import shorten
from typing import Any

import torch

import abacist
from abacist.errors import AbacistError, UsageError
from abacist.learning.arguments import GRPOConfig, ModelConfig, ScriptArguments
from abacist.learning.config import Config
from abacist.learning.limits import named

_NAMES = {one.name for kind in (GRPOConfig, ModelConfig, ScriptArguments) for one in fields(kind)}
_OURS = Path(str(abacist.__file__)).parent
_LONGEST_MESSAGE_CHARS = 400
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
        flags = _flags_in(text, config) or _flags_set(about, config)
        what = " and ".join(flags) or "one of the settings"
        raise UsageError(
            f"{what} cannot be used: {shorten(text, _LONGEST_MESSAGE_CHARS, placeholder=' …')}",
            "abacist train --help_all says what each setting takes.",
        ) from error


def try_out(trainer: Any, config: Config) -> None:
    """Have made, once, what TRL would make when its training begins. Nothing of it is kept.

    Raises UsageError for an optimizer, a schedule or a way of sampling that cannot be had.
    """
    if trainer.optimizer is None and not _hooks_itself_in(str(config.training.optim)):
        try:
            with setting_up(config, *OPTIMIZER):
                trainer.create_optimizer()
            with setting_up(config, *SCHEDULE):
                steps = max(1, int(config.training.max_steps))
                trainer.create_scheduler(num_training_steps=steps, optimizer=trainer.optimizer)
        finally:
            trainer.optimizer = trainer.lr_scheduler = None
            trainer._created_lr_scheduler = False
    with setting_up(config, *SAMPLING):
        generation = getattr(trainer, "generation_config", None)  # vLLM has its own
        if generation is not None:
            generation.validate()


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
    """The settings that a message names, those that were set first."""
    words = dict.fromkeys(re.findall(r"[a-z][a-z0-9_]+", text))
    known = [word for word in words if word in _NAMES and "_" in word]
    known += [word for word in words if word in _NAMES and word in config.settings]
    return _flags_set([one for one in dict.fromkeys(known) if one in config.settings] or known,
                      config, also_unset=True)[:3]  # fmt: skip


def _flags_set(
    names: tuple[str, ...] | list[str], config: Config, *, also_unset: bool = False
) -> list[str]:
    settings: Mapping[str, Any] = config.settings
    return [
        f"{named(name, config.sources)} {settings[name]}" if name in settings else f"--{name}"
        for name in names
        if also_unset or name in settings
    ]
