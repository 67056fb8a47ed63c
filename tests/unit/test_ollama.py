"""An Ollama template asks as the chat template does, or is refused."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest

from abacist.delivery.ollama import Pieces, modelfile, template_of
from abacist.errors import ModelError
from abacist.policy.loading import load_chat
from abacist.proof.ask import Prompting
from abacist.task.prompts import GIST_SHOT, Message, Shots, build_messages

KINDS = ["llama-3.2-instruct", "qwen2.5-instruct", "qwen2.5-base", "llama-3.2-base"]
Lookalike = Callable[[str], Path]


def go(template: str, messages: list[Message]) -> str:
    """What Ollama's engine makes of the few actions that our templates have."""
    system = messages[0]["content"] if messages[0]["role"] == "system" else ""
    found = re.fullmatch(
        r"\{\{ if \.System \}\}(.*?)(?:\{\{ else \}\}(.*?))?\{\{ end \}\}"
        r'\{\{ range \.Messages \}\}\{\{ if eq \.Role "user" \}\}(.*?)'
        r'\{\{ else if eq \.Role "assistant" \}\}(.*?)\{\{ end \}\}\{\{ end \}\}(.*)',
        template,
        re.DOTALL,
    )
    assert found, template
    with_system, without, user, assistant, opening = found.groups()
    text = with_system.replace("{{ .System }}", system) if system else without or ""
    for message in messages:
        turn = {"user": user, "assistant": assistant}.get(message["role"])
        text += turn.replace("{{ .Content }}", message["content"]) if turn is not None else ""
    return text + opening


@pytest.mark.parametrize("system", [None, "Think first.\nThen answer."])
@pytest.mark.parametrize("shots", [Shots(), Shots((GIST_SHOT,))])
@pytest.mark.parametrize("kind", [*KINDS, "tiny"])
def test_ollamas_template_gives_the_prompt_that_the_model_was_trained_on(
    kind: str, system: str | None, shots: Shots, lookalike: Lookalike
) -> None:
    chat = load_chat("tiny" if kind == "tiny" else str(lookalike(kind)))
    messages = build_messages("How many pens?", system_prompt=system, shots=shots)
    pieces = template_of(chat)
    shown = [{**m, "content": m["content"].strip()} for m in messages] if pieces.trims else messages
    made = go(pieces.go_template(), shown)
    whole = chat.tokenizer.decode(chat.encode(messages), skip_special_tokens=False)
    bos = chat.tokenizer.bos_token or ""
    assert made == whole.removeprefix(bos)  # which llama.cpp puts there


def test_the_modelfile_says_all_that_the_verdict_was_measured_with(lookalike: Lookalike) -> None:
    chat = load_chat(str(lookalike("llama-3.2-instruct")))
    prompting = Prompting("Be brief.", Shots((GIST_SHOT,)), 77)
    text = modelfile(chat, prompting, template_of(chat), "model.gguf")
    assert 'SYSTEM """Be brief."""' in text and "PARAMETER num_predict 77" in text
    assert "PARAMETER temperature 0" in text and "PARAMETER repeat_penalty 1\n" in text
    for stop in ("<|eot_id|>", "<|eom_id|>", "<|end_of_text|>"):
        assert f'PARAMETER stop "{stop}"' in text
    assert f'MESSAGE user """{GIST_SHOT.question}"""' in text
    assert '</answer>"""' in text  # this family's template cuts the final newline


@pytest.mark.parametrize("text", ['Say """ three.', 'It ends with "'])
def test_a_text_that_a_modelfile_cannot_hold_is_refused(text: str, lookalike: Lookalike) -> None:
    chat = load_chat(str(lookalike("qwen2.5-instruct")))
    with pytest.raises(ModelError, match="three quotes"):
        modelfile(chat, Prompting(text), template_of(chat), "model.gguf")
    assert modelfile(chat, Prompting('Say "one" word'), template_of(chat), "model.gguf")


@pytest.mark.parametrize(
    "template",
    [
        # The number of turns stands in the text, so no piece is the same twice.
        "{{ messages | length }}{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}",
        "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no') }}{% endif %}"
        "<{{ m.role }}>{{ m.content }}</s>{% endfor %}",
        "{% for m in messages %}<{{ m.role }}>{{ m.content | upper }}</s>{% endfor %}",
    ],
)
def test_a_template_that_cannot_be_taken_apart_is_refused(
    template: str, lookalike: Lookalike
) -> None:
    chat = load_chat(str(lookalike("qwen2.5-instruct")))
    chat.tokenizer.chat_template = template
    with pytest.raises(ModelError, match="Ollama"):
        template_of(chat)


def test_pieces_put_a_default_system_turn_where_there_is_none() -> None:
    pieces = Pieces(("[", "]"), "[default]", ("<", ">"), ("(", ")"), "(", trims=False)
    assert pieces.render([{"role": "user", "content": "a"}]) == "[default]<a>("
    both = [{"role": "system", "content": "s"}, {"role": "user", "content": "a"}]
    assert pieces.render(both) == "[s]<a>("
