"""``abacist.GRPOTrainer``: TRL's trainer, with few overrides, each for a reason.

A script that imports this class instead of ``trl.GRPOTrainer`` and passes a plain
``trl.GRPOConfig`` gets the same mathematics faster: completions from our engine, log-probabilities
from a forward that computes each prompt once (``learning.fast_trainer``). Its checkpoints are
sound, and a resumed run is the same run (``learning.resume.resumable``).
What else is added is asked for: rollouts are kept when ``abacist.GRPOConfig.keep_rollouts`` says
so, and ``evaluator`` replaces TRL's evaluation (sampled groups and their rewards) by held-out
accuracy, measured as the verdict measures it.

The mathematics is TRL's, and so GRPO's (Shao et al. 2024, arXiv 2402.03300, section 4): no
critic, G completions of each prompt from the old policy, advantages from the group's own
mean and standard deviation, a clipped ratio. Departures by default, both TRL's: no KL term
(``beta`` 0), and the token-level ``dapo`` loss instead of the mean over each completion. One of
ours, with ``abacist.GRPOConfig`` only: a group whose rewards are equal has advantages of exactly 0,
where TRL leaves what rounding makes of that (``reply_selection.silence``).
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object

from abacist.learning import (
    canary,
    outcome_gating,
    problem_sampling,
    process_supervision,
    processes,
    reply_selection,
)
from abacist.learning.arguments import GRPOConfig
from abacist.learning.resume.resumable import ResumableTrainer
from abacist.learning.rollout_rows import Scored, rollouts_of
from abacist.records.rollout import Rollout, write_rollouts

Evaluator = Callable[[Any], Mapping[str, float]]
WatchReplies = Callable[[int, Sequence[Rollout]], None]


class GRPOTrainer(ResumableTrainer):
    """``trl.GRPOTrainer`` that can keep its rollouts and measure held-out accuracy.

    Args:
        evaluator: called with the model at every evaluation; returns metrics without prefix,
            such as ``{"accuracy": 0.61}``, which are logged as ``eval_accuracy`` and can serve as
            ``metric_for_best_model``. None keeps TRL's evaluation.
        everything else: as in ``trl.GRPOTrainer``.

    ``watch_replies``, if set, is given each generation batch of training: the step, and a rollout
    for every completion (where rollouts are not kept, for those of this process).
    """

    def __init__(self, *args: Any, evaluator: Evaluator | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        reply_selection.refuse_contradictions(
            self.args, "train_replies", has_auxiliary_loss=self.aux_loss_enabled
        )
        process_supervision.refuse_contradictions(self.args, "step_reward_weight")
        process_supervision.refuse_without_solutions(self)
        self.evaluator = evaluator
        self.watch_replies: WatchReplies | None = None
        self._prompt_lengths: list[int] = []
        self._scored: Scored | None = None
        self._rollout_seconds = 0.0  # of the step in work
        self._groups_of_step = 0  # how many the generations of the step in work have had
        self.problem_sampler = problem_sampling.sampler_for(self)
        self.gates_by_outcome = outcome_gating.is_wanted(self)

    @property
    def keeps_rollouts(self) -> bool:
        """Whether completions are written to ``output_dir/rollouts``."""
        return isinstance(self.args, GRPOConfig) and self.args.keep_rollouts

    def _get_train_sampler(self, dataset: Any = None) -> Any:
        # Which problems next; TRL's shuffled epochs unless `problem_sampling` says otherwise.
        if self.problem_sampler is None:
            return super()._get_train_sampler(dataset)
        self.sampler = self.problem_sampler
        return self.problem_sampler

    def _generate(self, prompts: list[Any]) -> Any:
        # Prompt lengths are known here and nowhere later; the ids are encoded once, by TRL.
        generated = super()._generate(prompts)
        self._prompt_lengths = [len(ids) for ids in generated[0]]
        return generated

    def _calculate_rewards(
        self, inputs: Any, prompts: Any, completions: Any, completion_ids_list: Any
    ) -> torch.Tensor:
        # TRL keeps only the means of these; a rollout needs each one.
        rewards_per_func = super()._calculate_rewards(
            inputs, prompts, completions, completion_ids_list
        )
        if self.problem_sampler is not None and self.model is not None and self.model.training:
            # Every process must hear the same, since each draws the order for itself.
            self.problem_sampler.observe(
                gather_object(problem_sampling.outcomes(inputs, completions))
            )
        self._scored = Scored(
            inputs,
            prompts,
            completions,
            completion_ids_list,
            rewards_per_func[processes.own_rows(self.accelerator, len(prompts))],
        )
        return rewards_per_func

    def _log_metric(self, name: str, value: float) -> None:
        # TRL averages them after the step, where nobody knows any more whose value it was.
        try:
            number = float(value)
        except (TypeError, ValueError, OverflowError):
            raise TypeError(f"log_metric({name!r}, {value!r:.60}) takes a number") from None
        super()._log_metric(str(name), number)

    def _generate_and_score_completions(self, inputs: Any) -> dict[str, Any]:
        # The first moment at which the rewards and advantages of a generation batch are both
        # known, and rows are still in the order of the prompts: `_prepare_inputs` reorders them.
        began = time.perf_counter()
        training = self.model is not None and self.model.training
        if training and self._fusion.position[0] == 0:  # the first of a step, or again after a stop
            self._rollout_seconds, self._groups_of_step = 0.0, 0
        output: dict[str, Any] = super()._generate_and_score_completions(inputs)
        if self.keeps_rollouts and training:
            self._rollout_seconds += time.perf_counter() - began
        every = getattr(self.args, "vllm_canary_steps", 0)
        if self.use_vllm and every and self.state.global_step % every == 0:
            canary.check(self, output, self.state.global_step + 1)
        if training and isinstance(self.args, GRPOConfig):
            reply_selection.silence(self, output["advantages"])
        if self._scored and training and self.gates_by_outcome:
            outcome_gating.gate(self, self._scored, output["advantages"])
        if training and isinstance(self.args, GRPOConfig) and self.args.log_completions:
            self._show_in_table(output["advantages"])
        advantages, steps = output["advantages"].tolist(), None
        if self._scored and training and process_supervision.weight_of(self.args):
            steps = process_supervision.pay_steps(self, self._scored, output)
        if training and isinstance(self.args, GRPOConfig):
            reply_selection.count_silent(self, output)
        trained = reply_selection.leave_out_others(self, output) if training else None
        if self._scored and training and (self.keeps_rollouts or self.watch_replies):
            rollouts = rollouts_of(
                self,
                self._scored,
                self._prompt_lengths,
                advantages,
                None if trained is None else trained.tolist(),
                steps,
                first_group=self._first_group(len(advantages)),
            )
            if self.keeps_rollouts:
                rollouts = processes.gathered(rollouts)
                self._keep(rollouts)
            if self.watch_replies is not None:
                self.watch_replies(self.state.global_step + 1, rollouts)
        self._scored = None
        return output

    def _show_in_table(self, advantages: torch.Tensor) -> None:
        # TRL's table of completions has them as they were before those above were set to 0.
        shown: Any = self._logs["advantages"]
        everyones = self.accelerator.gather(advantages).tolist()
        for _ in everyones:
            shown.pop()
        shown.extend(everyones)

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        loss: torch.Tensor = super().training_step(*args, **kwargs)
        # Of `step_time`, what went into replies and rewards; the rest is training. Once a step, as
        # TRL does for `step_time`: a step may have several generations, or none.
        done, in_all = self._fusion.position
        if self.keeps_rollouts and done == in_all:
            self._metrics["train"]["rollout_time"].append(self._rollout_seconds)
            self._rollout_seconds = 0.0
        return loss

    def _first_group(self, rows: int) -> int:
        """How many groups this step has had before a generation of ``rows`` in each process."""
        before = self._groups_of_step
        self._groups_of_step += rows * self.accelerator.num_processes // self.num_generations
        return before

    def _keep(self, rollouts: list[Rollout]) -> None:
        if not self.accelerator.is_main_process:
            return
        within, part = self.args.gradient_accumulation_steps, ""
        if within > self.args.steps_per_generation:  # several generations in one step
            part = f"-part{self._fusion.position[0] + 1}"
        folder = Path(str(self.args.output_dir)) / "rollouts"
        write_rollouts(folder / f"step-{self.state.global_step + 1:06d}{part}.parquet", rollouts)

    def fast_path_report(self) -> list[str]:
        """As in ``FastTrainer``, and on which replies of a group it trains, if not on all."""
        lines = super().fast_path_report()
        if (count := reply_selection.wanted(self.args)) is not None:
            is_ours = not any(line.startswith("training: TRL's path") for line in lines)
            lines.append(reply_selection.in_words(count, self.num_generations, is_ours))
        return lines

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        # TRL would sample groups and log their rewards; people ask how many problems are solved.
        if self.evaluator is None:
            measured: dict[str, float] = super().evaluate(*args, **kwargs)
            return measured
        with self.whole_model() as model:
            metrics = {f"eval_{name}": value for name, value in self.evaluator(model).items()}
        # TRL would add what training has gathered since its last log, and forget it.
        gathered, self._metrics["train"] = self._metrics["train"], defaultdict(list)
        try:
            self.log(dict(metrics))
        finally:
            self._metrics["train"] = gathered
        self.control = self.callback_handler.on_evaluate(
            self.args, self.state, self.control, metrics
        )
        return metrics
