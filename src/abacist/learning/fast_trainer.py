"""TRL's trainer on our engine and our forward: the same mathematics, faster.

Completions come from ``policy.decoding``, log-probabilities from ``policy.scoring``, which computes
each prompt once. ``learning.fastpath`` says when that is what TRL computes; anything else takes
TRL's own path, part by part. Beside that, groups stay whole within a generation batch, a group
of equal rewards, or of none, counts as one without signal, and a model of which nothing can learn
is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
import trl
from accelerate.logging import get_logger
from torch.distributed.fsdp import FSDPModule
from trl.extras.profiling import profiling_context
from trl.trainer.utils import shuffle_sequence_dict, split_tensor_dict

from abacist.learning import fastpath, frozen, reply_selection, vllm_engine
from abacist.learning.micro_batch_fusion import MicroBatchFusion, Values
from abacist.policy import families
from abacist.policy.decoding import engine
from abacist.policy.decoding.progress import Decoded
from abacist.policy.families import FastPart
from abacist.policy.scoring.score import attention_choice, score
from abacist.policy.shards import WholeModel

logger = get_logger(__name__)


WatchStep = Callable[[int, str, float, float, str], None]
"""Told the progress of a step: its number, the part of it, what is done of a total, in words."""


class FastTrainer(trl.GRPOTrainer):
    """``trl.GRPOTrainer`` with its two costly parts, rollout and scoring, replaced.

    ``watch_step``, if set, is told how far each training step is.
    """

    # Trainer and GRPOTrainer declare types that are too narrow for mypy.
    args: Any
    model: Any
    num_generations: int
    num_generations_eval: int
    max_completion_length: int
    _buffered_inputs: Any

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._skip_rows: torch.Tensor | None = None  # [B], in the loss and nowhere else
        self._own_tokens: torch.Tensor | None = None  # [B, C], as above: those that the model wrote
        self._may_fuse = False  # in the loss and nowhere else
        self._logged: set[tuple[FastPart, str]] = set()
        self._fusion = MicroBatchFusion(self)
        self.watch_step: WatchStep | None = None
        self.add_callback(self._fusion)
        self._rewards = torch.zeros(0, 0)
        frozen.refuse(self.model, self.optimizer)
        self.whole = self._whole_of_shards()

    def _whole_of_shards(self) -> WholeModel | None:
        """What FSDP2's shards are gathered into. accelerate shards when training begins."""
        if not self.accelerator.is_fsdp2 or getattr(self.model, "is_quantized", False):
            return None
        return WholeModel(self.model, self.accelerator.device)

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """As TRL's."""
        if not isinstance(self.model, FSDPModule):
            self.whole = self._whole_of_shards()  # its modules may have changed since
        return super().train(*args, **kwargs)

    def create_optimizer(self, *args: Any, **kwargs: Any) -> Any:
        # Weights may have been frozen, or an adapter switched off, since the trainer was made.
        frozen.refuse(self.model)
        return super().create_optimizer(*args, **kwargs)

    def _calculate_rewards(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        self._rewards = super()._calculate_rewards(*args, **kwargs)
        return self._rewards

    def _generate_and_score_completions(self, inputs: Any) -> dict[str, Any]:
        output: dict[str, Any] = super()._generate_and_score_completions(inputs)
        training = self.model.training
        size = self.num_generations if training else self.num_generations_eval
        # TRL misses groups whose mean is rounded, and those with fewer than two rewards. Where
        # rewards are scaled by the batch, or normalised one by one, its value is of the batch.
        fractions = self._metrics["train" if training else "eval"]["frac_reward_zero_std"]
        fractions[-1] = reply_selection.has_equal_rewards(self, size).float().mean().item()
        return output

    def _generate_single_turn(
        self,
        prompt_ids: list[list[int]],
        images: Any,
        multimodal_fields: Any,
        num_generations: int,
        has_tool_images: bool = False,
    ) -> Any:
        # TRL repeats each prompt G times; the engine computes equal ones once, and is asked for
        # one completion of each. None: there are no log-probabilities of the sampling.
        if self._unsupported_reason(FastPart.DECODING) is not None:
            served = self.use_vllm and self.args.vllm_mode == "server"
            step = self.state.global_step + 1
            with vllm_engine.lost_if_silent(self.args, step) if served else nullcontext():
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
        with profiling_context(self, "abacist.engine"), self.whole_model() as model:
            # Built anew for each generation: it reads the weights as they are now.
            completions = engine.Engine(
                model,
                stop_ids=self.eos_token_ids,
                pad_id=self._tokenizer.pad_token_id,
                max_rows=len(prompt_ids),
            ).complete(
                prompt_ids, 1, self.max_completion_length, sampling, progress=self._tell_rollouts
            )
        completion_ids = [samples[0] for samples in completions]
        return completion_ids, None

    @contextmanager
    def whole_model(self) -> Iterator[Any]:
        """The policy with all its weights, which FSDP2's shards are gathered for: a collective."""
        model = self.accelerator.unwrap_model(self.model)
        if self.whole is None or not isinstance(model, FSDPModule):
            yield model
        else:
            with self.whole.gathered(model) as whole:
                yield whole

    def _prepare_inputs(self, generation_batch: Any) -> Any:
        # As TRL's, but the groups of a generation batch stay whole (`fastpath.whole_groups`).
        training = self.model is not None and self.model.training
        if not training or self._unsupported_reason(FastPart.SCORING) is not None:
            return super()._prepare_inputs(generation_batch)
        steps = self.args.steps_per_generation
        if self._step % (steps * self.num_iterations) == 0 or self._buffered_inputs is None:
            scored = self._generate_and_score_completions(generation_batch)
            if reply_selection.TRAINED_FRACTION in scored:
                whole = reply_selection.chosen_first(self, scored)
            elif fastpath.depends_on_company(self):
                whole = shuffle_sequence_dict(scored)
            else:
                whole = fastpath.whole_groups(scored, self.num_generations)
            self._buffered_inputs = split_tensor_dict(whole, steps)
        return self._buffered_inputs[self._step % steps]

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        with self._fusion.micro_batch():
            loss: torch.Tensor = super().training_step(*args, **kwargs)
            return loss

    def _tell_rollouts(self, found: Decoded) -> None:
        self._tell("rollouts", found.written_tokens, found.expected_tokens, found.words())

    def _tell(self, part: str, done: float, total: float, words: str) -> None:
        if self.watch_step is not None and self.model.training:
            self.watch_step(self.state.global_step + 1, part, done, total, words)

    def _compute_loss(self, model: Any, inputs: Any) -> torch.Tensor:
        done, total = self._fusion.position
        self._tell("training", done, total, f"micro-batch {done + 1} of {total}")
        # Completions that cannot contribute need no forward; only here are advantages at hand.
        # An evaluation wants its metrics over all of them.
        training = self.model.training
        self._skip_rows = fastpath.zero_advantage_rows(self, inputs) if training else None
        self._own_tokens = reply_selection.loss_mask(inputs).bool()
        # Not where something wraps the model (DDP): it must see forward and backward in turn.
        self._may_fuse = training and model is self.model
        metrics = self._metrics["train" if training else "eval"]
        logged = {name: len(values) for name, values in metrics.items()}
        try:
            loss: torch.Tensor = super()._compute_loss(model, inputs)
            if reply_selection.is_empty(inputs):  # it has no entropy, for example, not one of 0
                for name, values in metrics.items():
                    del values[logged.get(name, 0) :]
            return reply_selection.normalised(loss, self, inputs)
        finally:
            self._skip_rows, self._own_tokens, self._may_fuse = None, None, False

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
        is_policy = model is self.model or model is self.model_wrapped
        if not is_policy or self._unsupported_reason(FastPart.SCORING) is not None:
            if is_policy:  # a hook was added within a step: what was fused ends here
                self._fusion.close()
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

        may_fuse = self._may_fuse and batch_size is None

        def score_rows(ids: torch.Tensor, mask: torch.Tensor, skip: torch.Tensor | None) -> Values:
            with self.accelerator.autocast():
                return score(
                    model,
                    ids,
                    mask,
                    logits_to_keep,
                    temperature=self.temperature,
                    compute_entropy=compute_entropy,
                    skip_rows=skip,
                    prefix=self._fusion.prefix() if may_fuse else None,
                )

        fused = None
        if may_fuse:
            fused = self._fusion.values_of(input_ids, attention_mask, self._skip_rows, score_rows)
        if fused is not None:
            logps, entropies = fused
        else:
            # As in TRL, `batch_size` bounds how many completions one forward has.
            parts = []
            for rows in torch.arange(len(input_ids)).split(batch_size or len(input_ids)):
                skip = None if self._skip_rows is None else self._skip_rows[rows]
                parts.append(score_rows(input_ids[rows], attention_mask[rows], skip))
            logps = torch.cat([part[0] for part in parts])
            known = [part[1] for part in parts if part[1] is not None]
            entropies = torch.cat(known) if known else None
        if entropies is not None and self._skip_rows is not None and self._own_tokens is not None:
            # Skipped rows get the mean of the others, which so stays the mean that is logged.
            scored = self._own_tokens & ~self._skip_rows[:, None]
            if bool(scored.any()):
                entropies[self._skip_rows] = entropies[scored].mean()
        return logps, entropies, None  # no auxiliary loss

    def fast_path_report(self) -> list[str]:
        """What computes each part of a step, a line each, with the reason where it is not ours."""
        if not self.model.training:
            # Dropout, for example, matters in training only, which this is about.
            self.model.train()
            try:
                return self.fast_path_report()
            finally:
                self.model.eval()
        lines, on_cuda = [], self.model.device.type == "cuda"
        if (why := self._unsupported_reason(FastPart.DECODING)) is not None:
            lines.append(f"rollouts: TRL's path ({why})")
        else:
            words = ["our engine", "with its own attention"]
            if on_cuda:
                why = families.unsupported_reason(self.model, FastPart.CUDA_GRAPHS)
                words[1:1] = ["by CUDA graphs" if why is None else f"without CUDA graphs ({why})"]
            lines.append(f"rollouts: {', '.join(words)}")
        if not on_cuda:
            why = families.unsupported_reason(self.model, FastPart.KERNELS)
            lines.append(_used(FastPart.KERNELS, why))
        if (why := self._unsupported_reason(FastPart.SCORING)) is not None:
            return [*lines, f"training: TRL's path ({why})"]
        lines.append("training: each prompt computed once for its group")
        parts = (FastPart.FUSED_LAYERS, FastPart.LORA_PRODUCTS, FastPart.MICRO_BATCH_FUSION)
        with self.accelerator.autocast():
            choice = attention_choice(self.model)
            lines.append(f"{choice.what}: {choice.value} ({choice.why})")
            lines += [_used(part, fastpath.unsupported_reason(self, part)) for part in parts]
        return lines

    def _unsupported_reason(self, part: FastPart) -> str | None:
        """Why ``part`` is left to TRL now, logged once; None: it is not.

        Asked at every step: a hook may be added, or a module be replaced, at any time.
        """
        why = fastpath.unsupported_reason(self, part)
        if why is not None and fastpath.wanted(self.args) and (part, why) not in self._logged:
            self._logged.add((part, why))
            name = "rollouts" if part is FastPart.DECODING else "training"
            logger.warning("Abacist: TRL's own path for %s, because %s.", name, why)
        return why


def _used(part: FastPart, why: str | None) -> str:
    return f"{part}: used" if why is None else f"{part}: not used ({why})"
