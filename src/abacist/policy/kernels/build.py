"""Compile the kernels of this folder once for this machine, and load them.

The kernels need a C++ compiler. Without one everything runs on PyTorch alone, with the same results
but slower. ``ABACIST_KERNELS=0`` in the environment does the same, for comparison. No failure here
raises: :func:`unsupported_reason` says what it was.

Compiled kernels are kept in ``$XDG_CACHE_HOME/abacist`` or ``~/.cache/abacist``. The file name
holds two digests: one of everything the library was made from and for (several machines may share a
home), and one of its own bytes (loading a truncated library can kill the process). A file that
another user could have written is never loaded.
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

from abacist.policy.kernels.blocks import Blocks, Weight, memory_of

SOURCES = Path(__file__).parent
COMPILERS = ("c++", "g++", "clang++")
# Not -ffast-math: it assumes that NaN and infinity do not occur. Here both must propagate.
FLAGS = ("-O3", "-std=c++17", "-shared", "-fPIC", "-fno-math-errno", "-ffp-contract=fast")
TUNING = (("-march=native",), ("-mcpu=native",), ())  # the first that the compiler accepts
VERSION_SECONDS = 10.0
SILENT_SECONDS = 2.0
COMPILE_SECONDS = 120.0
_WORTH_A_THREAD = 1e8
KEPT_UNUSED_SECONDS = 30 * 24 * 3600

logger = logging.getLogger(__name__)


class NoKernelsError(Exception):
    """Why there are no kernels, as the end of a sentence."""


class CompilerError(Exception):
    """Why one compiler failed; another one may succeed."""


@dataclass(frozen=True, slots=True)
class _Kernels:
    library: ctypes.CDLL
    compiler: str


def library() -> ctypes.CDLL | None:
    """The kernels, compiled now if they never were; None if they are not available."""
    return found.library if isinstance(found := _kernels(), _Kernels) else None


def unsupported_reason() -> str | None:
    """Why there are no kernels, as the end of a sentence; None if there are."""
    return found if isinstance(found := _kernels(), str) else None


def description() -> str | None:
    """Which compiler made the kernels, and for what; None if there are none."""
    if not isinstance(found := _kernels(), _Kernels):
        return None
    threads = "OpenMP" if found.library.kernels_threads() else "one thread, without OpenMP"
    by = _pairs_by(found.library)
    pairs = "" if by is None else f", bfloat16 by {by}"
    return f"{found.compiler}: {found.library.kernels_lanes()} numbers at a time{pairs}, {threads}"


def supports(*tensors: torch.Tensor) -> bool:
    """Whether the kernels are available and support ``tensors``: float32 on a CPU."""
    return (
        all(x.device.type == "cpu" and x.dtype == torch.float32 for x in tensors)
        and library() is not None
    )


def widens(weight: Weight) -> bool:
    """Whether products with ``weight`` are computed in float32 though it is held in fewer bits.

    A number in bfloat16 or 8 bits is widened as it is read, which is exact: less memory, nothing
    rounded. Only :func:`multiplies_pairs` changes that.
    """
    is_narrow = isinstance(weight, Blocks) or weight.dtype == torch.bfloat16
    return is_narrow and memory_of(weight).device.type == "cpu" and library() is not None


def supports_weight(weight: Weight) -> bool:
    """Whether the kernels compute in float32 with ``weight``, however it is held."""
    return widens(weight) or (isinstance(weight, torch.Tensor) and supports(weight))


def multiplies_pairs() -> bool:
    """Whether products with weights held in bfloat16 round their input to bfloat16 as well.

    Sums stay in float32. That is two to ten times as fast, and what ``medium`` of
    ``torch.set_float32_matmul_precision`` allows; see :func:`can_multiply_pairs`.
    """
    try:
        asked = torch.get_float32_matmul_precision()
    except RuntimeError:  # it was set by fp32_precision, PyTorch's newer way, which is not ours
        return False
    return asked == "medium" and can_multiply_pairs()


def can_multiply_pairs() -> bool:
    """Whether there are kernels, and the processor multiplies bfloat16 faster than float32."""
    return pairs_by() is not None


def pairs_by() -> str | None:
    """The instructions by which products in bfloat16 are faster than in float32: AMX, or
    AVX512_BF16 on processors other than Intel's, where that is the slower way."""
    found = library()
    return None if found is None else _pairs_by(found)


def refuses_amx() -> bool:
    """Whether the processor has AMX and Linux does not let this process use it."""
    found = library()
    return found is not None and bool(found.kernels_amx_is_refused())


def _pairs_by(kernels: ctypes.CDLL) -> str | None:
    kernels.kernels_multiplies_pairs_by.restype = ctypes.c_char_p
    by: bytes | None = kernels.kernels_multiplies_pairs_by()
    return None if by is None else by.decode()


def threads(work: float) -> int:
    """How many threads to use for ``work`` floating-point operations.

    Waiting for a second thread takes long if its core is busy with something else, so every thread
    should have a good part of a millisecond of work.
    """
    return max(1, min(torch.get_num_threads(), int(work / _WORTH_A_THREAD)))


@functools.cache
def _kernels() -> _Kernels | str:
    """The kernels, or why there are none."""
    try:
        return _compiled()
    except NoKernelsError as found:
        return str(found)
    except subprocess.TimeoutExpired as error:
        return f"{error.cmd[0]} does not finish"
    except OSError as error:
        return f"{error.filename or 'a file'}: {error.strerror or error}"


def _compiled() -> _Kernels:
    if os.environ.get("ABACIST_KERNELS") == "0":
        raise NoKernelsError("ABACIST_KERNELS=0 turns them off")
    if sys.platform == "win32":
        raise NoKernelsError("they do not support Windows")
    folder, runtime = _folder(), _openmp_runtime()
    failures = []
    for compiler in compilers():
        try:
            named = version(compiler)
            digest = _digest(compiler, named, runtime or "")
            found = _kept(folder, digest) or _built(folder, digest, compiler, runtime)
        except CompilerError as failure:
            failures.append(f"{shlex.join(compiler)} cannot compile them ({failure})")
        else:
            return _Kernels(found, f"{named} ({shlex.join(compiler)})")
    raise NoKernelsError(
        failures[0] if failures else "there is no C++ compiler: install g++ or clang"
    )


def _digest(compiler: list[str], named: str, runtime: str) -> str:
    """The digest of everything that the compiled library depends on."""
    sources = [(p.name, p.read_bytes()) for p in sorted(SOURCES.glob("*.[ch]*"))]
    made_for = [platform.system(), _processor(), torch.__version__, runtime]
    return _sha256(repr([sources, FLAGS, TUNING, compiler, named, made_for]).encode())


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:24]


def _processor() -> str:
    """Model and instruction sets of this processor."""
    words = [platform.machine(), platform.processor()]
    with contextlib.suppress(OSError):
        cores = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
        told = r"^(?:model name|flags|CPU part|Features|isa)\s*:.*$"
        words += sorted(set(re.findall(told, cores, re.MULTILINE)))
    return "\n".join(words)


def _openmp_runtime() -> str | None:
    """The OpenMP library that torch has loaded: from /proc on Linux, beside torch on a Mac.

    With a second library there would be two thread pools, both busy waiting.
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
    """The folder for compiled kernels, which only this user can write to."""
    named = os.environ.get("XDG_CACHE_HOME", "")
    try:
        caches = Path(named) if os.path.isabs(named) else Path.home() / ".cache"
    except RuntimeError:
        raise NoKernelsError("there is no home directory for them: set XDG_CACHE_HOME") from None
    folder = caches / "abacist"
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        why = f"{folder} cannot be created ({error.strerror})"
        raise NoKernelsError(f"{why}: set XDG_CACHE_HOME to a folder of yours") from None
    _check_ours(folder)
    if not os.access(folder, os.W_OK | os.X_OK):
        raise NoKernelsError(f"{folder} cannot be written to: chmod u+rwx {folder}")
    return folder


def _check_ours(path: Path) -> None:
    """Raise :class:`NoKernelsError` if another user could have written to ``path``."""
    status = path.stat()
    if status.st_uid != os.geteuid():
        raise NoKernelsError(
            f"{path} belongs to another user: set XDG_CACHE_HOME to a folder of yours"
        )
    if status.st_mode & 0o022:
        raise NoKernelsError(f"others may write to {path}: chmod go-w {path}")


def _kept(folder: Path, digest: str) -> ctypes.CDLL | None:
    """The library compiled earlier, if it is intact; damaged ones are removed."""
    for path in folder.glob(f"kernels-{digest}-*.so"):
        with contextlib.suppress(FileNotFoundError):  # another process has removed it
            _check_ours(path)
            if path.stem.endswith(_sha256(path.read_bytes())):
                with contextlib.suppress(CompilerError):
                    loaded = _loaded(path, digest)
                    os.utime(path)  # in use: see _remove_unused
                    return loaded
            path.unlink()
    return None


def _loaded(path: Path, digest: str) -> ctypes.CDLL:
    """Load the library and check that it reports ``digest``. Raises :class:`CompilerError`."""
    try:
        kernels = ctypes.CDLL(str(path))
        kernels.kernels_digest.restype = ctypes.c_char_p
        said = kernels.kernels_digest()
    except (OSError, AttributeError) as error:
        raise CompilerError(f"its library cannot be loaded: {error_line(str(error))}") from None
    if said != digest.encode():
        raise CompilerError("its library is a different one")
    if kernels.kernels_threads() < 0:
        raise CompilerError("its OpenMP conflicts with that of PyTorch")
    return kernels


def _built(folder: Path, digest: str, compiler: list[str], runtime: str | None) -> ctypes.CDLL:
    """Compile in a temporary folder and move the result: other processes see all of it or none."""
    _remove_unused(folder)
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
                raise CompilerError(error_line(output) or f"exit code {code}, and no library")
            library.chmod(0o700)
            return library

        # Compiling the smallest source shows which flags this compiler accepts.
        for before, after in flags(runtime):
            try:
                _loaded(made([SOURCES / "identity.cpp"], before, after), digest)
            except CompilerError as failure:
                refused = failure
            else:
                break
        else:  # not even without any flags
            raise refused
        library = made(sorted(SOURCES.glob("*.cpp")), before, after)
        place = folder / f"kernels-{digest}-{_sha256(library.read_bytes())}.so"
        library.replace(place)
    try:
        return _loaded(place, digest)
    except CompilerError:
        place.unlink(missing_ok=True)
        raise


def _remove_unused(folder: Path) -> None:
    """Remove libraries not loaded for a month, and what killed processes left unfinished."""
    for path in [*folder.glob("kernels-*.so"), *folder.glob("building-*")]:
        with contextlib.suppress(OSError):
            if time.time() - path.stat().st_mtime > KEPT_UNUSED_SECONDS:
                shutil.rmtree(path) if path.is_dir() else path.unlink()


def compilers() -> Iterator[list[str]]:
    """The compilers to try, as command lines; only CXX if it is set."""
    try:
        command = shlex.split(os.environ.get("CXX", ""))
    except ValueError as error:
        raise NoKernelsError(f"CXX is not a command line ({error})") from None
    if command:
        if shutil.which(command[0]) is None:
            raise NoKernelsError(f"CXX names {command[0]}, which is not a program here")
        yield command
        return
    seen = set()
    for name in COMPILERS:
        path = shutil.which(name)
        if path is not None and (real := os.path.realpath(path)) not in seen:
            seen.add(real)
            yield [path]


def version(compiler: list[str]) -> str:
    """The compiler's name and version. Raises :class:`CompilerError`."""
    code, output = run([*compiler, "--version"], VERSION_SECONDS)
    lines = output.strip().splitlines()
    if code or not lines:
        raise CompilerError(error_line(output) or f"--version: exit code {code}")
    return lines[0]


def flags(openmp_runtime: str | None) -> Iterator[tuple[list[str], list[str]]]:
    """Compiler flags to try, in this order, as (before, after) the sources.

    Code for this processor with the threads of ``openmp_runtime`` comes first, plain code last.
    """
    openmp = [["-fopenmp"], []]
    if openmp_runtime is not None:
        # Named before the compiler's own library, which is then not needed. Clang may have none of
        # its own (Apple's does not), so for Clang it is named instead.
        rpath = f"-Wl,-rpath,{os.path.dirname(openmp_runtime)}"
        openmp = [
            ["-fopenmp", "-Wl,--as-needed", openmp_runtime],
            ["-Xclang", "-fopenmp", openmp_runtime, rpath],
            *openmp,
        ]
    for tuning, threads in itertools.product(TUNING, openmp):
        yield [*FLAGS, *tuning], threads


def run(command: list[str], seconds: float, folder: str | None = None) -> tuple[int, str]:
    """Run a compiler. Returns its exit code and output; its temporary files go to ``folder``.

    Raises :class:`CompilerError` if it cannot be run, and subprocess.TimeoutExpired after killing
    the compiler and its children.
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
                warn_of_compilation()
                output, _ = process.communicate(timeout=seconds - SILENT_SECONDS)
        except BaseException:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, signal.SIGKILL)
            raise
    return process.returncode, output.decode("utf-8", "replace")


@functools.cache  # once a process
def warn_of_compilation() -> None:
    logger.warning("Abacist: compiling the CPU kernels. This takes a few seconds, once.")


def error_line(output: str) -> str:
    """The line of a compiler's or loader's output that says most, at most 200 characters.

    >>> error_line("In file from a.cpp:\\nvector.h:3:1: error: unknown type\\n  3 | Vek x;\\n")
    'vector.h:3:1: error: unknown type'
    """
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    errors = [line for line in lines if "error" in line.lower()] or lines[-1:]
    return "".join(c for c in "".join(errors[:1]) if c.isprintable())[:200]
