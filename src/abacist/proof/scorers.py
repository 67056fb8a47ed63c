"""How other people would score a reply: lm-evaluation-harness's two GSM8K filters.

They make our numbers comparable with published ones and show what a model can calculate when
its format is ignored. They **measure and never pay**: a reward or the verdict's accuracy uses
the answer rule of :mod:`abacist.task.answers` only. "Any-format accuracy" in this product is
:func:`lm_eval_flexible`, quirks included: ``18.00`` is not ``18``, a stray ``...`` can be taken
for the answer, and ``12 or 13`` counts as 13.

Rule: EleutherAI lm-evaluation-harness, task ``gsm8k`` version 3. Only its filters and its string
comparison are here, not its prompt or its stop strings. Linear in the length of the text.
"""

from __future__ import annotations

import re

_STRICT = re.compile(r"#### (\-?[0-9\.\,]+)")
_FLEXIBLE = re.compile(r"(-?[$0-9.,]{2,})|(-?[0-9]+)")
_NOTHING_FOUND = "[invalid]"


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


def _same(picked: str, gold: str) -> bool:
    return _normal(picked) == _normal(gold)


def _normal(text: str) -> str:
    bare = text.replace(",", "").replace("$", "")
    return re.sub(r"\.$", "", bare.rpartition("#### ")[2]).lower()
