"""One GRPO step of a real model on a CPU: this checkout against others, taking turns.

    python bench/real_step.py MODEL [--against PATH ...] [--pairs 3] [--threads 1]
                              [--float32_matmul_precision medium] [--precision_of_others medium]

MODEL is a local folder. Each measurement is a process of its own, so that its peak memory is its
own, and every second round is in reverse order. All do the same work: 4 prompts with worked
examples, 8 replies of 112 tokens to each are sampled, then scored in 4 micro-batches, forward and
backward under LoRA r32, and Adam takes its step. No reply stops early, so both sides write and
train on the same number of tokens. Processor seconds bear other work on the machine better than
those of the wall.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent.parent
PARTS = ("rollout", "training", "step")

WORKER = """
import json, resource, sys, time
import torch
from abacist.policy.decoding.engine import Engine, Sampling
from abacist.policy.loading import default_lora, load_policy, quiet_libraries
from abacist.policy.scoring.score import score

PROMPTS, GENERATIONS, SHARED_TOKENS, OWN_TOKENS, REPLY_TOKENS = 4, 8, 520, 60, 112
folder, dtype, threads, checkpointing, train_replies, precision = json.loads(sys.argv[1])
quiet_libraries()
torch.set_num_threads(threads)
torch.set_float32_matmul_precision(precision)
network = load_policy(folder, dtype=dtype, lora=default_lora(r=32, alpha=64)).model
if checkpointing:
    network.gradient_checkpointing_enable({"use_reentrant": False})
    network.enable_input_require_grads()
trained = [weight for weight in network.parameters() if weight.requires_grad]
optimizer = torch.optim.AdamW(trained, lr=1e-6)
draw = torch.Generator().manual_seed(0)
tokens = lambda count: torch.randint(1000, 20000, (count,), generator=draw).tolist()
opening = tokens(SHARED_TOKENS)
prompts = [opening + tokens(OWN_TOKENS) for _ in range(PROMPTS)]

def seconds():
    return time.process_time(), time.perf_counter()

start = seconds()
engine = Engine(network, stop_ids=[], pad_id=0)
replies = engine.complete(prompts, GENERATIONS, REPLY_TOKENS, Sampling(temperature=1.0), draw)
middle = seconds()
for prompt, group in zip(prompts, replies):
    ids = torch.tensor([prompt + reply for reply in group[:train_replies]])
    logps, _ = score(
        network, ids, torch.ones_like(ids), REPLY_TOKENS, temperature=1.0, compute_entropy=True
    )
    advantages = torch.linspace(-1, 1, len(ids))[:, None]
    (-(torch.exp(logps - logps.detach()) * advantages).sum() / 3000).backward()
optimizer.step()
end = seconds()
unit = 1 if sys.platform == "darwin" else 1024
spent = lambda a, b: [y - x for x, y in zip(a, b)]
print(json.dumps({
    "rollout": spent(start, middle), "training": spent(middle, end), "step": spent(start, end),
    "peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9,
    "held in": str(network.dtype).removeprefix("torch."),
}))
"""


def measure(sources: Path, precision: str, args: argparse.Namespace) -> dict[str, Any]:
    """One step of the checkout in ``sources``, in a process of its own."""
    settings = [str(args.model.resolve()), args.dtype, args.threads, args.checkpointing]
    threads = {"OMP_NUM_THREADS": str(args.threads)}
    environment = {**os.environ, **threads, "PYTHONPATH": str(sources / "src")}
    done = subprocess.run(
        [sys.executable, "-c", WORKER, json.dumps([*settings, args.train_replies, precision])],
        env=environment,
        stdout=subprocess.PIPE,
        encoding="utf-8",
        check=True,
    )
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def spread(values: list[float]) -> str:
    """Median [smallest, largest].

    >>> spread([3.0, 1.0, 2.0])
    '2.00 [1.00, 3.00]'
    """
    return f"{statistics.median(values):.2f} [{min(values):.2f}, {max(values):.2f}]"


def main() -> None:
    """Print the times and peaks of each checkout, and the ratios to this one, pair by pair."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--against", type=Path, nargs="*", default=[], help="other checkouts")
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--dtype", default="auto", help="how the weights are held")
    parser.add_argument("--checkpointing", action="store_true", help="gradient checkpointing")
    parser.add_argument("--float32_matmul_precision", default="highest", help="of this checkout")
    parser.add_argument("--precision_of_others", default="highest", help="the same of the others")
    parser.add_argument("--train_replies", type=int, default=8, help="of the 8 of each group")
    args = parser.parse_args()
    checkouts = {"this checkout": HERE, **{str(path): path for path in args.against}}
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in checkouts}
    for number in range(args.pairs):
        for name in sorted(checkouts, reverse=bool(number % 2)):
            own_precision, others = args.float32_matmul_precision, args.precision_of_others
            precision = own_precision if checkouts[name] == HERE else others
            found[name].append(measure(checkouts[name], precision, args))
            print(f"round {number + 1}, {name}: {found[name][-1]}", file=sys.stderr, flush=True)
    own = found["this checkout"]
    for name, steps in found.items():
        print(f"{name}: held in {steps[0]['held in']}")
        print(f"  peak {spread([step['peak'] for step in steps])} GB")
        for part in PARTS:
            line = f"  {part}: {spread([step[part][0] for step in steps])} s of processor time"
            if name != "this checkout":
                pairs = zip(steps, own, strict=True)
                line += f", {spread([a[part][0] / b[part][0] for a, b in pairs])} × this checkout's"
            print(line)


if __name__ == "__main__":
    main()
