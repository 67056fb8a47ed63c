"""Whatever is changed in a bundle is named: where, and how."""

from __future__ import annotations

import hashlib
import json
import re
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

import bundles
from abacist.delivery import archive
from abacist.delivery.bundle import Bundle, bundle
from abacist.delivery.verify import Request, verify
from abacist.records.rollout import read_rollouts
from bundles import (
    Edit,
    Members,
    edit_json,
    edit_line,
    edit_rows,
    edit_settings,
    edit_table,
    faults_of,
    tampered,
)

pytestmark = pytest.mark.slow

AFTER, BEFORE = "run/evals/after/", "run/evals/before/"
STEP = "run/rollouts/step-000002.parquet"  # written by checkpoint-1
FIRST = "run/rollouts/step-000001.parquet"
METRICS, VERDICT = "run/metrics.jsonl", "run/evals/verdict.json"
OPENINGS = "run/openings.jsonl"


# Whoever tampers makes all sums anew; what is named stands beside each.


def _set(name: str, value: Any, row: int = 0) -> Callable[[list[dict[str, Any]]], None]:
    def change(rows: list[dict[str, Any]]) -> None:
        rows[row][name] = value(rows[row][name]) if callable(value) else value

    return change


def _another_answer(rows: list[dict[str, Any]]) -> None:
    """The first wrong reply becomes a right one, with all that follows from it."""
    row = next(row for row in rows if not row["is_correct"])
    row["completion"] = f"<reasoning>\n1 + 1 = 2\n</reasoning>\n<answer>\n{row['gold']}\n</answer>"
    row["read_answer"], row["is_correct"], row["reward_correctness"] = row["gold"], True, 2.0


def _right_by_decree(rows: list[dict[str, Any]]) -> None:
    next(row for row in rows if not row["is_correct"])["is_correct"] = True


def _swap_replies(rows: list[dict[str, Any]]) -> None:
    names = ("completion", "completion_ids", "completion_tokens", "stop_reason", "read_answer")
    one = next(row for row in rows if row["completion_ids"] != rows[0]["completion_ids"])
    for name in names:
        one[name], rows[0][name] = rows[0][name], one[name]


def _cut_last_token(rows: list[dict[str, Any]]) -> None:
    rows[0]["completion_ids"] = rows[0]["completion_ids"][:-1]
    rows[0]["completion_tokens"] -= 1


def _other_token(rows: list[dict[str, Any]]) -> None:
    ids = list(rows[3]["completion_ids"])
    ids[len(ids) // 2] += 1
    rows[3]["completion_ids"] = ids


def _drop_a_problem(index: dict[str, Any], members: Members) -> None:
    """A problem that was lost is left out of the evaluation after training."""
    edit_rows(AFTER + "rollouts.parquet", lambda rows: rows.pop(0) and None)(index, members)
    edit_json(AFTER + "evaluation.json", lambda it: it["problems"].pop(0) and None)(index, members)


def _flip_a_weight(role: str) -> Edit:
    """A bit of an adapter, high in its exponent; its name and the table follow."""

    def edit(index: dict[str, Any], members: Members) -> None:
        old = index["weights"][role][0]["sha256"]
        data = bytearray(members.pop(f"weights/{old}.safetensors"))
        (header,) = struct.unpack("<Q", data[:8])
        at = 8 + header + (len(data) - 8 - header) // 2 // 4 * 4
        data[at + 3] = (data[at + 3] & 0x80) | 0x42  # a weight of some dozens
        new = archive.sha256_of(bytes(data))
        members[f"weights/{new}.safetensors"] = bytes(data)
        for files in index["weights"].values():
            for one in files:
                one["sha256"] = new if one["sha256"] == old else one["sha256"]

    return edit


def _swap_weights(index: dict[str, Any], members: Members) -> None:
    table = index["weights"]
    table["final"], table["checkpoint-1"] = table["checkpoint-1"], table["final"]


def _other_stream(index: dict[str, Any], members: Members) -> None:
    members["streams/checkpoint-1.bin"] = members["streams/checkpoint-0.bin"]


def _trained_on_the_test(index: dict[str, Any], members: Members) -> None:
    """The run's record says that nothing but the first questions was seen."""
    edit_json("run/seen.json", lambda it: it.update(train=it["train"][:1]))(index, members)


def _easier_gold(index: dict[str, Any], members: Members) -> None:
    """The gold of a problem becomes what was answered, in all files."""
    wrong: dict[str, Any] = {}

    def rows(rows: list[dict[str, Any]]) -> None:
        row = next(row for row in rows if not row["is_correct"] and row["read_answer"])
        row["gold"], row["is_correct"] = row["read_answer"], True
        wrong.update(row)

    def problems(document: Any) -> None:
        for one in document["problems"]:
            if one["problem_id"] == wrong["problem_id"]:
                one["answer"] = wrong["read_answer"]

    edit_rows(BEFORE + "rollouts.parquet", rows)(index, members)
    edit_json(BEFORE + "evaluation.json", problems)(index, members)


def _date(by: str, date: str) -> Edit:
    def change(record: Any) -> None:
        next(entry for entry in record if entry["by"] == by)["date"] = date

    return edit_json("opened.json", change)


def _hide_an_evaluation(index: dict[str, Any], members: Members) -> None:
    edit_json("opened.json", lambda it: it.remove(
        next(entry for entry in it if entry["split"] == "selection")))(index, members)  # fmt: skip


def _without_opening(number: int, *, anew: bool) -> Edit:
    """One line of the record of openings gone; ``anew``: the chain of hashes made again."""

    def edit(index: dict[str, Any], members: Members) -> None:
        lines = members[OPENINGS].splitlines()
        del lines[number]
        members[OPENINGS] = _chained(lines) if anew else b"".join(line + b"\n" for line in lines)

    return edit


def _chained(lines: list[bytes]) -> bytes:
    """The lines with the hash in each of the one before, as if they had always been these."""
    previous, made = None, []
    for line in lines:
        made.append(json.dumps(json.loads(line) | {"previous": previous}, sort_keys=True).encode())
        previous = hashlib.sha256(made[-1]).hexdigest()[:16]
    return b"".join(line + b"\n" for line in made)


def _other_opening(number: int, name: str, value: Any) -> Edit:
    """Another value in a line of the record, and the chain of hashes made again."""

    def edit(index: dict[str, Any], members: Members) -> None:
        lines = members[OPENINGS].splitlines()
        lines[number] = json.dumps(json.loads(lines[number]) | {name: value}).encode()
        members[OPENINGS] = _chained(lines)

    return edit


def _verdict(*path: str, value: Any) -> Edit:
    def change(document: Any) -> None:
        for name in path[:-1]:
            document = document[name]
        document[path[-1]] = value

    return edit_json(VERDICT, change)


ROLLOUTS = AFTER + "rollouts.parquet"


def _cut_log(index: dict[str, Any], members: Members) -> None:
    """Everything of the second step is gone from the log."""
    lines = members[METRICS].decode().splitlines()
    kept = [line for line in lines if json.loads(line)["step"] == 1]
    members[METRICS] = ("\n".join(kept) + "\n").encode()


def _with_an_invented_reward(table: pa.Table) -> pa.Table:
    paid = pa.array([9.0] * table.num_rows, pa.float64())
    return table.append_column("reward_brilliance", paid)


# By name: the edit, whether a replay is needed to see it, and what must be named.
TAMPERINGS: dict[str, tuple[Edit, bool, str]] = {
    "the text of a verdict reply": (
        edit_rows(ROLLOUTS, _another_answer), True, r"replay: .*after/rollouts.*, completion: "),
    "a reply judged right by decree": (
        edit_rows(ROLLOUTS, _right_by_decree), False, r"after/rollouts.*is_correct: claimed True"),
    "a token of a verdict reply": (
        edit_rows(ROLLOUTS, _other_token), True, r"replay: .*after/roll.*reply 1, token \d+ of"),
    "a token of a sampled reply": (
        edit_rows("run/evals/before-sampled/rollouts.parquet", _other_token), True,
        r"replay: .*before-sampled.*token \d+ of"),
    "a token of a training rollout": (
        edit_rows(STEP, _other_token), True, r"replay: .*step 2, group 0, member 3, token \d+ of"),
    "the end of a reply cut off": (
        edit_rows(ROLLOUTS, _cut_last_token), True, r"replay: .*completion_ids: .*stop token"),
    "two rollouts exchanged": (
        edit_rows(STEP, _swap_replies), True, r"replay: .*step 2, group 0, member 0, token \d+"),
    "a reward": (
        edit_rows(FIRST, _set("reward_correctness", lambda paid: 2.0 - paid)), False,
        r"training: .*step-000001.*group 0, member 0, reward correctness: claimed"),
    "the sum of the rewards": (
        edit_rows(FIRST, _set("reward", lambda paid: paid + 0.25, 2)), False,
        r"training: .*step 1, group 0, member 2, reward: claimed"),
    "an advantage": (
        edit_rows(STEP, _set("advantage", lambda value: -value - 0.5, 5)), False,
        r"training: .*step 2, group 1, member 1, advantage: claimed"),
    "an answer that was read": (
        edit_rows(FIRST, _set("read_answer", "12345")), False, r"read_answer: claimed 12345"),
    "a logged reward": (
        edit_line(METRICS, 0, lambda row: row.update(reward=3.9)), False,
        r"training: .*metrics.jsonl, step 1, reward: claimed 3.9, found"),
    "a logged length": (
        edit_line(METRICS, 0, lambda row: row.update({"completions/mean_length": 1.5})), False,
        r"step 1, completions/mean_length: claimed 1.5"),
    "a logged count of tokens": (
        edit_line(METRICS, 0, lambda row: row.update(num_tokens=17.0)), False,
        r"step 1, num_tokens: claimed 17, found"),
    "a logged count that is off by one": (
        edit_line(METRICS, 0, lambda row: row.update(num_tokens=row["num_tokens"] + 1)), False,
        r"step 1, num_tokens: claimed"),
    "a logged reward left out": (
        edit_line(METRICS, 0, lambda row: row.pop("reward") and None), False,
        r"metrics.jsonl, step 1, reward: claimed nothing"),
    "a logged step far off": (
        edit_line(METRICS, 0, lambda row: row.update(step=10**15)), False,
        r"metrics.jsonl, steps 1 to 1000000000000000: claimed one line"),
    "a logged step that is no whole number": (
        edit_line(METRICS, 0, lambda row: row.update(step=1.0)), False,
        r"metrics.jsonl, line 1, step: claimed 1"),
    "the last lines of the log cut off": (
        _cut_log, False, r"metrics.jsonl, steps 2 to 2: claimed no line"),
    "a reward invented": (
        edit_table(ROLLOUTS, _with_an_invented_reward), False,
        r"verdict: .*reward brilliance: claimed a reward"),
    "the difficulty of a reply": (
        edit_rows(ROLLOUTS, _set("difficulty", 9)), False, r"difficulty: claimed 9"),
    "the seed of the run": (
        edit_json("run/manifest.json", lambda it: it.update(seed=5)), False,
        r"run: run/manifest.json, seed: claimed 5"),
    "the number of held-out problems": (
        edit_json("run/manifest.json", lambda it: it["task"]["problems"].update(heldout=999)),
        False, r"data: run/manifest.json, task.problems.heldout: claimed 999"),
    "the base in the index": (
        lambda index, members: index["run"].update(base="Qwen/Qwen2.5-72B"), False,
        r"run: bundle.json, run.base: claimed Qwen"),
    "the accuracy in the verdict": (
        _verdict("after", "figures", "correct", "value", value=0.99), False,
        r"verdict: .*verdict.json, after.figures.correct.value: claimed 0.99, found"),
    "a bound of an interval": (
        _verdict("changes", "correct", "low", value=0.11), False, r"changes.correct.low: claimed"),
    "the p-value of the test": (
        _verdict("paired", "accuracy", "p_value", value=1e-9), False, r"paired.accuracy.p_value"),
    "a figure of an evaluation": (
        edit_json(AFTER + "evaluation.json",
                  lambda it: it["evaluation"]["figures"]["strict"].update(high=0.5)), False,
        r"after/evaluation.json, figures.strict.high: claimed 0.5"),
    "a problem left out": (_drop_a_problem, False, r"after/evaluation.json, .*problems"),
    "a gold": (_easier_gold, False, r"data: .*before/evaluation.json, problem .*answer: claimed"),
    "a question": (
        edit_json(AFTER + "evaluation.json",
                  lambda it: it["problems"][2].update(question="How much is 1 + 1?")), False,
        r"data: .*question: claimed How much is 1 \+ 1\?"),
    "a date before what it follows": (
        _date("evals/after", "2020-01-01T00:00:00Z"), False,
        r"splits: opened.json, evals/after, date: claimed 2020-01-01"),
    "a date to come": (
        _date("evals/after-sampled", "2199-01-01T00:00:00Z"), False, r"date: .*a day to come"),
    "an opening taken out": (
        _without_opening(3, anew=False), False,
        r"splits: run/openings.jsonl, line 4: claimed to follow .*altered or removed"),
    "the date of an opening": (
        edit_line(OPENINGS, 0, lambda it: it.update(time="2026-01-01T00:00:00Z")), False,
        r"splits: run/openings.jsonl, line 2: claimed to follow"),
    "the opening of the verdict, with a chain anew": (
        _without_opening(5, anew=True), False,
        r"splits: run/openings.jsonl, evals/after: claimed every opening, found no line"),
    "an opening of the selection split, with a chain anew": (
        _without_opening(4, anew=True), False,
        r"splits: run/openings.jsonl, selection after step 2: .* found no line of this one"),
    "the opening of the training split, with a chain anew": (
        _without_opening(2, anew=True), False, r"openings.jsonl, training: .* found no line"),
    "how many problems were asked": (
        _other_opening(5, "problems", 9), False,
        r"openings.jsonl, line 6, .*: claimed 9, found 10"),
    "an opening of a day to come": (
        _other_opening(6, "time", "2199-01-01T00:00:00Z"), False, r"line 7, time: .*day to come"),
    "an opening that was not made": (
        _other_opening(4, "step", 7), False, r"line 5, step: claimed 7, found no such measurement"),
    "the record of openings": (
        lambda index, members: members.pop(OPENINGS) and None, False,
        r"splits: run/openings.jsonl: claimed the record that the manifest names"),
    "a measurement hidden": (_hide_an_evaluation, False, r"opened.json, selection, steps"),
    "the record of what was seen": (_trained_on_the_test, False, r"run/seen.json, train"),
    "the temperature": (edit_settings("temperature: 1.0", "temperature: 0.6"), True,
                        r"replay: .*step 2, group .*token"),
    "the seed of the data": (edit_settings("seed: 0", "seed: 7"), False, r"data.sha256: claimed"),
    "the prompt": (edit_settings("system_prompt: none", "system_prompt: Be brief."), False,
                   r"verdict: .*settings.system_prompt: claimed nothing, found Be brief"),
    "the fingerprint of the data": (
        edit_json("run/manifest.json", lambda it: it["data"].update(sha256="0" * 64)), False,
        r"data: run/manifest.json, data.sha256"),
    "narrower numbers than the settings say": (
        edit_json("run/manifest.json", lambda it: it.update(dtype="bfloat16")), True,
        r"replay: run/manifest.json, dtype: claimed .?bfloat16"),
    "a byte of the trained adapter": (_flip_a_weight("final"), True, r"replay: .*evals/after"),
    "a byte of a checkpoint's adapter": (
        _flip_a_weight("checkpoint-1"), True, r"replay: .*step 2, group"),
    "adapters exchanged": (_swap_weights, True, r"replay: .*evals/after"),
    "the random stream": (_other_stream, True, r"replay: .*step 2, group .*token 1"),
    "a step that was not made": (
        lambda index, members: members.update({"run/rollouts/step-000009.parquet": members[FIRST]}),
        False, r"training: run/rollouts/step-000009.parquet, .*step: claimed 1, found 9"),
    "a verdict removed": (
        lambda index, members: members.pop(VERDICT) and None, False, r"verdict.json: claimed"),
}  # fmt: skip


@pytest.mark.parametrize("name", TAMPERINGS)
def test_what_is_tampered_with_is_named_although_its_sums_are_made_anew(
    name: str, short_bundle: Bundle, tmp_path: Path
) -> None:
    edit, needs_replay, named = TAMPERINGS[name]
    file = tampered(short_bundle.path, tmp_path / "x.bundle.zip", edit, anew=True)
    found = verify(Request(file, replies=2**31 if needs_replay else 0))
    assert not found.holds
    assert {check.name: check.holds for check in found.checks}["files"], "the sums fit"
    assert re.search(named, faults_of(found)), faults_of(found)


@pytest.mark.parametrize("name", TAMPERINGS)
def test_what_is_tampered_with_is_named_by_its_file_where_the_sums_stay(
    name: str, short_bundle: Bundle, tmp_path: Path
) -> None:
    edit, _, _ = TAMPERINGS[name]
    file = tampered(short_bundle.path, tmp_path / "x.bundle.zip", edit, anew=False)
    contents = archive.read(file)
    was = archive.read(short_bundle.path)
    differing = {
        member
        for member in was.members.keys() | contents.members.keys()
        if was.members.get(member) != contents.members.get(member)
    }
    assert {member for member, _, _ in contents.altered} == differing
    # An edit of the index alone shows by the fingerprint.
    assert differing or contents.fingerprint != short_bundle.fingerprint


# Runs that pay steps.


@pytest.fixture(scope="module")
def paying(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """A bundle of a short run with step rewards, whose replies show steps."""
    folder = tmp_path_factory.mktemp("paying")
    run = bundles.short_run(folder / "run", "--step_reward_weight", "1")
    steps = [step for one in read_rollouts(run / "rollouts") for step in one.steps or ()]
    assert len(steps) > 20
    return bundle(run, folder / "run.bundle.zip")


def test_steps_are_paid_again_by_the_worked_solutions_of_the_data(paying: Bundle) -> None:
    found = verify(Request(paying.path, replies=0))
    assert found.holds, faults_of(found)
    data = {check.name: check for check in found.checks}["data"]
    assert "steps of replies paid again by their worked solutions" in data.looked_at
    assert not data.not_checked


def _first_step(**changes: Any) -> Edit:
    """Other values of the first step of the first reply that has one."""

    def change(rows: list[dict[str, Any]]) -> None:
        next(row for row in rows if row["steps"])["steps"][0].update(changes)

    return edit_rows(STEP, change)


def _without_a_step(rows: list[dict[str, Any]]) -> None:
    next(row for row in rows if row["steps"])["steps"].pop()


def _other_outcome(rows: list[dict[str, Any]]) -> None:
    """A right step that is said to be wrong, or a wrong one that is said to be right."""
    judged = (step for row in rows for step in row["steps"] if step["reward"] is not None)
    step = next(judged)
    step["reward"] = 1.0 - step["reward"]


STEP_TAMPERINGS = {
    "what a step earned": (
        edit_rows(STEP, _other_outcome),
        r"data: .*step-000002.*step 2, group \d, member \d, step \d of its reasoning, reward: "
        r"claimed (1, found 0|0, found 1)"),
    "a step that is said not to be judged": (
        _first_step(reward=None), r"data: .*step 1 of its reasoning, reward: claimed not judged"),
    "where a step begins": (
        _first_step(start=2), r"data: .*step 1 of its reasoning, characters: claimed \(2, "),
    "where a step ends": (
        _first_step(end=10**6), r"data: .*step 1 of its reasoning, characters: .*1000000"),
    "a step taken out": (edit_rows(STEP, _without_a_step), r"data: .*number of steps: claimed"),
    "the logged share of right steps": (
        edit_line(METRICS, 0, lambda row: row.update(step_reward=0.999)),
        r"training: .*metrics.jsonl, step 1, step_reward: claimed 0.999, found"),
}  # fmt: skip


@pytest.mark.parametrize("name", STEP_TAMPERINGS)
def test_a_step_that_was_tampered_with_is_named(paying: Bundle, tmp_path: Path, name: str) -> None:
    edit, named = STEP_TAMPERINGS[name]
    found = verify(Request(tampered(paying.path, tmp_path / "x.zip", edit, anew=True), replies=0))
    assert re.search(named, faults_of(found)), faults_of(found)
    counts = {check.name: check.num_faults for check in found.checks}
    assert counts[named.partition(":")[0]] == 1


def test_steps_are_said_not_to_be_checked_where_the_solutions_or_the_steps_are_not_at_hand(
    paying: Bundle, tmp_path: Path
) -> None:
    other_data = edit_settings("dataset_name: generated", "dataset_name: mine.jsonl")
    elsewhere = tampered(paying.path, tmp_path / "a.zip", other_data, anew=True)

    without_steps = edit_table(FIRST, lambda table: table.drop_columns(["steps"]))
    unkept = tampered(paying.path, tmp_path / "b.zip", without_steps, anew=True)
    said = []
    for path in (elsewhere, unkept):
        found = verify(Request(path, replies=0))
        said.append({check.name: check.not_checked for check in found.checks}["data"])
    assert any("steps of 32 replies were paid, which takes the data's" in one for one in said[0])
    assert any("steps of 16 replies were paid: their rollouts do not" in one for one in said[1])


def test_of_a_run_that_pays_no_steps_nothing_is_said_of_them(
    short_bundle: Bundle, tmp_path: Path
) -> None:
    other_data = edit_settings("dataset_name: generated", "dataset_name: mine.jsonl")
    elsewhere = tampered(short_bundle.path, tmp_path / "a.zip", other_data, anew=True)
    found = verify(Request(elsewhere, replies=0))
    (data,) = [check for check in found.checks if check.name == "data"]
    assert data.looked_at == "not loaded" and len(data.not_checked) == 1
