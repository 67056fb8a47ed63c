"""How a run is judged: the same measurement before, during and after training."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from abacist.learning.config import Config
from abacist.learning.task import Task
from abacist.learning.tracking import Watcher
from abacist.policy.loading import Policy
from abacist.proof.evaluate import Evaluation, evaluate
from abacist.records.rundir import RunDir
from abacist.task.problems import Problem

VERDICT_SAMPLES = 4
# What `Judge.selection` measures; `--metric_for_best_model` chooses among them.
SELECTION_METRICS = (
    "accuracy",
    "any_format_accuracy",
    "strict_format",
    "mean_completion_tokens",
)


@dataclass
class Judge:
    """Measures a policy on the splits it never learns from, always in the same way."""

    config: Config
    task: Task
    run: RunDir
    watcher: Watcher

    def measure(self, policy: Policy, when: str) -> tuple[Evaluation | None, Evaluation | None]:
        """Greedy replies to all held-out problems, sampled ones to some; kept in ``evals/``."""
        if not self.task.heldout:
            return None, None
        self.watcher.stage(f"Measuring {when} training: {len(self.task.heldout)} held-out problems")
        greedy = self._evaluate(policy, self.task.heldout, f"{when}, greedy", split="heldout")
        greedy.save(self.run.evals_dir / when)
        if greedy.figures["stopped"].value == 0:
            self.watcher.note(
                f"Warning: none of {len(greedy.rollouts)} replies ended by itself within "
                f"{self.config.max_completion_tokens} tokens, so all were cut. Raise "
                "--max_completion_length, or give a model whose chat template it was trained on."
            )
        sampled_problems = self.task.heldout[: self.config.script.num_consistency_problems]
        if not sampled_problems:
            return greedy, None
        sampled = self._evaluate(
            policy,
            sampled_problems,
            f"{when}, sampled {VERDICT_SAMPLES} times",
            split="heldout",
            num_samples=VERDICT_SAMPLES,
            temperature=1.0,
        )
        sampled.save(self.run.evals_dir / f"{when}-sampled")
        return greedy, sampled

    def selection(self, policy: Policy) -> dict[str, float]:
        """Greedy accuracy and format on the selection split, for ``--eval_steps``."""
        found = self._evaluate(policy, self.task.selection, "selection problems", split="selection")
        measured = (
            found.accuracy,
            found.any_format_accuracy,
            found.strict,
            found.mean_completion_tokens,
        )
        return {name: one.value for name, one in zip(SELECTION_METRICS, measured, strict=True)}

    def _evaluate(
        self, policy: Policy, problems: list[Problem], label: str, **how: Any
    ) -> Evaluation:
        return evaluate(
            policy,
            problems,
            system_prompt=self.task.system_prompt,
            shots=self.task.shots,
            max_completion_tokens=self.config.max_completion_tokens,
            batch_size=self.config.script.eval_batch_size,
            progress=lambda done, total: self.watcher.progress(done, total, label),
            run_id=self.run.run_id,
            **how,
        )
