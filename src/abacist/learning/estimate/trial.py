"""Times a few seconds of a run's own work: how fast this machine decodes and trains.

What is timed is what the run will do: tokens of many replies at once by the engine it uses, and
a scoring forward with its backward. Both begin small and grow only while that is cheap, so that
a trial stays short on any model. It changes nothing: gradients are computed and dropped, replies
are drawn from generators of their own, and random states are put back.
"""

from __future__ import annotations

import bisect
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from abacist.learning import fastpath
from abacist.learning.resume.training_state import random_state, set_random_state
from abacist.policy.decoding import generation as decoding
from abacist.policy.decoding.progress import Decoded
from abacist.policy.decoding.token_sampling import Sampling
from abacist.policy.families import FastPart
from abacist.policy.loading import Policy

FIRST_ROWS = 8
MOST_PROMPT_TOKENS = 64  # that are read in a trial
LONG_STEP_SECONDS = 2.0  # more rows are not tried if one token of all is expected to take longer
TOKENS, TOKENS_ON_CUDA = 4, 48  # graphs are recorded only for replies that are long enough
FIRST_SLICE_TOKENS, SLICE_GROWTH = 32, 4
ENOUGH_SECONDS = 1.0  # of one forward and backward


@dataclass(frozen=True)
class Writing:
    """Seconds that decoding takes: ``start_seconds`` whenever it begins, before the first prompt.

    ``token_seconds`` holds, for some numbers of rows, how long one more token of all of them takes.
    """

    start_seconds: float
    prompt_token_seconds: float
    token_seconds: tuple[tuple[int, float], ...]

    def step_seconds(self, rows: int) -> float:
        """One more token of ``rows`` replies, between and beyond the numbers that were tried.

        >>> writing = Writing(0.0, 0.0, ((8, 1.0), (32, 2.0)))
        >>> writing.step_seconds(2), writing.step_seconds(20), writing.step_seconds(64)
        (1.0, 1.5, 4.0)
        """
        known = [count for count, _ in self.token_seconds]
        at = bisect.bisect_left(known, rows)
        if at == 0:
            return self.token_seconds[0][1]
        below, less = self.token_seconds[at - 1]
        if at == len(known):
            return less * rows / below
        above, more = self.token_seconds[at]
        return less + (more - less) * (rows - below) / (above - below)

    def seconds(self, replies: int, rows: int, reply_tokens: float, prompt_tokens: float) -> float:
        """``replies``, at most ``rows`` of them in work, behind so many tokens of prompts."""
        if not replies:
            return 0.0
        rows = min(rows, replies)
        return (
            self.start_seconds
            + self.prompt_token_seconds * prompt_tokens
            + self.step_seconds(rows) * reply_tokens * replies / rows
        )


@dataclass(frozen=True)
class Pass:
    """Seconds of a forward or a backward: what each micro-batch costs, and each of its tokens."""

    start_seconds: float
    token_seconds: float

    def seconds(self, micro_batches: float, tokens: float) -> float:
        """``tokens`` in so many micro-batches."""
        return micro_batches * self.start_seconds + tokens * self.token_seconds

    @classmethod
    def through(cls, small: tuple[int, float], large: tuple[int, float]) -> Pass:
        """From (tokens, seconds) of two micro-batches; where they make no sense, by the larger.

        >>> Pass.through((30, 3.0), (130, 7.0))
        Pass(start_seconds=1.8, token_seconds=0.04)
        >>> Pass.through((30, 3.0), (130, 2.6))
        Pass(start_seconds=0.0, token_seconds=0.02)
        """
        (few, less), (many, more) = small, large
        if many > few and more > less:
            each = (more - less) / (many - few)
            if (start := less - few * each) >= 0:
                return cls(start, each)
        return cls(0.0, more / many)


@dataclass(frozen=True)
class Rates:
    """What was measured. ``rollouts`` is None where something else than this process writes them.

    ``measuring`` is how held-out problems are answered; the two passes are those of training.
    """

    rollouts: Writing | None
    measuring: Writing
    forward: Pass
    backward: Pass
    trial_seconds: float


def measure_rates(
    policy: Policy, trainer: Any, prompts: Sequence[Sequence[int]], rollout_rows: int, rows: int
) -> Rates:
    """Try what training by ``trainer`` and measuring ``policy`` will do.

    ``prompts`` are some of the run's, as ids; ``rollout_rows`` and ``rows`` how many replies are
    written at once in training and in measuring. Raises what the run itself would: memory that
    does not suffice, weights that are not finite.
    """
    began = time.perf_counter()
    longest = max(prompts, key=len)
    with random_states_kept():
        is_ours = fastpath.unsupported_reason(trainer, FastPart.DECODING) is None
        opening = list(longest[:MOST_PROMPT_TOKENS])
        measuring = _time_writing(policy, opening, max(rows, rollout_rows if is_ours else 0), True)
        rollouts: Writing | None = measuring
        if not is_ours:
            rollouts = None
            if not _is_written_elsewhere(trainer):
                rollouts = _time_writing(policy, opening, rollout_rows, False)
        forward, backward = _time_scoring(trainer, len(longest))
    return Rates(rollouts, measuring, forward, backward, time.perf_counter() - began)


def _is_written_elsewhere(trainer: Any) -> bool:
    args = trainer.args
    return bool(
        args.use_vllm
        or args.use_transformers_continuous_batching
        or trainer.rollout_func is not None
        or trainer.environment_factories is not None
        or trainer.tools
    )


@contextmanager
def random_states_kept() -> Iterator[None]:
    """Whatever is drawn within, the generators go on as if it had not been."""
    kept = random_state()
    try:
        yield
    finally:
        set_random_state(kept)


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def _time_writing(policy: Policy, prompt: list[int], rows: int, use_engine: bool) -> Writing:
    """A few tokens of few rows, and of as many as will be in work if that is not too long."""
    first = min(rows, FIRST_ROWS)
    found = _write(policy, prompt, first, use_engine)
    points = [(first, found[2])]
    affordable = first * LONG_STEP_SECONDS / max(found[2], 1e-9)
    more = min(rows, int(affordable))
    if more > first:
        found = _write(policy, prompt, more, use_engine)
        points.append((more, max(found[2], points[0][1])))
    return Writing(found[0], found[1] / len(prompt), tuple(points))


def _write(
    policy: Policy, prompt: list[int], rows: int, use_engine: bool
) -> tuple[float, float, float]:
    """Seconds until the prompt is read, to read it, and for one more token of all rows."""
    device = policy.device
    marks: list[tuple[float, int]] = []
    budget = TOKENS_ON_CUDA if device.type == "cuda" else TOKENS

    def mark(found: Decoded) -> None:
        if found.ended == 0:  # all rows are in work
            marks.append((_now(device), found.oldest_tokens))

    began = _now(device)
    decoding.write(
        policy, [prompt], rows, budget, Sampling(), batch_size=rows, seed=0, progress=mark,
        use_engine=use_engine,
    )  # fmt: skip
    prompt_seconds = marks[1][0] - marks[0][0]
    steps = marks[1:] if device.type != "cuda" else marks[len(marks) // 2 :]
    (start, first), (end, last) = steps[0], steps[-1]
    # Where all replies ended at once: as long as a token of a prompt, each.
    token_seconds = (end - start) / (last - first) if last > first else prompt_seconds * rows
    return marks[0][0] - began, prompt_seconds, token_seconds


def _time_scoring(trainer: Any, prompt_tokens: int) -> tuple[Pass, Pass]:
    """Forward and backward, from growing slices of one group."""
    args = trainer.args
    size = max(1, min(trainer.num_generations, args.per_device_train_batch_size))
    budget = trainer.max_completion_length
    reads_prompt_once = fastpath.unsupported_reason(trainer, FastPart.SCORING) is None

    def tried(tokens: int) -> tuple[int, float, float, bool]:
        rows = min(size, max(1, tokens // 8))
        completion = min(budget, max(2, 2 * tokens // 3 // rows))
        prompt = min(prompt_tokens, max(2, tokens // 3))
        took = _score(trainer, rows, prompt, completion)
        if sum(took) < ENOUGH_SECONDS:  # the first of a shape also pays for what it allocates
            took = min(took, _score(trainer, rows, prompt, completion), key=sum)
        scored = rows * completion + prompt * (1 if reads_prompt_once else rows)
        return scored, *took, (rows, completion, prompt) == (size, budget, prompt_tokens)

    tokens = FIRST_SLICE_TOKENS
    before = found = tried(tokens)
    while not found[3] and found[1] + found[2] < ENOUGH_SECONDS * (5 if found is before else 1):
        tokens *= SLICE_GROWTH
        before, found = found, tried(tokens)
    forward, backward = (
        Pass.through((before[0], before[way]), (found[0], found[way])) for way in (1, 2)
    )
    return forward, backward


def _score(trainer: Any, rows: int, prompt: int, completion: int) -> tuple[float, float]:
    """Seconds of one forward and one backward through the path that will train."""
    model = trainer.model
    device = model.device
    generator = torch.Generator().manual_seed(0)
    vocabulary = min(100, model.config.get_text_config().vocab_size)
    opening = torch.randint(vocabulary, (1, prompt), generator=generator).expand(rows, -1)
    replies = torch.randint(vocabulary, (rows, completion), generator=generator)
    ids = torch.cat([opening, replies], dim=1).to(device)
    began = _now(device)
    with torch.enable_grad(), trainer.accelerator.autocast():
        logps, _, _ = trainer._get_per_token_logps_and_entropies(
            model, ids, torch.ones_like(ids), completion, compute_entropy=True
        )
    scored = _now(device)
    learning = [weight for weight in model.parameters() if weight.requires_grad]
    torch.autograd.grad(logps.sum(), learning, allow_unused=True)
    return scored - began, _now(device) - scored
