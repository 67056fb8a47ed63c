"""Write completions for prompts, in the order of the prompts.

What is guaranteed, whichever decoder writes them:

* **Greedy** completions do not depend on the batch size or on the other rows of the batch, up to
  floating-point rounding of the logits. In float32 that does not change a token in practice; with
  products in bfloat16 (``float32_matmul_precision``) it changes some replies.
* **Sampled** completions depend only on ``seed``, the prompt's tokens and the number of the sample,
  up to the same rounding. Every position of every sample has its own uniform number, from a stream
  seeded by these three. So the same problem is sampled with the same numbers before and after
  training, and in any subset of the data.
* The checkpoint's own generation defaults have no effect.

Our engine (``engine.py``) is used for every model it supports, and is several times faster. Other
models use transformers' ``generate``.

Shapes: N rows (a row is one sample of one prompt), V vocabulary entries.
"""

from __future__ import annotations

import hashlib
import itertools
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList

from abacist.errors import ModelError
from abacist.policy import nonfinite
from abacist.policy.chat import Message, generation_config_holders
from abacist.policy.decoding.batch import Ended, Wrote
from abacist.policy.decoding.engine import Engine
from abacist.policy.decoding.progress import Decoded, Progress
from abacist.policy.decoding.token_sampling import (
    Sampling,
    sample_tokens,
    uniforms_of,
    widest_float,
)
from abacist.policy.families import FastPart, unsupported_reason
from abacist.policy.loading import Policy
from abacist.records.rollout import StopReason

__all__ = ["Completion", "generate", "sample_tokens"]


@dataclass(frozen=True)
class Completion:
    """One completion. ``ids`` is what the model wrote, stop token included, without padding.

    ``text`` is what is read and graded: the prefill, if any, then ``ids`` without special tokens.
    """

    ids: list[int]
    text: str
    stop_reason: StopReason


def generate(
    policy: Policy,
    prompts: Sequence[Sequence[Message]],
    *,
    max_completion_tokens: int,
    temperature: float = 0.0,
    top_p: float = 1.0,
    top_k: int = 0,
    num_samples: int = 1,
    batch_size: int = 64,
    prefill: str = "",
    seed: int | None = None,
    progress: Progress | None = None,
    ended: Callable[[int, list[Completion]], None] | None = None,
    wrote: Callable[[str], None] | None = None,
) -> list[list[Completion]]:
    """``num_samples`` completions for each prompt, as one list per prompt.

    Args:
        policy: the model, and the chat that encodes and decodes for it.
        prompts: a conversation each.
        max_completion_tokens: where a completion without a stop token is cut.
        temperature: 0 is greedy.
        top_p: 1 is off.
        top_k: 0 is off.
        num_samples: completions of each prompt.
        batch_size: rows (samples of prompts) in work at a time.
        prefill: text that opens every completion.
        seed: None draws one from torch's global generator.
        progress: called after every token.
        ended: called with the number of a prompt and its completions soon after the last of them
            has ended, in no particular order. May be called twice for a prompt.
        wrote: called with the text so far after every token, where there is one completion in all.
            A character of several tokens is U+FFFD until its last one.

    The model's training mode is restored. Raises :class:`ModelError` if a prompt and its budget
    exceed the model's context, or if the model's logits are NaN or infinite.
    """
    prompt_ids = [policy.chat.encode(messages, prefill=prefill) for messages in prompts]
    _check_lengths(prompt_ids, max_completion_tokens, policy.context_tokens)
    if seed is None:
        seed = int(torch.randint(2**62, ()))

    def completion(ids: list[int]) -> Completion:
        text = prefill + policy.chat.decode(ids)
        return Completion(ids, text, policy.chat.stop_reason(ids, max_completion_tokens))

    gathered: list[dict[int, list[int]]] = [{} for _ in prompts]

    def row_ended(row: int, ids: list[int]) -> None:
        number, sample = divmod(row, num_samples)
        gathered[number][sample] = ids
        if ended is not None and len(gathered[number]) == num_samples:
            ended(number, [completion(gathered[number][of]) for of in range(num_samples)])

    written = write(
        policy,
        prompt_ids,
        num_samples,
        max_completion_tokens,
        Sampling(temperature, top_p, top_k) if temperature > 0 else None,
        batch_size=batch_size,
        seed=seed,
        progress=progress,
        ended=None if ended is None else row_ended,
        wrote=None if wrote is None else lambda ids: wrote(prefill + policy.chat.decode(ids)),
    )
    return [
        [completion(ids) for ids in written[prompt * num_samples : (prompt + 1) * num_samples]]
        for prompt in range(len(prompts))
    ]


def write(
    policy: Policy,
    prompt_ids: list[list[int]],
    num_samples: int,
    max_completion_tokens: int,
    sampling: Sampling | None,
    *,
    batch_size: int,
    seed: int,
    progress: Progress | None = None,
    ended: Ended | None = None,
    wrote: Wrote | None = None,
    use_engine: bool = True,
) -> list[list[int]]:
    """:func:`generate` on token ids: ``num_samples`` completions of each prompt, as one flat list.

    With ``use_engine`` False, transformers writes them even where our engine could.
    """
    streams = streams_of(prompt_ids, num_samples, seed)
    prompts = [ids for ids in prompt_ids for _ in range(num_samples)]  # of each row
    if use_engine and unsupported_reason(policy.model, FastPart.DECODING) is None:
        chat = policy.chat
        engine = Engine(
            policy.model, stop_ids=chat.stop_ids, pad_id=chat.pad_id, max_rows=batch_size
        )
        uniforms = None
        if sampling is not None and streams:
            uniforms = uniforms_of(streams, max_completion_tokens)
        completed = engine.complete(
            prompts, 1, max_completion_tokens, sampling, uniforms, progress, ended, wrote
        )
        return [ids for [ids] in completed]
    # By transformers, one batch after another.
    written: list[list[int]] = [[] for _ in prompts]
    lengths = [len(ids) for ids in prompts]
    before: list[list[int]] = []  # ids of the rows in batches that have ended
    with _generation_mode(policy):
        for batch in _batches(lengths, batch_size, alike=_has_learned_prompt(policy.model)):
            report = _reporter(progress, before, len(batch), len(prompts))
            tell = wrote if len(prompts) == 1 else None
            sampler = None
            if sampling is not None:
                uniforms = uniforms_of([streams[number] for number in batch], max_completion_tokens)
                dtype = widest_float(policy.device)
                sampler = _Sampler(uniforms.to(policy.device, dtype), sampling)
            asked = [prompts[number] for number in batch]
            continued = _continue(policy, asked, max_completion_tokens, sampler, report, tell)
            for number, ids in zip(batch, continued, strict=True):
                written[number] = ids
                if ended is not None:
                    ended(number, ids)
            before += [written[number] for number in batch]
    if progress is not None:
        progress(Decoded.all_ended([len(ids) for ids in written], max_completion_tokens))
    return written


def _reporter(
    progress: Progress | None, before: list[list[int]], rows: int, total: int
) -> Callable[[int, int], None]:
    """A function that reports a batch of ``rows`` to ``progress``, after those ``before`` it."""
    tokens = sum(map(len, before))

    def report(position: int, budget_tokens: int) -> None:
        if progress is not None:
            progress(
                Decoded(total, len(before), tokens, rows, rows * position, position, budget_tokens)
            )

    return report


def _batches(lengths: Sequence[int], batch_size: int, *, alike: bool) -> Iterator[list[int]]:
    """Row numbers in batches; with ``alike``, prompts of one batch all have the same length.

    Rows are sorted by length, the longest first, so that too little memory shows at once.
    """
    order = sorted(range(len(lengths)), key=lambda number: -lengths[number])
    groups = itertools.groupby(order, lambda number: lengths[number] if alike else 0)
    for group in [list(group) for _, group in groups]:
        for start in range(0, len(group), batch_size):
            yield group[start : start + batch_size]


def _has_learned_prompt(model: Any) -> bool:
    """Whether an adapter puts learned tokens before the text, as prompt and prefix tuning do.

    PEFT puts them before the padding and counts positions through both. So the output of such a
    model depends on the padding, and prompts of different lengths must not share a batch.
    """
    return isinstance(model, PeftModel) and model.active_peft_config.is_prompt_learning


class _Sampler(LogitsProcessor):
    """Samples a token and makes all others impossible, so that greedy ``generate`` takes it."""

    def __init__(self, uniforms: torch.Tensor, sampling: Sampling) -> None:
        self.uniforms, self.position = uniforms, 0  # [N, completion tokens]
        self.sampling = sampling

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        chosen = sample_tokens(scores, self.uniforms[:, self.position], self.sampling)
        self.position += 1
        return torch.full_like(scores, -torch.inf).scatter(1, chosen[:, None], 0.0)


class _Watch(LogitsProcessor):
    """Watches for logits that are NaN or infinite, and reports progress and what is written."""

    def __init__(
        self,
        report: Callable[[int, int], None],
        budget_tokens: int,
        prompt_tokens: int,
        wrote: Wrote | None,
    ) -> None:
        self.largest = torch.zeros(())  # [N] from the first call on
        self.report, self.position, self.budget_tokens = report, 0, budget_tokens
        self.prompt_tokens, self.wrote = prompt_tokens, wrote

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        if self.wrote is not None and self.position:  # all but the token that is chosen now
            self.wrote(input_ids[0, self.prompt_tokens :].tolist())
        self.largest = torch.maximum(self.largest, scores.amax(dim=-1))
        self.position += 1
        self.report(self.position, self.budget_tokens)
        return scores


def _continue(
    policy: Policy,
    prompts: list[list[int]],
    max_completion_tokens: int,
    sampler: _Sampler | None,
    report: Callable[[int, int], None],
    wrote: Wrote | None,
) -> list[list[int]]:
    """The completion of each prompt, up to and with its first stop token."""
    chat = policy.chat
    longest = max(map(len, prompts))
    input_ids = torch.full((len(prompts), longest), chat.pad_id)
    attention_mask = torch.zeros_like(input_ids)
    for row, ids in enumerate(prompts):
        input_ids[row, longest - len(ids) :] = torch.tensor(ids)
        attention_mask[row, longest - len(ids) :] = 1
    model: Any = policy.model
    watch = _Watch(report, max_completion_tokens, longest, wrote)
    report(0, max_completion_tokens)
    output = model.generate(
        input_ids=input_ids.to(policy.device),
        attention_mask=attention_mask.to(policy.device),
        generation_config=GenerationConfig(
            max_new_tokens=max_completion_tokens,
            do_sample=False,
            num_beams=1,
            repetition_penalty=1.0,
            use_cache=True,
            eos_token_id=list(chat.stop_ids),
            pad_token_id=chat.pad_id,
        ),
        logits_processor=LogitsProcessorList([watch] if sampler is None else [watch, sampler]),
    )
    nonfinite.refuse(watch.largest, model)
    continued = [_up_to_stop(ids, chat.stop_ids) for ids in output[:, longest:].tolist()]
    if wrote is not None:
        wrote(continued[0])
    return continued


def _up_to_stop(ids: list[int], stop_ids: Sequence[int]) -> list[int]:
    for position, index in enumerate(ids):
        if index in stop_ids:
            return ids[: position + 1]
    return ids


@contextmanager
def _generation_mode(policy: Policy) -> Iterator[None]:
    """Evaluation mode, no gradients and a neutral generation config; all restored afterwards.

    The model's own generation config is replaced because ``generate`` takes from it whatever the
    config it is given leaves open. ``no_grad`` instead of ``inference_mode``: tensors that the
    model caches meanwhile (rotary frequencies) must be usable in training afterwards.
    """
    model = policy.model
    was_training = model.training
    holders = generation_config_holders(model)
    kept = [holder.generation_config for holder in holders]
    for holder in holders:
        holder.generation_config = GenerationConfig()
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(was_training)
        for holder, config in zip(holders, kept, strict=True):
            holder.generation_config = config


def _check_lengths(prompt_ids: list[list[int]], budget_tokens: int, context_tokens: int) -> None:
    if budget_tokens < 1:
        raise ModelError("A completion of no tokens was asked for.", "Allow at least one.")
    for number, ids in enumerate(prompt_ids):
        if len(ids) + budget_tokens > context_tokens:
            raise ModelError(
                f"Prompt {number} has {len(ids)} tokens; with {budget_tokens} for the completion "
                f"it exceeds the model's context of {context_tokens}.",
                "Use fewer shots or a smaller --max_completion_length.",
            )


def streams_of(prompt_ids: list[list[int]], num_samples: int, seed: int) -> list[int]:
    """The random stream of every sample of every prompt, prompt by prompt (see ``uniforms_of``)."""
    seen: Counter[bytes] = Counter()
    streams = []
    for ids in prompt_ids:
        content = repr(ids).encode()
        for sample in range(num_samples):
            # A prompt that is given twice gets another stream the second time.
            key = f"{seed}/{seen[content]}/{sample}/".encode() + content
            streams.append(int.from_bytes(hashlib.sha256(key).digest()[:8], "little"))
        seen[content] += 1
    return streams
