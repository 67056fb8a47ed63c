"""The record of when each split was opened: only added to, and an altered or missing line shows."""

from __future__ import annotations

import shutil
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest

from abacist.errors import RunError
from abacist.learning.openings import note_asked
from abacist.learning.tracking import Silent
from abacist.proof.evaluation import Evaluation
from abacist.records.openings import (
    AFTER,
    BEFORE,
    EVAL,
    EXPORT,
    OPENINGS_NAME,
    SELECTION,
    TRAINING,
    Opening,
    asked_of_the_trained,
    note_opening,
    opened_once,
    openings_in_words,
    read_openings,
    run_that_owns,
)
from abacist.records.provenance import MANIFEST_FORMAT
from abacist.records.rundir import RunDir, write_json
from abacist.task.problems import Problem
from made_runs import made_run

SELECTED = [Opening("selection", SELECTION, 4, f"checkpoint-{n}", n) for n in range(5)]
MEASURED = Opening("heldout", AFTER, 9, "final", 4, 9, "evals/after", None, "2026-11-29T10:00:00Z")


def kept(run: Path, openings: list[Opening]) -> Path:
    for one in openings:
        note_opening(run, one)
    return run / OPENINGS_NAME


def numbers(path: Path) -> list[int]:
    return [number for number, _, _ in read_openings(path)[1]]


def test_a_record_is_read_as_it_was_written_with_the_time_of_each_line(tmp_path: Path) -> None:
    found, faults = read_openings(kept(tmp_path, [*SELECTED, MEASURED]))
    assert [one.step for one in found] == [0, 1, 2, 3, 4, 4] and faults == []
    assert found[-1] == MEASURED and all(one.time.endswith("Z") for one in found)
    assert read_openings(tmp_path / "none") == ([], [])


@pytest.mark.parametrize("line", range(4))
def test_a_line_that_was_taken_out_shows_at_the_one_after_it(line: int, tmp_path: Path) -> None:
    path = kept(tmp_path, SELECTED)
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:line] + lines[line + 1 :]))
    assert numbers(path) == [line + 1]


@pytest.mark.parametrize("line", range(4))
def test_a_line_that_was_altered_shows_at_the_one_after_it(line: int, tmp_path: Path) -> None:
    path = kept(tmp_path, SELECTED)
    lines = path.read_bytes().splitlines(keepends=True)
    lines[line] = lines[line].replace(b'"problems": 4', b'"problems": 5')
    path.write_bytes(b"".join(lines))
    assert numbers(path) == [line + 2]


@pytest.mark.parametrize(
    "text",
    [b"", b"[]", b"{}", b"nonsense", b"[" * 10_000, b'{"split": 1}', b"\xff"],
)
def test_a_line_that_is_none_is_named_and_never_raises(text: bytes, tmp_path: Path) -> None:
    path = kept(tmp_path, SELECTED[:2])
    path.write_bytes(path.read_bytes() + text + b"\n")
    assert numbers(path) == [3]


@pytest.mark.parametrize(
    ("was", "now"),
    [
        (b'"step": 4', b'"step": -1'),
        (b'"step": 4', b'"step": true'),
        (b'"split": "heldout"', b'"split": null'),
        (b"after training", b"leisure"),
        (b"2026-11-29T10:00:00Z", b"yesterday"),
        (b"2026-11-29T10:00:00Z", b"2026-11-29T10:00:00"),
    ],
)
def test_a_line_of_other_values_is_no_opening(was: bytes, now: bytes, tmp_path: Path) -> None:
    path = kept(tmp_path, [MEASURED])
    assert was in path.read_bytes()
    path.write_bytes(path.read_bytes().replace(was, now))
    assert numbers(path) == [1]


def test_half_a_line_of_a_crash_is_named_and_replaced_by_the_next_opening(tmp_path: Path) -> None:
    path = kept(tmp_path, SELECTED[:2])
    with path.open("ab") as file:
        file.write(b'{"checkpoint": "chec')
    assert numbers(path) == [3]
    note_opening(tmp_path, SELECTED[2])
    found, faults = read_openings(path)
    assert [one.step for one in found] == [0, 1, 2] and faults == []


def test_who_write_at_the_same_time_keep_one_chain(tmp_path: Path) -> None:
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda n: note_opening(tmp_path, SELECTED[n % 5]), range(40)))
    found, faults = read_openings(tmp_path / OPENINGS_NAME)
    assert len(found) == 40 and faults == []


def test_what_cannot_be_noted_is_not_opened(tmp_path: Path) -> None:
    (tmp_path / OPENINGS_NAME).mkdir()
    with pytest.raises(RunError, match="nobody would know that the split 'heldout' was opened"):
        note_opening(tmp_path, MEASURED)


BEGUN = [
    Opening("heldout", BEFORE, 9, "checkpoint-0", 0, 9, "evals/before"),
    Opening("train", TRAINING, 60, "checkpoint-0", 0),
]
SAMPLED = Opening("heldout", AFTER, 3, "final", 4, 3, "evals/after-sampled")
AGAIN = Opening("heldout", EVAL, 9, "checkpoint-2", 2, 9, None, None, "2026-11-30T10:00:00Z")
LATER = Opening("heldout", AFTER, 9, "final", 8, 9, "evals/after", None, "2026-12-01T10:00:00Z")
EXPORTED = Opening("heldout", EXPORT, 9, "final", 4, 9, None, None, "2026-12-02T10:00:00Z")
OTHER = Opening("test", EVAL, 50, "final", 4, data="openai/gsm8k")


@pytest.mark.parametrize(
    ("openings", "once", "words"),
    [
        (BEGUN, False, "the held-out problems were never put to the trained model"),
        ([*BEGUN, MEASURED, SAMPLED], True, "once, after 4 steps of training (2026-11-29)"),
        ([*BEGUN, MEASURED, MEASURED, SAMPLED], True, "once, after 4 steps"),  # begun again
        ([*BEGUN, *SELECTED, MEASURED], True, "; the selection split was measured 5 times during"),
        (
            [*BEGUN, AGAIN, MEASURED],
            False,
            "2 times: by abacist eval of checkpoint-2 (2026-11-30); after 4 steps of training (",
        ),
        ([*BEGUN, AGAIN], False, "once, by abacist eval of checkpoint-2 (2026-11-30)"),
        ([*BEGUN, AGAIN, AGAIN, MEASURED], False, "model 3 times: "),
        ([*BEGUN, MEASURED, LATER], False, "2 times: after 4 steps of training (2026-11-29); aft"),
        ([*BEGUN, MEASURED, EXPORTED], False, "; by abacist export of the final weights (2026-12"),
        ([*BEGUN, MEASURED, OTHER, OTHER], True, "; test of openai/gsm8k was opened 2 times"),
    ],
)
def test_how_often_the_verdicts_problems_were_put_to_the_trained_model_is_said(
    openings: list[Opening], once: bool, words: str
) -> None:
    assert opened_once(openings) is once
    assert words in openings_in_words(openings)
    assert all(one.purpose != BEFORE for one in asked_of_the_trained(openings))


def test_a_checkpoint_and_an_export_belong_to_their_run_and_a_copy_to_none(tmp_path: Path) -> None:
    run = tmp_path / "run"
    for folder in ("checkpoint-2", "exports/merged"):
        (run / folder).mkdir(parents=True)
    write_json(run / "manifest.json", {"format": MANIFEST_FORMAT})
    write_json(run / "checkpoint-2" / "manifest.json", {"format": "a checkpoint's own"})
    owners = {run_that_owns(run / folder) for folder in ("", "checkpoint-2", "exports/merged")}
    assert owners == {run.resolve()}
    shutil.copytree(run / "exports" / "merged", tmp_path / "copy")
    assert run_that_owns(tmp_path / "copy") is None


class Hears(Silent):
    """Keeps what is noted."""

    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)


def ask(model: Path, problems: list[Problem], watcher: Hears, **more: object) -> None:
    options: dict[str, object] = {"split": "heldout", "purpose": EVAL, "watcher": watcher, **more}
    note_asked(str(model), problems, **options)  # type: ignore[arg-type]


def test_who_asks_a_model_of_a_run_is_noted_in_the_run_and_told_whose_problems_they_were(
    tmp_path: Path,
) -> None:
    run, hears = made_run(tmp_path / "run"), Hears()
    (run / "checkpoint-2").mkdir()
    write_json(run / "checkpoint-2" / "trainer_state.json", {"global_step": 2})
    verdicts = list(Evaluation.load(RunDir(run).evals_dir / "after").problems)
    new = replace(verdicts[0], problem_id="new", question="How much is 100 + 200 this time?")
    ask(run / "checkpoint-2", [*verdicts[:3], new], hears, folder=run / "evals" / "x-001")
    ask(run, [new], hears, split="test", data="openai/gsm8k", folder=tmp_path / "elsewhere")
    data = tmp_path / "mine.jsonl"
    data.touch()
    ask(run, [new], hears, split="all", data=str(data))
    # Taken up again it is the same opening; a line that a kill prevented is made good.
    ask(run, [new], hears, folder=run / "evals" / "x-001", is_resumed=True)
    ask(run, [new], hears, folder=run / "evals" / "x-002", is_resumed=True)
    found, faults = read_openings(run / OPENINGS_NAME)
    assert faults == [] and hears.notes == []
    told = [
        (one.checkpoint, one.step, one.problems, one.of_the_verdict, one.evaluation, one.data)
        for one in found
    ]
    assert told == [
        ("checkpoint-2", 2, 4, 3, "evals/x-001", None),
        ("final", None, 1, 0, None, "openai/gsm8k"),
        ("final", None, 1, 0, None, "mine.jsonl"),
        ("final", None, 1, 0, "evals/x-002", None),
    ]
    ask(tmp_path, [new], hears)  # no run: nothing to note
    (run / OPENINGS_NAME).unlink()
    (run / OPENINGS_NAME).mkdir()
    ask(run, [new], hears)
    assert "nobody would know" in hears.notes[0]


@pytest.mark.slow
def test_a_training_notes_each_split_that_it_opens_before_it_asks(short_run: Path) -> None:
    found, faults = read_openings(short_run / OPENINGS_NAME)
    assert faults == []
    assert [(one.purpose, one.split, one.problems, one.step) for one in found] == [
        (BEFORE, "heldout", 10, 0), (BEFORE, "heldout", 3, 0), (TRAINING, "train", 60, 0),
        (SELECTION, "selection", 4, 1), (SELECTION, "selection", 4, 2),
        (AFTER, "heldout", 10, 2), (AFTER, "heldout", 3, 2),
    ]  # fmt: skip
    assert opened_once(found)
