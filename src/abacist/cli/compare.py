"""``abacist compare A B``: is B better than A on the same problems, and by how much?

Exit code 3 says "not better", so that the verb can stand as a gate before a release.
"""

from __future__ import annotations

from argparse import Namespace
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from abacist.cli import console
from abacist.cli.flags import Parser, count, not_negative
from abacist.errors import UsageError

if TYPE_CHECKING:
    from abacist.proof.comparison.compare import Comparison
    from abacist.proof.comparison.sides import Side
    from abacist.view.sheet import Block

NOT_BETTER = 3
ALLOWABLE = ("prompt", "shots", "budget", "sampling")  # of proof.comparison.alike


@dataclass
class Result:
    """What a comparison comes to: a page for people, a document for machines, and the lowest
    that the gain is believed to be (None where its test or its control speaks against it)."""

    page: list[Block]
    document: dict[str, Any]
    sure_gain: float | None
    names: tuple[str, str]
    found: Comparison | None = None


def run(argv: list[str]) -> int:
    """Run the verb; returns 3 when B is not better than A (by ``--at_least`` points)."""
    options = _parser().read(argv)
    _refuse_contradictions(options)
    with console.stdout_for(result_only=options.json) as stdout:
        from abacist.view.sheet import as_markdown, as_text

        if options.shots is not None:
            result = _by_shots(options)
        elif options.seeds is not None:
            result = _of_seeds(options)
        else:
            result = _of_pair(options)
        margin = options.at_least / 100
        better = result.sure_gain is not None and result.sure_gain > margin
        closing = _closing(better, options)
        page = [*result.page, closing]
        document = {
            "better": better,
            "at_least_points": options.at_least,
            "headline": result.page[0],
            **result.document,
        }
        if options.markdown is not None:
            from abacist.records.rundir import write_aside

            text = as_markdown("Abacist comparison", page).encode("utf-8", "backslashreplace")
            write_aside(Path(options.markdown), text)
        if options.html is not None:
            from abacist.view.report.writing import write_comparison

            write_comparison(Path(options.html), result.page, result.names, result.found)
        if options.json:
            console.print_json(document, stdout)
        else:
            print(as_text(page, console.columns(stdout)), file=stdout)
            for path in filter(None, (options.markdown, options.html)):
                print(f"It is written to {path} too.", file=stdout)
    return 0 if better else NOT_BETTER


def _closing(better: bool, options: Namespace) -> str:
    by = f" by more than {options.at_least:g} points" if options.at_least else ""
    who = "B is", "A"
    if options.shots is not None:
        who = "The trained policy is", "its base at every number of shots"
    than = who[1] + (" and its control" if options.control is not None else "")
    if better:
        return f"{who[0]} better than {than}{by}: exit code 0."
    return f"{who[0]} not proven better than {than}{by}: exit code {NOT_BETTER}."


def _of_pair(options: Namespace) -> Result:
    from abacist.proof.comparison.gate import pair_gate
    from abacist.proof.comparison.sides import AFTER, BEFORE, load_side
    from abacist.view.comparison import control_blocks, pair_page
    from abacist.view.plaintext import visible

    first, *rest = options.evaluations
    named = [(first, AFTER if rest else BEFORE), (rest[0] if rest else first, AFTER)]
    if options.control is not None:
        named.append((options.control, AFTER))
    sides = [load_side(path, when, sampled=options.sampled) for path, when in named]
    (a, b, *control), left_out = _of_new_problems(options, sides)
    gate = pair_gate(a, b, *control, allow_different=options.allow_different)
    num_examples = 3 if options.examples is None else options.examples
    page = pair_page(gate.found, (a.name, b.name), num_examples=num_examples)
    document: dict[str, Any] = {
        "a": a.name,
        "b": b.name,
        "comparison": gate.found.to_json(),
        "examples": [one.to_json("a", "b") for one in gate.found.examples(num_examples)],
    }
    if (beside := gate.control) is not None:
        document["control"] = beside.to_json()
        page[2:2] = control_blocks(gate.found, beside.gain, beside.beyond, beside.name)
    notes = left_out + gate.notes
    page += [f"Note: {visible(note)}" for note in notes]
    return Result(page, document | {"notes": notes}, gate.sure_gain, (a.name, b.name), gate.found)


def _of_seeds(options: Namespace) -> Result:
    from abacist.proof.comparison.gate import seeds_gate
    from abacist.proof.comparison.sides import AFTER, BEFORE, load_side
    from abacist.view.comparison import seeds_page
    from abacist.view.plaintext import visible

    runs = options.seeds
    afters = [load_side(one, AFTER, sampled=options.sampled) for one in runs]
    if options.evaluations:
        befores = [load_side(options.evaluations[0], AFTER, sampled=options.sampled)] * len(runs)
    else:
        befores = [load_side(one, BEFORE, sampled=options.sampled) for one in runs]
    sides, left_out = _of_new_problems(options, befores + afters)
    befores, afters = sides[: len(runs)], sides[len(runs) :]
    gate = seeds_gate(befores, afters, allow_different=options.allow_different)
    a_name = befores[0].name if options.evaluations else "each run, before training"
    notes = left_out + gate.notes
    page = [*seeds_page(gate.found, a_name), *(f"Note: {visible(note)}" for note in notes)]
    names = [side.name for side in afters]
    document = {"a": a_name, "b": names, "seeds": gate.found.to_json(), "notes": notes}
    return Result(page, document, gate.sure_gain, (a_name, ", ".join(names)))


def _of_new_problems(options: Namespace, sides: list[Side]) -> tuple[list[Side], list[str]]:
    """The sides on the problems that none of them has seen in training, and a note where that
    leaves any out; all as they are with ``--include_seen``."""
    from abacist.learning.seen import without_seen

    if options.include_seen:
        return sides, []
    sides, note = without_seen(sides)
    return sides, [note] if note else []


def _by_shots(options: Namespace) -> Result:
    from abacist.learning.fewshot import measure_shots
    from abacist.policy.loading import quiet_libraries
    from abacist.policy.source import BUILT_IN
    from abacist.proof.comparison.gate import least_gain
    from abacist.records.rundir import RunDir
    from abacist.view.comparison import shots_page
    from abacist.view.live import Live

    quiet_libraries()
    path = Path(options.evaluations[0]).expanduser()
    with Live() as watcher:
        found, trained_at = measure_shots(path, sorted(set(options.shots)), watcher)
    settings = RunDir.open(path).read_settings()
    page = shots_page(
        found,
        str(path),
        trained_at=str(trained_at),
        is_built_in=settings.get("model_name_or_path") == BUILT_IN,
    )
    document = {"run": str(path), "shots": {n: one.to_json() for n, one in found.items()}}
    return Result(page, document, least_gain(*found.values()), ("its base", str(path)))


def _refuse_contradictions(options: Namespace) -> None:
    """UsageError for what cannot be meant together, before anything is loaded."""
    given, seeds = options.evaluations, options.seeds
    if options.markdown is not None or options.html is not None:
        from abacist.view.report.writing import refuse_unfit

        if options.markdown is not None:
            refuse_unfit(Path(options.markdown), "Markdown", ".md", ".markdown")
        if options.html is not None:
            refuse_unfit(Path(options.html))
        paths = [Path(one).resolve() for one in (options.markdown, options.html) if one is not None]
        if len(set(paths)) < len(paths):
            raise UsageError("--markdown and --html name one file", "Name a file for each.")
    if options.shots is not None:
        if len(given) != 1 or seeds is not None or options.control is not None:
            raise UsageError("--shots is about one run", "abacist compare RUN --shots 0 1 8")
        _refuse_flags(options, "--shots", "sampled", "include_seen", "allow_different", "examples")
        return
    if seeds is not None:
        _refuse_flags(options, "--seeds", "examples")
        if options.control is not None:
            raise UsageError(
                "--control takes one run, and --seeds names several",
                "Compare each with the control: abacist compare RUN --control CONTROL",
            )
        options.evaluations, options.seeds = given[:1], [*given[1:], *seeds]
        named = [Path(one).resolve() for one in (*options.evaluations, *options.seeds)]
        if len(options.seeds) < 2:
            raise UsageError(
                "--seeds takes the runs of one method, two or more",
                "abacist compare BASE --seeds RUN_0 RUN_1 RUN_2",
            )
        if len(set(named)) < len(named):
            raise UsageError("one run was named twice", "Each seed's run counts once.")
        return
    if not given:
        raise UsageError("there is nothing to compare", "abacist compare RUN, or compare A B")
    if len(given) > 2:
        raise UsageError(
            f"{len(given)} evaluations were named, and a comparison has two sides",
            "If the first is the base and the others are several seeds of one method, add --seeds.",
        )


def _refuse_flags(options: Namespace, beside: str, *names: str) -> None:
    given = [f"--{name}" for name in names if getattr(options, name)]
    if given:
        raise UsageError(
            f"{' and '.join(given)} ha{'s' if len(given) == 1 else 've'} no effect with {beside}",
            f"Leave {'it' if len(given) == 1 else 'them'} out.",
        )


def _parser() -> Parser:
    parser = Parser(
        "compare",
        "Compares two evaluations of the same problems, problem by problem. A run stands for its "
        "evaluation after training; named alone, it is compared with its own before training.",
        "examples:\n"
        "  abacist compare runs/tiny-001\n"
        "  abacist compare runs/tiny-001 runs/tiny-002\n"
        "  abacist compare runs/a/evals/before --seeds runs/a runs/b runs/c\n"
        "  abacist compare runs/tiny-001 --control runs/random-001\n"
        "  abacist compare runs/tiny-001 --shots 0 1 8\n\n"
        "exit code: 0 B is better, 3 it is not (or not proven to be)",
    )
    parser.add_argument("evaluations", metavar="A B", nargs="*",
                        help="runs, or folders that hold evaluation.json")  # fmt: skip
    parser.add_argument("--seeds", nargs="*", metavar="RUN",
                        help="one method with several seeds; without A, each run against its own "
                        "before training")  # fmt: skip
    parser.add_argument("--control", metavar="RUN",
                        help="a run on placebo rewards (abacist train --control random): B must "
                        "beat it too")  # fmt: skip
    parser.add_argument("--shots", nargs="+", type=count, metavar="N",
                        help="measure A's base and A with so many worked examples in the prompt; "
                        "results are kept in the run")  # fmt: skip
    parser.add_argument("--sampled", action="store_true",
                        help="of a run, the sampled evaluations, not the greedy ones")  # fmt: skip
    parser.add_argument("--allow_different", nargs="+", default=[], choices=ALLOWABLE,
                        metavar="WHAT", help="compare although these differ: "
                        + ", ".join(ALLOWABLE))  # fmt: skip
    parser.add_argument("--include_seen", action="store_true",
                        help="compare also on problems that a side has seen in training: by "
                        "default they are left out, and counted")  # fmt: skip
    parser.add_argument("--at_least", type=not_negative, default=0.0, metavar="POINTS",
                        help="B counts as better only if the lower bound of its gain exceeds "
                        "this (0)")  # fmt: skip
    parser.add_argument("--examples", type=count, metavar="N",
                        help="problems to show with both replies (3)")  # fmt: skip
    parser.add_argument("--markdown", metavar="FILE", help="write the page there too, as Markdown")
    parser.add_argument("--html", metavar="FILE", help="write the page there too, with charts and "
                        "replies, to open in a browser")  # fmt: skip
    parser.add_argument("--json", action="store_true",
                        help="one JSON object on stdout, all else on stderr")  # fmt: skip
    return parser
