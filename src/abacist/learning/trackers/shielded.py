"""The trackers of a run, shielded: one that is down costs a warning, never the run."""

from __future__ import annotations

import contextlib
import importlib.util
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from transformers import TrainerCallback

from abacist.errors import first_line
from abacist.learning.trackers.content import Completion, Verdict, completions_of, some_of
from abacist.learning.trackers.run_identity import RunIdentity
from abacist.proof.comparison.compare import Comparison
from abacist.records.rollout import question_of


def available_trackers(report_to: Sequence[str], warn: Callable[[str], None]) -> list[str]:
    """The trackers that can be started; one warning, with the mend, for each that cannot."""
    kept = []
    for name in report_to:
        if importlib.util.find_spec(name) is None:
            warn(f"tracker {name} is not installed: left out (pip install 'abacist[{name}]')")
        else:
            kept.append(name)
    return kept


def _made(name: str, identity: RunIdentity) -> TrainerCallback:
    # Only a tracker that is asked for is imported.
    if name == "wandb":
        from abacist.learning.trackers.wandb_run import WandbRun

        return WandbRun(identity)
    if name == "trackio":
        from abacist.learning.trackers.trackio_run import TrackioRun

        return TrackioRun(identity)
    from abacist.learning.trackers.tensorboard_run import TensorBoardRun

    return TensorBoardRun(identity)


class ShieldedTracker(TrainerCallback):
    """A tracker's callback: its first failure is reported once, and then it is switched off.

    The end of the training is kept from it until :meth:`finish`: the verdict is still to come.
    """

    def __init__(self, tracker: TrainerCallback, name: str, warn: Callable[[str], None]) -> None:
        self.tracker: Any = tracker
        self.name = name
        self.warn = warn
        self._end: tuple[tuple[Any, ...], dict[str, Any]] | None = None

    def call(self, event: str, *args: Any, **kwargs: Any) -> Any:
        """The tracker's own method of this name; None if it fails or has failed before."""
        if self.tracker is None:
            return None
        if event == "on_train_end":
            self._end = args, kwargs
            return None
        return self._try(event, *args, **kwargs)

    def _try(self, method: str, *args: Any, **kwargs: Any) -> Any:
        if self.tracker is None:
            return None
        try:
            return getattr(self.tracker, method)(*args, **kwargs)
        except (Exception, SystemExit) as error:  # trackers raise whatever they like, even exits
            tracker, self.tracker = self.tracker, None
            self.warn(f"{self.name} failed and is left out from here on: {first_line(error)}")
            if method != "finish":
                self._close_quietly(tracker)
            return None

    def _close_quietly(self, tracker: Any) -> None:
        # Else the next training of a notebook would be logged into this one's run.
        with contextlib.suppress(Exception, SystemExit):  # it was said that it failed
            tracker.finish(True)

    def finish(self, failed: bool) -> None:
        """The training and all that belonged to it has ended: close the tracker's run."""
        if self._end is not None:
            (args, kwargs), self._end = self._end, None
            self._try("on_train_end", *args, **kwargs)
        self._try("finish", failed)
        self.tracker = None


def _forwarded(event: str) -> Callable[..., Any]:
    def forward(self: ShieldedTracker, *args: Any, **kwargs: Any) -> Any:
        return self.call(event, *args, **kwargs)

    return forward


for _event in [name for name in vars(TrainerCallback) if name.startswith("on_")]:
    setattr(ShieldedTracker, _event, _forwarded(_event))


class Trackers(TrainerCallback):
    """All trackers of a run. As a context manager it closes them at the end, however it ends.

    Attached to a trainer they hear its events; completions too where ``log_completions`` is set
    (``say`` prints some), and the verdict by :meth:`verdict`.
    """

    def __init__(
        self,
        report_to: Sequence[str],
        identity: RunIdentity,
        say: Callable[[str], None],
        *,
        log_completions: bool = False,
    ) -> None:
        self.say = say
        self.log_completions = log_completions
        self.shielded: list[ShieldedTracker] = []
        self._trainer: Any = None
        self._to_print: int | None = None
        for name in available_trackers(report_to, say):
            try:
                self.shielded.append(ShieldedTracker(_made(name, identity), name, say))
            except (Exception, SystemExit) as error:
                say(f"{name} cannot be started and is left out: {first_line(error)}")

    def attach(self, trainer: Any) -> None:
        """Listen to ``trainer``, after whoever listens already. Its directory must be begun."""
        self._trainer = trainer
        for tracker in self.shielded:
            trainer.callback_handler.callbacks.append(tracker)
        if self.log_completions:
            trainer.log_completions = True  # TRL keeps them in completions/*.parquet
            (Path(trainer.args.output_dir) / "completions").mkdir(exist_ok=True)
            # TRL prints past whatever is drawn on the terminal, so we do it.
            self._to_print = trainer.num_completions_to_print
            trainer.num_completions_to_print = -1
            trainer.callback_handler.callbacks.append(self)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if not logs or "loss" not in logs or not state.is_world_process_zero:
            return  # an evaluation, or the end
        if not self._trainer.log_completions:
            return  # they failed before
        try:
            completions = completions_of(self._trainer)
            lines = [in_words(one) for one in some_of(completions, self._to_print, args.seed)]
        except Exception as error:  # whatever rewards logged, and TRL's own buffers of it
            # TRL would make its table of the same, next.
            self._trainer.log_completions = False
            self.say(f"--log_completions failed and is left out from here on: {first_line(error)}")
            return
        if completions:
            for tracker in self.shielded:
                tracker.call("log_completions", args, state, completions)
        for line in lines:
            self.say(line)

    def verdict(self, comparison: Comparison | None) -> None:
        """Tell every tracker what the training has changed."""
        if comparison is None or self._trainer is None or not self.shielded:
            return
        verdict = Verdict.of(comparison)
        for tracker in self.shielded:
            tracker.call("log_verdict", self._trainer.args, self._trainer.state, verdict)

    def __enter__(self) -> Trackers:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for tracker in self.shielded:
            tracker.finish(failed=kind is not None)


def in_words(one: Completion) -> str:
    """A completion for the terminal: what was asked last, what was replied, what it earned."""
    paid = ", ".join(
        f"{name} {'n/a' if value is None else f'{value:.2f}'}"
        for name, value in one.rewards.items()
    )
    more = [f"{name}: {value}" for name, value in one.extra.items()]
    asked = question_of(one.messages)
    heading = f"step {one.step}, a completion: advantage {one.advantage:+.2f} | {paid}"
    return "\n".join([heading, *more, *_indented(asked, "  > "), *_indented(one.text, "  | ")])


def _indented(text: str, margin: str) -> list[str]:
    return [margin + line for line in text.split("\n")]
