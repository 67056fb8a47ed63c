"""``abacist verify BUNDLE``: is this result what it says it is?"""

from __future__ import annotations

import textwrap
from argparse import ArgumentTypeError
from pathlib import Path
from typing import TYPE_CHECKING

from abacist.cli import console
from abacist.cli.flags import Parser, count

if TYPE_CHECKING:
    from abacist.delivery.verify import Verification

INCOMPLETE = 3
FAULTS_SHOWN = 5  # of one check; --json has more
_ALL = 2**31


def run(argv: list[str]) -> int:
    """Run the verb; 0 if all holds, 1 if anything does not, 3 if the replies could not be
    replayed because weights were missing."""
    options = _parser().read(argv)
    with console.stdout_for(result_only=options.json) as stdout:
        from abacist.delivery.verify import Request, verify
        from abacist.view.live import Live

        request = Request(
            options.bundle.expanduser(),
            model=options.model,
            weights=options.weights and options.weights.expanduser(),
            dataset_name=options.dataset_name,
            fingerprint=options.fingerprint,
            replies=options.replies,
            seed=options.seed,
            device=options.device,
            dtype=options.dtype,
        )
        with Live() as watcher:
            found = verify(request, watcher)
        if options.json:
            console.print_json(found.to_json(), stdout)
        else:
            print("\n" + text_of(found, console.columns(stdout)))
    if not found.holds:
        return 1
    return 0 if found.is_complete else INCOMPLETE


def text_of(found: Verification, width: int) -> str:
    """What was found, for a person, in lines of at most ``width`` characters."""
    from abacist.delivery.verify import CANNOT_TELL
    from abacist.view.plaintext import visible

    num_faults = sum(check.num_faults for check in found.checks)
    if num_faults:
        names = ", ".join(check.name for check in found.checks if not check.holds)
        head = f"DOES NOT HOLD: {num_faults:,} fault{'s' * (num_faults > 1)} ({names})."
    elif found.is_complete:
        head = "Holds: nothing that was checked is wrong."
    else:
        head = "INCOMPLETE: nothing that was checked is wrong, but not all could be checked."
    lines = [f"{found.bundle}: {head}", ""]

    def add(text: str, first: str, rest: str) -> None:
        lines.extend(textwrap.wrap(visible(text), width, initial_indent=first,
                                   subsequent_indent=rest))  # fmt: skip

    indent = " " * 14
    for check in found.checks:
        mark = "ok" if check.holds else "NO"
        mark = "--" if check.holds and check.is_incomplete else mark
        add(check.looked_at, f"{mark}  {check.name:<10}", indent)
        for fault in check.faults[:FAULTS_SHOWN]:
            add(str(fault), f"{indent}! ", f"{indent}  ")
        if (more := check.num_faults - FAULTS_SHOWN) > 0:
            add(f"and {more:,} more (--json lists {len(check.faults):,})", f"{indent}! ", indent)
        for note in check.notes:
            add(note, f"{indent}- ", f"{indent}  ")
        for note in check.not_checked:
            add(f"not checked: {note}", f"{indent}- ", f"{indent}  ")
    lines.append("")
    add(f"fingerprint {found.fingerprint}", "", "  ")
    if not found.is_published:
        add("Compare it with the published one (--fingerprint): whoever edits a bundle can make "
            "its sums anew.", "  ", "  ")  # fmt: skip
    add("What a bundle cannot show: " + "; ".join(CANNOT_TELL) + ".", "", "  ")
    return "\n".join(lines)


def _replies(text: str) -> int:
    if text == "all":
        return _ALL
    try:
        return count(text)
    except ArgumentTypeError:
        raise ArgumentTypeError(f"{text!r} is neither a number of replies nor all") from None


def _parser() -> Parser:
    parser = Parser(
        "verify",
        "Checks a bundle that `abacist bundle` made, on any machine: its files against its index, "
        "every number that follows from the replies, and the replies themselves, which are "
        "replayed token by token by the weights that are said to have written them. Names what "
        "does not hold: the file, the item, what was claimed, what was found.",
        "exit codes: 0 all holds, 1 something does not,\n3 nothing is wrong, but the data or the "
        "weights to replay were missing\n\nexamples:\n  abacist verify tiny-001.bundle.zip\n"
        "  abacist verify qwen.bundle.zip --model models/Qwen2.5 --replies 32\n"
        "  abacist verify full.bundle.zip --weights runs/full-001 --dataset_name my.jsonl",
    )
    add = parser.add_argument
    add("bundle", metavar="BUNDLE", type=Path, help="the file")
    add("--fingerprint", metavar="HEX", help="the published one; without it only what contradicts "
        "the replies or the weights is found")  # fmt: skip
    add("--model", metavar="MODEL", help="the base model: a folder or Hub id (as the run names it)")
    add("--weights", type=Path, metavar="DIR", help="where to look for weights that are not in the "
        "bundle nor beside it: they are found by their SHA-256")  # fmt: skip
    add("--dataset_name", metavar="DATA", help="the data at hand, to compare questions and golds: "
        "folder, file or Hub id (generated data is made anew)")  # fmt: skip
    add("--replies", type=_replies, metavar="N", help="replies to replay of each kind, or all; 0: "
        "none (as many as take minutes)")  # fmt: skip
    add("--seed", type=count, metavar="N", help="draws which replies (a new one each time, so that "
        "nobody can know them before)")  # fmt: skip
    add("--device", default="auto", help="auto, cpu, cuda, cuda:N or mps")
    add("--dtype", default="auto", help="of the replay: float32 (auto), bfloat16 or float16")
    add("--json", action="store_true", help="one JSON object on stdout, all else on stderr")
    return parser
