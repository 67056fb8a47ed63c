"""A run in Trackio, on top of transformers' callback."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from transformers.integrations import TrackioCallback

from abacist.learning.trackers.content import (
    COMPLETIONS,
    Completion,
    Verdict,
    run_settings,
    some_of,
    tracker_names,
)
from abacist.learning.trackers.run_identity import RunIdentity
from abacist.learning.trackers.trace import trace

MOST_TRACES_A_STEP = 64


class TrackioRun(TrackioCallback):
    """Begins a Trackio run, or joins the one that is open, which is then left open.

    Trackio resumes by name, the newest run of that name. So only a resumed run asks for it:
    transformers' callback always does, and joins two runs whose directories are called alike.
    """

    def __init__(self, identity: RunIdentity) -> None:
        super().__init__()
        self.identity = identity
        self.began_run = self._open_run() is None

    def _open_run(self) -> Any:
        return self._trackio.context_vars.current_run.get()

    def setup(self, args: Any, state: Any, model: Any, **kwargs: Any) -> None:
        """As transformers', under our project and name and with the run's own settings."""
        if state.is_world_process_zero:
            if self._open_run() is None:
                self._begin(args)
            self._space_id = self._trackio.context_vars.current_space_id.get()
            config = getattr(model, "config", None)
            of_model = config.to_dict() if config is not None else {}
            run = self._open_run()
            run.config.update({**of_model, **args.to_dict(), **run_settings(self.identity.run)})
            run.config["model/num_parameters"] = sum(w.numel() for w in model.parameters())
            self.identity.remember("trackio", project=run.project, name=run.name)
        self._initialized = True

    def _begin(self, args: Any) -> None:
        identity, known = self.identity, self.identity.known("trackio")
        self._trackio.init(
            project=known.get("project") or identity.project_in("TRACKIO_PROJECT"),
            name=known.get("name") or identity.name_in("TRACKIO_NAME"),
            resume="allow" if known else "never",
            space_id=args.trackio_space_id,
            private=args.hub_private_repo,
            bucket_id=args.trackio_bucket_id,
        )

    def on_log(
        self, args: Any, state: Any, control: Any, model: Any = None, logs: Any = None, **kw: Any
    ) -> None:
        if not self._initialized:
            self.setup(args, state, model)
        if state.is_world_process_zero:
            # transformers leaves the step to Trackio, which counts logs, not steps.
            named = tracker_names(logs) | {"train/global_step": state.global_step}
            self._trackio.log(named, step=state.global_step)

    def log_completions(self, args: Any, state: Any, completions: Sequence[Completion]) -> None:
        """Each completion as a trace, or, where this Trackio has none, a table of the step."""
        some = some_of(completions, MOST_TRACES_A_STEP, args.seed)
        if hasattr(self._trackio, "Trace"):
            logged: Any = [self._trace(one) for one in some]
        else:
            logged = self._trackio.Table(data=[one.row() for one in some])
        self._trackio.log({COMPLETIONS: logged}, step=state.global_step)

    def _trace(self, one: Completion) -> Any:
        about = {**one.extra, "advantage": one.advantage, "step": one.step}
        return trace(self._trackio, one.messages, one.text, one.rewards, about)

    def log_verdict(self, args: Any, state: Any, verdict: Verdict) -> None:
        """Trackio has no summary: figures are logged at the last step, the words as Markdown."""
        words: dict[str, Any] = {}
        if hasattr(self._trackio, "Markdown"):
            words["verdict/sentence"] = self._trackio.Markdown(verdict.sentence)
        self._trackio.log({**verdict.figures, **words}, step=state.global_step)

    def on_train_end(
        self, args: Any, state: Any, control: Any, model: Any = None, *others: Any, **named: Any
    ) -> None:
        if self.began_run:
            super().on_train_end(args, state, control, model, *others, **named)

    def finish(self, failed: bool) -> None:
        """Close the run, unless a person began it."""
        if self.began_run and self._open_run() is not None:
            self._trackio.finish()
