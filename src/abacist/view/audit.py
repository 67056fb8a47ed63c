"""An audit for a person: the verdict, what each kind of reply earns, then every finding.

Plain text, as wide as is asked for. Names and messages may come from a user's reward or from a
data set, so they are made harmless before they are shown.
"""

from __future__ import annotations

from collections.abc import Sequence

from abacist.task.audit.findings import Audit, Finding, Severity
from abacist.view.plaintext import cut_middle, fold, visible
from abacist.view.sheet import Block, Quote, Table

WIDTH = 100
INDENT = 9  # the width of "warning  "
LABEL_COLUMNS = 33
MAX_COLUMNS = 6  # rewards that have a column of their own
MAX_EVIDENCE_CHARS = 900


def audit_text(audit: Audit, data: str, width: int = WIDTH) -> str:
    """The whole audit; ``data`` names the problems: "generated problems".

    At most ``width`` columns, and about 80 at the least.
    """
    sections = [_verdict(audit, width), _tried(audit, data, width)]
    if audit.earned:
        sections.append(_table(audit, width))
    if audit.findings:
        sections.append([line for one in audit.findings for line in _finding(one, width)])
    sections += [fold(visible(remark), width) for remark in audit.remarks]
    return "\n\n".join("\n".join(lines) for lines in sections)


def audit_page(audit: Audit, data: str = "problems") -> list[Block]:
    """The whole audit as blocks, for a page that has no fixed width."""
    page: list[Block] = [
        " ".join(_verdict(audit, WIDTH)),
        Quote("what was tried", _tried(audit, data, WIDTH)),
    ]
    if audit.earned:
        names = list(audit.earned[0].rewards)
        heading = ("earned on average", "total", *map(visible, names), "for example")
        rows = [
            (row.label, f"{row.total:.2f}", *(f"{row.rewards[name]:.2f}" for name in names),
             visible(row.reply))
            for row in audit.earned
        ]  # fmt: skip
        page.append(Table(heading, rows, has_words=True))
    for one in audit.findings:
        about = f"{', '.join(one.rewards)}: " if one.rewards else ""
        evidence = cut_middle(about + one.evidence, MAX_EVIDENCE_CHARS)
        page.append(f"{one.severity}: {one.kind.sentence} {visible(evidence)}")
    return [*page, *map(visible, audit.remarks)]


def _verdict(audit: Audit, width: int) -> list[str]:
    unsound = [one for one in audit.findings if one.severity is Severity.UNSOUND]
    warnings = len(audit.findings) - len(unsound)
    tail = f", and {warnings} warning{'s' * (warnings != 1)}" if warnings else ""
    if unsound:
        return fold(f"Not sound: {unsound[0].kind.sentence[0].lower()}"
                    f"{unsound[0].kind.sentence[1:-1]}{tail}.", width)  # fmt: skip
    if warnings:
        return [f"Sound, with {warnings} warning{'s' * (warnings != 1)}."]
    return ["Sound: nothing was found."]


def _tried(audit: Audit, data: str, width: int) -> list[str]:
    weights = "" if set(audit.weights) == {1.0} else f", weights {_numbers(audit.weights)}"
    given = audit.num_problems_given
    count = f"{audit.num_problems:,}" + (f" of {given:,}" if given != audit.num_problems else "")
    lines = [
        f"rewards: {', '.join(audit.rewards)}{weights}",
        f"tried on {audit.num_replies:,} replies to {count} {data} and 4 made-up ones",
    ]
    if audit.earned:
        paying = ", ".join(audit.answer_rewards)
        where = f"{paying} (in the layout “{audit.home}”)" if paying else "none"
        lines.append(f"pays for the answer: {where}")
        nominal, reached = audit.nominal_maximum, audit.reachable_maximum
        same = abs(nominal - reached) < 1e-9
        lines.append(
            f"at most: {nominal:g}, and a reply can earn {'it' if same else f'{reached:g}'}"
        )
    return [piece for line in lines for piece in fold(visible(line), width)]


def _table(audit: Audit, width: int) -> list[str]:
    room = max(1, (width - LABEL_COLUMNS - 7) // 8)  # columns of numbers, each of 7 and a space
    names = list(audit.earned[0].rewards)[: min(MAX_COLUMNS, room)]
    heads = [visible(name).removesuffix("_reward_func").removesuffix("_format") for name in names]
    columns = max(7, *map(len, heads))
    if LABEL_COLUMNS + 7 + len(heads) * (columns + 1) > width:
        columns = max(7, (width - LABEL_COLUMNS - 7) // len(heads) - 1)
    cells = [head[:columns].rjust(columns) for head in heads]
    lines = [" ".join([f"{'earned on average':<{LABEL_COLUMNS}}", f"{'total':>6}", *cells])]
    for row in audit.earned:
        numbers = [f"{row.rewards[name]:>{columns}.2f}" for name in names]
        lines.append(
            " ".join([f"  {row.label:<{LABEL_COLUMNS - 2}}", f"{row.total:6.2f}", *numbers])
        )
        lines += [f"    {piece}" for piece in fold(visible(row.reply), width - 4)]
    return lines


def _finding(finding: Finding, width: int) -> list[str]:
    about = f"{', '.join(finding.rewards)}: " if finding.rewards else ""
    evidence = cut_middle(finding.evidence, MAX_EVIDENCE_CHARS)
    texts = (finding.kind.sentence, about + evidence)
    first, *more = [line for text in texts for line in fold(visible(text), width - INDENT)]
    return [f"{finding.severity:<{INDENT}}{first}", *(" " * INDENT + line for line in more)]


def _numbers(numbers: Sequence[float]) -> str:
    return " ".join(f"{number:g}" for number in numbers)
