"""``abacist eval MODEL|RUN``: how good is it, how sure is that, and under which conditions?"""

from __future__ import annotations

from argparse import ArgumentTypeError
from pathlib import Path

from abacist.cli import console
from abacist.cli.flags import (
    Parser,
    add_column_flags,
    add_loading_flags,
    count,
    not_negative,
    positive,
)

SPLITS = ("test", "train", "selection", "heldout", "all")


def run(argv: list[str]) -> int:
    """Run the verb; a model that gets nothing right is a result and no failure."""
    options = vars(_parser().read(argv))
    as_json = options.pop("json")
    with console.stdout_for(result_only=as_json) as stdout:
        console.say_starting()
        from abacist.learning.eval import evaluate_model, request_of
        from abacist.view.evaltext import evaluation_json, evaluation_text
        from abacist.view.live import Live
        from abacist.view.report.writing import write_evaluation

        request = request_of(options)
        with Live() as watcher:
            found = evaluate_model(request, watcher=watcher, render=write_evaluation)
        if as_json:
            figures = evaluation_json(found.greedy, found.sampled)
            console.print_json({"path": found.path, **figures}, stdout)
        else:
            print("\n" + evaluation_text(found.greedy, found.sampled, console.columns(stdout)))
            print(
                f"\nFigures, replies, plot and a page to look at (report.html) are in {found.path}."
            )
    return 0


def _parser() -> Parser:
    parser = Parser(
        "eval",
        "Measures a model on problems with known answers: every figure with its 95 % interval, by "
        "difficulty, with the replies behind it. A run is asked as it was trained, on its own "
        "held-out problems, unless you say otherwise. Run the same command again to continue a "
        "stopped evaluation.",
        "examples:\n  abacist eval tiny --num_samples 4\n"
        "  abacist eval runs/qwen2.5-1.5b-001 --dataset_name openai/gsm8k --split test\n"
        "  abacist eval Qwen/Qwen2.5-1.5B-Instruct --native_prompt",
    )
    parser.add_argument("model", metavar="MODEL", help="a run, a Hub id, a folder, an adapter, or "
                        "tiny")  # fmt: skip
    problems = parser.add_argument_group("problems")
    add = problems.add_argument
    add("--dataset_name", metavar="DATA", help="Hub id, folder, file, generated or gsm_symbolic "
        "(a run's own; tiny: generated; else openai/gsm8k)")  # fmt: skip
    add_column_flags(problems)
    add("--split", choices=SPLITS, help="which part (a run's own data and generated: heldout; a "
        "file: all; else test)")  # fmt: skip
    add("--num_problems", type=positive, metavar="N", help="at most so many (all)")
    add("--include_seen", action="store_true", help="ask also what the run has seen in training: "
        "by default such problems are left out, and counted")  # fmt: skip
    add("--perturb", type=count, metavar="SEED", help="the same problems with other numbers")
    add("--skip_bad_rows", action="store_true", help="leave out rows that cannot be read; rows "
        "without gold are kept and counted")  # fmt: skip
    prompt = parser.add_argument_group("prompt")
    add = prompt.add_argument
    add("--system_prompt", metavar="TEXT", help="default, none, or your own (as trained)")
    add("--num_shots", metavar="N", help="worked examples in the prompt (as trained, else 0)")
    add("--shots_file", metavar="FILE", help="take the examples from this file; steps: those "
        "that come with Abacist")  # fmt: skip
    add("--prefill", default="", metavar="TEXT", help="opens every reply and counts as part of it")
    add("--native_prompt", action="store_true", help="the model's own best-known prompt: the "
        "honest baseline")  # fmt: skip
    replies = parser.add_argument_group("replies")
    add = replies.add_argument
    add("--max_completion_length", type=positive, metavar="N", help="tokens a reply may have (as "
        "trained, else 512)")  # fmt: skip
    add("--num_samples", type=positive, default=1, metavar="K", help="sampled replies to each "
        "problem, beside the greedy one, if more than 1")  # fmt: skip
    add("--temperature", type=_above_zero, metavar="T", help="sampling temperature (1)")
    add("--batch_size", type=positive, default=64, metavar="N", help="replies in work at a time "
        "(64); changes no figure in float32")  # fmt: skip
    add("--seed", type=count, default=0, metavar="N", help="random seed of sampling (0)")
    add("--float32_matmul_precision", choices=("highest", "high", "medium"), metavar="NAME",
        help="highest, or medium: PyTorch's setting, faster on processors made for bfloat16 (as "
        "trained, else highest)")  # fmt: skip
    result = parser.add_argument_group("result")
    add = result.add_argument
    add("--output_dir", type=Path, metavar="DIR", help="the folder it is kept in (a new one in the "
        "run's evals/, or in evals/)")  # fmt: skip
    add("--overwrite", action="store_true", help="replace an evaluation that is there already")
    add("--json", action="store_true", help="one JSON object on stdout, all else on stderr")
    add_loading_flags(parser)
    return parser


def _above_zero(text: str) -> float:
    value = not_negative(text)
    if value == 0:
        raise ArgumentTypeError("0 is greedy, and the greedy reply is always asked for")
    return value
