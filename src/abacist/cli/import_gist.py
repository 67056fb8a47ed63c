"""``abacist import-gist SCRIPT``: a pasted training script becomes a configuration."""

from __future__ import annotations

import shlex
import textwrap
from pathlib import Path
from typing import TYPE_CHECKING

from abacist.cli import console
from abacist.cli.flags import Parser

if TYPE_CHECKING:
    from abacist.delivery.importing.importing import Imported


def run(argv: list[str]) -> int:
    """Run the verb; 0 also where much was wrong with the script: the list says so."""
    options = _parser().read(argv)
    with console.stdout_for(result_only=options.json) as stdout:
        from abacist.delivery.importing.importing import import_gist

        path = Path(options.script).expanduser()
        imported = import_gist(
            path,
            faithful=options.faithful,
            model=options.model_name_or_path,
            dataset=options.dataset_name,
        )
        config = Path(options.output or f"{path.stem}.yaml").expanduser()
        written = imported.write(config, overwrite=options.overwrite)
        if options.json:
            files = {"config": config, "files": written}
            console.print_json(files | imported.to_json(), stdout)
        else:
            print(said(imported, written, console.columns(stdout)), file=stdout)
    return 0


def said(imported: Imported, written: list[Path], width: int) -> str:
    """The findings by kind, each with its line, and what to do next."""
    from abacist.delivery.importing.notes import Kind
    from abacist.view.plaintext import visible

    blocks = []
    for kind in (Kind.WRONG, Kind.LEFT_OUT, Kind.CHANGED):
        notes = imported.of_kind(kind)
        if not notes:
            continue
        lines = [f"{kind.value} ({len(notes)}):"]
        places = [imported.script.where(note.line) if note.line else "" for note in notes]
        column = max(map(len, places)) + 4
        for place, note in zip(places, notes, strict=True):
            lines += textwrap.wrap(
                visible(note.text), max(width, 40),
                initial_indent=f"  {place:<{column - 2}}", subsequent_indent=" " * column,
                break_on_hyphens=False,
            )  # fmt: skip
        blocks.append("\n".join(lines))
    carried = [name for name, one in imported.settings.items() if one.line]
    blocks.append(f"carried over: {len(carried)} settings, each with its line in {written[0]}")
    if len(written) > 1:
        blocks.append("with it: " + ", ".join(map(str, written[1:])))
    named = shlex.quote(str(written[0]))
    blocks.append(
        f"Plan it:   abacist train --config {named} --dry_run\n"
        f"Train:     abacist train --config {named}"
    )
    return "\n\n".join(blocks)


def _parser() -> Parser:
    parser = Parser(
        "import-gist",
        "Reads a GRPO training script (willccbb's gist, an Unsloth notebook, a plain TRL script; "
        ".py or .ipynb) and writes a configuration for `abacist train --config`. The script is "
        "read, never run. What was wrong in it, and what has no counterpart here, is listed with "
        "lines. Rewards that are the gist's become ours, which are mended; the script's own ones "
        "are taken out into a file beside the configuration.",
        "examples:\n"
        "  abacist import-gist grpo_demo.py\n"
        "  abacist import-gist Llama_GRPO.ipynb -o llama.yaml\n"
        "  abacist import-gist grpo_demo.py --faithful -o historic.yaml",
    )
    add = parser.add_argument
    add("script", metavar="SCRIPT", help="the script or notebook")
    add("-o", "--output", metavar="FILE", help="the configuration (SCRIPT's name, with .yaml)")
    add("--overwrite", action="store_true", help="replace it where it exists")
    add("--faithful", action="store_true", help="keep the script's rewards and prompt as they are, "
        "defects included, and the defaults of TRL that it was written for")  # fmt: skip
    add("--model_name_or_path", metavar="MODEL", help="this model instead of the script's")
    add("--dataset_name", metavar="DATA", help="this data set instead of the script's")
    add("--json", action="store_true", help="one JSON object on stdout, all else on stderr")
    return parser
