"""vLLM that is away, wrongly started or gone in the middle: one message, and nothing is lost.

A small HTTP server stands for vLLM; what a real one answers is in docs/engines.md.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import trl
from transformers import TrainerState

from abacist.errors import AbacistError, EngineLost, ModelError, UsageError
from abacist.learning import train as learning_train
from abacist.learning import vllm_engine
from abacist.learning.config import Config, load_config
from abacist.learning.fast_trainer import FastTrainer
from abacist.learning.task import check_fit, load_task
from abacist.learning.tracking import Silent
from abacist.learning.vllm_engine import Server
from abacist.policy.loading import load_policy

FINE: dict[str, Any] = {
    "/health": {},
    "/server_info": {
        "vllm_config": {
            "weight_transfer_config": {"backend": "nccl"},
            "model_config": {"logprobs_mode": "processed_logprobs"},
        }
    },
    "/v1/models": {"data": [{"id": "the-model", "max_model_len": 1024}]},
}


@pytest.fixture
def answers() -> Iterator[tuple[str, dict[str, Any]]]:
    """The address of a server, and what it answers by path: an object, or 404."""
    known = dict(FINE)

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            found = known.get(self.path.partition("?")[0])
            self.send_response(404 if found is None else 200)
            self.end_headers()
            self.wfile.write(json.dumps(found).encode())

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}", known
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM is installed, and the run is on a CUDA device."""
    monkeypatch.setattr(vllm_engine, "is_vllm_available", lambda: True)
    cuda = torch.device("cuda", 0)
    monkeypatch.setattr(vllm_engine, "choose_device", lambda asked: (cuda, None))


FEW = ["--num_train_problems", "40"]


def config(url: str = "http://127.0.0.1:9", *more: str, mode: str = "server") -> Config:
    typed = ["--use_vllm", "--vllm_mode", mode, "--vllm_server_base_url", url]
    return load_config("tiny", None, [*typed, "--vllm_server_timeout", "0", *FEW, *more])


def test_without_the_flag_nothing_is_asked() -> None:
    assert vllm_engine.look_for(load_config("tiny", None, []), Silent()) is None


def test_on_a_cpu_it_is_refused_before_the_model_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    def loaded(*_: Any, **__: Any) -> None:
        raise AssertionError("the model was loaded")

    monkeypatch.setattr(vllm_engine, "is_vllm_available", lambda: True)
    monkeypatch.setattr(learning_train, "load_policy", loaded)
    refused = "--use_vllm cannot be used on the device cpu"
    with pytest.raises(UsageError, match=refused):
        learning_train.load_parts(config("http://x:1", "--device", "cpu"), Silent())
    with pytest.raises(UsageError, match=refused):
        vllm_engine.look_for(config("http://x:1", "--device", "cpu", mode="colocate"), Silent())


@pytest.mark.usefixtures("on_a_gpu")
def test_a_server_that_is_away_is_named_with_the_command_that_starts_one() -> None:
    with pytest.raises(ModelError, match=r"http://127.0.0.1:9 did not answer") as found:
        vllm_engine.look_for(config(), Silent())
    assert "--weight-transfer-config" in found.value.hint


class Noted(Silent):
    """Keeps what a person would read."""

    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)


@pytest.mark.usefixtures("on_a_gpu")
@pytest.mark.parametrize(
    ("served", "is_warned"),
    [
        ({"id": "mine", "root": "/models/Tiny"}, False),
        ({"id": "tiny", "root": "org/other"}, True),
        ({"id": "other"}, True),
    ],
)
def test_a_server_of_another_model_is_warned_of(
    served: dict[str, Any], is_warned: bool, answers: tuple[str, dict[str, Any]]
) -> None:
    url, known = answers
    known["/v1/models"] = {"data": [served]}
    watcher = Noted()
    vllm_engine.look_for(config(url), watcher)
    assert any("this run trains tiny" in note for note in watcher.notes) == is_warned


@pytest.mark.usefixtures("on_a_gpu")
def test_a_server_that_fits_is_described(answers: tuple[str, dict[str, Any]]) -> None:
    url, _ = answers
    found = vllm_engine.look_for(config(f"{url}/"), Silent())
    assert found == Server(url, "the-model", 1024, "processed_logprobs")


@pytest.mark.usefixtures("on_a_gpu")
@pytest.mark.parametrize(
    ("path", "answer", "said"),
    [
        ("/health", None, "did not answer"),
        ("/server_info", None, "without VLLM_SERVER_DEV_MODE=1"),
        ("/server_info", {"vllm_config": {"weight_transfer_config": None}},
         "without --weight-transfer-config"),
        ("/server_info", {}, "not a vLLM server"),
        ("/v1/models", {"data": []}, "not a vLLM server"),
        ("/v1/models", None, "not a vLLM server"),
    ],
)  # fmt: skip
def test_a_server_that_was_started_otherwise_is_refused_with_the_reason(
    answers: tuple[str, dict[str, Any]], path: str, answer: Any, said: str
) -> None:
    url, known = answers
    known[path] = answer
    with pytest.raises(ModelError, match=said):
        vllm_engine.look_for(config(url), Silent())


@pytest.mark.usefixtures("on_a_gpu")
@pytest.mark.parametrize("url", ["vllm:8000", "http://", "8000", "http://[x", "http://x:port"])
def test_what_is_no_address_is_refused(url: str) -> None:
    with pytest.raises(UsageError, match="is not an address"):
        vllm_engine.look_for(config(url), Silent())


def test_a_prompt_and_reply_longer_than_the_server_takes_are_refused() -> None:
    made = load_config("tiny", None, ["--device", "cpu", *FEW])
    task, policy = load_task(made), load_policy("tiny", device="cpu")
    check_fit(made, task, policy, Server("http://x:1", "m", None, None))
    with pytest.raises(ModelError, match=r"http://x:1 takes 64 tokens"):
        check_fit(made, task, policy, Server("http://x:1", "m", 64, None))


ARGS = SimpleNamespace(vllm_server_base_url=None, vllm_server_host="far", vllm_server_port=81)


def test_trl_is_given_the_address_that_answered_and_all_stop_tokens() -> None:
    args = SimpleNamespace(vllm_server_base_url="http://far:81/", generation_kwargs=None)
    vllm_engine.settle(args, [2, 7])
    assert args.vllm_server_base_url == "http://far:81"
    assert args.generation_kwargs == {"stop_token_ids": [2, 7]}


@pytest.mark.parametrize(
    "error", [ConnectionError("refused"), Exception("Request failed: 500, out of memory")]
)
def test_a_silent_server_is_one_error_by_step_and_address(error: Exception) -> None:
    with (
        pytest.raises(EngineLost, match=r"At step 3 the vLLM server at http://far:81") as found,
        vllm_engine.lost_if_silent(ARGS, 3),
    ):
        raise error
    assert found.value.exit_code == 1


@pytest.mark.parametrize("error", [ValueError("a bug"), AbacistError("ours"), KeyboardInterrupt()])
def test_other_faults_pass_as_they_are(error: BaseException) -> None:
    with pytest.raises(type(error)), vllm_engine.lost_if_silent(ARGS, 3):
        raise error


def test_the_trainer_names_a_silent_server_and_nothing_else(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refused(*_: Any, **__: Any) -> Any:
        raise ConnectionError("refused")

    monkeypatch.setattr(trl.GRPOTrainer, "_generate_single_turn", refused)
    monkeypatch.setattr(FastTrainer, "_unsupported_reason", lambda *_: "vLLM samples")
    trainer = FastTrainer.__new__(FastTrainer)
    trainer.state = TrainerState(global_step=4)
    for mode, raised in (("server", EngineLost), ("colocate", ConnectionError)):
        trainer.use_vllm = True
        trainer.args = SimpleNamespace(vllm_mode=mode, **vars(ARGS))
        with pytest.raises(raised):
            trainer._generate_single_turn([[1]], None, None, 1)


def test_a_server_that_goes_away_leaves_the_last_whole_step_and_the_run_resumes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    flags = [
        "--device", "cpu", "--max_steps", "3", "--save_steps", "100", "--num_generations", "2",
        "--per_device_train_batch_size", "2", "--gradient_accumulation_steps", "1",
        "--max_completion_length", "8", "--num_heldout_problems", "0", "--eval_strategy", "no",
        "--num_selection_problems", "0", "--num_consistency_problems", "0", *FEW,
    ]  # fmt: skip
    generate = FastTrainer._generate_single_turn

    def goes_away(self: Any, *args: Any, **kwargs: Any) -> Any:
        with vllm_engine.lost_if_silent(ARGS, self.state.global_step + 1):
            if self.state.global_step == 2:
                raise ConnectionError("refused")
            return generate(self, *args, **kwargs)

    monkeypatch.setattr(FastTrainer, "_generate_single_turn", goes_away)
    with pytest.raises(EngineLost, match="At step 3") as lost:
        learning_train.train(load_config("tiny", None, [*flags, "--output_dir", str(run)]))
    assert f"{run / 'checkpoint-2'}" in lost.value.hint
    assert f"abacist train --resume {run}" in lost.value.hint

    monkeypatch.setattr(FastTrainer, "_generate_single_turn", generate)
    resumed = load_config(
        None, run / "config.yaml", ["--resume_from_checkpoint", "true", "--output_dir", str(run)]
    )
    learning_train.train(resumed)
    steps = [
        json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text("utf-8").splitlines()
    ]
    assert sorted(set(steps)) == [1, 2, 3]
