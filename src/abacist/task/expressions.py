"""Find the arithmetic expression that stands before or after an equals sign in prose.

"She bought 2 skeins per hat + 4 skeins per scarf = ..." holds the expression 2 + 4; "2x + 3 = ..."
holds none, for it speaks of an unknown. A piece of text is written as one letter per token, as in
``answer_letters``, so that what an expression may look like is a pattern:

- ``n`` a numeral;
- ``+ * / ^ ( )`` themselves; ``-`` a minus sign; ``~`` one that touches only what follows it;
- ``t`` an operator in words: "times", "plus", "divided by", "x", "of" after a percentage;
- ``w`` a word that may be a unit; ``s`` a word that is none;
- ``v`` an unknown, or what must not be taken for a number: "2y", "A4", "7:50";
- ``;`` anything else, which ends the expression.

Where an expression is not certain ("x + 3", "28 / 1/5", "3 000") there is none. Bounded: at most
``MAX_EXPRESSION_CHARS`` are looked at, and a longer expression is not read.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from fractions import Fraction
from typing import NamedTuple

from abacist.task.numerals import read_numeral

MAX_EXPRESSION_CHARS = 200


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


class Part(NamedTuple):
    """A token; ``text`` is the numeral as written, or the operator that is meant."""

    letter: str
    text: str = ""
    value: Fraction = Fraction(0)
    is_percent: bool = False


Expression = Sequence[Part]

_TOKEN = re.compile(
    r"""
      (?P<unclear> (?<= /\  ) [0-9]+/[0-9]+ )  # "28 / 1/5": divided by a fifth, or by 1, then by 5?
    | (?P<clock> [0-9]+:[0-9]+ )
    | (?P<mixed> [0-9]{1,9}\ [0-9]{1,9}/[0-9]{1,9} (?![0-9/.,]) )
    | (?P<numeral> \.?[0-9]+ (?: [.,]+[0-9]+ )* )
    | (?P<times> [xX] (?= \ * [$£€¥]? \ * \(? \.?[0-9] ) | (?: times | multiplied\ by )\b
        | (?<= %\  ) of\b )
    | (?P<plus> plus\b ) | (?P<minus> minus\b ) | (?P<over> divided\ by\b )
    | (?P<word> [^\W\d_]{2,}\^[23](?![0-9]) | [^\W\d_]+ (?: ['/-][^\W\d_]+ )* | /\ ?[^\W\d_]{2,} )
    | (?P<power> (?<= [0-9)] )\*\*(?= [0-9(] ) )
    | (?P<skipped> [^\S\n]+ | \*\*+ | << | [$¢£¤¥₠-₿"'`_{}] | \\[A-Za-z]+ | \\.
        | (?<= [0-9] )-(?= [^\W\d_]{2} ) )
    | (?P<operator> [-+*/÷^()%\[\]] )
    | (?P<root> √ )
    """,
    re.VERBOSE,
)
_WORD_OPERATORS = {"times": "*", "plus": "+", "minus": "-", "over": "/"}
_SAME = {"÷": "/", "[": "(", "]": ")"}
# Words that end the unit after a number, for something else is being said.
_NO_UNITS = _words(
    """and so then but or if when since because therefore thus which that this it he she they we i
    is are was were has have had makes gives get gets total left will to from with"""
)
_UNITS_OF_ONE_LETTER = frozenset("amgslhdL")  # after a space: "5 m", but "5m" may be 5 times m

# An expression as far as it goes, read from its end (before "=") and from its start (after it).
_BACKWARDS = re.compile(
    r"""
    [w)]{0,8} n (?: ~(?=[-+*/^t(]) )? \(*
    (?: [-+*/^t~] [w)]{0,8} n (?: ~(?=[-+*/^t(]) )? \(* )*
    """,
    re.VERBOSE,
)
_FORWARDS = re.compile(r"[-~]? \(* ~? n [w)]{0,8} (?: [-+*/^t~] \(* ~? n [w)]{0,8} )*", re.VERBOSE)


def expression_before(text: str) -> Expression | None:
    """The expression that ends where ``text`` ends, or None if there is none to be sure of."""
    text = text.rstrip().rpartition("\n")[2]
    is_cut = len(text) > MAX_EXPRESSION_CHARS
    parts = _parts(text[-MAX_EXPRESSION_CHARS:])
    letters = "".join(part.letter for part in reversed(parts))
    found = _BACKWARDS.match(letters)
    if found is None or (is_cut and found.end() == len(letters)):
        return None
    start = len(parts) - found.end()
    preceding = letters[found.end() : found.end() + 2]  # the two letters before it, nearest first
    if preceding[:1] == "~":
        start -= 1  # a sign
    is_bullet = preceding in ("-", "*", "-;", "*;")
    is_dangling = preceding[:1] in tuple("+-*/^nv") and not is_bullet
    is_unclear = is_dangling or preceding in ("~v", "tv", ")n")
    is_lone = found[0].count("n") == 1 and (found[0] != "n" or preceding[:1] not in ("", ";"))
    if is_unclear or is_lone:  # "2 days = 7 + 2" is about days
        return None
    return _without_units(parts[start:], opening=True)


def expression_after(text: str) -> Expression | None:
    """The expression that begins where ``text`` begins, or None if there is none to be sure of."""
    text = text.lstrip().partition("\n")[0]
    is_cut = len(text) > MAX_EXPRESSION_CHARS
    parts = _parts(text[:MAX_EXPRESSION_CHARS])
    letters = "".join(part.letter for part in parts)
    found = _FORWARDS.match(letters)
    if found is None or (is_cut and found.end() == len(letters)):
        return None
    following = letters[found.end() : found.end() + 2]
    is_dash = following in ("-w", "-s", "-;", "*", "*;")
    if following[:1] in tuple("+-*/^~nv") and not is_dash:
        return None
    return _without_units(parts[: found.end()], opening=False)


def _without_units(parts: Sequence[Part], opening: bool) -> Expression | None:
    """The numerals, operators and brackets, without a bracket around the whole equation."""
    kept = [part for part in parts if part.letter != "w"]
    surplus = sum((part.letter == "(") - (part.letter == ")") for part in kept)
    bracket, edge = ("(", 0) if opening else (")", -1)
    for _ in range(surplus if opening else -surplus):
        if kept[edge].letter != bracket:
            return None
        del kept[edge]
    return kept if surplus == 0 or (surplus > 0) == opening else None


def _parts(text: str) -> list[Part]:
    text = text.strip()
    parts: list[Part] = []
    position = end_of_last = 0
    while position < len(text):
        found = _TOKEN.match(text, position)
        start, position = position, found.end() if found else position + 1
        group, token = (found.lastgroup, found[0]) if found else ("other", "")
        if group == "skipped":
            continue
        last = parts[-1].letter if parts and start == end_of_last else ""  # of what it touches
        end_of_last = position
        if group == "numeral":
            value = read_numeral(token)
            letter = ";" if value is None else "v" if last in ("w", "s", "v") else "n"
            parts.append(Part(letter, token, value or Fraction(0)))
        elif group == "mixed":
            whole, numerator, denominator = map(int, re.split("[ /]", token))
            proper = numerator < denominator
            value = whole + Fraction(numerator, denominator) if proper else Fraction(0)
            parts.append(Part("n" if proper else ";", token, value))
        elif group == "word":
            letter = _letter_of_word(token)
            if last == "n" and len(token) == 1:
                parts[-1] = Part("v")  # "2y"
            else:
                parts.append(Part(letter))
        elif token == "%" and last == "n":
            parts[-1] = parts[-1]._replace(is_percent=True)
        elif group == "operator" and token != "%":
            letter = _SAME.get(token, token)
            if letter == "(" and last in ("n", ")"):
                parts.append(Part("*", "*"))
            if letter == "-" and not last and re.match(r"[\d.$(]", text[position : position + 1]):
                letter = "~"
            parts.append(Part(letter, letter))
        elif group in _WORD_OPERATORS:
            parts.append(Part("t", _WORD_OPERATORS[group]))
        else:
            letter = {"power": "^", "root": "v", "clock": "v"}.get(group or "", ";")
            parts.append(Part(letter, letter))
    return parts


def _letter_of_word(word: str) -> str:
    if word.lower() in _NO_UNITS:
        return "s"
    return "v" if len(word) == 1 and word not in _UNITS_OF_ONE_LETTER else "w"
