"""Problems: every format and layout gives the same checked rows, and bad rows are named."""

from __future__ import annotations

import csv
import json
import logging
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from abacist.errors import DataError, UsageError
from abacist.task import sources
from abacist.task.answers import same_answer
from abacist.task.hub import fault
from abacist.task.problems import Problem, draw, load_problems, normalise_question

Record = dict[str, object]
GSM8K = Path(__file__).parents[3] / "shared" / "gsm8k"


def record(number: int, **more: object) -> Record:
    return {
        "question": f"Ada has {number} eggs and finds 2. How many eggs has she?",
        "answer": f"She has {number}+2=<<{number}+2={number + 2}>>{number + 2}.\n#### {number + 2}",
        **more,
    }


def write_jsonl(path: Path, records: list[Record]) -> Path:
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in records]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes("".join(lines).encode())
    return path


def write_json(path: Path, records: list[Record]) -> Path:
    path.write_text(json.dumps(records, indent=1), encoding="utf-8")
    return path


def write_csv(path: Path, records: list[Record]) -> Path:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(records[0]))
        writer.writeheader()
        writer.writerows(records)
    return path


def write_parquet(path: Path, records: list[Record]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(records), path)
    return path


def message_of(path: Path, **options: object) -> str:
    with pytest.raises(DataError) as caught:
        load_problems(path, split="all", **options)  # type: ignore[arg-type]
    return str(caught.value)


@pytest.mark.parametrize(
    ("suffix", "write"),
    [
        (".jsonl", write_jsonl),
        (".json", write_json),
        (".json", write_jsonl),
        (".csv", write_csv),
        (".parquet", write_parquet),
    ],
)
def test_every_format_gives_the_same_problems(
    tmp_path: Path, suffix: str, write: Callable[[Path, list[Record]], Path]
) -> None:
    rows = [record(n) for n in range(5)]
    problems = load_problems(write(tmp_path / f"data{suffix}", rows), split="all")
    assert problems == load_problems(write_jsonl(tmp_path / "same.jsonl", rows), split="all")
    assert [p.answer for p in problems] == ["2", "3", "4", "5", "6"]
    assert problems[0].solution == "She has 0+2=<<0+2=2>>2."


@pytest.mark.parametrize(
    "layout",
    ["train.jsonl", "data/train.jsonl", "train/any.jsonl", "main/train.jsonl", "odd/train.jsonl"],
)
def test_a_folder_may_be_laid_out_in_any_usual_way(tmp_path: Path, layout: str) -> None:
    write_jsonl(tmp_path / layout, [record(n) for n in range(4)])
    write_jsonl(tmp_path / layout.replace("train", "test"), [record(9)])
    (tmp_path / "README.md").write_text("a card", encoding="utf-8")
    assert len(load_problems(tmp_path, split="all")) == 4
    assert [p.answer for p in load_problems(str(tmp_path), split="test")] == ["11"]


def test_shards_are_read_in_order_and_a_missing_one_is_named(tmp_path: Path) -> None:
    shards = [tmp_path / "main" / f"train-0000{n}-of-00003.parquet" for n in range(3)]
    for number, shard in enumerate(shards):
        write_parquet(shard, [record(number)])
    assert [p.answer for p in load_problems(tmp_path, split="all")] == ["2", "3", "4"]
    shards[1].unlink()
    assert "of 3 shards only these are there" in message_of(tmp_path)


def test_two_files_for_one_split_are_refused(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "train.jsonl", [record(1)])
    write_csv(tmp_path / "train.csv", [record(2)])
    assert "several files claim the same split: train.csv, train.jsonl" in message_of(tmp_path)


def test_of_several_configs_one_must_be_chosen_unless_one_is_main(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "easy" / "train.jsonl", [record(1)])
    write_jsonl(tmp_path / "hard" / "train.jsonl", [record(2)])
    assert "easy, hard" in message_of(tmp_path)
    (hard,) = load_problems(tmp_path, split="all", dataset_config="hard")
    assert hard.answer == "4"
    write_jsonl(tmp_path / "main" / "train.jsonl", [record(3)])
    (main,) = load_problems(tmp_path, split="all")
    assert main.answer == "5"


def test_a_folder_without_the_split_says_what_it_holds(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "train.jsonl", [record(n) for n in range(3)])
    with pytest.raises(DataError, match="no file for the split 'test'; it holds train"):
        load_problems(tmp_path, split="test")
    write_jsonl(tmp_path / "validation.jsonl", [record(7)])
    assert len(load_problems(tmp_path, split="test", test_split="validation")) == 1


def test_a_single_file_has_no_test_split(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "mine.jsonl", [record(n) for n in range(3)])
    with pytest.raises(DataError, match="no test split"):
        load_problems(path, split="test")


def test_the_train_file_is_enough_for_every_split_but_test(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "train.jsonl", [record(n) for n in range(60)])
    (tmp_path / "test.jsonl").write_text("this is never read", encoding="utf-8")
    for split in ("train", "selection", "heldout", "all"):
        assert load_problems(tmp_path, split=split)


BAD_LINES = {
    b'{"question": "How many?", "answer": "2+2=4\\n####': "is not valid JSON",
    b'{"question": "caf\xe9?", "answer": "#### 4"}': "is not valid UTF-8 (byte 0xE9, “é” in W",
    b'["How many?", "#### 4"]': "holds a list, not an object",
    b'{"question": "How many?", "solution": "#### 4"}': "has no column 'answer' (its columns: que",
    b'{"question": null, "answer": "#### 4"}': "has an empty 'question'",
    b'{"question": " \\n ", "answer": "#### 4"}': "has an empty 'question'",
    b'{"question": ["How many?"], "answer": "#### 4"}': "has a list in 'question', not text: ['H",
    b'{"question": "How many?", "answer": true}': "has a bool in 'answer', not text: True",
    b'{"question": "How many?", "answer": NaN}': "has an empty 'answer': nan",
    b'{"question": "\\ud800?", "answer": "#### 4"}': "has broken Unicode in 'question'",
    b'{"question": "How many?", "answer": "It is four."}': "has no gold",
    b'{"question": "How many?", "answer": "It is 4 or 5."}': "has no gold: 'It is 4 or 5.'",
    b'{"question": "How many?", "answer": "2+2=4\\nIt is 4."}': "has no gold: '2+2=4\\nIt",
    b'{"question": "How many?", "answer": "\\\\boxed{4} or \\\\boxed{5}"}': (
        r"has several \boxed{} that do not agree in 'answer': "
    ),
    b'{"question": "How many?", "answer": Infinity}': (
        "has a float in 'answer', not a finite number: inf"
    ),
    b'{"question": "How many?", "answer": "#### 4\\n#### 5"}': "has #### twice",
    b'{"question": "How many?", "answer": "2+2=4\\n####"}': "has a gold that is no number: ''",
    b'{"question": "How many?", "answer": "#### many"}': "has a gold that is no number: 'many'",
    b'{"question": "How many?", "answer": "#### 4\\nor 5"}': "has a gold that is no number",
    b'{"question": "ADA has 1 eggs and  finds 2. how many eggs has she?", "answer": "3"}': (
        "repeats the question or the id of {path}, line 1"
    ),
}


@pytest.mark.parametrize("line", BAD_LINES, ids=list(BAD_LINES.values()))
def test_a_bad_row_is_named_by_file_line_and_reason_or_left_out(
    tmp_path: Path, line: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    path = write_jsonl(tmp_path / "data.jsonl", [record(1), record(2)])
    path.write_bytes(path.read_bytes() + b"\n" + line + b"\n" + json.dumps(record(3)).encode())
    reason = BAD_LINES[line].replace("{path}", str(path))
    message = message_of(path)
    assert f"{path}, line 4: the row {reason}" in message
    assert "--skip_bad_rows" in message
    with caplog.at_level(logging.WARNING, logger="abacist"):
        good = load_problems(path, split="all", skip_bad_rows=True)
    assert [p.answer for p in good] == ["3", "4", "5"]
    assert "bad rows left out: 1" in caplog.text and reason in caplog.text


def test_a_row_that_was_left_out_does_not_block_a_good_one_with_its_id(tmp_path: Path) -> None:
    rows = [record(1, id="a"), record(2, id="a") | {"answer": "none"}, record(2, id="b")]
    path = write_jsonl(tmp_path / "data.jsonl", rows)
    kept = load_problems(path, split="all", skip_bad_rows=True)
    assert [p.problem_id for p in kept] == ["a", "b"]


@pytest.mark.parametrize("content", [b"", b"\n\n", b"\xef\xbb\xbf"])
def test_an_empty_file_is_an_error(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "data.jsonl"
    path.write_bytes(content)
    assert "no problems in it" in message_of(path)


def test_a_file_of_bad_rows_only_is_an_error_even_when_they_may_be_skipped(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "data.jsonl", [{"text": "x"}])
    message = message_of(path, skip_bad_rows=True)
    assert "no problems in it" in message and "no column 'question'" in message


DAMAGED_FILES = {
    "data.json": b'[{"question": "How many?", "answer": "4"},',
    "data.csv": b'question,answer\nHow many?,"2+2=4\n#### 4',
    "data.parquet": b"PAR1 and nothing more",
    "data.xlsx": b"PK",
    "data": b"{}",
}


@pytest.mark.parametrize("name", DAMAGED_FILES)
def test_a_file_damaged_as_a_whole_is_an_error_whatever_may_be_skipped(
    tmp_path: Path, name: str
) -> None:
    path = tmp_path / name
    path.write_bytes(DAMAGED_FILES[name])
    assert str(path) in message_of(path, skip_bad_rows=True)


def test_csv_rows_are_named_by_their_first_line(tmp_path: Path) -> None:
    path = tmp_path / "data.csv"
    path.write_bytes(b'question,answer\nOne?,"a\nb\n#### 1"\nTwo?,"#### 2",extra\n')
    assert "line 5: the row has 3 fields, the header has 2" in message_of(path)
    path.write_bytes(b"question,answer\nTw\xff?,#### 2\n")
    assert "line 2: the row is not valid UTF-8" in message_of(path)


def test_lines_end_at_newlines_only(tmp_path: Path) -> None:
    odd = record(1) | {"question": "Ada\u2028has\u2029one\x85egg\x0b\x0c\x1c. How many?"}
    (problem,) = load_problems(write_jsonl(tmp_path / "data.jsonl", [odd]), split="all")
    assert problem.question == odd["question"]


TEXT = st.text(st.characters(codec="utf-8"), min_size=1).filter(lambda text: bool(text.strip()))


@settings(max_examples=60, deadline=None)
@given(questions=st.lists(TEXT, min_size=1, unique_by=normalise_question), crlf=st.booleans())
def test_any_question_survives_a_jsonl_file(
    tmp_path_factory: pytest.TempPathFactory, questions: list[str], crlf: bool
) -> None:
    path = tmp_path_factory.mktemp("data") / "data.jsonl"
    write_jsonl(path, [{"question": q, "answer": "2+2=4\n#### 4"} for q in questions])
    if crlf:
        path.write_bytes(path.read_bytes().replace(b"\n", b"\r\n"))
    assert [p.question for p in load_problems(path, split="all")] == [q.strip() for q in questions]


def test_a_bare_gold_makes_a_problem_of_difficulty_one(tmp_path: Path) -> None:
    golds: list[object] = [4, "1,450", -3, 2.5, "$18", "0.75", 12.0]
    rows: list[Record] = [{"q": f"Number {n}?", "gold": gold} for n, gold in enumerate(golds)]
    path = write_jsonl(tmp_path / "data.jsonl", rows)
    problems = load_problems(path, split="all", question_column="q", answer_column="gold")
    assert [p.answer for p in problems] == ["4", "1,450", "-3", "2.5", "$18", "0.75", "12"]
    assert {(p.solution, p.difficulty) for p in problems} == {("", 1)}


def test_difficulty_counts_the_solution_lines_that_hold_something(tmp_path: Path) -> None:
    row = record(1) | {"answer": "one\u2028still one\n\n  \ntwo\r\nthree\n#### 3"}
    (problem,) = load_problems(write_jsonl(tmp_path / "data.jsonl", [row]), split="all")
    assert problem.difficulty == 3


def test_an_id_of_the_source_is_kept_and_else_made_from_the_question(tmp_path: Path) -> None:
    rows = [record(1, id=0), record(2, id=""), record(3, problem_id="mine", id=7), record(4)]
    first, second, third, fourth = load_problems(
        write_jsonl(tmp_path / "data.jsonl", rows), split="all"
    )
    assert (first.problem_id, third.problem_id) == ("0", "mine")
    assert len(second.problem_id) == len(fourth.problem_id) == 16


def test_an_id_does_not_depend_on_position_case_or_spacing(tmp_path: Path) -> None:
    loud = record(2) | {"question": str(record(2)["question"]).upper().replace(" ", "\n ")}
    a = load_problems(write_jsonl(tmp_path / "a.jsonl", [record(1), record(2)]), split="all")
    b = load_problems(write_jsonl(tmp_path / "b.jsonl", [loud, record(1)]), split="all")
    assert {p.problem_id for p in a} == {p.problem_id for p in b}


def ids_by_split(path: Path) -> dict[str, set[str]]:
    splits = ("train", "selection", "heldout")
    return {split: {p.problem_id for p in load_problems(path, split=split)} for split in splits}


@pytest.mark.parametrize("count", [3, 4, 5, 8, 20, 200])
@pytest.mark.parametrize("edges", [None, (0.0, 0.0), (0.0, 1.0), (1.0, 1.0)], ids=str)
def test_the_splits_share_nothing_leave_nothing_and_are_never_empty(
    tmp_path: Path, count: int, edges: tuple[float, float] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    if edges:  # chance puts all rows on one side
        monkeypatch.setattr("abacist.task.problems._EDGES", edges)
    for trial in range(1 if edges else 8):
        rows = [record(1000 * trial + n) for n in range(count)]
        path = write_jsonl(tmp_path / "data.jsonl", rows)
        splits = ids_by_split(path)
        assert all(splits.values())
        assert sum(map(len, splits.values())) == count
        assert len(set().union(*splits.values())) == count


def test_too_few_rows_to_cut_is_an_error_that_says_how_many_are_needed(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "data.jsonl", [record(1), record(2)])
    with pytest.raises(DataError, match=r"2 rows(.|\n)*at least 3 rows"):
        load_problems(path)


def test_a_row_stays_in_its_split_when_others_come_or_the_order_changes(tmp_path: Path) -> None:
    rows = [record(n) for n in range(400)]
    some = ids_by_split(write_jsonl(tmp_path / "some.jsonl", rows[:200]))
    more = ids_by_split(write_jsonl(tmp_path / "more.jsonl", rows[::-1]))
    assert all(some[split] <= more[split] for split in some)


def test_a_limit_draws_by_seed_whatever_the_row_order(tmp_path: Path) -> None:
    rows = [record(n) for n in range(50)]
    ahead = write_jsonl(tmp_path / "ahead.jsonl", rows)
    behind = write_jsonl(tmp_path / "behind.jsonl", rows[::-1])
    ten = load_problems(ahead, split="all", limit=10, seed=1)
    assert ten == load_problems(behind, split="all", limit=10, seed=1)
    assert ten == load_problems(ahead, split="all", limit=20, seed=1)[:10]
    assert ten != load_problems(ahead, split="all", limit=10, seed=2)
    assert len(load_problems(ahead, split="all", limit=1000)) == 50
    in_order = load_problems(ahead, split="all")
    # What is drawn for another purpose, such as worked examples, is another draw.
    assert draw(in_order, seed=1, purpose="limit")[:10] == ten
    assert draw(in_order, seed=1, purpose="shots")[:10] != ten
    assert [p.question for p in in_order] == [row["question"] for row in rows]


@pytest.mark.parametrize("options", [{"limit": 0}, {"limit": -1}, {"split": "validation"}])
def test_an_impossible_limit_or_split_is_a_usage_error(options: dict[str, object]) -> None:
    with pytest.raises(UsageError):
        load_problems("generated", **options)  # type: ignore[arg-type]


def test_generated_problems_need_nothing_and_know_their_structure() -> None:
    problems = load_problems("generated", limit=20, seed=3)
    assert len(problems) == 20
    assert all(p.structure and p.unseen_structure is False and p.solution for p in problems)
    assert problems[:5] == load_problems("generated", limit=5, seed=3)
    held_out = load_problems("generated", split="heldout", limit=30)
    assert not {p.problem_id for p in problems} & {p.problem_id for p in held_out}
    with pytest.raises(DataError, match="no split 'test'"):
        load_problems("generated", split="test")


@pytest.mark.parametrize("name", ["missing.jsonl", "./no/such", "/no/such", "a/b/c", "\0", ""])
def test_a_path_that_is_not_there_is_never_taken_for_a_hub_id(name: str) -> None:
    with pytest.raises(DataError, match="no such file or folder"):
        load_problems(name)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, object]]:
    """A Hub that is reached or not, and a cache, both made of paper."""
    state: dict[str, object] = {"reached": True, "rows": [record(n) for n in range(4)]}

    def dataset_info(name: str, *, timeout: float) -> None:
        state["timeout_seconds"] = timeout
        if not state["reached"]:
            raise ConnectionError("no route")

    def load_dataset(name: str, config: str | None, *, split: str) -> object:
        state["asked"] = (name, config, split)
        state["offline"] = fake.config.HF_HUB_OFFLINE
        if state["rows"] is None:
            raise FileNotFoundError("not in the cache\nand more lines")
        return state["rows"]

    fake = types.SimpleNamespace(
        load_dataset=load_dataset, config=types.SimpleNamespace(HF_HUB_OFFLINE=False)
    )
    api = types.SimpleNamespace(dataset_info=dataset_info)
    monkeypatch.setitem(sys.modules, "datasets", fake)
    monkeypatch.setattr("huggingface_hub.HfApi", lambda: api)
    yield state
    assert fake.config.HF_HUB_OFFLINE is False


def test_gsm8k_on_the_hub_is_read_in_its_main_config(hub: dict[str, object]) -> None:
    assert len(load_problems("openai/gsm8k", split="test")) == 4
    assert hub["asked"] == ("openai/gsm8k", "main", "test")
    assert hub["offline"] is False


def test_a_narrow_float_column_of_the_hub_gives_the_decimals_that_were_stored(
    hub: dict[str, object],
) -> None:
    class Table(list[Record]):
        features = types.MappingProxyType(
            {
                "answer": types.SimpleNamespace(dtype="float32"),
                "question": types.SimpleNamespace(dtype="string"),
            }
        )

    widened = 0.10000000149011612  # what a float32 0.1 is in Python
    hub["rows"] = Table([{"question": "How much?", "answer": widened}])
    (problem,) = load_problems("somebody/prices", split="all")
    assert problem.answer == "0.1"


def test_an_unreachable_hub_is_given_up_within_seconds_and_the_cache_is_used(
    hub: dict[str, object],
) -> None:
    hub["reached"] = False
    assert len(load_problems("openai/gsm8k", split="all")) == 4
    assert hub["offline"] is True
    assert hub["timeout_seconds"] == sources.HUB_TIMEOUT_SECONDS <= 10


def test_without_hub_and_cache_the_error_names_the_way_on(hub: dict[str, object]) -> None:
    hub.update(reached=False, rows=None)
    with pytest.raises(DataError) as caught:
        load_problems("somebody/problems")
    message = str(caught.value)
    for expected in ("somebody/problems", "cannot be reached: no route", "local path", "generated"):
        assert expected in message
    assert "offline" not in message.lower(), "nobody asked for offline mode"


def test_a_data_set_that_offline_mode_withholds_names_the_variable_that_was_set(
    hub: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    for variable in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    hub.update(rows=None)
    config = sys.modules["datasets"].config
    monkeypatch.setattr(config, "HF_HUB_OFFLINE", True)
    with pytest.raises(DataError, match=r"offline mode \(HF_DATASETS_OFFLINE\)"):
        load_problems("somebody/problems")
    monkeypatch.undo()
    config.HF_HUB_OFFLINE = False


@pytest.mark.parametrize(
    ("kind", "status", "says", "way_on"),
    [
        (RepositoryNotFoundError, 401, "no such data set", "Check the spelling"),
        (GatedRepoError, 403, "is gated", "hf auth login"),
        (RevisionNotFoundError, 404, "no revision 'v9'", "branches and tags"),
        (HfHubHTTPError, 502, "would not send it: proxy", "Try again later"),
    ],
)
def test_what_the_hub_answers_about_a_data_set_is_told_apart(
    kind: type[HfHubHTTPError], status: int, says: str, way_on: str
) -> None:
    # huggingface_hub 2 answers with another library's class than 1 did: no test is about which.
    response: Any = types.SimpleNamespace(status_code=status, headers={}, request=None)
    answered = kind("proxy\nand more", response=response)
    message, hint = fault(answered, "lab/sums", "data set", "v9")
    assert says in message and way_on in hint and "\n" not in message


def test_gsm8k_reads_whole_and_every_gold_verifies_against_itself() -> None:
    if not GSM8K.is_dir():
        pytest.skip("the data of the project's lab (../shared/gsm8k) is not here")
    train, test = (load_problems(GSM8K, split=split) for split in ("all", "test"))
    assert (len(train), len(test)) == (7473, 1319)
    assert all(same_answer(p.answer, p.answer) for p in train + test)
    by_difficulty = [sum(p.difficulty == n for p in train) for n in range(2, 10)]
    assert by_difficulty == [1961, 2149, 1659, 955, 419, 227, 90, 13]


def test_the_cut_of_gsm8k_is_frozen_because_published_figures_rest_on_it() -> None:
    if not GSM8K.is_dir():
        pytest.skip("the data of the project's lab (../shared/gsm8k) is not here")
    sizes = {s: len(load_problems(GSM8K, split=s)) for s in ("train", "selection", "heldout")}
    assert sizes == {"train": 6585, "selection": 284, "heldout": 604}


def test_a_problem_cannot_be_changed(tmp_path: Path) -> None:
    problem = Problem("id", "How many?", "", "4", 1)
    with pytest.raises(AttributeError):
        problem.answer = "5"  # type: ignore[misc]
