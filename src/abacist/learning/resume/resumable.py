"""A trainer whose checkpoints are whole, and whose resumed runs are the same run.

**Whole files.** transformers and TRL still decide what a checkpoint holds; here they are given a
hidden folder to write it to (``learning.resume.checkpoints``). What a GRPO loop needs beside that
is added (``learning.resume.training_state``), and the folder becomes ``checkpoint-N`` once all of
it is on disk.

**Exact resume.** ``trl.GRPOTrainer`` resumes exactly only at some steps of the first epoch. This
class adds what is missing and changes nothing else: the sampler's place, completions still to be
used, sums since the last log, the reference model and all random states come out of a checkpoint as
they went in. A stop in the middle of a step takes back what was begun.
"""

from __future__ import annotations

import contextlib
import errno
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from accelerate.logging import get_logger
from peft import PeftModel
from transformers import TrainerCallback, TrainerState
from transformers.trainer_utils import SaveStrategy
from trl.trainer.utils import RepeatSampler

from abacist.errors import AbacistError, EngineLost, RunError, first_line
from abacist.learning.fast_trainer import FastTrainer
from abacist.learning.problem_sampling import EpochSampler
from abacist.learning.resume import checkpoints, training_state
from abacist.learning.resume.stopping import StopNow, StopRequests

REFERENCE_NAME = "reference.safetensors"


logger = get_logger(__name__)


def keeps_checkpoints(args: Any) -> bool:
    """Whether a training with these arguments can be resumed at all."""
    return args.save_strategy != SaveStrategy.NO and not args.save_only_model


class ResumableTrainer(FastTrainer):
    """``FastTrainer`` with checkpoints that are whole or not there, and exact resume.

    ``stops``, if set, may end :meth:`train` by :class:`StopNow` after the state has been saved.
    ``say`` is told what a person should know of a resumption.
    """

    optimizer: Any
    lr_scheduler: Any

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.sampler: Any = None
        self.began = time.time()
        self.epoch_ended = False
        self.last_grad_norm: float | None = None
        self.last_learning_rate: float | None = None
        self._moment: training_state.State | None = None  # between the last step and the next
        self._saved_step: int | None = None
        self._saving_into: Path | None = None
        self.stops: StopRequests | None = None
        self.say: Callable[[str], None] = _warn
        self._resumed: training_state.State | None = None
        self._came_from: Path | None = None
        self._scheduled_steps = 0
        self.add_callback(_Moments(self))

    # Saving: every file at its place is whole at every moment.

    def _get_output_dir(self, trial: Any) -> str:
        return str(self._saving_into) if self._saving_into else super()._get_output_dir(trial)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        # A folder that is about to be renamed is not uploaded; `_save_checkpoint` does it after.
        if self._saving_into is None:
            super()._push_from_checkpoint(checkpoint_folder)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        run, step = Path(self._get_output_dir(trial)), self.state.global_step
        aside = run / checkpoints.ASIDE
        folder, final = aside / f"checkpoint-{step}", run / f"checkpoint-{step}"
        self._moment = training_state.capture(self)
        is_writer = self.args.should_save
        with _named_if_unwritten(f"checkpoint-{step}", run, is_writer, checkpoints.clear_leftovers):
            if is_writer:
                _remove(aside)
                folder.mkdir(parents=True)
            self.accelerator.wait_for_everyone()
            self._saving_into = aside
            try:
                super()._save_checkpoint(model, trial)
            finally:
                self._saving_into = None
            if not self.args.save_only_model:
                training_state.save_state(self._moment, folder / self._state_name)
            self.accelerator.wait_for_everyone()
            if is_writer:
                self._complete(folder, run)
                checkpoints.put_in_place(folder, final)
                checkpoints.rotate(run, self.args.save_total_limit, self._best_checkpoint(run))
            self.accelerator.wait_for_everyone()
        self._saved_step = step
        if self.args.push_to_hub:
            super()._push_from_checkpoint(str(final))

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """As in ``trl.GRPOTrainer``, but a card that cannot be written is a warning.

        TRL writes a draft with every checkpoint, and asks trackers about their runs for it: wandb
        installed while the process runs is enough to make it raise. No training is worth a draft.
        """
        try:
            super().create_model_card(*args, **kwargs)
        except Exception as error:
            self.say(f"TRL's draft of a model card was not written: {first_line(error)}")

    def _complete(self, folder: Path, run: Path) -> None:
        """Add what stands once in a checkpoint, whatever the number of processes, and seal it."""
        if self.args.sync_ref_model:
            reference = self.accelerator.unwrap_model(self.ref_model)
            weights = {name: w.detach().contiguous() for name, w in reference.named_parameters()}
            safetensors.torch.save_file(weights, folder / REFERENCE_NAME)
        # transformers named the best checkpoint by where it was being written.
        self.state.best_model_checkpoint = self._best_checkpoint(run)
        self.state.save_to_json(str(folder / "trainer_state.json"))
        for name in training_state.KEPT_LINES:
            with contextlib.suppress(FileNotFoundError), (run / name).open("rb+") as file:
                training_state.to_disk(file)
        checkpoints.seal(folder, self.state.global_step)

    def _best_checkpoint(self, run: Path) -> str | None:
        best = self.state.best_global_step
        path = run / f"checkpoint-{best}"
        if best and (path.is_dir() or best == self.state.global_step):
            return str(path)
        return None

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """As transformers', but every file at its place is whole at every moment."""
        if _internal_call:
            super().save_model(output_dir, _internal_call=True)
            return
        final = Path(output_dir or str(self.args.output_dir))
        aside = final / f"{checkpoints.ASIDE}-model"
        is_writer = self.args.should_save
        if is_writer:
            _remove(aside)
        self.accelerator.wait_for_everyone()
        with _named_if_unwritten("the trained model", final, is_writer, lambda _: _remove(aside)):
            super().save_model(str(aside), _internal_call=True)
            self.accelerator.wait_for_everyone()
            if is_writer and aside.is_dir():
                checkpoints.move_files(aside, final)
        if self.args.push_to_hub:
            self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)

    def _load_best_model(self) -> None:
        wrong = checkpoints.defect(Path(str(self.state.best_model_checkpoint)))
        if wrong:
            raise RunError(
                f"The best checkpoint is not loaded: {wrong}.",
                "The newest weights are in the last checkpoint; --no_load_best_model_at_end ends "
                "with those.",
            )
        super()._load_best_model()

    @property
    def _state_name(self) -> str:
        several = self.accelerator.num_processes > 1
        return f"grpo_state_{self.accelerator.process_index}.pt" if several else "grpo_state.pt"

    # Resuming and stopping.

    def train(
        self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any
    ) -> Any:
        """As TRL's. ``True`` resumes from the newest sound checkpoint of ``output_dir``.

        Raises NoCheckpoint, a RunError and a ValueError as TRL's, if there is none or the one that
        was named is not sound.
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
            self._resumed = training_state.load_state(path / self._state_name)
            if self._goes_on_in_place:
                self._saved_step = checkpoints.step_of(path)
            # The run has been evaluated at its start already, unless it is still there.
            self.args.eval_on_start = eval_on_start and checkpoints.step_of(path) == 0
        try:
            with contextlib.ExitStack() as held:
                if self._resumed is not None:
                    held.enter_context(training_state.joined_trackers(self._resumed))
                if self.stops:
                    held.enter_context(self.stops.deferred())
                return super().train(str(path) if path else None, *args, **kwargs)
        except StopNow as stop:
            stop.step, stop.max_steps = self.state.global_step, self.state.max_steps
            stop.checkpoint = self._save_last_step()
            raise
        except EngineLost as lost:
            # The other processes wait for its replies, and cannot save together with this one.
            several = self.accelerator.num_processes > 1
            if not several and (checkpoint := self._save_last_step()) is not None:
                lost.hint = f"The state before this step is in {checkpoint}. {lost.hint}"
            raise
        except Exception as error:
            if path is None or self._moment is not None or isinstance(error, AbacistError):
                raise
            raise RunError(
                f"{path} cannot be loaded: {first_line(error)}",
                "Resume with the run's own model, adapter shape and optimizer. Only tensors are "
                "loaded from a checkpoint; code in it is never run.",
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
            self._moment = training_state.capture(self)
            if keeps_checkpoints(self.args):
                self._save_checkpoint(self.model, None)
                if self.is_fsdp_enabled:
                    # To have something to save, PyTorch has let the optimizer take a step of
                    # nothing, which Adam would count.
                    self.optimizer.state.clear()
        else:
            training_state.restore(self, self._resumed)
            step = self.state.global_step
            if self.args.should_save and self._goes_on_in_place:
                training_state.cut_after(run, step, self._resumed["kept_bytes"])
                for path in checkpoints.supersede_after(run, step):
                    self.say(f"a later {path.name} is kept aside as {path}")
            self.say(f"resuming from {self._came_from}: step {step} of {self.state.max_steps}")
            self._end_epoch_that_was_left()
            self._resumed = self._moment = training_state.capture(self)
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
        is_last_step = (
            not training_state.is_mid_epoch(state) or state.global_step >= state.max_steps
        )
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
            training_state.set_random_state(self._resumed["random"])

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
        if isinstance(self.model, PeftModel) and not self.is_fsdp_enabled:
            training_state.load_adapters(self.model, Path(resume_from_checkpoint))
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
        if self.is_fsdp_enabled and self._resumed is not None and not self.state.global_step:
            return  # the step of nothing, see `begin`
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
        self._moment = training_state.capture(self)
        if self.stops and self.state.global_step < self.state.max_steps:
            self.stops.check()

    def _finalize_training(self, trial: Any, num_train_samples: int, start_time: float) -> Any:
        # Steps are counted from the beginning of the run, and so must be its seconds.
        return super()._finalize_training(trial, num_train_samples, self.began)

    def _save_last_step(self) -> Path | None:
        """Save the state after the last whole step, taking back what was begun since.

        Returns its checkpoint; None where none is kept.
        """
        if self._moment is None or not keeps_checkpoints(self.args):
            return None
        step = self.state.global_step
        if self._saved_step != step:
            training_state.restore(self, self._moment)
            self.optimizer.zero_grad()
            self._save_checkpoint(self.model, None)
        return Path(self._get_output_dir(None)) / f"checkpoint-{step}"


def _warn(text: str) -> None:
    logger.warning("Abacist: %s.", text)


class _Moments(TrainerCallback):
    """Tells a :class:`ResumableTrainer` where transformers' loop is."""

    def __init__(self, trainer: ResumableTrainer) -> None:
        self.trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer.begin()

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer.epoch_ended = False

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer.epoch_ended = True


def _remove(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def _named_if_unwritten(
    what: str, run: Path, is_writer: bool, clear: Callable[[Path], None]
) -> Iterator[None]:
    """Turn an error by which ``what`` could not be saved in ``run`` into one that says so.

    The writer clears up after any error.
    """
    try:
        yield
    except Exception as error:
        # Asked before anything is cleared away: PyTorch's writer does not say why it failed.
        reason = _why_not_written(error, run)
        if is_writer:
            clear(run)
        if reason is None:
            raise
        raise RunError(
            f"{what} was not saved: {reason}.",
            "Earlier saves are intact. Free some space, then resume the run.",
        ) from error


def _why_not_written(error: BaseException | None, run: Path) -> str | None:
    full = f"the disk of {run} is full"
    while error is not None:
        text = str(error)
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            return full
        if isinstance(error, OSError) and error.errno in _DISKS_ERRORS:
            return f"{error.strerror} ({error.filename or run})"
        # Of safetensors, which puts the system's words into an error of its own.
        if any(words in text for words in ("No space left", "os error 28", "quota exceeded")):
            return full
        if "I/O error" in text:
            return f"{first_line(error)} ({run})"
        if isinstance(error, RuntimeError) and any(words in text for words in _TORCHS_WRITER):
            near = shutil.disk_usage(run).free < 2**20
            return full if near else f"PyTorch could not write to {run} (no space, or a quota?)"
        error = error.__cause__ or error.__context__
    return full if shutil.disk_usage(run).free < 2**16 else None


_DISKS_ERRORS = (errno.EFBIG, errno.EIO, errno.EROFS, errno.ESTALE)
# As PyTorch's archive writer, in C++, puts a write that failed.
_TORCHS_WRITER = ("PytorchStreamWriter failed", "inline_container.cc", "iostream error")
