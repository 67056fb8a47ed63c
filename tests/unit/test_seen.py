"""What a run has seen is known wherever its model lies, whatever its data is called later."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from abacist.errors import DataError, RunError
from abacist.learning.config import load_config
from abacist.learning.eval import Request, load_data
from abacist.learning.seen import run_of, seen_by, seen_in, without_seen
from abacist.learning.task import load_task
from abacist.proof.comparison.sides import load_side
from abacist.proof.overlap import Overlap
from abacist.records.provenance import build_manifest
from abacist.records.rollout import Rollout, StopReason, write_rollouts
from abacist.records.rundir import RunDir
from abacist.records.seen import SEEN_NAME, Seen
from abacist.task.problems import Problem, load_problems
from abacist.task.prompts import Shots, build_messages, save_shots
from evaluated import GOOD, evaluation, problem

Write = Callable[[str, Sequence[int]], Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Write a data file of the questions with these numbers."""

    def rows(name: str, numbers: Sequence[int]) -> Path:
        path = tmp_path / name
        lines = [
            json.dumps({"question": f"How much is {n} + 1?", "answer": str(n + 1)}) for n in numbers
        ]
        path.write_text("\n".join(lines), encoding="utf-8")
        return path

    return rows


def asked(path: Path, run: Path | None, **request: object) -> tuple[int, Overlap]:
    """How many problems of ``path`` an evaluation of ``run`` asks, and what it says of the rest."""
    wanted = Request(model="", dataset_name=str(path), **request)  # type: ignore[arg-type]
    data = load_data(wanted, {}, None if run is None else seen_by(run))
    return len(data.problems), data.overlap


def a_run(
    folder: Path, data: Path, *, record: bool = True, drawn: int = 3, **settings: object
) -> Path:
    """A finished run on ``data``, with or without a record of what it has seen."""
    settings = {"dataset_name": str(data), "eval_steps": 1, "seed": 0} | settings
    with RunDir.reserve(folder, name="r") as run:
        run.config_path.write_text(yaml.safe_dump(settings), encoding="utf-8")
        task = load_task(load_config(None, str(run.config_path), []))
        used = [*task.train, *task.selection, *task.heldout]
        run.write_manifest(build_manifest(seed=0, argv=[], problems=used))
        write_rollouts(run.rollouts_dir / "a.parquet", [reply_to(p) for p in task.train[:drawn]])
        if record:
            seen_in(task, Path(str(settings.get("model_name_or_path")))).write(folder)
    return folder


def reply_to(problem: Problem) -> Rollout:
    return Rollout("r", 1, "train", 0, 0, build_messages(problem.question), "", [], 1, 0,
                   StopReason.EMPTY)  # fmt: skip


def test_rows_a_run_was_trained_on_are_left_out_and_counted_whatever_the_file_is_called(
    tmp_path: Path, write: Write
) -> None:
    run = a_run(tmp_path / "run", write("mine.jsonl", range(29)))
    (tmp_path / "mine.jsonl").unlink()  # the data may be gone
    num_asked, overlap = asked(write("other.jsonl", range(20, 40)), run)
    heldout = 29 - sum(len(seen_by(run).keys[kind]) for kind in ("train", "selection"))  # type: ignore[union-attr]
    assert 11 <= num_asked <= 11 + heldout
    assert overlap.looked_at == 20 == num_asked + len(overlap.kinds)
    assert f"seen {20 - num_asked} (" in overlap.sentence and "left out" in overlap.sentence
    assert overlap.to_json()["seen"] == overlap.counts["train"] + overlap.counts["selection"]


def test_questions_are_known_again_in_other_spelling_and_not_in_other_words(
    tmp_path: Path, write: Write
) -> None:
    run = a_run(tmp_path / "run", write("mine.jsonl", range(29)))
    seen = load_problems(tmp_path / "mine.jsonl", split="train")[0].question
    other = tmp_path / "other.jsonl"
    texts = [f"  {seen.upper()}\n", seen.replace("How much", "What"), seen + " Say why."]
    rows = [json.dumps({"question": text, "answer": "1"}) for text in texts]
    other.write_text("\n".join(rows), encoding="utf-8")
    num_asked, overlap = asked(other, run)
    assert num_asked == 2 and len(overlap.kinds) == 1


def test_new_data_and_a_model_that_is_no_run_lose_nothing(tmp_path: Path, write: Write) -> None:
    run = a_run(tmp_path / "run", write("mine.jsonl", range(29)))
    num_asked, overlap = asked(write("new.jsonl", range(50, 60)), run)
    assert num_asked == 10 and overlap.sentence == ""
    assert asked(tmp_path / "mine.jsonl", tmp_path) == (29, Overlap(29))
    assert asked(tmp_path / "mine.jsonl", None) == (29, Overlap(29))


def test_a_limit_counts_what_is_left_and_all_seen_is_an_error_with_a_way_on(
    tmp_path: Path, write: Write
) -> None:
    run = a_run(tmp_path / "run", write("mine.jsonl", range(29)))
    mixed = write("mixed.jsonl", range(0, 60))
    num_asked, overlap = asked(mixed, run, num_problems=25)
    assert num_asked == 25 and overlap.looked_at == 60
    num_asked, overlap = asked(mixed, run, num_problems=25, include_seen=True)
    assert num_asked == 25 == overlap.looked_at and not overlap.is_left_out
    with pytest.raises(DataError, match="has seen all") as caught:
        asked(tmp_path / "mine.jsonl", run, split="train")
    assert "--include_seen" in caught.value.hint
    assert asked(tmp_path / "mine.jsonl", run, split="train", include_seen=True)[0] > 20


def test_everything_inside_a_run_and_a_model_with_its_record_count_as_the_run(
    tmp_path: Path, write: Write
) -> None:
    run = a_run(tmp_path / "run", write("mine.jsonl", range(29)))
    for inside in ("checkpoint-4", "export/merged"):
        (run / inside).mkdir(parents=True)
        assert seen_by(run / inside) == seen_by(run)
    assert run_of(run / "export/merged") == run and run_of(tmp_path) is None
    copied = tmp_path / "elsewhere"
    copied.mkdir()
    assert seen_by(copied) is None
    shutil.copy(run / SEEN_NAME, copied)
    assert seen_by(copied) == seen_by(run)


def test_an_adapter_has_seen_what_its_base_has(tmp_path: Path, write: Write) -> None:
    first = a_run(tmp_path / "first", write("first.jsonl", range(29)))
    second = a_run(tmp_path / "second", write("second.jsonl", range(100, 129)))
    base = {"base_model_name_or_path": str(first)}
    (second / "adapter_config.json").write_text(json.dumps(base), encoding="utf-8")
    only_own = Seen.read(second)
    assert only_own is not None and (found := seen_by(second)) is not None
    assert found.keys["train"] == only_own.keys["train"] | seen_by(first).keys["train"]  # type: ignore[union-attr]
    (first / "adapter_config.json").write_text(
        json.dumps({"base_model_name_or_path": str(second)}), encoding="utf-8"
    )
    assert seen_by(second) == found, "a circle ends"


def test_a_run_made_before_there_was_a_record_is_asked_through_its_data(
    tmp_path: Path, write: Write
) -> None:
    data = write("mine.jsonl", range(29))
    with_record = a_run(tmp_path / "new", data)
    without = a_run(tmp_path / "old", data, record=False)
    assert seen_by(without) == seen_by(with_record)
    began_from = a_run(
        tmp_path / "next", write("b.jsonl", range(50, 79)), record=False,
        model_name_or_path=str(without),
    )  # fmt: skip
    assert asked(data, began_from) == asked(data, without)


@pytest.mark.parametrize("becomes_of_it", ["gone", "other rows"])
def test_where_that_data_is_no_longer_what_it_was_its_rollouts_are_the_least_it_has_seen(
    becomes_of_it: str, tmp_path: Path, write: Write
) -> None:
    run = a_run(tmp_path / "old", write("mine.jsonl", range(29)), record=False, drawn=4)
    shot = Problem("s", "How much is 3 + 1?", "3 + 1 = 4", "4", 1)
    save_shots(run / "shots.jsonl", Shots((shot,)))
    (tmp_path / "mine.jsonl").unlink()
    if becomes_of_it == "other rows":
        write("mine.jsonl", range(100, 130))
    num_asked, overlap = asked(write("copy.jsonl", range(29)), run)
    assert 29 - num_asked in (4, 5), "four were drawn, one of which may be the example"
    assert not overlap.is_complete
    assert "at least" in overlap.sentence and "There may be more" in overlap.sentence


def test_a_damaged_record_is_refused_and_a_strangers_file_of_that_name_is_not_read(
    tmp_path: Path, write: Write
) -> None:
    run = a_run(tmp_path / "run", write("mine.jsonl", range(29)))
    record = run / SEEN_NAME
    whole = json.loads(record.read_text(encoding="utf-8"))
    for text in (
        "{",
        json.dumps(whole | {"train": None}),
        json.dumps(whole | {"format_version": 9}),
    ):
        record.write_text(text, encoding="utf-8")
        with pytest.raises(RunError, match=r"seen\.json"):
            seen_by(run)
    record.write_text('{"films": 3}', encoding="utf-8")
    assert (found := seen_by(run)) is not None and found.is_complete, "read from the data"


def test_a_held_out_problem_that_stands_in_the_examples_is_not_measured(
    tmp_path: Path, write: Write
) -> None:
    data = write("mine.jsonl", range(29))
    held_out = load_problems(data, split="heldout")
    shots = [replace(one, solution="So it is.") for one in held_out[:1]]
    save_shots(tmp_path / "shots.jsonl", Shots(tuple(shots)))
    settings = {"dataset_name": str(data), "eval_steps": 1, "num_shots": "1"}
    config = tmp_path / "config.yaml"
    for shots_file, left in ((tmp_path / "shots.jsonl", len(held_out) - 1), (None, len(held_out))):
        more = {"num_shots": "0"} if shots_file is None else {"shots_file": str(shots_file)}
        config.write_text(yaml.safe_dump(settings | more), encoding="utf-8")
        assert len(load_task(load_config(None, str(config), [])).heldout) == left


# Comparisons


def test_a_comparison_leaves_out_what_either_side_has_seen(tmp_path: Path) -> None:
    problems = [problem(number) for number in range(6)]
    seen = Seen.of([problems[0].question], [], [problems[1].question])
    overlap = Overlap.of(problems, seen, leave_out=True)
    new = evaluation([GOOD] * 4, problems[2:])
    evaluation([GOOD] * 6, problems).save(tmp_path / "base")
    replace(new, overlap=overlap).save(tmp_path / "run")
    sides, note = without_seen([load_side(str(tmp_path / name)) for name in ("base", "run")])
    assert [len(side.evaluation.problems) for side in sides] == [4, 4]
    assert len(sides[0].evaluation.rollouts) == 4
    assert "2 of 6 problems seen in training" in note and "run" in note

    several = replace(
        evaluation([[GOOD] * 2] * 6, problems), overlap=replace(overlap, is_left_out=False)
    )
    several.save(tmp_path / "asked")
    sides, note = without_seen([load_side(str(tmp_path / name)) for name in ("asked", "base")])
    assert [len(side.evaluation.rollouts) for side in sides] == [8, 4]
    everything = Overlap.of(problems, Seen.of([p.question for p in problems]), leave_out=False)
    replace(several, overlap=everything).save(tmp_path / "asked")
    with pytest.raises(DataError, match="Nothing new is left"):
        without_seen([load_side(str(tmp_path / name)) for name in ("asked", "base")])


def test_an_older_evaluation_in_a_run_is_checked_and_its_verdict_is_trusted(
    tmp_path: Path, write: Write
) -> None:
    run = a_run(tmp_path / "run", write("mine.jsonl", range(29)))
    everything = load_problems(tmp_path / "mine.jsonl", split="all")
    found = evaluation([GOOD] * 29, everything)
    found.save(run / "evals" / "mine-all-001")
    found.save(run / "evals" / "before")
    assert found.overlap is None
    ((side,), note) = without_seen([load_side(str(run / "evals" / "mine-all-001"))])
    heldout = {one.problem_id for one in load_problems(tmp_path / "mine.jsonl", split="heldout")}
    assert {one.problem_id for one in side.evaluation.problems} == heldout
    assert "seen in training" in note
    ((side,), note) = without_seen([load_side(str(run / "evals" / "before"))])
    assert len(side.evaluation.problems) == 29 and note == ""


def test_variants_of_seen_problems_count_as_seen() -> None:
    problems = [problem(number) for number in range(3)]
    overlap = Overlap.of(problems, Seen.of([problems[1].question]), leave_out=False)
    variants = [replace(one, problem_id=f"{one.problem_id}~7") for one in problems[1:]]
    assert overlap.of_variants(7, variants) == Overlap(2, {"p001~7": "train"}, is_left_out=False)


def test_an_overlap_comes_back_as_it_was_kept(tmp_path: Path) -> None:
    overlap = Overlap(9, {"p000": "example"}, is_left_out=False, is_complete=False)
    replace(evaluation([GOOD]), overlap=overlap).save(tmp_path)
    assert load_side(str(tmp_path)).evaluation.overlap == overlap
    assert load_side(str(tmp_path)).evaluation.to_json()["seen"]["seen"] == 1


def test_a_run_is_asked_the_problems_of_its_verdict_though_rows_without_a_gold_were_left_out(
    tmp_path: Path,
) -> None:
    data = tmp_path / "mine.jsonl"
    rows = [
        {"question": f"How much is {n} + 1?", "answer": "unknown" if n % 7 == 0 else str(n + 1)}
        for n in range(400)
    ]
    data.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    run = a_run(tmp_path / "run", data, skip_bad_rows=True, num_heldout_problems=12)
    settings = RunDir(run).read_settings()
    verdict = load_task(load_config(None, str(run / "config.yaml"), [])).heldout
    found = load_data(Request(model=str(run)), settings, seen_by(run)).problems
    assert [one.problem_id for one in found] == [one.problem_id for one in verdict]
    assert len(found) == 12 and all(one.answer for one in found)
