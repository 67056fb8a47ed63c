"""A trainer that goes on exactly where it was: sound checkpoints, exact resume, clean stops.

``trl.GRPOTrainer`` resumes exactly only at some steps of the first epoch. This class adds what
is missing and changes nothing else: the sampler's place, completions still to be used, sums since
the last log, the reference model and all random states come out of a checkpoint as they went in
(``learning.resume.exactstate``), and a stop in the middle of a step takes back what was begun.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from accelerate.logging import get_logger
from transformers import TrainerCallback, TrainerState
from trl.trainer.utils import RepeatSampler

from abacist.errors import AbacistError, RunError
from abacist.learning.resume import checkpoints, exactstate
from abacist.learning.resume.soundtrainer import REFERENCE_NAME, SoundTrainer
from abacist.learning.resume.stopping import StopNow, StopRequests
from abacist.learning.sampling import EpochSampler
from abacist.learning.tracking import first_line

logger = get_logger(__name__)


class ExactTrainer(SoundTrainer):
    """``SoundTrainer`` whose resumed runs are the same run.

    ``stops``, if set, may end :meth:`train` by :class:`StopNow` after the state has been saved.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.stops: StopRequests | None = None
        self.say: Callable[[str], None] = _warn
        self._resumed: exactstate.State | None = None
        self._came_from: Path | None = None
        self._scheduled_steps = 0
        self.add_callback(_Moments(self))

    def train(
        self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any
    ) -> Any:
        """As TRL's. ``True`` resumes from the newest sound checkpoint of ``output_dir``.

        Raises RunError if there is none, or if the one that was named is not sound.
        """
        run = Path(str(self.args.output_dir))
        with self.accelerator.main_process_first():
            if self.accelerator.is_main_process:
                checkpoints.clear_leftovers(run)
            path = checkpoints.choose(run, resume_from_checkpoint, self.say)
        self._resumed, self._came_from = None, path
        self._moment = self._saved_step = None
        eval_on_start = self.args.eval_on_start
        if path is not None:
            self._resumed = exactstate.load_state(path / self._state_name)
            if self._goes_on_in_place:
                self._saved_step = checkpoints.step_of(path)
            # The run has been evaluated at its start already, unless it is still there.
            self.args.eval_on_start = eval_on_start and checkpoints.step_of(path) == 0
        try:
            with contextlib.ExitStack() as held:
                if self._resumed is not None:
                    held.enter_context(exactstate.joined_trackers(self._resumed))
                if self.stops:
                    held.enter_context(self.stops.deferred())
                return super().train(str(path) if path else None, *args, **kwargs)
        except StopNow as stop:
            self._save_stopped(stop)
            raise
        except Exception as error:
            if path is None or self._moment is not None or isinstance(error, AbacistError):
                raise
            raise RunError(
                f"{path} cannot be loaded: {first_line(error)}",
                "Resume with the model, the adapter's shape and the optimizer of the run; what is "
                "no tensor in a file is never run.",
            ) from error
        finally:
            self.args.eval_on_start = eval_on_start

    def _get_train_sampler(self, dataset: Any = None) -> Any:
        # TRL's order of problems, epoch after epoch, from a sampler that can start in any epoch.
        sampler = super()._get_train_sampler(dataset)
        if type(sampler) is RepeatSampler:
            sampler = EpochSampler(
                sampler.data_source,
                mini_repeat_count=sampler.mini_repeat_count,
                batch_size=sampler.batch_size,
                repeat_count=sampler.repeat_count,
                shuffle=sampler.shuffle,
                seed=sampler.seed,
            )
        self.sampler = sampler if hasattr(sampler, "load_state_dict") else None
        return sampler

    def begin(self) -> None:
        """The trainer is complete and no step has been made by this process."""
        run = Path(self._get_output_dir(None))
        if self._resumed is None:
            self.began = time.time()
            self.epoch_ended = False
            self._moment = exactstate.capture(self)
            if self.keeps_checkpoints:
                self._save_checkpoint(self.model, None)
        else:
            exactstate.restore(self, self._resumed)
            step = self.state.global_step
            if self.args.should_save and self._goes_on_in_place:
                exactstate.cut_after(run, step, self._resumed["kept_bytes"])
                for path in checkpoints.supersede_after(run, step):
                    self.say(f"a later {path.name} is kept aside as {path}")
            self.say(f"resuming from {self._came_from}: step {step} of {self.state.max_steps}")
            self._end_epoch_that_was_left()
            self._resumed = self._moment = exactstate.capture(self)
        if self.stops:
            self.stops.start_of_training()

    @property
    def _goes_on_in_place(self) -> bool:
        """Whether the checkpoint is of ``output_dir``: another run's records are not cut."""
        run = Path(str(self.args.output_dir)).resolve()
        return self._came_from is not None and self._came_from.resolve().parent == run

    def _end_epoch_that_was_left(self) -> None:
        # The checkpoint of an epoch's last step is written before the epoch is over.
        state = self.state
        is_last_step = not exactstate.is_mid_epoch(state) or state.global_step >= state.max_steps
        if state.global_step and is_last_step and not self.epoch_ended:
            self.control = self.callback_handler.on_epoch_end(self.args, state, self.control)
            self._maybe_log_save_evaluate(
                self._tr_loss,
                self.last_grad_norm,
                self.model,
                None,
                state.epoch,
                None,
                self.began,
                learning_rate=self.last_learning_rate,
            )

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        # transformers trains a step more when a finished run is resumed inside an epoch.
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
            return
        super()._run_epoch(*args, **kwargs)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        # Ours are read weights-only, stand where the epoch was left, and are per process. Before
        # the first step they stand already, and an evaluation at the start may have used them.
        if self._resumed is None:
            super()._load_rng_state(checkpoint)
        elif self.state.global_step:
            exactstate.set_random_state(self._resumed["random"])

    def _init_training_state(self, *args: Any, **kwargs: Any) -> Any:
        position = super()._init_training_state(*args, **kwargs)
        if self._resumed is not None and self.state.best_global_step:
            # By step, not by a path that a moved run no longer has.
            run = Path(self._get_output_dir(None))
            best = run / f"checkpoint-{self.state.best_global_step}"
            self.state.best_model_checkpoint = str(best) if best.is_dir() else None
        return position

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        reference = Path(resume_from_checkpoint) / REFERENCE_NAME
        if self.args.sync_ref_model and reference.exists():
            weights = safetensors.torch.load_file(reference)
            named = dict(self.accelerator.unwrap_model(self.ref_model).named_parameters())
            with torch.no_grad():
                for name, weight in weights.items():
                    named[name].copy_(weight)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        # The optimizer's state holds its learning rate, so another one in the arguments would be
        # passed over without a word.
        super()._load_optimizer_and_scheduler(checkpoint)
        if self._resumed is None:
            return
        self._place_in_schedule(Path(str(checkpoint)))
        if not self._resumed["peak_learning_rate"]:
            return
        factor = float(self.args.learning_rate) / self._resumed["peak_learning_rate"]
        if factor != 1.0:
            for group in self.optimizer.param_groups:
                group["lr"] *= factor
                group["initial_lr"] *= factor
            for rates in (self.lr_scheduler.base_lrs, self.lr_scheduler._last_lr):
                rates[:] = [rate * factor for rate in rates]
            self.say(f"the learning rate is {factor:g} times that of the checkpoint from here on")

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        # How many steps a schedule was made for is kept nowhere in it.
        self._scheduled_steps = num_training_steps
        return super().create_scheduler(num_training_steps, optimizer)

    def _place_in_schedule(self, checkpoint: Path) -> None:
        """Give the next step the rate of a schedule that is longer now than at the checkpoint."""
        steps_then = TrainerState.load_from_json(str(checkpoint / "trainer_state.json")).max_steps
        shapes = getattr(self.lr_scheduler, "lr_lambdas", None)
        if steps_then == self._scheduled_steps or shapes is None:
            return
        # The optimizer's state holds what the schedule of then said of this step: 0 at its end.
        at = self.lr_scheduler.last_epoch
        bases = self.lr_scheduler.base_lrs
        rates = [base * shape(at) for base, shape in zip(bases, shapes, strict=True)]
        for group, rate in zip(self.optimizer.param_groups, rates, strict=True):
            group["lr"] = rate
        self.lr_scheduler._last_lr = rates

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        # Neither weights nor files change in here but rollouts, which a repeated step rewrites.
        with self.stops.at_once() if self.stops else contextlib.nullcontext():
            loss: torch.Tensor = super().training_step(*args, **kwargs)
            return loss

    def _maybe_log_save_evaluate(
        self, tr_loss: Any, grad_norm: Any, *args: Any, **kwargs: Any
    ) -> None:
        is_tensor = isinstance(grad_norm, torch.Tensor)
        self.last_grad_norm = grad_norm.item() if is_tensor else grad_norm
        self.last_learning_rate = kwargs.get("learning_rate")
        super()._maybe_log_save_evaluate(tr_loss, grad_norm, *args, **kwargs)
        self._moment = exactstate.capture(self)
        if self.stops and self.state.global_step < self.state.max_steps:
            self.stops.check()

    def _finalize_training(self, trial: Any, num_train_samples: int, start_time: float) -> Any:
        # Steps are counted from the beginning of the run, and so must be its seconds.
        return super()._finalize_training(trial, num_train_samples, self.began)

    def _save_stopped(self, stop: StopNow) -> None:
        """Save the state after the last whole step, taking back what was begun since."""
        stop.step, stop.max_steps = self.state.global_step, self.state.max_steps
        if self._moment is None or not self.keeps_checkpoints:
            return
        run = Path(self._get_output_dir(None))
        if self._saved_step != stop.step:
            exactstate.restore(self, self._moment)
            self.optimizer.zero_grad()
            self._save_checkpoint(self.model, None)
        stop.checkpoint = run / f"checkpoint-{stop.step}"


def _warn(text: str) -> None:
    logger.warning("Abacist: %s.", text)


class _Moments(TrainerCallback):
    """Tells an :class:`ExactTrainer` where transformers' loop is."""

    def __init__(self, trainer: ExactTrainer) -> None:
        self.trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer.begin()

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer.epoch_ended = False

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer.epoch_ended = True
