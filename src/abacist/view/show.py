"""What ``abacist show`` prints: replies one below another, or the replies of a group side by side.

Made for a terminal of any width and for a pipe; at most :data:`MAX_COLUMNS` wide, coloured only
where rich finds colours welcome. For machines there is :func:`rollout_json`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from rich import box
from rich.cells import cell_len
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from abacist.proof.browse import TRAIN, Found, Source
from abacist.proof.outcomes import Outcome, rollout_outcome
from abacist.records.rollout import Rollout, question_of
from abacist.task.reply import parse_reply
from abacist.view.panel import joined
from abacist.view.plaintext import excerpt, fold, visible
from abacist.view.rollouts import (
    STYLES,
    amount,
    ending_words,
    layout_words,
    quoted,
    reply_lines,
    reward_words,
    step_lines,
    steps_words,
    tagged,
    verdict_on,
)
from abacist.view.sheet import one_line

MAX_COLUMNS = 100
PIPE_COLUMNS = 100
_LEAST_SIDE_COLUMNS = 36  # of a reply beside another
_MAX_SIDES = 4
_INDENT = 2
_QUESTION = {"characters": 2_000, "lines": 16}
_REPLY = {"characters": 6_000, "lines": 60}
_SIDE = {"characters": 2_000, "lines": 24}
_MOST_STEPS = 24  # of a reply, in one line each


def summary_lines(source: Source, found: Found, width: int) -> list[str]:
    """Which replies were found, and what became of them."""
    kind = "training" if source.split == TRAIN else source.split
    counted = found.outcomes
    each = [f"{counted[outcome]:,} {outcome.value}" for outcome in Outcome if counted[outcome]]
    steps = sorted({place.step for place in found.places})
    span = ""
    if source.split == TRAIN and steps:
        span = f" of step {steps[0]}" if len(steps) == 1 else f" of steps {steps[0]} to {steps[-1]}"
    count = len(found.places)
    replies = f"{count:,} {'reply' if count == 1 else 'replies'}{span}: {', '.join(each)}"
    lines = fold(f"{one_line(str(source.path), 60)}, {kind}: {replies}.", width)
    if source.is_finished is False and source.split == TRAIN and found.steps:
        lines += fold(
            f"The run has not finished: its newest step here is {max(found.steps)}.", width
        )
    return lines


def reply_page(rollout: Rollout, width: int) -> RenderableType:
    """One reply: where it stands, the question, the reply, and why it was judged so."""
    outcome, inner = rollout_outcome(rollout), width - _INDENT
    parts: list[RenderableType] = [_title(rollout, outcome, width)]
    paid = f"{reward_words(rollout)} | {ending_words(rollout)}"
    parts += _plain(fold(paid, width), "dim")
    parts += _plain(_indented(excerpt(question_of(rollout.messages), inner, **_QUESTION)), "dim")
    parts.append(Text(""))
    parts.append(tagged(_indented(reply_lines(rollout, inner, **_REPLY))))
    parts.append(Text(""))
    if rollout.steps is not None:
        parts += _plain(fold(steps_words(rollout.steps), width))
        for line in step_lines(rollout, inner, steps=_MOST_STEPS):
            line.pad_left(_INDENT)
            parts.append(line)
        parts.append(Text(""))
    parts += _plain(fold(visible(verdict_on(rollout, outcome)), width), STYLES[outcome])
    parts += _plain(fold(layout_words(rollout.completion), width))
    return Group(*parts)


def group_page(
    members: Sequence[Rollout], width: int, *, marked: int | None = None
) -> RenderableType:
    """All replies of a group: a table of what each earned, then the replies side by side.

    ``marked`` is the number of the reply for which the group was looked up.
    """
    first = members[0]
    title = _where(first, with_member=False)
    gold = "no gold" if first.gold is None else f"gold {quoted(first.gold)}"
    count = f"{len(members)} {'reply' if len(members) == 1 else 'replies'}"
    parts: list[RenderableType] = _plain(joined([*title, count, gold], width), "bold")
    parts += _plain(
        _indented(excerpt(question_of(first.messages), width - _INDENT, **_QUESTION)), "dim"
    )
    parts += [Text(""), _earnings(members, width, marked), Text("")]
    sides = max(1, min(_MAX_SIDES, len(members), (width + 2) // (_LEAST_SIDE_COLUMNS + 2)))
    columns = (width - 2 * (sides - 1)) // sides
    grid = Table.grid(padding=(0, 2, 0, 0))
    for _ in range(sides):
        grid.add_column(width=columns, no_wrap=True, overflow="crop")
    for start in range(0, len(members), sides):
        if start:
            grid.add_row("")
        grid.add_row(*(_side(one, columns) for one in members[start : start + sides]))
    return Group(*parts, grid)


def _side(rollout: Rollout, width: int) -> RenderableType:
    outcome = rollout_outcome(rollout)
    head = f"reply {rollout.member}: {outcome.value}, {amount(rollout.reward)}"
    lines: list[RenderableType] = [Text(head, STYLES[outcome])]
    lines.append(tagged(reply_lines(rollout, width, **_SIDE)))
    if rollout.steps is not None:
        lines += _plain(fold(steps_words(rollout.steps), width))
    if outcome is not Outcome.RIGHT:  # of a right one the table says it all
        lines += _plain(fold(visible(verdict_on(rollout, outcome)), width), "italic")
    return Group(*lines)


def _earnings(members: Sequence[Rollout], width: int, marked: int | None) -> Table:
    """A row for each reply: what became of it, its rewards, its advantage, the answer read."""
    names = list(dict.fromkeys(name for one in members for name in one.rewards))
    heads = [visible(name).removesuffix("_reward_func").removesuffix("_format") for name in names]
    fixed = ["reply", "outcome", "reward", "advantage", "read", "tokens"]
    needed = sum(map(cell_len, [*fixed, *heads])) + len(fixed) + len(heads) + len("unformatted") + 4
    if needed > width:
        names, heads = [], []
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0), show_edge=False)
    for head in (*fixed[:3], *heads, *fixed[3:]):
        is_word = head in ("outcome", "read")
        table.add_column(
            Text(head), justify="left" if is_word else "right", no_wrap=True, overflow="ellipsis"
        )
    for one in members:
        outcome = rollout_outcome(one)
        advantage = "" if one.advantage is None else f"{one.advantage:+.2f}"
        read = "-" if one.read_answer is None else one_line(one.read_answer, 14)
        table.add_row(
            Text(f"{'>' if one.member == marked else ''}{one.member}"),
            Text(outcome.value, STYLES[outcome]),
            Text(amount(one.reward)),
            *(Text(amount(one.rewards.get(name))) for name in names),
            Text(advantage + ("" if one.trained is not False else " left out")),
            Text(read),
            Text(f"{one.completion_tokens:,}"),
        )
    return table


def _title(rollout: Rollout, outcome: Outcome, width: int) -> Text:
    lines = joined([*_where(rollout), outcome.value], width)
    title = Text("\n".join(lines), style="bold")
    title.stylize(STYLES[outcome], len(title) - len(outcome.value))
    return title


def _where(rollout: Rollout, *, with_member: bool = True) -> list[str]:
    words = [] if rollout.split != TRAIN else [f"step {rollout.step}"]
    problem = "problem " + (one_line(rollout.problem_id, 40) if rollout.problem_id else "unknown")
    if rollout.difficulty is not None:
        problem += f" ({rollout.difficulty} step{'s' * (rollout.difficulty != 1)})"
    place = f"group {rollout.group}" + (f", reply {rollout.member}" if with_member else "")
    return [*words, problem, place]


def _indented(lines: Sequence[str]) -> list[str]:
    return [" " * _INDENT + line for line in lines]


def _plain(lines: Sequence[str], style: str = "") -> list[RenderableType]:
    return [Text(line, style=style) for line in lines]


def rollout_json(rollout: Rollout) -> dict[str, Any]:
    """Everything that is shown of a reply, for machines; without its token ids."""
    outcome = rollout_outcome(rollout)
    reply = parse_reply(rollout.completion)
    kept = (
        "run_id", "step", "split", "problem_id", "difficulty", "group", "member", "messages",
        "completion", "prompt_tokens", "completion_tokens", "stop_reason", "gold", "read_answer",
        "is_correct", "rewards", "reward", "advantage", "trained",
    )  # fmt: skip
    return {
        **{name: getattr(rollout, name) for name in kept},
        "steps": None if rollout.steps is None else [step._asdict() for step in rollout.steps],
        "outcome": outcome,
        "defects": list(reply.defects),
        "judged": verdict_on(rollout, outcome),
    }


def pages(
    rollouts: Sequence[Rollout], width: int, *, ascii_only: bool = False
) -> Iterator[RenderableType]:
    """The replies one by one, a rule between them."""
    for number, rollout in enumerate(rollouts):
        if number:
            yield Text(("-" if ascii_only else "─") * width, "dim")
        yield reply_page(rollout, width)
