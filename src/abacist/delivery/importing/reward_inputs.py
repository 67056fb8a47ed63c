"""What a reward of a script is handed there, where Abacist hands out something else.

Here every reward gets messages, the gold alone as ``answer``, and the columns of the data set.
A script may hand it texts, the gold under another name, or GSM8K's whole answer with its ``####``.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from abacist.delivery.importing.extraction import CannotTake
from abacist.delivery.importing.script import Script
from abacist.delivery.importing.script_rewards import Looks, columns_of
from abacist.delivery.importing.values import Unknown, column_of, is_column
from abacist.task.extras import OWN_COLUMNS

MARKED = "\n#### "  # as GSM8K's answers end
_ADAPTER = '''def as_in_script(reward, texts, columns):
    """The reward, handed what the script hands it: texts, and columns under other names."""

    def handed(completions, prompts=(), **given):
        more = {
            name: [f"{mark}{one}" if mark else one for one in given[column]]
            for name, (column, mark) in columns.items()
        }
        if texts:
            prompts = [one if isinstance(one, str) else one[-1]["content"] for one in prompts]
            completions = [
                one if isinstance(one, str) else one[0]["content"] for one in completions
            ]
        return reward(prompts=prompts, completions=completions, **given | more)

    handed.__name__ = handed.__qualname__ = reward.__name__
    return handed
'''


@dataclass(frozen=True)
class Inputs:
    """What differs: whether it wants texts, and columns by the column and the mark before it."""

    texts: bool = False
    columns: dict[str, tuple[str, str]] = field(default_factory=dict)

    def __bool__(self) -> bool:
        return self.texts or bool(self.columns)

    @property
    def adapter(self) -> str:
        """The function that hands a reward what it asks for; "" where nothing differs."""
        return _ADAPTER if self else ""

    @property
    def arguments(self) -> str:
        """What the adapter is called with, beside the reward."""
        return f"texts={self.texts}, columns={self.columns}"

    def __str__(self) -> str:
        """What it is handed, for a note."""
        said = ["texts"] if self.texts else []
        for name, (column, mark) in self.columns.items():
            if mark:
                said.append(f"#### and the gold as {name} (without the worked solution)")
            else:
                said.append(f"{'the gold' if column == 'answer' else column} as {name}")
        return " and ".join(said)


def inputs_of(looks: Looks, script: Script, gold: str) -> Inputs:
    """What a reward is handed in the script; ``gold`` is the column that the gold is read from.

    Raises CannotTake for a column that the script makes in a way of its own.
    """
    is_text = script.data.is_text
    columns: dict[str, tuple[str, str]] = {}
    for name, has_default in columns_of(looks.function).items():
        if (found := _column(name, looks, script, gold, has_default)) is not None:
            columns[name] = found
    # Of a prompt that is not told, the reward tells whether replies are messages.
    return Inputs(is_text is not False and not looks.reads_messages, columns)


def _column(
    name: str, looks: Looks, script: Script, gold: str, has_default: bool
) -> tuple[str, str] | None:
    """Which column to hand out under a name, and what to put before it; None for its own."""
    row, mark = script.data.row, MARKED if looks.marks else ""
    if row is None or name not in row:
        return ("answer", mark) if name == "answer" == gold and mark else None
    value = row[name]
    source = column_of(value)
    if is_column(value) and source is not None and source not in OWN_COLUMNS:
        return None if source == name else (source, "")
    if source == gold:
        mark = mark if is_column(value) else ""
        return None if name == "answer" and not mark else ("answer", mark)
    if has_default:
        return None
    why = value.why if isinstance(value, Unknown) else "is made by the script"
    raise CannotTake(f"its column {name} {why}", row.lines.get(name, looks.function.node.lineno))
