"""Refuses a model that the memory of this machine cannot hold, before it is loaded.

The system would end the process in the middle of it, without a word. What is compared is the least
that the run needs: the weights, and in training of all weights their gradients and the optimizer's
state. What a step needs beside that is measured later (``gradient_checkpointing``,
``--dry_run``). Several processes on a machine hold a copy each.
"""

from __future__ import annotations

import math
from pathlib import Path

import torch
from safetensors import SafetensorError

from abacist.errors import ModelError
from abacist.learning import processes
from abacist.learning.config import Config
from abacist.learning.dryrun import memory
from abacist.learning.dryrun.memory import gib
from abacist.policy.choices import choose_device
from abacist.policy.loading import class_of, dtype_of
from abacist.policy.quantization import Quantization
from abacist.policy.source import Source, find, stored_tensors

_SMALLER = (
    "Close other programs, or take a smaller model, such as the recipe qwen2.5-0.5b (0.5 billion "
    "weights) or smollm2-135m."
)


def refuse_too_large(config: Config) -> None:
    """Raise ModelError where the model of ``config`` cannot fit into a CPU's memory.

    On a GPU, where an allocation that fails is an error with its own message, nothing is asked.
    """
    model, training = config.model, config.training
    trust = training.trust_remote_code
    found = find(model.model_name_or_path, revision=model.model_revision, trust_remote_code=trust)
    device, _ = choose_device(config.device)
    if found.is_adapter or device.type != "cpu":
        return
    if (held := model.quantization) is not None:
        _refuse_too_large_quantized(config, held.on(device), found, device)
        return
    count = _weights_in(found.folder)
    trains_all = not model.use_peft
    kind = class_of(found, trust)
    number, _ = dtype_of(found, kind, model.dtype, device, trains_all_weights=trains_all)
    needed, there = count * number.itemsize, _available_bytes(device)
    if trains_all:
        weights = torch.empty(count, dtype=number, device="meta")
        needed += needed + memory.optimizer_bytes(training.optim, [weights])
    if needed <= there:
        return
    name = str(number).removeprefix("torch.")
    what = f"its {count / 1e9:.2g} billion weights take {gib(count * number.itemsize)} in {name}"
    if trains_all:
        what += f", with gradients and the optimizer's state {gib(needed)}"
    raise ModelError(
        f"'{model.model_name_or_path}' does not fit: {what}, and {gib(there)} of memory are "
        f"available{_to_whom()}.",
        _what_fits(count, number, there, trains_all),
    )


def _refuse_too_large_quantized(
    config: Config, held: Quantization, found: Source, device: torch.device
) -> None:
    # Only beside 8 bits of ours may the other weights stay in bfloat16 and be widened.
    kind = class_of(found, config.training.trust_remote_code) if held.is_ours else None
    number, _ = dtype_of(found, kind, config.model.dtype, device, trains_all_weights=False)
    quantized = _weights_in(found.folder, only_quantized=True)
    rest = _weights_in(found.folder) - quantized
    needed = quantized * held.bytes_per_weight + rest * number.itemsize
    there = _available_bytes(device)
    if needed > there:
        raise ModelError(
            f"'{found.name}' does not fit: its linear layers in {held} and the rest in "
            f"{str(number).removeprefix('torch.')} take {gib(needed)}, and {gib(there)} of memory "
            f"are available{_to_whom()}.",
            _SMALLER,
        )


def _available_bytes(device: torch.device) -> int:
    """For each process, asked before any of them loads: the least share on any machine."""
    share = memory.available_bytes(device) // processes.on_this_machine()
    return min(processes.gathered([share]))


def _to_whom() -> str:
    count = processes.on_this_machine()
    return f" to each of {count} processes" if count > 1 else ""


def _what_fits(count: int, number: torch.dtype, there: int, trains_all: bool) -> str:
    """The flag with the least consequences that makes it fit."""
    if trains_all and count * number.itemsize <= there:
        return f"--use_peft trains an adapter: {gib(count * number.itemsize)} and little more."
    if number.itemsize > 2 and 2 * count <= there:
        flags = "--use_peft --dtype bfloat16" if trains_all else "--dtype bfloat16"
        return f"{flags} holds them in {gib(2 * count)}."
    return _SMALLER


def _weights_in(folder: Path, *, only_quantized: bool = False) -> int:
    """How many numbers the weight files hold; their headers alone are read.

    ``only_quantized``: those of linear layers within the decoder, which are held in few bits.
    """
    try:
        return sum(
            math.prod(shape)
            for name, _, shape in stored_tensors(folder)
            if not only_quantized or (len(shape) == 2 and ".layers." in name)
        )
    except (SafetensorError, OSError):
        return 0  # loading says what is wrong with it
