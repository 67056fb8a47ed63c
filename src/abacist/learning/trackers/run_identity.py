"""What a run is called in its trackers: project, name, and the run that a resumed one goes on in.

What a tracker calls the run stands in the run directory's ``trackers.json``, which exists only
where there is a tracker: the ids are drawn by others, so equal runs differ in it.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from abacist.records.rundir import RunDir, write_json

PROJECT = "abacist"


@dataclass(frozen=True)
class RunIdentity:
    """The run directory, and what a person set of project and name (None where nothing)."""

    run: RunDir
    project: str | None = None
    name: str | None = None
    is_resumed: bool = False
    environment: Mapping[str, str] = field(default_factory=lambda: dict(os.environ))

    def project_in(self, variable: str) -> str:
        """``--project``, else the tracker's own environment variable, else ``abacist``."""
        return self.project or self.environment.get(variable) or PROJECT

    def name_in(self, variable: str) -> str:
        """``--run_name``, else the tracker's own environment variable, else the directory's."""
        return self.name or self.environment.get(variable) or self.run.run_id

    def known(self, tracker: str) -> dict[str, Any]:
        """What :meth:`remember` kept, of a run that is resumed; nothing of one that begins."""
        kept = self._kept().get(tracker) if self.is_resumed else None
        return kept if isinstance(kept, dict) else {}

    def remember(self, tracker: str, **known_as: str | None) -> None:
        """Keep what ``tracker`` calls this run, for when it is resumed."""
        write_json(self.run.trackers_path, {**self._kept(), tracker: known_as})

    def _kept(self) -> dict[str, Any]:
        try:
            kept = json.loads(self.run.trackers_path.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError):
            return {}  # without it the run goes on as a new one there
        return kept if isinstance(kept, dict) else {}
