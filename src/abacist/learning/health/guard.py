"""Watches a training: reports faults while it runs, refuses a step whose gradient is not finite.

One NaN gradient turns every weight it touches into NaN, and transformers then logs an invented,
finite loss. So :class:`Guard` checks the gradient between backward pass and optimizer step. If it
is not finite, the gradients are dropped before the optimizer sees them, and weights and optimizer
stay as they were. All other faults are found in the log, by the rules of ``learning.health.rules``,
and reported once.

The cost of a step: two norms over what is trained, and some sums over numbers already logged.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import KW_ONLY, dataclass
from typing import Any

import torch
from torch.distributed.tensor import DTensor
from transformers import Trainer, TrainerCallback

from abacist.errors import ModelError, TrainingError
from abacist.learning import processes
from abacist.learning.config import Config
from abacist.learning.health.history import Facts
from abacist.learning.health.rules import Diagnosis, Watch
from abacist.learning.tracking import Watcher
from abacist.policy import quantization

MOST_REFUSED_IN_A_ROW = 10
NOT_FINITE = "not finite"


@dataclass(eq=False)
class Guard(TrainerCallback):
    """Watches over a training.

    A fault that ends the run is raised by :meth:`check` after ``trainer.train()`` has returned, so
    that the state before it is saved like any other.

    Args:
        facts: what is settled before the first step.
        watcher: who is told of each fault, once.
        nan_policy: ``stop`` ends the run at the first refused step, ``skip`` goes on without it
            until :data:`MOST_REFUSED_IN_A_ROW` of them follow each other.
        max_silent_steps: ends a run after so many steps in a row in which no group carried a
            signal; 0 never does.
    """

    facts: Facts
    watcher: Watcher
    _: KW_ONLY
    nan_policy: str = "stop"
    max_silent_steps: int = 0

    def __post_init__(self) -> None:
        self.watch = Watch(self.facts)
        self.fault: TrainingError | None = None
        self._refused = 0  # since the last log
        self._refused_in_a_row = 0

    @classmethod
    def of(cls, config: Config, model: Any, watcher: Watcher) -> Guard:
        """The guard that a configuration asks for."""
        parameters = sum(weight.numel() for weight in model.parameters())
        settings = vars(config.training) | vars(config.model)
        return cls(
            Facts.of(settings, parameters, processes.count()),
            watcher,
            nan_policy=config.script.nan_policy,
            max_silent_steps=config.script.max_silent_steps,
        )

    def attach(self, trainer: Trainer) -> None:
        """Become the first callback, so that every other one gets the corrected log."""
        trainer.callback_handler.callbacks.insert(0, self)

    def check(self) -> None:
        """Raise the :class:`TrainingError` that ended the training, if one did."""
        if self.fault is not None:
            raise self.fault

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        # A resumed run is judged as a whole; what was said before the stop is not said again.
        for row in state.log_history:
            self.watch.see(row)

    def on_pre_optimizer_step(
        self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any
    ) -> None:
        if args.fp16:  # its gradient scaler refuses such steps itself, as a matter of course
            return
        trained = [weight for weight in model.parameters() if weight.grad is not None]
        if _is_finite_in_all([weight.grad for weight in trained]):
            self._refused_in_a_row = 0
            return
        step = state.global_step + 1
        where = _first_broken(model, of_gradient=True)
        for weight in trained:
            weight.grad = None  # so that no optimizer has anything to do
        self._refused += 1
        self._refused_in_a_row += 1
        found = f"At step {step} the gradient is not a finite number (first in {where})"
        if self.nan_policy == "skip" and self._refused_in_a_row <= MOST_REFUSED_IN_A_ROW:
            self.watcher.note(f"{found}: the step was refused, the weights are as they were.")
            return
        also = (
            f", for the {self._refused_in_a_row}th time in a row"
            if self._refused_in_a_row > 1
            else ""
        )
        self.fault = TrainingError(
            f"{found}{also}. The step was refused: the weights are as they were before it, and "
            f"are saved as checkpoint-{step}.",
            "Lower --learning_rate, take bfloat16 or float32 in place of float16, look for a "
            "reward of extreme size; or go on without such steps: --nan_policy skip.",
        )

    def on_optimizer_step(
        self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any
    ) -> None:
        # The gradient was finite and the weights are not: only the step's own size can do that.
        trained = [weight for weight in model.parameters() if weight.requires_grad]
        if self.fault is None and not _is_finite_in_all(trained):
            raise TrainingError(
                f"Step {state.global_step + 1} made the weights overflow "
                f"({_first_broken(model, of_gradient=False)}). They are not saved: the newest "
                "checkpoint holds the last good ones.",
                "Lower --learning_rate.",
            )

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._refused:  # whatever logging_steps is: a run that stops before would lose the count
            control.should_log = True
        if self.fault is not None:
            control.should_save = control.should_training_stop = control.should_log = True

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if not logs:
            return
        was_reported = self._refused > 0
        if self._refused and "loss" in logs:
            # transformers filled the gap with an average; what was not measured is not a number.
            mended = {"loss": float("nan"), "refused_steps": self._refused}
            for record in (logs, *state.log_history[-1:]):
                record.update(mended)
            self._refused = 0
        for diagnosis in self.watch.see({**logs, "step": state.global_step}):
            if not (was_reported and diagnosis.name == NOT_FINITE):
                self.watcher.warning(told(diagnosis))
        without = self.watch.zero_advantage_steps
        hopeless = 0 < self.max_silent_steps <= without and not self.watch.history.is_solved()
        if hopeless and self.fault is None and state.global_step < state.max_steps:
            control.should_training_stop = control.should_save = True
            self.fault = TrainingError(
                f"In the last {without} steps no group had replies of different rewards that "
                f"count, so nothing could be learned; stopped at step {state.global_step}.",
                "See what is paid and for what (`abacist show RUN`, `abacist doctor RUN`): easier "
                "or harder problems, --num_shots, a longer --max_completion_length. "
                "--max_silent_steps 0 goes on regardless.",
            )


def told(diagnosis: Diagnosis) -> str:
    """A diagnosis as the lines that a person reads while the run goes on."""
    return f"warning at step {diagnosis.first_step}: {diagnosis}"


def refuse_broken_weights(model: Any, name: str) -> None:
    """Raises ModelError if any weight is NaN or infinite, as in a copy that was damaged."""
    if not all_finite([*model.parameters(), *quantization.scales(model)]):
        where = _first_broken(model, of_gradient=False)
        raise ModelError(
            f"The weights of '{name}' hold numbers that are not finite (first in {where}).",
            "The copy is damaged or was trained into NaN: fetch it again, or take an earlier one.",
        )


def all_finite(tensors: Iterable[torch.Tensor]) -> bool:
    """Whether every number in every tensor is finite; one pass, and one answer from the device.

    Of a tensor in shards that is the shard of this process.
    """
    here = [one.detach() for one in tensors]
    # Of the norms of shards, PyTorch takes the largest, and a NaN may not be it.
    here = [one.to_local() if isinstance(one, DTensor) else one for one in here]
    floating = [one for one in here if one.numel() and one.is_floating_point()]
    if not floating:
        return True
    # The largest magnitude, unlike a sum of squares, cannot overflow by itself.
    norms = torch._foreach_norm(floating, float("inf"))
    device = norms[0].device
    return bool(torch.stack([norm.float().to(device) for norm in norms]).isfinite().all())


def _is_finite_in_all(tensors: list[Any]) -> bool:
    """As :func:`all_finite`; of tensors in shards, for all processes together."""
    is_finite = all_finite(tensors)
    if any(isinstance(one, DTensor) for one in tensors):
        return not any(processes.agreed(not is_finite))
    return is_finite


def _first_broken(model: Any, *, of_gradient: bool) -> str:
    for name, weight in model.named_parameters():
        tensor = weight.grad if of_gradient else weight
        scales = [] if of_gradient else quantization.scales_of(weight)
        if tensor is not None and not all_finite([tensor, *scales]):
            return str(name)
    return "the shard of another process"
