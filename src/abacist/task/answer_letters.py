"""The tokens of an answer, written as one letter each.

A careful grader's grammar is about kinds of things in a row: a label, a sign, a number, a unit.
Here a text becomes a string of such kinds, so that ``answers`` can state the grammar as patterns:

    "The answer is -$1,450.00."   ->   W W W _ d ;

- ``i d f`` a numeral: an integer, another decimal, one that begins with its point; ``I D F`` the
  same after a space;
- ``- / +`` minus, slash, plus; ``_ | P`` the same after a space;
- ``* ^ ÷`` themselves; ``,`` a comma or colon; ``=`` an equals sign or an arrow;
- ``;`` the end of a statement: of a line or sentence, or a ``####``;
- ``w`` a word, a unit; ``W`` the same after a space;
- ``v`` a single letter that is no unit: "12k", "2y";
- other letters stand for the words of ``_WORDS``.

Brackets, quotes, bold, currency and percent signs and a final full stop are decoration and leave no
letter. A negation, a hedge, a number in words or an unknown character rules the whole text out, and
so do three numerals in a row, unless single spaces part them into groups of three digits.
"""

from __future__ import annotations

import re
from decimal import Decimal

from abacist.task.numerals import exact_value


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


_RULED_OUT = _words(
    """not no nor neither never none cannot wrong incorrect false
    or either maybe perhaps possibly probably approximately approx roughly circa might guess
    unsure unknown undefined uncertain nan inf infinity infinite least most ish
    root sqrt factorial half halves twice double triple zero two three four five six seven eight
    nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen eighteen nineteen twenty
    thirty forty fifty sixty seventy eighty ninety"""
)
_MAGNITUDES = {
    name + plural: Decimal(10**power)
    for name, power in (
        ("hundred", 2),
        ("thousand", 3),
        ("million", 6),
        ("billion", 9),
        ("trillion", 12),
    )
    for plural in ("", "s")
}
_WORDS = {
    "M": frozenset(_MAGNITUDES),
    "n": _words("minus negative"),
    "a": _words("plus divided multiplied squared cubed modulo mod"),
    "o": _words("times of"),  # operators in working, harmless in a quantity ("12 of them")
    "x": _words("x"),  # times, or a variable
    "c": _words("usd eur gbp cad aud nzd inr jpy cny chf rs rm"),  # may touch the numeral: "USD12"
    # Just before a numeral these make it a neighbourhood: "about 12", "more than 12", "up to 12".
    "z": _words("about around nearly almost over under above below than beyond within between up"),
    # Beside a numeral these make it something else: "May 12", "one 12".
    "m": _words(
        """january february march april may june july august september october november december
        jan feb mar apr jun jul aug sep sept oct nov dec one"""
    ),
    # Just after a numeral these do: "2 thirds", "12 pi".
    "p": _words(
        """third thirds fourth fourths fifth fifths sixth sixths seventh sevenths eighth eighths
        ninth ninths tenth tenths hundredth hundredths thousandth thousandths pi bn mn"""
    ),
}
_SECOND_NUMBER = ("and a", "and an", "and one")  # "12 and a quarter"
_LETTER_OF_WORD = {word: letter for letter, words in _WORDS.items() for word in words}
_UNITS_OF_ONE_LETTER = _words("m g s l h d c p t L C F J N W V A")  # "12 m" is a length
_AFTER_SPACE = {"-": "_", "/": "|", "+": "P"}

_TOKEN = re.compile(
    r"""
      (?P<space> [^\S\n]+ )
    | (?P<grouped> [1-9][0-9]{0,2} (?:\ [0-9]{3})+ (?:\.[0-9]+)? (?! [.,]?[0-9] | [\ /][0-9] ) )
    | (?P<unknown> \.{2,} | != | [0-9]+ (?:\ [0-9]+){2}
        | [1-9][0-9]{0,2} \ [0-9]{3}/[0-9] )  # 12,345 by something, or 12 and a fraction?
    | (?P<numeral> \.?[0-9]+ (?: [.,]+[0-9]+ )* (?: [eE][+-]?[0-9]+ (?![^\W_]) )? )
    | (?P<stop> \n | ; | \\\\ | \#{2,} | [.!](?=\s|$) )
    | (?P<equals> :?=+>? | -> | >> | [→⇒⟹] )
    | (?P<area> (?: [mck]?m | in | ft | yd | mi ) \^[23] (?![0-9]) )
    | (?P<decoration> [A-Z]{1,3}\$ | [$¢£¤¥֏؋৳฿₠-₿] | << | ["'`%(){}\[\]_#•°✓✔✅.]
        | \\(?: boxed | fbox | text[a-z]* | math[a-z]* | left | right | q?quad )(?![a-z])
        | \\[^A-Za-z] )
    | (?P<word> [^\W\d_]+ (?: ['/-][^\W\d_]+ )* )
    | (?P<operator> [-+*/÷^,:] )
    """,
    re.VERBOSE,
)


def letters_of(text: str) -> tuple[str, list[Decimal]] | None:
    """The letters of a plain text, and beside each letter its value; None where one rules it out.

    The value is that of a numeral, or the factor of a magnitude such as "million"; else 0.

    >>> letters_of("it is $12")
    ('wWI', [Decimal('0'), Decimal('0'), Decimal('12')])
    >>> letters_of("not 12") is letters_of("12 ± 1") is None
    True
    """
    letters, values = [""], [Decimal(0)]  # a sentinel first, so that there is always a last one
    position, spaced, previous_word, seen_numeral = 0, False, "", False
    while position < len(text):
        found = _TOKEN.match(text, position)
        if found is None or found.lastgroup == "unknown":
            return None
        position, group, token = found.end(), found.lastgroup, found[0]
        if group in ("space", "decoration"):
            spaced = spaced or group == "space"
            continue
        value = Decimal(0)
        if group in ("numeral", "grouped"):
            numeral = exact_value(token.replace(" ", ""))
            if numeral is None:
                return None
            value, seen_numeral = numeral, True
            letter = "f" if token[0] == "." else "d" if re.search("[.eE]", token) else "i"
            letter = letter.upper() if spaced else letter
        elif group == "word":
            word = token.lower()
            pair = f"{previous_word} {word}"
            if _rules_out(token) or pair == "could be" or (seen_numeral and pair in _SECOND_NUMBER):
                return None
            letter, value = _letter_of_word(token, spaced), _MAGNITUDES.get(word, value)
            letter = "z" if pair == "up to" else letter
            previous_word = word
        elif group == "operator":
            letter = "," if token == ":" else _AFTER_SPACE.get(token, token) if spaced else token
        else:
            letter = {"stop": ";", "equals": "=", "area": "W" if spaced else "w"}[group or ""]
        if letter == ";" and letters[-1] in ("=", ";"):
            continue  # a line break after an equals sign does not end the statement,
        if letter == "=" and letters[-1] == ";":
            del letters[-1], values[-1]  # nor does one before it
        letters.append(letter)
        values.append(value)
        spaced = letter == ";"
    return "".join(letters), values[1:]


def _rules_out(word: str) -> bool:
    if word == "may" or word.lower().endswith("n't"):  # "May" is a month
        return True
    parts = re.split("/|(?<!half)-", word.lower())  # a half-gallon is a unit
    return any(part in _RULED_OUT for part in parts)


def _letter_of_word(word: str, spaced: bool) -> str:
    if word.lower() in _LETTER_OF_WORD:
        return _LETTER_OF_WORD[word.lower()]
    article = spaced and word in ("a", "A", "I")
    if len(word) == 1 and ord(word) < 0x2E80 and not article and word not in _UNITS_OF_ONE_LETTER:
        return "v"  # beyond U+2E80 one letter can be a whole word
    return "W" if spaced else "w"
