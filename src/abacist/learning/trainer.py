"""``abacist.GRPOTrainer``: TRL's trainer, with few overrides, each for a reason.

A script that imports this class instead of ``trl.GRPOTrainer`` and passes a plain
``trl.GRPOConfig`` gets the same mathematics faster: completions from our engine, log-probabilities
from a forward that reads each prompt once (``learning.fastpath`` says when, and why not).
What else is added is asked for: rollouts are kept when ``abacist.GRPOConfig.keep_rollouts`` says
so, and ``evaluator`` replaces TRL's evaluation (sampled groups and their rewards) by held-out
accuracy, measured as the verdict measures it.

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
from accelerate.logging import get_logger
from accelerate.utils import gather_object
from trl.extras.profiling import profiling_context
from trl.trainer.utils import split_tensor_dict

from abacist.learning import canary, fastpath, sampling
from abacist.learning.arguments import GRPOConfig
from abacist.policy import engine, scoring
from abacist.records.rollout import Rollout, StopReason, write_rollouts
from abacist.task.answers import same_answer
from abacist.task.reply import completion_text, parse_reply

logger = get_logger(__name__)

Evaluator = Callable[[Any], Mapping[str, float]]


class GRPOTrainer(trl.GRPOTrainer):
    """``trl.GRPOTrainer`` that can keep its rollouts and measure held-out accuracy.

    Args:
        evaluator: called with the model at every evaluation; returns metrics without prefix,
            such as ``{"accuracy": 0.61}``, which are logged as ``eval_accuracy`` and can serve as
            ``metric_for_best_model``. None keeps TRL's evaluation.
        everything else: as in ``trl.GRPOTrainer``.
    """

    # Trainer and GRPOTrainer declare these too narrowly to be worked with.
    args: Any
    num_generations: int
    max_completion_length: int
    _buffered_inputs: Any

    def __init__(self, *args: Any, evaluator: Evaluator | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.evaluator = evaluator
        self._prompt_lengths: list[int] = []
        self._scored: dict[str, Any] = {}
        self._silent: torch.Tensor | None = None
        self._obstacles: dict[str, str | None] = {}
        self.problem_sampler = sampling.sampler_for(self)

    @property
    def keeps_rollouts(self) -> bool:
        """Whether completions are written to ``output_dir/rollouts``."""
        return isinstance(self.args, GRPOConfig) and self.args.keep_rollouts

    def _get_train_sampler(self, dataset: Any = None) -> Any:
        # Which problems next; TRL's shuffled epochs unless `problem_sampling` says otherwise.
        if self.problem_sampler is None:
            return super()._get_train_sampler(dataset)
        return self.problem_sampler

    def _generate(self, prompts: list[Any]) -> Any:
        # Prompt lengths are known here and nowhere later; the ids are encoded once, by TRL.
        generated = super()._generate(prompts)
        self._prompt_lengths = [len(ids) for ids in generated[0]]
        return generated

    def _generate_single_turn(
        self,
        prompt_ids: list[list[int]],
        images: Any,
        multimodal_fields: Any,
        num_generations: int,
        has_tool_images: bool = False,
    ) -> Any:
        # One prefill a prompt, merged weights, rows that have ended leave the batch.
        if self._takes_trls_path("rollouts", fastpath.rollout_obstacle):
            return super()._generate_single_turn(
                prompt_ids, images, multimodal_fields, num_generations, has_tool_images
            )
        sampling = engine.Sampling(
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=self.top_k,
            min_p=self.min_p,
            repetition_penalty=self.repetition_penalty,
        )
        with profiling_context(self, "abacist.engine"):
            # Built anew for each generation: it reads the weights as they are now.
            completions = engine.Engine(
                self.accelerator.unwrap_model(self.model),
                stop_ids=self.eos_token_ids,
                pad_id=self._tokenizer.pad_token_id,
                max_rows=len(prompt_ids),
            ).complete(prompt_ids, 1, self.max_completion_length, sampling)
        completion_ids = [samples[0] for samples in completions]
        return completion_ids, None

    def _prepare_inputs(self, generation_batch: Any) -> Any:
        # As TRL's, but the groups of a generation batch stay whole (`fastpath.whole_groups`).
        training = self.model is not None and self.model.training
        if not training or self._takes_trls_path("training", fastpath.scoring_obstacle):
            return super()._prepare_inputs(generation_batch)
        steps = self.args.steps_per_generation
        if self._step % (steps * self.num_iterations) == 0 or self._buffered_inputs is None:
            scored = self._generate_and_score_completions(generation_batch)
            whole = fastpath.whole_groups(scored, self.num_generations)
            self._buffered_inputs = split_tensor_dict(whole, steps)
        return self._buffered_inputs[self._step % steps]

    def _compute_loss(self, model: Any, inputs: Any) -> torch.Tensor:
        # Completions that cannot contribute need not be read; only here are advantages at hand.
        self._silent = fastpath.silent_rows(self, inputs)
        try:
            loss: torch.Tensor = super()._compute_loss(model, inputs)
            return loss
        finally:
            self._silent = None

    def _get_per_token_logps_and_entropies(
        self,
        model: Any,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        logits_to_keep: int,
        batch_size: int | None = None,
        compute_entropy: bool = False,
        compute_aux_loss: bool = False,
        **multimodal: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
        # Serves the policy, the old policy and the reference (an adapter that is switched off).
        is_ours = model is self.model or model is self.model_wrapped
        if not is_ours or self._takes_trls_path("training", fastpath.scoring_obstacle):
            return super()._get_per_token_logps_and_entropies(
                model,
                input_ids,
                attention_mask,
                logits_to_keep,
                batch_size,
                compute_entropy,
                compute_aux_loss,
                **multimodal,
            )
        # As in TRL, `batch_size` bounds how many completions are read at once.
        parts = []
        for rows in torch.arange(len(input_ids)).split(batch_size or len(input_ids)):
            with self.accelerator.autocast():
                part = scoring.score(
                    model,
                    input_ids[rows],
                    attention_mask[rows],
                    logits_to_keep,
                    temperature=self.temperature,
                    compute_entropy=compute_entropy,
                    skip_rows=None if self._silent is None else self._silent[rows],
                )
            parts.append(part)
        logps = torch.cat([part[0] for part in parts])
        known = [part[1] for part in parts if part[1] is not None]
        entropies = torch.cat(known) if known else None
        if entropies is not None and self._silent is not None:
            # Rows that were not read get the mean of the others, which so stays the mean logged.
            read = attention_mask[:, -logits_to_keep:].bool() & ~self._silent[:, None]
            entropies[self._silent] = entropies[read].mean()
        return logps, entropies, None

    def paths(self) -> list[str]:
        """Which path rollouts and training take, and why where it is not ours."""
        parts = (
            ("rollouts", fastpath.rollout_obstacle, "our engine"),
            ("training", fastpath.scoring_obstacle, "each prompt read once for its group"),
        )
        return [
            f"{part}: TRL's path ({self._obstacles[part]})"
            if self._takes_trls_path(part, obstacle)
            else f"{part}: {ours}"
            for part, obstacle, ours in parts
        ]

    def _takes_trls_path(self, part: str, obstacle: Callable[[Any], str | None]) -> bool:
        """Whether ``part`` cannot take our path; what is found is kept, and said once."""
        if part not in self._obstacles:
            self._obstacles[part] = found = obstacle(self)
            if found is not None and fastpath.wanted(self.args):
                logger.warning("Abacist: TRL's own path for %s, because %s.", part, found)
        return self._obstacles[part] is not None

    def _calculate_rewards(
        self, inputs: Any, prompts: Any, completions: Any, completion_ids_list: Any
    ) -> torch.Tensor:
        # TRL keeps only the means of these; a rollout needs each one.
        rewards_per_func = super()._calculate_rewards(
            inputs, prompts, completions, completion_ids_list
        )
        if self.problem_sampler is not None and self.model is not None and self.model.training:
            # Every process must hear the same, since each draws the order for itself.
            self.problem_sampler.observe(gather_object(sampling.outcomes(inputs, completions)))
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
        every = getattr(self.args, "vllm_canary_steps", 0)
        if self.use_vllm and every and self.state.global_step % every == 0:
            canary.check(self, output, self.state.global_step + 1)
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
