"""The numbers a word problem is told with: which of them may be others, and which must stay.

"Ada has 12 eggs" can as well be about 17 eggs. But "12 months a year", "50%", "3/4", "7:30",
"in 1995", "the 5th day", "a $20 bill" and "twelve" cannot, nor can the 12 eggs of a story that
also speaks of a dozen: where a reader could not be sure, a number stays. What stays may still be
used by a solution, also in a shape of its own (0.2 or 80 for "20% off", 7 for "a week"); those
are the *constants* of a story.

Conservative by intent: a number wrongly kept costs variety, one wrongly changed costs truth.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from fractions import Fraction
from itertools import pairwise

from abacist.task.numerals import NUMBER_WORDS, TENS, read_numeral

SMALLEST_CHANGED = 5  # "3 friends" may be counted again by name, in the story or in the solution

NUMERAL = re.compile(r"(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)(?:\.[0-9]+)?|\.[0-9]+")


def _table(text: str) -> dict[str, frozenset[int]]:
    """Lines of "words: numbers" as a table from each word to the numbers."""
    table: dict[str, frozenset[int]] = {}
    for line in text.strip().split("\n"):
        words, _, numbers = line.partition(":")
        for word in words.split():
            table[word] = table.get(word, frozenset()) | frozenset(map(int, numbers.split()))
    return table


_SCALES = {"hundred": 100, "thousand": 1000, "million": 1_000_000}

# Numbers that a word brings along: a solution may use them though no numeral says so.
_IMPLIED = _table(
    """
    once single: 1
    half halves halved halve halving twice double doubled doubles both couple pair pairs: 2
    third thirds thrice triple triples tripled: 3
    fourth fourths quarter quarters quadruple quadruples: 4 25
    fifth fifths nickel nickels quintuple: 5
    sixth sixths: 6
    seventh sevenths: 7
    eighth eighths: 8
    ninth ninths: 9
    tenth tenths dime dimes decade decades: 10
    twelfth dozen dozens: 12
    score: 20
    hundredth penny pennies cent cents percent percentage percentages century centuries: 100
    second seconds minute minutes hour hours hourly: 60 24
    day days daily tomorrow yesterday today night nights nightly: 24 7
    week weeks weekly: 7 5 52 4
    weekday weekdays workday workdays school work workweek monday friday: 5
    weekend weekends saturday sunday fortnight: 2 5 14
    month months monthly: 12 30 31 4 28
    year years yearly annual annually annum: 12 52 365 360 366
    january april june july august september october november december march: 30 31 28 29
    inch inches foot feet yard yards mile miles: 12 3 36 5280
    ounce ounces pound pounds ton tons: 16 2000
    cup cups pint pints quart quarts gallon gallons tablespoon teaspoon: 2 3 4 8 16 48 128
    meter meters metre metres m cm km kg g mg ml millimeter millimeters: 10 100 1000
    centimeter centimeters kilometer kilometers kilogram kilograms kilo kilos: 10 100 1000
    gram grams liter liters litre litres milliliter milliliters milligram: 100 1000
    square squares rectangle rectangular rectangles pentagon hexagon octagon: 2 4 5 6 8
    triangle triangles triangular cube cubes die dice: 2 3 6 12
    hand hands finger fingers toe toes: 5 10 20
    dog dogs cat cats cow cows horse horses pig pigs sheep goat goats car cars: 4
    spider spiders octopus insect insects ant ants bee bees beetle beetles crab: 6 8 10
    alphabet: 26
    """
)
_CURRENCY = "$£€"
_LABELS = frozenset(
    re.findall(
        r"\w+",
        """number no chapter page room grade level class day week month year step question problem
        age route highway flight lesson unit part section bus size row column channel type version
        january february march april may june july august september october november december""",
    )
)
# A unit may touch its number ("15kg"); any other letter there makes a name of it.
_TOUCHING_UNIT = re.compile(r"(?:kg|g|mg|lbs?|oz|cm|mm|km|m|ft|ml|L|l|mph|hrs?|mins?)\b")
# What follows a number that names something: a time, an ordinal, a thing of the world.
_NAMES_BEFORE = re.compile(
    r"""[:/^]\ ?[0-9] | \ ?[-–]\ ?[0-9] | \ ?[xX*]\ ?[0-9] | ,[0-9]
    | \ ?[ap]\.?m\b | \ o'?’?clock | (?:st|nd|rd|th)\b | \ ?° | [-\ ]degrees?
    | [-\ ](?:sided|legged|legs|letters?|cards?|wheels?|bills?|notes?|coins?|packs?|points?|
        pointers?|dollar\ bills?|cent\ coins?|sides|fingers|toes|faces|squares?|quarters?|
        hundred|thousand|million|billion|BC|AD|and\ (?:a|one)[- ](?:half|quarter))\b
    """,
    re.VERBOSE | re.IGNORECASE,
)
_NAMES_AFTER = re.compile(r"(?:[\w.#'’]|[-–/:*^]\ ?|[0-9]\ ?x\ ?|[0-9],)\Z", re.IGNORECASE)
_PERCENT = re.compile(r" ?%|[- ]percent", re.IGNORECASE)
_BELOW = re.compile(r"/([0-9]{1,4})(?![0-9/])")
# Within a year, month, week, day or hour no number of the smaller unit may outgrow it.
_BOUNDS = _table("""
    day days night nights: 7 31
    hour hours: 12 24
    minute minutes second seconds: 60
    week weeks: 4 52
    month months: 12
    percent years year-old: 100
    """)


@dataclass(frozen=True, slots=True)
class Numeral:
    """A numeral as it stands in a text."""

    start: int
    end: int
    text: str
    value: Fraction


@dataclass(frozen=True, slots=True)
class StoryNumbers:
    """``bounds`` holds each number that may change, with the largest value it may take; ``kept``
    each quantity that stays, with the shapes a solution may give it. ``constants`` is all that a
    solution may use unchanged: those shapes, numbers that only name something, and words.
    """

    bounds: dict[Fraction, int]
    kept: dict[Fraction, set[Fraction]]
    constants: frozenset[Fraction]


def numerals(text: str) -> list[Numeral]:
    """The numerals of a text in order, unsigned: "12", "1,450", "2.50", ".5".

    >>> [str(each.value) for each in numerals("$1,450.50 for 3/4 of 12, or .5")]
    ['2901/2', '3', '4', '12', '1/2']
    """
    found = []
    for match in NUMERAL.finditer(text):
        value = read_numeral(match[0])
        if value is not None:
            found.append(Numeral(match.start(), match.end(), match[0], value))
    return found


def story_numbers(question: str, solution: str = "") -> StoryNumbers:
    """Which numbers of a question may change, and which constants stand beside them.

    The words of the solution count too: where it speaks of "a fifth", 5 stays.

    >>> numbers = story_numbers("Ada sells 12 eggs at $15, 20% off, in 6 weeks. It is 7 p.m.")
    >>> sorted(map(int, numbers.bounds)), Fraction(4, 5) in numbers.constants
    ([6, 12, 15], True)
    """
    words = f"{question} {solution}"
    constants = {Fraction(1), *spelled_numbers(words), *_implied(words)}
    bounds: dict[Fraction, int] = {}
    kept: dict[Fraction, set[Fraction]] = {}
    for numeral in numerals(question):
        if _is_part(numeral, question) or numeral.value < SMALLEST_CHANGED:
            kept.setdefault(numeral.value, set()).update(_shapes(numeral, question))
        elif _is_name(numeral, question):
            constants.add(numeral.value)
        else:
            bound = _bound(numeral, question)
            bounds[numeral.value] = min(bounds.get(numeral.value, bound), bound)
    constants |= set().union(*kept.values())
    for value in bounds.keys() & constants:
        del bounds[value]
        kept.setdefault(value, set()).add(value)
    return StoryNumbers(bounds, kept, frozenset(constants))


def spelled_numbers(text: str) -> set[Fraction]:
    """The numbers a text has in words, "twenty-five" as 25, and as 20 and 5 too.

    >>> sorted(map(int, spelled_numbers("twenty-five or two hundred")))
    [2, 5, 20, 25, 100, 200]
    """
    words = re.findall(r"[a-z]+", text.lower())
    values = [NUMBER_WORDS.get(word, _SCALES.get(word)) for word in words]
    found = {Fraction(value) for value in values if value is not None}
    for (word, value), (following, after) in pairwise(zip(words, values, strict=True)):
        if value is None or after is None:
            continue
        if following in _SCALES:
            found.add(Fraction(value * after))
        elif word in TENS and after < 10:
            found.add(Fraction(value + after))
    return found


def _implied(text: str) -> Iterator[Fraction]:
    for word in set(re.findall(r"[a-z]+", text.lower())):
        for number in _IMPLIED.get(word, ()):
            yield Fraction(number)
    if "%" in text:
        yield Fraction(100)


def touches_a_name(numeral: Numeral, text: str) -> bool:
    """Is the numeral part of something else: "A4", "2x", "mp3"? A unit may follow: "15kg"."""
    before, after = text[: numeral.start][-1:], text[numeral.end :]
    return before.isalpha() or (after[:1].isalpha() and not _TOUCHING_UNIT.match(after))


def _is_part(numeral: Numeral, text: str) -> bool:
    """Is it a percentage, a decimal, or the upper number of a fraction?"""
    is_share = _PERCENT.match(text, numeral.end) or _BELOW.match(text, numeral.end)
    return "." in numeral.text or bool(is_share)


def _is_name(numeral: Numeral, text: str) -> bool:
    """Does it say which, not how many: a time, a year, an ordinal, a page, a banknote?"""
    before, after = text[: numeral.start], text[numeral.end :]
    is_money = before.rstrip().endswith(tuple(_CURRENCY))
    word = re.search(r"([A-Za-z]+)\.?,? ?\Z", before[-20:])
    return (
        (1500 <= numeral.value <= 2100 and "," not in numeral.text and not is_money)
        or bool(_NAMES_BEFORE.match(after) or _NAMES_AFTER.search(before[-4:]))
        or touches_a_name(numeral, text)
        or (word is not None and word[1].lower() in _LABELS)
    )


def _bound(numeral: Numeral, text: str) -> int:
    """The largest number that could stand here instead, by the unit that follows."""
    unit = re.match(r"[ -]([a-z]+(?:-old)?)", text[numeral.end :].lower())
    limits = _BOUNDS.get(unit[1], ()) if unit else ()
    return min((limit for limit in limits if numeral.value <= limit), default=10**9)


def _shapes(numeral: Numeral, text: str) -> set[Fraction]:
    """A number that stays, and what a solution may make of it: 0.2, 0.8, 1.2, 80 of "20%"."""
    value = numeral.value
    shapes = {value}
    if _PERCENT.match(text, numeral.end):
        part = value / 100
        shapes |= {part, 1 - part, 1 + part, 100 - value, 100 + value}
    if fraction := _BELOW.match(text, numeral.end):
        below = Fraction(fraction[1])
        if below:
            part = value / below
            shapes |= {below, part, 1 - part, 1 + part, below - value, below + value}
    return {abs(shape) for shape in shapes}


def rewritten(text: str, new_values: Mapping[int, Fraction], *, has_commas: bool) -> str | None:
    """``text`` with other numbers, by the place where each numeral starts, each written as the
    old one is. None where "a 12" would become "a 18", or a value has no short decimal.

    >>> rewritten("$1,200.00 for 9", {1: Fraction(2501, 2), 14: Fraction(8)}, has_commas=True)
    '$1,250.50 for 8'
    """
    pieces, end = [], 0
    for numeral in numerals(text):
        new = new_values.get(numeral.start, numeral.value)
        if new != numeral.value:
            written = _written_like(new, numeral, has_commas)
            opening = text[max(0, numeral.start - 5) : numeral.start]
            article = re.search(r"\ban? [^\w\s]?\Z", opening, re.IGNORECASE)
            if written is None or (article and _takes_an(written) != _takes_an(numeral.text)):
                return None
            pieces += [text[end : numeral.start], written]
            end = numeral.end
    return "".join([*pieces, text[end:]])


def places(value: Fraction) -> int | None:
    """How many decimals write a value exactly; None if none, or more than eight, do."""
    return next((count for count in range(9) if (value * 10**count).denominator == 1), None)


def _written_like(new: Fraction, old: Numeral, has_commas: bool) -> str | None:
    needed, shown = places(new), len(old.text.partition(".")[2])
    if needed is None:
        return None
    grouped = "," in old.text or (has_commas and old.value < 1000)
    if shown == 2 or needed > 0:  # money keeps its two places
        needed = max(needed, shown if shown == 2 else 0)
    written = f"{float(new):{',' if grouped else ''}.{needed}f}"
    return written.removeprefix("0") if old.text.startswith(".") else written


def _takes_an(numeral: str) -> bool:
    return numeral.startswith("8") or numeral.partition(",")[0] in ("11", "18")
