"""What is exported is whole or not there, whatever ends it."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from abacist.delivery.staging import refuse_taken, staged
from abacist.errors import RunError
from abacist.records.rundir import write_json

RECORD = {"format": "abacist-export", "format_version": 1}


def fill(folder: Path, text: str = "new") -> None:
    (folder / "model.bin").write_text(text, encoding="utf-8")
    write_json(folder / "abacist.json", RECORD)


def contents(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_finished_folder_is_moved_to_its_place(tmp_path: Path) -> None:
    with staged(tmp_path / "a" / "b", overwrite=False) as folder:
        fill(folder)
        assert not (tmp_path / "a" / "b").exists()
    assert contents(tmp_path / "a") == ["b"]
    assert contents(tmp_path / "a" / "b") == ["abacist.json", "model.bin"]


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        OSError("100 requested and 3 written"),
        RuntimeError("Error while serializing: I/O error: No space left on device (os error 28)"),
    ],
)
def test_a_full_disk_is_said_in_whatever_words_it_comes(error: Exception, tmp_path: Path) -> None:
    with (
        pytest.raises(RunError, match="disk is full"),
        staged(tmp_path / "x", overwrite=False) as f,
    ):
        fill(f)
        raise error
    assert not contents(tmp_path)


@pytest.mark.parametrize("error", [ValueError("no"), KeyboardInterrupt(), SystemExit(143)])
def test_any_other_end_leaves_nothing_and_stays_itself(
    error: BaseException, tmp_path: Path
) -> None:
    with pytest.raises(type(error)), staged(tmp_path / "a" / "x", overwrite=False) as folder:
        fill(folder)
        raise error
    assert not contents(tmp_path)


def test_an_export_is_replaced_only_when_asked_and_only_by_a_whole_one(tmp_path: Path) -> None:
    target = tmp_path / "x"
    with staged(target, overwrite=False) as folder:
        fill(folder, "old")
    with pytest.raises(RunError, match="exists already"), staged(target, overwrite=False):
        pass
    with pytest.raises(ValueError), staged(target, overwrite=True) as folder:
        fill(folder)
        raise ValueError
    assert (target / "model.bin").read_text("utf-8") == "old"
    with staged(target, overwrite=True) as folder:
        fill(folder)
    assert (target / "model.bin").read_text("utf-8") == "new" and contents(tmp_path) == ["x"]


def test_an_export_that_a_person_has_put_something_into_is_never_replaced(tmp_path: Path) -> None:
    target = tmp_path / "x"
    with staged(target, overwrite=False) as folder:
        fill(folder)
        write_json(folder / "abacist.json", RECORD | {"files": ["model.bin"]})
    with staged(target, overwrite=True) as folder:
        fill(folder)
        write_json(folder / "abacist.json", RECORD | {"files": ["model.bin"]})
    (target / "notes.md").write_text("mine", encoding="utf-8")
    with pytest.raises(RunError, match=r"it holds what no export writes: notes\.md"):
        refuse_taken(target, overwrite=True)


def test_what_is_no_export_is_never_replaced(tmp_path: Path) -> None:
    target = tmp_path / "x"
    target.mkdir()
    refuse_taken(target, overwrite=False)  # an empty folder is free
    (target / "abacist.json").write_text('{"format": "another"}', encoding="utf-8")
    for overwrite in (False, True):
        with pytest.raises(RunError):
            refuse_taken(target, overwrite=overwrite)
    with pytest.raises(RunError, match="a file is in its place"):
        refuse_taken(target / "abacist.json", overwrite=True)


def test_leavings_of_a_process_that_was_killed_are_cleared_and_of_a_live_one_are_not(
    tmp_path: Path,
) -> None:
    dead = next(n for n in range(4_000_000, 4_194_000) if not Path(f"/proc/{n}").exists())
    for number in (dead, os.getppid()):
        (tmp_path / f".x.{number}.tmp").mkdir()
    lost = tmp_path / f".x.{dead}.replaced.tmp"  # killed between the two renames
    lost.mkdir()
    fill(lost, "old")
    with pytest.raises(ValueError), staged(tmp_path / "x", overwrite=True):
        assert (tmp_path / "x" / "model.bin").read_text("utf-8") == "old"
        raise ValueError
    assert contents(tmp_path) == sorted([f".x.{os.getppid()}.tmp", "x"])


def test_an_error_between_the_two_renames_leaves_the_old_export_in_its_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "x"
    with staged(target, overwrite=False) as folder:
        fill(folder, "old")
    real = Path.rename

    def fails(self: Path, to: Path) -> Path:
        if to == target and not self.name.endswith(".replaced.tmp"):
            raise OSError(errno.EIO, "Input/output error")
        return real(self, to)

    monkeypatch.setattr(Path, "rename", fails)
    with pytest.raises(OSError, match="Input/output"), staged(target, overwrite=True) as folder:
        fill(folder)
    assert contents(tmp_path) == ["x"] and (target / "model.bin").read_text("utf-8") == "old"


@pytest.mark.parametrize("place", [".", "../here", "~/here"])
def test_a_place_is_understood_however_it_is_written(
    place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    monkeypatch.setenv("HOME", str(tmp_path))
    with staged(Path(place), overwrite=False) as folder:
        fill(folder)
    assert contents(here) == ["abacist.json", "model.bin"] and contents(tmp_path) == ["here"]
