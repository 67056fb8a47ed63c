"""A run in TensorBoard, on top of transformers' callback."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from transformers.integrations import TensorBoardCallback

from abacist.learning.trackers.content import (
    COMPLETIONS,
    Completion,
    Verdict,
    flat,
    run_settings,
    some_of,
)
from abacist.learning.trackers.run_identity import RunIdentity

FOLDER = "tensorboard"
MOST_TEXTS_A_STEP = 8
MOST_CHARACTERS = 4_000


class TensorBoardRun(TensorBoardCallback):
    """Writes event files to ``tensorboard/`` in the run directory, or to where
    ``TENSORBOARD_LOGGING_DIR`` says. A resumed run goes on there, and replaces what an earlier part
    wrote of the steps that it takes again."""

    def __init__(self, identity: RunIdentity) -> None:
        super().__init__()
        self.identity = identity
        self.logging_dir = self.logging_dir or str(identity.run.path / FOLDER)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if not state.is_world_process_zero:
            return
        again = state.global_step + 1 if self.identity.is_resumed else None
        self.tb_writer = self._SummaryWriter(log_dir=self.logging_dir, purge_step=again)
        super().on_train_begin(args, state, control, **kwargs)
        self.tb_writer.add_text("run", _code(run_settings(self.identity.run)))

    def log_completions(self, args: Any, state: Any, completions: Sequence[Completion]) -> None:
        """A few completions of the step as one text."""
        some = some_of(completions, MOST_TEXTS_A_STEP, args.seed)
        text = "\n\n---\n\n".join(_code(one.row())[:MOST_CHARACTERS] for one in some)
        self.tb_writer.add_text(COMPLETIONS, text, state.global_step)

    def log_verdict(self, args: Any, state: Any, verdict: Verdict) -> None:
        """The sentence as text; the figures as scalars, beside the settings as hyperparameters."""
        step = state.global_step
        self.tb_writer.add_text("verdict/sentence", verdict.sentence, step)
        settings = flat(run_settings(self.identity.run))
        # "." keeps them in this run: TensorBoard would show a second one for them.
        self.tb_writer.add_hparams(settings, dict(verdict.figures), run_name=".", global_step=step)

    def finish(self, failed: bool) -> None:
        """Write what is still to be written."""
        if self.tb_writer is not None:
            self.tb_writer.close()
            self.tb_writer = None


def _code(value: Any) -> str:
    """A Markdown block of code, in which nothing is markup: every line is indented."""
    text = json.dumps(value, indent=1, ensure_ascii=False, default=str)
    return "\n".join(f"    {line}" for line in text.replace("\\n", "\n").split("\n"))
