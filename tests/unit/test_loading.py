"""A model loads with its choices explained, or fails at once with a way on."""

from __future__ import annotations

import json
import shutil
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import constants
from peft import AdaLoraConfig, LoraConfig, PeftModel, PrefixTuningConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, BloomConfig, MptConfig

from abacist.errors import ModelError
from abacist.policy import choices, loading, source
from abacist.policy.chat import PlainChat
from abacist.policy.choices import choose_attention, choose_device, choose_dtype
from abacist.policy.decoding.generation import generate
from abacist.policy.families import FastPart, unsupported_reason
from abacist.policy.loading import Policy, default_lora, load_chat, load_policy
from abacist.policy.source import find

Fold = Callable[[str], Path]
QWEN, LLAMA = "qwen2.5-instruct", "llama-3.2-instruct"


@pytest.fixture
def folder(lookalike: Fold, tmp_path: Path) -> Path:
    """A Qwen look-alike that a test may damage."""
    return Path(shutil.copytree(lookalike(QWEN), tmp_path / "model"))


@pytest.fixture
def tiny(lookalike: Fold, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A look-alike in the place of the built-in model."""
    monkeypatch.setattr(source, "BUILT_IN_FOLDER", lookalike(QWEN))
    return lookalike(QWEN)


def adapter_of(model: str, folder: Path, *, seed: int = 0) -> Path:
    """A saved adapter whose every weight says something (LoRA's B starts at zero)."""
    policy = load_policy(model, lora=default_lora(r=4), seed=seed)
    with torch.no_grad():
        for name, weight in policy.model.named_parameters():
            if "lora_B" in name:
                weight.fill_(0.1)
    policy.model.save_pretrained(folder)
    return folder


def logits(policy: Policy) -> torch.Tensor:
    policy.model.eval()
    with torch.no_grad():
        return policy.model(torch.tensor([[5, 6, 7, 8]])).logits


# Loading what is there


@pytest.mark.parametrize("kind", [QWEN, LLAMA, "qwen2.5-base", "llama-3.2-base"])
def test_a_folder_loads_for_reading_with_every_choice_explained(kind: str, lookalike: Fold) -> None:
    policy = load_policy(str(lookalike(kind)), device="cpu")
    assert [choice.what for choice in policy.choices] == ["device", "dtype", "attention", "weights"]
    assert all(choice.value and choice.why for choice in policy.choices)
    assert policy.model.dtype == torch.bfloat16  # as the folder holds them
    assert "our kernels compute in float32" in policy.choices[1].why
    assert not policy.model.training
    assert not any(weight.requires_grad for weight in policy.model.parameters())
    assert tuple(policy.model.generation_config.eos_token_id) == policy.chat.stop_ids
    assert policy.base_name == policy.name == str(lookalike(kind))


def test_a_policy_says_in_which_products_it_computes_at_the_time(lookalike: Fold) -> None:
    policy = load_policy(str(lookalike(QWEN)), device="cpu")
    by_default = "bfloat16 on cpu, our engine's attention"
    assert policy.arithmetic == by_default
    with choices.float32_matmul_precision("medium"):
        assert policy.arithmetic == f"{by_default}, float32_matmul_precision medium"
    policy.model.float()  # as a training may have to
    assert policy.arithmetic == by_default.replace("bfloat16", "float32")


def test_a_stop_token_that_the_tokenizer_does_not_have_is_named(folder: Path) -> None:
    settings = json.loads((folder / "generation_config.json").read_text(encoding="utf-8"))
    settings["eos_token_id"] = [99_999]
    (folder / "generation_config.json").write_text(json.dumps(settings), encoding="utf-8")
    with pytest.raises(ModelError, match="uses token 99999, but the model has only"):
        load_policy(str(folder))


def test_full_training_makes_every_weight_trainable(lookalike: Fold) -> None:
    policy = load_policy(str(lookalike(QWEN)), trainable=True, device="cpu")
    assert policy.model.training
    assert all(weight.requires_grad for weight in policy.model.parameters())
    assert "full fine-tuning" in policy.choices[-1].why


def test_lora_trains_every_linear_layer_but_the_head_in_float32(lookalike: Fold) -> None:
    policy = load_policy(
        str(lookalike(LLAMA)), lora=default_lora(r=4), dtype="bfloat16", device="cpu"
    )
    moving = {n: w for n, w in policy.model.named_parameters() if w.requires_grad}
    assert all("lora_" in name and weight.dtype == torch.float32 for name, weight in moving.items())
    layers = {name.split(".lora_")[0].rsplit(".", 1)[-1] for name in moving}
    assert layers == {
        "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj",
    }  # fmt: skip
    assert policy.model.dtype == torch.bfloat16


def test_the_seed_alone_decides_the_new_adapter(lookalike: Fold) -> None:
    def drawn(seed: int) -> torch.Tensor:
        policy = load_policy(str(lookalike(QWEN)), lora=default_lora(r=4), seed=seed)
        parts = [w.flatten() for n, w in policy.model.named_parameters() if "lora_A" in n]
        return torch.cat(parts).detach()

    torch.manual_seed(1)
    first, after = drawn(7), torch.rand(())
    torch.manual_seed(1)
    assert torch.rand(()) == after, "loading used up numbers of the global generator"
    assert torch.equal(first, drawn(7))
    assert not torch.equal(first, drawn(8))


def test_an_adapter_on_the_built_in_model_stays_portable(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_look_up(*args: object, **kwargs: object) -> None:
        raise AssertionError("saving an adapter asked the Hub about its base")

    monkeypatch.setattr("peft.utils.save_and_load.check_file_exists_on_hf_hub", no_look_up)
    adapter = adapter_of("tiny", tmp_path / "adapter")
    config = json.loads((adapter / "adapter_config.json").read_text(encoding="utf-8"))
    # The folder, which PEFT and transformers find by themselves.
    assert config["base_model_name_or_path"] == str(source.BUILT_IN_FOLDER)
    policy = load_policy(str(adapter))
    assert (policy.name, policy.base_name) == (str(adapter), "tiny")
    assert isinstance(policy.model, PeftModel)
    assert not torch.equal(logits(policy), logits(load_policy("tiny")))


def test_an_adapter_gives_the_logits_it_was_saved_with_and_can_be_trained_further(
    tiny: Path, tmp_path: Path
) -> None:
    adapter = adapter_of("tiny", tmp_path / "first")
    read, further = load_policy(str(adapter)), load_policy(str(adapter), trainable=True)
    assert torch.equal(logits(read), logits(further))
    assert not any(weight.requires_grad for weight in read.model.parameters())
    assert all(w.requires_grad == ("lora_" in n) for n, w in further.model.named_parameters())
    further.model.save_pretrained(tmp_path / "second")
    assert torch.equal(logits(read), logits(load_policy(str(tmp_path / "second"))))
    config = json.loads((tmp_path / "second" / "adapter_config.json").read_text(encoding="utf-8"))
    assert config["base_model_name_or_path"] == str(source.BUILT_IN_FOLDER)


def test_an_adapter_brings_its_own_tokenizer_if_it_has_one(tiny: Path, tmp_path: Path) -> None:
    adapter = adapter_of("tiny", tmp_path / "adapter")
    tokenizer = load_policy("tiny").chat.tokenizer
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}<|im_end|>{% endfor %}"
    tokenizer.save_pretrained(adapter)
    prompt = [{"role": "user", "content": "hi"}]
    chat = load_policy(str(adapter)).chat
    assert chat.tokenizer.decode(chat.encode(prompt)) == "hi<|im_end|>"


def test_equal_adapters_are_saved_as_equal_files(tiny: Path, tmp_path: Path) -> None:
    first, second = (adapter_of("tiny", tmp_path / name) for name in ("a", "b"))
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        assert (first / file).read_bytes() == (second / file).read_bytes()
    modules = json.loads((first / "adapter_config.json").read_text(encoding="utf-8"))[
        "target_modules"
    ]
    assert modules == sorted(modules)


# Choices


def test_what_is_asked_for_by_name_is_had_or_refused() -> None:
    cpu = torch.device("cpu")
    assert choose_dtype("bfloat16", cpu, trains_all_weights=False)[0] == torch.bfloat16
    assert choose_attention("eager", cpu, torch.float32)[0] == "eager"
    for refused in (
        lambda: choose_device("abacus"),
        lambda: choose_device("cuda:99"),
        lambda: choose_dtype("int3", cpu, trains_all_weights=False),
        lambda: choose_attention("flash_attention_2", cpu, torch.float32),
    ):
        with pytest.raises(ModelError) as caught:
            refused()
        assert caught.value.hint


@pytest.mark.skipif(torch.backends.mps.is_available(), reason="this machine has an Apple GPU")
def test_an_apple_gpu_that_is_not_there_is_refused() -> None:
    with pytest.raises(ModelError, match="no Apple GPU"):
        choose_device("mps")


def test_a_gpu_gets_bfloat16_and_flash_attention_if_it_has_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    gpu = torch.device("cuda", 0)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a test GPU")
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(choices, "is_kernels_available", lambda: True)
    monkeypatch.setattr(choices, "lazy_import_flash_attention", lambda name: None)
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert choose_device("auto")[0] == torch.device("cuda", 3)
    assert choose_dtype("auto", gpu, trains_all_weights=False)[0] == torch.bfloat16
    assert choose_dtype("auto", gpu, trains_all_weights=True)[0] == torch.float32
    assert choose_attention("auto", gpu, torch.bfloat16)[0] == "flash_attention_2"
    assert choose_attention("auto", gpu, torch.float32)[0] == "sdpa"

    def unreachable(name: str) -> None:
        raise OSError("no network")

    monkeypatch.setattr(choices, "lazy_import_flash_attention", unreachable)
    value, choice = choose_attention("auto", gpu, torch.bfloat16)
    assert value == "sdpa" and "no network" in choice.why
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    with pytest.raises(ModelError, match="older than Ampere"):
        choose_attention("flash_attention_2", gpu, torch.bfloat16)


# Folders that cannot be loaded


def damage_config(folder: Path, **changes: object) -> None:
    file = folder / "config.json"
    file.write_text(
        json.dumps({**json.loads(file.read_text(encoding="utf-8")), **changes}), encoding="utf-8"
    )


def truncate_weights(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])


def drop_a_tensor(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    weights.pop("model.norm.weight")
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def pickle_only(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def lose_a_shard(folder: Path) -> None:
    index = {"weight_map": {"a": "model-1-of-2.safetensors", "b": "model-2-of-2.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    (folder / "model.safetensors").rename(folder / "model-1-of-2.safetensors")


def lose_the_tokenizer(folder: Path) -> None:
    for file in folder.glob("tokenizer*"):
        file.unlink()


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda folder: (folder / "config.json").unlink(), "neither config.json"),
        (
            lambda folder: (folder / "config.json").write_text("{", encoding="utf-8"),
            "config.json cannot be read",
        ),
        (
            lambda folder: (folder / "generation_config.json").write_text("[]", encoding="utf-8"),
            "generation_config.json is not a JSON object",
        ),
        (
            lambda folder: (folder / "tokenizer.json").write_text("{", encoding="utf-8"),
            "cannot be loaded",
        ),
        (lambda folder: damage_config(folder, model_type="abacus"), "architecture"),
        (lambda folder: damage_config(folder, model_type="vit"), "not a causal language model"),
        (lambda folder: damage_config(folder, vocab_size=999), "other shapes"),
        (truncate_weights, "damaged"),
        (drop_a_tensor, "lacks 1 of its weights"),
        (pickle_only, "Pickles can run code"),
        (lose_a_shard, "model-2-of-2.safetensors missing"),
        (lose_the_tokenizer, "no tokenizer"),
        (lambda folder: (folder / "model.safetensors").unlink(), "incomplete"),
    ],
)
def test_a_damaged_folder_is_refused_by_name_with_a_way_on(
    damage: Callable[[Path], object], said: str, folder: Path
) -> None:
    damage(folder)
    with pytest.raises(ModelError, match=said) as caught:
        load_policy(str(folder))
    assert str(folder) in caught.value.message
    assert caught.value.hint


def test_code_in_a_model_folder_is_not_run_unasked(folder: Path) -> None:
    (folder / "evil.py").write_text("raise SystemExit('ran')\n", encoding="utf-8")
    damage_config(
        folder,
        model_type="evil",
        auto_map={"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.M"},
    )
    with pytest.raises(ModelError, match="code of its own") as caught:
        load_policy(str(folder))
    assert "trust_remote_code" in caught.value.hint


def test_a_run_folder_points_to_its_newest_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "checkpoint-20").mkdir()
    with pytest.raises(ModelError, match="not a model") as caught:
        find(str(tmp_path))
    assert "checkpoint-20" in caught.value.hint


@pytest.mark.parametrize("name", ["./nowhere", "/no/such/folder", "~/nowhere", "a/b/c", ""])
def test_a_path_that_is_not_there_is_not_looked_up_on_the_hub(name: str) -> None:
    with pytest.raises(ModelError, match="no folder"):
        find(name)


def test_a_file_is_no_model(folder: Path) -> None:
    with pytest.raises(ModelError, match="is a file"):
        find(str(folder / "config.json"))


# Adapters that cannot be loaded


def test_an_adapter_says_which_base_it_misses(tiny: Path, tmp_path: Path) -> None:
    adapter = adapter_of("tiny", tmp_path / "adapter")
    file = adapter / "adapter_config.json"
    config = json.loads(file.read_text(encoding="utf-8"))
    for base, said in (
        (str(tmp_path / "gone"), "needs its base model .*gone"),
        (str(adapter), "is based on another adapter"),
        (None, "does not say which model"),
        (5, "does not say which model"),
    ):
        file.write_text(json.dumps({**config, "base_model_name_or_path": base}), encoding="utf-8")
        with pytest.raises(ModelError, match=said):
            load_policy(str(adapter))


def test_a_damaged_or_foreign_adapter_is_refused(
    tiny: Path, tmp_path: Path, lookalike: Fold
) -> None:
    adapter = adapter_of("tiny", tmp_path / "adapter")
    file = adapter / "adapter_model.safetensors"
    whole = load_file(file)
    save_file({k: whole[k] for k in sorted(whole)[1:]}, file)
    with pytest.raises(ModelError, match="lacks 1 of its weights"):
        load_policy(str(adapter))
    save_file({k: tensor[:, :2].contiguous() for k, tensor in whole.items()}, file)
    with pytest.raises(ModelError, match="other shapes"):
        load_policy(str(adapter))
    file.write_bytes(b"\x00" * 100)
    with pytest.raises(ModelError, match="damaged"):
        load_policy(str(adapter))
    file.rename(adapter / "adapter_model.bin")
    with pytest.raises(ModelError, match="Pickles can run code"):
        load_policy(str(adapter))


def test_a_learned_prefix_that_would_be_passed_over_is_refused(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    network = AutoModelForCausalLM.from_pretrained(tiny)
    config = PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    get_peft_model(network, config).save_pretrained(tmp_path / "prefix")
    if not loading.prefix_is_lost(config):
        assert load_policy(str(tmp_path / "prefix"), device="cpu").context_tokens
        monkeypatch.setattr(loading, "prefix_is_lost", lambda config: True)
    with pytest.raises(ModelError, match=r"'.*prefix' is a learned prefix, which transformers 5"):
        load_policy(str(tmp_path / "prefix"), device="cpu")


def test_an_adapter_takes_no_second_adapter(tiny: Path, tmp_path: Path) -> None:
    adapter = adapter_of("tiny", tmp_path / "adapter")
    with pytest.raises(ModelError, match="already an adapter"):
        load_policy(str(adapter), lora=LoraConfig(target_modules="all-linear"))


# The Hub: a small server that answers as the real one does


class FakeHub(BaseHTTPRequestHandler):
    """One model repository, ``lab/model``, whose mood the test sets."""

    folder: Path
    mood = "well"
    requests = 0

    def do_GET(self) -> None:
        type(self).requests += 1
        refusal = {
            "gated": (403, "GatedRepo"),
            "unknown": (401, "RepoNotFound"),
            "no revision": (404, "RevisionNotFound"),
            "broken": (503, ""),
        }.get(self.mood)
        if self.mood == "gated" and self.path.startswith("/api/"):
            refusal = None  # a gated repository lists its files; it only withholds them
        if self.mood == "silent":
            threading.Event().wait(3)
            return
        if refusal:
            self.answer(refusal[0], b"", {"X-Error-Code": refusal[1]})
        elif "/tree/" in self.path:
            self.answer_json([self.entry(file) for file in sorted(self.folder.iterdir())])
        elif self.path.startswith("/api/models/lab/model"):
            names = [{"rfilename": file.name} for file in sorted(self.folder.iterdir())]
            self.answer_json({"id": "lab/model", "sha": "a" * 40, "siblings": names})
        else:
            content = (self.folder / self.path.rsplit("/", 1)[-1]).read_bytes()
            self.answer(200, content, {"ETag": f'"{len(content)}"', "X-Repo-Commit": "a" * 40})

    do_HEAD = do_GET

    @staticmethod
    def entry(file: Path) -> dict[str, object]:
        size = file.stat().st_size
        return {"type": "file", "path": file.name, "size": size, "oid": str(size)}

    def answer_json(self, content: object) -> None:
        self.answer(200, json.dumps(content).encode(), {"Content-Type": "application/json"})

    def answer(self, status: int, content: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture
def hub(
    lookalike: Fold, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[type[FakeHub]]:
    handler = type("Hub", (FakeHub,), {"folder": lookalike(QWEN)})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    use_endpoint(monkeypatch, f"http://127.0.0.1:{server.server_port}", tmp_path / "cache")
    yield handler
    server.shutdown()
    server.server_close()


def use_endpoint(monkeypatch: pytest.MonkeyPatch, endpoint: str, cache: Path) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", endpoint)
    monkeypatch.setattr(
        constants,
        "HUGGINGFACE_CO_URL_TEMPLATE",
        endpoint + "/{repo_id}/resolve/{revision}/{filename}",
    )
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(source, "HUB_DEADLINE_SECONDS", 0.5)


def test_a_hub_model_is_fetched_once_and_then_serves_without_the_hub(
    hub: type[FakeHub], lookalike: Fold
) -> None:
    policy = load_policy("lab/model", device="cpu")
    assert torch.equal(logits(policy), logits(load_policy(str(lookalike(QWEN)), device="cpu")))
    assert policy.model.config._name_or_path == policy.base_name == "lab/model"
    for mood in ("broken", "unknown", "silent"):
        hub.mood = mood
        assert load_policy("lab/model").name == "lab/model"


@pytest.mark.parametrize(
    ("mood", "said", "way_on"),
    [
        ("gated", "is gated", "hf auth login"),
        ("unknown", "no such model", "Check the spelling"),
        ("no revision", "no revision 'v9'", "branches and tags"),
        ("broken", "would not send it.*503", "Try again later"),
        ("silent", "cannot be reached", "Check the network"),
    ],
)
def test_what_the_hub_refuses_is_told_with_a_way_on(
    mood: str, said: str, way_on: str, hub: type[FakeHub]
) -> None:
    hub.mood = mood
    with pytest.raises(ModelError, match=said) as caught:
        find("lab/model", revision="v9")
    assert way_on in caught.value.hint
    assert "built-in 'tiny'" in caught.value.hint
    assert hub.requests < 12, "the Hub was asked again and again"


def test_an_unreachable_hub_is_given_up_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]
    use_endpoint(monkeypatch, f"http://127.0.0.1:{port}", tmp_path)
    with pytest.raises(ModelError, match="cannot be reached") as caught:
        find("lab/model")
    assert "offline" not in str(caught.value).lower(), "nobody asked for offline mode"
    assert "name its folder" in caught.value.hint


@pytest.mark.parametrize("variable", ["HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"])
def test_offline_mode_is_named_by_the_variable_that_asked_for_it(
    variable: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setenv(variable, "1")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ModelError, match=f"offline mode \\({variable}\\)") as caught:
        find("lab/model")
    assert f"Unset {variable} " in caught.value.hint


def test_a_name_that_no_hub_could_know_is_refused(hub: type[FakeHub]) -> None:
    with pytest.raises(ModelError, match="cannot be a Hub id"):
        find("what is this?")


def test_a_missing_built_in_model_says_how_to_get_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(source, "BUILT_IN_FOLDER", tmp_path)
    with pytest.raises(ModelError, match="built-in model is missing") as caught:
        find("tiny")
    assert "CONTRIBUTING" in caught.value.hint


@pytest.mark.parametrize(("config", "longest"), [(BloomConfig, None), (MptConfig, 77)])
def test_a_model_that_names_no_longest_text_has_none(
    config: Any, longest: int | None, folder: Path
) -> None:
    rows = json.loads((folder / "config.json").read_text(encoding="utf-8"))["vocab_size"]
    size = {"hidden_size": 32, "n_layer": 1, "n_head": 2, "vocab_size": rows}
    given = size if longest is None else {**size, "d_model": 32, "max_seq_len": longest}
    (folder / "model.safetensors").unlink()
    AutoModelForCausalLM.from_config(config(**given)).save_pretrained(folder)
    policy = load_policy(str(folder))
    assert policy.context_tokens == (longest or sys.maxsize)
    asked = [{"role": "user", "content": "One and one?"}]
    ((reply,),) = generate(policy, [asked], max_completion_tokens=4)
    assert 1 <= len(reply.ids) <= 4


def test_an_adapter_of_a_method_derived_from_lora_is_loaded_as_what_it_is(
    lookalike: Fold, tmp_path: Path
) -> None:
    base = AutoModelForCausalLM.from_pretrained(lookalike(QWEN))
    how = {"target_modules": ["q_proj"], "init_r": 4, "target_r": 2, "total_step": 10}
    adapted = get_peft_model(base, AdaLoraConfig(task_type="CAUSAL_LM", **how))
    adapted.peft_config["default"].base_model_name_or_path = str(lookalike(QWEN))
    adapted.save_pretrained(tmp_path)
    policy = load_policy(str(tmp_path))
    assert type(policy.model.active_peft_config) is AdaLoraConfig
    assert "AdaLora" in str(unsupported_reason(policy.model, FastPart.DECODING))


def test_the_chat_alone_has_the_stop_tokens_of_the_loaded_model(folder: Path) -> None:
    (folder / "generation_config.json").unlink()
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config["eos_token_id"] = [2, 5, 7]
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    stop_ids = load_policy(str(folder)).chat.stop_ids
    assert {2, 5, 7} <= set(stop_ids) and load_chat(str(folder)).stop_ids == stop_ids


def test_a_stop_token_without_a_name_is_named_by_its_number_in_plain_text_too(
    folder: Path,
) -> None:
    rows = json.loads((folder / "config.json").read_text(encoding="utf-8"))["vocab_size"]
    settings = json.loads((folder / "generation_config.json").read_text(encoding="utf-8"))
    settings["eos_token_id"] = [rows - 1]
    (folder / "generation_config.json").write_text(json.dumps(settings), encoding="utf-8")
    chat = load_policy(str(folder)).chat
    nameless = chat.tokenizer.convert_ids_to_tokens(rows - 1) is None
    for notes in (chat.notes, PlainChat.of(chat).notes):
        assert not nameless or f"number {rows - 1}" in dict(notes)["stop tokens"]
    assert nameless
