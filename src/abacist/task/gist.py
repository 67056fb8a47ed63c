"""The rewards of willccbb's GRPO gist, bug for bug: the set ``gist``.

https://gist.github.com/willccbb/4676755236bb08cab5f4e54a0475d6fb is where this project comes from,
and runs that are compared with it need its rewards as they were. These functions are written anew
from what the originals do, and give the same number on every input on which those give one. Where
the originals raise (content that is None or a list of parts) these read the text; where the
originals take quadratic time (the soft format on repeated tags) these are linear.

The gist's data set took the commas and dollar signs out of the golds before a reward saw them:
:func:`gist_gold` does that, and golds must pass through it for ``correctness_reward_func`` to mean
what it meant.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from abacist.task.reply import ANSWER_CLOSE, ANSWER_OPEN, REASONING_OPEN, completion_text

GIST_DEFECTS: tuple[str, ...] = (
    "strict_format and soft_format exclude one another, so 3.5 is the most a reply can earn.",
    "strict_format wants the reasoning on a single line, and a newline after </answer>, which chat"
    " models never write.",
    "soft_format allows no line break inside a block, so the layout that the prompt asks for earns"
    " nothing.",
    "A right reply that reasons on two lines earns 3.0 at most, and less without a final newline.",
    "Without a final newline xmlcount takes 0.001 off for every character of the whole reply, so"
    " that among wrong replies the shortest wins.",
    "xmlcount has no lower bound.",
    "A bare 42 without any tag is read as an answer and earns 2.5.",
    "Only the last <answer> counts: twelve blocks with twelve numbers, the right one last, are"
    " correct.",
    "Correctness is equality of strings: $42, 42., 42.0, 1,000, **42** and \\boxed{42} are wrong.",
    "int rejects -5 and 1,450, and accepts ².",
    "One character of reasoning and a wrong answer can earn 1.5.",
)

_BLOCK_CHANGE = re.compile(r"</reasoning>\s*<answer>")


def xmlcount_reward_func(
    prompts: Any = None, completions: Sequence[Any] = (), **columns: Any
) -> list[float]:
    """0.125 for each tag with its line breaks, less 0.001 a character after the answer block."""
    return [_count_xml(_text(completion)) for completion in completions]


def soft_format_reward_func(
    prompts: Any = None, completions: Sequence[Any] = (), **columns: Any
) -> list[float]:
    """0.5 if the reply begins with the two blocks, neither of which holds a line break."""
    return [0.5 if _is_soft(_text(completion)) else 0.0 for completion in completions]


def strict_format_reward_func(
    prompts: Any = None, completions: Sequence[Any] = (), **columns: Any
) -> list[float]:
    """0.5 for exactly six lines, one of them reasoning and one of them answer, and a newline."""
    return [0.5 if _is_strict(_text(completion)) else 0.0 for completion in completions]


def int_reward_func(
    prompts: Any = None, completions: Sequence[Any] = (), **columns: Any
) -> list[float]:
    """0.5 if the extracted answer consists of digits, as ``str.isdigit`` understands them."""
    return [0.5 if _extract(_text(completion)).isdigit() else 0.0 for completion in completions]


def correctness_reward_func(
    prompts: Any = None, completions: Sequence[Any] = (), answer: Sequence[Any] = (), **columns: Any
) -> list[float]:
    """2.0 if the extracted answer is, as a string, the gold of the column ``answer``."""
    return [
        2.0 if _extract(_text(completion)) == gold else 0.0
        for completion, gold in zip(completions, answer, strict=False)
    ]


def gist_gold(solution: str) -> str:
    """A gold as the gist's data set held it: after ``####``, without commas and dollar signs.

    >>> gist_gold("... = $<<2*725=1450>>1,450\\n#### 1,450")
    '1450'
    """
    return solution.rpartition("####")[2].strip().replace(",", "").replace("$", "")


def _text(completion: Any) -> str:
    return completion_text(completion, message=0)


def _extract(text: str) -> str:
    """What follows the last ``<answer>``, or the whole text, up to the next ``</answer>``."""
    return text.rpartition(ANSWER_OPEN)[2].partition(ANSWER_CLOSE)[0].strip()


def _is_strict(text: str) -> bool:
    lines = text.split("\n", 8)
    tags = [lines[number] for number in (0, 2, 3, 5)] if len(lines) > 6 else []
    return (
        tags == ["<reasoning>", "</reasoning>", "<answer>", "</answer>"]
        # The pattern's final $ lets one more line break pass.
        and lines[6:] in ([""], ["", ""])
    )


def _is_soft(text: str) -> bool:
    if not text.startswith(REASONING_OPEN):
        return False
    first_line_end = _line_end(text, 0)
    seen_line_end = -1
    for change in _BLOCK_CHANGE.finditer(text, len(REASONING_OPEN)):
        if change.start() > first_line_end:
            return False
        line_end = _line_end(text, change.end())
        # On a line that was searched in vain from further left there is nothing to find.
        if line_end != seen_line_end and text.find(ANSWER_CLOSE, change.end(), line_end) >= 0:
            return True
        seen_line_end = line_end
    return False


def _line_end(text: str, start: int) -> int:
    end = text.find("\n", start)
    return len(text) if end < 0 else end


def _count_xml(text: str) -> float:
    count = 0.0
    if text.count("<reasoning>\n") == 1:
        count += 0.125
    if text.count("\n</reasoning>\n") == 1:
        count += 0.125
    if text.count("\n<answer>\n") == 1:
        count += 0.125
        # Where the separator is missing, the whole text is what is left.
        count -= len(text.split("\n</answer>\n")[-1]) * 0.001
    if text.count("\n</answer>") == 1:
        count += 0.125
        count -= (len(text.split("\n</answer>")[-1]) - 1) * 0.001
    return count
