"""Does the first run really teach? ``python bench/learning.py`` (about half an hour on 2 cores).

Trains the recipe ``tiny`` with several seeds and measures base and trained model on the same
fresh held-out problems (another seed than any run uses), greedy and sampled. Beside it stand three
controls: the base forced into its careful format by a prefilled reasoning tag, and runs of the
same budget that are paid at random (``--control random``) or for form alone (``--control
format``). Prints a table and writes JSON; every run is kept.

Nothing here is tuned on: the held-out seed is used nowhere else.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from abacist.learning.config import load_config
from abacist.learning.train import train
from abacist.policy.loading import Policy, load_policy
from abacist.proof.comparison.compare import compare
from abacist.proof.evaluate import Evaluation, evaluate
from abacist.task.problems import Problem, load_problems
from abacist.view.live import Live
from abacist.view.verdict import headline

FRESH_SEED = 20261122
CAREFUL_PREFILL = "<reasoning>\n"
CONTROLS = ("random", "format")


def measure(policy: Policy, problems: list[Problem], num_samples: int) -> dict[str, Evaluation]:
    """Greedy replies to all problems, and ``num_samples`` sampled ones to each."""
    how: dict[str, Any] = {"max_completion_tokens": 96, "batch_size": 100, "system_prompt": None}
    return {
        "greedy": evaluate(policy, problems, **how),
        "sampled": evaluate(policy, problems, num_samples=num_samples, temperature=1.0, **how),
    }


def figures(found: Mapping[str, Evaluation]) -> dict[str, float]:
    """The numbers of one model that the table shows, as fractions (rewards as paid)."""
    greedy, sampled = found["greedy"], found["sampled"]
    seen, unseen = (
        next(row for row in greedy.by_structure() if row.label.startswith(kind))
        for kind in ("seen", "unseen")
    )
    rewards = {f"reward {name}": value.value for name, value in sampled.rewards.items()}
    return {
        "accuracy": greedy.accuracy.value,
        "accuracy, seen structures": seen.accuracy.value,
        "accuracy, unseen structures": unseen.accuracy.value,
        "any-format accuracy": greedy.figures["any_format"].value,
        "structure adherence": greedy.figures["adheres"].value,
        "sampled accuracy": sampled.accuracy.value,
        "sampled strict format": sampled.figures["strict"].value,
        "sampled structure adherence": sampled.figures["adheres"].value,
        "consistency of format": sampled.figures["format_consistency"].value,
        "consistency of answer": sampled.figures["answer_consistency"].value,
        **rewards,
    }


def run(recipe_flags: list[str], folder: Path) -> tuple[Path, float]:
    """Train once; where the run is, and its wall-clock seconds."""
    started = time.monotonic()
    flags = ["--output_dir", str(folder), "--num_heldout_problems", "0", *recipe_flags]
    with Live() as watcher:
        result = train(load_config("tiny", None, flags), watcher)
    return result.path, time.monotonic() - started


def table(columns: Mapping[str, Mapping[str, float]]) -> str:
    """One row a figure, one column a model."""
    names = list(next(iter(columns.values())))
    lines = [f"{'':<30}" + "".join(f"{name:>12}" for name in columns)]
    for name in names:
        number: Callable[[float], str] = (
            (lambda v: f"{v:12.3f}") if name.startswith("reward") else (lambda v: f"{v:12.1%}")
        )
        lines.append(f"{name:<30}" + "".join(number(column[name]) for column in columns.values()))
    return "\n".join(lines)


def main() -> None:
    """Run everything and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--problems", type=int, default=900)
    parser.add_argument("--samples", type=int, default=4)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--output", type=Path, default=Path("runs/bench-learning"))
    parser.add_argument("--flags", nargs=argparse.REMAINDER, default=[], help="given to every run")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    fresh = load_problems("generated", split="heldout", limit=options.problems, seed=FRESH_SEED)

    base = load_policy("tiny")
    before = measure(base, fresh, options.samples)
    careful = evaluate(
        base, fresh, prefill=CAREFUL_PREFILL, max_completion_tokens=96, batch_size=100,
        system_prompt=None,
    )  # fmt: skip
    columns = {"base": figures(before)}
    seconds: dict[str, float] = {}
    comparisons: dict[str, Any] = {}
    after: dict[str, Evaluation] = {}
    arms = [(f"seed {seed}", ["--seed", str(seed)]) for seed in options.seeds]
    arms += [(control, ["--control", control, "--seed", "0"]) for control in CONTROLS]
    for name, flags in arms:
        folder = options.output / name.replace(" ", "-")
        path, seconds[name] = run([*flags, *options.flags], folder)
        found = measure(load_policy(str(path)), fresh, options.samples)
        after[name] = found["greedy"]
        columns[name] = figures(found)
        comparisons[f"{name} against base"] = compare(before["greedy"], found["greedy"])
        comparisons[f"{name} against careful base"] = compare(
            careful, found["greedy"], allow_different=["prompt"]
        )
    for seed in options.seeds:
        for control in CONTROLS:
            against = compare(after[control], after[f"seed {seed}"])
            comparisons[f"seed {seed} against {control}"] = against

    print(f"\n{len(fresh)} fresh held-out problems, {options.samples} samples each where sampled\n")
    print(table(columns))
    print(f"\nbase forced into its careful format: accuracy {careful.accuracy.value:.1%}\n")
    for name, comparison in comparisons.items():
        print(f"{name}: {headline(comparison)}")
        if worked := comparison.shown_work:
            print(
                f"    work shown both times ({worked.change.n} problems): "
                f"{worked.before.value:.1%} -> {worked.after.value:.1%}, change "
                f"[{worked.change.low:+.1%}, {worked.change.high:+.1%}], p = {worked.p_value:.1g}"
            )
    print("\nseconds of a run:", {name: round(value) for name, value in seconds.items()})
    document = {
        "problems": len(fresh),
        "samples": options.samples,
        "figures": columns,
        "careful_base": careful.to_json(),
        "comparisons": {name: one.to_json() for name, one in comparisons.items()},
        "seconds": seconds,
    }
    (options.output / "learning.json").write_text(
        json.dumps(document, indent=2, default=str), encoding="utf-8"
    )


if __name__ == "__main__":
    main()
