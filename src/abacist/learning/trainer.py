"""``abacist.GRPOTrainer``: TRL's trainer, with few overrides, each for a reason.

A script that imports this class instead of ``trl.GRPOTrainer`` and passes a plain
``trl.GRPOConfig`` behaves as before. What is added is asked for: rollouts are kept when
``abacist.GRPOConfig.keep_rollouts`` says so, and ``evaluator`` replaces TRL's evaluation
(sampled groups and their rewards) by held-out accuracy, measured as the verdict measures it.

The mathematics is TRL's, and so GRPO's (Shao et al. 2024, arXiv 2402.03300, section 4): no
critic, G completions of each prompt from the old policy, advantages from the group's own
mean and standard deviation, a clipped ratio. Departures by default, both TRL's: no KL term
(``beta`` 0), and the token-level ``dapo`` loss instead of the mean over each completion.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import trl

from abacist.learning.arguments import GRPOConfig
from abacist.records.rollout import Rollout, StopReason, write_rollouts
from abacist.task.answers import same_answer
from abacist.task.reply import completion_text, parse_reply

Evaluator = Callable[[Any], Mapping[str, float]]


class GRPOTrainer(trl.GRPOTrainer):
    """``trl.GRPOTrainer`` that can keep its rollouts and measure held-out accuracy.

    Args:
        evaluator: called with the model at every evaluation; returns metrics without prefix,
            such as ``{"accuracy": 0.61}``, which are logged as ``eval_accuracy`` and can serve as
            ``metric_for_best_model``. None keeps TRL's evaluation.
        everything else: as in ``trl.GRPOTrainer``.
    """

    def __init__(self, *args: Any, evaluator: Evaluator | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.evaluator = evaluator
        self._prompt_lengths: list[int] = []
        self._scored: dict[str, Any] = {}

    @property
    def keeps_rollouts(self) -> bool:
        """Whether completions are written to ``output_dir/rollouts``."""
        return isinstance(self.args, GRPOConfig) and self.args.keep_rollouts

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
        first = self.accelerator.process_index * len(prompts)
        self._scored = {
            "rows": inputs,
            "prompts": prompts,
            "completions": completions,
            "completion_ids": completion_ids_list,
            "rewards": rewards_per_func[first : first + len(prompts)],
        }
        return rewards_per_func

    def _generate_and_score_completions(self, inputs: Any) -> dict[str, Any]:
        # The first moment at which the rewards and advantages of a generation batch are both
        # known, and the last at which its groups are whole: `_prepare_inputs` shuffles them.
        output: dict[str, Any] = super()._generate_and_score_completions(inputs)
        if self.keeps_rollouts and self.model is not None and self.model.training:
            several = self.accelerator.num_processes > 1
            rank = f"-rank{self.accelerator.process_index}" if several else ""
            folder = Path(str(self.args.output_dir)) / "rollouts"
            write_rollouts(
                folder / f"step-{self.state.global_step + 1:06d}{rank}.parquet",
                self._rollouts(output["advantages"].tolist()),
            )
        self._scored = {}
        return output

    def _rollouts(self, advantages: list[float]) -> list[Rollout]:
        """This process's rows of the generation batch, group by group."""
        rewards = self._scored["rewards"]
        totals = torch.nansum(rewards * self.reward_weights.to(rewards.device), dim=1).tolist()
        first = self.accelerator.process_index * len(totals)
        stop_ids = set(self.eos_token_ids)
        rollouts = []
        columns = ("rows", "prompts", "completions", "completion_ids")
        for index, (row, prompt, completion, ids) in enumerate(
            zip(*(self._scored[column] for column in columns), strict=True)
        ):
            text = completion_text(completion)
            answer = parse_reply(text).answer
            gold = row.get("answer")
            paid = zip(self.reward_func_names, rewards[index].tolist(), strict=True)
            rollouts.append(
                Rollout(
                    run_id=Path(str(self.args.output_dir)).name,
                    step=self.state.global_step + 1,
                    split="train",
                    group=(first + index) // self.num_generations,
                    member=(first + index) % self.num_generations,
                    messages=_messages(prompt),
                    completion=text,
                    completion_ids=list(ids),
                    prompt_tokens=self._prompt_lengths[index],
                    completion_tokens=len(ids),
                    stop_reason=StopReason.of(ids, stop_ids),
                    problem_id=row.get("problem_id"),
                    difficulty=row.get("difficulty"),
                    gold=gold if isinstance(gold, str) else None,
                    read_answer=answer,
                    is_correct=same_answer(answer, gold) if isinstance(gold, str) else None,
                    rewards={name: None if math.isnan(value) else value for name, value in paid},
                    reward=totals[index],
                    advantage=advantages[index],
                )
            )
        return rollouts

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        # TRL would sample groups and log their rewards; people ask how many problems are solved.
        if self.evaluator is None:
            measured: dict[str, float] = super().evaluate(*args, **kwargs)
            return measured
        metrics = {f"eval_{name}": value for name, value in self.evaluator(self.model).items()}
        self.log(dict(metrics))
        self.control = self.callback_handler.on_evaluate(
            self.args, self.state, self.control, metrics
        )
        return metrics


def _messages(prompt: Any) -> list[dict[str, str]]:
    """A prompt as messages; plain-text prompts (a stranger's data) become one user turn."""
    if isinstance(prompt, str):
        return [{"role": "user", "content": prompt}]
    return [{"role": turn["role"], "content": completion_text([turn])} for turn in prompt]
