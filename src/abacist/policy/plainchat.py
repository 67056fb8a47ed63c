"""A base model asked in running text: ``Question: … Answer: …``, without any chat template.

That is how published GSM8K figures of base models are made. Such a model does not stop after its
answer, it goes on to invent the next question; its reply ends there. Decoding stops at the token
that begins ``Question``, where the tokenizer has one, and the text is cut at that word anyway.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

from abacist.policy.chat import Chat, Message
from abacist.records.rollout import StopReason

_NEXT_QUESTION = re.compile(r"Question(:|\Z)")


@dataclass(frozen=True)
class PlainChat(Chat):
    """A :class:`Chat` whose conversations are running text. Get one by :meth:`of`."""

    @classmethod
    def of(cls, chat: Chat) -> PlainChat:
        """The same tokenizer, its template left aside."""
        ids = chat.tokenizer("\n\nQuestion", add_special_tokens=False)["input_ids"]
        alone = chat.tokenizer.decode(ids[-1:]) == "Question"
        stop_ids = (*chat.stop_ids, ids[-1]) if alone else chat.stop_ids
        named = ", ".join(chat.tokenizer.convert_ids_to_tokens(list(stop_ids)))
        notes = (
            ("template", "none: 'Question: … Answer: …' as running text"),
            ("stop tokens", f"{named}, and the text is cut at a next 'Question'"),
        )
        return cls(chat.tokenizer, stop_ids, chat.pad_id, None, notes)

    def encode(self, messages: Sequence[Message], *, prefill: str = "") -> list[int]:
        """The ids of the examples and the question. Raises DataError for control tokens in them."""
        parts = []
        for message in messages:
            self.check_user_text(message["content"], where=f"the {message['role']} message")
            content = message["content"].strip()
            asked = message["role"] == "user"
            parts.append(f"Question: {content}\nAnswer:" if asked else f" {content}\n\n")
        text = "".join(parts) + (f" {prefill}" if prefill else "")
        return list(self.tokenizer(text)["input_ids"])  # with the BOS of those that want one

    def decode(self, ids: Iterable[int]) -> str:
        """The text up to where the model begins another question."""
        return _NEXT_QUESTION.split(super().decode(ids), maxsplit=1)[0]

    def stop_reason(self, completion_ids: Sequence[int], max_completion_tokens: int) -> StopReason:
        """As for any reply; one that was cut at a next question has stopped."""
        reason = super().stop_reason(completion_ids, max_completion_tokens)
        cut = reason is StopReason.LENGTH and _NEXT_QUESTION.search(super().decode(completion_ids))
        return StopReason.STOPPED if cut else reason

    @cached_property
    def _control_ids(self) -> frozenset[int]:
        # A question may well hold the word "Question".
        plain = self.tokenizer("Question", add_special_tokens=False)["input_ids"]
        return super()._control_ids - set(plain)
