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
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from abacist.policy.kernels.compiler import (
    FLAGS,
    TUNING,
    CompilerError,
    Obstacle,
    compilers,
    flags,
    gist,
    run,
    version,
)

SOURCES = Path(__file__).parent
COMPILE_SECONDS = 120.0
_WORTH_A_THREAD = 1e8
KEPT_UNUSED_SECONDS = 30 * 24 * 3600


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
