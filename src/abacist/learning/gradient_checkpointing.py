"""``--gradient_checkpointing auto``: on where memory asks for it, off where it does not.

Gradient checkpointing keeps the inputs of the layers only and computes a layer again when its
gradients are wanted. That saves memory and costs one more forward of every micro-batch: about a
third of the training. Which is better here is decided by what the training would take without it
and by the memory that there is, both measured before the run begins, and printed.

It changes no number: on a CPU weights are equal to the bit with and without it (a test holds that),
so a resumed run decides anew, by the memory of the machine that it then runs on.
"""

from __future__ import annotations

from typing import Any

from peft import PeftModel

from abacist.errors import first_line
from abacist.learning import fastpath, processes
from abacist.learning.config import Config
from abacist.learning.dryrun.memory import (
    ROOMY_FRACTION,
    SAFE_FRACTION,
    gib,
    measure_forward,
    plan_memory,
    with_micro_batch,
)
from abacist.learning.estimate.trial import random_states_kept
from abacist.learning.task import Task
from abacist.policy.families import FastPart
from abacist.policy.loading import Policy

SAMPLE_PROBLEMS = 16  # the longest of them stands for all


def decide(config: Config, task: Task, policy: Policy, trainer: Any) -> str | None:
    """Switch it on or off in ``trainer.args`` if that is left to us; the reason as a line.

    None where the configuration says true or false. Call it before training, and before anything
    asks the arguments.
    """
    if not config.chooses_checkpointing:
        return None
    # Every process measures, and memory is not the same in all: one decides.
    choice = _choice(config, task, policy, trainer)
    is_on, why = processes.from_main(lambda: choice)
    for args in (trainer.args, config.training):
        args.gradient_checkpointing = args.activation_checkpointing = is_on
    if is_on and isinstance(trainer.model, PeftModel):
        trainer.model.enable_input_require_grads()  # as TRL does where it is on from the start
    return f"gradient checkpointing: {'on' if is_on else 'off'} ({why})"


def _choice(config: Config, task: Task, policy: Policy, trainer: Any) -> tuple[bool, str]:
    questions = sorted(task.train, key=lambda problem: len(problem.question))[-SAMPLE_PROBLEMS:]
    prompt_tokens = max(len(policy.chat.encode(row["prompt"])) for row in task.rows(questions))
    budget, rows = config.max_completion_tokens, trainer.args.per_device_train_batch_size
    try:
        # The padded forward keeps attention weights in places, and these do not grow linearly.
        is_linear = fastpath.unsupported_reason(trainer, FastPart.SCORING) is None
        with random_states_kept():  # a forward in training may draw dropout
            forward = measure_forward(trainer, prompt_tokens, budget, is_quick=is_linear)
    except (MemoryError, RuntimeError) as error:
        return True, f"what a forward keeps could not be measured: {first_line(error)[:120]}"
    memory = plan_memory(trainer, forward, prompt_tokens, eval_rows=0)
    without, with_ = (
        with_micro_batch(memory, trainer, forward, rows, is_on).training_bytes
        for is_on in (False, True)
    )
    there = memory.available_bytes
    if with_ >= without:
        return False, f"it would save nothing: training takes {gib(without)} either way"
    if without <= ROOMY_FRACTION * there:
        return False, (
            f"training takes {gib(without)} of {gib(there)} available; on would take "
            f"{gib(with_)} and cost about a third of the training time"
        )
    why = (
        f"training would take {gib(without)} of {gib(there)} available without it, and {gib(with_)}"
    )
    if with_ <= SAFE_FRACTION * there:
        return True, f"{why} when it is on"
    in_all = rows * trainer.args.gradient_accumulation_steps
    for fewer in (n for n in range(rows - 1, 0, -1) if in_all % n == 0):
        needed = with_micro_batch(memory, trainer, forward, fewer, True).training_bytes
        if needed <= SAFE_FRACTION * there:
            return True, (
                f"{why} when it is on, which is too much; {gib(needed)} with "
                f"--per_device_train_batch_size {fewer} "
                f"--gradient_accumulation_steps {in_all // fewer}"
            )
    return True, f"{why} when it is on, which is too much; lower --max_completion_length"
