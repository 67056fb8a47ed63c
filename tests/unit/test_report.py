"""The report: whatever is left of a run has its page, and what the page says is true."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import shutil
import socket
import struct
import threading
import urllib.error
import urllib.request
from html.parser import HTMLParser
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from hypothesis import example, given, settings
from hypothesis import strategies as st

from abacist.errors import RunError, UsageError
from abacist.proof.comparison.compare import compare
from abacist.records.openings import AFTER, EVAL, KEEPS_OPENINGS, Opening, note_opening
from abacist.records.rollout import read_rollout_table, write_rollouts
from abacist.records.rundir import write_json
from abacist.task.reply import parse_reply, render_reply
from abacist.task.step_rewards import STEP_OUTCOMES, StepReward, step_rewards
from abacist.view.report import writing
from abacist.view.report.attribution import attribute, groups_of
from abacist.view.report.explorer import FIELDS, answer_span, collect, step_spans, suspicion_of
from abacist.view.report.page import page
from abacist.view.report.reading import EVALUATION, RUN, SCRIPT, read
from abacist.view.report.serving import server
from abacist.view.report.writing import default_path, write_comparison, write_report
from evaluated import GOOD, WORKLESS, WRONG
from made_runs import HOSTILE, made_evaluations, made_run, rollout

VOID = {"meta", "link", "br", "img", "input", "hr", "path", "use", "image"}


class Outline(HTMLParser):
    """The elements of a page: whether they close in order, and what text stands in them."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.names: set[str] = set()
        self.attributes: list[tuple[str, str]] = []
        self.text: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.names.add(tag)
        self.attributes += [(name, value or "") for name, value in attrs]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.names.add(tag)
        self.attributes += [(name, value or "") for name, value in attrs]

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] not in ("script", "style"):
            self.text.append(data)


def outline(html: str) -> Outline:
    found = Outline()
    found.feed(html)
    assert not found.open
    return found


def data_of(html: str) -> dict:
    return json.loads(re.search(r'id="data">(.*?)</script>', html, re.DOTALL)[1])


def rows_of(html: str) -> list[dict]:
    data = data_of(html)
    return [dict(zip(data["fields"], row, strict=True)) for row in data["rows"]]


@pytest.fixture(scope="module")
def html(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The page of a whole run."""
    return page([read(made_run(tmp_path_factory.mktemp("whole") / "run"))])


def test_the_page_of_a_whole_run_holds_verdict_curves_replies_and_setup(html: str) -> None:
    found = outline(html)
    text = " ".join(found.text)
    assert "All 72 replies are here." in text
    assert "No proven change: 25.0 % → 50.0 % correct on 20 problems" in text
    for heading in ("What moved in training", "Where the time went", "Health", "Replies",
                    "How it was made", "How to read this"):  # fmt: skip
        assert heading in text
    assert "abacist train --config" in text
    assert len(rows_of(html)) == 4 * 2 * 4 + 2 * 20
    assert html.count("<svg") >= 8


def test_the_policy_lets_run_only_the_pages_own_script_and_style(html: str) -> None:
    policy = re.search(r'http-equiv="Content-Security-Policy" content="([^"]*)"', html)[1]
    assert "default-src 'none'" in policy and "unsafe" not in policy
    for name, kind in (("script", "<script>"), ("style", "<style>")):
        content = re.search(rf"{kind}(.*?)</{name}>", html, re.DOTALL)[1]
        digest = base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
        assert f"{name}-src 'sha256-{digest}'" in policy
    found = outline(html)
    assert not [name for name, _ in found.attributes if name == "style" or name.startswith("on")]
    fetched = [value for name, value in found.attributes if name in ("src", "href", "xlink:href")]
    assert all(value.startswith(("#", "data:image/png")) for value in fetched)


def test_ids_are_unique(html: str) -> None:
    found = outline(html)
    ids = [value for name, value in found.attributes if name == "id"]
    assert len(ids) == len(set(ids))


def test_hostile_replies_are_text_and_add_no_element(tmp_path: Path, html: str) -> None:
    tame = outline(html).names
    html = page([read(made_run(tmp_path / "wild", texts=HOSTILE, steps=16))])
    found = outline(html)
    assert found.names <= tame
    shown = {row["text"] for row in rows_of(html)}
    for text in HOSTILE:
        if len(text) < 10_000 and "\ud800" not in text:
            assert text in shown, text
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f\u202a-\u202e\u2066-\u2069]", html)


@pytest.mark.parametrize("name", ["<b>a&b", "$x_1$ und Äpfel"])
def test_the_name_of_a_folder_is_text(tmp_path: Path, name: str) -> None:
    html = page([read(made_run(tmp_path / name, steps=2))])
    assert name in " ".join(outline(html).text)


def test_the_page_says_how_often_the_held_out_problems_were_opened_and_if_that_record_was_changed(
    tmp_path: Path,
) -> None:
    run = made_run(tmp_path / "run")
    assert "run's record" not in page([read(run)])  # it has none from its beginning
    manifest = json.loads((run / "manifest.json").read_text(encoding="utf-8"))
    write_json(run / "manifest.json", manifest | {KEEPS_OPENINGS: True})
    assert any("openings.jsonl is gone" in remark for remark in read(run).remarks)
    for step in (4, 4):
        note_opening(run, Opening("heldout", AFTER, 20, "final", step, 20, "evals/after"))
    assert "put to the trained model once, after 4 steps of training" in page([read(run)])
    note_opening(run, Opening("heldout", EVAL, 20, "final", 4, 20))
    assert "put to the trained model 2 times: after 4 steps" in page([read(run)])
    lines = (run / "openings.jsonl").read_bytes().splitlines(keepends=True)
    (run / "openings.jsonl").write_bytes(lines[0] + lines[2])
    assert any("openings.jsonl was changed, line 2" in remark for remark in read(run).remarks)


def test_a_killed_run_says_where_it_is_and_has_no_verdict(tmp_path: Path) -> None:
    reading = read(made_run(tmp_path / "run", finished=False))
    assert any("at step 4 of 4" in line for line in reading.remarks)
    assert "no verdict yet" in " ".join(outline(page([reading])).text)


def test_a_run_without_a_step_opens(tmp_path: Path) -> None:
    path = made_run(tmp_path / "run", steps=1, finished=False)
    (path / "metrics.jsonl").unlink()
    shutil.rmtree(path / "rollouts")
    text = " ".join(outline(page([read(path)])).text)
    assert "No step has been logged yet." in text


def test_a_run_of_one_step_has_its_curves(tmp_path: Path) -> None:
    reading = read(made_run(tmp_path / "run", steps=1, finished=False))
    assert "What moved in training" in page([reading])


def test_damaged_files_are_named_and_the_rest_is_shown(tmp_path: Path) -> None:
    path = made_run(tmp_path / "run")
    (path / "rollouts/step-000002.parquet").write_bytes(b"PAR1 no more")
    (path / "evals/after/evaluation.json").write_text("{", encoding="utf-8")
    with (path / "metrics.jsonl").open("a", encoding="utf-8") as file:
        file.write('{"step": 5, "lo')
    reading = read(path)
    said = " ".join(reading.remarks)
    for what in ("step-000002.parquet", "'after'", "metrics.jsonl"):
        assert what in said
    assert {row["step"] for row in rows_of(page([reading])) if row["source"]} == {1, 3, 4}


def test_a_manifest_or_config_that_cannot_be_read_is_a_remark(tmp_path: Path) -> None:
    path = made_run(tmp_path / "run")
    (path / "manifest.json").write_text("[]", encoding="utf-8")
    (path / "config.yaml").write_text("{unclosed", encoding="utf-8")
    reading = read(path)
    assert reading.kind == RUN and len(reading.remarks) >= 2
    outline(page([reading]))


def test_the_folder_of_somebodys_own_script_is_read_by_its_trainer_state(tmp_path: Path) -> None:
    for name, steps in (("checkpoint-2", 2), ("checkpoint-10", 10)):
        folder = tmp_path / "out" / name
        folder.mkdir(parents=True)
        log = [{"step": step, "loss": 0.5, "reward": step / 10} for step in range(1, steps + 1)]
        (folder / "trainer_state.json").write_text(
            json.dumps({"log_history": log}), encoding="utf-8"
        )
    reading = read(tmp_path / "out")
    assert reading.kind == SCRIPT and reading.last_step == 10
    assert "trainer script" in " ".join(outline(page([reading])).text)


@pytest.mark.parametrize(
    "content", ["[]", "null", '{"log_history": 3}', "", '{"log_history": [1]}']
)
def test_a_strange_trainer_state_is_no_run(tmp_path: Path, content: str) -> None:
    (tmp_path / "trainer_state.json").write_text(content, encoding="utf-8")
    with pytest.raises(RunError, match="holds no run"):
        read(tmp_path)


def test_no_folder_and_an_empty_one_are_refused(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="no such run"):
        read(tmp_path / "none")
    with pytest.raises(RunError, match="holds no run"):
        read(tmp_path)


def test_an_evaluation_has_its_page(tmp_path: Path) -> None:
    made_evaluations()[0].save(tmp_path / "ev")
    reading = read(tmp_path / "ev")
    assert reading.kind == EVALUATION
    html = page([reading])
    assert "By the number of steps a problem takes" in html
    assert data_of(html)["sources"] == ["greedy"]


def test_several_runs_lie_over_one_another_and_are_compared(tmp_path: Path) -> None:
    readings = [
        read(made_run(tmp_path / name, seed=seed, steps=2)) for seed, name in enumerate("abc")
    ]
    html = page(readings)
    text = " ".join(outline(html).text)
    assert "One against the other" in text and "against a" in text
    assert data_of(html)["runs"] == ["a", "b", "c"]


def test_runs_of_one_name_are_told_apart_by_their_folders(tmp_path: Path) -> None:
    paths = [made_run(tmp_path / where / "run", steps=1, finished=False) for where in "xy"]
    assert data_of(page([read(path) for path in paths]))["runs"] == ["x/run", "y/run"]


def test_runs_on_other_problems_are_not_compared_and_the_page_says_so(tmp_path: Path) -> None:
    one, other = made_run(tmp_path / "one"), made_run(tmp_path / "other")
    before, after = (side.without({"p001"}) for side in made_evaluations())
    before.save(other / "evals/before")
    after.save(other / "evals/after")
    assert "is not compared with" in page([read(one), read(other)])


def test_a_resumed_runs_step_counts_once_and_the_later_line_wins(tmp_path: Path) -> None:
    path = made_run(tmp_path / "run")
    with (path / "metrics.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps({"step": 4, "loss": 0.1, "reward": 3.5}) + "\n")
    reading = read(path)
    assert len(reading.steps) == 4 and reading.metric("reward")[-1] == (4, 3.5)


def test_strange_metric_values_are_left_out(tmp_path: Path) -> None:
    path = made_run(tmp_path / "run")
    with (path / "metrics.jsonl").open("a", encoding="utf-8") as file:
        for value in ("null", '"text"', "true", "[1]", "NaN", "1e999"):
            file.write(f'{{"step": 9, "loss": 1, "reward": {value}, "entropy": {value}}}\n')
        file.write('{"step": "ten", "loss": 1}\n{"step": -3, "loss": 1}\n')
    reading = read(path)
    assert 9 not in dict(reading.metric("reward"))
    outline(page([reading]))


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("timings.jsonl", '{"step": 1, "step_time": 0}\n'),
        ("metrics.jsonl", '{"step": ' + "9" * 400 + ', "loss": 1.7e308, "reward": -1.7e308}\n'),
        ("metrics.jsonl", '{"step": 1, "loss": 1.7e308}\n{"step": 2, "loss": -1.7e308}\n'),
        ("config.yaml", "max_steps: .inf\nreward_weights: [1.0, null]\n2020-01-01: 3\n"),
        ("config.yaml", "max_steps: 1234567\nreward_weights: [a, b]\n"),
    ],
)
def test_odd_values_in_a_file_cost_no_page(tmp_path: Path, name: str, content: str) -> None:
    path = made_run(tmp_path / "run", steps=2, finished=False)
    (path / name).write_text(content, encoding="utf-8")
    outline(page([read(path)]))


@pytest.mark.parametrize("column", ["completion", "step", "group"])
def test_a_file_with_rows_without_a_value_is_named_and_left_out(tmp_path: Path, column) -> None:
    path = made_run(tmp_path / "run", steps=2, finished=False)
    file = path / "rollouts/step-000002.parquet"
    table = pq.read_table(file)
    nothing = pa.nulls(table.num_rows, table.schema.field(column).type)
    pq.write_table(table.set_column(table.column_names.index(column), column, nothing), file)
    reading = read(path)
    assert any("step-000002.parquet" in line for line in reading.remarks)
    assert reading.rollouts.num_rows == 8


def test_other_types_of_numbers_are_read_and_a_strangers_columns_are_left_out(
    tmp_path: Path,
) -> None:
    path = made_run(tmp_path / "run", steps=2, finished=False)
    file = path / "rollouts/step-000002.parquet"
    table = pq.read_table(file)
    at = table.column_names.index("group")
    table = table.set_column(at, "group", table["group"].cast(pa.int64()))
    table = table.append_column("reward_note", pa.array(["good"] * table.num_rows))
    pq.write_table(table, file)
    reading = read(path)
    assert reading.rollouts.num_rows == 16 and not reading.remarks[1:]
    outline(page([reading]))


def test_a_reward_beyond_all_bounds_costs_no_page(tmp_path: Path) -> None:
    import dataclasses

    path = made_run(tmp_path / "run", steps=1, finished=False)
    rows = [
        dataclasses.replace(rollout("run", 2, 0, member, GOOD), reward=value)
        for member, value in enumerate((1.5e308, -1.5e308, 0.0, None))
    ]
    write_rollouts(path / "rollouts/step-000002.parquet", rows)
    outline(page([read(path)]))


def test_a_damaged_evaluation_of_a_finished_run_is_not_called_absent(tmp_path: Path) -> None:
    path = made_run(tmp_path / "run")
    (path / "evals/after/evaluation.json").write_text("{", encoding="utf-8")
    said = " ".join(read(path).remarks)
    assert "'after' is left out" in said and "No problems were held out" not in said


def test_a_finished_run_without_its_manifest_is_not_called_unfinished(tmp_path: Path) -> None:
    path = made_run(tmp_path / "run")
    (path / "manifest.json").write_text("[]", encoding="utf-8")
    said = " ".join(read(path).remarks)
    assert "manifest.json" in said and "not come to its end" not in said


def test_the_state_that_came_furthest_is_read_wherever_it_lies(tmp_path: Path) -> None:
    for name, steps in ((".", 10), ("checkpoint-20", 20)):
        folder = tmp_path / "out" / name
        folder.mkdir(parents=True, exist_ok=True)
        log = [{"step": step, "loss": 0.5} for step in range(1, steps + 1)]
        text = json.dumps({"log_history": log})
        (folder / "trainer_state.json").write_text(text, encoding="utf-8")
    assert read(tmp_path / "out").last_step == 20


def test_seconds_stand_for_all_the_steps_since_the_last_log(tmp_path: Path) -> None:
    path = made_run(tmp_path / "run", steps=4, finished=False)
    rows = [json.loads(line) for line in (path / "metrics.jsonl").read_text("utf-8").splitlines()]
    kept = [json.dumps(row) for row in rows if row["step"] in (2, 4)]
    (path / "metrics.jsonl").write_text("\n".join(kept), encoding="utf-8")
    times = [{"step": 2, "step_time": 3.0}, {"step": 4, "step_time": 5.0, "eval_runtime": 7.0}]
    (path / "timings.jsonl").write_text("\n".join(map(json.dumps, times)), encoding="utf-8")
    reading = read(path)
    assert reading.seconds_of("step_time") == {2: 6.0, 4: 10.0}
    assert reading.seconds_of("eval_runtime") == {4: 7.0}


@pytest.mark.parametrize("name", ['a style="}main{display:none}x{"', "_hidden", 'id="main"'])
def test_a_name_of_a_reward_is_text_in_the_charts_and_no_style(tmp_path: Path, name: str) -> None:
    path = made_run(tmp_path / "run", steps=2, finished=False)
    rows = [
        {"step": step, "loss": 0.1, "reward": 1.0, f"rewards/{name}/mean": 0.5, "rewards/b/mean": 1}
        for step in (1, 2)
    ]
    text = "\n".join(map(json.dumps, rows))
    (path / "metrics.jsonl").write_text(text, encoding="utf-8")
    html = page([read(path)])
    style = re.search(r"<style>(.*?)</style>", html, re.DOTALL)[1]
    assert "}main{display" not in style
    assert name in " ".join(outline(html).text).replace("\u200b", "")


def test_tokens_are_not_on_the_page(tmp_path: Path) -> None:
    path = made_run(tmp_path / "run", steps=1, finished=False)
    secrets = {"system_prompt": "use hf_abcdefghijklmnop", "hub_token": "something-private"}
    with (path / "config.yaml").open("a", encoding="utf-8") as file:
        file.write(yaml.safe_dump(secrets))
    html = page([read(path)])
    assert "hf_abcdefghijklmnop" not in html and "something-private" not in html


def test_the_pages_own_script_stays_small(html: str) -> None:
    script = re.search(r"<script>(.*?)</script>", html, re.DOTALL)[1]
    assert len(script.encode()) < 300_000


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


def test_a_run_that_pays_no_steps_says_nothing_of_them(tmp_path: Path, html: str) -> None:
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


# Files and addresses.


def test_a_report_goes_into_its_run_and_replaces_only_a_page(tmp_path: Path) -> None:
    path = made_run(tmp_path / "run")
    target = default_path([path])
    assert target == path / "report.html"
    told = write_report([path], target)
    assert target.stat().st_size == told["bytes"]
    write_report([path], target)
    with pytest.raises(UsageError, match="is a folder"):
        write_report([path], path)
    with pytest.raises(UsageError, match="left alone"):
        write_report([path], path / "config.yaml")
    assert read(path).settings["model_name_or_path"] == "tiny"
    with pytest.raises(UsageError, match="not to stdout"):
        write_report([path], Path("-"))


def test_a_place_that_cannot_be_written_to_is_refused_by_its_name_before_anything_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writing, "read", None)
    (tmp_path / "file").write_text("", encoding="utf-8")
    for target in (tmp_path / "file" / "page.html", Path("/proc/page.html")):
        with pytest.raises(UsageError, match=f"{target} cannot be written"):
            write_report([tmp_path], target)


def test_what_is_missing_names_its_run_where_there_are_several(tmp_path: Path) -> None:
    paths = [made_run(tmp_path / "one"), made_run(tmp_path / "two", finished=False)]
    told = write_report(paths, tmp_path / "page.html")
    assert told["remarks"] and all(line.startswith("two: ") for line in told["remarks"])


def test_a_comparison_has_its_page(tmp_path: Path) -> None:
    found = compare(*made_evaluations())
    write_comparison(tmp_path / "c.html", ["B is <better>."], ("a", "b"), found)
    html = (tmp_path / "c.html").read_text(encoding="utf-8")
    outline(html)
    assert "B is &lt;better&gt;." in html and data_of(html)["sources"] == ["A", "B"]


@pytest.fixture
def address(tmp_path: Path):
    path = made_run(tmp_path / "run", finished=False)
    with server([path], port=0, replies=100) as web:
        threading.Thread(target=web.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{web.server_port}", path
        web.shutdown()


def test_a_served_page_follows_the_run(address) -> None:
    url, path = address
    first = urllib.request.urlopen(url + "/").read().decode()
    assert "at step 4 of 4" in first
    with (path / "metrics.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps({"step": 5, "loss": 0.1, "reward": 3.5}) + "\n")
    assert "at step 5 of 4" in urllib.request.urlopen(url + "/").read().decode()


def test_the_server_has_one_page_and_answers_only_to_this_machines_names(address) -> None:
    url, path = address
    with pytest.raises(urllib.error.HTTPError, match="404"):
        urllib.request.urlopen(url + "/../../etc/passwd")
    stranger = urllib.request.Request(url + "/", headers={"Host": "evil.example:80"})
    with pytest.raises(urllib.error.HTTPError, match="403"):
        urllib.request.urlopen(stranger)
    shutil.rmtree(path)
    with pytest.raises(urllib.error.HTTPError, match="503"):
        urllib.request.urlopen(url + "/")


def test_a_tab_that_is_closed_while_it_waits_prints_nothing(
    address, capfd: pytest.CaptureFixture[str]
) -> None:
    url, _ = address
    port = int(url.rsplit(":", 1)[1])
    with socket.create_connection(("127.0.0.1", port)) as gone:
        # Closed by a reset, so that writing to it fails.
        gone.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        gone.sendall(b"GET / HTTP/1.0\r\nHost: localhost:1\r\n\r\n")
    asked = urllib.request.Request(url + "/", method="HEAD")
    with urllib.request.urlopen(asked) as answer:  # made after the other's page
        assert answer.status == 200 and answer.read() == b""
        assert int(answer.headers["Content-Length"]) > 1000
    assert capfd.readouterr().err == ""


def test_a_port_that_is_taken_is_a_message(address) -> None:
    url, path = address
    with pytest.raises(UsageError, match="cannot be used"):
        server([path], port=int(url.rsplit(":", 1)[1]), replies=100)
    with pytest.raises(UsageError, match="cannot be used"):
        server([path], port=99_999, replies=100)


def test_token_ids_are_not_read(tmp_path: Path) -> None:
    reading = read(made_run(tmp_path / "run"))
    assert "completion_ids" not in reading.rollouts.column_names
    kept = pq.read_schema(reading.path / "rollouts/step-000001.parquet")
    assert "completion_ids" in kept.names
