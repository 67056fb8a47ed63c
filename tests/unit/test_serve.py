"""Serving is handing over: the right command for what is there, or a word on what is missing."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from abacist.cli.main import main
from abacist.delivery import servers
from abacist.delivery.servers import hand_over
from abacist.errors import AbacistError, ModelError, UsageError
from abacist.policy.source import BUILT_IN_FOLDER


def installed(monkeypatch: pytest.MonkeyPatch, *names: str) -> None:
    for name in servers.SERVERS:
        monkeypatch.setitem(servers._INSTALLED, name, lambda is_there=name in names: is_there)


def adapter(folder: Path, base: str = "org/base", rank: int = 20) -> str:
    folder.mkdir(exist_ok=True)
    settings = {"base_model_name_or_path": base, "r": rank}
    (folder / "adapter_config.json").write_text(json.dumps(settings), encoding="utf-8")
    (folder / "adapter_model.safetensors").write_bytes(b"")
    return str(folder)


def test_a_whole_model_goes_to_transformers_and_rather_to_vllm(monkeypatch) -> None:
    installed(monkeypatch, servers.TRANSFORMERS)
    found = hand_over("tiny", port=8123)
    assert found.command[1:] == [
        "serve",
        str(BUILT_IN_FOLDER),
        "--host",
        "localhost",
        "--port",
        "8123",
    ]
    assert found.url == "http://localhost:8123/v1/chat/completions"
    assert [message["role"] for message in found.request["messages"]] == ["user"]  # as its recipe
    assert found.request["model"] == str(BUILT_IN_FOLDER)
    installed(monkeypatch, servers.TRANSFORMERS, servers.VLLM)
    assert hand_over("tiny").command[:2] == ["vllm", "serve"]
    assert hand_over("tiny", server="transformers").server == "transformers"


def test_an_adapter_goes_to_vllm_beside_its_base(tmp_path: Path, monkeypatch) -> None:
    installed(monkeypatch, servers.TRANSFORMERS, servers.VLLM)
    found = hand_over(adapter(tmp_path / "run"))
    assert found.command[2] == "org/base" and found.request["model"] == "run"
    assert found.command[-5:] == [
        "--enable-lora", "--max-lora-rank", "32", "--lora-modules", f"run={tmp_path / 'run'}",
    ]  # fmt: skip
    own = hand_over(adapter(tmp_path / "own", base="tiny"))
    assert own.command[2] == str(BUILT_IN_FOLDER)
    assert any("on a CPU only" in note for note in found.notes)
    template = tmp_path / "run" / "chat_template.jinja"
    template.write_text("{{ messages }}", encoding="utf-8")
    assert hand_over(adapter(tmp_path / "run")).command[-2:] == ["--chat-template", str(template)]


def test_an_adapter_without_vllm_is_told_to_be_merged(tmp_path: Path, monkeypatch) -> None:
    installed(monkeypatch, servers.TRANSFORMERS)
    name = adapter(tmp_path / "run")
    with pytest.raises(ModelError, match="no server here") as caught:
        hand_over(name)
    assert f"abacist export {name} --to merged" in caught.value.hint
    with pytest.raises(UsageError, match="loads whole models, and this is an adapter") as refused:
        hand_over(name, server="transformers")
    assert "--to merged" in refused.value.hint


def test_a_request_asks_as_the_run_was_trained(tmp_path: Path, monkeypatch) -> None:
    installed(monkeypatch, servers.VLLM)
    name = adapter(tmp_path / "run")
    (tmp_path / "run" / "config.yaml").write_text(
        yaml.safe_dump({"system_prompt": "Think.", "max_completion_length": 77}), encoding="utf-8"
    )
    request = hand_over(name).request
    assert request["messages"][0] == {"role": "system", "content": "Think."}
    assert request["max_tokens"] == 77


@pytest.mark.parametrize("kind", ["llama-3.2-instruct", "qwen2.5-instruct"])
def test_a_template_that_prints_the_date_gets_the_date_of_training(
    kind: str, lookalike: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    installed(monkeypatch, servers.TRANSFORMERS)
    command = hand_over(str(lookalike(kind))).command
    assert ("--chat-template-kwargs" in command) == kind.startswith("llama")
    assert not kind.startswith("llama") or "26 Jul 2024" in command[-1]


def test_a_gguf_file_goes_to_llama_cpp_alone(tmp_path: Path, monkeypatch) -> None:
    file = tmp_path / "model.gguf"
    file.write_bytes(b"GGUF")
    installed(monkeypatch, servers.LLAMA_CPP, servers.TRANSFORMERS)
    assert hand_over(str(file)).command[:3] == ["llama-server", "-m", str(file)]
    with pytest.raises(UsageError, match="not asked to serve GGUF"):
        hand_over(str(file), server="transformers")
    with pytest.raises(UsageError, match="it loads GGUF files"):
        hand_over("tiny", server="llama.cpp")
    with pytest.raises(ModelError, match="no file"):
        hand_over(str(tmp_path / "other.gguf"))
    installed(monkeypatch)
    with pytest.raises(ModelError, match=r"llama\.cpp, which is not here"):
        hand_over(str(file))


def test_nothing_installed_and_no_model_are_one_message_each(monkeypatch, capsys) -> None:
    installed(monkeypatch)
    assert main(["serve", "tiny"]) == 1
    said = capsys.readouterr().err
    assert (
        "no server here that can serve tiny" in said
        and "pip install 'transformers[serving]'" in said
    )
    assert main(["serve", "./nowhere"]) == 1
    assert "There is no folder './nowhere'" in capsys.readouterr().err
    assert main(["serve", "tiny", "--with", "vllm"]) == 2
    assert "vllm is not installed here" in capsys.readouterr().err
    with pytest.raises(AbacistError):
        hand_over("tiny")


def test_a_port_that_others_reach_is_said_to_be_open(monkeypatch) -> None:
    installed(monkeypatch, servers.TRANSFORMERS)
    assert any("no password" in note for note in hand_over("tiny", host="0.0.0.0").notes)
    assert not any("no password" in note for note in hand_over("tiny").notes)


def test_the_verb_shows_the_command_and_becomes_it(monkeypatch, capsys) -> None:
    ran: list[Any] = []
    monkeypatch.setattr("os.execvp", lambda program, command: ran.append((program, command)))
    installed(monkeypatch, servers.TRANSFORMERS)
    assert main(["serve", "tiny", "--dry_run"]) == 0 and not ran
    shown = capsys.readouterr().out
    assert "serve" in shown and "curl http://localhost:8000/v1/chat/completions" in shown
    assert main(["serve", "tiny", "--json"]) == 0 and not ran
    document = json.loads(capsys.readouterr().out)
    assert document["command"][1] == "serve" and document["server"] == "transformers"
    main(["serve", "tiny"])
    ((program, command),) = ran
    assert program == command[0] and command[1] == "serve"
