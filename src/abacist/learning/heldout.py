"""Held-out evaluation: the same measurement before, during and after training."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

from abacist.learning import processes
from abacist.learning.config import Config
from abacist.learning.rewards import reported_rewards
from abacist.learning.task import Task
from abacist.learning.tracking import Watcher, told_of
from abacist.policy.decoding.progress import Decoded, Progress
from abacist.policy.loading import Policy
from abacist.proof.evaluate import Evaluation, evaluate
from abacist.records.openings import AFTER, BEFORE, FINAL, SELECTION, Opening, note_opening
from abacist.records.rundir import RunDir
from abacist.task.custom_rewards import RewardFunc
from abacist.task.problems import Problem

VERDICT_SAMPLES = 4
# What `HeldoutEvaluation.selection` measures, by the name of the figure; `--metric_for_best_model`
# chooses among them.
SELECTION_METRICS = {
    "accuracy": "correct",
    "any_format_accuracy": "any_format",
    "strict_format": "strict",
    "mean_completion_tokens": "completion_tokens",
}


@dataclass
class HeldoutEvaluation:
    """Evaluates a policy on the held-out and the selection split, always in the same way.

    Several processes share the replies between them, and each gets the whole result.
    """

    config: Config
    task: Task
    run: RunDir
    watcher: Watcher
    measured_seconds: float | None = None
    """How long the latest :meth:`measure` took."""

    def measure(
        self, policy: Policy, when: str, share: str = "", *, step: int
    ) -> tuple[Evaluation | None, Evaluation | None]:
        """Greedy replies to all held-out problems, sampled ones to some; kept in ``evals/``.

        ``when`` is ``before`` or ``after``, ``step`` how many steps the policy was trained. Both
        kinds are one piece of work in what the watcher is told; ``share`` says how much of the run
        that is.
        """
        heldout = self.task.heldout
        if not heldout:
            return None, None
        began = time.monotonic()
        repeated = heldout[: self.config.script.num_consistency_problems]
        count = len(heldout) + VERDICT_SAMPLES * len(repeated)
        what = f"{count:,} replies to {len(heldout):,} held-out problems"
        if processes.count() > 1:
            what += f", shared by {processes.count()} processes"
        self.watcher.stage(f"Measuring {when} training: {what}" + (f", {share}" if share else ""))
        tell = told_of(self.watcher, f"{when} training")
        # A reward may cost money: one process calls it.
        rewards: list[RewardFunc] = []
        weights: list[float] | None = None
        if processes.is_main():
            rewards, weights = reported_rewards(
                self.config.settings, self.watcher.note, given=self.config.functions
            )
        how = {"split": "heldout", "rewards": rewards, "reward_weights": weights}
        self._note_opening(when, len(heldout), step)
        greedy = self._evaluate(
            policy,
            heldout,
            lambda found: tell(found.before(VERDICT_SAMPLES * len(processes.part_of(repeated)))),
            **how,
        )
        if processes.is_main():
            greedy.save(self.run.evals_dir / when)
        if fault := greedy.conditions.get("rewards"):
            self.watcher.note(f"Warning: {fault}")
        if greedy.figures["stopped"].value == 0:
            self.watcher.note(
                f"Warning: none of {len(greedy.rollouts)} replies ended by itself within "
                f"{self.config.max_completion_tokens} tokens, so all were cut. Raise "
                "--max_completion_length, or use a model that was trained on its chat template."
            )
        sampled = None
        if repeated:
            lengths = [reply.completion_tokens for reply in processes.part_of(greedy.rollouts)]
            self._note_opening(when, len(repeated), step, "-sampled")
            done = Decoded.all_ended(lengths, self.config.max_completion_tokens)
            sampled = self._evaluate(
                policy,
                repeated,
                lambda found: tell(found.after(done)),
                **how,
                num_samples=VERDICT_SAMPLES,
                temperature=1.0,
            )
            if processes.is_main():
                sampled.save(self.run.evals_dir / f"{when}-sampled")
        self.measured_seconds = time.monotonic() - began
        return greedy, sampled

    def _note_opening(self, when: str, count: int, step: int, kind: str = "") -> None:
        purpose, weights = (BEFORE, "checkpoint-0") if when == "before" else (AFTER, FINAL)
        opened = Opening("heldout", purpose, count, weights, step, count, f"evals/{when}{kind}")
        self._note(opened)

    def _note(self, opened: Opening) -> None:
        if processes.is_main():
            note_opening(self.run.path, opened)

    def selection(self, policy: Policy, step: int) -> dict[str, float]:
        """Greedy accuracy and format on the selection split after ``step``: ``--eval_steps``."""
        count = len(self.task.selection)
        self._note(Opening("selection", SELECTION, count, f"checkpoint-{step}", step))
        tell = told_of(self.watcher, "selection problems")
        found = self._evaluate(policy, self.task.selection, tell, split="selection", rewards=[])
        return {name: found.figures[figure].value for name, figure in SELECTION_METRICS.items()}

    def _evaluate(
        self, policy: Policy, problems: list[Problem], progress: Progress, **how: Any
    ) -> Evaluation:
        return evaluate(
            policy,
            problems,
            system_prompt=self.task.system_prompt,
            shots=self.task.shots,
            max_completion_tokens=self.config.max_completion_tokens,
            batch_size=self.config.script.eval_batch_size,
            progress=progress,
            generate=processes.generate,
            run_id=self.run.run_id,
            conditions={"arithmetic": policy.arithmetic},
            **how,
        )
