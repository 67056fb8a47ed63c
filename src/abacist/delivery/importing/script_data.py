"""The rows that a script trains on: where they come from, and the prompt that it makes of them.

A row is followed through the script's own functions as a table whose columns are the data set's,
until the script sets them. A function that maps a batch is given one of a single row.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from abacist.delivery.importing.reader import Reader
from abacist.delivery.importing.values import (
    ROW,
    Function,
    Made,
    Symbol,
    Table,
    Unknown,
    column_of,
    options_of,
    unwrapped,
)

_LOADS = (
    "load_dataset", "from_list", "from_dict", "from_pandas", "load_from_disk", "from_json",
    "from_csv", "from_generator",
)  # fmt: skip
# What leaves a text with the same words.
_SAME_WORDS = ("[]", "get", "text", "strip", "lstrip", "rstrip", "replace", "str")


@dataclass
class Message:
    """One turn of the prompt: its role, its content as read, and the line."""

    role: str
    content: Any
    line: int


@dataclass
class Data:
    """Where the training rows come from, and what is done to them.

    ``row`` holds the columns that the script sets. ``unread`` are the lines of what makes a prompt
    that the text does not tell, each with its reason.
    """

    load: Made | None = None
    split: Any = None
    split_line: int = 0
    steps: list[Made] = field(default_factory=list)
    row: Table | None = None
    messages: list[Message] = field(default_factory=list)
    plain_prompt: Any = None
    #: whether replies are texts (True) or messages (False); None where the script does not tell
    is_text: bool | None = None
    unread: list[tuple[int, str]] = field(default_factory=list)
    limit: int | None = None
    limit_line: int = 0


def read_data(
    given: Any, reader: Reader, calls: list[Made], guesses: list[tuple[int, str]]
) -> Data:
    """The data of a trainer that is given ``given``."""
    data = Data()
    made = [one for one in options_of(given) if isinstance(one, Made)]
    loaded = [one for one in made if any(step.name in _LOADS for step in one.chain())]
    start = next(iter(loaded or made), None)
    if start is None or start is not given:
        loads = [one for one in calls if one.name == "load_dataset"]
        start = start or (loads[-1] if loads else None)
        if given is not None and start is not None:
            guesses.append((start.line, "which rows the trainer is given cannot be told from the "
                            "text: those that are loaded here are taken"))  # fmt: skip
    if start is None:
        return data
    chain = list(start.chain())
    for step in chain:
        if step.name in _LOADS:
            data.load = step
            if "split" in step.kwargs or len(step.args) > 4:
                data.split = step.kwargs.get("split")
                data.split_line = step.lines.get("split", step.line)
        elif step.name == "[]" and step.args and isinstance(step.args[0], str):
            data.split, data.split_line = step.args[0], step.line
        elif step.name == "select":
            data.limit, data.limit_line = _length(step), step.line
        elif step.name == "take" and step.args and isinstance(step.args[0], int):
            data.limit, data.limit_line = step.args[0], step.line
    data.steps = [step for step in reversed(chain) if step is not data.load]
    row = _Row(reader, data)
    for step in data.steps:
        row.take(step)
    return data


def _length(select: Made) -> int | None:
    """How many rows ``select(range(n))`` keeps."""
    rows = select.args[0] if select.args else select.kwargs.get("indices")
    if isinstance(rows, Made) and rows.name == "range":
        numbers = [one for one in rows.args if isinstance(one, int)]
        if len(numbers) == len(rows.args) and 0 < len(numbers) < 4 and numbers[2:] != [0]:
            return len(range(*numbers))
    return len(rows) if isinstance(rows, list) else None


class _Row:
    """A row on its way through the steps."""

    def __init__(self, reader: Reader, data: Data) -> None:
        self.reader = reader
        self.data = data
        self.columns = Table()
        self.columns.column = lambda key: Made("[]", "[]", [key], {}, ROW.node, ROW)

    def take(self, step: Made) -> None:
        """Do to the row what a step does."""
        renames = {}
        if step.name == "rename_column":
            names = [*step.args, step.kwargs.get("original_column_name"),
                     step.kwargs.get("new_column_name")]  # fmt: skip
            old, new = [one for one in names if one is not None][:2]
            renames = {old: new}
        elif step.name == "rename_columns" and step.args and isinstance(step.args[0], Table):
            renames = dict(step.args[0])
        for old, new in renames.items():
            self.columns.take({new: self.columns.pop(old, self.columns[old])}, step.line)
            self.data.row = self.columns
        if step.name == "map":
            self._map(step)

    def _map(self, step: Made) -> None:
        given = step.args[0] if step.args else step.kwargs.get("function")
        function, args, kwargs = unwrapped(given, [], {})
        function = self.reader.resolved(function)
        if not isinstance(function, Function):
            name = function.dotted if isinstance(function, Symbol) else "its function"
            self._unread(step.line, f"what {name} makes of a row cannot be told from the text")
            return
        is_batch = step.kwargs.get("batched") is True
        row = self._batch(self.columns) if is_batch else self.columns
        named = step.kwargs.get("input_columns")
        names = [named] if isinstance(named, str) else named if isinstance(named, list) else []
        rows = [row[name] for name in names if isinstance(name, str)] or [row]
        more = step.kwargs.get("fn_kwargs")
        kwargs = kwargs | (dict(more) if isinstance(more, Table) else {})
        indices = [Unknown(step.line)] if step.kwargs.get("with_indices") else []
        made = self.reader.follow(function, *args, *rows, *indices, **kwargs)
        for one in options_of(made):
            if isinstance(one, Table):
                self._set(one, row, is_batch, step.line)
                return
        self._unread(function.node.lineno, f"what {function.name} makes of a row "
                     + (made.why if isinstance(made, Unknown) else "cannot be told from the text")
                     )  # fmt: skip

    def _batch(self, row: Table) -> Table:
        batch = Table()
        batch.column = lambda key: [row[key]]
        return batch

    def _set(self, made: Table, row: Table, is_batch: bool, line: int) -> None:
        for name, value in dict(made).items():
            one = value
            if is_batch:
                whole = isinstance(value, list) and len(value) == 1
                one = value[0] if whole else Unknown(made.lines.get(name, line))
            self.columns.take({name: one}, made.lines.get(name, line))
        self.data.row = self.columns
        if "prompt" in made:
            self._read_prompt(self.columns["prompt"], made.lines.get("prompt", line))

    def _read_prompt(self, prompt: Any, line: int) -> None:
        data = self.data
        data.messages, data.plain_prompt, data.is_text, data.unread = [], None, None, []
        is_text = False
        if isinstance(prompt, Made) and prompt.name == "apply_chat_template":
            is_text = True
            prompt = prompt.args[0] if prompt.args else prompt.kwargs.get("conversation")
        if isinstance(prompt, list):
            data.messages = [
                Message(str(turn["role"]), turn["content"], turn.lines.get("content", line))
                for turn in prompt
                if isinstance(turn, Table) and {"role", "content"} <= turn.keys()
            ]
            data.is_text = is_text
            if len(data.messages) < len(prompt):
                self._unread(line, "a turn of the prompt is computed when the script runs")
        elif isinstance(prompt, str) or _is_worded(prompt):
            data.plain_prompt, data.is_text = prompt, True
        else:
            why = prompt.why if isinstance(prompt, Unknown) else "is computed when the script runs"
            self._unread(line, f"the prompt {why}")

    def _unread(self, line: int, why: str) -> None:
        self.data.unread.append((line, why))


def _is_worded(prompt: Any) -> bool:
    """Whether a prompt is a text of which the words are known, but for the row's own."""
    return (
        isinstance(prompt, Made)
        and column_of(prompt) is not None
        and all(one is ROW or one.name in _SAME_WORDS for one in prompt.chain())
    )
