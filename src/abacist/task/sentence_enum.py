"""Names of outcomes, each with a sentence that says it to a person."""

from __future__ import annotations

from enum import StrEnum


class SentenceEnum(StrEnum):
    """Members are written ``NAME = "value", "Sentence."``; the value is the member as text."""

    sentence: str

    def __new__(cls, value: str, sentence: str = "") -> SentenceEnum:
        member = str.__new__(cls, value)
        member._value_ = value
        member.sentence = sentence
        return member
