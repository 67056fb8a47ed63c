"""What a reader sees in characters, and the exact value of one numeral.

Text from models and data sets spells the same thing in many ways: full-width digits, Unicode minus
signs, zero-width spaces, vulgar fractions, LaTeX. :func:`plain_text` gives each one spelling, so
that ``answers`` and ``steps`` can have simple grammars. Linear time, and no exception on any str.
"""

from __future__ import annotations

import re
import unicodedata
from fractions import Fraction

MAX_DIGITS = 40  # of one numeral, its exponent included; also the largest exponent

_VULGAR_FRACTIONS = "¼½¾⅐⅑⅒⅓⅔⅕⅖⅗⅘⅙⅚⅛⅜⅝⅞"
_SUPERSCRIPTS = "⁰¹²³⁴⁵⁶⁷⁸⁹⁻"
_REPLACED = {
    **dict.fromkeys("\u2010\u2011\u2012\u2013\u2014\u2015\u2212\ufe63", "-"),
    **dict.fromkeys("×∙·⋅✕✖", "*"),
    **dict.fromkeys("∕⁄", "/"),
    **dict.fromkeys("‘’‚′", "'"),
    **dict.fromkeys("“”„«»″", '"'),
    **dict.fromkeys("\r\x0b\x0c\x85\u2028\u2029", "\n"),
    "。": ". ",
    **{
        symbol: unicodedata.normalize("NFKD", symbol).replace("⁄", "/").replace("−", "-")
        for symbol in _VULGAR_FRACTIONS + _SUPERSCRIPTS
    },
}
_LATEX_OPERATOR = {"times": "*", "cdot": "*", "div": "÷"}
_LATEX_FRACTION = re.compile(r"\\[dt]?frac ?\{([0-9]{1,40})\} ?\{([0-9]{1,40})\}")
# Where a mixed number takes a space ("3½" is "3 1/2"), and a power its sign ("5²" is "5^2").
_BEFORE_FRACTION = re.compile(rf"(?<=[\d{_VULGAR_FRACTIONS}])(?=\\[dt]?frac|[{_VULGAR_FRACTIONS}])")
_BEFORE_POWER = re.compile(rf"(?<![{_SUPERSCRIPTS}])(?=[{_SUPERSCRIPTS}])")
_MAX_SEEN = 4_096

_GROUPED = r"[1-9][0-9]{0,2}(?:,[0-9]{3})+"
_NUMERAL = re.compile(rf"([0-9]+|{_GROUPED})?(\.[0-9]+)?(?:[eE]([+-]?[0-9]+))?")
_INTEGER = re.compile(rf"[+-]?(?:[0-9]+|{_GROUPED})")


class _Seen(dict[int, str]):
    """A ``str.translate`` table, filled as needed: what a reader sees in a character."""

    def __missing__(self, code: int) -> str:
        character = chr(code)
        category = unicodedata.category(character)
        if category == "Cf":  # zero-width spaces, joiners, directions: nothing to see
            seen = ""
        elif 0xFF01 <= code <= 0xFF5E:  # full-width ASCII
            seen = chr(code - 0xFEE0)
        elif category == "Nd":
            seen = str(unicodedata.decimal(character))
        else:
            seen = " " if character.isspace() else character
        if len(self) < _MAX_SEEN:
            self[code] = seen
        return seen


_SEEN = _Seen({code: chr(code) for code in range(128)})
_SEEN.update({ord(character): plain for character, plain in _REPLACED.items()})


def plain_text(text: str) -> str:
    """``text`` with one spelling for digits, signs, spaces, quotes, fractions and LaTeX operators.

    Superscripts become powers, so that "5²" is never taken for 52. Lines end in a line feed.

    >>> plain_text("−１\\u200b２\\u00a0½"), plain_text("5²"), plain_text("1{,}450 \\\\times 3")
    ('-12 1/2', '5^2', '1,450 * 3')
    """
    text = text.replace("{,}", ",").replace(",\\!", ",")
    text = _BEFORE_POWER.sub("^", _BEFORE_FRACTION.sub(" ", text)).translate(_SEEN)
    if "\\" in text:
        text = re.sub(r"\\(times|cdot|div)\b", lambda found: _LATEX_OPERATOR[found[1]], text)
        text = _LATEX_FRACTION.sub(r"\1/\2", text)
    return text


def read_numeral(text: str) -> Fraction | None:
    """The value of one unsigned numeral in plain text; None if it is malformed or absurdly long.

    >>> [str(read_numeral(text)) for text in ("1,450.5", ".5", "1e3", "1,45", "9" * 41)]
    ['2901/2', '1/2', '1000', 'None', 'None']
    """
    if len(text) > 2 * MAX_DIGITS:
        return None
    numeral = _NUMERAL.fullmatch(text)
    if numeral is None or not (numeral[1] or numeral[2]):
        return None
    exponent = int(numeral[3] or 0)
    if sum(map(str.isdigit, text)) > MAX_DIGITS or abs(exponent) > MAX_DIGITS:
        return None
    whole = (numeral[1] or "0").replace(",", "")
    return Fraction(whole + (numeral[2] or "")) * Fraction(10) ** exponent


def is_integer_numeral(text: str) -> bool:
    """Is ``text`` a bare integer numeral: digits, with a sign or correct grouping, and no more?

    >>> [is_integer_numeral(text) for text in ("-5", "1,450", "12.0", "12 apples", "1,45", "²")]
    [True, True, False, False, False, False]
    """
    text = text.strip()
    if len(text) > 2 * MAX_DIGITS:
        return False
    text = plain_text(text)
    return _INTEGER.fullmatch(text) is not None and sum(map(str.isdigit, text)) <= MAX_DIGITS
