"""What the verbs share about flags: one spelling, help as text, argparse with our errors.

The texts of ``abacist train`` are in :mod:`abacist.learning.helptext`.
"""

from __future__ import annotations

import argparse
import difflib
import re
import textwrap
from collections.abc import Iterable, Sequence
from typing import Any, NoReturn

from abacist.errors import UsageError
from abacist.learning.helptext import Group

_FLAG = re.compile(r"--?[A-Za-z][\w-]*(=.*)?", re.DOTALL)


def render(groups: Sequence[Group], width: int = 96) -> str:
    """The table as text, two columns, at most ``width`` characters wide.

    >>> from abacist.learning.helptext import Flag
    >>> print(render([Group("sums", (Flag("--add", "N", "a number"),))]))
    sums:
      --add N  a number
    """
    rows = [f"{flag.name} {flag.value}".rstrip() for group in groups for flag in group.flags]
    column = 2 + max(map(len, rows)) + 2
    blocks = []
    for group in groups:
        lines = [f"{group.title}:"]
        for flag in group.flags:
            left = f"  {flag.name} {flag.value}".rstrip().ljust(column)
            lines += textwrap.wrap(
                flag.help, width, initial_indent=left, subsequent_indent=" " * column
            )
        blocks.append("\n".join(lines))
    return "\n\n".join(blocks)


def normalise(argv: Sequence[str]) -> list[str]:
    """Flags in one spelling: ``--num-shots=5`` becomes ``--num_shots 5``, as TRL would read it.

    Only what looks like a flag is touched, and nothing after a bare ``--``. A value that begins
    with a dash stays with its flag, or it would be taken for one.

    >>> normalise(["tiny", "--num-shots=5", "--learning-rate=-1e-3", "--use_peft"])
    ['tiny', '--num_shots', '5', '--learning_rate=-1e-3', '--use_peft']
    """
    spelled: list[str] = []
    for index, argument in enumerate(argv):
        if argument == "--":
            return [*spelled, *argv[index:]]
        if argument.startswith("--") and _FLAG.fullmatch(argument):
            name, equals, value = argument.partition("=")
            flag = "--" + name[2:].replace("-", "_")
            if value.startswith("-"):
                spelled.append(f"{flag}={value}")
            else:
                spelled += [flag, value] if equals else [flag]
        else:
            spelled.append(argument)
    return spelled


def nearest(word: str, words: Iterable[str]) -> str | None:
    """The one of ``words`` that a person who typed ``word`` most likely meant, if any.

    >>> nearest("trian", ["train", "ask"])
    'train'
    """
    return next(iter(difflib.get_close_matches(word[:80].lower(), list(words), n=1)), None)


class Parser(argparse.ArgumentParser):
    """argparse for the verbs whose flags are all their own, with our errors for its own."""

    def __init__(self, verb: str, description: str, epilog: str) -> None:
        super().__init__(
            prog=f"abacist {verb}",
            description=textwrap.fill(description, 96),
            epilog=epilog,
            formatter_class=lambda prog: argparse.RawDescriptionHelpFormatter(
                prog, max_help_position=34, width=96
            ),
            allow_abbrev=False,
        )

    def read(self, argv: Sequence[str]) -> argparse.Namespace:
        """The options in ``argv``. Raises :class:`UsageError` for anything wrong with them."""
        # Intermixed: a question may stand behind the flags, as in `ask RUN --json "…"`.
        options, unknown = self.parse_known_intermixed_args(argv)
        if unknown:
            guess = nearest(unknown[0], self._option_string_actions)
            if guess and unknown[0].startswith("-"):
                raise UsageError(f"{self.prog} has no {unknown[0]!r}", f"Did you mean {guess}?")
            self.error(f"{self.prog} does not take {unknown[0]!r}")
        return options

    def error(self, message: str) -> NoReturn:
        raise UsageError(message, f"{self.prog} --help says what it takes.")


def add_loading_flags(parser: Parser) -> None:
    """The flags that say how a model is loaded; :func:`loading_options` reads them."""
    add = parser.add_argument_group("loading").add_argument
    add("--device", default="auto", help="auto, cpu, cuda, cuda:N or mps")
    add("--dtype", default="auto", help="auto, bfloat16, float16 or float32")
    add("--attn_implementation", default="auto", metavar="NAME", help="auto, flash_attention_2, "
        "sdpa or eager")  # fmt: skip
    add("--model_revision", "--revision", dest="revision", metavar="REV", help="branch, tag or "
        "commit on the Hub")  # fmt: skip
    add("--trust_remote_code", action="store_true", help="run code that comes with the model "
        "or run: never by default")  # fmt: skip


def add_column_flags(group: argparse._ArgumentGroup) -> None:
    """The flags that say where a data set's questions and golds are, and how they are written."""
    group.add_argument("--dataset_config", metavar="NAME", help="its configuration on the Hub")
    group.add_argument("--question_column", default="question", metavar="NAME", help="(question)")
    group.add_argument("--answer_column", default="answer", metavar="NAME", help="(answer)")
    group.add_argument("--decimal_mark", choices=("auto", "point", "comma"), default="auto",
                       help="how bare golds are written: 3.5 or 3,5")  # fmt: skip


def loading_options(options: argparse.Namespace) -> dict[str, Any]:
    """What ``load_policy`` takes, out of the flags of :func:`add_loading_flags`."""
    names = ("device", "dtype", "attn_implementation", "revision", "trust_remote_code")
    return {name: getattr(options, name) for name in names}


def positive(text: str, least: int = 1) -> int:
    """A whole number of at least ``least``, for argparse."""
    if not text.isascii() or not text.isdigit() or float(text) < least:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least {least}")
    _refuse_beyond(float(text), text)  # Python reads whole numbers of at most 4,300 digits
    return int(text)


def count(text: str) -> int:
    """A whole number of at least 0, for argparse."""
    return positive(text, least=0)


def not_negative(text: str) -> float:
    """A finite number of at least 0, for argparse."""
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of at least 0")
    _refuse_beyond(value, text)
    return value


def _refuse_beyond(value: float, text: str) -> None:
    from abacist.learning.limits import LARGEST  # a tenth of a second, for which no --help waits

    if value > LARGEST:
        raise argparse.ArgumentTypeError(f"{text[:20]} is beyond {LARGEST:g}")
