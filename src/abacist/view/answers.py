"""Replies to a question for a person: reasoning, answer, agreement, and what is off in the format.

Whatever a model wrote is made harmless before it is shown, also while it is being written.
"""

from __future__ import annotations

from collections.abc import Callable

from abacist.proof.ask import Answers
from abacist.records.rollout import Rollout
from abacist.task.reply import parse_reply
from abacist.view.plaintext import fold, visible
from abacist.view.sheet import Block, Quote, one_line

WIDTH = 96
MAX_ANSWERS = 8  # that are counted one by one
_ANSWER_COLUMNS = 40
NO_ANSWER = "no answer"


def answers_text(answers: Answers) -> str:
    """All replies, one below another, and with several what most of them answer."""
    blocks = ["\n".join(reply_lines(reply)) for reply in answers.replies]
    if len(blocks) == 1:
        return blocks[0]
    numbered = [f"-- reply {number}\n{block}" for number, block in enumerate(blocks, start=1)]
    return "\n\n".join([*numbered, agreement_line(answers)])


def answers_page(answers: Answers) -> list[Block]:
    """The same as blocks, the agreement first."""
    page: list[Block] = [Quote("asked", fold(visible(answers.question.strip()), WIDTH))]
    if len(answers.replies) > 1:
        page.insert(0, agreement_line(answers))
    for number, reply in enumerate(answers.replies, start=1):
        heading = "reply" if len(answers.replies) == 1 else f"reply {number}"
        page.append(Quote(heading, reply_lines(reply)))
    return page


def agreement_line(answers: Answers) -> str:
    """What most replies answer, and how many; a tie is called one.

    "majority: 19 (3 of 4), then no answer (1 of 4)".
    """
    total = len(answers.replies)
    counted = [(one_line(text, _ANSWER_COLUMNS), votes) for text, votes in answers.votes.items()]
    first = len(answers.tied)
    without = total - sum(votes for _, votes in counted)
    rest = counted[first:MAX_ANSWERS]
    if (more := len(counted) - MAX_ANSWERS) > 0:
        rest.append((f"{more} other answers", sum(v for _, v in counted[MAX_ANSWERS:])))
    rest += [(NO_ANSWER, without)] if without else []

    def listed(each: list[tuple[str, int]]) -> str:
        return ", ".join(f"{text} ({votes} of {total})" for text, votes in each)

    if not counted:
        return f"no majority: none of {total} replies gives an answer"
    leaders = counted[:first]
    if first > 1:
        named = listed(leaders[:MAX_ANSWERS]) + (", …" if first > MAX_ANSWERS else "")
        lead = f"no majority: {named} are tied"
        rest = [one for one in rest if one not in leaders]
    else:
        lead = f"majority: {listed(leaders)}"
    return f"{lead}, then {listed(rest)}" if rest else lead


def reply_lines(rollout: Rollout) -> list[str]:
    """One reply: its reasoning, or all of it where the format is off, then :func:`ending_lines`."""
    reply = parse_reply(rollout.completion)
    shown = reply.reasoning if reply.soft and reply.reasoning is not None else reply.text
    lines = [f"  {line}".rstrip() for line in fold(visible(shown.strip("\n")), WIDTH - 2)]
    return [*lines, "", *ending_lines(rollout)]


def ending_lines(rollout: Rollout) -> list[str]:
    """What stands below a reply: the answer read, what is wrong with the format, its length."""
    reply = parse_reply(rollout.completion)
    answer = "none could be read" if reply.answer is None else visible(reply.answer)
    lines = [f"answer: {answer}"]
    if not (reply.soft and reply.answer is not None):
        lines.append("The reply is shown as it was written; its format is off:")
    if not reply.strict:
        lines += [f"  - {visible(defect.sentence)}" for defect in reply.defects]
    return [*lines, f"({rollout.completion_tokens} tokens. {rollout.stop_reason.sentence})"]


class Stream:
    """Writes a reply while it is being decoded, every character once and none obeyed.

    Give it the whole text so far after each token. A character whose last bytes are still to come,
    and a carriage return that a line feed may follow, wait for the next call.
    """

    def __init__(self, write: Callable[[str], object]) -> None:
        self._write = write
        self._shown = ""

    def __call__(self, text: str) -> None:
        self._tell(text.rstrip("\N{REPLACEMENT CHARACTER}").removesuffix("\r"))

    def end(self, text: str) -> None:
        """Write what is left of the whole reply, and end the line."""
        self._tell(text)
        if not self._shown.endswith("\n"):
            self._write("\n")

    def _tell(self, text: str) -> None:
        if not text.startswith(self._shown):
            if self._shown.startswith(text):
                return  # decoding began anew: wait until it is as far again
            self._write("\n")  # the tokens read otherwise by now: once more, from the start
            self._shown = ""
        if new := text[len(self._shown) :]:
            self._write(visible(new))
            self._shown = text
