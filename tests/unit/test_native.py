"""Which prompt a model does best with, and how its reply to that is read."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from abacist.policy.loading import load_policy
from abacist.policy.plainchat import PlainChat
from abacist.proof.native import NativeForm, NativePrompt, native_form, right_in_own_form
from abacist.records.rollout import StopReason
from abacist.task.prompts import Shots
from evaluated import problem

Folder = Callable[[str], Path]


@pytest.mark.parametrize(
    ("kind", "form"),
    [
        ("llama-3.2-instruct", NativeForm.CHAT),
        ("qwen2.5-instruct", NativeForm.CHAT),
        ("llama-3.2-base", NativeForm.COMPLETION),
        ("qwen2.5-base", NativeForm.COMPLETION),
    ],
)
def test_base_and_chat_models_are_told_apart_by_their_tokenizers(
    kind: str, form: NativeForm, lookalike: Folder
) -> None:
    assert native_form(load_policy(str(lookalike(kind)))) is form


def test_the_built_in_model_is_asked_the_bare_question() -> None:
    assert native_form(load_policy("tiny")) is NativeForm.BUILT_IN


@pytest.mark.parametrize("kind", ["llama-3.2-base", "qwen2.5-base"])
def test_a_base_model_reads_running_text_and_is_cut_at_the_next_question(
    kind: str, lookalike: Folder
) -> None:
    policy = load_policy(str(lookalike(kind)))
    native = NativePrompt.of(policy, NativeForm.COMPLETION, Shots((problem(1),)))
    chat = native.policy.chat
    assert isinstance(chat, PlainChat)
    text = chat.tokenizer.decode(chat.encode(native.messages(problem(0))))
    shown, asked = problem(1), problem(0)
    assert text.removeprefix("<|begin_of_text|>") == (
        f"Question: {shown.question}\nAnswer: {shown.solution}\n#### 7\n\n"
        f"Question: {asked.question}\nAnswer:"
    )
    assert text.count("<|") == (1 if kind.startswith("llama") else 0)
    ids = chat.tokenizer(" so 7\n#### 7\n\nQuestion: What", add_special_tokens=False)["input_ids"]
    assert chat.decode(ids) == " so 7\n#### 7\n\n"
    assert chat.stop_reason(ids, len(ids)) is StopReason.STOPPED
    assert chat.stop_reason(ids[:3], 3) is StopReason.LENGTH
    assert native.messages(problem(1))[0]["content"] == problem(1).question  # not its own example
    chat.check_user_text("Question 1 of the Question list")


def test_a_chat_model_is_asked_for_a_box_and_gets_no_system_text(lookalike: Folder) -> None:
    policy = load_policy(str(lookalike("qwen2.5-instruct")))
    native = NativePrompt.of(policy, NativeForm.CHAT, Shots((problem(1),)))
    (turn,) = native.messages(problem(0))
    assert turn["role"] == "user" and turn["content"].startswith(problem(0).question)
    assert native.policy is policy and not native.shots


@pytest.mark.parametrize(
    ("text", "right"),
    [
        (r"First $\boxed{3}$, no: $\boxed{7}$.", True),
        (r"\boxed{x + y} and 7", True),  # no number our rule reads: the last one counts
        ("<<3+4=7>>7\n#### 7\nmore 12", True),
        ("It is 7.", True),
        (r"\boxed{8} not 7", False),
        ("#### 8\n7", False),
        (r"\boxed{7", True),
        ("", False),
    ],
)
def test_box_then_mark_then_last_number(text: str, right: bool) -> None:
    assert right_in_own_form(text, "7") is right
    assert right_in_own_form(text, None) is False


@given(st.text(st.sampled_from("\\boxed{}#7, \n$."), max_size=80))
def test_no_text_breaks_the_reading(text: str) -> None:
    right_in_own_form(text, "7")
    right_in_own_form(text * 2_000 + "\\boxed{" * 2_000, "7")
