"""Our environment for verifiers, run by verifiers' own ``vf-eval`` against a local server.

Skipped where verifiers (an environment of its own: it needs Python 3.11 and no torch) is absent.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

vf = pytest.importorskip("verifiers.v1", reason="verifiers is not installed here")

from abacist.delivery.neighbours.verifiers_taskset import ProblemsConfig  # noqa: E402
from abacist.proof.scorers import lm_eval_flexible  # noqa: E402
from abacist.task.problems import load_problems  # noqa: E402
from abacist.task.prompts import SYSTEM_PROMPT, build_messages, choose_shots  # noqa: E402
from abacist.task.rewards import REWARD_SETS  # noqa: E402

ROOT = Path(__file__).parents[2]
PROBLEMS = load_problems("generated", split="heldout", limit=5)
LAYOUT = "<reasoning>\nso\n</reasoning>\n<answer>\n{}\n</answer>"
TEXTS = [LAYOUT, "<answer>${}.00</answer>", "It is {}.", "no idea", LAYOUT + " and more"]
REPLIES = {
    problem.question: text.format(problem.answer)
    for problem, text in zip(PROBLEMS, TEXTS, strict=True)
}


class Server(ThreadingHTTPServer):
    """An OpenAI-compatible server that replies from a list and keeps what it was asked."""

    asked: list[dict[str, Any]]


class Handler(BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.asked.append(body)  # type: ignore[attr-defined]
        content = body["messages"][-1]["content"]
        if isinstance(content, list):
            content = "".join(part["text"] for part in content)
        chunk = {
            "id": "1", "object": "chat.completion.chunk", "created": 0, "model": body["model"],
            "choices": [{
                "index": 0, "finish_reason": "stop",
                "delta": {"role": "assistant", "content": REPLIES[content]},
            }],
            "usage": {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2},
        }  # fmt: skip
        assert body["stream"]
        data = f"data: {json.dumps(chunk)}\n\ndata: [DONE]\n\n".encode()
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *args: Any) -> None:
        pass


@pytest.fixture
def server() -> Iterator[Server]:
    server = Server(("127.0.0.1", 0), Handler)
    server.asked = []
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def taskset(**options: Any) -> Any:
    sys.path.insert(0, str(ROOT / "examples"))
    try:
        return vf.load_taskset(ProblemsConfig(id="abacist-gsm8k", split="heldout", **options))
    finally:
        sys.path.remove(str(ROOT / "examples"))


@pytest.mark.parametrize("num_shots", [0, 2])
def test_a_task_asks_what_we_ask(num_shots: int) -> None:
    pool = load_problems("generated") if num_shots else []
    shots = choose_shots(pool, num_shots, seed=0)
    tasks = list(taskset(num_problems=5, num_shots=num_shots))
    for task, problem in zip(tasks, PROBLEMS, strict=True):
        turns = [{"role": "system", "content": task.data.system_prompt}]
        if isinstance(task.data.prompt, str):
            turns.append({"role": "user", "content": task.data.prompt})
        else:
            turns += [{"role": one.role, "content": one.content} for one in task.data.prompt]
        assert turns == build_messages(
            problem.question, system_prompt=SYSTEM_PROMPT, shots=shots,
            problem_id=problem.problem_id,
        )  # fmt: skip


def test_verifiers_pays_what_we_pay(server: Server, tmp_path: Path) -> None:
    """Through vf-eval: its harness, its client, its scoring, and its record of the rollouts."""
    if shutil.which("uv") is None:
        pytest.skip("verifiers starts its harness with uv, which is not here")
    command = [
        "vf-eval", "abacist-gsm8k", "--env.agent.harness.id", "null", "--model", "local",
        "--client.base-url", f"http://127.0.0.1:{server.server_port}/v1",
        "--client.api-key-var", "NO_KEY", "--env.taskset.split", "heldout",
        "--env.taskset.num-problems", "5", "--output-dir", str(tmp_path), "--no-push",
        "--no-rich", "--env.agent.runtime.type", "subprocess",
    ]  # fmt: skip
    path = os.pathsep.join([str(ROOT / "src"), str(ROOT / "examples")])
    done = subprocess.run(
        command, env={**os.environ, "PYTHONPATH": path, "NO_KEY": "none"}, cwd=tmp_path,
        capture_output=True, text=True, encoding="utf-8", timeout=240,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    (file,) = tmp_path.rglob("traces.jsonl")
    traces = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    assert len(server.asked) == len(PROBLEMS), traces  # no reply was asked for twice
    seen = {}
    for trace in traces:
        for one in trace.get("traces", [trace]):
            seen[one["task"]["data"]["id"]] = one
    for problem in PROBLEMS:
        text = REPLIES[problem.question]
        record = seen[problem.problem_id]
        for reward in REWARD_SETS["default"]:
            (paid,) = reward([""], [text], answer=[problem.answer])
            got = record["rewards"][reward.__name__]
            assert (got["score"] if isinstance(got, dict) else got) == paid
        assert record["metrics"]["any_format"] == lm_eval_flexible(text, problem.answer)
