"""A model asked in its own best-known way: the honest baseline of a training.

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

from dataclasses import dataclass, replace
from enum import StrEnum
from typing import TYPE_CHECKING

from abacist.proof.scorers import lm_eval_flexible
from abacist.task.answers import read_answer, same_answer
from abacist.task.problems import Problem
from abacist.task.prompts import Message, Shots, build_messages

if TYPE_CHECKING:
    from abacist.policy.loading import Policy

NATIVE_SHOTS = 8
NATIVE_COMPLETION_TOKENS = 512
BOX_REQUEST = "Think it through step by step, and end with the final answer inside \\boxed{}."

_BOX = "\\boxed{"
_GOLD_MARK = "####"
_MAX_BOX_CHARACTERS = 200


class NativeForm(StrEnum):
    """How a kind of model is asked."""

    CHAT = "chat"
    COMPLETION = "completion"
    BUILT_IN = "built-in"

    @property
    def sentence(self) -> str:
        """The form in words, for a person."""
        return _SENTENCES[self]


_SENTENCES = {
    NativeForm.CHAT: "the question, then: " + BOX_REQUEST,
    NativeForm.COMPLETION: "running text, 'Question: … Answer: …', with worked examples",
    NativeForm.BUILT_IN: "the question alone, as the built-in model was taught",
}


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
        from abacist.policy.plainchat import PlainChat

        return cls(replace(policy, chat=PlainChat.of(policy.chat)), form, shots)

    def messages(self, problem: Problem) -> list[Message]:
        """The conversation that asks ``problem``."""
        if self.form is NativeForm.CHAT:
            return build_messages(f"{problem.question}\n\n{BOX_REQUEST}", system_prompt=None)
        asked = build_messages(problem.question, system_prompt=None)
        pairs = [
            message
            for shot in self.shots.for_question(problem.question, problem.problem_id)
            for message in _as_written(shot)
        ]
        return [*pairs, *asked]


def _as_written(shot: Problem) -> list[Message]:
    answer = f"{shot.solution}\n{_GOLD_MARK} {shot.answer}"
    return [{"role": "user", "content": shot.question}, {"role": "assistant", "content": answer}]


def right_in_own_form(text: str, gold: str | None) -> bool:
    """Whether the number in the last box is the gold, else that after ``####``, else the last one.

    The first two by our answer rule, the last by lm-eval's flexible filter. Linear, never raises.

    >>> right_in_own_form("So it is $\\\\boxed{1{,}450}$.", "1450"), right_in_own_form("12.", "12")
    (True, True)
    """
    if gold is None:
        return False
    for written in (_last_box(text), _after_mark(text)):
        if written is not None and read_answer(written) is not None:
            return same_answer(written, gold)
    return lm_eval_flexible(text, gold)


def _last_box(text: str) -> str | None:
    start = text.rfind(_BOX)
    if start < 0:
        return None
    depth, start = 1, start + len(_BOX)
    for end, character in enumerate(text[start : start + _MAX_BOX_CHARACTERS], start):
        depth += (character == "{") - (character == "}")
        if depth == 0:
            return text[start:end].replace("{,}", ",")
    return None


def _after_mark(text: str) -> str | None:
    _, mark, after = text.partition(_GOLD_MARK)
    return after[:_MAX_BOX_CHARACTERS].strip().split("\n", 1)[0] if mark else None
