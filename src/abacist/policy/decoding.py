"""Sample replies: prompts in, completions out, in the order the prompts were given.

What is promised, so that the engine behind it can be exchanged:

* **Greedy** replies do not depend on the batch size or on who shares the batch, up to
  floating-point rounding of the logits (in float32 that does not change a token in practice).
* **Sampled** replies depend on ``seed``, the prompt's own tokens and the sample's number alone, up
  to the same rounding: every position of every sample has its own uniform number, drawn
  from a stream named by these three. The same problem meets the same luck before and after
  training, and in any subset of the data.
* Nothing of the checkpoint's own generation defaults takes part.

Shapes: B rows of a batch, P prompt tokens (left-padded), V vocabulary entries.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList

from abacist.errors import ModelError
from abacist.policy.chat import Message, generation_config_holders
from abacist.policy.loading import Policy
from abacist.records.rollout import StopReason


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
    progress: Callable[[int, int], None] | None = None,
) -> list[list[Completion]]:
    """``num_samples`` completions for each prompt: the outer list in the order of ``prompts``.

    ``temperature`` 0 is greedy; ``top_p`` 1 and ``top_k`` 0 are off. ``batch_size`` counts rows, a
    prompt times a sample. ``prefill`` opens every reply. ``seed`` None draws a fresh one from
    torch's global generator. ``progress`` is called with (samples done, samples in all).

    The model comes back in the training mode it was given in. Raises :class:`ModelError` if a
    prompt and its budget do not fit the model's context.
    """
    prompt_ids = [policy.chat.encode(messages, prefill=prefill) for messages in prompts]
    _check_lengths(prompt_ids, max_completion_tokens, policy.context_tokens)
    if seed is None:
        seed = int(torch.randint(2**62, ()))
    rows = _rows(prompt_ids, num_samples, seed)
    done: dict[tuple[int, int], Completion] = {}
    with _generation_mode(policy):
        for start in range(0, len(rows), batch_size):
            batch = rows[start : start + batch_size]
            sampler = None
            if temperature > 0:
                streams = [row.stream for row in batch]
                luck = _uniforms(streams, max_completion_tokens, policy.device)
                sampler = _Sampler(luck, temperature, top_p, top_k)
            written = _continue(
                policy, [prompt_ids[row.prompt] for row in batch], max_completion_tokens, sampler
            )
            for row, ids in zip(batch, written, strict=True):
                done[row.prompt, row.sample] = Completion(
                    ids,
                    prefill + policy.chat.decode(ids),
                    policy.chat.stop_reason(ids, max_completion_tokens),
                )
            if progress is not None:
                progress(len(done), len(rows))
    return [[done[p, s] for s in range(num_samples)] for p in range(len(prompts))]


def sample_tokens(
    logits: torch.Tensor, uniforms: torch.Tensor, *, temperature: float, top_p: float, top_k: int
) -> torch.Tensor:
    """One token id for each row of ``logits`` [B, V], chosen by its number in ``uniforms`` [B].

    Inverse-CDF sampling: the first token at which the cumulated probability exceeds the number. It
    draws from the same distribution as ``torch.multinomial``, but a row's choice depends on nothing
    outside the row.
    """
    logits = logits.float() / temperature
    if 0 < top_k < logits.shape[-1]:
        smallest_kept = logits.topk(top_k, dim=-1).values[:, -1:]
        logits = logits.masked_fill(logits < smallest_kept, -torch.inf)
    probabilities = logits.softmax(dim=-1)
    if top_p < 1:
        ordered, order = probabilities.sort(dim=-1, descending=True)
        # A token goes when those before it already make up top_p; the first always stays.
        dropped = ordered.cumsum(dim=-1) - ordered >= top_p
        dropped[:, 0] = False
        probabilities = probabilities.masked_fill(dropped.scatter(-1, order, dropped), 0.0)
    wide = _widest_float(logits.device)
    cumulated = probabilities.cumsum(dim=-1, dtype=wide)
    # Below 1 after rounding too, or an impossible token at the very end could be chosen.
    below_one = uniforms.to(wide).clamp(max=1 - torch.finfo(wide).eps)
    targets = below_one[:, None] * cumulated[:, -1:]
    return torch.searchsorted(cumulated, targets, right=True).clamp_(max=logits.shape[-1] - 1)[:, 0]


class _Sampler(LogitsProcessor):
    """Leaves only the sampled token possible, so that greedy ``generate`` must take it."""

    def __init__(
        self, uniforms: torch.Tensor, temperature: float, top_p: float, top_k: int
    ) -> None:
        self.uniforms, self.position = uniforms, 0  # [B, completion tokens]
        self.temperature, self.top_p, self.top_k = temperature, top_p, top_k

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        chosen = sample_tokens(
            scores,
            self.uniforms[:, self.position],
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=self.top_k,
        )
        self.position += 1
        return torch.full_like(scores, -torch.inf).scatter(1, chosen[:, None], 0.0)


def _continue(
    policy: Policy, prompts: list[list[int]], max_completion_tokens: int, sampler: _Sampler | None
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
        logits_processor=LogitsProcessorList([] if sampler is None else [sampler]),
    )
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
    """Every sample to draw, like lengths together: the longest first, so that memory that does
    not suffice shows at once."""
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
    return sorted(rows, key=lambda row: -len(prompt_ids[row.prompt]))


def _widest_float(device: torch.device) -> torch.dtype:
    return torch.float32 if device.type == "mps" else torch.float64  # Apple GPUs have no float64


def _uniforms(streams: list[int], length: int, device: torch.device) -> torch.Tensor:
    """Numbers in [0, 1), [B, ``length``]: each row from a generator of its own."""
    generator = torch.Generator()
    rows = []
    for stream in streams:
        generator.manual_seed(stream % 2**63)
        rows.append(torch.rand(length, generator=generator, dtype=torch.float64))
    return torch.stack(rows).to(device, _widest_float(device))
