"""TRL's trainer on our engine and our forward: the same mathematics, faster.

Completions come from ``policy.engine``, log-probabilities from a forward that reads each prompt
once (``policy.scoring``). ``learning.fastpath`` says when that computes what TRL computes; anything
else takes TRL's own path, part by part. Nothing else of TRL's trainer is changed here.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import trl
from accelerate.logging import get_logger
from trl.extras.profiling import profiling_context
from trl.trainer.utils import split_tensor_dict

from abacist.learning import fastpath, frozen
from abacist.learning.joint import MicroBatches, Values
from abacist.policy import blocks, instances, products, scoring
from abacist.policy.decoding import engine, graphs
from abacist.policy.decoding.progress import Decoded

logger = get_logger(__name__)


WatchStep = Callable[[int, str, float, float, str], None]
"""Told how far a step is: its number, the part of it, what is done of a total, and in words."""


class FastTrainer(trl.GRPOTrainer):
    """``trl.GRPOTrainer`` with its two costly parts, rollout and scoring, replaced.

    ``watch_step``, if set, is told how far each training step is.
    """

    # Trainer and GRPOTrainer declare these too narrowly to be worked with.
    args: Any
    model: Any
    num_generations: int
    num_generations_eval: int
    max_completion_length: int
    _buffered_inputs: Any

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._silent: torch.Tensor | None = None
        self._obstacles: dict[str, str | None] = {}  # as they were found last, part by part
        self._said: set[tuple[str, str]] = set()
        self._micro_batches = MicroBatches(self)
        self._reads_jointly = False  # in the loss, and nowhere else
        self.watch_step: WatchStep | None = None
        self.add_callback(self._micro_batches)
        self._rewards = torch.zeros(0, 0)
        frozen.refuse(self.model, self.optimizer)

    def create_optimizer(self, *args: Any, **kwargs: Any) -> Any:
        # Weights may have been frozen, or an adapter switched off, since the trainer was made.
        frozen.refuse(self.model)
        return super().create_optimizer(*args, **kwargs)

    def _calculate_rewards(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        self._rewards = super()._calculate_rewards(*args, **kwargs)
        return self._rewards

    def _generate_and_score_completions(self, inputs: Any) -> dict[str, Any]:
        output: dict[str, Any] = super()._generate_and_score_completions(inputs)
        # Where fewer than two replies of a group have a reward (None is none), the group teaches
        # nothing. TRL gives it advantages of 0, and counts it as one whose rewards differ.
        training = self.model.training
        size = self.num_generations if training else self.num_generations_eval
        has_reward = ~self._rewards.isnan().all(dim=1)  # [N, functions], of all processes
        silent = (has_reward.view(-1, size).sum(dim=1) < 2).float().mean().item()
        fractions = self._metrics["train" if training else "eval"]["frac_reward_zero_std"]
        fractions[-1] = min(1.0, fractions[-1] + silent)
        return output

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
            ).complete(
                prompt_ids, 1, self.max_completion_length, sampling, progress=self._tell_rollouts
            )
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

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        with self._micro_batches.turn():
            loss: torch.Tensor = super().training_step(*args, **kwargs)
            return loss

    def _tell_rollouts(self, found: Decoded) -> None:
        self._tell("rollouts", found.written_tokens, found.expected_tokens, found.words())

    def _tell(self, part: str, done: float, total: float, words: str) -> None:
        if self.watch_step is not None and self.model.training:
            self.watch_step(self.state.global_step + 1, part, done, total, words)

    def _compute_loss(self, model: Any, inputs: Any) -> torch.Tensor:
        done, total = self._micro_batches.position
        self._tell("training", done, total, f"micro-batch {done + 1} of {total}")
        # Completions that cannot contribute need not be read; only here are advantages at hand.
        # An evaluation wants its metrics over all of them.
        self._silent = fastpath.silent_rows(self, inputs) if self.model.training else None
        # Not where something wraps the model (DDP): it must see forward and backward in turn.
        self._reads_jointly = self.model.training and model is self.model
        try:
            loss: torch.Tensor = super()._compute_loss(model, inputs)
            return loss
        finally:
            self._silent, self._reads_jointly = None, False

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

        def score(ids: torch.Tensor, mask: torch.Tensor, silent: torch.Tensor | None) -> Values:
            with self.accelerator.autocast():
                return scoring.score(
                    model,
                    ids,
                    mask,
                    logits_to_keep,
                    temperature=self.temperature,
                    compute_entropy=compute_entropy,
                    skip_rows=silent,
                )

        read_already = None
        if self._reads_jointly and batch_size is None:
            read_already = self._micro_batches.part(input_ids, attention_mask, self._silent, score)
        if read_already is not None:
            logps, entropies = read_already
        else:
            # As in TRL, `batch_size` bounds how many completions are read at once.
            parts = []
            for rows in torch.arange(len(input_ids)).split(batch_size or len(input_ids)):
                silent = None if self._silent is None else self._silent[rows]
                parts.append(score(input_ids[rows], attention_mask[rows], silent))
            logps = torch.cat([part[0] for part in parts])
            known = [part[1] for part in parts if part[1] is not None]
            entropies = torch.cat(known) if known else None
        if entropies is not None and self._silent is not None:
            # Rows that were not read get the mean of the others, which so stays the mean logged.
            read = attention_mask[:, -logits_to_keep:].bool() & ~self._silent[:, None]
            entropies[self._silent] = entropies[read].mean()
        return logps, entropies, None

    def paths(self) -> list[str]:
        """Which path rollouts and training take, why where it is not ours, and who attends."""
        graphed = graphs.description(self.model.device)
        engines = ", ".join(filter(None, ("our engine", graphed, "with its own attention")))
        parts = (
            ("rollouts", fastpath.rollout_obstacle, engines),
            ("training", fastpath.scoring_obstacle, "each prompt read once for its group"),
        )
        if not self.model.training:
            # Dropout, for example, is an obstacle in training only, which this is about.
            self.model.train()
            try:
                return self.paths()
            finally:
                self.model.eval()
        lines = [
            f"{part}: TRL's path ({self._obstacles[part]})"
            if self._takes_trls_path(part, obstacle)
            else f"{part}: {ours}"
            for part, obstacle, ours in parts
        ]
        if self._obstacles["training"] is None:
            with self.accelerator.autocast():
                choice = scoring.attention_choice(self.model)
            lines.append(f"{choice.what}: {choice.value} ({choice.why})")
        return lines

    def _takes_trls_path(self, part: str, obstacle: Callable[[Any], str | None]) -> bool:
        """Whether ``part`` cannot take our path now, for a reason that is said once.

        Asked at every turn: a hook may be added, or a module be replaced, at any time.
        """
        before, found = self._obstacles.get(part), obstacle(self)
        if part == "training":
            if found is None and (before is not None or part not in self._obstacles):
                products.fuse_linears(self.model)
                blocks.fuse_layers(self.model)
            elif found is not None and before is None:
                self._micro_batches.close()  # first: its backward may compute layers once more
                instances.step_aside(self.model)  # TRL's path is to meet the modules themselves
        self._obstacles[part] = found
        if found is not None and fastpath.wanted(self.args) and (part, found) not in self._said:
            self._said.add((part, found))
            logger.warning("Abacist: TRL's own path for %s, because %s.", part, found)
        return found is not None
