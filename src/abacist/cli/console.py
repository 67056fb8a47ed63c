"""Runs a verb: its errors become messages and exit codes, and its results are printed.

Every verb runs inside :func:`run`, which turns whatever goes wrong into words and an exit
code, so that no verb has a ``try`` of its own for it:

====================================  ====  ==================================================
done                                     0
:class:`~abacist.errors.AbacistError`  1, 2  message and hint, no traceback; 130 and 143 where a
                                            run was stopped by a signal and has saved its state
anything unforeseen                      1  "a bug in Abacist", traceback in a file it names
interrupted (Ctrl-C)                   130
the reader of our output went away     141  silently, as any Unix tool
terminated (SIGTERM)                   143  after every ``finally`` has run
====================================  ====  ==================================================

Messages may quote foreign text (a file's content, another library's error): control characters
are shown, not obeyed, and tokens are removed.
"""

from __future__ import annotations

import dataclasses
import errno
import json
import math
import os
import re
import shlex
import shutil
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, redirect_stdout, suppress
from enum import Enum
from pathlib import Path
from typing import Any, NoReturn, TextIO

from abacist.errors import AbacistError, ProcessLost, first_line
from abacist.records.secrets import without_secrets

# How long a process waits for its launcher, which ends all where the first one failed as well.
ALONE_SECONDS = 10.0
INTERRUPTED = 128 + signal.SIGINT
BROKEN_PIPE = 141  # 128 + SIGPIPE, which Windows' signal module does not name
TERMINATED = 128 + signal.SIGTERM
# A command in a hint is one to be pasted: it is named as the user's shell finds it.
_COMMAND = re.compile(r"(?<![\w./-])abacist(?= [a-z])")


def run(verb: Callable[[], int]) -> int:
    """Run a verb and return the process's exit code; say on stderr what went wrong."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # an ASCII terminal must not crash on a "×"
            stream.reconfigure(errors="backslashreplace")
    # Only the main thread may set handlers; elsewhere the caller keeps its own.
    in_main_thread = threading.current_thread() is threading.main_thread()
    previous = signal.signal(signal.SIGTERM, _terminated) if in_main_thread else None
    try:
        code = verb()
        sys.stdout.flush()
        return code
    except AbacistError as error:
        if (said := _said_here(error)) is not None:
            say_error(said, error.hint)
        return error.exit_code
    except SystemExit as stop:  # argparse after --help, SIGTERM, or a library that gives up
        if isinstance(stop.code, str):
            say_error(stop.code)
            return 1
        return stop.code or 0
    except KeyboardInterrupt:
        say_error("interrupted")
        return INTERRUPTED
    except BrokenPipeError:
        # Python flushes stdout once more at exit; give it somewhere to go.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return BROKEN_PIPE
    except Exception as error:
        known = _explain(error)
        if known is None:
            _say_bug(error)
        else:
            say_error(*known)
        return 1
    finally:
        if previous is not None:
            signal.signal(signal.SIGTERM, previous)


def open_closed_streams() -> None:
    """Give stdin, stdout and stderr somewhere to go where the caller has closed them (``>&-``).

    Else the next file that is opened takes the free descriptor, and gets what is printed.
    """
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):  # in descriptors' order
        if getattr(sys, name) is None:
            stream = open(os.devnull, mode, encoding="utf-8")  # noqa: SIM115
            os.set_inheritable(stream.fileno(), True)  # a program that we start needs it as well
            setattr(sys, name, stream)


def _said_here(error: AbacistError) -> str | None:
    """The message, if it is for this one of several processes to say.

    The first of each machine speaks, and all where one was lost. What befell another before it
    could tell them, it says itself, unless the first one failed as well.
    """
    if os.environ.get("LOCAL_RANK", "0") == "0" or isinstance(error, ProcessLost):
        return error.message
    if error.is_told:
        return None
    with suppress(KeyboardInterrupt):
        time.sleep(ALONE_SECONDS)
    return f"rank {os.environ.get('RANK', '?')}: {error.message}"


def _terminated(signal_number: int, frame: object) -> NoReturn:
    raise SystemExit(TERMINATED)


def say_error(message: str, hint: str = "") -> None:
    """Write ``error: message`` and the indented hint to stderr."""
    from abacist.view.plaintext import visible  # loads rich: only once there is an error

    label = "\x1b[1;31merror:\x1b[0m" if has_colours(sys.stderr) else "error:"
    hint = as_typed(hint)
    lines = [message, *(f"  {line}" for line in hint.split("\n") if hint)]
    print(label, without_secrets(visible("\n".join(lines))), file=sys.stderr)


def as_typed(text: str) -> str:
    """``text`` with the name of this program in commands as the user types it."""
    return _COMMAND.sub(lambda _: program(), text)


def program() -> str:
    """How to type this program's name where the user stands: the way it was started."""
    if launched_as := os.environ.get("ABACIST_PROGRAM"):  # by `abacist train --accelerate_config`
        return launched_as
    started = Path(sys.argv[0])
    if started.parts[-2:] == ("abacist", "__main__.py"):
        return "python -m abacist"
    found = shutil.which("abacist")
    if started.name != "abacist" or (found and Path(found).resolve() == started.resolve()):
        return "abacist"
    return shlex.quote(str(started))


def has_colours(stream: TextIO) -> bool:
    """Whether to colour: only a terminal, and not where ``NO_COLOR`` is set (no-color.org)."""
    return stream.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def columns(stream: TextIO, most: int = 100) -> int:
    """How wide a page may be: a terminal's width, at most ``most``, which a pipe gets."""
    if not stream.isatty():
        return most
    return max(20, min(shutil.get_terminal_size((most, 24)).columns, most))


def say_starting() -> None:
    """Tell a person at a terminal why nothing happens yet: PyTorch takes seconds to load."""
    if sys.stderr.isatty():
        print("Starting: PyTorch and TRL are loading ...", file=sys.stderr, flush=True)


@contextmanager
def stdout_for(result_only: bool) -> Iterator[TextIO]:
    """The stream for a verb's result. With ``result_only`` (``--json``) all else goes to stderr.

    Libraries print as they please, and a reward may start a program that does; a machine that
    reads our stdout must see one object.
    """
    stdout = sys.stdout
    if not result_only:
        yield stdout
        return
    if sys.__stdout__ is None or stdout is not sys.__stdout__:
        # A notebook's, or a test's: no descriptor is behind it.
        with redirect_stdout(sys.stderr):
            yield stdout
        return
    stdout.flush()
    kept = os.dup(1)
    os.dup2(2, 1)
    try:
        with (
            redirect_stdout(sys.stderr),
            open(
                kept, "w", encoding=stdout.encoding, errors="backslashreplace", closefd=False
            ) as result,
        ):
            yield result
    finally:
        _flush_c_library()
        os.dup2(kept, 1)
        os.close(kept)


def _flush_c_library() -> None:
    """Write what libraries in C have printed, which libc keeps until the process ends."""
    import ctypes

    with suppress(OSError, TypeError, AttributeError):  # Windows finds no library of this process
        ctypes.CDLL(None).fflush(None)


def print_json(value: object, stream: TextIO) -> None:
    """Write ``value`` as one JSON object: dataclasses as objects, nan and infinities as null."""
    print(json.dumps(_plain(value), ensure_ascii=True, indent=2, allow_nan=False), file=stream)


def _plain(value: object) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: _plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Enum):
        return _plain(value.value)
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [_plain(item) for item in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, (bool, int, str)):
        return value
    return str(value)  # paths, fractions, versions


def _explain(error: Exception) -> tuple[str, str] | None:
    """Message and hint for what is nobody's bug: a full disk, too little memory; else None."""
    name, text = type(error).__name__, str(error)
    if isinstance(error, MemoryError) or name == "OutOfMemoryError" or "can't allocate" in text:
        return (
            f"out of memory: {text.splitlines()[0] if text else name}",
            "Lower --per_device_train_batch_size (raise --gradient_accumulation_steps to make up "
            "for it),\n--num_generations or --max_completion_length, or take a smaller model.",
        )
    if any(kind.__name__ == "DistError" for kind in type(error).__mro__):
        return (
            f"the processes did not come together: {first_line(error)}",
            "Each says on its own machine why it ended. Otherwise look at the address and the port "
            "that all are given;\n--ddp_timeout says how many seconds they wait for each other.",
        )
    if isinstance(error, OSError) and error.errno is not None:
        where = f": {error.filename}" if error.filename else ""
        hint = {
            errno.ENOSPC: "Free some space, or point --output_dir at another disk.",
            errno.EDQUOT: "Your quota is used up: free some space or take another --output_dir.",
            errno.EACCES: "Check who owns it, or choose another path.",
            errno.EROFS: "Choose a path that can be written to, with --output_dir.",
            errno.ENOENT: "Check the path for a typing error.",
        }.get(error.errno, "")
        return f"{error.strerror or name}{where}", hint
    return None


def _say_bug(error: Exception) -> None:
    trace = without_secrets("".join(traceback.format_exception(error)))
    summary = f"{type(error).__name__}: {str(error).strip()[:300]}"
    if os.environ.get("ABACIST_DEBUG"):
        print(trace, file=sys.stderr, end="")
        say_error(f"this is a bug in Abacist: {summary}")
        return
    try:
        with tempfile.NamedTemporaryFile(
            "w", prefix="abacist-traceback-", suffix=".txt", delete=False, encoding="utf-8",
            errors="backslashreplace",
        ) as file:  # fmt: skip
            file.write(trace)
        hint = f"The traceback is in {file.name}; please report it with the command you ran."
    except OSError:
        hint = "Run it again with ABACIST_DEBUG=1 to see the traceback, and please report it."
    say_error(f"this is a bug in Abacist: {summary}", hint)
