"""Compile the kernels of this folder once for this machine, and load them.

They need a C++ compiler; without one everything runs on PyTorch alone, the same but slower. So it
does with ``ABACIST_KERNELS=0`` in the environment, which is how to compare the two. Nothing that
goes wrong here raises: :func:`obstacle` says what it was.

What was compiled stays in ``$XDG_CACHE_HOME/abacist`` or ``~/.cache/abacist``. Its name holds two
digests: of all that it was made from and for (a home may be shared by several machines), and of its
own bytes (a library that was cut short can kill the process that loads it). Nothing is loaded that
another user could have written.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import itertools
import logging
import os
import platform
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

SOURCES = Path(__file__).parent
COMPILERS = ("c++", "g++", "clang++")
# Not -ffast-math: it takes NaN and infinities to be impossible, and both must stay what they are.
FLAGS = ("-O3", "-std=c++17", "-shared", "-fPIC", "-fno-math-errno", "-ffp-contract=fast")
TUNING = (("-march=native",), ("-mcpu=native",), ())  # the first that the compiler takes
VERSION_SECONDS = 10.0
SILENT_SECONDS = 2.0
COMPILE_SECONDS = 120.0
_WORTH_A_THREAD = 1e8
KEPT_UNUSED_SECONDS = 30 * 24 * 3600

logger = logging.getLogger(__name__)


class Obstacle(Exception):
    """Why there are no kernels, as the end of a sentence."""


class CompilerError(Exception):
    """Why a compiler compiles none; another one may."""


@dataclass(frozen=True, slots=True)
class _Kernels:
    library: ctypes.CDLL
    compiler: str


def library() -> ctypes.CDLL | None:
    """The compiled kernels, compiled now if they never were; None where they cannot be had."""
    return found.library if isinstance(found := _kernels(), _Kernels) else None


def obstacle() -> str | None:
    """Why there are no kernels, as the end of a sentence; None: there are."""
    return found if isinstance(found := _kernels(), str) else None


def description() -> str | None:
    """Which compiler made the kernels, and for what; None: there are none."""
    if not isinstance(found := _kernels(), _Kernels):
        return None
    threads = "OpenMP" if found.library.kernels_threads() else "one thread for want of OpenMP"
    return f"{found.compiler}: {found.library.kernels_lanes()} numbers at a time, {threads}"


def takes(*tensors: torch.Tensor) -> bool:
    """Whether the kernels are made for ``tensors``, and there are any."""
    return (
        all(x.device.type == "cpu" and x.dtype == torch.float32 for x in tensors)
        and library() is not None
    )


def threads(work: float) -> int:
    """Into how many threads ``work``, in floating-point operations, is worth being cut.

    Whoever waits for a second thread waits longer where its core is busy with something else, so
    each should have a good part of a millisecond to do.
    """
    return max(1, min(torch.get_num_threads(), int(work / _WORTH_A_THREAD)))


@functools.cache
def _kernels() -> _Kernels | str:
    """The kernels, or why there are none."""
    try:
        return _compiled()
    except Obstacle as found:
        return str(found)
    except subprocess.TimeoutExpired as error:
        return f"{error.cmd[0]} does not come to an end"
    except OSError as error:
        return f"{error.filename or 'a file'}: {error.strerror or error}"


def _compiled() -> _Kernels:
    if os.environ.get("ABACIST_KERNELS") == "0":
        raise Obstacle("ABACIST_KERNELS=0 turns them off")
    if sys.platform == "win32":
        raise Obstacle("they are not made for Windows")
    folder, runtime = _folder(), _openmp_runtime()
    failures = []
    for compiler in compilers():
        try:
            named = version(compiler)
            digest = _digest(compiler, named, runtime or "")
            found = _kept(folder, digest) or _built(folder, digest, compiler, runtime)
        except CompilerError as failure:
            failures.append(f"{shlex.join(compiler)} does not compile them ({failure})")
        else:
            return _Kernels(found, f"{named} ({shlex.join(compiler)})")
    raise Obstacle(failures[0] if failures else "there is no C++ compiler: install g++ or clang")


def _digest(compiler: list[str], named: str, runtime: str) -> str:
    """The digest of everything that the compiled library depends on."""
    sources = [(p.name, p.read_bytes()) for p in sorted(SOURCES.glob("*.[ch]*"))]
    made_for = [platform.system(), _processor(), torch.__version__, runtime]
    return _sum(repr([sources, FLAGS, TUNING, compiler, named, made_for]).encode())


def _sum(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:24]


def _processor() -> str:
    """Which processor this is, and what it can do."""
    words = [platform.machine(), platform.processor()]
    with contextlib.suppress(OSError):
        cores = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
        told = r"^(?:model name|flags|CPU part|Features|isa)\s*:.*$"
        words += sorted(set(re.findall(told, cores, re.MULTILINE)))
    return "\n".join(words)


def _openmp_runtime() -> str | None:
    """The OpenMP library that torch has loaded: Linux tells, on a Mac it lies beside torch.

    Kernels that bring another one have two pools of threads wait beside each other, busily.
    """
    installed = Path(torch.__file__).resolve().parent
    try:
        maps = Path("/proc/self/maps").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return next(map(str, installed.glob("lib/lib*omp*.dylib")), None)
    paths = set(re.findall(r" (/\S.*/lib(?:gomp|iomp5|omp)[-.][^/ ]*)$", maps, re.MULTILINE))
    torchs = str(installed.parent)
    return min(paths, key=lambda path: (not path.startswith(torchs), path), default=None)


def _folder() -> Path:
    """Where compiled kernels are kept: a folder that only this user can write to."""
    named = os.environ.get("XDG_CACHE_HOME", "")
    try:
        caches = Path(named) if os.path.isabs(named) else Path.home() / ".cache"
    except RuntimeError:
        raise Obstacle("this user has no home to keep them in: set XDG_CACHE_HOME") from None
    folder = caches / "abacist"
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        why = f"{folder} cannot be made ({error.strerror}): set XDG_CACHE_HOME to a folder of yours"
        raise Obstacle(why) from None
    _check_ours(folder)
    if not os.access(folder, os.W_OK | os.X_OK):
        raise Obstacle(f"{folder} cannot be written to: chmod u+rwx {folder}")
    return folder


def _check_ours(path: Path) -> None:
    """Raises where another user could have written to ``path``."""
    status = path.stat()
    if status.st_uid != os.geteuid():
        raise Obstacle(f"{path} belongs to another user: set XDG_CACHE_HOME to a folder of yours")
    if status.st_mode & 0o022:
        raise Obstacle(f"others may write to {path}: chmod go-w {path}")


def _kept(folder: Path, digest: str) -> ctypes.CDLL | None:
    """What was compiled before, if it is whole; what is not goes away."""
    for path in folder.glob(f"kernels-{digest}-*.so"):
        with contextlib.suppress(FileNotFoundError):  # another process has found it first
            _check_ours(path)
            if path.stem.endswith(_sum(path.read_bytes())):
                with contextlib.suppress(CompilerError):
                    loaded = _loaded(path, digest)
                    os.utime(path)  # it is in use: see _forget_the_unused
                    return loaded
            path.unlink()
    return None


def _loaded(path: Path, digest: str) -> ctypes.CDLL:
    """The library, once it has said that it is the one."""
    try:
        kernels = ctypes.CDLL(str(path))
        kernels.kernels_digest.restype = ctypes.c_char_p
        said = kernels.kernels_digest()
    except (OSError, AttributeError) as error:
        raise CompilerError(f"what it made cannot be loaded: {gist(str(error))}") from None
    if said != digest.encode():
        raise CompilerError("what it made is something else")
    if kernels.kernels_threads() < 0:
        raise CompilerError("its OpenMP and that of PyTorch get into each other's way")
    return kernels


def _built(folder: Path, digest: str, compiler: list[str], runtime: str | None) -> ctypes.CDLL:
    """Compile beside the place and move it there: another process sees all of it or nothing."""
    _forget_the_unused(folder)
    deadline = time.monotonic() + COMPILE_SECONDS
    with tempfile.TemporaryDirectory(
        prefix="building-", dir=folder, ignore_cleanup_errors=True
    ) as aside:

        def made(sources: list[Path], before: list[str], after: list[str]) -> Path:
            library = Path(tempfile.mkdtemp(dir=aside)) / "kernels.so"
            defined = f'-DKERNELS_DIGEST="{digest}"'
            command = [*compiler, *before, defined, "-o", str(library), *map(str, sources), *after]
            code, output = run(command, deadline - time.monotonic(), aside)
            if code or not library.is_file():
                raise CompilerError(gist(output) or f"exit code {code}, and no library")
            library.chmod(0o700)
            return library

        # The smallest of the sources shows which flags this compiler takes.
        for before, after in flags(runtime):
            try:
                _loaded(made([SOURCES / "identity.cpp"], before, after), digest)
            except CompilerError as failure:
                refused = failure
            else:
                break
        else:  # the last time nothing special was asked for
            raise refused
        library = made(sorted(SOURCES.glob("*.cpp")), before, after)
        place = folder / f"kernels-{digest}-{_sum(library.read_bytes())}.so"
        library.replace(place)
    try:
        return _loaded(place, digest)
    except CompilerError:
        place.unlink(missing_ok=True)
        raise


def _forget_the_unused(folder: Path) -> None:
    """Remove what no process has loaded for a month, and what a killed one left half made."""
    for path in [*folder.glob("kernels-*.so"), *folder.glob("building-*")]:
        with contextlib.suppress(OSError):
            if time.time() - path.stat().st_mtime > KEPT_UNUSED_SECONDS:
                shutil.rmtree(path) if path.is_dir() else path.unlink()


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
