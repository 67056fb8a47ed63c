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

from abacist.errors import RunError, UsageError
from abacist.proof.comparison.compare import compare
from abacist.records.openings import AFTER, EVAL, KEEPS_OPENINGS, Opening, note_opening
from abacist.records.rollout import write_rollouts
from abacist.records.rundir import write_json
from abacist.view.report import writing
from abacist.view.report.page import page
from abacist.view.report.reading import EVALUATION, RUN, SCRIPT, read
from abacist.view.report.serving import server
from abacist.view.report.writing import default_path, write_comparison, write_report
from evaluated import GOOD
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
    mine = tmp_path / "mine.html"
    mine.write_text("<p>years of work", encoding="utf-8")
    with pytest.raises(UsageError, match=r"is no page of Abacist's: it is left alone"):
        write_report([path], mine)
    assert mine.read_text(encoding="utf-8") == "<p>years of work"
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
