"""A trainer whose saves are whole: checkpoints and the final model are written aside and moved.

transformers and TRL still decide what a checkpoint holds; here they are given a hidden folder to
write it to (``learning.resume.checkpoints``). What a GRPO loop needs beside that is added
(``learning.resume.exactstate``), and the folder becomes ``checkpoint-N`` once all of it is on disk.
"""

from __future__ import annotations

import contextlib
import errno
import shutil
import time
from pathlib import Path
from typing import Any

import safetensors.torch
from transformers.trainer_utils import SaveStrategy

from abacist.errors import RunError
from abacist.learning.fasttrainer import FastTrainer
from abacist.learning.resume import checkpoints, exactstate

REFERENCE_NAME = "reference.safetensors"


class SoundTrainer(FastTrainer):
    """``FastTrainer`` of whose files none is ever half written; what is damaged is not used."""

    optimizer: Any
    lr_scheduler: Any

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.sampler: Any = None
        self.began = time.time()
        self.epoch_ended = False
        self.last_grad_norm: float | None = None
        self.last_learning_rate: float | None = None
        self._moment: exactstate.State | None = None  # between the last step and the next
        self._saved_step: int | None = None
        self._saving_into: Path | None = None

    @property
    def keeps_checkpoints(self) -> bool:
        """Whether this training can be resumed at all."""
        return self.args.save_strategy != SaveStrategy.NO and not self.args.save_only_model

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
        self._moment = exactstate.capture(self)
        is_writer = self.args.should_save
        try:
            if is_writer:
                shutil.rmtree(aside, ignore_errors=True)
                folder.mkdir(parents=True)
            self.accelerator.wait_for_everyone()
            self._saving_into = aside
            try:
                super()._save_checkpoint(model, trial)
            finally:
                self._saving_into = None
            if not self.args.save_only_model:
                exactstate.save_state(self._moment, folder / self._state_name)
            self.accelerator.wait_for_everyone()
            if is_writer:
                self._complete(folder, run)
                checkpoints.put_in_place(folder, final)
                checkpoints.rotate(run, self.args.save_total_limit, self._best_checkpoint(run))
            self.accelerator.wait_for_everyone()
        except Exception as error:
            unwritten = _unwritten(f"checkpoint-{step}", run, error)  # while the disk is full
            if is_writer:
                checkpoints.clear_leftovers(run)
            if unwritten is not None:
                raise unwritten from error
            raise
        self._saved_step = step
        if self.args.push_to_hub:
            super()._push_from_checkpoint(str(final))

    def _complete(self, folder: Path, run: Path) -> None:
        """Add what stands once in a checkpoint, whatever the number of processes, and seal it."""
        if self.args.sync_ref_model:
            reference = self.accelerator.unwrap_model(self.ref_model)
            weights = {name: w.detach().contiguous() for name, w in reference.named_parameters()}
            safetensors.torch.save_file(weights, folder / REFERENCE_NAME)
        # transformers named the best checkpoint by where it was being written.
        self.state.best_model_checkpoint = self._best_checkpoint(run)
        self.state.save_to_json(str(folder / "trainer_state.json"))
        for name in exactstate.KEPT_LINES:
            with contextlib.suppress(FileNotFoundError), (run / name).open("rb+") as file:
                exactstate.to_disk(file)
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
        if self.args.should_save:
            shutil.rmtree(aside, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        try:
            super().save_model(str(aside), _internal_call=True)
            self.accelerator.wait_for_everyone()
            if self.args.should_save and aside.is_dir():
                checkpoints.move_files(aside, final)
        except Exception as error:
            unwritten = _unwritten("the trained model", final, error)
            if self.args.should_save:
                shutil.rmtree(aside, ignore_errors=True)
            if unwritten is not None:
                raise unwritten from error
            raise
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


def _unwritten(what: str, run: Path, error: BaseException) -> RunError | None:
    """The error that names ``what`` was not saved in ``run``, if that is what ``error`` means.

    Ask before anything is cleared away: PyTorch's writer does not say why it failed.
    """
    if (reason := _why_not_written(error, run)) is None:
        return None
    return RunError(
        f"{what} was not saved: {reason}.",
        "What was saved before stands. Free some space, then resume the run.",
    )


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
            return f"{text.strip().splitlines()[0][:200]} ({run})"
        if isinstance(error, RuntimeError) and any(words in text for words in _TORCHS_WRITER):
            near = shutil.disk_usage(run).free < 2**20
            return full if near else f"PyTorch could not write to {run} (no space, or a quota?)"
        error = error.__cause__ or error.__context__
    return full if shutil.disk_usage(run).free < 2**16 else None


_DISKS_ERRORS = (errno.EFBIG, errno.EIO, errno.EROFS, errno.ESTALE)
# As PyTorch's archive writer, in C++, puts a write that failed.
_TORCHS_WRITER = ("PytorchStreamWriter failed", "inline_container.cc", "iostream error")
