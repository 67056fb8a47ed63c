"""Sample replies: prompts in, completions out, in the order the prompts were given.

What is promised, so that the engine behind it can be exchanged:

* **Greedy** replies do not depend on the batch size or on who shares the batch, up to
  floating-point rounding of the logits (in float32 that does not change a token in practice).
* **Sampled** replies depend on ``seed``, the prompt's own tokens and the sample's number alone, up
  to the same rounding: every position of every sample has its own uniform number, drawn
  from a stream named by these three. The same problem meets the same luck before and after
  training, and in any subset of the data.
* Nothing of the checkpoint's own generation defaults takes part.

The engine of :mod:`abacist.policy.engine` writes them wherever it can take the model, at several
times the speed; every other model goes through transformers' own ``generate``.

Shapes: B rows of a batch, P prompt tokens (left-padded), V vocabulary entries.
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
from abacist.policy.batch import Ended
from abacist.policy.chat import Message, generation_config_holders
from abacist.policy.drawing import Sampling, sample_tokens
from abacist.policy.engine import Engine, obstacle
from abacist.policy.loading import Policy
from abacist.policy.progress import Decoded, Progress
from abacist.records.rollout import StopReason

__all__ = ["Completion", "generate", "sample_tokens"]


@dataclass(frozen=True)
class Completion:
    """One reply. ``ids`` is what the model wrote, its stop token included, never padding.

    ``text`` is the reply as it is read and graded: the prefill, if there was one, then ``ids``
    without special tokens.
    """

    ids: list[int]
    text: str
    stop_reason: StopReason


@dataclass(frozen=True)
class _Row:
    """One sample to draw: which prompt, which of its samples, and its stream of luck."""

    prompt: int
    sample: int
    stream: int


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
) -> list[list[Completion]]:
    """``num_samples`` completions for each prompt: the outer list in the order of ``prompts``.

    ``temperature`` 0 is greedy; ``top_p`` 1 and ``top_k`` 0 are off. ``batch_size`` counts rows, a
    prompt times a sample, that are in work at a time. ``prefill`` opens every reply. ``seed`` None
    draws a fresh one from torch's global generator. ``progress`` is told how far it is, after
    every token; ``ended`` the number of a prompt and its completions, soon after the last of them
    has ended, in no order, and perhaps twice.

    The model comes back in the training mode it was given in. Raises :class:`ModelError` if a
    prompt and its budget do not fit the model's context, or its scores are NaN or infinite.
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
    use_engine: bool = True,
) -> list[list[int]]:
    """The ids of ``num_samples`` completions of each prompt, in turn: :func:`generate` on tokens.

    Without ``use_engine`` transformers writes them also where our engine could.
    """
    rows = _rows(prompt_ids, num_samples, seed)
    is_ours = use_engine and obstacle(policy.model) is None
    way = _with_engine if is_ours else _with_transformers
    return way(
        policy, prompt_ids, rows, max_completion_tokens, sampling, batch_size, progress, ended
    )


def _with_engine(
    policy: Policy,
    prompt_ids: list[list[int]],
    rows: list[_Row],
    max_completion_tokens: int,
    sampling: Sampling | None,
    batch_size: int,
    progress: Progress | None,
    ended: Ended | None,
) -> list[list[int]]:
    """The ids of each row, decoded ``batch_size`` rows at a time by our own engine."""
    chat = policy.chat
    engine = Engine(policy.model, stop_ids=chat.stop_ids, pad_id=chat.pad_id, max_rows=batch_size)
    uniforms = None
    if sampling is not None and rows:
        uniforms = _uniforms([row.stream for row in rows], max_completion_tokens)
    written = engine.complete(
        [prompt_ids[row.prompt] for row in rows],
        1,
        max_completion_tokens,
        sampling,
        uniforms,
        progress,
        ended,
    )
    return [ids for [ids] in written]


def _with_transformers(
    policy: Policy,
    prompt_ids: list[list[int]],
    rows: list[_Row],
    max_completion_tokens: int,
    sampling: Sampling | None,
    batch_size: int,
    progress: Progress | None,
    ended: Ended | None,
) -> list[list[int]]:
    """The ids of each row, written by transformers batch after batch."""
    written: list[list[int]] = [[] for _ in rows]
    lengths = [len(prompt_ids[row.prompt]) for row in rows]
    before: list[list[int]] = []  # the ids of replies in batches that have ended
    with _generation_mode(policy):
        for batch in _batches(lengths, batch_size, alike=_learns_a_prompt(policy.model)):
            tell = _told(progress, before, len(batch), len(rows))
            sampler = None
            if sampling is not None:
                luck = _uniforms([rows[number].stream for number in batch], max_completion_tokens)
                sampler = _Sampler(luck.to(policy.device, _widest_float(policy.device)), sampling)
            prompts = [prompt_ids[rows[number].prompt] for number in batch]
            continued = _continue(policy, prompts, max_completion_tokens, sampler, tell)
            for number, ids in zip(batch, continued, strict=True):
                written[number] = ids
                if ended is not None:
                    ended(number, ids)
            before += [written[number] for number in batch]
    if progress is not None:
        progress(Decoded.all_ended([len(ids) for ids in written], max_completion_tokens))
    return written


def _told(
    progress: Progress | None, before: list[list[int]], rows: int, total: int
) -> Callable[[int, int], None]:
    """What tells ``progress`` of a batch behind replies that have been written."""
    tokens = sum(map(len, before))

    def tell(position: int, budget_tokens: int) -> None:
        if progress is not None:
            progress(
                Decoded(total, len(before), tokens, rows, rows * position, position, budget_tokens)
            )

    return tell


def _batches(lengths: Sequence[int], batch_size: int, *, alike: bool) -> Iterator[list[int]]:
    """Rows that are written together; where ``alike``, none of them longer than another.

    Like lengths together, the longest first: memory that does not suffice shows at once.
    """
    order = sorted(range(len(lengths)), key=lambda number: -lengths[number])
    groups = itertools.groupby(order, lambda number: lengths[number] if alike else 0)
    for group in [list(group) for _, group in groups]:
        for start in range(0, len(group), batch_size):
            yield group[start : start + batch_size]


def _learns_a_prompt(model: Any) -> bool:
    """Whether an adapter puts what it learned before the text, as prompt and prefix tuning do.

    PEFT puts it before the padding too, and counts positions through both. So what such a model
    writes would depend on the longest prompt of its batch, but for prompts of one length.
    """
    return isinstance(model, PeftModel) and model.active_peft_config.is_prompt_learning


class _Sampler(LogitsProcessor):
    """Leaves only the sampled token possible, so that greedy ``generate`` must take it."""

    def __init__(self, uniforms: torch.Tensor, sampling: Sampling) -> None:
        self.uniforms, self.position = uniforms, 0  # [B, completion tokens]
        self.sampling = sampling

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        chosen = sample_tokens(
            scores,
            self.uniforms[:, self.position],
            temperature=self.sampling.temperature,
            top_p=self.sampling.top_p,
            top_k=self.sampling.top_k,
        )
        self.position += 1
        return torch.full_like(scores, -torch.inf).scatter(1, chosen[:, None], 0.0)


class _Watch(LogitsProcessor):
    """Looks whether all scores are numbers, and counts tokens."""

    def __init__(self, tell: Callable[[int, int], None], budget_tokens: int) -> None:
        self.largest = torch.zeros(())  # of each row
        self.tell, self.position, self.budget_tokens = tell, 0, budget_tokens

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self.largest = torch.maximum(self.largest, scores.amax(dim=-1))
        self.position += 1
        self.tell(self.position, self.budget_tokens)
        return scores


def _continue(
    policy: Policy,
    prompts: list[list[int]],
    max_completion_tokens: int,
    sampler: _Sampler | None,
    tell: Callable[[int, int], None],
) -> list[list[int]]:
    """The ids each prompt is continued with, cut behind the first stop token."""
    chat = policy.chat
    longest = max(map(len, prompts))
    input_ids = torch.full((len(prompts), longest), chat.pad_id)
    attention_mask = torch.zeros_like(input_ids)
    for row, ids in enumerate(prompts):
        input_ids[row, longest - len(ids) :] = torch.tensor(ids)
        attention_mask[row, longest - len(ids) :] = 1
    model: Any = policy.model
    watch = _Watch(tell, max_completion_tokens)
    tell(0, max_completion_tokens)
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
    return [_up_to_stop(ids, chat.stop_ids) for ids in output[:, longest:].tolist()]


def _up_to_stop(ids: list[int], stop_ids: Sequence[int]) -> list[int]:
    for position, index in enumerate(ids):
        if index in stop_ids:
            return ids[: position + 1]
    return ids


@contextmanager
def _generation_mode(policy: Policy) -> Iterator[None]:
    """Evaluation mode, no gradients, and a neutral generation config; then all as before.

    ``generate`` fills what a config leaves open from the model's own, so that one steps aside.
    ``no_grad`` rather than ``inference_mode``: a tensor the model caches meanwhile (rotary
    frequencies) must still be usable in training afterwards.
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


def _rows(prompt_ids: list[list[int]], num_samples: int, seed: int) -> list[_Row]:
    """Every sample to draw, prompt by prompt."""
    seen: Counter[bytes] = Counter()
    rows = []
    for number, ids in enumerate(prompt_ids):
        content = repr(ids).encode()
        for sample in range(num_samples):
            # A prompt given twice gets fresh luck the second time.
            key = f"{seed}/{seen[content]}/{sample}/".encode() + content
            stream = int.from_bytes(hashlib.sha256(key).digest()[:8], "little")
            rows.append(_Row(number, sample, stream))
        seen[content] += 1
    return rows


def _widest_float(device: torch.device) -> torch.dtype:
    return torch.float32 if device.type == "mps" else torch.float64  # Apple GPUs have no float64


def _uniforms(streams: list[int], length: int) -> torch.Tensor:
    """Numbers in [0, 1), [B, ``length``]: each row from a generator of its own."""
    generator = torch.Generator()
    rows = []
    for stream in streams:
        generator.manual_seed(stream % 2**63)
        rows.append(torch.rand(length, generator=generator, dtype=torch.float64))
    return torch.stack(rows)
