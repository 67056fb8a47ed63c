"""The words of the generated problems: who, what, and how each step of a story is told.

Data only; ``abacist.task.wordproblems`` makes the stories.
"""

from __future__ import annotations

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
