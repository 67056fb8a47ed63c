"""Times a few real steps, and measures the memory they take.

The trainer is the run's own; what it learns here is thrown away with it. The first cycle warms
up (caches, the optimizer's state, compiled kernels) and is not counted if there is a second one.
A *cycle* is as many optimizer steps as share one generation; one, unless TRL's
``steps_per_generation`` or ``num_iterations`` say otherwise.
"""

from __future__ import annotations

import ctypes
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

MOST_CYCLES = 4
ENOUGH_SECONDS = 6.0  # of counted cycles
LONG_SECONDS = 60.0  # a first cycle that took so long is the only one

_PROC = Path("/proc/self")


@dataclass(frozen=True)
class Burst:
    """What the counted steps took, a mean over them.

    The two peaks say by how much memory grew above what was held before the first step, each in its
    phase; None where the machine does not tell.
    """

    steps: int
    is_warm: bool
    rollout_seconds: float
    training_seconds: float
    rollout_tokens_per_second: float
    training_tokens_per_second: float
    rollout_growth_bytes: int | None
    training_growth_bytes: int | None

    @property
    def step_seconds(self) -> float:
        """Seconds of one optimizer step, its share of a rollout included."""
        return self.rollout_seconds + self.training_seconds

    @property
    def growth_bytes(self) -> int | None:
        """The larger of the two peaks."""
        return _largest(self.rollout_growth_bytes, self.training_growth_bytes)


def run_burst(trainer: Any, progress: Callable[[int, int], None]) -> Burst:
    """Train for a few steps and time them. ``progress`` hears (cycles done, cycles at most).

    Raises whatever training raises, running out of memory included.
    """
    args = trainer.args
    rounds = args.steps_per_generation * args.num_iterations
    cycle = max(1, -(-rounds // args.gradient_accumulation_steps))
    watch = _Stopwatch(cycle, PeakMeter(trainer.model.device), progress)
    generate = trainer._generate

    def timed(prompts: list[Any]) -> Any:
        watch.begin_rollout()
        generated = generate(prompts)
        watch.end_rollout(sum(len(ids) for ids in generated[1]))
        return generated

    trainer._generate = timed
    args.max_steps = MOST_CYCLES * cycle
    trainer.add_callback(watch)
    progress(0, MOST_CYCLES)
    try:
        trainer.train()
    finally:
        del trainer._generate
        trainer.remove_callback(watch)
        trainer.model.zero_grad(set_to_none=True)
    return watch.result()


@dataclass
class _Cycle:
    rollout_seconds: float = 0.0
    all_seconds: float = 0.0
    tokens: int = 0
    steps: int = 0


@dataclass
class _Stopwatch(TrainerCallback):
    """Times cycles, a rollout within them, and stops the training when enough is known."""

    cycle: int
    meter: PeakMeter
    progress: Callable[[int, int], None]
    cycles: list[_Cycle] = field(default_factory=list)
    rollout_growth: int | None = None
    training_growth: int | None = None
    _began: float = 0.0
    _rollout_began: float = 0.0

    def begin_rollout(self) -> None:
        self._rollout_began = self.meter.now()
        self.meter.reset()

    def end_rollout(self, tokens: int) -> None:
        current = self.cycles[-1]
        current.rollout_seconds += self.meter.now() - self._rollout_began
        current.tokens += tokens
        self.rollout_growth = _largest(self.rollout_growth, self.meter.growth())
        self.meter.reset()

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step % self.cycle == 0:
            self.cycles.append(_Cycle())
        self._began = self.meter.now()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        current = self.cycles[-1]
        current.all_seconds += self.meter.now() - self._began
        current.steps += 1
        self.training_growth = _largest(self.training_growth, self.meter.growth())
        if current.steps < self.cycle:
            return
        first, *counted = self.cycles
        enough = sum(one.all_seconds for one in counted) >= ENOUGH_SECONDS
        done = enough or first.all_seconds >= LONG_SECONDS
        self.progress(MOST_CYCLES if done else len(self.cycles), MOST_CYCLES)
        control.should_training_stop = control.should_training_stop or done

    def result(self) -> Burst:
        whole = [one for one in self.cycles if one.steps == self.cycle]
        counted = whole[1:] or whole
        steps = sum(one.steps for one in counted)
        rollout = sum(one.rollout_seconds for one in counted)
        training = sum(one.all_seconds for one in counted) - rollout
        tokens = sum(one.tokens for one in counted)
        return Burst(
            steps=steps,
            is_warm=len(whole) > 1,
            rollout_seconds=rollout / steps,
            training_seconds=training / steps,
            rollout_tokens_per_second=tokens / rollout if rollout else 0.0,
            training_tokens_per_second=tokens / training if training else 0.0,
            rollout_growth_bytes=self.rollout_growth,
            training_growth_bytes=self.training_growth,
        )


class PeakMeter:
    """The highest memory since :meth:`reset`, above what was held when the meter was made.

    Exact for the tensors on a CUDA device. On a CPU it is the resident memory of the process, by
    the kernel's own high-water mark (Linux); anywhere else it is not known.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._on_cuda = device.type == "cuda"
        self._has_marks = device.type == "cpu" and (_PROC / "clear_refs").exists()
        self.reset()
        self._held = self._peak()

    def now(self) -> float:
        """A clock that has waited for the device."""
        if self._on_cuda:
            torch.cuda.synchronize(self._device)
        return time.perf_counter()

    def reset(self) -> None:
        """Begin anew from what is held now."""
        if self._on_cuda:
            torch.cuda.reset_peak_memory_stats(self._device)
        elif self._has_marks:
            # glibc keeps freed memory, in which growth would hide.
            if hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
                libc.malloc_trim(0)
            try:
                (_PROC / "clear_refs").write_text("5", encoding="utf-8")
            except OSError:  # a container may forbid it
                self._has_marks = False

    def growth(self) -> int | None:
        """Bytes above what was held at first; None where that is not known."""
        peak = self._peak()
        return None if peak is None or self._held is None else max(0, peak - self._held)

    def _peak(self) -> int | None:
        if self._on_cuda:
            return int(torch.cuda.max_memory_allocated(self._device))
        if not self._has_marks:
            return None
        status = (_PROC / "status").read_text(encoding="utf-8")
        return int(status.split("VmHWM:")[1].split()[0]) * 1024


def _largest(known: int | None, found: int | None) -> int | None:
    return found if known is None else known if found is None else max(known, found)
