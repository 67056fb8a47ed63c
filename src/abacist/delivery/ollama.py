"""An Ollama Modelfile that asks a model as its training did: template, stop tokens, system text.

Ollama renders prompts by a Go template of its own. It is derived from the tokenizer's chat
template: what that puts before and after a turn of each role is found by rendering marked turns,
and the pieces must give back what the template itself renders, for several conversations, or the
template is refused. Ollama itself is not needed for any of this, and none was run.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jinja2

from abacist.delivery.gguf_file import starts_with_bos
from abacist.delivery.prompt_record import stop_texts
from abacist.errors import ModelError
from abacist.policy.chat import Chat
from abacist.proof.ask import Prompting
from abacist.task.prompts import Message, build_messages

NOT_TRIED = "The Modelfile was not run through Ollama by the export, which has none here."
_QUESTION = "Question to be asked"
_MARKS = {"system": "SYSTEM-MARK", "user": "USER-MARK", "assistant": "ASSISTANT-MARK"}


@dataclass(frozen=True)
class Pieces:
    """What a chat template puts around turns; ``no_system`` stands where there is no system turn.

    ``trims`` says whether it cuts white space around a turn's text.
    """

    system: tuple[str, str]
    no_system: str
    user: tuple[str, str]
    assistant: tuple[str, str]
    opening: str
    trims: bool

    def render(self, messages: Sequence[Message]) -> str:
        """The prompt these pieces make of ``messages``."""
        turns = [dict(message) for message in messages]
        if self.trims:
            turns = [{**turn, "content": turn["content"].strip()} for turn in turns]
        has_system = bool(turns) and turns[0]["role"] == "system"
        text = "" if has_system else self.no_system
        for turn in turns:
            before, after = getattr(self, turn["role"])
            text += before + turn["content"] + after
        return text + self.opening

    def go_template(self) -> str:
        """The same as a template of Ollama's."""
        before, after = self.system
        system = f"{{{{ if .System }}}}{before}{{{{ .System }}}}{after}"
        system += f"{{{{ else }}}}{self.no_system}{{{{ end }}}}" if self.no_system else "{{ end }}"
        turns = ""
        for word, role in (("if", "user"), ("else if", "assistant")):
            before, after = getattr(self, role)
            turns += f'{{{{ {word} eq .Role "{role}" }}}}{before}{{{{ .Content }}}}{after}'
        return f"{system}{{{{ range .Messages }}}}{turns}{{{{ end }}}}{{{{ end }}}}{self.opening}"


def template_of(chat: Chat) -> Pieces:
    """The pieces of a chat's template. Raises ModelError for one that cannot be taken apart."""

    def rendered(*roles: str, opened: bool = True) -> str:
        turns = [{"role": role, "content": _MARKS[role]} for role in roles]
        return _rendered(chat, turns, opened=opened)

    try:
        opening = rendered("user").removeprefix(rendered("user", opened=False))
        no_system, user = _around(rendered("user", opened=False), "user")
        # What stands before a second question stands before every question.
        pair = rendered("user", "assistant", "user", opened=False)
        head, _, rest = pair.partition(_MARKS["assistant"])
        between, _, _ = rest.partition(_MARKS["user"])
        assistant_before = head.partition(_MARKS["user"])[2].removeprefix(user)
        whole = rendered("user", "assistant", opened=False)
        assistant_after = whole.partition(_MARKS["assistant"])[2]
        user_before = between.removeprefix(assistant_after)
        with_system = rendered("system", "user", opened=False).partition(_MARKS["user"])[0]
        system_before, system_after = _around(with_system, "system")
        spaced = _rendered(
            chat, [{"role": "user", "content": f" {_MARKS['user']} \n"}], opened=True
        )
        pieces = Pieces(
            system=(system_before, system_after.removesuffix(user_before)),
            no_system=no_system.removesuffix(user_before),
            user=(user_before, user),
            assistant=(assistant_before, assistant_after),
            opening=opening,
            trims=f" {_MARKS['user']} \n" not in spaced,
        )
        if any(pieces.render(t) != _rendered(chat, t, opened=True) for t in _probes()):
            raise ValueError("other pieces elsewhere")
    except (jinja2.TemplateError, ValueError) as error:
        raise _refused() from error
    bos = chat.tokenizer.bos_token or ""
    if bos and starts_with_bos(chat.tokenizer):  # llama.cpp puts it there by itself
        before, after = pieces.system
        pieces = Pieces(
            (before.removeprefix(bos), after), pieces.no_system.removeprefix(bos), pieces.user,
            pieces.assistant, pieces.opening, pieces.trims,
        )  # fmt: skip
    if any(
        "{{" in text or '"""' in text for text in (*pieces.system, *pieces.user, pieces.opening)
    ):
        raise _refused()
    return pieces


def _rendered(chat: Chat, turns: Sequence[Message], *, opened: bool) -> str:
    text: Any = chat.tokenizer.apply_chat_template(
        [dict(turn) for turn in turns],
        tokenize=False,
        add_generation_prompt=opened,
        **chat.chat_template_kwargs,
    )
    return str(text)


def _around(text: str, role: str) -> tuple[str, str]:
    before, mark, after = text.partition(_MARKS[role])
    if not mark:
        raise ValueError(role)
    return before, after


def _probes() -> list[list[Message]]:
    system = {"role": "system", "content": "Be brief.\nAnd right. "}
    turns = [
        {"role": "user", "content": "How many? "},
        {"role": "assistant", "content": "<answer>\n7\n</answer>\n"},
        {"role": "user", "content": " And now?\n"},
    ]
    return [turns[:1], turns, [system, turns[0]], [system, *turns]]


def _refused() -> ModelError:
    return ModelError(
        "This model's chat template cannot be written as a template of Ollama's.",
        "Use --to gguf: llama.cpp takes the chat template as it is.",
    )


def modelfile(chat: Chat, prompting: Prompting, pieces: Pieces, gguf_name: str) -> str:
    """The Modelfile: greedy, as the run's verdict was measured, with its stop tokens and budget.

    Raises ModelError for texts that it cannot hold.
    """
    *before, _ = build_messages(
        _QUESTION, system_prompt=prompting.system_prompt, shots=prompting.shots
    )
    lines = [
        f"FROM ./{gguf_name}",
        f"TEMPLATE {_quoted(pieces.go_template())}",
        *(f"PARAMETER stop {_stop(text)}" for text in stop_texts(chat)),
        "PARAMETER temperature 0",
        "PARAMETER repeat_penalty 1",
        f"PARAMETER num_predict {prompting.max_completion_tokens}",
    ]
    for message in before:
        content = message["content"].strip() if pieces.trims else message["content"]
        if message["role"] == "system":
            lines.append(f"SYSTEM {_quoted(content)}")
        else:
            lines.append(f"MESSAGE {message['role']} {_quoted(content)}")
    return "\n".join(lines) + "\n"


def _quoted(text: str) -> str:
    if '"""' in text or text.endswith('"'):
        raise ModelError(
            "A Modelfile cannot hold a text with three quotes in a row, or with one at its end.",
            "Use --to gguf.",
        )
    return f'"""{text}"""'


def _stop(text: str) -> str:
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'
