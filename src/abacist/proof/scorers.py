"""How other people would score a reply: lm-evaluation-harness's two GSM8K filters.

They make our numbers comparable with published ones and show what a model can calculate when
its format is ignored. They **measure and never pay**: a reward or the verdict's accuracy uses
the answer rule of :mod:`abacist.task.answers` only. "Any-format accuracy" in this product is
:func:`lm_eval_flexible`, quirks included: ``18.00`` is not ``18``, a stray ``...`` can be taken
for the answer, and ``12 or 13`` counts as 13.

Rule: EleutherAI lm-evaluation-harness 0.4.13, task ``gsm8k`` version 3; a contract test compares
every verdict with the harness itself. Its prompt is not here. Its stop strings are, as
:func:`until_stop`: a base model that goes on to invent the next question is cut there by the
harness, which moves the last number. Linear in the length of the text.
"""

from __future__ import annotations

import re

_STRICT = re.compile(r"#### (\-?[0-9\.\,]+)")
_FLEXIBLE = re.compile(r"(-?[$0-9.,]{2,})|(-?[0-9]+)")
_NOTHING_FOUND = "[invalid]"
_STOP = re.compile(r"Question:|</s>|<\|im_end\|>")


def lm_eval_strict(text: str, gold: str) -> bool:
    """Whether the first number after ``#### `` equals ``gold`` as a string.

    >>> lm_eval_strict("so 6 * 3 = 18\\n#### 18", "18"), lm_eval_strict("18", "18")
    (True, False)
    """
    match = _STRICT.search(text)
    return _same(match[1] if match else _NOTHING_FOUND, gold)


def lm_eval_flexible(text: str, gold: str) -> bool:
    """Whether the last thing that looks like a number equals ``gold`` as a string.

    >>> lm_eval_flexible("It costs $1,250.", "1250"), lm_eval_flexible("18.00", "18")
    (True, False)
    """
    last = None
    for match in _FLEXIBLE.finditer(text):
        last = match
    return _same(last[0] if last else _NOTHING_FOUND, gold)


def until_stop(text: str) -> str:
    """``text`` up to the first of the harness's stop strings for this task.

    >>> until_stop("#### 18\\n\\nQuestion: Ada has 3 eggs.")
    '#### 18\\n\\n'
    """
    return _STOP.split(text, maxsplit=1)[0]


def _same(picked: str, gold: str) -> bool:
    return _normal(picked) == _normal(gold)


def _normal(text: str) -> str:
    bare = text.replace(",", "").replace("$", "")
    return re.sub(r"\.$", "", bare.rpartition("#### ")[2]).lower()
