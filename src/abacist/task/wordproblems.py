"""Generated word problems with worked solutions, in GSM8K's record form.

A first run needs no network, so the problems are made here. A :class:`Story` is a running
count of some item: an opening, up to three events, a closing question, and in four stories
of ten a sentence whose number has nothing to do with the question. All numbers are whole and
at most :data:`LARGEST_NUMBER`; every division is exact. The result is a record like
GSM8K's: ``question`` and ``answer``, where ``answer`` holds one equation a line with
calculator annotations (``3*8=<<3*8=24>>24``) and ends in ``#### n``.

Two promises hold whatever the seed:

* a question belongs to exactly one split, decided by the hash of its text, so nothing
  held out can be met in training;
* one *structure* in ten (opening, events, question) is never used in ``train`` or
  ``selection``; a third of ``heldout`` has such an unseen structure.

A story can be solved wrongly too (:meth:`Story.solve` with a :class:`Slip`): the built-in
model's warm start uses that to give it habits worth unlearning (``tools/warmstart.py``).
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum

NAMES = (
    "Ada", "Ben", "Cleo", "Dan", "Ella", "Finn", "Gina", "Hugo", "Iris", "Jack", "Kira", "Leo",
    "Mia", "Noah", "Olga", "Paul", "Rosa", "Sam", "Tara", "Uma", "Vera", "Will", "Yara", "Zoe",
)  # fmt: skip
ITEMS = (
    "apples", "books", "cards", "coins", "cookies", "flowers",
    "marbles", "muffins", "pens", "shells", "stamps", "stickers",
)  # fmt: skip

# Wording: two or three ways to say each thing. {n} and {k} are the numbers of the step.
WORDINGS: dict[str, tuple[str, ...]] = {
    "have": ("{name} has {n} {items}.", "{name} starts with {n} {items}."),
    "packs": (
        "{name} buys {k} boxes with {n} {items} in each box.",
        "{name} has {k} boxes. Each box holds {n} {items}.",
    ),
    "daily": (
        "{name} makes {n} {items} every day for {k} days.",
        "For {k} days {name} collects {n} {items} a day.",
    ),
    "two": (
        "{name} finds {n} {items} on Monday and {k} {items} on Tuesday.",
        "{name} gets {n} {items} in the morning and {k} {items} at night.",
    ),
    "gain": (
        "{friend} gives {name} {n} more {items}.",
        "Then {name} buys {n} more {items}.",
        "Later {name} finds {n} {items}.",
    ),
    "loss": (
        "{name} gives {n} {items} to {friend}.",
        "Then {name} loses {n} {items}.",
        "{friend} takes {n} of the {items}.",
    ),
    "gain_packs": (
        "Then {name} buys {k} bags with {n} {items} in each bag.",
        "{friend} brings {k} bags of {n} {items} each.",
    ),
    "loss_each": (
        "{name} gives {n} {items} to each of {k} friends.",
        "{k} friends take {n} {items} each.",
    ),
    "double": ("Then {name} doubles the number of {items}.",),
    "triple": ("Then {name} triples the number of {items}.",),
    "half": (
        "{name} gives half of the {items} to {friend}.",
        "Then {name} loses half of the {items}.",
    ),
    "left": ("How many {items} does {name} have now?", "How many {items} are there in the end?"),
    "sell": (
        "{name} sells all the {items} for ${n} each. How many dollars does {name} get?",
        "Each of them is sold for ${n}. How many dollars is that?",
    ),
    "share": (
        "{name} puts them into {n} equal piles. How many {items} are in each pile?",
        "{n} children share them equally. How many {items} does each child get?",
    ),
    "compare": ("{friend} has {n} {items}. How many more {items} does {name} have than {friend}?",),
    "goal": ("{name} wants {n} {items}. How many more {items} does {name} need?",),
    "other": ("{name} also has {n} {others}.", "There are {n} {others} on the table."),
    "stranger": ("{stranger} has {n} {items}.", "Last year {name} had {n} {items}."),
    "age": ("{name} is {n} years old.", "{friend} is {n} years old."),
}


LARGEST_NUMBER = 200
DISTRACTOR_FRACTION = 0.4
UNSEEN_FRACTION_OF_HELDOUT = 1 / 3
SPLITS = ("train", "selection", "heldout")

OPENINGS = ("have", "packs", "daily", "two")
EVENTS = ("gain", "loss", "gain_packs", "loss_each", "double", "triple", "half")
QUESTIONS = ("left", "sell", "share", "compare", "goal")
DISTRACTORS = ("other", "stranger", "age")

# Largest value drawn for n and for k in each step; k only where two numbers are needed.
_DRAWN: dict[str, tuple[int, int]] = {
    "have": (90, 0), "packs": (12, 9), "daily": (12, 9), "two": (60, 60),
    "gain": (60, 0), "loss": (60, 0), "gain_packs": (12, 6), "loss_each": (9, 6),
    "double": (0, 0), "triple": (0, 0), "half": (0, 0),
    "left": (0, 0), "sell": (9, 0), "share": (9, 0), "compare": (60, 0), "goal": (200, 0),
    "other": (30, 0), "stranger": (30, 0), "age": (30, 0),
}  # fmt: skip


class Slip(StrEnum):
    """A mistake in reasoning whose arithmetic is right."""

    DISTRACTOR = "counts the number that has nothing to do with the question"
    SKIPPED_EVENT = "leaves out the last thing that happened"


@dataclass(frozen=True, slots=True)
class Step:
    """One sentence of a story: its kind, its numbers and which wording it has."""

    kind: str
    n: int = 0
    k: int = 0
    wording: int = 0


@dataclass(frozen=True, slots=True)
class Story:
    """Everything a problem is made of. ``question()`` and ``solve()`` write it down."""

    name: str
    friend: str
    stranger: str
    items: str
    others: str
    steps: tuple[Step, ...]
    distractor: Step | None
    distractor_position: int

    @property
    def structure(self) -> str:
        """Opening, events and question, without wording, numbers and distractor."""
        return " > ".join(step.kind for step in self.steps)

    def question(self) -> str:
        """The text a pupil reads."""
        told = list(self.steps)
        if self.distractor:
            told.insert(self.distractor_position, self.distractor)
        return " ".join(self._say(step) for step in told)

    def solve(self, slip: Slip | None = None) -> tuple[list[str], int] | None:
        """Solution lines (without annotations) and the result, or None where there is none.

        With ``slip`` the solution contains that mistake and nothing else wrong. None means
        that the story does not work out (a negative count, an inexact division, a number
        too large), or offers no opportunity for the slip.
        """
        steps = list(self.steps)
        if slip is Slip.DISTRACTOR:
            if self.distractor is None:
                return None
            steps.insert(-1, Step("gain", self.distractor.n))
        elif slip is Slip.SKIPPED_EVENT:
            if len(steps) < 3:
                return None
            del steps[-2]
        lines: list[str] = []
        count = 0
        for step in steps:
            for text, new_count in self._work(step, count):
                if not 0 < new_count <= LARGEST_NUMBER:
                    return None
                if text:
                    lines.append(text)
                count = new_count
        return (lines, count) if lines else None

    def _say(self, step: Step) -> str:
        return WORDINGS[step.kind][step.wording].format(
            name=self.name, friend=self.friend, stranger=self.stranger,
            items=self.items, others=self.others, n=step.n, k=step.k,
        )  # fmt: skip

    def _work(self, step: Step, count: int) -> Iterator[tuple[str, int]]:
        """The lines a step adds to the solution, each with the count after it (0: impossible)."""
        name, items, n, k = self.name, self.items, step.n, step.k
        match step.kind:
            case "have":
                yield "", n
            case "packs" | "daily":
                yield f"{name} has {k}*{n}={k * n} {items}.", k * n
            case "two":
                yield f"{name} has {n}+{k}={n + k} {items}.", n + k
            case "gain":
                yield f"Now there are {count}+{n}={count + n} {items}.", count + n
            case "loss":
                yield f"Now there are {count}-{n}={count - n} {items}.", count - n
            case "gain_packs":
                yield f"The bags hold {k}*{n}={k * n} {items}.", k * n
                yield f"Now there are {count}+{k * n}={count + k * n} {items}.", count + k * n
            case "loss_each":
                yield f"The friends get {k}*{n}={k * n} {items}.", k * n
                yield f"Now there are {count}-{k * n}={count - k * n} {items}.", count - k * n
            case "double" | "triple":
                factor = 2 if step.kind == "double" else 3
                yield f"Now there are {count}*{factor}={count * factor} {items}.", count * factor
            case "half":
                yield f"Now there are {count}/2={count // 2} {items}.", _exact(count, 2)
            case "left":
                yield "", count
            case "sell":
                yield f"The price is {count}*{n}={count * n} dollars.", count * n
            case "share":
                yield f"Each part is {count}/{n}={count // n} {items}.", _exact(count, n)
            case "compare":
                yield f"The difference is {count}-{n}={count - n} {items}.", count - n
            case "goal":
                yield f"The difference is {n}-{count}={n - count} {items}.", n - count


def _exact(count: int, parts: int) -> int:
    return 0 if count % parts else count // parts


def is_unseen(structure: str) -> bool:
    """True for the one structure in ten that training never meets."""
    return _hash(structure) % 10 == 0


def split_of(question: str) -> str:
    """The one split a question belongs to: 80 % train, 5 % selection, 15 % heldout."""
    bucket = _hash(question) % 20
    return "selection" if bucket == 0 else "heldout" if bucket <= 3 else "train"


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")


def draw_story(rng: random.Random, num_equations: int | None = None) -> Story:
    """A random solvable story with 1 to 4 equations (or exactly ``num_equations``)."""
    wanted = num_equations or rng.choice((1, 2, 2, 3, 3, 4))
    while True:
        kinds = (
            rng.choice(OPENINGS),
            *(rng.choice(EVENTS) for _ in range(rng.randrange(min(wanted, 3) + 1))),
            rng.choice(QUESTIONS),
        )
        steps = tuple(_draw_step(kind, rng) for kind in kinds)
        name, friend, stranger = rng.sample(NAMES, 3)
        items, others = rng.sample(ITEMS, 2)
        distractor = None
        if rng.random() < DISTRACTOR_FRACTION:
            distractor = _draw_step(rng.choice(DISTRACTORS), rng)
        story = Story(
            name, friend, stranger, items, others, steps, distractor,
            distractor_position=rng.randrange(1, len(steps)),
        )  # fmt: skip
        solution = story.solve()
        if solution and len(solution[0]) == wanted:
            return story


def _draw_step(kind: str, rng: random.Random) -> Step:
    largest_n, largest_k = _DRAWN[kind]
    return Step(
        kind,
        n=rng.randint(2, largest_n) if largest_n else 0,
        k=rng.randint(2, largest_k) if largest_k else 0,
        wording=rng.randrange(len(WORDINGS[kind])),
    )


def stories(split: str, seed: int) -> Iterator[Story]:
    """An endless stream of distinct stories of one split, the same for the same seed.

    ``heldout`` alternates: every third story has an unseen structure.
    """
    if split not in SPLITS:
        raise ValueError(f"no split {split!r}: generated problems have {', '.join(SPLITS)}")
    rng = random.Random(f"{split}/{seed}")
    met: set[str] = set()
    while True:
        wants_unseen = split == "heldout" and len(met) % round(1 / UNSEEN_FRACTION_OF_HELDOUT) == 2
        story = draw_story(rng)
        question = story.question()
        if (
            question in met
            or split_of(question) != split
            or is_unseen(story.structure) != wants_unseen
        ):
            continue
        met.add(question)
        yield story


def record(story: Story) -> dict[str, object]:
    """The story as a GSM8K record, with its structure beside it.

    >>> import random
    >>> story = draw_story(random.Random(1), num_equations=1)
    >>> sorted(record(story))
    ['answer', 'question', 'structure', 'unseen_structure']
    """
    solution = story.solve()
    assert solution is not None  # draw_story returns only stories that work out
    lines, result = solution
    return {
        "question": story.question(),
        "answer": "\n".join([*map(annotate, lines), f"#### {result}"]),
        "structure": story.structure,
        "unseen_structure": is_unseen(story.structure),
    }


def annotate(line: str) -> str:
    """Put GSM8K's calculator annotation before the result of the line's one equation.

    >>> annotate("Now there are 12+5=17 pens.")
    'Now there are 12+5=<<12+5=17>>17 pens.'
    """
    equation = next(word for word in line.split() if "=" in word)
    left, _, right = equation.partition("=")
    return line.replace(equation, f"{left}=<<{equation}>>{right}")


def generate(count: int, *, seed: int, split: str = "train") -> list[dict[str, object]]:
    """``count`` different records of ``split``; more with the same seed begin with the fewer.

    Raises ValueError for an unknown split.
    """
    stream = stories(split, seed)
    return [record(next(stream)) for _ in range(count)]
