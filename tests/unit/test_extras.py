"""The other columns of the data reach reward functions, as in TRL."""

from __future__ import annotations

import datetime
import json
from dataclasses import replace
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st

from abacist.errors import DataError
from abacist.learning.config import load_config
from abacist.learning.resume.resuming import ingredient_differences
from abacist.learning.rewards import refuse_hackable
from abacist.learning.tracking import Silent
from abacist.proof.evaluation import Evaluation
from abacist.records.provenance import build_manifest
from abacist.task import rows as task_rows
from abacist.task.audit.audit import audit
from abacist.task.audit.findings import Kind
from abacist.task.audit.gold_findings import gold_findings
from abacist.task.extras import OWN_COLUMNS, TRL_NAMES, shared_extras
from abacist.task.problems import Problem, load_problems
from abacist.task.prompts import to_dataset_rows
from abacist.task.rewards import load_reward_funcs
from evaluated import GOOD, evaluation, problem


@pytest.fixture(autouse=True)
def _say_again() -> None:
    task_rows._warn_once.cache_clear()


def read(folder: Path, rows: list[dict[str, Any]], **options: Any) -> list[Problem]:
    path = folder / "data.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return load_problems(path, split="all", **options)


def rows(count: int = 6) -> list[dict[str, Any]]:
    return [
        {"question": f"What is {n} + 2?", "answer": str(n + 2), "topic": f"topic {n}",
         "tags": ["a"] * n, "meta": {"level": n}}
        for n in range(count)
    ]  # fmt: skip


def shared(*given: dict[str, object]) -> tuple[list[dict[str, object]], str]:
    return shared_extras(given, answer_column="answer", prompt_column="question")


def test_extra_columns_stand_in_the_rows_that_trl_trains_on(tmp_path: Path) -> None:
    data = Dataset.from_list(to_dataset_rows(read(tmp_path, rows())))
    assert data["topic"][:2] == ["topic 0", "topic 1"] and data["tags"][2] == ["a", "a"]
    assert data["meta"][3] == {"level": 3} and data["answer"][3] == "5"
    assert data["question"][0] == "What is 0 + 2?"


def test_a_row_that_lacks_a_column_has_none_there(tmp_path: Path) -> None:
    given_ = [{"question": "1?", "answer": "1"}, {"question": "2?", "answer": "2", "topic": "x"}]
    data = Dataset.from_list(to_dataset_rows(read(tmp_path, given_)))
    assert data["topic"] == [None, "x"]


@pytest.mark.parametrize("name", sorted({*OWN_COLUMNS, *TRL_NAMES} - {"answer", "problem_id"}))
def test_no_column_of_the_data_takes_a_name_that_means_something_else(
    name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (problem,) = read(tmp_path, [{"question": "1?", "answer": "1", name: "hard", "topic": "x"}])
    assert name not in problem.columns and problem.columns["topic"] == "x"
    assert f"the column {name!r}: the name is" in caplog.text
    (row,) = to_dataset_rows([problem])
    assert row["difficulty"] == 1 and isinstance(row["prompt"], list)


def test_an_answer_column_that_is_not_the_gold_is_said_to_be_hidden(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    row = {"question": "1?", "answer": "long text", "final": "1"}
    (problem,) = read(tmp_path, [row], answer_column="final")
    (dataset_row,) = to_dataset_rows([problem])
    assert dataset_row["answer"] == "1" and dataset_row["final"] == "1"
    assert "'answer'" in caplog.text


def test_the_gold_reaches_rewards_by_its_own_name_too(tmp_path: Path) -> None:
    """TRL's own examples take the column `ground_truth`."""
    rows = [{"prompt": f"{n} + 2?", "ground_truth": str(n + 2)} for n in range(6)]
    (row, *_) = to_dataset_rows(read(tmp_path, rows))
    assert row["ground_truth"] == row["answer"] == "2"

    def exact(completions: Any, ground_truth: Any, **columns: Any) -> list[float]:
        texts = [completion[0]["content"] for completion in completions]
        return [float(gold in text) for text, gold in zip(texts, ground_truth, strict=True)]

    found = audit([exact], read(tmp_path, rows), thorough=False)
    assert not {one.kind for one in found.findings} & {Kind.NO_COLUMN, Kind.FAILS}


def test_problems_of_different_sources_make_one_table() -> None:
    one = Problem("a", "1?", "", "1", 1, columns={"topic": "x"})
    rows = to_dataset_rows([one, Problem("b", "2?", "", "2", 1)])
    assert [row["topic"] for row in rows] == ["x", None]


MIXED = {
    "text and number": [1, "a"],
    "number and yes": [1, True],
    "object and list": [{}, []],
    "inside a list": [[1], ["a"]],
    "inside an object": [{"a": 1}, {"a": "b"}],
    "too large": [2**70, 1],
    "exact integers and decimals": [2**60, 0.5],
    "a lone surrogate": ["\ud800", "a"],
}


@pytest.mark.parametrize("kind", MIXED)
def test_a_column_that_no_table_can_hold_is_left_out_and_named(kind: str) -> None:
    found, said = shared(*({"odd": value, "fine": 1} for value in MIXED[kind]))
    assert found == [{"fine": 1}, {"fine": 1}]
    assert "rewards do not get the column 'odd': it " in said


SCALARS = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(allow_nan=False), st.text(max_size=5)
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3), st.dictionaries(st.sampled_from("abc"), inner, max_size=2)
    ),
    max_leaves=4,
)


@settings(max_examples=150, deadline=None)
@given(st.lists(st.fixed_dictionaries({"x": VALUES, "y": VALUES}), min_size=1, max_size=5))
def test_whatever_is_kept_makes_a_table(given_: list[dict[str, object]]) -> None:
    found, _ = shared(*given_)
    columns = found[0].keys()
    assert all(one.keys() == columns for one in found)
    if columns:
        Dataset.from_list([{**one, "prompt": "x"} for one in found])


def test_dates_and_decimals_of_a_table_are_kept() -> None:
    found, said = shared({"day": datetime.date(2026, 1, 1), "price": Decimal("1.5")})
    assert found[0]["price"] == Decimal("1.5") and said == ""
    Dataset.from_list(found)


def test_a_run_notices_changed_extras_and_nothing_else_changes_its_fingerprint(
    tmp_path: Path,
) -> None:
    def data(found: list[Problem]) -> dict[str, Any]:
        made: dict[str, Any] = build_manifest(seed=0, argv=[], problems=found, source="x")["data"]
        return made

    plain = [{"question": "What is 1? ", "answer": "1"}]
    assert "columns_sha256" not in data(read(tmp_path, plain))
    one, same, other = (
        data(read(tmp_path, [plain[0] | {"topic": topic, "at": None}])) for topic in "aab"
    )
    assert one == same and one["columns_sha256"] != other["columns_sha256"]
    assert one["sha256"] == other["sha256"] == data(read(tmp_path, plain))["sha256"]
    begun, now = {"data": one}, {"data": other}
    assert "columns that rewards read" in ingredient_differences(now, begun)[0]
    dated = Problem("p", "1?", "", "1", 1, columns={"day": datetime.date(2026, 1, 1)})
    assert data([dated])["columns_sha256"]


# The audit.


def by_topic(completions: Any, answer: Any, topic: Any, **columns: Any) -> list[float]:
    """Pays for the answer, and needs a text in every topic."""
    texts = [completion[0]["content"] for completion in completions]
    assert all(one.startswith("topic ") for one in topic)
    return [
        2.0 if f"<answer>\n{gold}\n</answer>" in text else 0.0
        for text, gold in zip(texts, answer, strict=True)
    ]


def test_the_audit_hands_extra_columns_to_rewards(tmp_path: Path) -> None:
    found = audit([by_topic], read(tmp_path, rows(8)), max_seconds=60, thorough=False)
    kinds = {finding.kind for finding in found.findings}
    assert not kinds & {Kind.NO_COLUMN, Kind.FAILS, Kind.FALSE_POSITIVE}
    assert found.answer_rewards == ("by_topic",)
    assert any("made-up problems are left out" in remark for remark in found.remarks)


def test_the_audit_names_a_column_that_is_in_no_row_and_those_that_are(tmp_path: Path) -> None:
    def wants(completions: Any, chapter: Any, **columns: Any) -> list[float]:
        return [0.0] * len(completions)

    found = audit([wants], read(tmp_path, rows(4)), thorough=False)
    (finding,) = [one for one in found.findings if one.kind is Kind.NO_COLUMN]
    assert "chapter" in finding.evidence and "topic, tags, meta" in finding.evidence


def gold(number: int, answer: str) -> Problem:
    return Problem(f"p{number}", f"What is it, {number}?", "", answer, 1)


def test_golds_that_no_reply_can_match_are_counted_with_examples_and_left_out() -> None:
    problems = [gold(1, "4"), gold(2, "Paris"), gold(3, "7"), gold(4, "12 or 13"), gold(5, "")]
    found = audit(["default"], problems, thorough=False)
    (finding,) = [one for one in found.findings if one.kind is Kind.UNMATCHED_GOLD]
    assert "3 of 5 golds: 'Paris' (problem p2), '12 or 13' (problem p4)" in finding.evidence
    assert found.num_problems_given == 2
    with pytest.raises(DataError, match="No reply can match any of these golds: 'Paris'"):
        audit(["default"], [gold(1, "Paris")], thorough=False)


def test_a_gold_whose_text_would_end_the_answer_block_matches_no_reply() -> None:
    problems = [gold(1, "4"), gold(2, "7 </answer>"), gold(3, "<b>8</b>")]
    matched, (finding,) = gold_findings(problems)
    assert matched == [problems[0], problems[2]] and "'7 </answer>'" in finding.evidence


def test_golds_that_hardly_any_reply_will_match_are_named() -> None:
    assert gold_findings([gold(1, "9" * 2_000), gold(2, "1450000000000")])[1] == []
    (long,) = gold_findings([gold(1, "0." + "3" * 2_000)])[1]
    assert long.kind is Kind.LONG_GOLD
    problems = [gold(1, "0.3333333333333333"), gold(2, "1/3"), gold(3, "0.125"), gold(4, "1e-9")]
    found = audit(["default"], problems, thorough=False)
    (finding,) = [one for one in found.findings if one.kind is Kind.LONG_GOLD]
    assert "2 of 4 golds have more than 8 decimals" in finding.evidence
    assert "'0.3333333333333333' (problem p1), '1e-9' (problem p4)" in finding.evidence


def test_training_names_golds_that_teach_nothing_once_before_it_begins() -> None:
    notes: list[str] = []

    class Noting(Silent):
        def note(self, text: str) -> None:
            notes.append(text)

    config, rewards = load_config("tiny", None, []), load_reward_funcs(["correctness"])
    golds = ["0.3333333333333333", "Paris", *map(str, range(40))]
    problems = [gold(number, text) for number, text in enumerate(golds)]
    refuse_hackable(config, problems, rewards, Noting())
    assert sum("1 of 42 golds: 'Paris'" in one for one in notes) == 1
    assert sum("have more than 8 decimals" in one for one in notes) == 1
    (said,) = [one for one in notes if "rewards:" in one]
    assert "sound" in said and "decimals" not in said and "Paris" not in said
    with pytest.raises(DataError, match="No reply can match any"):
        refuse_hackable(config, problems[1:2], rewards, Noting())


def test_an_evaluation_is_kept_and_read_without_extras_of_any_type(tmp_path: Path) -> None:
    asked = replace(problem(1), columns={"day": datetime.date(2026, 1, 1)})
    evaluation([GOOD], [asked]).save(tmp_path / "kept")
    (again,) = Evaluation.load(tmp_path / "kept").problems
    assert again == asked and not again.columns
