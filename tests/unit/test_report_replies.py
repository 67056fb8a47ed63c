"""The report: what earned the advantages, and what the page holds of the replies."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from abacist.records.rollout import read_rollout_table, write_rollouts
from abacist.task.reply import parse_reply, render_reply
from abacist.task.step_rewards import STEP_OUTCOMES, StepReward, step_rewards
from abacist.view.report.attribution import attribute, groups_of, weights_of
from abacist.view.report.explorer import (
    FIELDS,
    Explorer,
    answer_span,
    collect,
    step_spans,
    suspicion_of,
)
from abacist.view.report.page import page
from abacist.view.report.reading import read
from evaluated import GOOD, WORKLESS, WRONG
from made_runs import made_run, rollout
from unit.test_report import outline, rows_of

# What earned the advantage.


def table_of(tmp_path: Path, groups: list[list[tuple[float, float, float]]], weights=(1.0, 1.0)):
    """Rollouts of one step: (first reward, second reward, advantage) of each reply."""
    import dataclasses

    rows = []
    for number, members in enumerate(groups):
        for member, (first, second, advantage) in enumerate(members):
            base = rollout("run", 1, number, member, GOOD)
            rewards = {"first": first, "second": second}
            total = weights[0] * first + weights[1] * second
            rows.append(
                dataclasses.replace(base, rewards=rewards, reward=total, advantage=advantage)
            )
    write_rollouts(tmp_path / "r.parquet", rows)
    return read_rollout_table(tmp_path / "r.parquet")


def test_a_reward_that_alone_differs_earns_the_whole_advantage(tmp_path: Path) -> None:
    table = table_of(tmp_path, [[(2.0, 0.5, 1.0), (0.0, 0.5, -1.0)]])
    found = attribute(table)
    assert found.shares["first"] == pytest.approx([1.0])
    assert found.shares["second"] == pytest.approx([0.0])


def test_a_reward_that_pays_the_worse_replies_has_a_share_below_0(tmp_path: Path) -> None:
    table = table_of(tmp_path, [[(2.0, 0.0, 1.0), (0.0, 0.5, -1.0)]])
    assert attribute(table).shares["second"][0] < 0


@pytest.mark.parametrize(
    ("rewards", "weights"),
    [
        (["correctness", "integer", "strict_format", "soft_format", "xml_count", "mine"],
         [1.0, 0.2, 0.3, 0.4, 0.5, 3.0]),
        (["strict_format", "soft_format", "xml_count"], [0.3, 0.4, 0.5]),  # --control format
        (["random_control"], None),  # --control random
    ],
)  # fmt: skip
def test_a_control_weighs_what_it_pays_as_the_run_does(
    rewards: list[str], weights: list[float] | None
) -> None:
    settings = {"reward_funcs": ["default", "rewards/own.py:mine"],
                "reward_weights": [1, 0.2, 0.3, 0.4, 0.5, 3]}  # fmt: skip
    assert weights_of(settings, rewards) == weights
    assert weights_of({}, rewards) is None and weights_of({"reward_weights": "x"}, rewards) is None


def test_problems_of_two_runs_with_one_id_are_told_apart() -> None:
    found = Explorer()
    eggs = found.problem("1", "How many eggs?", "12", 1)
    assert found.problem("1", "How many cars?", "99", 1) != eggs
    assert found.problem("1", "How many eggs?", "12", 1) == eggs
    assert [one["gold"] for one in found.problems] == ["12", "99"]


def test_weights_count(tmp_path: Path) -> None:
    members = [(1.0, 0.0, 1.0), (0.0, 0.0, -1.0), (0.0, 1.0, 0.0)]
    table = table_of(tmp_path, [members], weights=(1.0, 0.0))
    assert attribute(table, [1.0, 0.0]).shares["second"] == pytest.approx([0.0])


def test_without_the_weights_that_were_paid_nothing_is_claimed(tmp_path: Path) -> None:
    members = [(1.0, 0.0, 1.0), (0.0, 2.0, -1.0)]
    table = table_of(tmp_path, [members], weights=(3.0, 1.0))
    assert attribute(table) is None and attribute(table, [3.0]) is None
    assert attribute(table, [3.0, 1.0]) is not None


def test_shares_of_a_group_are_the_covariances_of_its_rewards_with_their_sum(
    tmp_path: Path,
) -> None:
    # Sums 3, 1, 0, 0 about their mean 1: 2, 0, -1, -1. First about 0.5: 1.5, -0.5, -0.5, -0.5.
    members = [(2.0, 1.0, 2.0), (0.0, 1.0, 0.0), (0.0, 0.0, -1.0), (0.0, 0.0, -1.0)]
    found = attribute(table_of(tmp_path, [members]))
    assert found.shares["first"] == pytest.approx([(1.5 * 2 + 0.5 + 0.5) / 6])
    assert found.shares["second"] == pytest.approx([(0.5 * 2 + 0.5 + 0.5) / 6])


def test_each_group_counts_as_much_as_its_advantages(tmp_path: Path) -> None:
    by_first = [(2.0, 0.0, 3.0), (0.0, 0.0, -3.0)]
    by_second = [(0.0, 2.0, 1.0), (0.0, 0.0, -1.0)]
    found = attribute(table_of(tmp_path, [by_first, by_second]))
    assert found.shares["first"] == pytest.approx([0.9])


def test_rewards_that_were_normalized_one_by_one_count_by_their_deviations(tmp_path: Path) -> None:
    members = [(2.0, 0.0, 1.0), (2.0, 0.1, 1.0), (0.0, 0.0, -1.0), (0.0, 0.1, -1.0)]
    table = table_of(tmp_path, [members])
    found = attribute(table, normalized=True)
    assert found.shares["first"] == pytest.approx([0.5]) == found.shares["second"]
    assert attribute(table).shares["first"][0] > 0.99


def test_two_generations_of_one_step_are_two_groups(tmp_path: Path) -> None:
    """As runs of early versions hold them: both count their groups from 0."""
    import dataclasses

    folder = tmp_path / "rollouts"
    for part, (name, text) in enumerate((("easy", GOOD), ("hard", WRONG)), start=1):
        rows = [
            dataclasses.replace(rollout("run", 1, 0, member, text), problem_id=name)
            for member in range(4)
        ]
        write_rollouts(folder / f"step-000001-part{part}.parquet", rows)
    groups = groups_of(read_rollout_table(folder))
    assert [len(rows) for rows in groups] == [4, 4]


def test_a_step_without_differences_has_no_shares(tmp_path: Path) -> None:
    table = table_of(tmp_path, [[(1.0, 1.0, 0.0), (1.0, 1.0, 0.0)]])
    found = attribute(table)
    assert found.shares["first"] == [None] and found.length == [None]


@settings(max_examples=25, deadline=None)
@given(
    st.lists(
        st.lists(
            st.tuples(st.floats(-3, 3), st.floats(-3, 3), st.floats(-3, 3)), min_size=2, max_size=4
        ),
        min_size=1,
        max_size=4,
    )
)
def test_the_shares_of_a_step_add_up_to_one(tmp_path_factory, groups) -> None:
    found = attribute(table_of(tmp_path_factory.mktemp("table"), groups))
    total = [shares[0] for shares in found.shares.values()]
    if None not in total:
        assert sum(total) == pytest.approx(1.0, abs=1e-6)
    assert found.length[0] is None or -1e-9 <= found.length[0] <= 1 + 1e-9


# What the page holds of the replies.


def test_whole_groups_are_kept_and_rare_outcomes_are_among_them(tmp_path: Path) -> None:
    path = made_run(tmp_path / "run", steps=60, groups=5, texts=(WRONG,), finished=False)
    odd = [rollout("run", 37, 5, member, GOOD) for member in range(4)]
    write_rollouts(path / "rollouts/step-000037-part2.parquet", odd)
    found = collect([read(path)], limit=100)
    assert found.total == 60 * 5 * 4 + 4 and found.kept <= 100
    rows = [dict(zip(FIELDS, row, strict=True)) for row in found.rows]
    assert [row["step"] for row in rows if row["outcome"] == 0] == [37] * 4
    sizes: dict[tuple[int, int], int] = {}
    for row in rows:
        sizes[row["step"], row["group"]] = sizes.get((row["step"], row["group"]), 0) + 1
    assert set(sizes.values()) == {4}
    assert max(row["step"] for row in rows) > 50 and min(row["step"] for row in rows) < 10


def test_the_page_says_that_replies_were_left_out_and_where_they_are(tmp_path: Path) -> None:
    path = made_run(tmp_path / "run", steps=30, finished=False)
    assert "of 240 replies are here" in page([read(path)], replies=40)


def test_of_a_run_that_pays_steps_the_page_tells_without_its_script(tmp_path: Path) -> None:
    reading = read(made_run(tmp_path / "run", pays_steps=True, texts=(GOOD, WRONG)))
    text = page([reading]).partition('<div id="plain">')[2].partition("</section>")[0]
    assert "steps: 2 right" in text and "steps: 1 wrong, 1 not judged" in text
    silent = page([read(made_run(tmp_path / "other"))]).partition('<div id="plain">')[2]
    assert "steps: " not in silent


def test_the_share_of_right_steps_is_a_curve_of_runs_that_pay_them(tmp_path: Path) -> None:
    path = made_run(tmp_path / "run")
    assert "steps that are right, %" not in page([read(path)])
    metrics = path / "metrics.jsonl"
    rows = [json.loads(line) for line in metrics.read_text("utf-8").splitlines()]
    lines = [json.dumps(row | {"step_reward": 0.5}) for row in rows]
    metrics.write_text("\n".join(lines) + "\n", "utf-8")
    assert "steps that are right, %" in page([read(path)])


def test_changed_problems_are_kept_first_and_marked(tmp_path: Path) -> None:
    rows = [
        dict(zip(FIELDS, row, strict=True))
        for row in collect([read(made_run(tmp_path / "run"))], limit=60).rows
    ]
    changed = [row for row in rows if row["change"] is not None]
    assert {row["change"] for row in changed} == {0, 1} and len(changed) == 14


@pytest.mark.parametrize(
    ("text", "read_there"),
    [
        (GOOD, "7"),
        ("😀" + GOOD, "7"),
        ("<reasoning>No <answer>3</answer>.</reasoning><answer> 12 </answer>", "12"),
        ("<answer>3</answer><answer>4</answer>", ""),
        ("plain 7", ""),
    ],
)
def test_the_characters_from_which_the_answer_was_read_are_marked(text: str, read_there) -> None:
    start, end = answer_span(text, parse_reply(text).answer)
    units = text.encode("utf-16-le")
    assert units[2 * start : 2 * end].decode("utf-16-le") == read_there


@given(st.text(alphabet="<>/answerig 7\n😀", max_size=120))
def test_no_text_breaks_the_mark(text: str) -> None:
    start, end = answer_span(text, parse_reply(text).answer)
    assert 0 <= start <= end <= len(text.encode("utf-16-le")) // 2


@pytest.mark.parametrize("before", ["", "😀 日\n", "x" * 40 + "𝄞"])
def test_what_is_marked_of_a_step_is_its_text(before: str) -> None:
    text = before + "😀 1 + 1 = 2\n😀😀 2 + 2 = 5\nand 3 - 1 = 2"
    steps = step_rewards(text, "1 + 1 = 2", is_correct=False)
    units = text.encode("utf-16-le")
    spans = step_spans(text, text, steps)
    assert spans is not None
    shown = [units[2 * start : 2 * end].decode("utf-16-le") for start, end, _ in spans]
    assert shown == [text[step.start : step.end] for step in steps]
    assert [STEP_OUTCOMES[place] for _, _, place in spans] == ["right", "wrong", "not judged"]


STEPS = st.builds(
    StepReward, st.integers(-3, 30), st.integers(-3, 30), st.sampled_from([None, 0.0, 1.0])
)


@given(st.text(alphabet="a😀\n", max_size=25), st.lists(STEPS, max_size=6))
@example("a😀a", [StepReward(0, 2, 1.0)] * 2)
def test_no_strangers_steps_mark_what_is_not_there_or_twice(text: str, steps: list) -> None:
    spans = step_spans(text, text, steps)
    assert spans is not None and [one[2] for one in spans] == [
        STEP_OUTCOMES.index(step.outcome) for step in steps
    ]
    edges = [edge for start, end, _ in spans if end for edge in (start, end)]
    assert edges == sorted(edges)
    for step, (start, end, _) in zip(steps, spans, strict=True):
        if end:
            units = text.encode("utf-16-le")[2 * start : 2 * end]
            assert (
                0 <= step.start < step.end
                and units.decode("utf-16-le") == (text[step.start : step.end])
            )


def test_in_a_reply_that_was_cut_no_step_is_marked_and_all_are_counted(tmp_path: Path) -> None:
    long = render_reply("3 + 4 = 7\n" + "word " * 5_000 + "\n7 + 5 = 12\n1 + 1 = 3", "12")
    run = made_run(tmp_path / "run", steps=1, groups=1, texts=[long, GOOD], pays_steps=True,
                   finished=False)  # fmt: skip
    cut, whole, *_ = rows_of(page([read(run)]))
    assert "characters left out" in cut["text"]
    assert [outcome for *_, outcome in cut["steps"]] == [0, 0, 1, 2]
    assert not any(start or end for start, end, _ in cut["steps"])
    assert all(end > start for start, end, _ in whole["steps"]) and whole["steps"]


def test_a_run_that_pays_no_steps_says_nothing_of_them(tmp_path: Path) -> None:
    html = page([read(made_run(tmp_path / "whole"))])
    assert {row["steps"] is None for row in rows_of(html)} == {True}
    assert "Steps were paid" not in " ".join(outline(html).text)
    paying = page([read(made_run(tmp_path / "run", pays_steps=True))])
    rows = rows_of(paying)
    assert {(row["source"] > 0, row["steps"] is None) for row in rows} >= {(True, True)}
    assert " ".join(outline(paying).text).count("Steps were paid as well") == 1


def test_a_file_of_steps_that_are_none_is_named_and_the_page_is_made(tmp_path: Path) -> None:
    run = made_run(tmp_path / "run", steps=2, finished=False)
    file = run / "rollouts" / "step-000002.parquet"
    table = pq.read_table(file)
    rows = [[None, {"start": 5, "end": None, "reward": 1.0}, {"start": -9, "end": 99, "reward": 1}]]
    pq.write_table(table.append_column("steps", pa.array(rows * table.num_rows)), file)
    assert [row["steps"] for row in rows_of(page([read(run)]))] == [None] * 8 + [[[0, 0, 0]]] * 8
    pq.write_table(table.append_column("steps", pa.array(["no"] * table.num_rows)), file)
    html = page([read(run)])
    assert len(rows_of(html)) == 8 and "its column steps holds string" in html


def test_what_is_suspicious_is_named() -> None:
    def reply(text: str, reward: float) -> dict:
        row = rollout("run", 1, 0, 0, text)
        return {"completion": text, "is_correct": row.is_correct, "reward": reward}

    assert suspicion_of(reply(GOOD, 2.5), [2.5]) is None
    assert suspicion_of(reply(WORKLESS, 2.5), []) == 0
    assert suspicion_of(reply(WRONG, 3.0), [2.5]) == 1
    assert suspicion_of(reply(WORKLESS.replace("7", "9"), 0.5), [2.5]) == 2
    assert suspicion_of(reply(WRONG, 0.5), [2.5]) is None
