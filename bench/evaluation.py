"""How many replies a second, against lm-evaluation-harness's ``hf`` backend?

Both have the same weights in float32, read the same prompt tokens (checked), stop at the same
token, and may write the same number of tokens, greedily, with the same batch size (the harness's
default would be 1). They take turns: harness, ours, ours, harness. With one thread the seconds are
CPU time, so that others on the machine count less. Ours is timed with its grading and every
figure, the harness without any, so the ratio is a lower bound. The replies are compared too: both
should have written the same.

    pip install lm_eval
    OMP_NUM_THREADS=1 python bench/evaluation.py --pairs 3
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from abacist.policy.loading import Policy, load_policy, quiet_libraries
from abacist.policy.source import find
from abacist.proof.evaluate import evaluate
from abacist.task.problems import Problem, load_problems
from abacist.task.prompts import Shots, build_messages, choose_shots


def seconds() -> float:
    """The clock: CPU time of one thread, else the wall's."""
    return time.process_time() if torch.get_num_threads() == 1 else time.perf_counter()


class Bench:
    """The same problems put to one model by the harness and by us."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.budget_tokens, self.batch_size = options.budget, options.batch_size
        self.policy: Policy = load_policy(options.model, dtype="float32", device="cpu")
        self.problems: list[Problem] = load_problems(
            options.dataset_name, split=options.split, limit=options.num_problems
        )
        self.shots = Shots()
        if options.num_shots:
            examples = load_problems(options.dataset_name, split="train")
            self.shots = choose_shots(examples, options.num_shots)
        chat = self.policy.chat
        self.conversations = [
            build_messages(
                problem.question,
                system_prompt=None,
                shots=self.shots,
                problem_id=problem.problem_id,
            )
            for problem in self.problems
        ]
        self.contexts = [
            str(
                chat.tokenizer.apply_chat_template(
                    messages,
                    tokenize=False,
                    add_generation_prompt=True,
                    **chat.chat_template_kwargs,
                )
            )
            for messages in self.conversations
        ]
        self.harness = _harness(str(find(options.model).folder), options.batch_size)
        for context, messages in zip(self.contexts, self.conversations, strict=True):
            if self.harness.tok_encode(context) != chat.encode(messages):
                sys.exit("The harness would read other tokens than we do; nothing is measured.")

    def ours(self) -> tuple[float, list[str]]:
        started = seconds()
        found = evaluate(
            self.policy,
            self.problems,
            shots=self.shots,
            max_completion_tokens=self.budget_tokens,
            batch_size=self.batch_size,
        )
        _ = found.figures
        return seconds() - started, [rollout.completion for rollout in found.rollouts]

    def theirs(self) -> tuple[float, list[str]]:
        from lm_eval.api.instance import Instance

        chat = self.policy.chat
        stops = [str(chat.tokenizer.convert_ids_to_tokens(index)) for index in chat.stop_ids]
        how = {"until": stops, "max_gen_toks": self.budget_tokens, "do_sample": False}
        requests = [
            Instance("generate_until", {}, (context, dict(how)), number)
            for number, context in enumerate(self.contexts)
        ]
        started = seconds()
        texts = self.harness.generate_until(requests, disable_tqdm=True)
        return seconds() - started, texts


def _harness(folder: str, batch_size: int) -> Any:
    from lm_eval.models.huggingface import HFLM

    return HFLM(folder, device="cpu", dtype="float32", batch_size=batch_size)


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Warm both up, then ``pairs`` rounds of harness, ours, ours, harness."""
    bench = Bench(options)
    bench.ours(), bench.theirs()
    rounds: list[dict[str, list[float]]] = []
    same = 0.0
    for number in range(options.pairs):
        (first, theirs), (second, ours) = bench.theirs(), bench.ours()
        third, fourth = bench.ours()[0], bench.theirs()[0]
        rounds.append({"lm_eval": [first, fourth], "ours": [second, third]})
        same = statistics.fmean(a == b for a, b in zip(ours, theirs, strict=True))
        ratio = (first + fourth) / (second + third)
        print(f"round {number + 1}: {ratio:.2f} x", file=sys.stderr, flush=True)
    ratios = [sum(one["lm_eval"]) / sum(one["ours"]) for one in rounds]
    replies = len(bench.problems)

    def rate(name: str) -> float:
        return replies / statistics.median(s for one in rounds for s in one[name])

    return {
        "model": options.model,
        "problems": f"{replies} of {options.dataset_name}, {len(bench.shots)} shots",
        "prompt_tokens": statistics.fmean(map(len, map(bench.policy.chat.encode,
                                                       bench.conversations))),
        "budget_tokens": options.budget,
        "batch_size": options.batch_size,
        "threads": torch.get_num_threads(),
        "versions": {name: version(name) for name in ("lm_eval", "torch", "transformers")},
        "load_average": os.getloadavg()[0],
        "same_replies_fraction": same,
        "replies_per_second": {name: rate(name) for name in ("lm_eval", "ours")},
        "ratio": {"median": statistics.median(ratios), "min": min(ratios), "max": max(ratios)},
        "rounds": rounds,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--dataset_name", default="generated")
    parser.add_argument("--split", default="heldout")
    parser.add_argument("--num_problems", type=int, default=128)
    parser.add_argument("--num_shots", type=int, default=0)
    parser.add_argument("--budget", type=int, default=96)
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    quiet_libraries()
    found = run(options)
    text = json.dumps(found, indent=2)
    if options.output:
        options.output.write_text(text + "\n", encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
