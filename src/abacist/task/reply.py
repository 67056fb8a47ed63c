"""The reply format: two tagged blocks, how to write them and how to read them.

    <reasoning>
    48 / 2 = 24
    </reasoning>
    <answer>
    24
    </answer>

The *strict* layout is exactly this, with at most one newline after it; the *soft* one asks only for
one reasoning block and then one answer block with white space around and between them. What keeps a
reply from the strict layout is listed as its :class:`Defect` values, one sentence each.

The answer is what stands in the one closed ``<answer>`` block, whatever the rest looks like. Where
the answer tags are repeated, there is an answer only if every closed block holds the same bare
integer, so that nothing is left to interpret: to list several numbers, in the hope that one of them
is right, is no answer. Inside the one closed reasoning block answer tags are text that mentions
them, as long as an answer block stands behind it; the layout is spoilt all the same.

Model output is hostile text: one pass over the tags, linear time, no exception on any str.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from abacist.errors import UsageError
from abacist.task.numerals import integer_digits
from abacist.task.sentence_enum import SentenceEnum

REASONING_OPEN = "<reasoning>"
REASONING_CLOSE = "</reasoning>"
ANSWER_OPEN = "<answer>"
ANSWER_CLOSE = "</answer>"
TAGS = (REASONING_OPEN, REASONING_CLOSE, ANSWER_OPEN, ANSWER_CLOSE)  # in their order

_TAG = re.compile("|".join(map(re.escape, TAGS)))


class Defect(SentenceEnum):
    """What keeps a reply from the strict layout."""

    NO_REASONING = "no_reasoning", "There is no <reasoning> tag."
    UNCLOSED_REASONING = "unclosed_reasoning", "The reasoning block is opened and never closed."
    REPEATED_REASONING = "repeated_reasoning", "A reasoning tag appears more than once."
    EMPTY_REASONING = "empty_reasoning", "The reasoning block is empty."
    NO_ANSWER = "no_answer", "There is no <answer> tag."
    UNCLOSED_ANSWER = "unclosed_answer", "The answer block is opened and never closed."
    REPEATED_ANSWER = "repeated_answer", "An answer tag appears more than once."
    DISAGREEING_ANSWERS = "disagreeing_answers", "The answer blocks do not hold the same integer."
    EMPTY_ANSWER = "empty_answer", "The answer block is empty."
    STRAY_CLOSING_TAG = "stray_closing_tag", "A closing tag has no opening tag before it."
    WRONG_ORDER = "wrong_order", "The reasoning block does not come before the answer block."
    TEXT_BEFORE = "text_before", "There is text before the first block."
    TEXT_BETWEEN = "text_between", "There is text between the blocks."
    TEXT_AFTER = "text_after", "There is text after the last block."
    TAG_NOT_ON_OWN_LINE = "tag_not_on_own_line", "A tag is not alone on its line."
    EXTRA_WHITE_SPACE = "extra_white_space", "There is a blank line or space around the blocks."


_ALLOWED_IN_SOFT = frozenset(
    {
        Defect.TAG_NOT_ON_OWN_LINE,
        Defect.EXTRA_WHITE_SPACE,
        Defect.EMPTY_REASONING,
        Defect.EMPTY_ANSWER,
    }
)


@dataclass(frozen=True, slots=True)
class Reply:
    """A completion, read. ``reasoning`` and ``answer`` are stripped, or None if there is none."""

    text: str
    reasoning: str | None
    answer: str | None
    defects: tuple[Defect, ...]

    @property
    def strict(self) -> bool:
        """Exactly the canonical layout."""
        return not self.defects

    @property
    def soft(self) -> bool:
        """One reasoning block, then one answer block, only white space around and between."""
        return _ALLOWED_IN_SOFT.issuperset(self.defects)


def render_reply(reasoning: str, answer: str) -> str:
    """The canonical layout, without a final newline; both texts are stripped.

    Its strict parse gives both texts back, provided that they are not blank and hold no tag.
    """
    return (
        f"{REASONING_OPEN}\n{reasoning.strip()}\n{REASONING_CLOSE}\n"
        f"{ANSWER_OPEN}\n{answer.strip()}\n{ANSWER_CLOSE}"
    )


def completion_text(completion: Any, message: int = -1) -> str:
    """The text of a completion as TRL hands it to a reward function; never raises.

    That is a string, or a list of messages of which one is read (the last one, unless told
    otherwise), whose content is a string, None, or a list of parts.

    >>> completion_text([{"role": "assistant", "content": [{"type": "text", "text": "12"}]}])
    '12'
    """
    if isinstance(completion, list | tuple):
        completion = completion[message] if completion else None
    content = completion.get("content") if isinstance(completion, dict) else completion
    if isinstance(content, list | tuple):
        texts = (part.get("text") if isinstance(part, dict) else part for part in content)
        return "".join(text for text in texts if isinstance(text, str))
    return content if isinstance(content, str) else ""


def parse_reply(text: str) -> Reply:
    """Read a completion: its reasoning, its answer, and what is wrong with its layout.

    Any text is read; raises UsageError for what is no text.

    >>> reply = parse_reply("<reasoning>5 + 7 = 12</reasoning> So: <answer> 12 </answer>")
    >>> reply.reasoning, reply.answer, [str(defect) for defect in reply.defects]
    ('5 + 7 = 12', '12', ['text_between', 'tag_not_on_own_line'])
    >>> parse_reply("<answer>12</answer> <answer>13</answer>").answer is None
    True
    >>> parse_reply("<reasoning>No <answer>3</answer>.</reasoning><answer>12</answer>").answer
    '12'
    """
    if not isinstance(text, str):
        raise UsageError(
            f"parse_reply() was given a {type(text).__name__}, not a text",
            "Of a completion that is a list of messages, give completion[-1]['content'].",
        )
    tags = list(_TAG.finditer(text))
    reasoning_tags = [tag for tag in tags if tag[0] in (REASONING_OPEN, REASONING_CLOSE)]
    answer_tags = [tag for tag in tags if tag[0] in (ANSWER_OPEN, ANSWER_CLOSE)]
    meant_tags = _without_mentions(answer_tags, reasoning_tags)
    reasoning, answer = _Block(text, reasoning_tags), _Block(text, meant_tags)
    repeated_integer = answer.one_integer() if answer.repeated else None
    defects = {
        Defect.NO_REASONING: reasoning.opened == 0,
        Defect.UNCLOSED_REASONING: reasoning.unclosed,
        Defect.REPEATED_REASONING: reasoning.repeated,
        Defect.EMPTY_REASONING: reasoning.contents == [""],
        Defect.NO_ANSWER: answer.opened == 0,
        Defect.UNCLOSED_ANSWER: answer.unclosed,
        Defect.REPEATED_ANSWER: answer.repeated or len(meant_tags) < len(answer_tags),
        Defect.DISAGREEING_ANSWERS: answer.repeated and repeated_integer is None,
        Defect.EMPTY_ANSWER: answer.contents == [""],
        Defect.STRAY_CLOSING_TAG: reasoning.stray or answer.stray,
    }
    if tuple(tag[0] for tag in tags) == TAGS:
        defects |= _layout_defects(text, tags)
    elif tags:
        complete = len(reasoning.contents) == 1 and len(answer.contents) == 1
        defects[Defect.WRONG_ORDER] = complete and len(tags) == len(TAGS)
        defects[Defect.TEXT_BEFORE] = text[: tags[0].start()].strip() != ""
        defects[Defect.TEXT_AFTER] = text[tags[-1].end() :].strip() != ""
    return Reply(
        text=text,
        reasoning=(reasoning.contents[0] or None) if len(reasoning.contents) == 1 else None,
        answer=repeated_integer if answer.repeated else "".join(answer.contents) or None,
        defects=tuple(defect for defect in Defect if defects.get(defect)),
    )


def _without_mentions(
    answer_tags: list[re.Match[str]], reasoning_tags: list[re.Match[str]]
) -> list[re.Match[str]]:
    """The answer tags, without those inside the one reasoning block if a block stands behind it.

    Only where the reasoning tags stand once: ``xml_count`` then pays for them, so that a right
    answer still earns more than any wrong one.
    """
    if [tag[0] for tag in reasoning_tags] != [REASONING_OPEN, REASONING_CLOSE]:
        return answer_tags
    start, end = (tag.start() for tag in reasoning_tags)
    behind = [tag[0] for tag in answer_tags if tag.start() > end]
    if (ANSWER_OPEN, ANSWER_CLOSE) not in pairwise(behind):
        return answer_tags
    return [tag for tag in answer_tags if not start < tag.start() < end]


class _Block:
    """All blocks of one kind: an opening tag, text without another one, and a closing tag."""

    def __init__(self, text: str, tags: list[re.Match[str]]) -> None:
        self.opened = sum(tag[0][1] != "/" for tag in tags)
        self.repeated = self.opened > 1 or len(tags) - self.opened > 1
        self.contents: list[str] = []  # of the closed blocks, stripped
        self.unclosed = self.stray = False
        start: int | None = None
        for tag in tags:
            if tag[0][1] != "/":
                self.unclosed = self.unclosed or start is not None
                start = tag.end()
            elif start is None:
                self.stray = True
            else:
                self.contents.append(text[start : tag.start()].strip())
                start = None
        self.unclosed = self.unclosed or start is not None

    def one_integer(self) -> str | None:
        """The content of the first block, if all hold the same bare integer."""
        values = set()
        for content in dict.fromkeys(self.contents):
            values.add(integer_digits(content))
            if None in values or len(values) > 1:
                return None
        return self.contents[0] if self.contents else None


def _layout_defects(text: str, tags: list[re.Match[str]]) -> dict[Defect, bool]:
    """What is wrong around four tags that stand once each and in order."""
    reasoning_open, reasoning_close, answer_open, answer_close = tags
    before = text[: reasoning_open.start()]
    between = text[reasoning_close.end() : answer_open.start()]
    after = text[answer_close.end() :]
    contents = (
        text[reasoning_open.end() : reasoning_close.start()],
        text[answer_open.end() : answer_close.start()],
    )
    return {
        Defect.TEXT_BEFORE: before.strip() != "",
        Defect.TEXT_BETWEEN: between.strip() != "",
        Defect.TEXT_AFTER: after.strip() != "",
        Defect.TAG_NOT_ON_OWN_LINE: any(
            content.strip() and not (content.startswith("\n") and content.endswith("\n"))
            for content in contents
        )
        or "\n" not in between,
        Defect.EXTRA_WHITE_SPACE: before.isspace()
        or (between.isspace() and "\n" in between and between != "\n")
        or (after.isspace() and after != "\n"),
    }
