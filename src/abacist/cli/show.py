"""``abacist show RUN``: read the replies of a run, and see why each was judged so."""

from __future__ import annotations

import math
import sys
from argparse import ArgumentTypeError, Namespace
from pathlib import Path
from typing import TYPE_CHECKING

from abacist.cli import console
from abacist.cli.flags import Parser, count, positive
from abacist.errors import RunError, UsageError

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

    from abacist.proof.browse import Found, Place, Query, Source

OUTCOMES = ("right", "unformatted", "truncated", "wrong", "unjudged")  # of proof.outcomes
DEFAULT_NUM = 3


def run(argv: list[str]) -> int:
    """Run the verb; 1 where nothing fits or a file could not be read, whatever else was shown."""
    options = _parser().read(argv)
    low, high = options.min_reward, options.max_reward
    if low is not None and high is not None and low > high:
        raise UsageError("--min_reward is above --max_reward", "No reply can earn that.")
    with console.stdout_for(result_only=options.json):
        from abacist.proof.browse import find, source_of

        source = source_of(Path(options.run).expanduser(), options.split)
        query = _query(options)
        found = find(source, query)
        for damaged in found.damaged:
            console.say_error(damaged, "The other files are shown.")
        if not found.places:
            raise _nothing(source, query, found)
    if options.json:
        _print_json(source, found, options)
    else:
        _print_pages(source, found, query, options)
    return 1 if found.damaged else 0


def _query(options: Namespace) -> Query:
    from abacist.proof.browse import Query
    from abacist.proof.outcomes import Outcome

    return Query(
        step=options.step,
        problem_id=options.problem,
        outcome=None if options.outcome is None else Outcome(options.outcome),
        min_reward=options.min_reward,
        max_reward=options.max_reward,
        text=options.text,
    )


def _nothing(source: Source, query: Query, found: Found) -> RunError:
    if not found.num_read:
        return RunError(
            f"{source.path}: there is no reply that can be read.",
            f"Steps: {_span(found.steps)}." if found.steps and query.step is not None else "",
        )
    hints = []
    if found.steps:
        hints.append(f"Steps: {_span(found.steps)}.")
    if query.problem_id is not None and query.problem_id not in found.problem_ids:
        from abacist.cli.flags import nearest

        guess = nearest(query.problem_id, sorted(found.problem_ids)[:10_000])
        hints.append(f"Did you mean --problem {guess}?" if guess else "There is no such problem.")
    return RunError(
        f"{source.path}: none of {found.num_read:,} replies fits.",
        " ".join(hints) or "Ask for less: each flag must fit.",
    )


def _span(steps: set[int]) -> str:
    low, high = min(steps), max(steps)
    return str(low) if low == high else f"{low} to {high}"


def _print_json(source: Source, found: Found, options: Namespace) -> None:
    from abacist.proof.browse import group_of, rollouts_at
    from abacist.view.show import rollout_json

    places = _chosen(found, options, is_default=False)
    document = {
        "path": source.path,
        "split": source.split,
        "finished": source.is_finished,
        "damaged": found.damaged,
        "matching": len(found.places),
        "outcomes": {outcome.value: number for outcome, number in found.outcomes.items()},
    }
    if options.group:
        groups = [group_of(source, place) for place in places]
        document["groups"] = [[rollout_json(one) for one in members] for members in groups]
    else:
        document["replies"] = [rollout_json(one) for one in rollouts_at(places)]
    console.print_json(document, sys.stdout)


def _print_pages(source: Source, found: Found, query: Query, options: Namespace) -> None:
    from rich.console import Console
    from rich.text import Text

    from abacist.proof.browse import group_of, rollouts_at
    from abacist.view.show import MAX_COLUMNS, PIPE_COLUMNS, group_page, pages, summary_lines

    screen = Console(highlight=False, force_jupyter=False)
    if not screen.is_terminal:
        screen.width = PIPE_COLUMNS
    screen.width = width = max(20, min(screen.width, MAX_COLUMNS))
    is_default = query.is_empty and options.seed is None and options.num is None
    places = _chosen(found, options, is_default=is_default)
    _write(screen, Text("\n".join(summary_lines(source, found, width)) + "\n"))
    if options.group:
        for place, one in zip(places, rollouts_at(places), strict=True):
            _write(screen, group_page(group_of(source, place), width, marked=one.member))
    else:
        for page in pages(rollouts_at(places), width, ascii_only=screen.options.ascii_only):
            _write(screen, page)
    if is_default and not options.group:
        _write(screen, Text("\nMore: --outcome wrong, --step N, --num N, --group, --help.", "dim"))
    elif len(places) < len(found.places):
        _write(screen, Text("\n--num N shows more of them, --seed N others.", "dim"))


def _chosen(found: Found, options: Namespace, *, is_default: bool) -> list[Place]:
    from abacist.proof.browse import chosen, one_of_each_group, one_of_each_outcome

    if options.group:
        return chosen(one_of_each_group(found.places), options.num or 1, seed=options.seed)
    if is_default:
        return one_of_each_outcome(found, DEFAULT_NUM)
    return chosen(found.places, options.num or DEFAULT_NUM, seed=options.seed)


def _write(screen: Console, page: RenderableType) -> None:
    """Print by way of stdout itself: rich would end the process where `head` has read enough."""
    with screen.capture() as captured:
        screen.print(page)
    text = captured.get()
    if not screen.is_terminal:
        text = "\n".join(line.rstrip() for line in text.split("\n"))
    sys.stdout.write(text)


def _parser() -> Parser:
    parser = Parser(
        "show",
        "Shows replies of a run: what was asked and replied, what each reward paid, and why the "
        "reply was judged so. Without filters: of the newest step a right reply, one that is right "
        "but unformatted, and a wrong one, where there are.",
        "outcomes:\n"
        "  right        the answer is right by our rule\n"
        "  unformatted  the last number is right, but our rule does not read it\n"
        "  truncated    cut off at the budget of tokens, and not right\n"
        "  wrong        all else\n\n"
        "examples:\n"
        "  abacist show runs/tiny-001\n"
        "  abacist show runs/tiny-001 --outcome unformatted --num 5\n"
        "  abacist show runs/tiny-001 --step 10 --group\n"
        "  abacist show runs/tiny-001 --split after --outcome wrong --seed 1",
    )
    parser.add_argument("run", metavar="RUN", help="a run, the output of abacist.GRPOTrainer, an "
                        "evaluation, or a Parquet file of rollouts")  # fmt: skip
    which = parser.add_argument_group("which replies")
    add = which.add_argument
    add("--split", metavar="NAME", help="train, or a folder in the run's evals/: before, after, "
        "before-sampled … (train)")  # fmt: skip
    add("--step", type=count, metavar="N", help="of this step")
    add("--problem", metavar="ID", help="to this problem")
    add("--outcome", choices=OUTCOMES, metavar="NAME", help=", ".join(OUTCOMES[:-1]))
    add("--min_reward", type=_finite, metavar="R", help="that earned at least so much")
    add("--max_reward", type=_finite, metavar="R", help="that earned at most so much")
    add("--text", metavar="TEXT", help="that hold this text, or answer a question that does")
    shown = parser.add_argument_group("what is shown")
    add = shown.add_argument
    add("--num", type=positive, metavar="N", help=f"how many ({DEFAULT_NUM}; with --group 1)")
    add("--seed", type=count, metavar="N", help="a random choice, not the newest first")
    add("--group", action="store_true", help="the whole group of each, side by side")
    add("--json", action="store_true", help="one JSON object on stdout, all else on stderr")
    return parser


def _finite(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise ArgumentTypeError(f"{text!r} is not a number")
    return value
