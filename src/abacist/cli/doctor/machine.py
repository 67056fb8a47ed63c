"""What ``abacist doctor`` looks at on a machine, one check a function.

A check never raises: whatever goes wrong inside one is what it reports. Three outcomes: *ok*,
*note* (worth knowing, nothing to do), *mend* (the built-in training would fail or mislead).
"""

from __future__ import annotations

import importlib.util
import netrc
import os
import platform
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import StrEnum
from importlib import metadata
from pathlib import Path

from abacist.cli.console import without_secrets
from abacist.errors import AbacistError, first_line

GIB = 2**30
MEMORY_WANTED_BYTES = 2 * GIB  # what a first run may take at its peak
DISK_WANTED_BYTES = GIB // 2
HUB_TIMEOUT_SECONDS = 5.0


class State(StrEnum):
    """How a check ended."""

    OK = "ok"
    NOTE = "note"
    MEND = "mend"


@dataclass(frozen=True, slots=True)
class Finding:
    """One line of the doctor's report; ``remedy`` says how to mend it or what it is good for."""

    name: str
    state: State
    found: str
    remedy: str = ""


def examine(*, online: bool = False) -> Iterator[Finding]:
    """Every finding, as soon as it is known. The Hub is only called when ``online``."""
    checks: list[tuple[str, Callable[[], Iterator[Finding]]]] = [
        ("python", _python),
        ("packages", _packages),
        ("choices", _choices),
        ("kernels", _kernels),
        ("memory", _memory),
        ("disk", _disk),
        ("Hugging Face", _hub_token),
        ("W&B", _wandb),
        ("built-in model", _built_in),
    ]
    if online:
        checks.insert(6, ("Hub", _hub_reachable))
    for name, check in checks:
        try:
            yield from check()
        except AbacistError as error:
            yield Finding(name, State.MEND, error.message, error.hint)
        except Exception as error:
            reason = f"{type(error).__name__}: {without_secrets(first_line(error))}"
            yield Finding(name, State.MEND, reason, _REINSTALL)


_REINSTALL = "Reinstall Abacist in its own environment: make install"


def _python() -> Iterator[Finding]:
    found = f"{platform.python_version()} ({sys.executable}), {platform.platform(terse=True)}"
    yield Finding("python", State.OK, found)  # an older one could not have come this far


def _packages() -> Iterator[Finding]:
    """The installed versions against the ranges that Abacist's own metadata declares."""
    from packaging.requirements import Requirement

    try:
        declared = [Requirement(line) for line in metadata.requires("abacist") or []]
    except metadata.PackageNotFoundError:
        how = "Run `pip install -e .` in the source tree to have the ranges checked."
        yield Finding("packages", State.NOTE, "Abacist runs from source, not installed", how)
        return
    fitting, absent = [], {}
    for requirement in declared:
        marker = requirement.marker
        extra = str(marker or "").partition("extra ==")[2].strip(" \"'")  # "" if it is of none
        if extra == "dev" or (not extra and marker and not marker.evaluate()):
            continue
        try:
            version = metadata.version(requirement.name)
        except metadata.PackageNotFoundError:
            version = None
        wanted = f"{requirement.name}{requirement.specifier}"
        if version is not None and requirement.specifier.contains(version, prereleases=True):
            fitting.append(f"{requirement.name} {version}")
        elif version is not None:
            found = f"{requirement.name} {version} is outside the supported {wanted}"
            state = State.NOTE if extra else State.MEND
            yield Finding("packages", state, found, f"pip install '{wanted}'")
        elif not extra:
            found = f"{requirement.name} is not installed"
            yield Finding("packages", State.MEND, found, f"pip install '{wanted}'")
        else:
            absent[extra] = requirement.name
    if absent:
        found = f"optional, and not installed: {', '.join(absent.values())}"
        how = f"To add them: pip install 'abacist[{','.join(absent)}]'"
        yield Finding("packages", State.NOTE, found, how)
    yield Finding("packages", State.OK, ", ".join(fitting))


def _choices() -> Iterator[Finding]:
    from abacist.policy.choices import choose_attention, choose_device, choose_dtype
    from abacist.policy.decoding import graphs
    from abacist.policy.scoring.attention_backend import QWEN_1_5B_HEADS, choose_backend

    device, device_choice = choose_device("auto")
    dtype, dtype_choice = choose_dtype("auto", device, trains_all_weights=False)
    attention, attention_choice = choose_attention("auto", device, dtype)
    scoring = choose_backend(attention, device, dtype, QWEN_1_5B_HEADS)
    for choice in (device_choice, dtype_choice, attention_choice, scoring.choice):
        yield Finding(choice.what, State.OK, f"{choice.value}: {choice.why}")
    if device.type == "cuda":
        import torch

        free, total = torch.cuda.mem_get_info(device)
        found = f"{free / GIB:.1f} GiB free of {total / GIB:.1f} GiB"
        yield Finding("GPU memory", State.OK, found)
        yield Finding("decoding", State.OK, f"our engine, {graphs.description(device)}")


def _kernels() -> Iterator[Finding]:
    from abacist.policy.kernels import build

    if (why := build.unsupported_reason()) is not None:
        cost = "Without kernels of ours a CPU computes the same on PyTorch alone, slower."
        yield Finding("kernels", State.NOTE, f"none: {why}", cost)
    else:
        yield Finding("kernels", State.OK, f"for the CPU, compiled by {build.description()}")


def _memory() -> Iterator[Finding]:
    import torch

    from abacist.learning.dryrun.memory import available_bytes, total_bytes

    cpu = torch.device("cpu")
    available, total = available_bytes(cpu), total_bytes(cpu)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    found = f"{available / GIB:.1f} GiB free of {total / GIB:.1f} GiB, {cores} CPU cores"
    if available < MEMORY_WANTED_BYTES:
        how = f"A first run may take {MEMORY_WANTED_BYTES // GIB} GiB: end other programs."
        yield Finding("memory", State.MEND, found, how)
    else:
        yield Finding("memory", State.OK, found)


def _disk() -> Iterator[Finding]:
    here = Path.cwd()
    free = shutil.disk_usage(here).free
    found = f"{free / GIB:.1f} GiB free in {here}"
    if not os.access(here, os.W_OK):
        how = "Go to a directory of your own, or train with --output_dir."
        yield Finding("disk", State.MEND, f"{here} cannot be written to", how)
    elif free < DISK_WANTED_BYTES:
        yield Finding("disk", State.MEND, found, "Free some space, or train with --output_dir.")
    else:
        yield Finding("disk", State.OK, found)


def _hub_token() -> Iterator[Finding]:
    from huggingface_hub import constants, get_token

    has_token = get_token() is not None
    found = "a token is set" if has_token else "no token"
    if constants.HF_HUB_OFFLINE:
        found += "; offline mode (HF_HUB_OFFLINE): only what is cached can be loaded"
    how = "" if has_token else "Only gated models (Llama) need one: hf auth login"
    yield Finding("Hugging Face", State.OK if has_token else State.NOTE, found, how)


def _hub_reachable() -> Iterator[Finding]:
    from huggingface_hub import constants, get_session

    try:
        get_session().head(constants.ENDPOINT, timeout=HUB_TIMEOUT_SECONDS)
    except Exception as error:  # any of several libraries' errors, and all mean the same
        reason = f"cannot be reached: {without_secrets(first_line(error))}"
        how = "Check network and proxy. The built-in model and local folders need no Hub."
        yield Finding("Hub", State.MEND, f"{constants.ENDPOINT} {reason}", how)
    else:
        yield Finding("Hub", State.OK, f"{constants.ENDPOINT} answers")


def _wandb() -> Iterator[Finding]:
    """Read from where wandb keeps its key; importing it would start it."""
    if importlib.util.find_spec("wandb") is None:
        return  # said with the packages
    mode = os.environ.get("WANDB_MODE", "online")
    if mode != "online":
        yield Finding("W&B", State.OK, f"mode {mode} (WANDB_MODE), no login needed")
    elif os.environ.get("WANDB_API_KEY") or _netrc_has("api.wandb.ai"):
        yield Finding("W&B", State.OK, "logged in")
    else:
        how = "Only --report_to wandb needs it: wandb login, or WANDB_MODE=offline"
        yield Finding("W&B", State.NOTE, "not logged in", how)


def _netrc_has(host: str) -> bool:
    path = Path(os.environ.get("NETRC") or Path.home() / ".netrc")
    try:
        return host in netrc.netrc(path).hosts
    except (OSError, netrc.NetrcParseError, UnicodeDecodeError):
        return False


def _built_in() -> Iterator[Finding]:
    """Load the built-in model and have it answer a generated problem."""
    from abacist.policy.loading import load_policy
    from abacist.policy.source import BUILT_IN
    from abacist.proof.ask import Prompting, ask
    from abacist.task.wordproblems import generate
    from abacist.view.plaintext import cut_middle, visible

    (problem,) = generate(1, seed=0, split="heldout")
    (rollout,) = ask(load_policy(BUILT_IN), str(problem["question"]), Prompting.of(BUILT_IN))
    text = cut_middle(" ".join(visible(rollout.completion).split()), 60)
    if rollout.completion_tokens and text:
        yield Finding("built-in model", State.OK, f"answers a problem with: {text}")
    else:
        yield Finding("built-in model", State.MEND, "loads, but wrote nothing", _REINSTALL)
