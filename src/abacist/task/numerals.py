"""What a reader sees in characters, and the exact value of one numeral.

Text from models and data sets spells the same thing in many ways: full-width digits, Unicode minus
signs, zero-width spaces, vulgar fractions, LaTeX, HTML. :func:`plain_text` gives each one spelling,
so that ``answers`` and ``steps`` can have simple grammars. Linear time, and no exception on any
str.

A numeral may be of any length. Up to ``MAX_DIGITS`` its value is a Fraction, to calculate with.
Beyond that it is a Decimal, which holds the digits as they are: it compares exactly, with Fractions
too, in linear time, where Python's integers take quadratic time and refuse texts of more than 4,300
digits. Never calculate with it: Decimal arithmetic rounds, even for ``-x`` and ``abs(x)``.
"""

from __future__ import annotations

import re
import unicodedata
from decimal import MAX_EMAX, MAX_PREC, MIN_EMIN, Context, Decimal
from fractions import Fraction
from itertools import islice

Number = Fraction | Decimal

MAX_DIGITS = 1_000  # of a number to calculate with, before the decimal point and behind it
MAX_EXPONENT_DIGITS = 9  # "1e999999999" is compared, and never written out
MAX_HTML_TAGS = 1_000  # of a text; those beyond are left as they are
MAX_OTHER_CHARS = 20  # of an integer numeral, beside its digits and commas

_TO_NINETEEN = """zero one two three four five six seven eight nine ten eleven twelve thirteen
fourteen fifteen sixteen seventeen eighteen nineteen"""
TENS = {
    word: 10 * number
    for number, word in enumerate(
        ["twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety"], 2
    )
}
NUMBER_WORDS = {word: number for number, word in enumerate(_TO_NINETEEN.split())} | TENS
"""The numbers that are one word below a hundred."""

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
_LATEX_SPACE = re.compile(r"(?<!\\)\\[,;: ]|(?<=[0-9}])~(?=[A-Za-z\\])")
_HTML_SPACE = re.compile("&(?:nbsp|thinsp|#160|#8239);")
_HTML_TAG = re.compile(r"<(/?)(b|strong|em|i|u|code|mark|tt|kbd|samp|big|small|ins)\s*>", re.I)
_HTML_LINE_BREAK = re.compile(r"<br\s*/?>", re.I)
_LINE_BREAK = re.compile("[\r\x0b\x0c]")
_MAX_SEEN = 4_096
_MAX_REPLACED = 16  # different characters that are replaced one by one
_EXACT = Context(prec=MAX_PREC, Emax=MAX_EMAX, Emin=MIN_EMIN)

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
    """``text`` with one spelling for digits, signs, spaces, quotes, fractions, LaTeX and HTML.

    Superscripts become powers, so that "5²" is never taken for 52. Lines end in a line feed.
    Emphasis in HTML becomes backticks, Markdown's sign for code.

    >>> plain_text("−１\\u200b２\\u00a0½"), plain_text("5²"), plain_text("1{,}450 \\\\times 3")
    ('-12 1/2', '5^2', '1,450 * 3')
    >>> plain_text("<b>12\\\\,345</b>"), plain_text("1 <b> 2")
    ('`12 345`', '1 <b> 2')
    """
    text = text.replace("{,}", ",").replace(",\\!", ",").replace("{\\,}", "\\,")
    if "<" in text or "&" in text:
        text = _HTML_LINE_BREAK.sub("\n", _HTML_SPACE.sub(" ", _without_emphasis(text)))
    if text.isascii():  # the usual case, and a long one where digits go on and on
        text = _LINE_BREAK.sub("\n", text)
        text = _BEFORE_FRACTION.sub(" ", text) if "\\" in text else text
    else:
        present = set(text)
        if "\\" in present or not present.isdisjoint(_VULGAR_FRACTIONS):
            text = _BEFORE_FRACTION.sub(" ", text)
        if not present.isdisjoint(_SUPERSCRIPTS):
            text = _BEFORE_POWER.sub("^", text)
        changed = [character for character in present if _SEEN[ord(character)] != character]
        if len(changed) > _MAX_REPLACED:
            text = text.translate(_SEEN)
        else:  # quicker than a look at every character; nothing that is put in is changed again
            for character in changed:
                text = text.replace(character, _SEEN[ord(character)])
    if "\\" in text:
        text = re.sub(r"\\(times|cdot|div)\b", lambda found: _LATEX_OPERATOR[found[1]], text)
        text = _LATEX_FRACTION.sub(r"\1/\2", text)
    return _LATEX_SPACE.sub(" ", text) if "\\" in text or "~" in text else text


def _without_emphasis(text: str) -> str:
    """``text`` with a backtick for each tag of a pair such as ``<b>…</b>``; pairs may be nested."""
    tags = list(islice(_HTML_TAG.finditer(text), MAX_HTML_TAGS))
    paired: list[int] = []
    waiting: list[int] = []  # opening tags
    for number, tag in enumerate(tags):
        if not tag[1]:
            waiting.append(number)
        elif waiting and tags[waiting[-1]][2].lower() == tag[2].lower():
            paired += waiting.pop(), number
    pieces, end = [], 0
    for number in sorted(paired):
        pieces.append(text[end : tags[number].start()])
        end = tags[number].end()
    return "`".join([*pieces, text[end:]])


def exact_value(text: str) -> Decimal | None:
    """The value of one unsigned numeral in plain text, of any length; None if it is malformed.

    >>> exact_value("1,450.50"), exact_value("1e99999"), exact_value("1,45"), exact_value("")
    (Decimal('1450.50'), Decimal('1E+99999'), None, None)
    """
    numeral = _NUMERAL.fullmatch(text)
    if numeral is None or not (numeral[1] or numeral[2]):
        return None
    if len((numeral[3] or "").lstrip("+-0")) > MAX_EXPONENT_DIGITS:
        return None
    return Decimal(text.replace(",", ""))


def scaled(value: Decimal, power: int) -> Decimal:
    """``value`` times ten to the ``power``, exactly."""
    return value.scaleb(power, _EXACT)


def as_number(value: Decimal) -> Number:
    """The value as a Fraction if it has at most ``MAX_DIGITS`` on either side of the point.

    >>> as_number(Decimal("12.50")), as_number(Decimal("1e5000"))
    (Fraction(25, 2), Decimal('1E+5000'))
    """
    value = value.normalize(_EXACT)
    is_short = value.adjusted() < MAX_DIGITS and int(value.as_tuple().exponent) >= -MAX_DIGITS
    return Fraction(value) if is_short else value


def read_numeral(text: str) -> Fraction | None:
    """The value of one unsigned numeral in plain text; None if it is malformed or absurdly long.

    >>> [str(read_numeral(text)) for text in ("1,450.5", ".5", "1e3", "1,45", "9" * 1_001)]
    ['2901/2', '1/2', '1000', 'None', 'None']
    """
    value = exact_value(text)
    number = None if value is None else as_number(value)
    return number if isinstance(number, Fraction) else None


def integer_digits(text: str) -> str | None:
    """The normalised digits of a bare integer numeral of any length, or None if it is none.

    >>> [integer_digits(text) for text in ("-5", "+1,450", "-0", "12.0", "12 345", "²")]
    ['-5', '1450', '0', None, None, None]
    """
    text = text.strip()
    if len(text) > MAX_OTHER_CHARS and len(re.sub(r"[\d,]+", "", text)) > MAX_OTHER_CHARS:
        return None
    text = plain_text(text)
    if _INTEGER.fullmatch(text) is None:
        return None
    digits = text.lstrip("+-").replace(",", "").lstrip("0") or "0"
    return "-" + digits if text[0] == "-" and digits != "0" else digits


def is_integer_numeral(text: str) -> bool:
    """Is ``text`` a bare integer numeral: digits, with a sign or correct grouping, and no more?

    >>> [is_integer_numeral(text) for text in ("-5", "1,450", "12.0", "12 apples", "1,45", "²")]
    [True, True, False, False, False, False]
    """
    return integer_digits(text) is not None
