"""``abacist audit``: what can these rewards be made to pay for? On CPU, before a GPU hour is spent.

Exit code 0 where the rewards are sound, warnings included; 3 where they are not, so that it gates.
"""

from __future__ import annotations

from abacist.cli import console
from abacist.cli.flags import Parser, add_column_flags, positive

NOT_SOUND = 3


def run(argv: list[str]) -> int:
    """Run the verb."""
    options = _parser().read(argv)
    with console.stdout_for(result_only=options.json) as stdout:
        from abacist.task.audit.audit import audit
        from abacist.task.problems import load_problems, reading_options, whole_split
        from abacist.task.rewards import load_reward_funcs
        from abacist.view.audit import audit_text
        from abacist.view.live import Live

        rewards = load_reward_funcs(options.reward_funcs)
        problems = load_problems(
            options.dataset_name,
            # Every train row of a data set: nothing is learned here that could leak.
            split=whole_split(options.dataset_name),
            limit=options.limit,
            **reading_options(vars(options)),
        )
        with Live() as watcher:
            found = audit(
                rewards,
                problems,
                options.reward_weights,
                max_seconds=options.max_seconds,
                on_progress=watcher.progress,
            )
        if options.json:
            console.print_json({"data": options.dataset_name, **found.to_json()}, stdout)
        else:
            named = options.dataset_name
            data = "generated problems" if named == "generated" else f"problems of {named}"
            print("\n" + audit_text(found, data, console.columns(stdout)), file=stdout)
    return 0 if found.sound else NOT_SOUND


def _parser() -> Parser:
    parser = Parser(
        "audit",
        "Tries a reward set on every gold in every legitimate form, on answers that only look "
        "right, and on replies that want to be paid without solving anything; says what each "
        "earns. No model and no GPU are needed.",
        "exit code: 0 sound (perhaps with warnings), 3 not sound\n\nexamples:\n"
        "  abacist audit\n"
        "  abacist audit --reward_funcs gist --dataset_name openai/gsm8k\n"
        "  abacist audit --reward_funcs correctness mine.py:brevity --reward_weights 1 0.2",
    )
    rewards = parser.add_argument_group("rewards")
    rewards.add_argument("--reward_funcs", nargs="+", default=["default"], metavar="NAME",
                         help="built-in ones, the sets default and gist, module.function or "
                              "file.py:function (default)")  # fmt: skip
    rewards.add_argument("--reward_weights", nargs="+", type=float, metavar="W",
                         help="one factor for each")  # fmt: skip
    data = parser.add_argument_group("problems")
    data.add_argument("--dataset_name", default="generated", metavar="DATA",
                      help="generated, a Hub id, a folder, or a JSONL, CSV or Parquet file"
                      )  # fmt: skip
    add_column_flags(data)
    data.add_argument("--dataset_train_split", default="train", metavar="NAME",
                      help="the split to read (train)")  # fmt: skip
    data.add_argument("--skip_bad_rows", action="store_true", help="leave unusable rows out")
    data.add_argument("--limit", type=positive, metavar="N", help="at most so many problems")
    parser.add_argument("--max_seconds", type=positive, default=300, metavar="N",
                        help="stop after so many, and say how far it came (300)")  # fmt: skip
    parser.add_argument("--json", action="store_true",
                        help="one JSON object on stdout, all else on stderr")  # fmt: skip
    return parser
