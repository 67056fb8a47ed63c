"""Trainers with a stopwatch: the same step, timed and measured alike in stock TRL and in ours.

How equal work is forced:

* **Batches.** Every step has prompts and lengths of its own, drawn from its number, the same in
  both trainers (batches.py). ``Setup.equal_batches`` gives every step those of step 0 instead,
  which flatters whoever compiles or caches by shape.
* **Rollout.** Every row ends at the length drawn for it (forcing.py) and is never ended by the
  model: its end token is one that it (almost) never samples. The longest row uses the whole
  budget. Where the decoder is not to be touched
  (``Setup.draws_lengths`` off, as on a GPU), every row is decoded to the full budget; stock
  pays that anyway, because it decodes until the slowest row ends, so the ratio of rollouts is
  then a lower bound for an engine that lets finished rows go.
* **Training.** What was decoded is then put aside, and both train on the same replies of these
  lengths, with rewards that leave no group without variance. No row can be skipped, so the
  ratio is a lower bound for real runs, which hold groups that teach nothing.

The clock of a step runs from transformers' ``on_step_begin`` to ``on_step_end``: tokenizing,
rollout, rewards, forward, backward, optimizer. Training is the step without the rollout; the
rollout is all of ``_generate``. Gradient checkpointing is switched on inside ``Trainer.train``,
so that is what is called, for one step at a time.
"""

from __future__ import annotations

import contextlib
import sys
import tempfile
import time
import warnings
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import transformers
import trl
from datasets import Dataset

import abacist
from abacist.policy.loading import default_lora, quiet_libraries
from batches import Batch, draw_batch, small_batch, uneven_reward
from forcing import check, forced_engine, forced_generate
from models import SHAPES, build_model, build_tokenizer

STOCK, OURS = "stock", "ours"


@dataclass(frozen=True)
class Setup:
    """One cell of a bench, for one trainer."""

    model: str
    shots: int
    prompts_per_step: int
    generations: int = 8
    checkpointing: bool = True
    dtype: str = "float32"
    device: str = "cpu"
    budget_tokens: int | None = None  # None: the longest reply of the shape
    draws_lengths: bool = True
    equal_batches: bool = False
    extra: dict[str, Any] = field(default_factory=dict)  # further settings of GRPOConfig

    @property
    def max_completion_tokens(self) -> int:
        return self.budget_tokens or SHAPES[self.model].lengths[1]


@dataclass
class StepTime:
    """One optimizer step. ``decoded_tokens`` is the mean length of a row before it was replaced,
    ``longest_tokens`` the greatest: so often were the weights read."""

    step_seconds: float = 0.0
    rollout_seconds: float = 0.0
    decoded_tokens: float = 0.0
    longest_tokens: int = 0
    prompt_tokens: float = 0.0

    @property
    def training_seconds(self) -> float:
        return self.step_seconds - self.rollout_seconds


class _StepClock(transformers.TrainerCallback):
    """Writes the length of a step into ``time``; ``in_rollout`` while completions are written."""

    def __init__(self, on_cuda: bool) -> None:
        self.time, self.on_cuda, self.started = StepTime(), on_cuda, 0.0
        self.in_rollout = False

    def now(self) -> float:
        if self.on_cuda:
            torch.cuda.synchronize()
        return time.perf_counter()

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        self.started = self.now()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.time.step_seconds = self.now() - self.started


class Bench:
    """A trainer that can be asked for one timed step after another."""

    def __init__(self, kind: str, setup: Setup) -> None:
        quiet_libraries()
        # The deprecation of a name that works everywhere, and TRL's remarks about a bare model.
        warnings.filterwarnings("ignore", category=FutureWarning)
        on_cuda = setup.device == "cuda"
        self.kind, self.setup = kind, setup
        self.clock = _StepClock(on_cuda)
        self.batch = self._batch(0)
        model = build_model(setup.model, dtype=getattr(torch, setup.dtype), device=setup.device)
        if setup.extra.get("use_vllm"):
            self.folder = _save_for_vllm(model, setup.model)
        self.trainer = self._trainer_class()(
            model=model,
            reward_funcs=uneven_reward,
            args=_arguments(setup),
            train_dataset=Dataset.from_list(self.batch.rows),
            processing_class=build_tokenizer(setup.model),
            peft_config=default_lora(),
            callbacks=[self.clock],
        )
        self.trainer.remove_callback(transformers.PrinterCallback)

    def step(self, number: int) -> StepTime:
        """Take one optimizer step on the batch of this number, and say how long it took."""
        return self._step(self._batch(number))

    def small_step(self) -> StepTime:
        """The same on hardly any tokens, to have everything loaded and compiled that a step uses
        whatever its size."""
        setup = self.setup
        few = {"prompts": setup.prompts_per_step, "generations": setup.generations}
        return self._step(small_batch(setup.model, **few))

    def _step(self, batch: Batch) -> StepTime:
        self.batch = batch
        # `train` begins anew, with a loader for what stands here.
        self.trainer.train_dataset = Dataset.from_list(batch.rows)
        with contextlib.redirect_stdout(sys.stderr):  # Trainer prints its summary
            self.trainer.train()
        return replace(self.clock.time)

    def _batch(self, number: int) -> Batch:
        setup = self.setup
        return draw_batch(
            setup.model,
            shots=setup.shots,
            prompts=setup.prompts_per_step,
            generations=setup.generations,
            number=0 if setup.equal_batches else number,
        )

    def _trainer_class(self) -> type[Any]:
        """TRL's class or ours, which times the rollout and then trains on the fixed replies."""
        bench, clock, setup = self, self.clock, self.setup
        base: Any = {STOCK: trl.GRPOTrainer, OURS: abacist.GRPOTrainer}[self.kind]
        end_id = build_tokenizer(setup.model).eos_token_id

        class Timed(base):
            def _generate(self, prompts: list[Any]) -> Any:
                lengths = bench.batch.lengths
                if not setup.draws_lengths:
                    lengths = [setup.max_completion_tokens] * len(lengths)
                forcing: contextlib.AbstractContextManager[None] = contextlib.nullcontext()
                if setup.draws_lengths and bench.kind == OURS:
                    forcing = forced_engine(lengths, end_id)
                elif setup.draws_lengths:
                    forcing = forced_generate(self.model, lengths, end_id)
                with forcing:
                    started, clock.in_rollout = clock.now(), True
                    prompt_ids, completion_ids, *rest = super()._generate(prompts)
                    clock.time.rollout_seconds = clock.now() - started
                    clock.in_rollout = False
                check(completion_ids, lengths)
                clock.time.decoded_tokens = sum(map(len, completion_ids)) / len(completion_ids)
                clock.time.longest_tokens = max(map(len, completion_ids))
                clock.time.prompt_tokens = sum(map(len, prompt_ids)) / len(prompt_ids)
                tool_mask, completions, _, *others = rest  # log-probabilities of other replies
                fixed = [list(ids) for ids in bench.batch.replies]
                return prompt_ids, fixed, tool_mask, completions, None, *others

        return Timed


def _save_for_vllm(model: Any, name: str) -> tempfile.TemporaryDirectory[str]:
    """vLLM loads a model by name: write it where ``model`` then says it came from."""
    folder = tempfile.TemporaryDirectory()
    model.save_pretrained(folder.name)
    build_tokenizer(name).save_pretrained(folder.name)
    model.name_or_path = model.config._name_or_path = folder.name
    return folder


def _arguments(setup: Setup) -> trl.GRPOConfig:
    """As the gist runs: one group a micro-batch, one micro-batch a problem, AdamW, clipping."""
    on_cuda = setup.device == "cuda"
    settings: dict[str, Any] = {
        "output_dir": "runs/bench-scratch",
        "use_cpu": not on_cuda,
        "bf16": on_cuda and setup.dtype == "bfloat16",
        "per_device_train_batch_size": setup.generations,
        "gradient_accumulation_steps": setup.prompts_per_step,
        "num_generations": setup.generations,
        "max_completion_length": setup.max_completion_tokens,
        "gradient_checkpointing": setup.checkpointing,
        "max_steps": 1,
        "learning_rate": 5e-6,
        "lr_scheduler_type": "constant",
        "adam_beta2": 0.99,
        "weight_decay": 0.1,
        "max_grad_norm": 0.1,
        "temperature": 1.0,
        "shuffle_dataset": False,
        "save_strategy": "no",
        "logging_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
        "seed": 0,
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return trl.GRPOConfig(**{**settings, **setup.extra})
