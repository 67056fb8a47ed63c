"""What llama.cpp makes of token ids: a program of its own, for any Python that has llama_cpp.

    python llamacpp_program.py REQUEST.json RESULT.npz

It imports nothing of Abacist, because llama-cpp-python is best built in an environment of its own.
:mod:`abacist.delivery.llamacpp` starts it and says what the files hold. Progress goes to stdout, a
line a reply.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np


def main(request_path: str, result_path: str) -> None:
    """Read every reply of the request, and write on by itself where it would have parted."""
    import llama_cpp

    request = json.loads(Path(request_path).read_text(encoding="utf-8"))
    kept = np.load(request["kept_tokens"])  # [all reply tokens, K]
    rows, budget = request["rows"], request["budget_tokens"]
    longest = max(len(row["prompt_ids"]) for row in rows) + budget + 1
    full = 0  # GGML's number for float32: keys and values are kept as they are computed
    model: Any = llama_cpp.Llama(
        model_path=request["gguf"],
        n_ctx=longest,
        n_batch=512,
        n_threads=request["threads"],
        n_threads_batch=request["threads"],
        logits_all=True,
        type_k=full,
        type_v=full,
        flash_attn=False,
        verbose=False,
    )
    stops = set(request["stop_ids"])
    logps, best, written, own, tokens = [], [], [], [], []
    at = 0
    for number, row in enumerate(rows):
        prompt, reply = row["prompt_ids"], row["reply_ids"]
        model.reset()
        model.eval(prompt + reply[:-1])
        first = len(prompt) - 1
        logps_CV = log_softmax(np.array(model.scores[first : first + len(reply)], np.float64))
        logps.append(np.take_along_axis(logps_CV, kept[at : at + len(reply)], axis=1))
        written.append(logps_CV[np.arange(len(reply)), reply])
        greedy = logps_CV.argmax(axis=1)
        best.append(greedy)
        at += len(reply)
        own.append(continued(model, prompt, reply, greedy.tolist(), stops, budget))
        tokens.append(
            model.tokenize(row["prompt_text"].encode("utf-8"), add_bos=False, special=True)
        )
        print(f"reply {number + 1} of {len(rows)}", flush=True)
    np.savez(
        result_path,
        logps=np.concatenate(logps),
        best=np.concatenate(best),
        written=np.concatenate(written),
        own=np.array(json.dumps(own)),
        prompts=np.array(json.dumps(tokens)),
        version=np.array(llama_cpp.__version__),
    )


def continued(
    model: Any, prompt: list[int], reply: list[int], greedy: list[int], stops: set[int], budget: int
) -> list[int] | None:
    """Its own greedy reply, where that is another; None where it is the same."""
    part = next((i for i, (a, b) in enumerate(zip(reply, greedy, strict=True)) if a != b), None)
    if part is None:
        return None
    ids = [*reply[:part], greedy[part]]
    model.n_tokens = len(prompt) + part  # what was read of the other reply is forgotten
    while ids[-1] not in stops and len(ids) < budget:
        model.eval(ids[-1:])
        ids.append(int(np.argmax(model.scores[model.n_tokens - 1])))
    return ids


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """Along the last axis."""
    shifted: np.ndarray = logits - logits.max(axis=-1, keepdims=True)
    normalised: np.ndarray = shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
    return normalised


if __name__ == "__main__":
    main(*sys.argv[1:])
