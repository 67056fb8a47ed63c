"""``abacist serve MODEL``: hand a model to a server that is installed, by the right command."""

from __future__ import annotations

import json
import os
import shlex
import sys

from abacist.cli import console
from abacist.cli.flags import Parser, positive


def run(argv: list[str]) -> int:
    """Say which server, by what command and why; then become that server."""
    options = _parser().read(argv)
    with console.stdout_for(result_only=options.json) as stdout:
        from abacist.delivery.servers import hand_over
        from abacist.policy.loading import quiet_libraries
        from abacist.view.plaintext import visible

        quiet_libraries()
        found = hand_over(
            options.model, server=options.server, host=options.host, port=options.port
        )
        if options.json:
            console.print_json(found, stdout)
            return 0
        ask = ["curl", found.url, "-H", "Content-Type: application/json", "-d"]
        lines = [
            f"{found.server}: {found.reason}.",
            *found.notes,
            "",
            f"  {shlex.join(found.command)}",
            "",
            "Once it is up, ask it as it was trained:",
            "",
            f"  {shlex.join([*ask, json.dumps(found.request)])}",
        ]
        print(visible("\n".join(lines)), flush=True)
    if options.dry_run:
        return 0
    sys.stderr.flush()
    os.execvp(found.command[0], found.command)


def _parser() -> Parser:
    parser = Parser(
        "serve",
        "Hands a model over to a server that is installed: transformers serve, vLLM or llama.cpp. "
        "Shows the command and why it is that one, and runs it.",
        "examples:\n  abacist serve tiny --dry_run\n"
        "  abacist serve merged/ --with transformers --port 8001\n"
        "  abacist serve model-q8_0.gguf",
    )
    parser.add_argument("model", metavar="MODEL", help="a folder, a Hub id, an adapter, a run, "
                        "tiny, or a .gguf file")  # fmt: skip
    parser.add_argument("--with", dest="server", choices=("transformers", "vllm", "llama.cpp"),
                        help="which server (the best that is installed)")  # fmt: skip
    parser.add_argument("--host", default="localhost", metavar="NAME", help="(localhost)")
    parser.add_argument("--port", type=positive, default=8000, metavar="N", help="(8000)")
    parser.add_argument("--dry_run", action="store_true", help="show the command and run nothing")
    parser.add_argument("--json", action="store_true",
                        help="the command as one JSON object on stdout; runs nothing")  # fmt: skip
    return parser
