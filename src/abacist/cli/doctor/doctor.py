"""``abacist doctor``: is this machine ready? ``abacist doctor RUN``: what became of this run?

Exit code 0 when there is nothing to mend, 1 when there is.
"""

from __future__ import annotations

from pathlib import Path

from abacist.cli import console
from abacist.cli.doctor.machine import Finding, State, examine
from abacist.cli.flags import Parser
from abacist.errors import UsageError

WIDTH = 96
INDENT = 22
_COLOURS = {State.OK: "32", State.NOTE: "33", State.MEND: "1;31"}


def run(argv: list[str]) -> int:
    """Run the verb."""
    options = _parser().read(argv)
    if options.run is not None and options.online:
        raise UsageError("--online is about this machine", "abacist doctor --online")
    with console.stdout_for(result_only=options.json) as stdout:
        if options.run is None:
            from abacist.policy.loading import quiet_libraries

            quiet_libraries()
            subject, found = "this machine", examine(online=options.online)
        else:
            from abacist.cli.doctor.run import summarise

            subject, found = options.run, summarise(Path(options.run))
        findings = []
        for finding in found:
            findings.append(finding)
            if not options.json:
                print(render(finding, colours=console.has_colours(stdout)), file=stdout, flush=True)
        to_mend = [finding for finding in findings if finding.state is State.MEND]
        if options.json:
            document = {"subject": subject, "ready": not to_mend, "findings": findings}
            console.print_json(document, stdout)
        else:
            print(f"\n{conclusion(subject, to_mend)}", file=stdout)
    return 1 if to_mend else 0


def render(finding: Finding, *, colours: bool = False) -> str:
    """One finding as a line, its remedy below it where there is one.

    >>> print(render(Finding("disk", State.NOTE, "little room", "Clear some.")))
    note  disk            little room
                          Clear some.
    """
    from abacist.view.plaintext import fold, visible

    state = f"{finding.state:<4}"
    if colours:
        state = f"\x1b[{_COLOURS[finding.state]}m{state}\x1b[0m"
    said = "\n".join(filter(None, (finding.found, finding.remedy)))
    # Secrets go first: folding could break one in two, and then nothing would know it.
    first, *more = fold(visible(console.without_secrets(said)), WIDTH - INDENT)
    lines = [f"{state}  {finding.name:<{INDENT - 8}}  {first}", *(" " * INDENT + m for m in more)]
    return "\n".join(lines)


def conclusion(subject: str, to_mend: list[Finding]) -> str:
    """The last line: ready, or what to mend."""
    names = ", ".join(dict.fromkeys(finding.name for finding in to_mend))
    if names:
        return f"to mend: {names}"
    return "ready" if subject == "this machine" else "nothing to mend"


def _parser() -> Parser:
    parser = Parser(
        "doctor",
        "Looks at this machine: versions, device, memory, disk, logins; and has the built-in model "
        "answer a problem. With RUN it says what is in that run, whether its training went wrong, "
        "and what to do about it.",
        "exit code: 0 nothing to mend, 1 something to mend",
    )
    parser.add_argument("run", metavar="RUN", nargs="?", help="a run directory to look at instead")
    parser.add_argument("--online", action="store_true", help="see whether the Hub can be reached")
    parser.add_argument("--json", action="store_true",
                        help="one JSON object on stdout, all else on stderr")  # fmt: skip
    return parser
