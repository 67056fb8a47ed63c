"""Which prompt a model does best with, and how its reply to that is read."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from abacist.policy.chat import PlainChat
from abacist.policy.loading import load_policy
from abacist.proof.native import NativeForm, NativePrompt, native_form, right_in_own_form
from abacist.records.rollout import StopReason
from abacist.task.answers import gold_text
from abacist.task.prompts import Shots
from evaluated import problem

GSM8K = Path(__file__).parents[3] / "shared" / "gsm8k"
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
    "text",
    [
        r"First $\boxed{3}$, no: $\boxed{7}$.",
        r"\boxed{x + y} and 7",  # no number our rule reads: the text counts
        r"\boxed{7",
        r"\boxed{$7.00} after 12 tries",
        r"\boxed{\text{The answer is } \$7}",
        r"\boxed{7\,\mathrm{kg}}",
        r"\boxed{\frac{14}{2}} of 20",
        r"\fbox{7}",
        r"\boxed{7 (3 + 4)} #### 8",
        "<<3+4=7>>7\n#### 7\nmore 12",
        "#### 8\nNo, there are 3 more.\n#### $7.00",
        "#### 7\n#### none",
        "The answer is 7.",
        "The answer is 7, because 3 + 4 = 7 of the 12.",
        "So the answer to the question is 7 eggs. That is half of the 14.",
        "**Answer:** 7",
        "**Final Answer**\n\n$7.00\n\nLet me know if you have 2 more questions.",
        "### Answer\n\n**7**\n\n### Explanation\n\n3 boxes of 2, and 1 more.",
        "The answer is 12.\nWait, 3 + 4 = 7.\nSo there are 7.",  # either: in doubt, to its favour
        "It is 7.",
        "3 + 4 = 7\nHope this helps!",
        "3 + 4 = $7.00 a day.",
        "3 + 4 = 7\nSo Ada has 7 eggs from 3 hens.",  # the last line names two numbers
        "She needs 5 hens. That leaves about 7.",  # lm-eval's reading, where nothing is committed
        r"\[ 3 + 4 = 7 \]",
        "- Eggs: <b>7</b>",
        "<answer>7 eggs</answer> of 12",
        "<reasoning>\n3 + 4\n</reasoning>\n<answer>\n$7\n</answer>",
    ],
)
def test_the_last_committed_answer_is_read(text: str) -> None:
    assert right_in_own_form(text, "7")
    assert not right_in_own_form(text, None)
    assert not right_in_own_form(text, "70")


@pytest.mark.parametrize(
    "text",
    [
        "",
        "no number",
        r"\boxed{8} not 7",
        r"\boxed{7}, no, \boxed{8}",
        "#### 8\n7",
        "#### 7\nNo.\n#### 8",
        "The answer is 7. No, the answer is 8.",
        "It is 7.\nSo in the end it is 8.",
        "<answer>8</answer> 7",
        "7 or 8",
        "3 7 8",
        "17",
        "-7",
        "7.5",
        "7,000",
        "The answer is 7 thousand.",
    ],
)
def test_an_answer_taken_back_or_never_given_is_wrong(text: str) -> None:
    assert not right_in_own_form(text, "7")


NATIVE_FORMS = {
    "a box": "So it is $\\boxed{{{comma}}}$.",
    "a box with LaTeX's spaces": "So \\[\\boxed{{{thin}}}\\]",
    "a box with LaTeX's commas": "\\boxed{{{braces}}}",
    "a box with a unit and braces": "\\boxed{{{gold} \\text{{ eggs}}}} in 3 days",
    "a box with cents": "\\boxed{{\\${comma}.00}}",
    "a box corrected": "\\boxed{{{more}}}. Wait, \\boxed{{{gold}}}",
    "a mark": "1 + 2 = 3\n#### {gold}",
    "a mark corrected": "#### {more}\nWait.\n#### {comma}",
    "a mark with currency": "#### ${comma}.00",
    "a sentence": "1 + 2 = 3.\nThe answer is {comma}.",
    "a sentence with cents": "It is 3 times as much.\nSo the answer is ${comma}.00.",
    "bold": "1 + 2 = 3\n\n**Answer:** {gold}",
    "a heading": "### Final Answer\n\n**{comma} eggs**",
    "working": "1 + 2 + 3 = {comma} dollars.",
    "spaces for thousands": "In all that makes {spaced} eggs.",
    "our tags": "<answer>{gold} eggs</answer>",
}


@pytest.mark.skipif(not GSM8K.is_dir(), reason="GSM8K is not in ../shared/gsm8k")
@pytest.mark.parametrize("form", NATIVE_FORMS.values(), ids=NATIVE_FORMS.keys())
def test_every_gsm8k_gold_is_read_in_every_native_form(form: str) -> None:
    rows = [
        json.loads(line)["answer"]
        for name in ("train.jsonl", "test.jsonl")
        for line in (GSM8K / name).read_text(encoding="utf-8").split("\n")
        if line
    ]
    assert len(rows) == 8_792
    wrong = []
    for place, gold in enumerate(sorted({gold_text(row) for row in rows})):
        number = int(gold.replace(",", ""))
        comma = f"{number:,}"
        text = form.format(
            gold=gold,
            more=number + 1,
            comma=comma,
            thin=comma.replace(",", "\\,"),
            braces=comma.replace(",", "{,}"),
            spaced=comma.replace(",", "\u202f"),
        )
        if not right_in_own_form(text, gold):
            wrong.append(text)
        if place % 20 == 0:
            assert not right_in_own_form(text, str(number + 2)), text
    assert not wrong


@given(st.text(st.sampled_from("\\boxed{}#7, \n$."), max_size=80))
def test_no_text_breaks_the_reading(text: str) -> None:
    right_in_own_form(text, "7")
    right_in_own_form(text * 2_000 + "\\boxed{" * 2_000, "7")
