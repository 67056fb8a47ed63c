"""The processes of one training, as ``accelerate launch`` or torchrun start them.

Every process runs the same program on its own share of the replies. Rank 0 is the main one: it
alone writes the run directory, speaks to a person, and calls the rewards of an evaluation. What
else differs between processes stands here, and everything is a plain call in one process.

Whether the others are still there is watched in ``learning.peers``.
"""

from __future__ import annotations

import os
import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from accelerate import PartialState

from abacist.errors import UsageError
from abacist.policy.decoding import generation
from abacist.policy.decoding.generation import Completion

T = TypeVar("T")


def count() -> int:
    """How many processes train together."""
    return dist.get_world_size() if _have_met() else 1


def rank() -> int:
    """The number of this process among them."""
    return dist.get_rank() if _have_met() else int(os.environ.get("RANK", "0"))


def is_main() -> bool:
    """Whether this process writes and speaks for all."""
    return rank() == 0


def _have_met() -> bool:
    return dist.is_available() and dist.is_initialized()


def on_this_machine() -> int:
    """How many of them a launcher has started on this machine, as far as it says so."""
    return max(1, int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


def refuse_missing_cards() -> None:
    """Raise UsageError where a launcher started more processes on this machine than it has GPUs."""
    started, local = on_this_machine(), int(os.environ.get("LOCAL_RANK", "0"))
    cards = torch.cuda.device_count()
    if 0 < cards < max(started, local + 1):
        raise UsageError(
            f"{max(started, local + 1)} processes were started on a machine with {cards} "
            f"GPU{'s' * (cards != 1)}",
            f"Start at most {cards}: --num_processes {cards}.",
        )


def command_to_resume(run: Path) -> str:
    """The command that goes on with ``run`` in as many processes."""
    command = f"abacist train --resume {shlex.quote(str(run))}"
    if count() == 1:
        return command
    launched = os.environ.get("ABACIST_LAUNCH_FLAGS")  # set by `abacist train --accelerate_config`
    return f"{command} {launched or f'# by your launcher, on {count()} processes'}"


def from_main(make: Callable[[], T]) -> T:
    """What ``make`` returns in the main process, which alone calls it; it must be picklable."""
    if count() == 1:
        return make()
    held: list[Any] = [make() if is_main() else None]
    dist.broadcast_object_list(held, src=0)
    found: T = held[0]
    return found


def gathered(items: Sequence[T]) -> list[T]:
    """The items of every process, in the order of their ranks; in every process."""
    if count() == 1:
        return list(items)
    held: list[Any] = [None] * count()
    dist.all_gather_object(held, list(items))
    return [item for part in held for item in part]


def agreed(*numbers: int) -> tuple[int, ...]:
    """The largest of each number over all processes."""
    if count() == 1:
        return numbers
    together = torch.tensor(numbers, device=PartialState().device)
    dist.all_reduce(together, dist.ReduceOp.MAX)
    return tuple(together.tolist())


@contextmanager
def loading_in_all() -> Iterator[None]:
    """Every process reads the weights, also where FSDP's profile leaves that to the first one.

    Before they are sharded they are compared, measured and saved.
    """
    name = "FSDP_CPU_RAM_EFFICIENT_LOADING"
    asked = os.environ.get(name)
    try:
        if asked is not None:
            os.environ[name] = "false"
        yield
    finally:
        if asked is not None:
            os.environ[name] = asked


def wait_for_all() -> None:
    """Go on when every process is here."""
    if count() > 1:
        PartialState().wait_for_everyone()


def own_rows(accelerator: Any, count: int) -> slice:
    """Where this process's ``count`` rows stand in those gathered from all, as many from each."""
    first = accelerator.process_index * count
    return slice(first, first + count)


def part_of(items: Sequence[T]) -> Sequence[T]:
    """Those that :func:`generate` leaves to this process, where no prompt is given twice."""
    return items[rank() :: count()]


def generate(policy: Any, prompts: Sequence[Any], **how: Any) -> list[list[Completion]]:
    """``policy.decoding.generation.generate``, each process writing a share of the completions.

    Every process gets all of them, in the order of ``prompts``, and they are those of one process:
    a completion depends on its prompt, the seed and the number of the sample. A prompt that is
    given twice stays in one process, which counts the second time as one process would.
    """
    if count() == 1:
        return generation.generate(policy, prompts, **how)
    firsts: dict[str, int] = {}
    owners = [firsts.setdefault(repr(prompt), at) % count() for at, prompt in enumerate(prompts)]
    mine = [at for at, owner in enumerate(owners) if owner == rank()]
    written = generation.generate(policy, [prompts[at] for at in mine], **how) if mine else []
    whole = dict(gathered(list(zip(mine, written, strict=True))))
    return [whole[at] for at in range(len(prompts))]


def refuse_differing(made_of: Mapping[str, Mapping[str, Any]]) -> None:
    """Raise UsageError, in every process, where they were not given the same.

    ``made_of`` names parts, such as settings, and of each what it holds, as JSON.
    """
    first, *others = gathered([made_of])
    for number, other in enumerate(others, start=1):
        for part, content in first.items():
            for name in sorted(content.keys() | other[part].keys()):
                ours, theirs = content.get(name), other[part].get(name)
                if ours != theirs:
                    raise UsageError(
                        f"rank {number} and rank 0 have different {part}: {name} is "
                        f"{_shown(theirs)} on rank {number} and {_shown(ours)} on rank 0",
                        "Start every process with the same command, on the same files and with "
                        "the same packages.",
                    )


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
