"""A run in W&B, on top of transformers' callback."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from transformers.integrations import WandbCallback

from abacist.learning.trackers.content import (
    COMPLETIONS,
    END_TOTALS,
    Completion,
    Verdict,
    run_settings,
    some_of,
    tracker_names,
)
from abacist.learning.trackers.run_identity import RunIdentity

MOST_ROWS = 20_000  # of a table, which the process holds in memory too
MOST_ROWS_A_STEP = 64
# W&B shows the last hundred of the pieces in which a table grows.
MOST_INCREMENTS = 90


class WandbRun(WandbCallback):
    """Begins a W&B run, or joins the one that is open, which is then left open.

    No step is ever given to W&B, whose own must grow: the axis is ``train/global_step``, so steps
    that a resumed run takes again are logged again.
    """

    def __init__(self, identity: RunIdentity) -> None:
        super().__init__()
        self.identity = identity
        self.began_run = self._wandb.run is None
        self._table: Any = None
        self._waiting: list[dict[str, Any]] = []
        self._logs_until_piece = 1

    def setup(self, args: Any, state: Any, model: Any, **kwargs: Any) -> None:
        """As transformers', under our project and name and with the run's own settings."""
        if state.is_world_process_zero and self._wandb.run is None:
            self._wandb.init(**self._wanted())
        super().setup(args, state, model, **kwargs)
        if state.is_world_process_zero:
            run = self._wandb.run
            self._wandb.config.update(run_settings(self.identity.run), allow_val_change=True)
            names = ("id", "project", "entity", "name")
            self.identity.remember("wandb", **{name: getattr(run, name, None) for name in names})

    def _wanted(self) -> dict[str, Any]:
        identity, known = self.identity, self.identity.known("wandb")
        wanted = {
            "project": identity.project_in("WANDB_PROJECT"),
            "name": identity.name_in("WANDB_NAME"),
        }
        if known.get("id") and "WANDB_RUN_ID" not in identity.environment:
            kept = {key: known[key] for key in ("id", "project", "entity") if known.get(key)}
            wanted |= kept | {"resume": "allow"}
        return wanted

    def on_log(
        self, args: Any, state: Any, control: Any, model: Any = None, logs: Any = None, **kw: Any
    ) -> None:
        super().on_log(args, state, control, model=model, logs=logs, **kw)
        totals = {name: logs[name] for name in END_TOTALS if name in logs}
        if totals and state.is_world_process_zero:
            self._wandb.log(tracker_names(totals) | {"train/global_step": state.global_step})

    def log_completions(self, args: Any, state: Any, completions: Sequence[Completion]) -> None:
        """Add rows to the table ``completions``. W&B gets only those it has not got yet."""
        logs = max(1, math.ceil(state.max_steps / max(1, state.logging_steps or 1)))
        most = max(1, min(MOST_ROWS_A_STEP, MOST_ROWS // logs))
        self._waiting += [one.row() for one in some_of(completions, most, args.seed)]
        self._logs_until_piece -= 1
        if self._logs_until_piece <= 0:
            self._logs_until_piece = math.ceil(logs / MOST_INCREMENTS)
            self._grow()

    def _grow(self) -> None:
        if not self._waiting:
            return
        if self._table is None:
            self._table = self._wandb.Table(
                columns=list(self._waiting[0]), allow_mixed_types=True, log_mode="INCREMENTAL"
            )
        for row in self._waiting:
            self._table.add_data(*(row.get(column) for column in self._table.columns))
        step, self._waiting = self._waiting[-1]["step"], []
        self._wandb.log({COMPLETIONS: self._table, "train/global_step": step})

    def log_verdict(self, args: Any, state: Any, verdict: Verdict) -> None:
        """The verdict in the run's summary."""
        self._wandb.run.summary.update(verdict.everything)

    def finish(self, failed: bool) -> None:
        """Close the run, unless a person began it: the next training is another run."""
        try:
            if self._wandb.run is not None:
                self._grow()
        finally:
            if self.began_run and self._wandb.run is not None:
                self._wandb.finish(exit_code=int(failed))
