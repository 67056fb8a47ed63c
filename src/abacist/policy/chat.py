"""The guard of the chat template: what the model reads, where it stops, how it is padded.

Most silent failures of RL with small models come from here: a second BOS token, a prompt with
today's date, an end-of-turn token at which decoding does not stop, a pad token that is also the end
of text, a question that contains ``<|im_end|>``. :meth:`Chat.guard` settles all of these once.
Training, evaluation and ``ask`` use the result, so they cannot differ.

Two rules follow for other code. Prompts are encoded by :meth:`Chat.encode` and never from text a
second time. Attention masks are made from lengths, never from ``ids != pad``.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from peft import PeftModel
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from abacist.errors import DataError, ModelError
from abacist.records.rollout import StopReason

Message = Mapping[str, str]

PINNED_DATE = "26 Jul 2024"
"""The date in prompts of templates that print one (Llama-3.2's own fallback date)."""

PLAIN_TEMPLATE = (
    "{{ bos_token or '' }}"
    "{% for message in messages %}"
    "{% if message['role'] == 'system' %}{{ message['content'] | trim + '\n\n' }}"
    "{% elif message['role'] == 'assistant' %}"
    "{{ 'Answer:\n' + message['content'] | trim + eos_token + '\n\n' }}"
    "{% else %}{{ 'Question: ' + message['content'] | trim + '\n' }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Answer:\n' }}{% endif %}"
)
"""For base models without a template (Llama-3.2): plain text as in pretraining. Worked examples
come first, each closed by the end-of-text token, the only token at which such a model can stop."""

# Tokens meant for padding, best first. Qwen uses <|endoftext|>.
_PAD_TOKENS = ("<|finetune_right_pad_id|>", "<pad>", "[PAD]", "<|pad|>", "<|endoftext|>")
_SPARE_TOKEN = re.compile(r"reserved|unused|pad", re.IGNORECASE)
_LONE_SURROGATE = re.compile("[\ud800-\udfff]")
_PROBE = "The answer is 12"
_NEXT_QUESTION = re.compile(r"Question(:|\Z)")


@dataclass(frozen=True)
class Chat:
    """A tokenizer with its template, stop tokens and padding settled.

    ``stop_ids`` are all tokens that end a completion; the one that closes the template's turn comes
    first. ``pad_id`` may be one of them (Qwen), so recognise padding by length. ``notes`` say what
    was settled and why, as (what, why) pairs.
    """

    tokenizer: PreTrainedTokenizerBase
    stop_ids: tuple[int, ...]
    pad_id: int
    date_string: str | None
    notes: tuple[tuple[str, str], ...] = ()

    @classmethod
    def guard(
        cls,
        tokenizer: PreTrainedTokenizerBase,
        *,
        generation_config: GenerationConfig | None = None,
        date_string: str = PINNED_DATE,
    ) -> Chat:
        """Settle ``tokenizer``, which is changed in place.

        Raises :class:`ModelError` if the template cannot be rendered or no token can end a
        completion.
        """
        notes: list[tuple[str, str]] = []
        tokenizer.padding_side = tokenizer.truncation_side = "left"
        tokenizer.clean_up_tokenization_spaces = False  # it would change completions
        if tokenizer.chat_template is None:
            if tokenizer.eos_token is None:
                raise ModelError(
                    "The tokenizer has neither a chat template nor an end-of-text token, "
                    "so no completion could stop.",
                    "Use a checkpoint whose tokenizer_config.json names an eos_token.",
                )
            tokenizer.chat_template = PLAIN_TEMPLATE
            notes.append(("template", "plain 'Question: … Answer:' text; the tokenizer has none"))
        else:
            notes.append(("template", "the tokenizer's own"))
        template = tokenizer.get_chat_template()
        date = date_string if "date_string" in template else None
        if date is not None:
            notes.append(("date", f"pinned to {date}; the template would print today's"))
        elif "strftime_now" in template:
            notes.append(("date", "the template prints today's date and offers no way to pin it"))

        closer = _turn_closer(tokenizer, {} if date is None else {"date_string": date})
        stop_ids = _stop_ids(tokenizer, generation_config, closer)
        named = _named(tokenizer, stop_ids)
        if not stop_ids:
            raise ModelError(
                "Neither tokenizer, generation config nor chat template names a token that ends "
                "a completion.",
                "Set eos_token in tokenizer_config.json.",
            )
        how = "closes the template's turn" if closer is not None else "is the tokenizer's end"
        notes.append(("stop tokens", f"{named}; the first {how}"))

        pad_id, why = _pad_id(tokenizer, closer if closer is not None else stop_ids[0], stop_ids)
        tokenizer.pad_token = tokenizer.convert_ids_to_tokens(pad_id)
        notes.append(("pad token", f"{tokenizer.pad_token}, on the left; {why}"))
        return cls(tokenizer, stop_ids, pad_id, date, tuple(notes))

    @property
    def chat_template_kwargs(self) -> dict[str, Any]:
        """What ``GRPOConfig.chat_template_kwargs`` must hold for TRL to render the same ids."""
        return {} if self.date_string is None else {"date_string": self.date_string}

    @property
    def ends_with_turn(self) -> bool:
        """Whether the tokenizer's end token closes the template's turn: true of chat models."""
        return self.stop_ids[0] == self.tokenizer.eos_token_id and not any(
            how.startswith("plain") for what, how in self.notes if what == "template"
        )

    def encode(self, messages: Sequence[Message], *, prefill: str = "") -> list[int]:
        """The token ids of the prompt; ``prefill`` opens the model's turn.

        Raises :class:`DataError` if a message contains text that would become a control token.
        """
        for message in messages:
            self.check_user_text(message["content"], where=f"the {message['role']} message")
        try:
            encoded: Any = self.tokenizer.apply_chat_template(
                [dict(message) for message in messages],
                add_generation_prompt=True,
                tokenize=True,
                return_dict=True,
                **self.chat_template_kwargs,
            )
        except Exception as error:  # a stranger's template divides by zero, or counts to infinity
            raise ModelError(
                f"The model's chat template refuses these messages: {error}",
                "Some templates know no system role: leave the system prompt out.",
            ) from error
        return [*encoded["input_ids"], *self._plain_ids(prefill)]

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ``ids`` without special tokens, exactly as TRL passes it to rewards.

        Ids that are no token (embeddings may have more rows than the tokenizer) are left out.
        """
        size = len(self.tokenizer)
        known = [index for index in ids if 0 <= index < size]
        return str(self.tokenizer.decode(known, skip_special_tokens=True))

    def stop_reason(self, completion_ids: Sequence[int], max_completion_tokens: int) -> StopReason:
        """Why a completion ended. Read from its ids, because decoded text does not show it."""
        return StopReason.of(completion_ids[:max_completion_tokens], self.stop_ids)

    def check_user_text(self, text: str, where: str = "the text") -> None:
        """Raise :class:`DataError` if ``text`` has control tokens or half surrogate pairs in it."""
        subject = where[:1].upper() + where[1:]
        if _LONE_SURROGATE.search(text):
            raise DataError(
                f"{subject} contains half of a surrogate pair, which is not text.",
                "Correct the encoding of the data.",
            )
        if found := self._control_tokens_in(text):
            raise DataError(
                f"{subject} contains {', '.join(found)}, which the model reads as a control token.",
                "Remove it from the data, or break it up with Chat.escape.",
            )

    def escape(self, text: str) -> str:
        """``text`` with a space inside every control token, so that it is read as plain text."""
        text = _LONE_SURROGATE.sub("\N{REPLACEMENT CHARACTER}", text)
        for _ in range(3):  # breaking one token may reveal another that overlapped it
            found = self._control_tokens_in(text)
            if not found:
                return text
            for token in found:
                text = text.replace(token, f"{token[:1]} {token[1:]}")
        self.check_user_text(text)  # refuse spellings that only the tokenizer normalises to a token
        return text

    def apply_to(self, model: PreTrainedModel | PeftModel) -> None:
        """Give ``model`` these stop and pad tokens, and remove its checkpoint's sampling defaults.

        ``generate`` takes whatever a caller leaves open from ``model.generation_config``
        (Qwen2.5-instruct: repetition penalty 1.1, top-k 20), so that config is replaced. Raises
        :class:`ModelError` if the tokenizer has more tokens than the model.
        """
        embeddings: Any = model.get_input_embeddings()
        rows = embeddings.weight.shape[0]
        highest = max(*self.stop_ids, self.pad_id, len(self.tokenizer) - 1)
        if highest >= rows:
            raise ModelError(
                f"The tokenizer uses token {highest}, but the model has only {rows} embeddings.",
                "Tokenizer and weights are not of the same checkpoint.",
            )
        neutral = GenerationConfig(
            eos_token_id=list(self.stop_ids),
            pad_token_id=self.pad_id,
            bos_token_id=self.tokenizer.bos_token_id,
        )
        for holder in generation_config_holders(model):
            holder.generation_config = neutral
        model.config.get_text_config().pad_token_id = self.pad_id

    @cached_property
    def _control_ids(self) -> frozenset[int]:
        added = self.tokenizer.added_tokens_decoder.items()
        marked = {i for i, t in added if t.special or re.fullmatch(r"<[^<>\s]+>", t.content)}
        return frozenset(marked | set(self.stop_ids))

    def _control_tokens_in(self, text: str) -> list[str]:
        # By the tokenizer itself: only it knows how it normalises and splits text.
        found = dict.fromkeys(i for i in self._plain_ids(text) if i in self._control_ids)
        return [str(token) for token in self.tokenizer.convert_ids_to_tokens(list(found))]

    def _plain_ids(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"]) if text else []


@dataclass(frozen=True)
class PlainChat(Chat):
    """A :class:`Chat` without a template: ``Question: … Answer: …`` as plain text, for base models.

    Published GSM8K results of base models are measured this way. Such a model does not stop after
    its answer but goes on to invent the next question, and its reply ends there. Decoding stops at
    the token that begins ``Question``, if the tokenizer has one, and the text is cut at that word
    in any case. Get one by :meth:`of`.
    """

    @classmethod
    def of(cls, chat: Chat) -> PlainChat:
        """The same tokenizer without its template."""
        ids = chat.tokenizer("\n\nQuestion", add_special_tokens=False)["input_ids"]
        alone = chat.tokenizer.decode(ids[-1:]) == "Question"
        stop_ids = (*chat.stop_ids, ids[-1]) if alone else chat.stop_ids
        named = _named(chat.tokenizer, stop_ids)
        notes = (
            ("template", "none: 'Question: … Answer: …' as plain text"),
            ("stop tokens", f"{named}, and the text is cut at a next 'Question'"),
        )
        return cls(chat.tokenizer, stop_ids, chat.pad_id, None, notes)

    def encode(self, messages: Sequence[Message], *, prefill: str = "") -> list[int]:
        """The token ids of examples and question. Raises DataError for control tokens in them."""
        parts = []
        for message in messages:
            self.check_user_text(message["content"], where=f"the {message['role']} message")
            content = message["content"].strip()
            asked = message["role"] == "user"
            parts.append(f"Question: {content}\nAnswer:" if asked else f" {content}\n\n")
        text = "".join(parts) + (f" {prefill}" if prefill else "")
        return list(self.tokenizer(text)["input_ids"])  # with BOS, if the tokenizer adds one

    def decode(self, ids: Iterable[int]) -> str:
        """The text up to the next question, if the model begins one."""
        return _NEXT_QUESTION.split(super().decode(ids), maxsplit=1)[0]

    def stop_reason(self, completion_ids: Sequence[int], max_completion_tokens: int) -> StopReason:
        """Why a completion ended. One that is cut at a next question has stopped."""
        reason = super().stop_reason(completion_ids, max_completion_tokens)
        cut = reason is StopReason.LENGTH and _NEXT_QUESTION.search(super().decode(completion_ids))
        return StopReason.STOPPED if cut else reason

    @cached_property
    def _control_ids(self) -> frozenset[int]:
        # A question may contain the word "Question".
        plain = self.tokenizer("Question", add_special_tokens=False)["input_ids"]
        return super()._control_ids - set(plain)


def generation_config_holders(model: PreTrainedModel | PeftModel) -> list[Any]:
    """The objects that hold a generation config of ``model``; a PEFT wrapper has a second one."""
    return [model, model.get_base_model()] if isinstance(model, PeftModel) else [model]


def _named(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> str:
    """The tokens in words. A generation config may declare one that the tokenizer does not have."""
    tokens = zip(ids, tokenizer.convert_ids_to_tokens(list(ids)), strict=True)
    return ", ".join(token or f"number {index}" for index, token in tokens)


def _turn_closer(tokenizer: PreTrainedTokenizerBase, kwargs: dict[str, Any]) -> int | None:
    """The control token that the template puts after an assistant's reply, if any."""
    turns = [{"role": "user", "content": "?"}, {"role": "assistant", "content": _PROBE}]
    try:
        text = str(tokenizer.apply_chat_template(turns, tokenize=False, **kwargs))
    except Exception as error:  # as above
        raise ModelError(
            f"The chat template cannot render one question and one answer: {error}",
            "Use a checkpoint with a working chat_template.",
        ) from error
    tail = text.rpartition(_PROBE)[2]
    ids = tokenizer(tail, add_special_tokens=False)["input_ids"]
    return next((index for index in ids if index in tokenizer.added_tokens_decoder), None)


def _stop_ids(
    tokenizer: PreTrainedTokenizerBase,
    generation_config: GenerationConfig | None,
    closer: int | None,
) -> tuple[int, ...]:
    declared = getattr(generation_config, "eos_token_id", None)
    if not isinstance(declared, list):
        declared = [declared]
    union = dict.fromkeys([closer, tokenizer.eos_token_id, *declared])
    return tuple(index for index in union if index is not None)


def _pad_id(
    tokenizer: PreTrainedTokenizerBase, closer: int, stop_ids: tuple[int, ...]
) -> tuple[int, str]:
    """A pad token that is not the one that ends a completion, if there is one; and the reason.

    No token is added: that would resize the embeddings, and padding is masked anyway.
    """
    own = tokenizer.pad_token_id
    if own is not None and own != closer:
        return own, "the tokenizer's own"
    added = tokenizer.added_tokens_decoder
    by_name = {token.content: index for index, token in added.items()}
    for name in _PAD_TOKENS:
        if by_name.get(name, closer) != closer:
            return by_name[name], "meant for padding"
    idle = [i for i, token in sorted(added.items()) if token.special and i not in stop_ids]
    spare = [i for i in idle if _SPARE_TOKEN.search(added[i].content)]
    if spare or idle:
        return (spare or idle)[0], "a special token that is no stop token"
    return closer, "the only special token there is"
