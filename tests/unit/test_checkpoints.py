"""Checkpoints on disk: whole or not there, and never used once a byte of them has changed."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from abacist.errors import RunError, UsageError
from abacist.learning.resume import checkpoints
from abacist.learning.resume.checkpoints import (
    ASIDE,
    MANIFEST_NAME,
    checkpoints_of,
    choose,
    clear_leftovers,
    defect,
    put_in_place,
    rotate,
    run_to_resume,
    seal,
    supersede_after,
)
from faults import fault

FILES = {
    "adapter_model.safetensors": b"weights " * 40,
    "optimizer.pt": b"moments" * 30,
    "ref/adapter_model.safetensors": b"the reference",
    "empty.json": b"",
}


def make(run: Path, step: int, files: dict[str, bytes] = FILES) -> Path:
    """A sound checkpoint, saved as the trainer saves it."""
    aside = run / ASIDE / f"checkpoint-{step}"
    for name, content in files.items():
        (aside / name).parent.mkdir(parents=True, exist_ok=True)
        (aside / name).write_bytes(content)
    seal(aside, step)
    put_in_place(aside, run / f"checkpoint-{step}")
    return run / f"checkpoint-{step}"


def chosen(run: Path, wanted: str | bool = "latest") -> tuple[str | None, list[str]]:
    said: list[str] = []
    path = choose(run, wanted, said.append)
    return path and path.name, said


def halve(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def zero(path: Path) -> None:
    path.write_bytes(bytes(path.stat().st_size))


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@fault("checkpoints", "a file of a checkpoint is zeroed, halved, missing or one bit of it flipped",
       "the file; the checkpoint before it is taken", 0)  # fmt: skip
@pytest.mark.parametrize("damage", [halve, zero, flip_a_bit, Path.unlink])
@pytest.mark.parametrize("name", [name for name in FILES if FILES[name]] + ["manifest.json"])
def test_damage_to_any_file_is_seen_and_named_and_an_older_checkpoint_taken(
    tmp_path: Path, name: str, damage: Callable[[Path], None]
) -> None:
    make(tmp_path, 2)
    newest = make(tmp_path, 4)
    assert chosen(tmp_path) == ("checkpoint-4", [])
    damage(newest / name)
    taken, said = chosen(tmp_path)
    assert taken == "checkpoint-2" and len(said) == 1 and str(newest / name) in said[0]
    with pytest.raises(RunError, match="not resumed") as caught:
        choose(tmp_path, str(newest), print)
    assert str(newest / name) in caught.value.message
    assert "latest" in caught.value.hint


@given(place=st.integers(0, 10**6), bit=st.integers(0, 7))
def test_any_single_bit_that_flips_is_seen(
    tmp_path_factory: pytest.TempPathFactory, place: int, bit: int
) -> None:
    checkpoint = make(tmp_path_factory.mktemp("run"), 1)
    path = checkpoint / sorted(FILES)[place % 2 * 2]
    content = bytearray(path.read_bytes())
    if content:
        content[place % len(content)] ^= 1 << bit
        path.write_bytes(content)
        assert str(path) in str(defect(checkpoint))


@given(place=st.integers(0, 10**6), bit=st.integers(0, 7))
def test_a_bit_that_flips_in_the_manifest_is_not_blamed_on_another_file(
    tmp_path_factory: pytest.TempPathFactory, place: int, bit: int
) -> None:
    checkpoint = make(tmp_path_factory.mktemp("run"), 1)
    path = checkpoint / MANIFEST_NAME
    content = bytearray(path.read_bytes())
    content[place % len(content)] ^= 1 << bit
    path.write_bytes(content)
    assert defect(checkpoint) == f"{path} is damaged"


@fault("checkpoints", "a weights file that was not saved with a checkpoint lies in it",
       "the file; the checkpoint before it is taken", 0)  # fmt: skip
def test_a_file_that_could_be_loaded_in_place_of_a_saved_one_is_damage(tmp_path: Path) -> None:
    checkpoint = make(tmp_path, 1)
    (checkpoint / "notes.txt").write_text("mine", encoding="utf-8")
    assert defect(checkpoint) is None
    (checkpoint / "pytorch_model.bin").write_bytes(b"anything")
    assert "was not saved with it" in str(defect(checkpoint))


def test_a_checkpoint_under_another_name_is_not_sound(tmp_path: Path) -> None:
    make(tmp_path, 3).rename(tmp_path / "checkpoint-30")
    assert "belongs to step 3" in str(defect(tmp_path / "checkpoint-30"))


def test_checkpoints_go_by_number_not_by_name_or_age(tmp_path: Path) -> None:
    for step in (100, 20, 3):
        make(tmp_path, step)
    (tmp_path / "checkpoint-old").mkdir()
    assert [path.name for path in checkpoints_of(tmp_path)] == [
        "checkpoint-3", "checkpoint-20", "checkpoint-100",
    ]  # fmt: skip
    assert chosen(tmp_path, True)[0] == "checkpoint-100"


@fault("checkpoints", "no checkpoint of the run is sound", "which there are")
def test_nothing_sound_is_an_error_that_says_what_there_is(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="no sound checkpoint"):
        choose(tmp_path, True, print)
    halve(make(tmp_path, 2) / "optimizer.pt")
    with pytest.raises(RunError) as caught:
        choose(tmp_path, "latest", lambda text: None)
    assert "checkpoint-2" in caught.value.hint
    with pytest.raises(RunError, match="no such checkpoint"):
        choose(tmp_path, str(tmp_path / "checkpoint-9"), print)
    assert choose(tmp_path, None, print) is choose(tmp_path, False, print) is None


def test_no_checkpoint_is_the_kind_of_error_that_trl_raises_for_it(tmp_path: Path) -> None:
    halve(make(tmp_path, 2) / "optimizer.pt")
    for wanted in (True, "latest", str(tmp_path / "checkpoint-2"), str(tmp_path / "checkpoint-9")):
        with pytest.raises(ValueError) as caught:
            choose(tmp_path, wanted, lambda text: None)
        assert isinstance(caught.value, RunError) and caught.value.hint


@fault("stops", "SIGKILL, in the middle of a save too",
       "nothing; what is resumed is the newest sound checkpoint", 137)  # fmt: skip
@pytest.mark.parametrize("killed_after", range(12))
def test_a_kill_between_any_two_operations_of_a_save_leaves_a_sound_newest_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, killed_after: int
) -> None:
    make(tmp_path, 2, {"a.pt": b"of step 2"})
    make(tmp_path, 4, {"a.pt": b"of step 4"})
    budget = [killed_after]

    def counted(operation: Callable[..., object]) -> Callable[..., object]:
        def call(*args: object, **kwargs: object) -> object:
            if budget[0] == 0:
                raise KeyboardInterrupt("killed")
            budget[0] -= 1
            return operation(*args, **kwargs)

        return call

    with monkeypatch.context() as patch:
        for module, name in ((os, "replace"), (os, "fsync"), (shutil, "rmtree")):
            patch.setattr(module, name, counted(getattr(module, name)))
        try:
            # The same step once more, which must make way, and then a rotation.
            make(tmp_path, 4, {"a.pt": b"of step 4", "b.pt": b"more"})
            rotate(tmp_path, 1, None)
        except KeyboardInterrupt:
            pass
    clear_leftovers(tmp_path)
    assert chosen(tmp_path) == ("checkpoint-4", [])
    assert not list(tmp_path.glob(f"{ASIDE}*"))
    assert (tmp_path / "checkpoint-4" / "a.pt").read_bytes() == b"of step 4"


def test_what_a_killed_save_left_incomplete_is_removed(tmp_path: Path) -> None:
    make(tmp_path, 2)
    (tmp_path / ASIDE / "checkpoint-4").mkdir(parents=True)
    (tmp_path / ASIDE / "checkpoint-4" / "optimizer.pt").write_bytes(b"half")
    clear_leftovers(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-2"]


def test_rotation_keeps_the_newest_and_the_best(tmp_path: Path) -> None:
    for step in (2, 4, 6, 8):
        make(tmp_path, step)
    rotate(tmp_path, None, None)
    assert len(checkpoints_of(tmp_path)) == 4
    rotate(tmp_path, 2, str(tmp_path / "checkpoint-2"))
    assert [path.name for path in checkpoints_of(tmp_path)] == ["checkpoint-2", "checkpoint-8"]
    rotate(tmp_path, 1, str(tmp_path / "checkpoint-2"))  # two are kept rather than one lost
    assert [path.name for path in checkpoints_of(tmp_path)] == ["checkpoint-2", "checkpoint-8"]
    rotate(tmp_path, 1, None)
    assert [path.name for path in checkpoints_of(tmp_path)] == ["checkpoint-8"]


def test_later_checkpoints_are_kept_aside_not_deleted(tmp_path: Path) -> None:
    for step in (2, 4, 6):
        make(tmp_path, step)
    moved = supersede_after(tmp_path, 2)
    assert [path.name for path in checkpoints_of(tmp_path)] == ["checkpoint-2"]
    assert [path.name for path in moved] == ["checkpoint-4", "checkpoint-6"]
    assert all(defect(path) is None for path in moved)


def test_what_is_to_be_resumed_names_one_run(tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert run_to_resume(None, None) is run_to_resume("false", str(run)) is None
    assert run_to_resume(str(run), None) == run_to_resume("latest", str(run)) == run
    assert run_to_resume(str(run / "checkpoint-4"), str(run)) == run
    with pytest.raises(UsageError, match="of which run"):
        run_to_resume("true", None)
    with pytest.raises(UsageError, match="does not belong"):
        run_to_resume(str(run / "checkpoint-4"), str(tmp_path / "other"))


def test_every_file_is_on_disk_before_the_manifest_names_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[str] = []
    fsync, write = os.fsync, checkpoints.write_json
    monkeypatch.setattr(os, "fsync", lambda descriptor: (events.append("sync"), fsync(descriptor)))
    monkeypatch.setattr(
        checkpoints, "write_json", lambda *a: (events.append("manifest"), write(*a))
    )
    make(tmp_path, 1)
    assert events.index("manifest") >= len(FILES)
