"""Which server can serve a model here, and by what command. Abacist has no server of its own.

Each server wants a model in one form: ``transformers serve`` a whole model in a folder, vLLM that
or an adapter beside its base, llama.cpp a GGUF file. What the model was trained with travels as far
as the server lets it: template and stop tokens lie in its folder, the system text and the worked
examples are part of every request, which :attr:`Handover.request` shows.
"""

from __future__ import annotations

import importlib.util
import json
import shlex
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from abacist.delivery.commands import BY_VLLM
from abacist.errors import ModelError, UsageError
from abacist.policy.chat import PINNED_DATE
from abacist.policy.source import BUILT_IN, BUILT_IN_FOLDER, Source, find, read_json
from abacist.proof.ask import Prompting
from abacist.task.prompts import build_messages

TRANSFORMERS, VLLM, LLAMA_CPP = "transformers", "vllm", "llama.cpp"
SERVERS = (TRANSFORMERS, VLLM, LLAMA_CPP)
HOST, PORT = "localhost", 8000
EXAMPLE = "Ada has 3 boxes with 4 pens in each box. How many pens does Ada have?"
_VLLM_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # that --max-lora-rank takes
_INSTALL = {
    TRANSFORMERS: "pip install 'transformers[serving]'",
    VLLM: "pip install vllm (it needs a GPU)",
    LLAMA_CPP: "install llama.cpp, so that llama-server is found",
}


@dataclass(frozen=True)
class Handover:
    """The command that serves a model, why this server, and what a person should know.

    ``request`` is the body of a request to ``url`` that asks as the model was trained.
    """

    server: str
    command: list[str]
    reason: str
    url: str
    request: dict[str, Any]
    notes: list[str] = field(default_factory=list)


def hand_over(
    model: str, *, server: str | None = None, host: str = HOST, port: int = PORT
) -> Handover:
    """The command that serves ``model``; ``server`` is one of :data:`SERVERS`, None the best here.

    Raises ModelError for a model that cannot be had or that no server here can serve, UsageError
    for a server that cannot serve it or is not installed, with what to do.
    """
    if Path(model).suffix.lower() == ".gguf":
        return _gguf(model, server, host, port)
    source = find(model)
    fits, unfit = _fitting(source)
    if server is not None:
        if server in unfit:
            raise UsageError(f"{server} cannot serve {model}: {unfit[server]}", _way_on(source))
        if not _INSTALLED[server]():
            raise UsageError(f"{server} is not installed here", _INSTALL[server])
        return _COMMANDS[server](source, host, port)
    for one in fits:
        if _INSTALLED[one]():
            return _COMMANDS[one](source, host, port)
    wanted = "; ".join(f"{one}: {_INSTALL[one]}" for one in fits)
    raise ModelError(
        f"There is no server here that can serve {model}.", f"{wanted}\n{_way_on(source)}".strip()
    )


def _fitting(source: Source) -> tuple[list[str], dict[str, str]]:
    """The servers that can load it, the best first, and why the others cannot."""
    unfit = {LLAMA_CPP: "it loads GGUF files, and this is a folder of safetensors"}
    if not source.is_adapter:
        return [VLLM, TRANSFORMERS], unfit
    unfit[TRANSFORMERS] = "it loads whole models, and this is an adapter"
    return [VLLM], unfit


def _way_on(source: Source) -> str:
    way = f"abacist export {shlex.quote(source.name)} --to"
    if source.is_adapter:
        return f"Merge it with its base, and serve that folder: {way} merged"
    return f"For llama.cpp: {way} gguf"


def _transformers(source: Source, host: str, port: int) -> Handover:
    beside = Path(sys.executable).with_name("transformers")
    program = str(beside) if beside.exists() else "transformers"
    command = [program, "serve", str(source.folder), "--host", host, "--port", str(port)]
    if _template_prints_a_date(source.folder):
        command += ["--chat-template-kwargs", json.dumps({"date_string": PINNED_DATE})]
    reason = "transformers serve is installed, and loads a whole model from its folder"
    return _handover(TRANSFORMERS, command, reason, source.name, str(source.folder), host, port)


def _vllm(source: Source, host: str, port: int) -> Handover:
    name, reason = str(source.folder), "vLLM is installed, and serves many requests at once"
    command = ["vllm", "serve", name, "--host", host, "--port", str(port)]
    if source.is_adapter:
        settings = read_json(source.folder / "adapter_config.json")
        base = str(settings.get("base_model_name_or_path", ""))
        needed = settings.get("r")
        needed = needed if isinstance(needed, int) else 8
        rank = next((r for r in _VLLM_RANKS if r >= needed), _VLLM_RANKS[-1])
        name = source.folder.resolve().name
        command[2] = str(BUILT_IN_FOLDER) if base == BUILT_IN else base
        command += ["--enable-lora", "--max-lora-rank", str(rank)]
        command += ["--lora-modules", f"{name}={source.folder.resolve()}"]
        template = source.folder.resolve() / "chat_template.jinja"
        if template.is_file():  # else vLLM asks an adapter by the template of its base
            command += ["--chat-template", str(template)]
        reason = "vLLM is installed, and serves an adapter beside its base"
    notes = [f"This command was {BY_VLLM} (docs/engines.md)."]
    return _handover(VLLM, command, reason, source.name, name, host, port, notes)


def _gguf(model: str, server: str | None, host: str, port: int) -> Handover:
    if not Path(model).is_file():
        raise ModelError(f"There is no file '{model}'.", "Check the path.")
    if server not in (None, LLAMA_CPP):
        raise UsageError(f"{server} is not asked to serve GGUF files", "Leave --with out.")
    if not _INSTALLED[LLAMA_CPP]():
        raise ModelError("A GGUF file is served by llama.cpp, which is not here.",
                         _INSTALL[LLAMA_CPP])  # fmt: skip
    command = ["llama-server", "-m", model, "--jinja", "--host", host, "--port", str(port)]
    notes = ["This command was not tried with llama.cpp itself."]
    reason = "llama.cpp is installed, and loads GGUF files; --jinja uses the model's own template"
    return _handover(LLAMA_CPP, command, reason, str(Path(model).parent), model, host, port, notes)


def _handover(
    server: str, command: list[str], reason: str, asked_as: str, served_name: str, host: str,
    port: int, notes: list[str] | None = None,
) -> Handover:  # fmt: skip
    prompting = Prompting.of(asked_as)
    messages = build_messages(EXAMPLE, system_prompt=prompting.system_prompt, shots=prompting.shots)
    request = {
        "model": served_name,
        "messages": messages,
        "max_tokens": prompting.max_completion_tokens,
        "temperature": 0,
    }
    notes = list(notes or [])
    if len(messages) > 1:
        notes.append("The system text and the examples of its training go into every request.")
    if host not in ("localhost", "127.0.0.1", "::1"):
        notes.append(f"Anybody who reaches {host}:{port} can ask it: there is no password.")
    shown = f"[{host}]" if ":" in host else host
    url = f"http://{shown}:{port}/v1/chat/completions"
    return Handover(server, command, reason, url, request, notes)


def _template_prints_a_date(folder: Path) -> bool:
    template = folder / "chat_template.jinja"
    if template.is_file():
        return "date_string" in template.read_text(encoding="utf-8", errors="replace")
    settings = folder / "tokenizer_config.json"
    return settings.is_file() and "date_string" in str(read_json(settings).get("chat_template"))


def _has_transformers_serve() -> bool:
    from transformers.utils.import_utils import is_serve_available

    return bool(is_serve_available())


_INSTALLED: dict[str, Callable[[], bool]] = {
    TRANSFORMERS: _has_transformers_serve,
    VLLM: lambda: importlib.util.find_spec("vllm") is not None and bool(shutil.which("vllm")),
    LLAMA_CPP: lambda: shutil.which("llama-server") is not None,
}
_COMMANDS: dict[str, Callable[[Source, str, int], Handover]] = {
    TRANSFORMERS: _transformers,
    VLLM: _vllm,
}
