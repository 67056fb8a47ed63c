"""Every way a command can end is a message and an exit code, and no secret is in it."""

from __future__ import annotations

import errno
import json
import os
import shlex
import signal
import subprocess
import sys
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch.distributed as dist

import abacist
from abacist.cli import console
from abacist.cli.main import main
from abacist.errors import DataError, ProcessLost, UsageError

SOURCE = Path(abacist.__file__).resolve().parents[1]


def failing(error: BaseException) -> Any:
    def verb() -> int:
        raise error

    return verb


def python(code: str, **options: Any) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": str(SOURCE)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **options,
    )


def test_an_error_one_can_mend_is_message_and_hint(capsys: pytest.CaptureFixture[str]) -> None:
    assert console.run(failing(DataError("no rows in a.jsonl", "Name a file\nthat has some."))) == 1
    captured = capsys.readouterr()
    assert captured.err == "error: no rows in a.jsonl\n  Name a file\n  that has some.\n"
    assert captured.out == ""


def test_a_command_in_a_hint_is_named_as_this_one_was_started(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    hint = "abacist train --resume runs/x, or pip install 'abacist[wandb]': see /opt/abacist ask"
    for started, named in ((".venv/bin/abacist", ".venv/bin/abacist"), ("pytest", "abacist")):
        monkeypatch.setattr(sys, "argv", [started])
        monkeypatch.setattr(console.shutil, "which", lambda name: None)
        console.run(failing(DataError("stopped", hint)))
        told = capsys.readouterr().err.splitlines()[1]
        assert told == "  " + hint.replace("abacist train", f"{named} train")


def test_usage_errors_exit_with_2() -> None:
    assert console.run(failing(UsageError("no such flag"))) == 2


def test_an_interruption_exits_with_130_and_no_traceback(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert console.run(failing(KeyboardInterrupt())) == 130
    assert capsys.readouterr().err == "error: interrupted\n"


def test_a_bug_says_so_and_keeps_its_traceback_in_a_file(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("ABACIST_DEBUG", raising=False)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    assert console.run(failing(ZeroDivisionError("by hf_abcdefghijklmnop \ud800"))) == 1
    err = capsys.readouterr().err
    (file,) = tmp_path.iterdir()
    assert "this is a bug in Abacist: ZeroDivisionError" in err
    assert str(file) in err
    assert "Traceback" not in err
    written = file.read_text(encoding="utf-8")
    assert "Traceback" in written and "ZeroDivisionError" in written
    assert "abcdefghijklmnop" not in err + written


def test_a_bug_shows_its_traceback_where_that_is_asked_for(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ABACIST_DEBUG", "1")
    assert console.run(failing(ZeroDivisionError("oh"))) == 1
    assert "Traceback" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (OSError(errno.ENOSPC, "No space left on device", "/data/x"), "--output_dir"),
        (PermissionError(errno.EACCES, "Permission denied", "/data/x"), "/data/x"),
        (MemoryError(), "out of memory"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: 8 GB"), "out of memory"),
        (type("OutOfMemoryError", (RuntimeError,), {})("CUDA out of memory."), "--num_generations"),
        (dist.DistStoreError("wait timeout after 20000ms"), "did not come together: wait timeout"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_is_nobodys_bug_is_said_plainly(
    error: Exception, says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert console.run(failing(error)) == 1
    err = capsys.readouterr().err
    assert says in err
    assert "bug" not in err


@pytest.mark.parametrize("local_rank", ["0", "1"])
def test_of_several_processes_one_speaks_and_another_says_only_what_it_could_not_tell(
    local_rank: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    waited: list[float] = []
    monkeypatch.setattr(console, "time", SimpleNamespace(sleep=waited.append))
    monkeypatch.setenv("LOCAL_RANK", local_rank)
    monkeypatch.setenv("RANK", local_rank)
    untold, told = UsageError("--sed is not a flag"), DataError("row 3")
    told.is_told = True
    errors = (untold, told, ProcessLost("rank 2 is gone"))
    assert [console.run(failing(error)) for error in errors] == [2, 1, 1]
    said = capsys.readouterr().err.splitlines()
    lost = "error: rank 2 is gone"
    if local_rank == "0":
        assert said == ["error: --sed is not a flag", "error: row 3", lost] and waited == []
    else:  # in which time a launcher ends it where the first one failed as well
        assert said == ["error: rank 1: --sed is not a flag", lost]
        assert waited == [console.ALONE_SECONDS]


def test_secrets_of_the_environment_are_never_printed(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "0123456789abcdef")
    console.run(failing(DataError("key 0123456789abcdef, token hf_ABCDEFGHIJ")))
    assert capsys.readouterr().err == "error: key <WANDB_API_KEY>, token hf_…\n"


def test_control_characters_in_an_error_are_shown_and_not_obeyed(
    capsys: pytest.CaptureFixture[str],
) -> None:
    console.run(failing(DataError("a row holds \x1b[2J and \u202e")))
    assert capsys.readouterr().err == "error: a row holds \\x1b[2J and \\u202e\n"


@pytest.mark.parametrize(
    ("is_terminal", "no_color", "coloured"),
    [(True, "", True), (True, "1", False), (False, "", False)],
)
def test_colours_only_on_a_terminal_that_wants_them(
    is_terminal: bool, no_color: str, coloured: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NO_COLOR", no_color)
    monkeypatch.setenv("TERM", "xterm")
    stream: Any = SimpleNamespace(isatty=lambda: is_terminal)
    assert console.has_colours(stream) is coloured


def test_a_reader_that_goes_away_is_no_error() -> None:
    process = python("import sys; sys.stdin.read()\nfrom abacist.cli.main import main\n"
                     "sys.exit(main(['train', '--help']))")  # fmt: skip
    assert process.stdout and process.stdin and process.stderr
    process.stdout.close()
    process.stdin.close()
    assert process.wait(60) == console.BROKEN_PIPE
    assert process.stderr.read() == ""


@pytest.mark.skipif(os.name == "nt", reason="POSIX signals")
def test_termination_unwinds_before_it_exits_with_143() -> None:
    code = """
import sys, time
from abacist.cli import console
def verb():
    try:
        print("ready", flush=True)
        time.sleep(60)
    finally:
        print("state saved", flush=True)
sys.exit(console.run(verb))
"""
    process = python(code)
    assert process.stdout
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out, err) == (143, "state saved\n", "")


def test_json_is_one_valid_object_whatever_it_holds(capsys: pytest.CaptureFixture[str]) -> None:
    class Stop(Enum):
        LENGTH = "length"

    @dataclass
    class Row:
        stop: Stop
        rewards: tuple[float, ...]

    with console.stdout_for(result_only=True) as stdout:
        print("a library says hello")
        value = {"row": Row(Stop.LENGTH, (1.5, float("nan"))), "at": Path("a"), "text": "\ud800"}
        console.print_json(value, stdout)
    captured = capsys.readouterr()
    assert captured.err == "a library says hello\n"
    assert json.loads(captured.out) == {
        "row": {"stop": "length", "rewards": [1.5, None]},
        "at": "a",
        "text": "\ud800",
    }


def test_json_stays_one_object_when_a_reward_starts_a_program_that_prints() -> None:
    program = """
import ctypes, os
from abacist.cli import console
def verb():
    print("before")
    with console.stdout_for(result_only=True) as stdout:
        os.system("echo a program")
        os.write(1, b"a descriptor\\n")
        print("a library")
        ctypes.CDLL(None).puts(b"a library in C")
        console.print_json({"a": "×"}, stdout)
    os.write(1, b"after\\n")
    return 0
raise SystemExit(console.run(verb))
"""
    command = [sys.executable, "-c", program]
    ended = subprocess.run(command, capture_output=True, text=True, encoding="utf-8")
    assert ended.returncode == 0
    assert ended.stdout == 'before\n{\n  "a": "\\u00d7"\n}\nafter\n'
    assert sorted(ended.stderr.split("\n")) == [
        *("", "a descriptor", "a library", "a library in C", "a program")
    ]


@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-", "<&- >&- 2>&-"])
def test_a_closed_stream_goes_nowhere_and_never_into_a_file(closed: str, tmp_path: Path) -> None:
    program = """
import sys
from abacist.cli import console
console.open_closed_streams()
def verb():
    with open("file", "w") as file:
        print("said"); print("said", file=sys.stderr); sys.stdin.read(0)
        with console.stdout_for(result_only=True) as stdout:
            console.print_json({}, stdout)
        file.write("mine")
    return 0
raise SystemExit(console.run(verb))
"""
    (tmp_path / "program.py").write_text(program, encoding="utf-8")
    line = f"{shlex.quote(sys.executable)} program.py {closed}"
    assert subprocess.run(line, shell=True, cwd=tmp_path, capture_output=True).returncode == 0
    assert (tmp_path / "file").read_text(encoding="utf-8") == "mine"


def test_a_name_that_is_no_utf_8_is_refused_before_anything_is_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["train", "tiny", "--output_dir", "r\udcff"]) == 2
    assert "'r\\udcff' (given) is not UTF-8" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
    folder = os.fsencode(tmp_path) + b"/\xff"
    os.mkdir(folder)
    monkeypatch.chdir(os.fsdecode(folder))
    assert main(["--version"]) == 2
    assert "(the working directory) is not UTF-8" in capsys.readouterr().err


@pytest.mark.parametrize(("code", "status"), [(None, 0), (143, 143), ("wandb gave up", 1)])
def test_a_library_that_exits_is_an_exit_code(
    code: object, status: int, capsys: pytest.CaptureFixture[str]
) -> None:
    assert console.run(failing(SystemExit(code))) == status
    assert capsys.readouterr().err == ("error: wandb gave up\n" if status == 1 else "")
