"""One GRPO step of a real model on a CPU: this checkout against others, taking turns.

    python bench/real_step.py MODEL [--against PATH ...] [--stock] [--pairs 3] [--threads 1]
                              [--float32_matmul_precision medium] [--precision_of_others medium]
                              [--load_in_8bit]

MODEL is a local folder. Each measurement is a process of its own, so that its peak memory is its
own, and every second round is in reverse order. All do the same work: 4 prompts with worked
examples, 8 replies of 112 tokens to each are sampled, then scored in 4 micro-batches, forward and
backward under LoRA r32, and Adam takes its step. No reply stops early, so both sides write and
train on the same number of tokens. Processor seconds bear other work on the machine better than
those of the wall.

``--load_in_8bit`` adds this checkout with the base in 8 bits.

``--stock`` adds stock TRL: ``trl.GRPOTrainer``, with transformers' own decoding, weights and
autocast in ``--stock_dtype``, and TRL's default, gradient checkpointing, unless
``--no_stock_checkpointing``. Each of its prompts has as many tokens as ours, and all replies are
trained. Its training holds what a trainer does beside it: rewards, text, clipping, callbacks.
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
CLOCKS = (0, 1)  # of the processor, of the wall

# What both workers begin with.
COMMON = """
import json, resource, sys, time
import torch

PROMPTS, GENERATIONS, SHARED_TOKENS, OWN_TOKENS, REPLY_TOKENS = 4, 8, 520, 60, 112

def seconds():
    return time.process_time(), time.perf_counter()

def say(start, middle, end, held_in):
    unit = 1 if sys.platform == "darwin" else 1024
    spent = lambda a, b: [y - x for x, y in zip(a, b)]
    print(json.dumps({
        "rollout": spent(start, middle), "training": spent(middle, end), "step": spent(start, end),
        "peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9,
        "held in": held_in,
    }))
"""

WORKER = """
from abacist.policy.decoding.engine import Engine, Sampling
from abacist.policy.loading import default_lora, load_policy, quiet_libraries
from abacist.policy.scoring.score import score

folder, dtype, threads, checkpointing, train_replies, precision, in_8_bits = json.loads(sys.argv[1])
how = {}
if in_8_bits:
    from abacist.policy.quantization import Quantization
    how["quantization"] = Quantization(8)
quiet_libraries()
torch.set_num_threads(threads)
torch.set_float32_matmul_precision(precision)
network = load_policy(folder, dtype=dtype, lora=default_lora(r=32, alpha=64), **how).model
if checkpointing:
    network.gradient_checkpointing_enable({"use_reentrant": False})
    network.enable_input_require_grads()
trained = [weight for weight in network.parameters() if weight.requires_grad]
optimizer = torch.optim.AdamW(trained, lr=1e-6)
draw = torch.Generator().manual_seed(0)
tokens = lambda count: torch.randint(1000, 20000, (count,), generator=draw).tolist()
opening = tokens(SHARED_TOKENS)
prompts = [opening + tokens(OWN_TOKENS) for _ in range(PROMPTS)]

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
held_in = str(network.dtype).removeprefix("torch.") + ", linear layers in 8 bits" * in_8_bits
say(start, middle, seconds(), held_in)
"""

OWN, IN_8_BITS, STOCK = "this checkout", "this checkout in 8 bits", "stock TRL"
STOCK_WORKER = """
import tempfile
import transformers, trl
from datasets import Dataset
from peft import LoraConfig

PROMPT_TOKENS = SHARED_TOKENS + OWN_TOKENS
folder, dtype, threads, checkpointing = json.loads(sys.argv[1])
torch.set_num_threads(threads)
tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
texts = [word * PROMPT_TOKENS for word in (" one", " two", " six", " ten")]
assert all(len(tokenizer(text)["input_ids"]) == PROMPT_TOKENS for text in texts)
model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype))
at = {}

class Clock(transformers.TrainerCallback):
    def on_step_begin(self, *args, **kwargs):
        at["start"] = seconds()
    def on_step_end(self, *args, **kwargs):
        at["end"] = seconds()

class Timed(trl.GRPOTrainer):
    def _generate(self, prompts):
        prompt_ids, completion_ids, *rest = super()._generate(prompts)
        at["middle"] = seconds()
        assert {len(ids) for ids in prompt_ids} == {PROMPT_TOKENS}
        assert {len(ids) for ids in completion_ids} == {REPLY_TOKENS}
        return prompt_ids, completion_ids, *rest

with tempfile.TemporaryDirectory() as output:
    trainer = Timed(
        model=model,
        reward_funcs=lambda completions, **kwargs: [i % 8 / 8 for i in range(len(completions))],
        args=trl.GRPOConfig(
            output, use_cpu=True, bf16=dtype == "bfloat16", gradient_checkpointing=checkpointing,
            per_device_train_batch_size=GENERATIONS, gradient_accumulation_steps=PROMPTS,
            num_generations=GENERATIONS, max_completion_length=REPLY_TOKENS, max_steps=1,
            generation_kwargs={"min_new_tokens": REPLY_TOKENS}, temperature=1.0,
            learning_rate=1e-6, report_to="none", save_strategy="no", disable_tqdm=True,
        ),
        train_dataset=Dataset.from_list([{"prompt": text} for text in texts]),
        processing_class=tokenizer,
        peft_config=LoraConfig(
            r=32, lora_alpha=64, target_modules="all-linear", task_type="CAUSAL_LM"
        ),
        callbacks=[Clock()],
    )
    trainer.train()
say(at["start"], at["middle"], at["end"], dtype)
"""


def measure(name: str, args: argparse.Namespace) -> dict[str, Any]:
    """One step of what ``name`` names, or of the checkout in that folder, in its own process."""
    environment = {**os.environ, "OMP_NUM_THREADS": str(args.threads)}
    settings: list[Any] = [str(args.model.resolve())]
    if name == STOCK:
        worker = STOCK_WORKER
        settings += [args.stock_dtype, args.threads, not args.no_stock_checkpointing]
    else:
        worker = WORKER
        is_own = name in (OWN, IN_8_BITS)
        precision = args.float32_matmul_precision if is_own else args.precision_of_others
        settings += [args.dtype, args.threads, args.checkpointing, args.train_replies, precision]
        settings.append(name == IN_8_BITS)
        environment["PYTHONPATH"] = str((HERE if is_own else Path(name)) / "src")
    done = subprocess.run(
        [sys.executable, "-c", COMMON + worker, json.dumps(settings)],
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
    parser.add_argument("--load_in_8bit", action="store_true", help="against that, too")
    parser.add_argument("--stock", action="store_true", help="against stock TRL, too")
    parser.add_argument("--stock_dtype", default="bfloat16", help="its weights and autocast")
    parser.add_argument("--no_stock_checkpointing", action="store_true")
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--dtype", default="auto", help="how the weights are held")
    parser.add_argument("--checkpointing", action="store_true", help="gradient checkpointing")
    parser.add_argument("--float32_matmul_precision", default="highest", help="of this checkout")
    parser.add_argument("--precision_of_others", default="highest", help="the same of the others")
    parser.add_argument("--train_replies", type=int, default=8, help="of the 8 of each group")
    args = parser.parse_args()
    if args.stock and args.train_replies != 8:
        parser.error("stock TRL trains all replies: leave out --train_replies")
    names = [OWN, *map(str, args.against), *[IN_8_BITS] * args.load_in_8bit, *[STOCK] * args.stock]
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    for number in range(args.pairs):
        for name in sorted(names, reverse=bool(number % 2)):
            found[name].append(measure(name, args))
            print(f"round {number + 1}, {name}: {found[name][-1]}", file=sys.stderr, flush=True)
    own = found[OWN]
    for name, steps in found.items():
        print(f"{name}: held in {steps[0]['held in']}")
        print(f"  peak {spread([step['peak'] for step in steps])} GB")
        for part in PARTS:
            times = [spread([step[part][clock] for step in steps]) for clock in CLOCKS]
            line = f"  {part}: {times[0]} s of processor time, {times[1]} s by the clock"
            if name != OWN:
                pairs = list(zip(steps, own, strict=True))
                ratios = [spread([a[part][i] / b[part][i] for a, b in pairs]) for i in CLOCKS]
                line += f"; {' and '.join(ratios)} × this checkout's"
            print(line)


if __name__ == "__main__":
    main()
