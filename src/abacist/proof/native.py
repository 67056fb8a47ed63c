"""A model asked in its own best-known prompt: the honest baseline of a training.

A base model that scores 15 % in a layout it has never seen may score 60 % when asked as its
makers ask it; a gain has to be read against the latter. Three kinds of models are told apart:

* **chat**: no system text of ours (the template's own default stays), the question, and after it
  the request to reason in steps and to box the answer, as instruct models are taught to;
* **completion** (base models): eight worked examples as running text, ``Question: … Answer: …``,
  in GSM8K's own wording with its calculator annotations and ``####``, cut where the model begins
  a next question;
* **built-in**: the question alone. The tiny model knows nothing else, and our tags are its own.

What the first two reply is read in the form that was asked for, by :func:`right_in_own_form`; our
own rule, which wants our tags, would say 0 %.
"""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import chain, islice
from typing import TYPE_CHECKING

from abacist.proof.scorers import lm_eval_flexible
from abacist.task.answers import Number, read_answer, same_answer
from abacist.task.boxes import boxes
from abacist.task.golds import GOLD_MARK
from abacist.task.problems import Problem
from abacist.task.prompts import Message, Shots, build_messages
from abacist.task.reply import TAGS, parse_reply
from abacist.task.sentence_enum import SentenceEnum

if TYPE_CHECKING:
    from abacist.policy.loading import Policy

NATIVE_SHOTS = 8
NATIVE_COMPLETION_TOKENS = 512
BOX_REQUEST = "Think it through step by step, and end with the final answer inside \\boxed{}."

_MAX_CHARACTERS = 20_000  # from the end: nobody's answer stands farther away
_MAX_LOOKED_AT = 30  # marks, sentences, from the end; as many boxes are
_MARK = re.compile(r"####+")
_ANSWER_PHRASE = re.compile(
    r"(?: \banswers?\b [^.:=\n]{0,80}? (?: \bis\b | [:=] )"
    r" | ^ [#*_\ ]* (?:final\ )? answer [*_\ ]* $ ) [\s:=*_#]*",
    re.IGNORECASE | re.MULTILINE | re.VERBOSE,
)
_REASON = re.compile(r",? \b(?:because|since|as|so|for)\b", re.IGNORECASE)
_SENTENCE_END = re.compile(r"(?<=[.!?])\s+|\n+")
_TAG = re.compile("|".join(map(re.escape, TAGS)))
_DIGIT = re.compile(r"\d")
_NUMERAL = re.compile(r"[-−]?\$?[0-9]+(?:[.,][0-9]+)*")


class NativeForm(SentenceEnum):
    """How a kind of model is asked."""

    CHAT = "chat", "the question, then: " + BOX_REQUEST
    COMPLETION = "completion", "running text, 'Question: … Answer: …', with worked examples"
    BUILT_IN = "built-in", "the question alone, as the built-in model was taught"


def native_form(policy: Policy) -> NativeForm:
    """Which kind of model this is, read from its tokenizer: does a turn's end end its text?"""
    from abacist.policy.source import BUILT_IN

    if policy.base_name == BUILT_IN:
        return NativeForm.BUILT_IN
    return NativeForm.CHAT if policy.chat.ends_with_turn else NativeForm.COMPLETION


@dataclass(frozen=True)
class NativePrompt:
    """A policy with the prompt it does best with. ``shots`` are used by completion models only."""

    policy: Policy
    form: NativeForm
    shots: Shots

    @classmethod
    def of(cls, policy: Policy, form: NativeForm, shots: Shots) -> NativePrompt:
        """The policy in this form; a base model's chat is exchanged for running text."""
        if form is not NativeForm.COMPLETION:
            return cls(policy, form, Shots())
        from abacist.policy.chat import PlainChat

        return cls(replace(policy, chat=PlainChat.of(policy.chat)), form, shots)

    def messages(self, problem: Problem) -> list[Message]:
        """The conversation that asks ``problem``."""
        if self.form is NativeForm.CHAT:
            return build_messages(f"{problem.question}\n\n{BOX_REQUEST}", system_prompt=None)
        asked = build_messages(problem.question, system_prompt=None)
        pairs = [
            message
            for shot in self.shots.for_question(problem.question, problem.problem_id)
            for message in (
                {"role": "user", "content": shot.question},
                {"role": "assistant", "content": f"{shot.solution}\n{GOLD_MARK} {shot.answer}"},
            )
        ]
        return [*pairs, *asked]


def right_in_own_form(text: str, gold: str | None) -> bool:
    """Whether the last answer that a reply commits to is the gold; where in doubt, in its favour.

    The last box decides, else the last answer block, else the last ``####``: the last one that our
    answer rule can read. Then comes the last "the answer is"; where a later sentence commits to
    another number, either may be the gold. A reply without any is read from its end: the last
    sentence that commits to a number; where a later one holds numbers and does not say which is
    meant, the very last may be the gold instead. Linear, never raises.

    >>> right_in_own_form("So it is $\\\\boxed{1{,}450}$.", "1450"), right_in_own_form("12.", "12")
    (True, True)
    >>> right_in_own_form("#### 12\\nNo, wait.\\n#### $13.00", "13")
    True
    """
    if gold is None:
        return False
    text = text[-_MAX_CHARACTERS:]
    for written in _stated(text):
        if read_answer(written) is not None:
            return same_answer(written, gold)
    for written, end in _called_answer(text):
        if read_answer(written) is not None:
            later = _last_commitment(text[end:])
            return same_answer(written, gold) or same_answer(later, gold)
    return same_answer(_last_commitment(text), gold) or (
        _leaves_open(text) and _ends_in(text, gold)
    )


def number_in_own_form(text: str, gold: str | None) -> Number | None:
    """The number that a reply commits to: the gold's where it is right, None if there is none.

    >>> number_in_own_form("#### 12\\nNo, wait.\\n#### $13.00", "14")
    Fraction(13, 1)
    """
    if gold is not None and right_in_own_form(text, gold):
        return read_answer(gold)
    text = text[-_MAX_CHARACTERS:]
    called = (written for written, _ in _called_answer(text))
    for written in chain(_stated(text), called, [_last_commitment(text) or ""]):
        if (number := read_answer(written)) is not None:
            return number
    return None


def _stated(text: str) -> Iterator[str]:
    """The texts given expressly as an answer, in the order in which they count."""
    yield from reversed(boxes(text))
    yield parse_reply(text).answer or ""
    for mark in _from_end(_MARK, text):
        yield text[mark.end() :].partition("\n")[0]


def _called_answer(text: str) -> Iterator[tuple[str, int]]:
    """What is called the answer, from the end, and where its sentence ends."""
    for phrase in _from_end(_ANSWER_PHRASE, text):
        end = _SENTENCE_END.search(text, phrase.end())
        stop = end.start() if end else len(text)
        sentence = text[phrase.end() : stop]
        yield sentence, stop
        yield _REASON.split(sentence, maxsplit=1)[0], stop


def _from_end(pattern: re.Pattern[str], text: str) -> Iterator[re.Match[str]]:
    return reversed(deque(pattern.finditer(text), maxlen=_MAX_LOOKED_AT))


def _sentences_from_end(text: str) -> Iterator[str]:
    """The last sentences that hold a digit, the very last first."""
    sentences = _SENTENCE_END.split(_TAG.sub("\n", text))
    holding = (sentence for sentence in reversed(sentences) if _DIGIT.search(sentence))
    return islice(holding, _MAX_LOOKED_AT)


def _last_commitment(text: str) -> str | None:
    """The last sentence that commits to a number."""
    return next((each for each in _sentences_from_end(text) if read_answer(each) is not None), None)


def _leaves_open(text: str) -> bool:
    """Whether the last sentence with numbers does not commit to one of them."""
    last = next(_sentences_from_end(text), None)
    return last is not None and read_answer(last) is None


def _ends_in(text: str, gold: str) -> bool:
    """Whether the last numeral of the text is the gold, by lm-eval's filter or by value."""
    last = next(_from_end(_NUMERAL, text), None)
    return lm_eval_flexible(text, gold) or (last is not None and same_answer(last[0], gold))
