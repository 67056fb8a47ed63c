"""``abacist bundle RUN``: pack what a result rests on, so that anybody can check it."""

from __future__ import annotations

import shlex
from pathlib import Path

from abacist.cli import console
from abacist.cli.flags import Parser


def run(argv: list[str]) -> int:
    """Run the verb; 0 also for a run without a verdict: a note says so."""
    options = _parser().read(argv)
    with console.stdout_for(result_only=options.json) as stdout:
        from abacist.delivery.bundle import bundle

        output = options.output and options.output.expanduser()
        made = bundle(options.run.expanduser(), output, overwrite=options.overwrite)
        if options.json:
            console.print_json(made, stdout)
            return 0
        print(f"The bundle is {made.path}: {_size(made.size_bytes)}.")
        if made.beside:
            count = f"{len(made.beside)} file{'s' if len(made.beside) > 1 else ''} of weights"
            print(f"{count}, {_size(made.beside_bytes)}, in {made.beside[0].parent}: they belong "
                  "to it.")  # fmt: skip
        for note in made.notes:
            print(f"  {note}")
        print(f"Its fingerprint, to be published beside the result:\n  {made.fingerprint}")
        print(
            "Anybody can check it:\n  "
            + console.as_typed(f"abacist verify {shlex.quote(str(made.path))} --fingerprint …")
        )
        print("It holds the questions, golds and replies of the run, and no path or token of this "
              "machine.")  # fmt: skip
    return 0


def _size(count: int) -> str:
    return f"{count / 1e6:,.1f} MB" if count >= 1e5 else f"{count:,} bytes"


def _parser() -> Parser:
    parser = Parser(
        "bundle",
        "Packs what a result rests on into one small file: settings, versions, metrics, the "
        "verdict with every reply behind it, and training rollouts with the random numbers they "
        "were drawn by. `abacist verify` checks it, on any machine. Small adapters are inside, "
        "large ones in a folder beside it; whole models stay with the run.",
        "examples:\n  abacist bundle runs/tiny-001\n"
        "  abacist bundle runs/qwen2.5-1.5b-001 -o results/qwen.bundle.zip",
    )
    add = parser.add_argument
    add("run", metavar="RUN", type=Path, help="a run, finished or not")
    add("-o", "--output", type=Path, metavar="FILE", help="where to write it (NAME.bundle.zip in "
        "the working directory)")  # fmt: skip
    add("--overwrite", action="store_true", help="replace a file that is there already")
    add("--json", action="store_true", help="one JSON object on stdout, all else on stderr")
    return parser
