"""What checkpoints and health checks cost a run: ``python bench/overhead.py`` (about a minute).

One run of the recipe ``tiny`` is made with a stopwatch in everything that exists only so that the
run cannot be lost or go silently wrong: saves (``checkpoint-0`` included, and what TRL itself
writes in them), the state that is captured after every step, and all of the guard. The stopwatch
counts this process's CPU seconds, which other work on the machine does not change, and wall
seconds, which hold the waiting for the disk. Its own cost counts against the share.

A/B runs would not do here: a run differs from itself by more than the few percent looked for.
"""

from __future__ import annotations

import argparse
import functools
import json
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

from abacist.learning import train as training
from abacist.learning.config import load_config
from abacist.learning.health.guard import Guard
from abacist.learning.resume import training_state
from abacist.learning.resume.resumable import ResumableTrainer
from abacist.learning.trainer import GRPOTrainer
from abacist.view.live import Live

TARGET = 0.03


class Stopwatch:
    """Seconds by name, as (CPU, wall); what runs inside something watched counts there alone."""

    def __init__(self) -> None:
        self.seconds: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])
        self.calls: dict[str, int] = defaultdict(int)
        self._is_running = False

    def watch(self, owner: Any, method: str, name: str, *, nested: bool = False) -> None:
        """Time every call of a method; with ``nested`` also within another one and around it."""
        do: Callable[..., Any] = getattr(owner, method)

        @functools.wraps(do)
        def timed(*args: Any, **kwargs: Any) -> Any:
            if self._is_running and not nested:
                return do(*args, **kwargs)
            self._is_running = self._is_running or not nested
            began = time.process_time(), time.perf_counter()
            try:
                return do(*args, **kwargs)
            finally:
                ended = time.process_time(), time.perf_counter()
                for which in (0, 1):
                    self.seconds[name][which] += ended[which] - began[which]
                self.calls[name] += 1
                self._is_running = self._is_running and nested

        setattr(owner, method, timed)


def measure(steps: int, run: Path) -> dict[str, Any]:
    """Make the run and return the seconds and shares of its parts."""
    watch = Stopwatch()
    watch.watch(ResumableTrainer, "_save_checkpoint", "checkpoints")
    watch.watch(training_state, "capture", "state after every step")
    for name in sorted(vars(Guard)):
        if name.startswith("on_"):
            watch.watch(Guard, name, "health checks")
    watch.watch(training, "refuse_broken_weights", "health checks")
    watch.watch(GRPOTrainer, "train", "training", nested=True)
    config = load_config("tiny", None, ["--max_steps", str(steps), "--output_dir", str(run)])
    began = time.process_time(), time.perf_counter()
    with Live() as watcher:
        training.train(config, watcher)
    whole = time.process_time() - began[0], time.perf_counter() - began[1]
    trained = watch.seconds.pop("training")
    watched = [sum(pair[which] for pair in watch.seconds.values()) for which in (0, 1)]
    return {
        "steps": steps,
        "save_steps": config.training.save_steps,
        "parts": {
            name: {"calls": watch.calls[name], "cpu_seconds": cpu, "wall_seconds": wall}
            for name, (cpu, wall) in watch.seconds.items()
        },
        "share_of_training": {"cpu": watched[0] / trained[0], "wall": watched[1] / trained[1]},
        "share_of_run": {"cpu": watched[0] / whole[0], "wall": watched[1] / whole[1]},
    }


def main() -> int:
    """Print what was measured; 1 if it is more than the target."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--output", type=Path, help="also write it here, as JSON")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        found = measure(options.steps, Path(folder) / "run")
    for name, part in found["parts"].items():
        print(
            f"{name}: {part['calls']} calls, {part['cpu_seconds']:.2f} s CPU, "
            f"{part['wall_seconds']:.2f} s"
        )
    for name, of in (("share_of_training", "training"), ("share_of_run", "the whole run")):
        share = found[name]
        print(
            f"together {share['cpu']:.1%} of the CPU time of {of}, {share['wall']:.1%} of its time"
        )
    if options.output:
        options.output.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    return 0 if found["share_of_training"]["cpu"] <= TARGET else 1


if __name__ == "__main__":
    raise SystemExit(main())
