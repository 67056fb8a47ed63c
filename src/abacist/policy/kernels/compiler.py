"""Find the C++ compiler of this machine, and run it: bounded in time, and heard to the end."""

from __future__ import annotations

import contextlib
import functools
import itertools
import logging
import os
import shlex
import shutil
import signal
import subprocess
from collections.abc import Iterator

COMPILERS = ("c++", "g++", "clang++")
# Not -ffast-math: it takes NaN and infinities to be impossible, and both must stay what they are.
FLAGS = ("-O3", "-std=c++17", "-shared", "-fPIC", "-fno-math-errno", "-ffp-contract=fast")
TUNING = (("-march=native",), ("-mcpu=native",), ())  # the first that the compiler takes
VERSION_SECONDS = 10.0
SILENT_SECONDS = 2.0

logger = logging.getLogger(__name__)


class Obstacle(Exception):
    """Why there are no kernels, as the end of a sentence."""


class CompilerError(Exception):
    """Why a compiler compiles none; another one may."""


def compilers() -> Iterator[list[str]]:
    """The command lines that may compile: CXX alone where it is set."""
    try:
        command = shlex.split(os.environ.get("CXX", ""))
    except ValueError as error:
        raise Obstacle(f"CXX is no command line ({error})") from None
    if command:
        if shutil.which(command[0]) is None:
            raise Obstacle(f"CXX names {command[0]}, which is no program here")
        yield command
        return
    seen = set()
    for name in COMPILERS:
        path = shutil.which(name)
        if path is not None and (real := os.path.realpath(path)) not in seen:
            seen.add(real)
            yield [path]


def version(compiler: list[str]) -> str:
    """What the compiler calls itself. Raises :class:`CompilerError`."""
    code, output = run([*compiler, "--version"], VERSION_SECONDS)
    lines = output.strip().splitlines()
    if code or not lines:
        raise CompilerError(gist(output) or f"--version: exit code {code}")
    return lines[0]


def flags(openmp_runtime: str | None) -> Iterator[tuple[list[str], list[str]]]:
    """What to ask of a compiler before and after the sources, the most first.

    Code for this very processor with the threads of ``openmp_runtime`` comes first.
    """
    openmp = [["-fopenmp"], []]
    if openmp_runtime is not None:
        # Named before the compiler's own, which is then not needed; or instead of it, for Clang:
        # it may have none, as Apple's.
        rpath = f"-Wl,-rpath,{os.path.dirname(openmp_runtime)}"
        openmp = [
            ["-fopenmp", "-Wl,--as-needed", openmp_runtime],
            ["-Xclang", "-fopenmp", openmp_runtime, rpath],
            *openmp,
        ]
    for tuning, threads in itertools.product(TUNING, openmp):
        yield [*FLAGS, *tuning], threads


def run(command: list[str], seconds: float, folder: str | None = None) -> tuple[int, str]:
    """Exit code and output of a compiler, in plain English; its temporary files go to ``folder``.

    Raises :class:`CompilerError` if it cannot be run, and subprocess.TimeoutExpired, before which
    the compiler and what it started are ended.
    """
    environment = {**os.environ, "LC_ALL": "C"} | ({"TMPDIR": folder} if folder else {})
    try:
        process = subprocess.Popen(
            command,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    except OSError as error:
        raise CompilerError(f"it cannot be run: {error.strerror}") from None
    with process:
        try:
            try:
                output, _ = process.communicate(timeout=min(seconds, SILENT_SECONDS))
            except subprocess.TimeoutExpired:
                say_that_it_takes_long()
                output, _ = process.communicate(timeout=seconds - SILENT_SECONDS)
        except BaseException:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, signal.SIGKILL)
            raise
    return process.returncode, output.decode("utf-8", "replace")


@functools.cache  # once a process
def say_that_it_takes_long() -> None:
    logger.warning("Abacist: compiling its CPU kernels, once, for a few seconds.")


def gist(output: str) -> str:
    """The line that tells most of what a compiler or a loader said, and not more than that.

    >>> gist("In file included from a.cpp:\\nvector.h:3:1: error: unknown type\\n  3 | Vek x;\\n")
    'vector.h:3:1: error: unknown type'
    """
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    telling = [line for line in lines if "error" in line.lower()] or lines[-1:]
    return "".join(c for c in "".join(telling[:1]) if c.isprintable())[:200]
