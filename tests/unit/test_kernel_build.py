"""Kernels are compiled once, kept safely, and done without where anything stands in their way."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from abacist.cli.doctor import machine
from abacist.cli.doctor.machine import State
from abacist.policy.kernels import build
from faults import fault

REAL = next(filter(None, map(shutil.which, build.COMPILERS)), None)
needs_compiler = pytest.mark.skipif(REAL is None, reason="there is no C++ compiler here")
pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="no kernels are made for Windows")

WHERE = 'while [ "$1" != -o ]; do shift; done'  # then $2 is the file that is asked for
Compiler = Callable[..., Path]


@pytest.fixture
def kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The folder that kernels are kept in, new; they are small ones that compile in a moment."""
    (tmp_path / "sources").mkdir()
    for source in (build.SOURCES / "identity.cpp", *build.SOURCES.glob("*.h")):
        shutil.copy(source, tmp_path / "sources")
    monkeypatch.setattr(build, "SOURCES", tmp_path / "sources")
    # On a busy machine they may take longer than what is compiled without a word.
    monkeypatch.setattr(build, "SILENT_SECONDS", build.COMPILE_SECONDS)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "caches"))
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.delenv("ABACIST_KERNELS", raising=False)
    build._kernels.cache_clear()
    yield tmp_path / "caches" / "abacist"
    build._kernels.cache_clear()


@pytest.fixture
def compile_by(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Compiler:
    """A compiler that is this shell script; it notes how often it is asked to compile."""

    def write(body: str, version: str = "echo fake 1.0") -> Path:
        script = tmp_path / "fake-c++"
        script.write_text(
            "#!/bin/sh\nfor last; do :; done\n"
            f'if [ "$last" = --version ]; then {version}; exit; fi\n'
            f"echo >> '{tmp_path}/asked'\n{body}\n",
            encoding="utf-8",
        )
        script.chmod(0o755)
        monkeypatch.setenv("CXX", str(script))
        return script

    return write


def asked(tmp_path: Path) -> int:
    return len((tmp_path / "asked").read_text(encoding="utf-8").splitlines())


def again() -> None:
    """As if another process came."""
    build._kernels.cache_clear()
    assert build.library() is not None, build.unsupported_reason()
    assert build.unsupported_reason() is None


# What is kept


@needs_compiler
def test_kernels_are_compiled_once_and_kept_where_only_their_owner_can_write(
    kept: Path, compile_by: Compiler, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    compile_by(f'exec {REAL} "$@"')
    umask = os.umask(0o002)  # as some systems have it: what is made belongs to a group too
    try:
        again()
        again()
    finally:
        os.umask(umask)
    assert asked(tmp_path) == 2  # whether it takes the flags, and then the kernels
    (only,) = kept.iterdir()
    assert only.suffix == ".so"
    assert (only.stat().st_mode | kept.stat().st_mode) & 0o022 == 0
    assert caplog.records == []


@needs_compiler
def test_what_is_compiled_from_other_sources_or_for_another_torch_is_not_taken(
    kept: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    again()
    with (build.SOURCES / "vector.h").open("a", encoding="utf-8") as header:
        header.write("// changed\n")
    again()
    monkeypatch.setattr(torch, "__version__", "0.0.1")
    again()
    monkeypatch.setattr(build, "_processor", lambda: "another one")
    again()
    assert len(list(kept.iterdir())) == 4


@needs_compiler
@fault("kernels", "the compiled file is cut short, zeroed, or one bit of it flipped",
       "nothing: it is compiled anew", 0)  # fmt: skip
@pytest.mark.parametrize(
    "damage",
    [
        lambda content: content[: len(content) // 2],
        lambda content: bytes(len(content)),
        lambda content: b"",
        lambda content: content[:-9] + bytes([content[-9] ^ 1]) + content[-8:],
    ],
    ids=["cut", "zeroed", "empty", "one bit"],
)
def test_a_damaged_library_is_compiled_anew_and_never_loaded(
    kept: Path, damage: Callable[[bytes], bytes]
) -> None:
    again()
    (path,) = kept.iterdir()
    sound = path.read_bytes()
    path.unlink()  # this process has it loaded
    path.write_bytes(damage(sound))
    again()
    (path,) = kept.iterdir()
    assert path.read_bytes() == sound


@needs_compiler
def test_a_library_of_other_sources_under_this_name_is_compiled_anew(kept: Path) -> None:
    again()
    (path,) = kept.iterdir()
    with (build.SOURCES / "vector.h").open("a", encoding="utf-8") as header:
        header.write("// changed\n")
    again()
    other = next(one for one in kept.iterdir() if one != path)
    mine, digest = other.stem.split("-")[1], path.stem.split("-")[2]
    posing = kept / f"kernels-{mine}-{digest}.so"
    path.rename(posing)
    other.unlink()
    again()
    assert list(kept.iterdir()) == [other]


@needs_compiler
def test_processes_that_compile_at_once_all_get_kernels(kept: Path) -> None:
    with ThreadPoolExecutor(4) as pool:
        found = [pool.submit(build._compiled) for _ in range(4)]
    assert all(one.result().library.kernels_lanes() > 0 for one in found)
    assert all(path.name.startswith("kernels-") for path in kept.iterdir())


@needs_compiler
def test_what_nobody_has_used_for_a_month_goes_and_what_is_used_stays(kept: Path) -> None:
    again()
    (used,) = kept.iterdir()
    (kept / "kernels-of-yore.so").touch()
    (kept / "building-broken-off").mkdir()
    (kept / "notes.txt").touch()
    for path in kept.iterdir():
        os.utime(path, (0, 0))
    again()
    (build.SOURCES / "more.cpp").touch()
    again()
    left = {path.name for path in kept.iterdir()}
    assert {used.name, "notes.txt"} < left and len(left) == 3
    assert time.time() - used.stat().st_mtime < build.KEPT_UNUSED_SECONDS


# What can stand in the way


def test_no_kernels_are_compiled_where_they_are_turned_off_or_on_windows(
    kept: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ABACIST_KERNELS", "0")
    assert build.library() is None and build.description() is None
    assert build.unsupported_reason() == "ABACIST_KERNELS=0 turns them off"
    monkeypatch.delenv("ABACIST_KERNELS")
    build._kernels.cache_clear()
    monkeypatch.setattr(build, "sys", SimpleNamespace(platform="win32"))
    assert build.library() is None and "Windows" in str(build.unsupported_reason())
    assert not kept.exists()


@fault("kernels", "there is no C++ compiler",
       "nothing but less speed on a CPU; `abacist doctor` says why", 0)  # fmt: skip
def test_without_a_compiler_the_doctor_says_what_to_install_and_all_goes_on(
    kept: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert build.library() is None
    (finding,) = machine._kernels()
    assert finding.state is State.NOTE
    assert finding.found == "none: there is no C++ compiler: install g++ or clang"
    assert "the same" in finding.remedy and "slower" in finding.remedy


@pytest.mark.parametrize(
    ("command", "said"),
    [("no-such-c++ -m64", "no-such-c++"), ("c++ 'open", "not a command line")],
)
def test_cxx_that_names_no_program_is_told(
    kept: Path, monkeypatch: pytest.MonkeyPatch, command: str, said: str
) -> None:
    monkeypatch.setenv("CXX", command)
    assert build.library() is None
    assert "CXX" in str(build.unsupported_reason()) and said in str(build.unsupported_reason())


@fault("kernels", "the C++ compiler fails, hangs, or writes no library that can be loaded",
       "nothing but less speed on a CPU; `abacist doctor` says why", 0)  # fmt: skip
@pytest.mark.parametrize(
    ("body", "said"),
    [
        ("echo here; echo 'a.cpp:7:1: error: no room' >&2; exit 1", "a.cpp:7:1: error: no room"),
        ("kill -9 $$", "exit code -9"),
        ("exit 0", "no library"),
        (f'{WHERE}; echo garbage > "$2"', "cannot be loaded"),
        (f'{WHERE}; : > "$2"', "cannot be loaded"),
        (f'{WHERE}; mkdir -p "$2"', "no library"),
        ("sleep 60", "does not finish"),
        ("sleep 60 & wait", "does not finish"),
        ("sleep 60 & exit 0", "does not finish"),
        ("printf '\\033[31m\\377\\n'; exit 3", "[31m"),
    ],
)
def test_a_compiler_that_does_not_do_its_work_costs_no_more_than_the_kernels(
    kept: Path,
    compile_by: Compiler,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    body: str,
    said: str,
) -> None:
    script = compile_by(body)
    if said == "does not finish":
        monkeypatch.setattr(build, "COMPILE_SECONDS", 0.3)
    assert build.library() is None
    found = str(build.unsupported_reason())
    assert said in found and str(script) in found and found.isprintable()
    assert list(kept.iterdir()) == []
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("version", "said"),
    [
        ("exit 1", "--version: exit code 1"),
        ("true", "--version: exit code 0"),
        ("sleep 60", "does not finish"),
    ],
)
def test_a_compiler_that_cannot_say_what_it_is_is_not_used(
    kept: Path, compile_by: Compiler, monkeypatch: pytest.MonkeyPatch, version: str, said: str
) -> None:
    script = compile_by("exit 0", version)
    monkeypatch.setattr(build, "VERSION_SECONDS", 0.3)
    assert build.library() is None and said in str(build.unsupported_reason())
    build._kernels.cache_clear()
    script.write_bytes(b"\x7fnothing that runs")
    assert build.library() is None and "cannot be run" in str(build.unsupported_reason())


@needs_compiler
def test_the_next_compiler_is_asked_where_one_fails(
    kept: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "bin").mkdir()
    for name, body in (("c++", "exit 1"), ("g++", f'exec {REAL} "$@"')):
        (tmp_path / "bin" / name).write_text(f"#!/bin/sh\n{body}\n", encoding="utf-8")
        (tmp_path / "bin" / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    again()
    assert f"({tmp_path}/bin/g++)" in str(build.description())


@needs_compiler
@pytest.mark.parametrize(
    ("refused", "threads"),
    [
        ("*-march*", "OpenMP"),
        ("*=native*", "OpenMP"),
        ("*-Wl,*", "OpenMP"),
        ("*-fopenmp*", "one thread, without OpenMP"),
        ("*=native*|*-fopenmp*", "one thread, without OpenMP"),
    ],
)
def test_a_compiler_is_not_asked_for_more_than_it_can(
    kept: Path, compile_by: Compiler, refused: str, threads: str
) -> None:
    compile_by(f'case "$*" in {refused}) exit 1;; esac; exec {REAL} "$@"')
    again()
    assert str(build.description()).endswith(f", {threads}")


@needs_compiler
def test_threads_that_are_started_by_one_openmp_and_numbered_by_another_are_not_used(
    kept: Path,
) -> None:
    with (build.SOURCES / "threads.h").open("a", encoding="utf-8") as header:
        header.write("#define omp_get_level() 0\n")  # as the other one sees it
    again()
    assert str(build.description()).endswith("one thread, without OpenMP")


@needs_compiler
def test_a_compilation_that_takes_long_says_so(
    kept: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(build, "SILENT_SECONDS", 0.0)
    build.warn_of_compilation.cache_clear()
    again()
    assert [record.message for record in caplog.records] == [
        "Abacist: compiling the CPU kernels. This takes a few seconds, once."
    ]


# Where they are kept


def writable_folder(kept: Path) -> None:
    kept.mkdir(parents=True)
    kept.chmod(0o770)


def file_in_the_way(kept: Path) -> None:
    kept.parent.mkdir()
    kept.touch()


def file_as_cache_home(kept: Path) -> None:
    kept.parent.touch()


@pytest.mark.parametrize(
    ("prepare", "said"),
    [
        (writable_folder, "others may write to"),
        (file_in_the_way, "cannot be created (File exists): set XDG_CACHE_HOME"),
        (file_as_cache_home, "cannot be created"),
    ],
)
def test_a_cache_that_cannot_be_used_or_trusted_is_not_used(
    kept: Path, prepare: Callable[[Path], None], said: str
) -> None:
    prepare(kept)
    assert build.library() is None
    assert said in str(build.unsupported_reason()) and str(kept) in str(build.unsupported_reason())


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_cache_that_cannot_be_written_to_is_not_used(kept: Path) -> None:
    kept.mkdir(parents=True)
    kept.chmod(0o500)
    assert build.library() is None and "cannot be written to" in str(build.unsupported_reason())


@needs_compiler
def test_nothing_is_loaded_that_another_user_could_have_written(
    kept: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    again()
    (path,) = kept.iterdir()
    path.chmod(0o702)
    build._kernels.cache_clear()
    assert build.library() is None
    assert build.unsupported_reason() == f"others may write to {path}: chmod go-w {path}"
    path.chmod(0o700)
    again()
    monkeypatch.setattr(os, "geteuid", lambda: kept.stat().st_uid + 1)
    build._kernels.cache_clear()
    assert build.library() is None
    assert str(build.unsupported_reason()).startswith(f"{kept} belongs to another user")


@needs_compiler
def test_the_cache_is_in_the_home_unless_a_whole_path_is_named(
    kept: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "not/whole")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    again()
    assert list((tmp_path / "home" / ".cache" / "abacist").glob("kernels-*.so"))

    def no_home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", no_home)
    build._kernels.cache_clear()
    assert build.library() is None and "set XDG_CACHE_HOME" in str(build.unsupported_reason())


# One pool of threads


@needs_compiler
@pytest.mark.skipif(build._openmp_runtime() is None, reason="torch's OpenMP is not known here")
def test_kernels_need_the_openmp_library_they_are_given_and_no_other(tmp_path: Path) -> None:
    theirs = Path(str(build._openmp_runtime()))
    name = theirs.name.encode()
    if "gomp" not in theirs.name or b"\0" + name + b"\0" not in theirs.read_bytes():
        pytest.skip("torch brings another OpenMP than GCC's")
    # Wheels of torch have carried it under a name of their own.
    renamed = theirs.name.replace("gomp", "gomq")
    (tmp_path / renamed).write_bytes(theirs.read_bytes().replace(name, renamed.encode()))
    source, made = tmp_path / "a.cpp", tmp_path / "a.so"
    source.write_text(
        "extern void f(int);\nvoid g() {\n#pragma omp parallel\nf(0);\n}\n", encoding="utf-8"
    )
    before, after = next(build.flags(str(tmp_path / renamed)))
    code, output = build.run([str(REAL), *before, "-o", str(made), str(source), *after], 60.0)
    assert code == 0, output
    assert renamed.encode() in made.read_bytes() and name not in made.read_bytes()


@needs_compiler
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only Linux tells what is loaded")
def test_importing_compiles_nothing_and_the_kernels_share_the_threads_of_torch() -> None:
    code = """
import re, torch
from abacist.policy.kernels import build
def loaded(what):
    maps = open("/proc/self/maps").read()
    return set(re.findall(rf"/\\S*/{what}[^/ ]*$", maps, re.MULTILINE))
assert not loaded("kernels-")
before = loaded("lib(?:gomp|iomp5|omp)")
assert build.library() is not None, build.unsupported_reason()
assert len(loaded("kernels-")) == 1
print(before == loaded("lib(?:gomp|iomp5|omp)"), before, build.description())
"""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    environment.pop("ABACIST_KERNELS", None)
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        encoding="utf-8",
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("True ")
