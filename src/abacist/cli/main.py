"""``abacist VERB …``: find the verb, load only its file, run it.

A verb is a module with ``run(argv: list[str]) -> int`` that imports torch and other heavy packages
inside functions, so that every ``--help`` answers at once. A new verb is a file and a line in
:data:`VERBS`.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from contextlib import suppress
from importlib import import_module
from typing import NamedTuple

from abacist.cli import console
from abacist.cli.flags import nearest, normalise
from abacist.errors import UsageError


class Verb(NamedTuple):
    """Where a verb lives, and what it does in one line."""

    module: str
    summary: str


VERBS = {
    "train": Verb("abacist.cli.train", "teach a model with GRPO, and measure what it learned"),
    "eval": Verb("abacist.cli.eval", "measure a model or a run, with intervals, by difficulty"),
    "compare": Verb("abacist.cli.compare", "is B better than A? paired, problem by problem"),
    "report": Verb("abacist.cli.report", "one page that holds a whole run: look at it"),
    "audit": Verb("abacist.cli.audit", "what can these rewards be made to pay for?"),
    "show": Verb("abacist.cli.show", "read the replies of a run, and why each was judged so"),
    "ask": Verb("abacist.cli.ask", "put a question to a model or to a finished run"),
    "serve": Verb("abacist.cli.serve", "hand a model to a server: transformers, vLLM, llama.cpp"),
    "export": Verb("abacist.cli.export", "write the trained model in another format and check it"),
    "bundle": Verb("abacist.cli.bundle", "pack what a result rests on, for others to check"),
    "verify": Verb("abacist.cli.verify", "is a bundle's result what it says it is?"),
    "import-gist": Verb("abacist.cli.import_gist", "make a configuration of a GRPO script"),
    "doctor": Verb("abacist.cli.doctor.doctor", "look at this machine, or at a run: is all well?"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of the ``abacist`` command; returns the exit code."""
    # Read when torch loads its OpenMP. By default a thread burns a core for milliseconds while it
    # waits for another, which may be waiting for that very core: beside other work a run took twice
    # as long (docs/lab.md).
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "10000")
    arguments = list(sys.argv[1:] if argv is None else argv)
    console.open_closed_streams()
    return console.run(lambda: _dispatch(arguments))


def _dispatch(arguments: list[str]) -> int:
    _refuse_other_encodings(arguments)
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(_help())
        return 0
    name, rest = arguments[0], arguments[1:]
    if name in ("-V", "--version", "version"):
        from abacist import __version__

        print(f"abacist {__version__}")
        return 0
    if name not in VERBS:
        kind = "option" if name.startswith("-") else "command"
        guess = nearest(name, [*VERBS, "--help", "--version"])
        hint = f"Did you mean `abacist {guess}`?" if guess else f"There are: {', '.join(VERBS)}."
        raise UsageError(f"unknown {kind} {name!r}", hint)
    verb = import_module(VERBS[name].module)
    return int(verb.run(normalise(rest)))


def _refuse_other_encodings(arguments: list[str]) -> None:
    """Raise UsageError for bytes that are no UTF-8, which no file of ours, or Rust's, can hold."""
    texts = list(arguments)
    with suppress(OSError):  # it may be gone
        texts.append(os.getcwd())
    for text in texts:
        try:
            text.encode()
        except UnicodeEncodeError:
            what = "given" if text in arguments else "the working directory"
            raise UsageError(
                f"{text[:200]!r} ({what}) is not UTF-8", "Rename that file or folder."
            ) from None


def _help() -> str:
    width = max(map(len, VERBS))
    verbs = "\n".join(f"  abacist {name:<{width}}  {verb.summary}" for name, verb in VERBS.items())
    return f"""\
Abacist teaches small language models GSM8K maths with GRPO, and proves what they learned.

New here? This needs no GPU, no network and no account, and takes about a minute:

  abacist train

Then put a question to what it has learned; `abacist train` ends by saying how.

{verbs}

`abacist VERB --help` says more; `abacist --version` says which."""
