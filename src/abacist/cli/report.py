"""``abacist report RUN…``: one HTML page that holds a whole run, or several over one another."""

from __future__ import annotations

from pathlib import Path

from abacist.cli import console
from abacist.cli.flags import Parser, count, positive
from abacist.errors import UsageError

DEFAULT_PORT = 8431


def run(argv: list[str]) -> int:
    """Run the verb; 0 also for a run that was killed or has no step: the page says so."""
    options = _parser().read(argv)
    if options.serve and options.output is not None:
        raise UsageError("--serve writes no file", "Leave out --serve, or --output.")
    paths = [Path(one).expanduser() for one in options.runs]
    if len({path.resolve() for path in paths}) < len(paths):
        raise UsageError("one run was named twice", "Each run is drawn once.")
    if options.trackio is not None and (options.serve or len(paths) > 1):
        raise UsageError(
            "--trackio is about one run and a page that is written",
            "abacist report RUN --trackio PROJECT",
        )
    with console.stdout_for(result_only=options.json) as stdout:
        from abacist.view.plaintext import visible
        from abacist.view.report.writing import default_path, write_report

        if options.serve:
            from abacist.view.report.serving import serve

            return serve(paths, port=options.port, replies=options.replies)
        target = options.output or default_path(paths)
        written = write_report(paths, target, replies=options.replies)
        traces = None
        if options.trackio is not None:
            from abacist.view.trackio_traces import log_traces

            traces = log_traces(paths[0], options.trackio, print)
        if options.json:
            console.print_json({"report": target, **written, "traces": traces}, stdout)
        else:
            print(f"The report is in {target}: open it in a browser.")
            for line in written["remarks"]:
                print(f"  {visible(line)}")
            if traces is not None:
                print(f"{traces:,} replies are traces in Trackio's project {options.trackio}: "
                      f"trackio show --project {options.trackio}")  # fmt: skip
    return 0


def _parser() -> Parser:
    parser = Parser(
        "report",
        "Writes one HTML page: the verdict, learning curves, who earned the advantage, health, and "
        "replies with their rewards, to filter and to read group by group. It needs no network "
        "and no script but its own. Several runs lie over one another.",
        "examples:\n"
        "  abacist report runs/tiny-001\n"
        "  abacist report runs/seed-0 runs/seed-1 runs/random-001 -o three.html\n"
        "  abacist report runs/tiny-001 --serve     # while it trains; the page follows",
    )
    add = parser.add_argument
    add("runs", metavar="RUN", nargs="+", help="a run, a trainer's output folder, or an evaluation")
    add("-o", "--output", type=Path, metavar="FILE", help="where to write it (report.html in the "
        "run; of several runs in the working directory)")  # fmt: skip
    add("--replies", type=positive, default=5000, metavar="N", help="about how many replies the "
        "page holds, in whole groups (5000); the rest is in the run's Parquet files")  # fmt: skip
    add("--serve", action="store_true", help="show it at http://localhost and follow the run; "
        "Ctrl-C ends")  # fmt: skip
    add("--port", type=count, default=DEFAULT_PORT, metavar="N", help=f"for --serve "
        f"({DEFAULT_PORT}); 0: a free one")  # fmt: skip
    add("--trackio", metavar="PROJECT", help="log the replies to Trackio's project too, as traces")
    add("--json", action="store_true", help="one JSON object on stdout, all else on stderr")
    return parser
