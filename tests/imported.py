"""Python in processes of its own that have imported everything already.

Importing PyTorch and TRL takes five seconds of every process. Here one process imports them, and a
program, a module or a script is run in a fork of it, with an environment, a folder and streams of
its own. What is tried begins behind the imports: a test of the start itself, or of something that
is read while modules are imported, starts Python. Forks share the seed of ``hash()``.
"""

from __future__ import annotations

import atexit
import json
import multiprocessing
import os
import runpy
import socket
import subprocess
import sys
import tempfile
import time
import traceback
import weakref
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

FORK_SECONDS = 400.0


class Process:
    """A program in a fork, as :class:`subprocess.Popen` would have it."""

    def __init__(self, python: Imported, pid: int) -> None:
        self._python, self.pid = python, pid
        self.returncode: int | None = None

    def poll(self) -> int | None:
        """The exit code, or None while it runs."""
        if self.returncode is None:
            self.returncode = self._python.ask({"ended": self.pid, "seconds": 0.0})
        return self.returncode

    def wait(self, timeout: float = FORK_SECONDS) -> int:
        """The exit code; it is killed, and TimeoutExpired raised, where that takes too long."""
        if self.returncode is None:
            self.returncode = self._python.ask({"ended": self.pid, "seconds": timeout})
        if self.returncode is None:
            self.kill()
            self._python.ask({"ended": self.pid, "seconds": FORK_SECONDS})
            raise subprocess.TimeoutExpired("a forked program", timeout)
        return self.returncode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(9)


class Imported:
    """The process that has imported everything. ``command`` starts Python, by default this one."""

    def __init__(
        self, command: Sequence[str] = (sys.executable,), env: Mapping[str, str] | None = None
    ) -> None:
        self.env = dict(os.environ if env is None else env)
        path = os.pathsep.join(filter(None, sys.path))
        self._server = subprocess.Popen(
            [*command, __file__],
            env=self.env | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            encoding="utf-8",
        )

    def close(self) -> None:
        """End it, and what it has forked."""
        self._server.stdin.close()  # type: ignore[union-attr]
        self._server.wait()
        self._server.stdout.close()  # type: ignore[union-attr]

    def ask(self, question: Mapping[str, Any]) -> Any:
        assert self._server.stdin is not None and self._server.stdout is not None
        self._server.stdin.write(json.dumps(question) + "\n")
        self._server.stdin.flush()
        answer = self._server.stdout.readline()
        assert answer, "the process that has imported everything has ended"
        return json.loads(answer)

    def start(
        self,
        *arguments: str,
        env: Mapping[str, str] | None = None,
        cwd: Path | str | None = None,
        stdout: Path | str = os.devnull,
        stderr: Path | str | None = None,
    ) -> Process:
        """Run ``arguments``, as ``python`` takes them (``-c``, ``-m``, a script); stdin is empty.

        ``stderr`` is this process's unless it is named, and ``env`` is the whole environment.
        """
        wanted = {
            "arguments": arguments,
            "env": dict(self.env if env is None else env),
            "cwd": str(cwd or os.getcwd()),
            "stdout": str(stdout),
            "stderr": None if stderr is None else str(stderr),
        }
        return Process(self, self.ask(wanted))

    def run(
        self,
        *arguments: str,
        env: Mapping[str, str] | None = None,
        cwd: Path | str | None = None,
        timeout: float = FORK_SECONDS,
    ) -> subprocess.CompletedProcess[str]:
        """Run ``arguments`` to their end, as ``subprocess.run`` with captured text."""
        with tempfile.TemporaryDirectory() as folder:
            out, err = (Path(folder) / name for name in ("out", "err"))
            process = self.start(*arguments, env=env, cwd=cwd, stdout=out, stderr=err)
            code = process.wait(timeout)
            told = [path.read_text(encoding="utf-8") for path in (out, err)]
        return subprocess.CompletedProcess(arguments, code, *told)

    def run_in(
        self,
        processes: int,
        *arguments: str,
        env: Mapping[str, str] | None = None,
        timeout: float = FORK_SECONDS,
    ) -> list[subprocess.CompletedProcess[str]]:
        """Run ``arguments`` in so many processes that find each other as under torchrun.

        What each of them said, in the order of the ranks.
        """
        with socket.socket() as found:
            found.bind(("127.0.0.1", 0))
            port = str(found.getsockname()[1])
        world = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        world |= dict.fromkeys(("WORLD_SIZE", "LOCAL_WORLD_SIZE"), str(processes))
        given = dict(self.env if env is None else env)
        with tempfile.TemporaryDirectory() as folder:
            started: list[tuple[Process, Path, Path]] = []
            for rank in map(str, range(processes)):
                out, err = (Path(folder) / f"{name}-{rank}" for name in ("out", "err"))
                own = given
                if processes > 1:
                    own = given | world | {"RANK": rank, "LOCAL_RANK": rank}
                started.append((self.start(*arguments, env=own, stdout=out, stderr=err), out, err))
            try:
                _wait_for_all([process for process, *_ in started], timeout)
            finally:
                for process, *_ in started:
                    process.kill()
            return [
                subprocess.CompletedProcess(
                    arguments,
                    process.wait(),
                    *(path.read_text(encoding="utf-8") for path in (out, err)),
                )
                for process, out, err in started
            ]


def _wait_for_all(processes: Sequence[Process], timeout: float) -> None:
    """Until all have ended, or one has failed: the others would wait for it."""
    until = time.monotonic() + timeout
    while any(process.poll() is None for process in processes):
        if any(process.returncode for process in processes) or time.monotonic() > until:
            return
        time.sleep(0.05)


# In the process that is forked


def _own_streams() -> tuple[TextIO, TextIO]:
    """Where questions come from and answers go; what is imported may say what it likes."""
    asked, answers = (
        os.fdopen(os.dup(0), encoding="utf-8"),
        os.fdopen(os.dup(1), "w", encoding="utf-8"),
    )
    for number, mode in ((0, os.O_RDONLY), (1, os.O_WRONLY)):
        os.dup2(os.open(os.devnull, mode), number)
    return asked, answers


def _serve(asked: TextIO, answers: TextIO) -> None:
    """Fork a process for each question that asks for one, and say of others whether they ended."""
    context = multiprocessing.get_context("fork")
    forked: dict[int, Any] = {}
    for line in asked:
        question = json.loads(line)
        if "ended" in question:
            process = forked[question["ended"]]
            process.join(question["seconds"])
            answer = process.exitcode
        else:
            process = context.Process(target=_forked, args=(question, [asked, answers]))
            process.start()
            answer = process.pid
            forked[answer] = process
        answers.write(json.dumps(answer) + "\n")
        answers.flush()
    for process in forked.values():  # multiprocessing would wait for them, and one may be stopped
        process.kill()


def _forked(question: Mapping[str, Any], ours: Sequence[Any]) -> None:
    _forget_exit_functions()
    for file in ours:
        os.close(file.fileno())
    for number, name in ((1, "stdout"), (2, "stderr")):
        if question[name] is not None:
            file = os.open(question[name], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
            os.dup2(file, number)
            os.close(file)
        buffering = 1 if number == 2 or os.isatty(number) else -1
        stream = open(number, "w", buffering, encoding="utf-8", closefd=False)  # noqa: SIM115
        setattr(sys, name, stream)
    sys.stdin = open(os.open(os.devnull, os.O_RDONLY), encoding="utf-8")  # noqa: SIM115
    os.environ.clear()
    os.environ.update(question["env"])
    os.chdir(question["cwd"])
    import numpy
    import torch

    numpy.random.seed()  # else all forks would draw alike
    torch.seed()
    try:
        _program(list(question["arguments"]))()
    except SystemExit:
        raise
    except BaseException:
        traceback.print_exc()
        sys.exit(1)
    finally:
        atexit._run_exitfuncs()  # multiprocessing ends a fork without them


def _forget_exit_functions() -> None:
    """What was registered before the fork is for the process that has imported everything.

    W&B, for one, makes a folder when it is imported and removes it at exit: the first fork to end
    would take it from all others.
    """
    atexit._clear()
    for finalizer in list(weakref.finalize._registry):  # type: ignore[attr-defined]
        finalizer.atexit = False
    atexit.register(weakref.finalize._exitfunc)  # type: ignore[attr-defined]


def _program(arguments: list[str]) -> Callable[[], Any]:
    first, *rest = arguments
    sys.path.pop(0)  # where this file lies
    if first == "-c":
        sys.path.insert(0, "")
        sys.argv = ["-c", *rest[1:]]
        main = type(sys)("__main__")
        sys.modules["__main__"] = main
        program = compile(rest[0], "<string>", "exec", dont_inherit=True)
        return lambda: exec(program, main.__dict__)
    if first == "-m":
        sys.path.insert(0, "")
        sys.argv = rest
        return lambda: runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
    sys.path.insert(0, str(Path(first).parent))
    sys.argv = arguments
    return lambda: runpy.run_path(first, run_name="__main__")


if __name__ == "__main__":
    streams = _own_streams()
    import gc

    import datasets  # noqa: F401
    import pytest
    import transformers.models.auto.modeling_auto
    import transformers.models.llama.modeling_llama
    import transformers.models.qwen2.modeling_qwen2  # noqa: F401
    import trl.trainer.grpo_trainer  # noqa: F401

    import abacist.api
    import abacist.cli.ask
    import abacist.cli.train
    import abacist.learning.train
    import abacist.learning.trainer
    import abacist.proof.evaluate  # noqa: F401
    import empty_charts

    empty_charts.leave_charts_empty(pytest.MonkeyPatch())
    gc.collect()
    gc.freeze()  # what was imported is neither looked through nor copied in a fork
    _serve(*streams)
