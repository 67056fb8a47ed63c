"""What `--float32_matmul_precision medium` rounds away on a CPU, beside what bf16 autocast does.

    python bench/matmul_precision.py MODEL PROBLEMS.jsonl [--problems 16] [--threads 1]

MODEL is a local folder whose weights are stored in bfloat16; each line of PROBLEMS.jsonl has a
"question" and an "answer", such as GSM8K's. The answers are scored under LoRA r16 with a loud
adapter: by our forward with `highest` (the reference) and `medium`, and by transformers' own under
bf16 autocast, as stock TRL trains. Printed are the differences of log-probabilities, the KL a
token, and the error of the gradient of a sum of log-probabilities weighted like advantages.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch

from abacist.policy.choices import float32_matmul_precision
from abacist.policy.kernels import build
from abacist.policy.loading import default_lora, load_policy, quiet_libraries
from abacist.policy.scoring.score import score

ROWS = 4  # of a batch
Batch = tuple[torch.Tensor, torch.Tensor, int]
Found = tuple[torch.Tensor, torch.Tensor]


def batches(policy: Any, problems: list[dict[str, str]]) -> list[Batch]:
    """(ids [B, P+C], mask [B, P+C], C) of some problems each, padded as TRL does."""
    found = []
    pad = policy.chat.tokenizer.pad_token_id
    for start in range(0, len(problems), ROWS):
        some = problems[start : start + ROWS]
        prompts = [
            policy.chat.encode([{"role": "user", "content": one["question"]}]) for one in some
        ]
        replies = [
            policy.chat.tokenizer(one["answer"], add_special_tokens=False)["input_ids"]
            for one in some
        ]
        before, after = max(map(len, prompts)), max(map(len, replies))
        pairs = list(zip(prompts, replies, strict=True))
        ids = [[pad] * (before - len(p)) + p + r + [pad] * (after - len(r)) for p, r in pairs]
        mask = [
            [0] * (before - len(p)) + [1] * (len(p) + len(r)) + [0] * (after - len(r))
            for p, r in pairs
        ]
        found.append((torch.tensor(ids), torch.tensor(mask), after))
    return found


def scored(network: Any, found: list[Batch], *, autocast: bool = False) -> Found:
    """Log-probabilities of all reply tokens, and the gradient of their weighted sum."""
    network.zero_grad()
    logps = []
    for ids, mask, width in found:
        if autocast:
            with torch.autocast("cpu", dtype=torch.bfloat16):
                positions = (mask.cumsum(1) - 1).clamp(min=0)
                output = network(input_ids=ids, attention_mask=mask, position_ids=positions)
            logits = output.logits[:, -width - 1 : -1].float()
            some = logits.log_softmax(-1).gather(2, ids[:, -width:, None])[..., 0]
        else:
            some, _ = score(network, ids, mask, width, temperature=1.0)
        is_reply = mask[:, -width:].bool()
        weights = torch.linspace(-1, 1, len(ids))[:, None]
        (some * weights * is_reply).sum().backward()
        logps.append(some.detach()[is_reply])
    gradients = [w.grad.flatten() for w in network.parameters() if w.requires_grad]
    return torch.cat(logps), torch.cat(gradients).clone()


def tell(name: str, found: Found, exact: Found) -> None:
    """Print one line."""
    difference = (found[0] - exact[0]).double()
    kl = (difference.neg().exp() - 1 + difference).mean()
    error = (found[1] - exact[1]).norm() / exact[1].norm()
    print(
        f"{name:14} log-probabilities: mean |d| {difference.abs().mean():.5f}, "
        f"99 % {difference.abs().quantile(0.99):.4f}, largest {difference.abs().max():.3f}; "
        f"KL a token {kl:.1e}; gradient off by {error:.2%}",
        flush=True,
    )


def main() -> None:
    """Compare, and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("problems_file", type=Path)
    parser.add_argument("--problems", type=int, default=16)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    quiet_libraries()
    torch.set_num_threads(args.threads)
    if not build.can_multiply_pairs():
        print("This processor does not multiply bfloat16: medium is highest here.")
    policy = load_policy(str(args.model), lora=default_lora(r=16, alpha=32), device="cpu")
    draw = torch.Generator().manual_seed(1)
    for name, weight in policy.model.named_parameters():
        if "lora_B" in name:
            weight.data = torch.randn(weight.shape, generator=draw) * 0.005
    with args.problems_file.open(encoding="utf-8", newline="\n") as lines:
        problems = [json.loads(line) for line, _ in zip(lines, range(args.problems), strict=False)]
    found = batches(policy, problems)
    exact = scored(policy.model, found)
    print(f"{len(exact[0]):,} reply tokens of {len(problems)} problems", flush=True)
    with float32_matmul_precision("medium"):
        tell("medium", scored(policy.model, found), exact)
    policy.model.float()
    tell("bf16 autocast", scored(policy.model, found, autocast=True), exact)


if __name__ == "__main__":
    main()
