"""One rollout for a person: what was asked, what was replied, and why it was judged so.

Everything a model or a data set wrote passes :mod:`abacist.view.plaintext` here, so that it is
shown and never obeyed, and is bounded before it is laid out.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

from rich.text import Text

from abacist.proof.outcomes import Outcome, rollout_outcome
from abacist.records.rollout import Rollout, StopReason, question_of
from abacist.task.reply import TAGS, Defect, parse_reply
from abacist.task.step_rewards import NOT_JUDGED, RIGHT, STEP_OUTCOMES, WRONG, StepReward, within
from abacist.view.plaintext import cut_middle, excerpt, fold, visible

#: Colours that also differ in brightness; the word stands beside them everywhere.
STYLES: Mapping[Outcome, str] = {
    Outcome.RIGHT: "bold green",
    Outcome.UNFORMATTED: "bold yellow",
    Outcome.TRUNCATED: "bold magenta",
    Outcome.WRONG: "bold red",
    Outcome.UNJUDGED: "bold",
}
STEP_STYLES: Mapping[str, str] = {RIGHT: "green", WRONG: "bold red", NOT_JUDGED: "dim"}
TAG_STYLE = "cyan"
MAX_ANSWER_CHARACTERS = 60
_TAG = "|".join(map(re.escape, TAGS))
# Said of the answer already, where there is one to say it of.
_OF_ANSWER = (
    Defect.NO_ANSWER, Defect.UNCLOSED_ANSWER, Defect.DISAGREEING_ANSWERS, Defect.EMPTY_ANSWER,
)  # fmt: skip


def quoted(text: str) -> str:
    """Foreign text as a short quotation within a sentence.

    >>> quoted("12\\n boxes"), quoted("\\x1b[2J")
    ('“12 boxes”', '“\\\\x1b[2J”')
    """
    return f"“{' '.join(visible(cut_middle(text, MAX_ANSWER_CHARACTERS)).split())}”"


def verdict_on(rollout: Rollout, outcome: Outcome | None = None) -> str:
    """Why the reply was judged so, in a sentence or two: what was read, and what is right."""
    outcome = outcome or rollout_outcome(rollout)
    gold = "" if rollout.gold is None else quoted(rollout.gold)
    if rollout.read_answer is not None:
        read = f"the answer block holds {quoted(rollout.read_answer)}"
    else:
        read = f"no answer is read ({_why_no_answer(rollout.completion)})"
    if outcome is Outcome.RIGHT:
        return f"Right: {read}, the gold is {gold}."
    if outcome is Outcome.UNFORMATTED:
        return (
            f"Right in another format, not by our rule: the last number is the gold {gold}, {read}."
        )
    if outcome is Outcome.TRUNCATED:
        tail = f"; the gold is {gold}" if gold else ""
        return f"Cut off after {rollout.completion_tokens:,} tokens, its budget: {read}{tail}."
    if outcome is Outcome.UNJUDGED:
        return f"Not judged, there is no gold: {read}."
    return f"Wrong: {read}, the gold is {gold}."


def _why_no_answer(completion: str) -> str:
    defects = parse_reply(completion).defects
    why = next((defect for defect in _OF_ANSWER if defect in defects), None)
    if why is None:
        return "there is no one closed answer block"
    return f"{why.sentence[0].lower()}{why.sentence[1:-1]}"


def layout_words(completion: str) -> str:
    """What is wrong with the layout of a reply, a sentence for each defect."""
    defects = parse_reply(completion).defects
    if not defects:
        return "Layout: strict."
    return "Layout: " + " ".join(defect.sentence for defect in defects)


def reward_words(rollout: Rollout) -> str:
    """``"reward 2.50: correctness 2.00, integer 0.50 | advantage +0.71"``."""
    each = ", ".join(f"{visible(name)} {amount(paid)}" for name, paid in rollout.rewards.items())
    words = f"reward {amount(rollout.reward)}" + (f": {each}" if each else "")
    if rollout.advantage is not None:
        words += f" | advantage {rollout.advantage:+.2f}"
    return words


def steps_words(steps: Sequence[StepReward]) -> str:
    """How the steps of a reply were paid: ``"Steps: 2 right, 1 wrong, 1 not judged"``."""
    return f"Steps: {outcomes_words(step.outcome for step in steps)}"


def outcomes_words(outcomes: Iterable[str]) -> str:
    """How many steps of a reply have each outcome: ``"2 right, 1 wrong"``."""
    counts = Counter(outcomes)
    each = [f"{counts[outcome]:,} {outcome}" for outcome in STEP_OUTCOMES if counts[outcome]]
    return ", ".join(each) or "none, the reply is empty"


def step_lines(rollout: Rollout, width: int, *, steps: int) -> list[Text]:
    """A harmless line for each step that was paid: how, and the last line of its text, without
    tags; of the conclusion that is mostly the answer.

    Of more than ``steps`` those in the middle are left out, as in a text.
    """
    columns = max(map(len, STEP_OUTCOMES)) + 1
    lines = []
    for step in within(rollout.steps or (), len(rollout.completion)):
        said = re.sub(_TAG, "\n", rollout.completion[step.start : step.end])
        shown = said.rstrip().rpartition("\n")[2].strip()
        text, *others = excerpt(shown, max(width - columns - 2, 5), characters=4 * width, lines=2)
        line = step.outcome.ljust(columns) + text + (" …" if others else "")
        lines.append(Text(line, style=STEP_STYLES[step.outcome]))
    if len(lines) <= steps:
        return lines
    tail = steps // 3
    head = steps - 1 - tail
    left_out = Text(f"[... {len(lines) - head - tail:,} steps ...]")
    return [*lines[:head], left_out, *lines[len(lines) - tail :]]


def amount(paid: float | None) -> str:
    """A reward as a number of two digits, ``"n/a"`` where it did not apply."""
    return "n/a" if paid is None else f"{paid:.2f}"


def ending_words(rollout: Rollout) -> str:
    """``"46 tokens, stopped by itself"``."""
    ends = {
        StopReason.STOPPED: "stopped by itself",
        StopReason.LENGTH: "cut off",
        StopReason.EMPTY: "empty",
    }
    return f"{rollout.completion_tokens:,} tokens, {ends[rollout.stop_reason]}"


def tagged(lines: Sequence[str], style: str = "") -> Text:
    """Lines that are harmless already as one text, the four tags of the reply format coloured."""
    text = Text("\n".join(lines), style=style)
    text.highlight_regex(_TAG, TAG_STYLE)
    return text


def reply_lines(rollout: Rollout, width: int, *, lines: int, characters: int) -> list[str]:
    """The completion as at most so many harmless lines of ``width`` columns."""
    found = excerpt(rollout.completion, width, characters=characters, lines=lines)
    return found if rollout.completion.strip() else ["(nothing)"]


def question_lines(rollout: Rollout, width: int, *, lines: int, characters: int) -> list[str]:
    """The end of the question, where what is asked stands, as at most so many harmless lines."""
    text = question_of(rollout.messages)
    tail = text[-characters:]
    folded = fold(visible(tail), width - 2)
    if len(folded) > lines or len(tail) < len(text):
        folded = folded[-lines:]
        folded[0] = f"… {folded[0]}"
    return folded
